"""Entry point: ``python evolve.py CONFIG`` here, ``ray job submit … -- python evolve.py CONFIG`` on a cluster."""

import sys

from evolver.threads import let_threads_sleep


def start() -> int:
    """The main job."""
    let_threads_sleep()
    from cluster.job import run_job as job  # it brings torch, which reads how threads wait

    return job()


if __name__ == "__main__":
    sys.exit(start())
