"""Recipes that leave the space of the experts: a model plus seeded noise."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_args

from evolver.records.node import NamedNodes, Node, finite_number

if TYPE_CHECKING:
    from evolver.records.recipe import Recipe

Distribution = Literal["normal", "rademacher"]
# Keys of the counter-based random function have 64 bits.
MOST_SEED = (1 << 64) - 1


@dataclass(frozen=True, eq=False, repr=False)
class Noise(Node):
    """A model plus a weighted sum of noise, each summand of which a seed draws again anywhere:

        θ = point + σ · Σ_k coefficient_k · ε(seed_k)

    σ is a number for each tensor, the root mean square of its task vectors over all E experts and all n scalars:
    σ² = Σ_e ‖expert_e − base‖² / (E · n). So a coefficient of 1 adds noise as large as a task vector is on average, and
    a tensor that no expert has changed stays as it is. An evolution strategy of T steps is one such node with a pair
    for each direction that it has tried, and not a chain of T models.

    Attributes:
        point: the model that the noise is added to.
        experts: those whose task vectors say how large the noise is.
        base: what their task vectors are differences to.
        terms: pairs of a seed, from 0 to 2⁶⁴ − 1, and its coefficient; each seed once.
        distribution: of the draws: normal numbers, or 1 and −1 with equal probability (Rademacher). Both have mean 0
            and variance 1.
        rank: 0: every scalar of ε is drawn. Otherwise, for each matrix of m rows and n columns, ε = A Bᵀ / √rank with
            A, (m, rank), and B, (n, rank), drawn (EGGROLL, arXiv 2511.16652). Tensors of fewer than two dimensions are
            drawn in full, and those of more are matrices of their first dimension by all others.
    """

    kind: ClassVar[str] = "noise"
    point: Recipe
    experts: tuple[Recipe, ...]
    base: Recipe
    terms: tuple[tuple[int, float], ...]
    distribution: Distribution = "normal"
    rank: int = 0

    def __post_init__(self) -> None:
        terms = tuple((int(seed), finite_number(coefficient)) for seed, coefficient in self.terms)
        object.__setattr__(self, "terms", terms)
        seeds = {seed for seed, _ in terms}
        if not terms or not self.experts or len(seeds) < len(terms):
            raise ValueError("noise needs experts, and seeds that differ from each other")
        if not all(0 <= seed <= MOST_SEED for seed in seeds):
            raise ValueError("a seed of noise is a whole number of 64 bits")
        if self.distribution not in get_args(Distribution) or self.rank < 0:
            raise ValueError(f"there is no noise {self.distribution!r} of rank {self.rank}")

    @property
    def inputs(self) -> tuple[Recipe, ...]:  # type: ignore[override]  # derived here, stored in the other nodes
        return (self.point,)

    @property
    def below(self) -> tuple[Recipe, ...]:
        return (self.point, *self.experts, self.base)

    def needs(self, name: str) -> list[tuple[Recipe, str]]:
        """The tensor of the point, and of experts and base the one of the same kind, which another number of layers may
        have another name for.
        """
        node, known = self.point, name
        while found := node.needs(known):
            node, known = found[0]
        return [(self.point, name), *((e, known) for e in (*self.experts, self.base))]

    @property
    def size(self) -> float:
        """The root mean square of the noise to be expected, in units of σ: √(Σ coefficient²)."""
        return math.hypot(*(coefficient for _, coefficient in self.terms))

    def entry(self, place: Mapping[str, Any]) -> list[Any]:
        return [place[self.point.id], [place[e.id] for e in self.experts], place[self.base.id], *self._numbers()]

    def _numbers(self) -> list[Any]:
        """What is written beside the models."""
        return [[list(term) for term in self.terms], self.distribution, self.rank]

    @classmethod
    def from_entry(cls, entry: Sequence[Any], nodes: NamedNodes) -> Noise:
        point, experts, base, terms, distribution, rank = entry
        pairs = tuple((seed, coefficient) for seed, coefficient in terms)
        return cls(nodes[point], tuple(nodes[e] for e in experts), nodes[base], pairs, distribution, int(rank))

    def describe(self) -> str:
        return f"noise of {self._seeds} ({self._drawn}, {self.size:.3g} of a task vector)"

    @property
    def operations(self) -> tuple[str, ...]:
        return f"noise of {self._seeds}", self._drawn

    @property
    def _seeds(self) -> str:
        return "1 seed" if len(self.terms) == 1 else f"{len(self.terms)} seeds"

    @property
    def _drawn(self) -> str:
        return f"{self.distribution}, rank {self.rank}" if self.rank else self.distribution
