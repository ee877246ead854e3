"""Expert pools: small fine-tunes of one base, for tests, benchmarks and demonstrations of merging."""
