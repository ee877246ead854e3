"""The command line of ``evolve.py``, which ``evolver run`` uses as well.

It imports torch only when the configuration has passed the checks that need none, so that mistakes are said at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from cluster import options
from evolver.config.reading import config_at
from evolver.driver.early import refuse_early
from evolver.errors import BadInput


def run_job(arguments: Sequence[str] | None = None) -> int:
    """Run the configuration that the command line names, and return the exit status.

    Args:
        arguments: of ``evolve.py``; default: those of this process.
    """
    parser = argparse.ArgumentParser(prog="evolve.py", description="Search for the best merge of fine-tuned models.")
    parser.add_argument("config", help="the YAML file of the run")
    parser.add_argument("--run", help=options.RUN_NAME)
    parser.add_argument("--results", help=options.RESULTS)
    parser.add_argument("--retry-failed", action="store_true", help=options.RETRY_FAILED)
    given = parser.parse_args(arguments)
    try:
        config = config_at(given.config)
        refuse_early(config)
    except BadInput as error:
        print(error, file=sys.stderr)
        return 2
    from cluster.job import drive  # slow

    return drive(config, given.results, given.run, given.retry_failed)
