"""Everything that needs Ray: actors that hold workers, the pool of these actors, jobs and sweeps.

Nothing here decides how a search goes on or how a model is scored. It only carries candidates to workers and results
back.
"""
