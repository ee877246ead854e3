"""Quasi-random search over merge coefficients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import optuna
from pydantic import Field
from scipy.stats.qmc import Sobol

from evolver.errors import BadInput
from evolver.records import Choice, Knob
from evolver.search.base import Setup, algorithm
from evolver.search.coefficients.base import equal_points, space_of
from evolver.search.coefficients.independent import Independent, IndependentSettings


class QMCSettings(IndependentSettings):
    """Settings of quasi-random search."""

    algorithm: Literal["qmc"] = Field(description="name of this search")


@algorithm("qmc", QMCSettings)
class QMC(Independent):
    """Quasi-random search: after the merge with equal weights, the points of a scrambled Sobol sequence.

    The sequence (Sobol 1967; scrambled as in Matoušek 1998, by SciPy) fills the space more evenly than ``random``,
    without its holes and clusters; it learns nothing, either. It is even over the first 2, 4, 8, … points, and in few
    dimensions; from some twenty on it is hardly better than random draws. Several methods take turns, each with a
    sequence of its own.
    """

    def __init__(self, setup: Setup, settings: QMCSettings) -> None:
        space = space_of(setup.maker, settings)
        branches = space.branches or {"": space}
        for branch in branches.values():
            if len(branch.knobs) > Sobol.MAXDIM:
                raise BadInput(
                    f"search.algorithm: a Sobol sequence has at most {Sobol.MAXDIM} dimensions, and there are "
                    f"{len(branch.knobs)} coefficients; search with random, or with fewer layer_groups."
                )
        self._first = equal_points(space)
        self._sequences = [
            (name, branch.knobs, Sobol(len(branch.knobs), scramble=True, rng=[setup.seed, number]))
            for number, (name, branch) in enumerate(branches.items())
        ]
        super().__init__(setup, space, settings, "qmc")

    def start(self) -> None:
        """Nothing is lined up: every point is made when it is asked for."""

    def draw(self, k: int) -> optuna.trial.Trial:
        name, knobs, sequence = self._sequences[k % len(self._sequences)]
        if k < len(self._first):
            names = self.space.within(name, {knob.name: None for knob in knobs})
            return self.place({n: self._first[k][n] for n in names})
        return self.place(self.space.within(name, _point(knobs, sequence.random(1)[0].tolist())))


def _point(knobs: Sequence[Knob | Choice], shares: Sequence[float]) -> dict[str, Any]:
    """The point at these shares of the dimensions, each from 0 to before 1."""
    return {
        knob.name: knob.options[int(share * len(knob.options))] if isinstance(knob, Choice) else knob.at(share)
        for knob, share in zip(knobs, shares, strict=True)
    }
