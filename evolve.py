"""Entry point: ``python evolve.py CONFIG`` here, ``ray job submit … -- python evolve.py CONFIG`` on a cluster."""

import sys

from evolver.threads import let_threads_sleep


def start() -> int:
    """Run the search that the command line asks for, and return the exit status."""
    let_threads_sleep()
    from cluster.command import run_job as job  # it will import torch, which reads the environment when it is loaded

    return job()


if __name__ == "__main__":
    sys.exit(start())
