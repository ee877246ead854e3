"""The settings of the searches that evolve a population of models."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from evolver.config.section import Section
from evolver.records.recipe import MaskUnit

Strategy = Literal["evolver", "rand/1", "best/1", "current-to-best/1", "current-to-pbest/1", "rand/2"]
# From how many of the best, as a share of the population, current-to-pbest/1 draws its first partner: as L-SHADE.
BEST_SHARE = 0.11


class PopulationSettings(Section):
    """What all searches that evolve a population of models have in common."""

    population: int | None = Field(
        None,
        ge=2,
        le=100_000,
        description="number of members of the population; it is filled up, after the experts, by their average and by "
        "turns by merges and mixtures of them that the seed decides; default: the number of experts, for shade at "
        "least 4",
    )
    mask: MaskUnit = Field(
        "scalar",
        description="what draws in a crossover: each single weight (scalar), as in the operator that the paper's "
        "authors released, each row of a tensor, each tensor, or each layer as a whole",
    )
    generations: int = Field(15, ge=1, le=1_000_000, description="number of generations, T in the paper of Evolver")


class EvolverSettings(PopulationSettings):
    """Settings of the Evolver search. The defaults are those of the code that the authors released."""

    algorithm: Literal["evolver"] = Field(description="name of this search")
    mode: Literal["sequential", "generational", "steady"] = Field(
        "sequential",
        description="sequential: one candidate after the other; generational: one child of every member of the "
        "population, all at the same time; steady: in_flight candidates at any time",
    )
    in_flight: int = Field(
        1, ge=1, le=100_000, description="with mode: steady, number of candidates in evaluation at the same time"
    )
    merger: dict[str, Any] | None = Field(
        None,
        description="merge method and its settings, such as {method: simple}: each candidate is a merge of the "
        "whole population; under after, methods that every merge goes through, as in search.after but fixed; default: "
        "each candidate is a single member",
    )
    adapt: bool | list[str] = Field(
        False,
        description="with a merger, which of its numbers evolve beside the population, such as [lambda, density]; "
        "true: all of its numbers that a search can tune",
    )
    strategy: Strategy = Field(
        "evolver",
        description="how a mutant is made from other members: as in the paper (evolver), or by a form of "
        "differential evolution",
    )
    p: float = Field(
        BEST_SHARE,
        gt=0,
        le=1,
        description="with strategy: current-to-pbest/1, from which share of the population one of the best is drawn",
    )
    F: float = Field(0.5, gt=0, le=2, description="scale of the mutation")
    Cr: float = Field(
        0.5,
        gt=0,
        le=1,
        description="crossover rate: probability that a weight, or what else the mask draws for, takes the mutant's "
        "value",
    )
