"""Grid search over merge coefficients."""

from __future__ import annotations

import math
import random
from typing import Any, Literal

import optuna
from pydantic import Field

from evolver.errors import BadInput, nearest
from evolver.search.base import Setup, algorithm
from evolver.search.coefficients.base import space_of
from evolver.search.coefficients.independent import Independent, IndependentSettings


class GridSettings(IndependentSettings):
    """Settings of grid search."""

    algorithm: Literal["grid"] = Field(description="name of this search")
    levels: int = Field(
        3,
        ge=1,
        le=10_000,
        description="number of values of a setting that is a number, from end to end of its range; weights are "
        "multiples of 1 / (levels - 1) that sum to 1, and words are all taken",
    )
    levels_of: dict[str, int] = Field(
        default_factory=dict, description="levels of single settings, such as {lambda: 9}, in place of levels"
    )


@algorithm("grid", GridSettings)
class Grid(Independent):
    """Grid search: all combinations of a few values of every setting, in a random order that the seed decides.

    The order draws each point once, so that a budget that ends before the grid does has seen all of it evenly. Of
    several methods, the grid holds the points of each. Unlike ``random`` and ``qmc`` it comes to an end, and a point
    shows at a glance what was set. It assumes that few settings matter and that neighbouring values score alike: with
    each further setting it has several times as many points.
    """

    def __init__(self, setup: Setup, settings: GridSettings) -> None:
        space = space_of(setup.maker, settings)
        branches = space.branches or {"": space}
        known = set[str]()
        for branch in branches.values():
            branch.axes(lambda setting: known.add(setting) or 1)  # type: ignore[func-returns-value]
        for name, levels in settings.levels_of.items():
            if name not in known:
                raise BadInput(f"search.levels_of: nothing called {name!r} is tuned; {nearest(name, known)}")
            if not 1 <= levels <= 10_000:
                raise BadInput(f"search.levels_of.{name}: {levels} is not usable; write a number from 1 to 10000.")
        self._axes = {
            name: branch.axes(lambda setting: settings.levels_of.get(setting, settings.levels))
            for name, branch in branches.items()
        }
        self._sizes = {name: math.prod(len(axis) for axis in axes) for name, axes in self._axes.items()}
        self.points = sum(self._sizes.values())
        self._draw = random.Random(f"{setup.seed}:grid")
        self._moved: dict[int, int] = {}
        super().__init__(setup, space, settings, "grid", limit=self.points)

    @property
    def remarks(self) -> tuple[str, ...]:
        """A sentence on a grid that is larger than the budget."""
        budget, items = self.setup.budget, self.setup.estimator.items
        most = [n for n in (budget.candidates, budget.items and math.ceil(budget.items / items)) if n is not None]
        if not most or min(most) >= self.points:
            return ()
        said = (
            f"search: the grid has {self.points} points, and the budget ends after {min(most)} of them, which are "
            "drawn at random; write fewer levels, or tune fewer settings, to see all of it"
        )
        return (said,)

    def start(self) -> None:
        """Nothing is lined up: every point is made when it is asked for."""

    def draw(self, k: int) -> optuna.trial.Trial:
        return self.place(self._at(self._next(k)))

    def _next(self, k: int) -> int:
        """The number of the k-th point: shuffled as by Fisher and Yates, of which only the numbers that have moved are
        kept.
        """
        other = self._draw.randrange(k, self.points)
        found = self._moved.get(other, other)
        self._moved[other] = self._moved.pop(k, k)
        return found

    def _at(self, number: int) -> dict[str, Any]:
        """The point of a number; of two that follow one another, the last setting differs."""
        for name, size in self._sizes.items():
            if number < size:
                point: dict[str, Any] = {}
                for axis in reversed(self._axes[name]):
                    number, place = divmod(number, len(axis))
                    point |= axis[place]
                return self.space.within(name, point)
            number -= size
        raise AssertionError("the number of a point is below that of all points")
