"""Rules for choosing one of many models, played on a table of answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from evolver.evaluation.scores.difference import Predictor, estimate_at
from evolver.evaluation.scores.irt import ItemModel, fit_items
from evolver.evaluation.scores.racing import log_capital

# Models outside of the choice that are taken to have answered all items, beside the baselines.
KNOWN, BLOCK, BATCH, ETA = 12, 64, 9, 3
SPLITS = 10
PAIRS, APART = 300, 0.01
RANDOM = "random"


@dataclass(frozen=True)
class Picked:
    """What a rule chose.

    Attributes:
        best: the chosen model's place among the candidates.
        items: the number of items that were scored, over all tasks.
        ranks: what orders the candidates, (K, columns); later columns decide among equals.
        judged: the scores of all candidates on the items by which the choice was made, (K).
    """

    best: int
    items: float
    ranks: np.ndarray
    judged: np.ndarray


class World:
    """A table: the answers of all complete models to all dev items, split into a side for choosing and one for judging.

    Of each task, one half of the items is for choosing; of the other half, one quarter of all names the best model and
    the other one scores it, and the other way round. The hash of an item's content and the number of the split decide
    its side. Where the true scores are known (``truth``), all items are for choosing, and the true scores judge.
    """

    def __init__(
        self, name: str, answers: np.ndarray, tasks: Sequence[str], hashes: Sequence[str], of: dict, split: int,
        truth: np.ndarray | None = None, likely: np.ndarray | None = None,
    ) -> None:  # fmt: skip
        self.name, self.of = name, of
        hashes = [hashlib.sha256(f"{split}:{h}".encode()).hexdigest() for h in hashes]
        names = sorted(set(tasks))
        numbers = np.array([names.index(t) for t in tasks])
        order = np.lexsort((hashes, numbers))
        each = np.bincount(numbers).min()
        self.tasks, self.most = len(names), int(each // 2 if truth is None else each)
        places = np.stack([order[numbers[order] == t][:each] for t in range(self.tasks)])
        quarter = (each - self.most) // 2
        # (models, tasks, items)
        self.side = answers[:, places[:, : self.most]]
        # the same of the probabilities of the right answers, NaN where they were not noted; None: of no model
        self.likely = None if likely is None else likely[:, places[:, : self.most]]
        # (models, tasks): on the items that judge
        self.later = self.side.mean(2) if truth is not None else answers[:, places[:, self.most :]].mean(2)
        self.judges = [truth, truth] if truth is not None else [
            answers[:, places[:, a : a + quarter]].mean((1, 2)) for a in (self.most, self.most + quarter)
        ]  # fmt: skip
        self.truth = sum(self.judges) / 2
        rng = np.random.default_rng(split)
        free = np.flatnonzero(~of["baseline"])
        kept = rng.choice(free, min(KNOWN, len(free) // 5), replace=False)
        self.known = np.concatenate([np.flatnonzero(of["baseline"]), kept])
        self.free = np.setdiff1d(free, kept)

    @staticmethod
    def read(folder: Path) -> list[World]:
        """The table in a folder, once for each split."""
        items, models = (pq.read_table(folder / f"{n}.parquet") for n in ("items", "models"))
        proposals = pq.read_table(folder / "proposals.parquet", columns=["run", "stage", "recipe_id"])
        dev = np.array(items["split"].to_pylist()) == "dev"
        models = models.filter(models["complete"])
        flat = models["answers"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        answers = flat.reshape(models.num_rows, items.num_rows)[:, dev].astype(np.float32)
        first: dict[str, tuple[str, str]] = {}
        for row in proposals.to_pylist():
            first.setdefault(row["recipe_id"], (row["stage"], row["run"]))
        found = [first[i] for i in models["recipe_id"].to_pylist()]
        of = {
            "baseline": np.array([stage == "baseline" for stage, _ in found]),
            "run": np.array([run for _, run in found]),
            "recipe": models["recipe"].to_pylist(),
        }
        tasks, hashes = (np.array(items[name].to_pylist())[dev].tolist() for name in ("task", "hash"))
        likely = _likely(models, dev) if "probabilities" in models.column_names else None
        return [World(folder.name, answers, tasks, hashes, of, split, None, likely) for split in range(SPLITS)]

    def pools(self) -> dict[str, np.ndarray]:
        """The candidates to choose among: all, and those that adaptive searches proposed."""
        adaptive = self.free[[RANDOM not in run for run in self.of["run"][self.free]]]
        found = {"models of all searches": self.free}
        return found | ({"models of adaptive searches": adaptive} if 0 < len(adaptive) < len(self.free) else {})

    @property
    def sure(self) -> np.ndarray:
        """The candidates whose probabilities of all right answers are known."""
        if self.likely is None:
            return self.free[:0]
        return self.free[~np.isnan(self.likely[self.free]).any((1, 2))]

    def said(self) -> str:
        spread = np.sort(self.truth[self.free])[::-1]
        behind = [100 * (spread[0] - spread[k]) for k in (9, len(spread) // 10)]
        return (
            f"{len(self.truth)} models × {self.tasks} tasks with {self.most} items each for choosing. The scores of "
            f"all models have a standard deviation of {100 * spread.std():.1f} points; the tenth best of {len(spread)} "
            f"is {behind[0]:.1f} points behind the best, and one model in ten is within {behind[1]:.1f}."
        )

    @cached_property
    def predictor(self) -> tuple[Predictor, np.ndarray]:
        """What predicts answers to all items for choosing from those of the known models, and the items' shares."""
        rows = self.side[self.known].reshape(len(self.known), -1).astype(float)
        tasks = np.repeat(np.arange(self.tasks), self.most)
        return Predictor(rows, tasks), np.full(len(tasks), 1 / len(tasks))

    @cached_property
    def item_model(self) -> ItemModel:
        """The item-response model of the known models, over all items for choosing."""
        rows = self.side[self.known].reshape(len(self.known), -1)
        return fit_items(rows.astype(float).tolist(), rows.shape[1])

    @cached_property
    def coefficients(self) -> np.ndarray:
        """How much of each expert is in each model, and how its last step works, for distances: (models, features)."""
        if "coefficients" in self.of:
            return np.asarray(self.of["coefficients"])
        rows = [_features(json.loads(text)) for text in self.of["recipe"]]
        kinds = sorted({kind for kind, _ in rows})
        width = max(len(v) for _, v in rows)
        found = np.zeros((len(rows), width + len(kinds)))
        for row, (kind, values) in zip(found, rows, strict=True):
            row[: len(values)] = values
            row[width + kinds.index(kind)] = 0.5
        return found

    def draw(self, pool: np.ndarray, count: int, rng: np.random.Generator) -> Draw:
        return Draw(self, rng.choice(pool, count, replace=False), rng)


def _features(program: list) -> tuple[str, list[float]]:
    """The kind of the last step, and the mean of weight × mass of each expert over its rules."""
    kind, *entry = program[-1]
    if kind != "merge":
        return kind, []
    rules = [dict(values) for _, values in entry[3]]
    made = [
        [float(w) * float(rule.get("lambda", 1.0)) for w in rule["weight"]]
        for rule in rules if isinstance(rule.get("weight"), list)
    ]  # fmt: skip
    return str(entry[0]), np.mean(made, axis=0).tolist() if made else []


def _likely(models: pa.Table, dev: np.ndarray) -> np.ndarray:
    """The probabilities of the right answers, (models, dev items)."""
    rows = (row.values if row.is_valid else None for row in models["probabilities"])
    found = (np.full(len(dev), np.nan) if r is None else r.to_numpy(zero_copy_only=False) for r in rows)
    return np.stack([np.asarray(row, dtype=np.float32)[dev] for row in found])


class Draw:
    """One resampling: candidates in a random order, and an order of the items of each task."""

    def __init__(self, world: World, chosen: np.ndarray, rng: np.random.Generator) -> None:
        self.world, self.chosen, self.rng = world, chosen, rng
        self.order = np.stack([rng.permutation(world.most) for _ in range(world.tasks)])
        self.answers = np.take_along_axis(world.side[chosen], self.order[None], axis=2)
        self.sums = np.cumsum(self.answers, axis=2, dtype=np.int32)
        self.truth = world.truth[chosen]
        self._kept: dict[tuple, np.ndarray] = {}
        pairs = rng.integers(len(chosen), size=(2, PAIRS))
        self.pairs = pairs[:, np.abs(self.truth[pairs[0]] - self.truth[pairs[1]]) >= APART]

    def mean(self, start: int, stop: int) -> np.ndarray:
        """The score of all candidates on the items from ``start`` to before ``stop`` of each task, (K)."""
        before = self.sums[:, :, start - 1] if start else 0
        return (self.sums[:, :, stop - 1] - before).mean(1) / (stop - start)

    def fitness(self, kind: str, n: int) -> np.ndarray:
        """What a search sees of the first n items of each task: scores, probabilities, or the means of both, (K)."""
        if kind == "score":
            return self.mean(0, n)
        order = self.order[None, :, :n]
        found = np.take_along_axis(self.world.likely[self.chosen], order, axis=2).mean((1, 2))
        return found if kind == "probability" else (found + self.mean(0, n)) / 2

    def judge(self, picked: Picked) -> tuple[float, float, float, float]:
        """Regret, the share of right decisions between pairs, items, optimism."""
        one, two = (j[self.chosen] for j in self.world.judges)
        regret = (two[one.argmax()] - two[picked.best] + one[two.argmax()] - one[picked.best]) / 2
        place = np.lexsort(picked.ranks.T[::-1]).argsort()
        a, b = self.pairs
        right = ((place[a] > place[b]) == (self.truth[a] > self.truth[b])).mean() if len(a) else np.nan
        fall = picked.judged - self.truth
        others = np.delete(fall, picked.best)
        return float(regret), float(right), picked.items, float(fall[picked.best] - others.mean())

    def predictor(self, full: int) -> tuple[Predictor, np.ndarray]:
        """What predicts answers to the first items of each task from the known models, and the items' shares."""
        known = np.take_along_axis(self.world.side[self.world.known], self.order[None], axis=2)[:, :, :full]
        tasks = np.repeat(np.arange(self.world.tasks), full)
        return Predictor(known.reshape(len(known), -1).astype(float), tasks), np.full(len(tasks), 1 / len(tasks))

    def estimates(self, n: int, full: int, kind: str) -> np.ndarray:
        """The estimated scores of all candidates on the first ``full`` items of each task, from the first n, (K)."""
        if kind == "mean":
            return self.mean(0, n)
        if (n, full, kind) not in self._kept:
            self._kept[n, full, kind] = self._estimates(n, full, kind)
        return self._kept[n, full, kind]

    def _estimates(self, n: int, full: int, kind: str) -> np.ndarray:
        answers = self.answers[:, :, :full].reshape(len(self.chosen), -1).astype(float)
        places = (np.arange(self.world.tasks)[:, None] * full + np.arange(n)).ravel()
        if kind == "difference":
            return estimate_at(*self.predictor(full), places, answers[:, places]).value
        model = self.world.item_model
        at = (np.arange(self.world.tasks)[:, None] * self.world.most + self.order[:, :full]).ravel()
        if (n, kind) not in self._kept:
            own = at[places]
            one = ItemModel(model.discrimination[own], model.difficulty[own], model.answers[:, own])
            self._kept[n, kind] = one.abilities(answers[:, places])
        filled = 1 / (1 + np.exp(model.difficulty[at] - np.outer(self._kept[n, kind], model.discrimination[at])))
        filled[:, places] = answers[:, places]
        return filled.mean(1)


def all_models(draw: Draw, n: int) -> Picked:
    """The best of all on n items of each task."""
    scores = draw.mean(0, n)
    return Picked(int(scores.argmax()), len(scores) * n * draw.world.tasks, scores[:, None], scores)


def seen_as(draw: Draw, kind: str, n: int, count: int = 0, more: int = 0) -> Picked:
    """The best of all by what a search may see of n items of each task; with a count, the best so many of these by
    their scores on more items.
    """
    seen = draw.fitness(kind, n)
    items, ranks = len(seen) * n * draw.world.tasks, np.stack([np.zeros(len(seen)), seen], axis=1)
    if not count:
        return Picked(int(seen.argmax()), items, ranks, seen)
    alive = np.argsort(-seen, kind="stable")[:count]
    later = draw.mean(n, n + more)
    ranks[alive, 0], ranks[alive, 1] = 1, later[alive]
    return Picked(int(alive[later[alive].argmax()]), items + count * more * draw.world.tasks, ranks, later)


def staged(draw: Draw, parts: Sequence[tuple[int | None, int]], alone: bool) -> Picked:
    """The best few of each stage are scored on more items; the last ones are ranked by these alone, or by all.

    Args:
        parts: of each stage, how many go on to it (None: all) and on how many more items of a task they are scored.
    """
    alive, seen, items = np.arange(len(draw.chosen)), 0, 0
    scores = draw.mean(0, parts[0][1])
    ranks = np.stack([np.zeros(len(scores)), scores], axis=1)
    for stage, (count, more) in enumerate(parts):
        if count is not None:
            alive = alive[np.argsort(-scores[alive], kind="stable")[:count]]
        last = stage == len(parts) - 1
        scores = draw.mean(seen if last and alone else 0, seen + more)
        seen, items = seen + more, items + len(alive) * more
        ranks[alive, 0], ranks[alive, 1] = stage, scores[alive]
    return Picked(int(alive[scores[alive].argmax()]), items * draw.world.tasks, ranks, scores)


def from_truth(draw: Draw, count: int, more: int) -> Picked:
    """The best of the truly best few on some items: no choice of finalists can be better."""
    later = draw.mean(0, more)
    top = np.argsort(-draw.truth, kind="stable")[:count]
    ranks = np.stack([np.isin(np.arange(len(later)), top), later], axis=1).astype(float)
    return Picked(int(top[later[top].argmax()]), count * more * draw.world.tasks, ranks, later)


def estimated(draw: Draw, n: int, full: int, kind: str) -> Picked:
    """The best of all by the estimated score on the first ``full`` items of each task, from n of each."""
    scores = draw.estimates(n, full, kind)
    return Picked(int(scores.argmax()), len(scores) * n * draw.world.tasks, scores[:, None], scores)


def halved(draw: Draw, first: int, full: int, kind: str) -> Picked:
    """Successive halving of batches; the best complete candidate wins."""
    scores = draw.mean(0, full)
    ranks, items = np.zeros((len(scores), 2)), 0
    for start in range(0, len(scores), BATCH):
        alive, n, spent = np.arange(start, min(start + BATCH, len(scores))), first, 0
        while True:
            items += len(alive) * (n - spent)
            worth = scores[alive] if n == full else draw.estimates(n, full, kind)[alive]
            ranks[alive, 0], ranks[alive, 1] = n, worth
            if n == full:
                break
            alive = alive[np.argsort(-worth, kind="stable")[: max(1, len(alive) // ETA)]]
            n, spent = (min(ETA * n, full) if len(alive) > 1 else full), n
    complete = np.flatnonzero(ranks[:, 0] == full)
    return Picked(int(complete[scores[complete].argmax()]), items * draw.world.tasks, ranks, scores)


def raced(draw: Draw, full: int, alpha: float, fresh: bool) -> Picked:
    """One candidate after the other races against the best one before it, and is scored in full if not rejected."""
    count = draw.world.tasks * full
    answers = draw.answers[:, :, :full].reshape(len(draw.chosen), -1).astype(float)
    scores, share = answers.mean(1), np.full(count, 1 / count)
    order, best, items = draw.rng.permutation(count), 0, count
    ranks = np.zeros((len(scores), 2))
    ranks[0] = count, scores[0]
    for k in range(1, len(scores)):
        order = draw.rng.permutation(count) if fresh else order
        mine, theirs = answers[k, order], answers[best, order]
        taken = rejected_after(mine, theirs, share, alpha)
        items += taken
        ranks[k] = taken, mine[:taken].mean()
        if taken == count and scores[k] > scores[best]:
            best = k
    ranks[best, 0] = count + 1
    return Picked(best, items, ranks, scores)


def rejected_after(mine: np.ndarray, theirs: np.ndarray, share: np.ndarray, alpha: float, block: int = BLOCK) -> int:
    """After how many items a race rejects, at the end of a block; all if it does not."""
    reached = log_capital(1 - mine, 1 - theirs, share) >= -np.log(alpha)
    behind = np.cumsum(theirs - mine)
    certain = behind >= np.cumsum(1 - theirs[::-1])[::-1] - (1 - theirs)  # no remaining item can make up for it
    stop = np.flatnonzero(reached | certain)
    return min(len(mine), -(-(int(stop[0]) + 1) // block) * block) if len(stop) else len(mine)


def _worth(world: World, side: np.ndarray, order: np.ndarray, part: slice, kind: str) -> np.ndarray:
    """What a search is told of models, given their answers in an order: the mean of a part, or an estimate from it."""
    if kind == "mean":
        return side[:, :, part].mean((1, 2))
    each = world.most
    places = (np.arange(world.tasks)[:, None] * each + order[:, part]).ravel()
    made, share = world.predictor
    return estimate_at(made, share, places, side[:, :, part].reshape(len(side), -1).astype(float)).value


def adaptive_search(
    world: World,
    n: int,
    rotate: bool,
    final: int,
    rng: np.random.Generator,
    generations: int = 10,
    kind: str = "mean",
    size: int = 10,
) -> tuple[float, float, float]:
    """A search on the table that proposes models near its best three. Regret, items and optimism."""
    free, spent = world.free, generations * n
    rotate = rotate and spent + final <= world.most
    order = np.stack([rng.permutation(world.most) for _ in range(world.tasks)])
    side = np.take_along_axis(world.side[free], order[None], axis=2)
    scored = np.full(len(free), -np.inf)
    part = slice(0, n)
    for g in range(generations):
        open_ = np.flatnonzero(np.isinf(scored))
        if g == 0:
            new = rng.choice(open_, size, replace=False)
        else:
            top = np.argsort(-scored)[:3]
            space = world.coefficients[free]
            away = np.linalg.norm(space[open_][:, None] - space[top][None], axis=2).min(1)
            new = open_[np.argsort(away + rng.random(len(away)) * 1e-6)[:size]]
        part = slice(g * n, (g + 1) * n) if rotate else slice(0, n)
        scored[new] = _worth(world, side[new], order, part, kind)
    seen, start = np.flatnonzero(~np.isinf(scored)), spent if rotate else n
    judged = scored.copy()
    best, items = int(scored.argmax()), len(seen) * n * world.tasks
    if final:
        top = np.argsort(-scored)[:6]
        judged = side[:, :, start : start + final].mean((1, 2))
        best, items = int(top[judged[top].argmax()]), items + 6 * final * world.tasks
    one, two = (j[free] for j in world.judges)
    regret = (two[one.argmax()] - two[best] + one[two.argmax()] - one[best]) / 2
    fall = judged[seen] - world.truth[free][seen]
    mine = judged[best] - world.truth[free][best]
    return float(regret), float(items), float(mine - (fall.sum() - mine) / (len(seen) - 1))
