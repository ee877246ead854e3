"""Ray: actors that hold workers, the pool over them, and the job. A carrier, no more."""
