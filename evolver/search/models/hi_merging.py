"""Hi-Merging: what every layer of every expert contributes, found out by leaving it out, and conflicts resolved.

First each expert is trimmed and scaled for its own tasks. Then the merge of all of them is scored without each layer's
task vector in turn, and the base with it alone. The table of these scores says in which layers experts are in each
other's way, and there all but one give way, or one is trimmed and scaled down once more.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import Field

from evolver.config.section import Section
from evolver.errors import BadInput
from evolver.records import UNKNOWN, Candidate, Result
from evolver.records.recipe import Merge, Place, Rule
from evolver.search.base import Ordered, Setup, algorithm

# The paper's grid for densities and scales. Of equal scores the first one counts: the expert as it is, or nearest to.
TENTHS = tuple(n / 10 for n in range(10, 0, -1))


class HiMergingSettings(Section):
    """Settings of Hi-Merging. The defaults are the paper's where it has the same setting."""

    algorithm: Literal["hi_merging"] = Field(description="name of this search")
    tune: Literal["separate", "joint", "none"] = Field(
        "separate",
        description="how each expert's scale and density are found on its own tasks, among 0.1, 0.2, …, 1: first the "
        "scale, then the density (separate, 19 candidates an expert), all pairs (joint, 100), or not at all (none)",
    )
    density: float = Field(1.0, gt=0, le=1, description="share of each task vector that is kept, with ``tune: none``")
    scale: float = Field(1.0, gt=0, le=3, description="factor of each task vector, with ``tune: none``")
    mass: float = Field(
        1.0,
        gt=0,
        le=3,
        description="factor of the sum of the experts' task vectors. The paper adds two of them up; with many experts "
        "write less",
    )
    alpha: float = Field(
        0.5, ge=0, le=1e6, description="weight α of the score that is lost where the merge lacks a layer's task vector"
    )
    beta: float = Field(
        0.5, ge=0, le=1e6, description="weight β of the score that the base gains by a layer's task vector alone"
    )
    keep: Literal["all", "better"] = Field(
        "all",
        description="whether all layers in conflict are resolved at once (all), or one after the other, the worst "
        "first, and each of them only where the score is not lower than before (better)",
    )


@dataclass(frozen=True)
class KeptDelta:
    """How much of an expert's task vector a merge has: its largest scalars, this share of them, times ``scale``."""

    density: float = 1.0
    scale: float = 1.0


@dataclass(frozen=True)
class Contribution:
    """What one layer of one expert contributes.

    Attributes:
        own: α·drop + β·gain of the score of the expert's own tasks.
        merged: the same of the score of all tasks, which the merge is for.
    """

    own: float = 0.0
    merged: float = 0.0

    @property
    def conflict(self) -> float:
        """γ: what the other experts' tasks lose by it."""
        return self.own - self.merged


@algorithm("hi_merging", HiMergingSettings)
class HiMerging(Ordered):
    """Ablations by layer (Hi-Merging, Fu et al. 2025, ACL, arXiv 2506.12379, read in a summary [S]).

    With δ_m = scale·trim(τ_m), the contribution of layer ℓ of expert m is c = α·(score(merge) - score(merge without
    δ_m^ℓ)) + β·(score(base + δ_m^ℓ) - score(base)). Its conflict is γ = c_own - c_merged, with the scores of the
    expert's own tasks and of all tasks. Layers are resolved in the order of Σ_m max(γ, 0), the largest first. Where
    several experts have γ > 0, the one with the largest c_merged stays and the others are left out; where one has, its
    density and scale are halved; where none has, nothing changes. Unlike searches of coefficients, it tries no
    combinations, so it takes about 2·layers·experts candidates. It assumes that layers act one by one.

    The summary measures c "on the own task and after merging", which is read as above. It trims the task vector as a
    whole; here each tensor is trimmed by itself. What lies outside of the layers stays as the experts' shares of the
    whole model say. What failed counts as no contribution. It draws nothing at random.

    Raises BadInput where no expert has a task of its own while there are others, and for weights that are both 0.
    """

    def __init__(self, setup: Setup, settings: HiMergingSettings) -> None:
        self.settings, self.depth, self.experts = settings, setup.maker.depth(anew=False), setup.experts
        self.owned = [setup.owned.get(e.name, setup.tasks) for e in setup.experts]
        _refuse(setup, settings, self.owned)
        count = len(self.experts)
        self.shares = [KeptDelta(settings.density, settings.scale)] * count
        self.rounds = {"separate": (TENTHS, TENTHS[1:]), "joint": (TENTHS * len(TENTHS),), "none": ()}[settings.tune]
        sizes = (*(count * len(values) for values in self.rounds), 2, 2 * count * self.depth)
        # The first candidates of: every round of tuning, base and merge, ablations, and what is resolved.
        self.starts = list(itertools.accumulate(sizes, initial=0))
        self.tuned, self.ablated, self.resolved = self.starts[-3:]
        super().__init__(setup, limit=self.resolved + (self.depth if settings.keep == "better" else 1))
        self.results: dict[int, Result] = {}
        self.cells: dict[tuple[int, int], KeptDelta] = {}  # of (layer, expert), where it is another one
        self.best = UNKNOWN
        self.trials: dict[int, dict[tuple[int, int], KeptDelta]] = {}

    @property
    def remarks(self) -> tuple[str, ...]:
        """A sentence on a budget that ends before the conflicts are resolved."""
        most, wanted = self.setup.budget.candidates, self.limit
        if most is None or wanted is None or most >= wanted:
            return ()
        said = (
            f"search: {wanted} candidates are needed before the last conflict is resolved, and the budget ends after "
            f"{most}; raise budget.candidates to {wanted}, or write search.tune: none"
        )
        return (said,)

    def waits_for(self, k: int) -> int:
        if k >= self.resolved:
            return k if self.settings.keep == "better" else self.resolved
        return max(start for start in self.starts if start <= k)

    def propose(self, k: int) -> Candidate:
        parents = tuple(expert.id for expert in self.experts)
        if k < self.tuned:
            expert, share = self._trial(k)
            return Candidate(k, self._merge({expert: share}), "hi_merging/tuning", (parents[expert],))
        if k == self.tuned:
            self.shares = [self._tuned(expert, len(self.rounds)) for expert in range(len(self.experts))]
        if k < self.ablated:
            return Candidate(k, (self.setup.base, self.merged())[k - self.tuned], "hi_merging/whole", parents)
        if k < self.resolved:
            return Candidate(k, self._ablation(k - self.ablated), "hi_merging/ablation", parents)
        self.trials[k] = self._resolved(k - self.resolved)
        return Candidate(k, self.merged(self.trials[k]), "hi_merging", parents)

    def learn(self, candidate: Candidate, result: Result) -> None:
        k = candidate.number
        if k < self.resolved:
            self.results[k] = result
        if k == self.tuned + 1:
            self.best = result.standing
        if k >= self.resolved and self.settings.keep == "better" and result.standing >= self.best:
            self.best, self.cells = result.standing, self.trials[k]

    def merged(self, cells: dict[tuple[int, int], KeptDelta] | None = None) -> Merge:
        """The merge of all experts, with these shares in places of their own."""
        return self._merge(dict(enumerate(self.shares)), cells or {})

    def table(self) -> dict[tuple[int, int], Contribution]:
        """What each layer of each expert contributes, by (layer, expert)."""
        return {
            (layer, expert): Contribution(*(self._contribution(layer, expert, own) for own in (True, False)))
            for layer in range(self.depth)
            for expert in range(len(self.experts))
        }

    def _trial(self, k: int) -> tuple[int, KeptDelta]:
        """The expert that candidate ``k`` tunes, and its share."""
        number = max(n for n in range(len(self.rounds)) if self.starts[n] <= k)
        expert, place = divmod(k - self.starts[number], len(self.rounds[number]))
        value = self.rounds[number][place]
        if self.settings.tune == "joint":
            return expert, KeptDelta(TENTHS[place // len(TENTHS)], value)
        return expert, KeptDelta(1.0, value) if number == 0 else KeptDelta(value, self._tuned(expert, 1).scale)

    def _tuned(self, expert: int, rounds: int) -> KeptDelta:
        """The best share of an expert for its own tasks after so many rounds of tuning."""
        tried = [(k, *self._trial(k)) for k in range(self.starts[rounds])]
        own = [(k, share) for k, of, share in tried if of == expert]
        best = max(own, key=lambda pair: self._worth(pair[0], expert), default=None)  # of equal ones the first
        return self.shares[expert] if best is None else best[1]

    def _worth(self, k: int, expert: int) -> tuple[float, float]:
        """What a candidate is compared by on an expert's own tasks: the greater, the better."""
        result = self.results[k]
        score = self._score(result, expert)
        return (-math.inf, 0.0) if score is None else (-result.violation, score)

    def _ablation(self, number: int) -> Merge:
        """The merge without one layer of one expert, or the base with that alone."""
        place, alone = divmod(number, 2)
        layer, expert = divmod(place, len(self.experts))
        share = self.shares[expert]
        if alone:
            return self._merge({}, {(layer, expert): share})
        return self.merged({(layer, expert): replace(share, scale=0.0)})

    def _contribution(self, layer: int, expert: int, own: bool) -> float:
        """α·drop + β·gain of one layer of one expert, on its own tasks or on all of them."""
        first = self.ablated + 2 * (layer * len(self.experts) + expert)
        base, merge, without, alone = (
            self._score(self.results[k], expert if own else None)
            for k in (self.tuned, self.tuned + 1, first, first + 1)
        )
        drop = 0.0 if merge is None or without is None else merge - without
        gain = 0.0 if base is None or alone is None else alone - base
        return self.settings.alpha * drop + self.settings.beta * gain

    def _score(self, result: Result, expert: int | None) -> float | None:
        """The mean score of an expert's own tasks, or the score of all tasks; None where it is not known."""
        if expert is None or result.score is None:
            return result.score
        own = [result.tasks[task] for task in self.owned[expert] if task in result.tasks]
        return math.fsum(own) / len(own) if own else result.score

    def _resolved(self, number: int) -> dict[tuple[int, int], KeptDelta]:
        """The shares with one more layer resolved, or with all of them."""
        table = self.table()
        layers = sorted(range(self.depth), key=lambda layer: -self._strife(table, layer))  # a stable sort
        out = dict(self.cells)
        for layer in layers if self.settings.keep == "all" else layers[number : number + 1]:
            out |= self._resolve(table, layer)
        return out

    def _strife(self, table: dict[tuple[int, int], Contribution], layer: int) -> float:
        return math.fsum(max(table[layer, e].conflict, 0.0) for e in range(len(self.experts)))

    def _resolve(self, table: dict[tuple[int, int], Contribution], layer: int) -> dict[tuple[int, int], KeptDelta]:
        """The shares of the experts that have to give way in a layer."""
        fighting = [e for e in range(len(self.experts)) if table[layer, e].conflict > CONFLICT]
        if len(fighting) == 1:
            share = self.shares[fighting[0]]
            return {(layer, fighting[0]): KeptDelta(share.density / 2, share.scale / 2)}
        stays = max(fighting, key=lambda e: table[layer, e].merged, default=None)  # of equal ones the first
        return {(layer, e): replace(self.shares[e], scale=0.0) for e in fighting if e != stays}

    def _merge(self, whole: dict[int, KeptDelta], cells: dict[tuple[int, int], KeptDelta] | None = None) -> Merge:
        """A merge of shares of whole experts, which are other ones in some layers."""
        rules = [self._rule([whole.get(e, KeptDelta(scale=0.0)) for e in range(len(self.experts))])]
        for layer in sorted({layer for layer, _ in cells or ()}):
            own = [(cells or {}).get((layer, e), whole.get(e, KeptDelta(scale=0.0))) for e in range(len(self.experts))]
            rules.append(self._rule(own, Place(layers=(layer, layer + 1))))
        return Merge("breadcrumbs", self.experts, self.setup.base, tuple(rules))

    def _rule(self, shares: Sequence[KeptDelta], place: Place | None = None) -> Rule:
        values = {"weight": tuple(s.scale for s in shares), "density": tuple(s.density for s in shares)}
        return Rule.of({**values, "gamma": (0.0,) * len(shares), "lambda": self.settings.mass}, place)


# Sums of scores differ by their rounding, which is no conflict.
CONFLICT = 1e-12


def _refuse(setup: Setup, settings: HiMergingSettings, owned: Sequence[Sequence[str]]) -> None:
    """Raises BadInput where there can be no conflict."""
    if settings.alpha == settings.beta == 0:
        raise BadInput("search.alpha: alpha and beta are both 0, so that nothing contributes; write one above 0.")
    if settings.tune != "none" and settings.model_fields_set & {"density", "scale"}:
        raise BadInput("search.tune: the density and the scale are tuned; leave them out, or write tune: none.")
    if all(set(own) == set(setup.tasks) for own in owned):
        raise BadInput(
            "search.algorithm: hi_merging compares the score of an expert's own tasks with that of all tasks, and no "
            "expert has tasks of its own; name them under statistics.tasks, or search with another algorithm."
        )
