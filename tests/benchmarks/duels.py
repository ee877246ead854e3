"""How many items a duel of a candidate with the incumbent takes: all, exact early stopping, racing.

``python tests/benchmarks/duels.py`` simulates duels and prints Markdown; ``--ledger results/RUN/ledger`` replays the
duels of a run's completely scored candidates, too. Items until the decision are those of a look after every item.
"""

from __future__ import annotations

import argparse
import bisect
import itertools
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from evolver.evaluation.scores.metrics import JUDGED, Numbers  # noqa: E402
from evolver.evaluation.scores.racing import Race, Verdict, log_capital  # noqa: E402
from evolver.evaluation.scores.scoring import Scale  # noqa: E402
from evolver.ledger import read_table  # noqa: E402
from evolver.report.text import markdown_table  # noqa: E402
from evolver.storage import storage_at  # noqa: E402

TASKS = 4
# Of the duels of a search: the candidate's difference in points is drawn from N(MEAN, SPREAD), the incumbent has 50 %.
MEAN, SPREAD = -0.03, 0.05
ALPHAS = (0.05, 0.1, 0.2, 0.3)
PAIRS, REORDERS = 50, 10
BINS = (0.0, 0.01, 0.02, 0.04, 0.07, 1.0)
# Of whole searches: their number, offspring of each, and the mean difference, lower as the incumbent gets better.
CHAINS, OFFSPRING, LATER = 60, 50, -0.06


@dataclass(frozen=True)
class Duel:
    """Answers of both models to all items in the order in which they are met, and what an item counts."""

    scale: Scale
    candidate: Numbers
    rival: Numbers

    @property
    def difference(self) -> float:
        return self.scale.score(self.candidate.tolist()) - self.scale.score(self.rival.tolist())

    def reordered(self, rng: np.random.Generator) -> Duel:
        order = rng.permutation(len(self.candidate))
        scale = Scale(tuple(self.scale.tasks[i] for i in order), self.scale.weights, self.scale.metrics)
        return Duel(scale, self.candidate[order], self.rival[order])


@dataclass(frozen=True)
class Outcome:
    """What a duel took and gave."""

    count: int
    exact: int
    raced: int
    oracle: int
    difference: float
    better: bool

    @property
    def wrong(self) -> bool:
        return self.better != (self.difference > 0)


def main() -> None:
    """Simulate, replay, print."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--ledger", type=Path, help="replay the duels of this run, too")
    given.add_argument("--duels", type=int, default=500, help="simulated duels of each kind")
    asked = given.parse_args()
    rows, limits = [], []
    for count, differ in itertools.product((240, 1000), (0.05, 0.12, 0.2)):
        name = f"simulated, {count} items, {differ:.0%} differ"
        duels = list(simulated(asked.duels, count, differ, seed=0))
        rows += figures(name, duels)
        if differ == 0.12:
            limits += by_difference(name, duels)
    if asked.ledger:
        rng, models = np.random.default_rng(0), completed(asked.ledger)
        for name, duels in (("pairs of a run", all_pairs(models)), ("candidates of a run", against_best(models))):
            shuffled = [d.reordered(rng) for d in duels for _ in range(REORDERS)]
            rows += figures(f"{name}, its order", duels) + figures(f"{name}, other orders", shuffled)
            limits += by_difference(name, shuffled)
    head = "duels|alpha|exact|racing|oracle|full ÷ racing|median|÷ racing, winners completed|wrong|better, but rejected"
    print(markdown_table(head.split("|"), rows), "\n")
    print(markdown_table("duels|true difference|duels|racing at 5 %|oracle at 5 %|wrong".split("|"), limits), "\n")
    print(markdown_table("search along one order|alpha|items ÷ full|better, but rejected".split("|"), chains()))


def simulated(number: int, count: int, differ: float, seed: int) -> Iterable[Duel]:
    """Duels of an incumbent at about 50 % with offspring that answer a share ``differ`` of the items otherwise."""
    rng = np.random.default_rng(seed)
    for _ in range(number):
        easy = easiness(count, rng)
        rival = (rng.random(count) < easy).astype(float)
        yield Duel(equal_tasks(count), offspring(rival, easy, differ, rng), rival).reordered(rng)


def easiness(count: int, rng: np.random.Generator) -> Numbers:
    """How probable a right answer to each item is: most are easy or hard for all models."""
    tasks = rng.normal(0, 0.5, TASKS)[np.arange(count) % TASKS]
    found: Numbers = 1 / (1 + np.exp(-rng.normal(0, 1.7, count) - tasks))
    return found


def offspring(rival: Numbers, easy: Numbers, differ: float, rng: np.random.Generator, mean: float = MEAN) -> Numbers:
    """Answers like the rival's but for some, most of them to items that are neither easy nor hard."""
    difference, size = rng.normal(mean, SPREAD), len(rival)
    middling = 4 * easy * (1 - easy) + 0.05
    answers = rival.copy()
    for right, share in ((0.0, (differ + difference) / 2), (1.0, (differ - difference) / 2)):
        weight = middling * (rival == right)
        flip = rng.random(size) < np.clip(max(share, 0.002) * size * weight / weight.sum(), 0, 0.95)
        answers[flip] = 1.0 - right
    return answers


def equal_tasks(count: int) -> Scale:
    names = [f"task {i}" for i in range(TASKS)]
    return Scale(tuple(names[i % TASKS] for i in range(count)), dict.fromkeys(names, 1.0), dict.fromkeys(names, JUDGED))


def completed(ledger: Path) -> list[Numbers]:
    """The answers of a run's completely scored candidates in the order in which they were scored."""
    found: dict[str, tuple[float, list[float]]] = {}
    for row in read_table(storage_at(ledger)).to_pylist():
        if row["event"] == "finished" and row["complete"] and row["stage"] != "report":
            found.setdefault(row["recipe_id"], (row["score"], row["items"]))
    if any(abs(score - statistics.fmean(items)) > 1e-9 for score, items in found.values()):
        raise SystemExit(f"{ledger}: items count differently, and a ledger does not say which task an item is of.")
    return [np.array(items) for _, items in found.values()]


def all_pairs(models: Sequence[Numbers]) -> list[Duel]:
    """Up to PAIRS pairs, evenly from all; the later model is the candidate."""
    pairs = list(itertools.combinations(models, 2))
    chosen = {round(i) for i in np.linspace(0, len(pairs) - 1, PAIRS)}
    return [_replayed(later, earlier) for earlier, later in (pairs[i] for i in sorted(chosen))]


def against_best(models: Sequence[Numbers]) -> list[Duel]:
    """Every model with the best one before it, as a search meets them."""
    best, duels = models[0], []
    for model in models[1:]:
        duels.append(_replayed(model, best))
        best = model if model.mean() > best.mean() else best
    return duels


def _replayed(candidate: Numbers, rival: Numbers) -> Duel:
    return Duel(Scale(("all",) * len(rival), {"all": 1.0}, {"all": JUDGED}), candidate, rival)


def fight(duel: Duel, alpha: float) -> Outcome:
    """One duel by all the ways of deciding it."""
    race, items = Race(duel.scale, duel.rival.tolist(), alpha), duel.candidate.tolist()
    raced, exact = until(race.look, items), until(race.certain, items)
    oracle = min(exact, _oracle(duel, alpha))
    return Outcome(len(items), exact, raced, oracle, duel.difference, race.look(items[:raced]) == "better")


def until(look: Callable[[Sequence[float]], Verdict | None], items: Sequence[float]) -> int:
    """The fewest items that decide: what is decided stays so."""
    return bisect.bisect_left(range(len(items)), True, key=lambda n: look(items[:n]) is not None)


def _oracle(duel: Duel, alpha: float) -> int:
    """Items of a test that bets on the true difference and on nothing else, in both directions."""
    share = duel.scale.item_shares
    error = np.sqrt(((share * (duel.candidate - duel.rival)) ** 2).sum())
    drift = [float(np.clip(abs(duel.difference) / max(error, 1e-9), 0.1, 30))]
    for_it = log_capital(duel.candidate, duel.rival, share, drift)
    against = log_capital(1 - duel.candidate, 1 - duel.rival, share, drift)
    reached = np.maximum(for_it, against) >= -np.log(alpha)
    return int(reached.argmax()) + 1 if reached.any() else len(reached)


def figures(name: str, duels: Sequence[Duel]) -> list[list[str]]:
    """A row for every error rate."""
    rows = []
    for alpha in ALPHAS:
        done = [fight(d, alpha) for d in duels]
        exact, raced, oracle = (_mean_share(done, way) for way in ("exact", "raced", "oracle"))
        completed = statistics.fmean(1.0 if o.better else o.raced / o.count for o in done)
        better = [o for o in done if o.difference > 0]
        rows.append(
            [
                name, f"{alpha:.0%}", f"{exact:.2f}", f"{raced:.2f}", f"{oracle:.2f}", f"{1 / raced:.2f}",
                f"{statistics.median(o.count / o.raced for o in done):.2f}", f"{1 / completed:.2f}",
                f"{_rate(o.wrong for o in done)}", f"{_rate(o.wrong for o in better)}",
            ]
        )  # fmt: skip
    return rows


def by_difference(name: str, duels: Sequence[Duel]) -> list[list[str]]:
    """What the true difference makes of it."""
    done, rows = [fight(d, 0.05) for d in duels], []
    for low, high in itertools.pairwise(BINS):
        these = [o for o in done if low <= abs(o.difference) < high]
        if these:
            raced, oracle = (f"{_mean_share(these, way):.2f}" for way in ("raced", "oracle"))
            span = f"{100 * low:.0f} – {100 * high:.0f} points" if high < 1 else f"from {100 * low:.0f} points"
            rows.append([name, span, str(len(these)), raced, oracle, _rate(o.wrong for o in these)])
    return rows


def chains() -> Iterable[list[str]]:
    """Whole searches, each along one order: a winner is scored on all items and becomes the incumbent."""
    for fixed, alpha in itertools.product((True, False), ALPHAS):
        rng, spent, missed = np.random.default_rng(0), [], []
        for _ in range(CHAINS):
            for share, difference, verdict in chain(alpha, fixed, rng):
                spent.append(share)
                missed += [verdict != "better"] if difference > 0 else []
        name = "one order for all duels" if fixed else "a new order for every duel"
        yield [
            f"240 items, {name}",
            f"{alpha:.0%}",
            f"{statistics.fmean(spent):.2f}",
            f"{_rate(missed)} of {len(missed)}",
        ]


def chain(alpha: float, fixed: bool, rng: np.random.Generator) -> Iterable[tuple[float, float, Verdict | None]]:
    """One search: the part of the items that each duel takes, its difference and its verdict."""
    easy, scale, order = easiness(240, rng), equal_tasks(240), rng.permutation(240)
    rival = (rng.random(240) < easy).astype(float)
    for _ in range(OFFSPRING):
        child, order = offspring(rival, easy, 0.12, rng, LATER), order if fixed else rng.permutation(240)
        known = Scale(tuple(scale.tasks[i] for i in order), scale.weights, scale.metrics)
        race, items = Race(known, rival[order].tolist(), alpha), child[order].tolist()
        taken = until(race.look, items)
        verdict, difference = race.look(items[:taken]), scale.score(child.tolist()) - scale.score(rival.tolist())
        yield 1.0 if verdict == "better" else taken / 240, difference, verdict
        rival = child if verdict == "better" and difference > 0 else rival


def _mean_share(done: Iterable[Outcome], way: str) -> float:
    return statistics.fmean(getattr(o, way) / o.count for o in done)


def _rate(wrong: Iterable[bool]) -> str:
    found = list(wrong)
    return f"{statistics.fmean(found):.1%}" if found else "–"


if __name__ == "__main__":
    main()
