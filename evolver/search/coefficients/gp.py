"""Bayesian optimisation of merge coefficients with a Gaussian process."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import optuna
from pydantic import Field
from threadpoolctl import threadpool_limits

from evolver.errors import BadInput
from evolver.records import Result
from evolver.search.base import Setup, algorithm
from evolver.search.coefficients.base import Coefficients, CoefficientSettings, refuse_in_flight, space_of, stated


class GPSettings(CoefficientSettings):
    """Settings of the Gaussian process."""

    algorithm: Literal["gp"] = Field(description="name of this search")
    startup: int = Field(
        10, ge=1, le=100_000, description="number of candidates that are drawn at random at the beginning"
    )
    in_flight: int = Field(1, ge=1, le=100_000, description="number of candidates in evaluation at the same time")


@algorithm("gp", GPSettings)
class GP(Coefficients):
    """Bayesian optimisation with a Gaussian process (Jones et al. 1998), by Optuna.

    It models the score as a Gaussian process with a Matérn kernel (ν = 2.5) that has a length scale for every
    dimension, estimates the noise, and proposes where the logarithm of the expected improvement is highest (Ament et
    al. 2023, arXiv 2310.20708). Unlike ``tpe`` it models how dimensions act together and how certain it is, so it
    needs fewer candidates where the score is smooth and has up to some twenty dimensions, which it assumes. Its work
    grows with the cube of the number of candidates: it is for hundreds, not for thousands. With several candidates in
    evaluation, it averages over what the pending ones may score. With constraints, the expected improvement is
    multiplied by the probability that they are kept (Gardner et al. 2014). It takes one method only.

    The model is fitted by iteration, so the last digits of a proposal may differ between machines of different kinds:
    resume a run on a machine like the one on which it began.
    """

    def __init__(self, setup: Setup, settings: GPSettings) -> None:
        refuse_in_flight(setup, settings.in_flight)
        space = space_of(setup.maker, settings)
        if space.branches:
            raise BadInput(
                "search.method: gp models one set of dimensions, and every method has its own; name one method, or "
                "search with tpe, cmaes, nsga2, nsga3, random, qmc or grid."
            )
        sampler = stated(
            optuna.samplers.GPSampler,
            seed=setup.seed,
            independent_sampler=optuna.samplers.RandomSampler(seed=setup.seed),
            n_startup_trials=settings.startup,
            deterministic_objective=False,
            warn_independent_sampling=False,
        )
        super().__init__(setup, space, sampler, "gp")
        self.in_flight = settings.in_flight

    def draw(self, k: int) -> optuna.trial.Trial:
        # With one thread the rounding of sums is the same everywhere; and of such small matrices it is faster, too.
        with threadpool_limits(limits=1):
            return super().draw(k)

    def waits_for(self, k: int) -> int:
        together = self.setup.together
        return max(0, k - self.in_flight + 1) if together == 1 else k - k % together

    def violations(self, result: Result) -> Mapping[str, float]:
        # The sampler wants every constraint of every candidate. What was scored in part is not known to break any.
        return {**{str(number): 0.0 for number in range(self.setup.constraints)}, **result.violations}
