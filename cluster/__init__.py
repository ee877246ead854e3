"""Ray: actors that hold workers, the pool over them, and the job. A carrier; everything that can be wrong is in evolver."""
