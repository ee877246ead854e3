"""Evo-Merging: first how much of every expert's task vector stays, then its coefficient, which may be negative.

With N experts and their task vectors τ_i, the model is base + Σ β_i · top(τ_i, α_i), where top keeps the share α_i of
largest numbers of every tensor and sets the others to 0. There are two stages, each of them CMA-ES over N numbers:

1. sparsity: α from 0 to 1, which starts with 1, and β_i = 1/N. The fitness is the score - penalty · mean α.
2. scaling: β from -1.5 to 1.5, which starts with 1/N, and the best α of the first stage. The fitness is the score
   - penalty · mean |β|.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from pydantic import Field

from evolver.config.section import Section
from evolver.records import Candidate, Choice, Knob, Result, Standing
from evolver.records.recipe import Expert, Merge, Recipe, Rule
from evolver.search.base import Ordered, Setup, Space, algorithm
from evolver.search.coefficients.cmaes import CMAES, CMAESSettings

EachNumber = tuple[float, ...]
# From how many experts on the second stage is twice as long as the first.
MANY = 10
CANDIDATES = 400


class SignedSettings(Section):
    """Settings of Evo-Merging. The defaults are those of the paper."""

    algorithm: Literal["signed"] = Field(description="name of this search")
    population: int = Field(20, ge=2, le=100_000, description="number of candidates of a generation")
    sigma: float = Field(0.05, gt=0, le=1000, description="initial step size, in units of α and of β")
    penalty: float = Field(
        0.05, ge=0, le=1e6, description="what the mean of α, and in the second stage of |β|, takes from the score"
    )
    reach: float = Field(1.5, gt=0, le=100, description="largest β; the smallest is its negative")
    sparsity: int = Field(
        CANDIDATES, ge=0, le=1_000_000, description="number of candidates of the first stage; 0: all α stay 1"
    )
    scaling: int | None = Field(
        None,
        ge=1,
        le=1_000_000,
        description="number of candidates of the second stage; default: 400, and 800 for 10 experts or more",
    )


@dataclass(frozen=True)
class _Numbers:
    """One number for every expert, as a search space. The point with equal weights is where a stage starts.

    Attributes:
        name: α or β, as the knobs are called.
        begin: the number at which a stage starts.
        make: the recipe at a point.
    """

    name: str
    experts: tuple[Expert, ...]
    low: float
    high: float
    begin: float
    make: Callable[[EachNumber], Recipe]

    @property
    def knobs(self) -> tuple[Knob | Choice, ...]:
        return tuple(Knob(f"{self.name}[{e.name}]", self.low, self.high) for e in self.experts)

    @property
    def start(self) -> Mapping[str, float]:
        return {knob.name: self.begin for knob in self.knobs}

    @property
    def branches(self) -> Mapping[str, Space]:
        return {}

    def within(self, branch: str, values: Mapping[str, Any]) -> dict[str, Any]:
        return dict(values)

    def numbers(self, values: Mapping[str, Any]) -> EachNumber:
        """The numbers of a point, in the order of the experts."""
        return tuple(float(values[knob.name]) for knob in self.knobs)

    def decode(self, values: Mapping[str, Any]) -> Recipe:
        return self.make(self.numbers(values))

    def encode(self, recipe: Recipe) -> dict[str, Any] | None:
        return None  # no model from elsewhere is taken in

    def encode_equal(self, mass: float) -> dict[str, Any]:
        return dict(self.start)

    def axes(self, levels: Callable[[str], int]) -> tuple[tuple[dict[str, Any], ...], ...]:
        raise NotImplementedError("no grid spans a stage of Evo-Merging")


class _Stage(CMAES):
    """CMA-ES over the numbers of a stage, from its start, with a penalty on their size."""

    space: _Numbers

    def __init__(self, setup: Setup, settings: SignedSettings, space: _Numbers) -> None:
        sigma = settings.sigma / (space.high - space.low)  # Optuna scales every range to one of length 1
        typed = CMAESSettings(algorithm="cmaes", population=settings.population, sigma=sigma)
        super().__init__(setup, typed, space)
        self.weight, self._size = settings.penalty, 0.0
        # the best candidate: its fitness, its point, and its result without the items
        self.best: tuple[Standing, EachNumber, Result] | None = None

    def learn(self, candidate: Candidate, result: Result) -> None:
        at = self.space.numbers(self._trials[candidate.number].params)
        self._size = sum(map(abs, at)) / len(at)
        if result.score is not None:
            fitness = (result.standing[0], result.score - self.weight * self._size)
            if self.best is None or fitness > self.best[0]:
                self.best = fitness, at, replace(result, items=(), probabilities=(), said=())
        super().learn(candidate, result)

    def values(self, result: Result) -> float | None:
        found = super().values(result)
        return None if found is None else found - self.weight * self._size


@algorithm("signed", SignedSettings)
class Signed(Ordered):
    """Evo-Merging for many adapters (Chen et al. 2025, arXiv 2509.12951): sparsity first, then signed coefficients.

    Unlike ``cmaes`` the coefficients do not sum to a mass and may be negative, so that an expert can be subtracted, and
    each of the two halves of the numbers is searched while the other one stands still. It assumes that this division
    loses little, and that most of what an adapter has learnt lies in its largest numbers. It is meant for tens of
    adapters. A candidate that breaks constraints loses 10 times the sum of what it breaks, as in ``cmaes``.

    What ``budget`` allows does not move the border between the stages: write a smaller ``sparsity`` for a short search.
    """

    def __init__(self, setup: Setup, settings: SignedSettings) -> None:
        count = len(setup.experts)
        scaling = settings.scaling or (2 * CANDIDATES if count >= MANY else CANDIDATES)
        super().__init__(setup, limit=settings.sparsity + scaling)
        self.settings, self.border = settings, settings.sparsity
        self._kept, equal = (1.0,) * count, (1.0 / count,) * count
        self._first = self._stage("sparsity", 0.0, 1.0, 1.0, lambda alpha: self._merge(alpha, equal), setup.seed)
        self._second: _Stage | None = None

    @property
    def remarks(self) -> tuple[str, ...]:
        """A sentence on a budget that ends before the second stage."""
        most = self.setup.budget.candidates
        if most is None or most > self.border:
            return ()
        said = (
            f"search: the budget ends after {most} candidates, and the first {self.border} only decide how much of "
            "every expert stays; write a smaller search.sparsity, or a larger budget"
        )
        return (said,)

    def waits_for(self, k: int) -> int:
        if k < self.border:
            return self._first.waits_for(k)
        # The stages have generations of the same size, and the second one begins with all results of the first.
        return self.border + max(0, self._first.waits_for(self._own(k)) - self._own(self.border))

    def propose(self, k: int) -> Candidate:
        if k < self.border:
            return replace(self._first.propose(k), proposer="signed/sparsity")
        return replace(self._scaling.propose(self._own(k)), number=k, proposer="signed/scaling")

    def learn(self, candidate: Candidate, result: Result) -> None:
        k = candidate.number
        if k < self.border:
            self._first.learn(candidate, result)
        else:
            self._scaling.learn(replace(candidate, number=self._own(k)), result)

    def _own(self, k: int) -> int:
        """What the second stage calls candidate ``k``. Its number 0, the start, has been scored by the first stage."""
        return k - self.border + (self.border > 0)

    @property
    def _scaling(self) -> _Stage:
        """The second stage, which begins with the best α of the first."""
        if self._second is None:
            best, reach = self._first.best, self.settings.reach
            self._kept = best[1] if best else self._kept
            start = min(1.0 / len(self.setup.experts), reach)
            self._second = self._stage(
                "scaling", -reach, reach, start, lambda beta: self._merge(self._kept, beta), self.setup.seed + 1
            )
            if self.border:
                begun = self._second.propose(0)
                self._second.learn(begun, best[2] if best else Result.failed(begun, "the whole first stage failed"))
        return self._second

    def _stage(
        self, name: str, low: float, high: float, start: float, make: Callable[[EachNumber], Recipe], seed: int
    ) -> _Stage:  # fmt: skip
        space = _Numbers(name, self.setup.experts, low, high, start, make)
        return _Stage(replace(self.setup, seed=seed % (1 << 32)), self.settings, space)

    def _merge(self, alpha: Sequence[float], beta: Sequence[float]) -> Recipe:
        """The model base + Σ β_i · top(τ_i, α_i), without the experts of which nothing is left."""
        rows = [row for row in zip(self.setup.experts, alpha, beta, strict=True) if row[1] > 0 and row[2] != 0]
        if not rows:
            return self.setup.base
        experts, shares, weights = zip(*rows, strict=True)
        values = {
            "weight": weights, "density": shares, "gamma": (0.0,) * len(rows), "lambda": 1.0, "normalize": False,
            "rescale": "none",
        }  # fmt: skip
        return Merge("breadcrumbs", experts, self.setup.base, (Rule.of(values),))
