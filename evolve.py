"""Entry point: ``python evolve.py CONFIG`` here, ``ray job submit … -- python evolve.py CONFIG`` on a cluster."""

import sys

from cluster.job import main

if __name__ == "__main__":
    sys.exit(main())
