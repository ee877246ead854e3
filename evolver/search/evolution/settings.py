"""The settings of Evolver."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from evolver.config.section import Section

Strategy = Literal["evolver", "rand/1", "best/1", "current-to-best/1", "rand/2"]


class EvolverSettings(Section):
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
        "whole population; default: each candidate is a single member",
    )
    strategy: Strategy = Field(
        "evolver",
        description="how a mutant is made from other members: as in the paper (evolver), or by a form of "
        "differential evolution",
    )
    F: float = Field(0.5, gt=0, le=2, description="scale of the mutation")
    Cr: float = Field(
        0.5, gt=0, le=1, description="crossover rate: probability that a single weight takes the mutant's value"
    )
    generations: int = Field(15, ge=1, le=1_000_000, description="number of generations, T in the paper")
