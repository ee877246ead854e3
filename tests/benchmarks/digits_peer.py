"""Runs the code of M2N2's authors on scikit-learn's digits: ``python digits_peer.py FOLDER --out models.npz``.

It runs in an environment of its own that has jax, optax, scikit-learn and tqdm, with the authors' repository in FOLDER.
It writes their two trained models to the file of --out, and prints one line of JSON for each method: the test accuracy
of the best model on training items, of every run, after each number of forward passes asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from typing import Any

os.environ["JAX_PLATFORM_NAME"] = "cpu"


def main() -> None:
    """Run what is asked for."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("folder")
    given.add_argument("--out", required=True)
    given.add_argument("--runs", type=int, default=10)
    given.add_argument("--passes", type=int, nargs="+", default=[1000, 10_000])
    given.add_argument("--only", nargs="+", default=[], help="names of methods; default: all")
    asked = given.parse_args()
    sys.path.insert(0, asked.folder)
    _models(asked.out)
    for name, method in _methods(asked.runs, max(asked.passes)).items():
        if asked.only and name not in asked.only:
            continue
        with contextlib.redirect_stdout(sys.stderr):
            runs = method()
        tested = {
            n: [100 * float(r["test_values"][min(n, len(r["test_values"])) - 1]) for r in runs] for n in asked.passes
        }
        print(json.dumps({"name": name, "tested": tested}), flush=True)


def _models(out: str) -> None:
    import numpy as np
    from data import load_data
    from helper_fn import get_pre_trained_models

    first, second = get_pre_trained_models()
    (x_train, y_train), (x_test, y_test) = load_data()
    np.savez(out, first=first, second=second, x_train=x_train, y_train=y_train, x_test=x_test, y_test=y_test)


def _methods(runs: int, passes: int) -> dict[str, Any]:
    from brute_force_fn import run_brute_force
    from map_elites_fn import run_map_elites
    from natural_niches_fn import run_natural_niches

    def niches(attraction: bool, alpha: float) -> Any:
        return run_natural_niches(
            runs, 20, passes, False, no_matchmaker=not attraction, no_crossover=False, no_splitpoint=False,
            use_pre_trained=True, alpha=alpha,
        )  # fmt: skip

    return {
        "a grid of slerp ratios": lambda: [{"test_values": [run_brute_force()["test_acc"]]}],
        "M2N2": lambda: niches(True, 1.0),
        "M2N2 without attraction": lambda: niches(False, 1.0),
        "genetic algorithm": lambda: niches(False, 0.0),
        "MAP-Elites": lambda: run_map_elites(runs, passes, False, True),
    }


if __name__ == "__main__":
    main()
