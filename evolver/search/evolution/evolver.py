"""Evolver: evolves the weights of the experts as a population.

Paper: Du et al., "Knowledge Fusion By Evolving Weights of Language Models", Findings of ACL 2024. There are two forms:

- ``Alone``, without a merger: every member of the population in turn gets a child, by mutation and crossover. The child
  replaces its parent if its dev score is higher. The best member wins.
- ``Merged``, with a merger: a child stands in its parent's place in the population, the whole population is merged, and
  the dev score of this merge decides whether the child stays.

Both follow the code that the authors released, with one deliberate difference: their second form returned the
population that was best on the *test* set. Here the search only ever sees the dev set.

The modes differ in which results a candidate is proposed on. ``sequential`` is the released order: each candidate is
proposed on all results before it. ``generational`` proposes a child of every member from the same population, so as
many workers as members are busy. ``steady`` keeps ``in_flight`` candidates in evaluation, so each is proposed on all
results but the last ``in_flight - 1``. In ``steady`` mode with a merger, an accepted candidate brings the population
that it was made from, with its child in it; children that were accepted in the meantime are not in it.
"""

from __future__ import annotations

from evolver.errors import BadInput
from evolver.search.base import Ordered, Setup, algorithm
from evolver.search.evolution.alone import Alone
from evolver.search.evolution.merged import Merged
from evolver.search.evolution.offspring import PARTNERS
from evolver.search.evolution.population import size_of
from evolver.search.evolution.settings import EvolverSettings


@algorithm("evolver", EvolverSettings, incumbent=True)
def build_evolver(setup: Setup, settings: EvolverSettings) -> Ordered:
    """Evolves the weights of the experts by mutation and crossover (Du et al. 2024, Findings of ACL).

    Unlike the coefficient searches it does not stay within the mixtures of the experts that one set of coefficients
    gives: every single weight may come from another member. It assumes that good weights of different experts can be
    combined one by one, as all experts come from one base.

    Raises BadInput for settings that do not fit together, and for a population that is too small.
    """
    if setup.together > 1 and settings.mode != "generational":
        raise BadInput(
            f"search.mode: {settings.mode} proposes candidates one by one, but halving needs batches; write "
            "generational."
        )
    if settings.in_flight > 1 and settings.mode != "steady":
        raise BadInput(
            f"search.in_flight: in mode {settings.mode}, the search itself decides how many candidates are evaluated "
            "at the same time; leave in_flight out, or write mode: steady."
        )
    if settings.merger is None and settings.adapt:
        raise BadInput(
            "search.adapt: without a merger, there are no settings that could adapt; write merger, or leave adapt out."
        )
    size = size_of(setup, settings.population, PARTNERS[settings.strategy] + 1, f"search.strategy: {settings.strategy}")
    return Alone(setup, settings, size) if settings.merger is None else Merged(setup, settings, size)
