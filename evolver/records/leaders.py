"""Which of some candidates lead, by their results."""

from __future__ import annotations

from collections.abc import Iterable

from evolver.records import Candidate, Result

Rated = tuple[Candidate, Result]


def leaders(searched: Iterable[Rated], count: int | None = None) -> list[Rated]:
    """The candidates with the highest scores of all dev items, best first, the earliest of equals; each model once.

    Candidates that were asked for a part of the items only, or were stopped early, do not count. Those that break a
    constraint count only if all do; the one that breaks them least is then the first.
    """
    whole = [(c, r) for c, r in searched if c.question.limit is None and r.complete and r.score is not None]
    whole = [(c, r) for c, r in whole if r.feasible] or whole
    whole.sort(key=lambda pair: (*(-part for part in pair[1].standing), pair[0].number))
    first: dict[str, Rated] = {}
    for candidate, result in whole:
        first.setdefault(candidate.recipe.id, (candidate, result))
    return list(first.values())[:count]
