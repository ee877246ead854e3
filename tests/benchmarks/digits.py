"""Two classifiers of five digits each, merged into one of ten: M2N2's experiment (Abrantes et al. 2025, section 4.1).

``python tests/benchmarks/digits.py --peer FOLDER --python PYTHON`` runs the authors' code from a clone in FOLDER, with
a Python that has jax, optax, scikit-learn and tqdm, and then this project's searches on the very same two models.
Every search is scored on the training items, and its best model on the test items, as the authors do. What was run is
kept in $EVOLVER_CACHE/searches/digits; the page on searches has a section of it.

The searches run without the rest of the project: no ledger, no workers. A model is built of its recipe by the same
code as in a run. As the two models have no ancestor in common, that of their task vectors is a model of zeros.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "configs" / "common")]

from packages import cache_folder  # noqa: E402

from evolver.checkpoints.weights import Checkpoint  # noqa: E402
from evolver.config import Budget  # noqa: E402
from evolver.config.reading import check_section  # noqa: E402
from evolver.merging.maker import RecipeMaker  # noqa: E402
from evolver.merging.materialise import Materialiser  # noqa: E402
from evolver.records import Candidate, Result  # noqa: E402
from evolver.report.text import markdown_table  # noqa: E402
from evolver.search import SEARCHES  # noqa: E402
from evolver.search.base import Setup  # noqa: E402

FOLDER = cache_folder() / "searches" / "digits"
KEPT, THEIRS = FOLDER / "ours.json", FOLDER / "peer.jsonl"
# The parameters in the order in which the authors flatten them.
SHAPES = {"layers.0.a": (64, 256), "layers.0.b": (256,), "layers.1.a": (256, 10), "layers.1.b": (10,)}
FOREVER = 10**6
# Each with the number of its candidates: samplers of Optuna and the portfolio, which has such samplers among its arms,
# take ever longer for a proposal, so they have a tenth of the others.
OURS: dict[str, tuple[dict[str, Any], int]] = {
    "m2n2": ({"algorithm": "m2n2", "archive": 20}, 10_000),
    "evolver": ({"algorithm": "evolver", "population": 20, "generations": FOREVER}, 10_000),
    "rand/1": (
        {"algorithm": "evolver", "strategy": "rand/1", "mode": "generational", "population": 20,
         "generations": FOREVER}, 10_000,
    ),
    "shade": ({"algorithm": "shade", "population": 20, "generations": FOREVER}, 10_000),
    "tpe, a layer each": ({"algorithm": "tpe", "layer_groups": "per-layer"}, 1000),
    "cmaes, a layer each": ({"algorithm": "cmaes", "layer_groups": "per-layer"}, 1000),
    "portfolio": ({"algorithm": "portfolio"}, 1000),
}  # fmt: skip


class Items:
    """What searches know of the items: there are so many, and a model is scored on all of them."""

    block, unjudged = 1, None

    def __init__(self, items: int) -> None:
        self.items = items

    def check(self, kind: str, key: str) -> None:
        """Every kind of estimate is possible, and none is asked for."""

    def known(self, recipe_id: str) -> None:
        """No result is known besides those of the search itself."""

    def learn(self, result: Result) -> None:
        """Nothing is estimated, so nothing has to be learnt."""

    def estimate(self, kind: str, items: Any, order: str = "") -> float:
        """No search here scores a part of the items."""
        raise NotImplementedError


class Digits:
    """The two models, the items, and what builds and scores a merge."""

    def __init__(self, file: Path) -> None:
        self.data = dict(np.load(file))
        self.inputs = {part: torch.tensor(self.data[f"x_{part}"], dtype=torch.float32) for part in ("train", "test")}
        for name, flat in (
            ("base", np.zeros_like(self.data["first"])),
            *((n, self.data[n]) for n in ("first", "second")),
        ):
            (FOLDER / name).mkdir(parents=True, exist_ok=True)
            save_file(_unflattened(flat), FOLDER / name / "model.safetensors")
            (FOLDER / name / "config.json").write_text("{}")
        base, *experts = (Checkpoint(FOLDER / n, n) for n in ("base", "first", "second"))
        self.maker = RecipeMaker(
            ["first", "second"], list(SHAPES), sizes={n: int(np.prod(s)) for n, s in SHAPES.items()}
        )
        sources = {"base": base, "first": experts[0], "second": experts[1]}
        self.materialiser = Materialiser(base, sources, cache_bytes=200 * 80_000)

    def right(self, recipe: Any, part: str) -> NDArray[np.bool_]:
        """Which items of a part, train or test, the model answers rightly."""
        model = dict(self.materialiser.stream(recipe))
        hidden = torch.relu(self.inputs[part] @ model["layers.0.a"] + model["layers.0.b"])
        said = (hidden @ model["layers.1.a"] + model["layers.1.b"]).argmax(1)
        right: NDArray[np.bool_] = said.numpy() == self.data[f"y_{part}"]
        return right

    def search(self, settings: dict[str, Any], candidates: int, seed: int) -> dict[int, float]:
        """The test accuracy of the best model on training items, in percent, after 1,000 candidates and at the end."""
        found = SEARCHES[settings["algorithm"]]
        setup = Setup(
            self.maker.experts, self.maker.base, seed, Budget(candidates=candidates), self.maker,
            Items(len(self.data["y_train"])), early_stopping=False, tasks=("digits",),
        )  # fmt: skip
        search, best, out = (
            found.build(setup, check_section(found.settings, settings, "digits", "search.")),
            (0.0, -1.0),
            {},
        )
        told = 0
        while not search.done:
            for candidate in search.ask(1):
                result = self._result(candidate)
                search.tell(result)
                told += 1
                if result.score is not None and result.score > best[1]:
                    best = 100 * float(self.right(candidate.recipe, "test").mean()), result.score
                if told in (1000, candidates):
                    out[told] = best[0]
        return out

    def _result(self, candidate: Candidate) -> Result:
        right = self.right(candidate.recipe, "train").astype(float).tolist()
        score = sum(right) / len(right)
        return Result(candidate.number, candidate.recipe.id, "ok", score, score, True, tuple(right), {"digits": score})


def _unflattened(flat: NDArray[np.float32]) -> dict[str, torch.Tensor]:
    out, start = {}, 0
    for name, shape in SHAPES.items():
        size = int(np.prod(shape))
        out[name] = torch.tensor(flat[start : start + size].reshape(shape))
        start += size
    return out


def main() -> None:
    """Run what is missing of the authors' searches and of ours."""
    given = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    given.add_argument("--peer", help="a clone of the authors' repository")
    given.add_argument("--python", help="the Python of an environment with jax, optax, scikit-learn and tqdm")
    given.add_argument("--runs", type=int, default=10)
    given.add_argument("--only", nargs="+", choices=OURS, default=list(OURS))
    asked = given.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    if asked.peer:
        script = Path(__file__).with_name("digits_peer.py")
        order = [asked.python, script, asked.peer, "--out", FOLDER / "models.npz", "--runs", str(asked.runs)]
        ran = subprocess.run(order, check=True, stdout=subprocess.PIPE, text=True)
        THEIRS.write_text(ran.stdout)
    torch.set_num_threads(1)
    digits = Digits(FOLDER / "models.npz")
    for seed in range(1, asked.runs + 1):
        for name in asked.only:
            done = kept()
            if str(seed) not in done.get(name, {}):
                settings, candidates = OURS[name]
                found = digits.search(settings, candidates, seed)
                done.setdefault(name, {})[str(seed)] = {str(n): value for n, value in found.items()}
                KEPT.write_text(json.dumps(done))
                print(f"{name}, seed {seed}: {found}", flush=True)
    print(section())


def kept() -> dict[str, dict[str, dict[str, float]]]:
    """Of our searches, by name and seed, the test accuracies after each number of candidates."""
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def section() -> str:
    """The section of the page, from what was run."""
    tested: dict[str, dict[int, list[float]]] = {}
    for line in THEIRS.read_text().splitlines() if THEIRS.exists() else ():
        told = json.loads(line)
        tested[f"their {told['name']}"] = {int(n): values for n, values in told["tested"].items()}
    for name, seeds in kept().items():
        at: dict[int, list[float]] = {}
        for found in seeds.values():
            for n, value in found.items():
                at.setdefault(int(n), []).append(value)
        tested[name] = at
    rows = [
        [name, str(max(len(v) for v in at.values())), _interval(at.get(1000, [])), _interval(at.get(10_000, []))]
        for name, at in tested.items()
    ]
    return f"{HEAD}\n\n{markdown_table(['search', 'runs', 'after 1,000 models', 'after 10,000 models'], rows)}\n"


def _interval(values: list[float]) -> str:
    """Mean and 95 % interval by a bootstrap over the runs."""
    if not values:
        return "–"
    draws = np.random.default_rng(0).choice(values, (10_000, len(values))).mean(1)
    low, high = np.quantile(draws, (0.025, 0.975))
    return f"{np.mean(values):.1f}" + (f" ({low:.1f} to {high:.1f})" if len(values) > 1 else "")


HEAD = """\
## M2N2's digits

Two small networks, trained by M2N2's authors' code on scikit-learn's digits, one on 0 to 4 and the other on 5 to 9, are
merged. A search is scored on the 1,437 training items; the table has the accuracy on the 360 test items of the model
that is best on training items, in percent, as a mean over the runs with its 95 % interval (bootstrap over the runs).
The rows *their …* are the authors' code, run on the same machine from the same two models; the grid tries all of its
10,000 ratios at once. The others are this project's searches. TPE, CMA-ES and the portfolio were given 1,000 models."""


if __name__ == "__main__":
    main()
