"""What the estimate without bias is worth, and how often races err: tables of the page on selection."""

from __future__ import annotations

import numpy as np
from rules import Draw, World, rejected_after

from evolver.evaluation.scores.difference import (
    Estimated,
    Predictor,
    asymptotic_interval,
    betting_interval,
    estimate_at,
)
from evolver.report.text import markdown_table

# Of the table of predictions: candidates of each resampling. Of that of the bias: models, scored items of each task.
MODELS, BIASED, SCORED = 40, 4, 50
# Of the simulated races: items, those that a child answers otherwise, children of a chain.
ITEMS, DIFFERENT, CHILDREN = 400, 48, 60


class LowRank(Predictor):
    """A predictor from the first principal components only."""

    rank: int

    @staticmethod
    def of(made: Predictor, rank: int) -> LowRank:
        found = LowRank(made.known, made.tasks)
        found.__dict__ |= {"rank": rank, "components": made.components[:, :rank], "mean": made.mean}
        return found


def predictors_table(world: World, resamplings: int) -> str:
    """Standard errors of estimates from n of all items of a task, by how the other items are predicted."""
    rows, ways = [], ("no prediction", "p-irt", "item means", "rank 2", "rank 8", "rank 16", "ridge")
    for n in (13, 25, 50, 100):
        if 2 * n > world.most:
            continue
        errors: dict[str, list[np.ndarray]] = {way: [] for way in ways}
        for r in range(max(10, resamplings // 20)):
            draw = world.draw(world.free, min(MODELS, len(world.free)), np.random.default_rng([r, 3]))
            truth = world.side[draw.chosen].mean((1, 2))
            for way in ways:
                errors[way].append(_estimates(draw, n, way) - truth)
        spread = {way: float(np.sqrt(np.mean(np.square(found)))) for way, found in errors.items()}
        plain = spread["no prediction"]
        rows.append([
            f"{n} of {world.most} a task", *(f"{100 * s:.2f} ({(plain / s) ** 2:.1f}×)" for s in spread.values()),
        ])  # fmt: skip
    said = (
        f"Root mean square errors in points, from the answers of {len(world.known)} other models to all items; in "
        "brackets, by how many times fewer items the same error takes. *ridge* takes all principal components, *rank* "
        "the first few, *item means* none, and *p-irt* is the item-response estimate, which has a bias."
    )
    return f"{said}\n\n" + markdown_table(["scored", *ways], rows)


def _estimates(draw: Draw, n: int, way: str) -> np.ndarray:
    if way in ("no prediction", "p-irt"):
        return draw.estimates(n, draw.world.most, "mean" if way == "no prediction" else way)
    made, share = draw.predictor(draw.world.most)
    if way != "ridge":
        made = LowRank.of(made, int(way.split()[1]) if way.startswith("rank") else 0)
    answers = draw.answers.reshape(len(draw.chosen), -1).astype(float)
    places = (np.arange(draw.world.tasks)[:, None] * draw.world.most + np.arange(n)).ravel()
    return estimate_at(made, share, places, answers[:, places]).value


def _world_predictor(world: World) -> tuple[Predictor, np.ndarray]:
    known = world.side[world.known].reshape(len(world.known), -1).astype(float)
    tasks = np.repeat(np.arange(world.tasks), world.most)
    return Predictor(known, tasks), np.full(len(tasks), 1 / len(tasks))


def _part(world: World, n: int, rng: np.random.Generator) -> np.ndarray:
    """A random part of n items of each task, in a random order."""
    chosen = [t * world.most + rng.permutation(world.most)[:n] for t in range(world.tasks)]
    return rng.permutation(np.concatenate(chosen))


def bias_table(world: World, resamplings: int) -> str:
    """The mean error of single models over many resamplings."""
    made, share = _world_predictor(world)
    chosen = np.random.default_rng(5).choice(world.free, min(BIASED, len(world.free)), replace=False)
    answers = world.side[chosen].reshape(len(chosen), -1).astype(float)
    truth, n = answers.mean(1), min(SCORED, world.most // 2)
    rng, errors = np.random.default_rng(6), np.empty((resamplings, len(chosen)))
    for r in range(resamplings):
        places = _part(world, n, rng)
        errors[r] = estimate_at(made, share, places, answers[:, places]).value - truth
    bias, reach = 100 * errors.mean(0), 100 * errors.std(0) / np.sqrt(resamplings)
    said = (
        f"The mean error of {len(chosen)} models over {resamplings:,} random parts of {n} of {world.most} items of "
        f"each task, in points and in Monte-Carlo standard errors (goal: below three of these, and they at most 0.03)."
    )
    rows = [[f"{b:+.4f}", f"{s:.4f}", f"{b / s:+.1f}"] for b, s in zip(bias, reach, strict=True)]
    return f"{said}\n\n" + markdown_table(["mean error", "standard error", "ratio"], rows)


def coverage_table(world: World, resamplings: int) -> str:
    """How often the intervals hold the score, and how wide they are."""
    made, share = _world_predictor(world)
    rows, free = [], world.free
    for n in (13, 25, 50, 100):
        if 2 * n > world.most:
            continue
        held, width, safe, safe_width = [], [], [], []
        rng = np.random.default_rng(8)
        for r in range(max(50, resamplings // 4)):
            places = _part(world, n, rng)
            chosen = rng.choice(free, min(20, len(free)), replace=False)
            answers = world.side[chosen].reshape(len(chosen), -1).astype(float)
            found: Estimated = estimate_at(made, share, places, answers[:, places])
            low, high = asymptotic_interval(found)
            held += ((low <= answers.mean(1)) & (answers.mean(1) <= high)).tolist()
            width += (high - low).tolist()
            if r % 2 == 0:
                one = rng.permutation(len(share))[: len(places)]  # of all tasks together, as a run's order is
                a, b = betting_interval(made, share, one, answers[0, one])
                safe.append(a <= answers[0].mean() <= b)
                safe_width.append(b - a)
        rows.append([
            f"{n * world.tasks}", f"{100 * np.mean(held):.1f} %", f"{100 * np.mean(width):.1f}",
            f"{100 * np.mean(safe):.1f} %", f"{100 * np.mean(safe_width):.1f}",
        ])  # fmt: skip
    said = (
        "How often 95 % intervals hold the score of all items for choosing, and their widths in points: the asymptotic "
        "one (goal: 93.5 to 96.5 %), and the one that holds for any number of items, by betting without replacement "
        "(goal: 95 % or more)."
    )
    head = ["scored items", "asymptotic holds", "its width", "betting holds", "its width"]
    return f"{said}\n\n" + markdown_table(head, rows)


def races_table(resamplings: int) -> str:
    """False rejections of children that are better than an incumbent which was chosen along the same order."""
    rows = []
    for name, race in (("a search", _chain), ("its first items", _by_first_items)):
        for gained in (1, 4, 16):
            for alpha in (0.05, 0.2):
                rates = []
                for fresh in (False, True):
                    found = np.array([race(gained, alpha, fresh, r) for r in range(max(20, resamplings // 10))])
                    reach = 196 * found.mean(1).std() / np.sqrt(len(found))
                    rates.append(f"{100 * found.mean():.1f} ± {reach:.1f} %")
                rows.append([name, f"{100 * gained / ITEMS:.2f}", f"{alpha:.0%}", *rates])
    head = ["incumbent chosen by", "child better by, points", "error rate", "rejected, one order", "fresh orders"]
    return markdown_table(head, rows)


def _chain(gained: int, alpha: float, fresh: bool, seed: int) -> np.ndarray:
    """Whether each child in the later half of a chain is rejected. One that is not is the next incumbent.

    Every child is better than its incumbent by ``gained`` items. To keep the scores where they are, the incumbent then
    loses as many items at random.
    """
    rng = np.random.default_rng([seed, 4])
    rival, order = (rng.random(ITEMS) < 0.5).astype(float), rng.permutation(ITEMS)
    out = np.zeros(CHILDREN, dtype=bool)
    for k in range(CHILDREN):
        child = _child(rival, gained, rng)
        order = rng.permutation(ITEMS) if fresh else order
        out[k] = _rejected(child, rival, order, alpha)
        if not out[k]:
            rival = _flipped(child, 0, gained, rng)
    return out[CHILDREN // 2 :]


def _by_first_items(gained: int, alpha: float, fresh: bool, seed: int) -> np.ndarray:
    """Whether models are rejected against an incumbent that is the best of twenty equal ones on the first 64 items.

    The model is of their kind, but better by ``gained`` items.
    """
    rng = np.random.default_rng([seed, 4])
    out, half = np.zeros(10, dtype=bool), DIFFERENT // 4
    for k in range(len(out)):
        order = rng.permutation(ITEMS)
        first = _flipped(np.zeros(ITEMS), ITEMS // 2, 0, rng)
        equals = [_flipped(first, half, half, rng) for _ in range(20)]
        rival = max(equals, key=lambda model: model[order[:64]].sum())
        child = _flipped(first, half + gained, half, rng)
        out[k] = _rejected(child, rival, rng.permutation(ITEMS) if fresh else order, alpha)
    return out


def _rejected(child: np.ndarray, rival: np.ndarray, order: np.ndarray, alpha: float) -> bool:
    share = np.full(ITEMS, 1 / ITEMS)
    return rejected_after(child[order], rival[order], share, alpha, block=1) < ITEMS


def _child(rival: np.ndarray, gained: int, rng: np.random.Generator) -> np.ndarray:
    """Answers that differ from the incumbent's in DIFFERENT items and are better by ``gained``."""
    return _flipped(rival, (DIFFERENT + gained) // 2, (DIFFERENT + gained) // 2 - gained, rng)


def _flipped(answers: np.ndarray, gained: int, lost: int, rng: np.random.Generator) -> np.ndarray:
    found = answers.copy()
    found[rng.choice(np.flatnonzero(answers == 0), gained, replace=False)] = 1.0
    found[rng.choice(np.flatnonzero(answers == 1), lost, replace=False)] = 0.0
    return found
