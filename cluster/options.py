"""What the options say that ``evolve.py`` and ``evolver run`` have in common.

This module imports nothing, because ``evolver --help`` should not wait for torch.
"""

RESULTS = "folder for all runs, or its URI; default: results, or ~/evolver-results in a Ray job"
RUN_NAME = "name of the run; default: the id of the Ray job, else the name in the configuration"
RETRY_FAILED = "try candidates again that failed in an earlier call, and continue the search from the first of them"
