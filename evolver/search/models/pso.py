"""Particle swarm optimisation over mixtures of models.

A particle is a model that moves through the space of weights. It is drawn towards the best place that it has been to
(p), towards the best place of the whole swarm (g) and, in Model Swarms, away from the worst place (b) that was found:

- ``pso-merging``: v ← inertia·v + cognitive·r·(p − x) + social·r·(g − x), x ← x + v
- ``model-swarms``: v ← [inertia·r·v + cognitive·r·(p − x) + social·r·(g − x) + repulsion·r·(x − b)] / C with C the sum
  of the four factors in front of v, p − x, g − x and x − b; x ← x + step·v; the step shrinks after every move

Each r is drawn anew from [0, 1). All of this adds and scales models, so wherever a particle is, it is a mixture of the
models that the swarm began with. The search keeps one coefficient for each of these instead of weights.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from typing import Literal

from pydantic import Field

from evolver.config.section import Section
from evolver.errors import BadInput
from evolver.records import UNKNOWN, Candidate, Result, Standing
from evolver.records.recipe import Merge, Recipe, Rule
from evolver.search.base import Ordered, Setup, algorithm
from evolver.search.models.mixtures import MixturePoint, combined, mixture_of, one_hot

# What the papers' own settings are, for those that are left open.
PAPERS: Mapping[str, Mapping[str, float]] = {
    "pso-merging": {
        "sparse": 0.8, "inertia": 0.2, "cognitive": 2.0, "social": 2.0, "repulsion": 0.0, "step": 1.0, "decay": 1.0,
        "restart": 0, "particles": 0,
    },
    "model-swarms": {
        "sparse": 0.0, "inertia": 0.2, "cognitive": 0.3, "social": 0.4, "repulsion": 0.05, "step": 1.0, "decay": 0.95,
        "restart": 5, "particles": 20,
    },
}  # fmt: skip
SHORTEST_STEP = 0.1


class PSOSettings(Section):
    """Settings of the particle swarm. What is left out has the value of the paper that ``rule`` names."""

    algorithm: Literal["pso"] = Field(description="name of this search")
    rule: Literal["pso-merging", "model-swarms"] = Field(
        "pso-merging", description="whose rule moves the particles, and whose first swarm it is"
    )
    particles: int | None = Field(
        None,
        ge=2,
        le=100_000,
        description="number of particles; those beyond the models that the swarm begins with are mixtures of two "
        "experts. Default: 2·experts + 1 (pso-merging), 20 (model-swarms)",
    )
    sparse: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="the swarm also begins with the base and with a copy of each expert in which this share of the "
        "task vector is dropped at random (DARE); 0: with the experts only. Default: 0.8 (pso-merging), 0 "
        "(model-swarms)",
    )
    inertia: float | None = Field(None, ge=0, le=10, description="weight of the old velocity; default: 0.2")
    cognitive: float | None = Field(
        None, ge=0, le=10, description="pull of the particle's own best place; default: 2 (pso-merging), 0.3"
    )
    social: float | None = Field(
        None, ge=0, le=10, description="pull of the swarm's best place; default: 2 (pso-merging), 0.4"
    )
    repulsion: float | None = Field(
        None, ge=0, le=10, description="push away from the worst place; default: 0 (pso-merging), 0.05"
    )
    step: float | None = Field(None, gt=0, le=10, description="length of the first move, as a factor; default: 1")
    decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="what the step is multiplied by after every move, down to 0.1; default: 1 (pso-merging), 0.95",
    )
    restart: int | None = Field(
        None,
        ge=0,
        le=1_000_000,
        description="a particle that has not improved for so many moves goes back to its best place and stops there; "
        "0: never. Default: 0 (pso-merging), 5",
    )


@algorithm("pso", PSOSettings)
class PSO(Ordered):
    """Particle swarm optimisation (PSO-Merging, arXiv 2508.19839; Model Swarms, Feng et al. 2025, arXiv 2410.11163).

    Unlike ``cmaes`` it models no distribution: every particle remembers its own best place. Unlike ``evolver`` it moves
    whole models, so all candidates are mixtures of the models that the swarm begins with; it can leave their hull. It
    assumes that good models lie between and beyond good ones. A step of the swarm is proposed on all results of the
    steps before it. A candidate that failed is nobody's best place and repels nobody.

    Raises BadInput for fewer particles than the models that the swarm begins with.
    """

    def __init__(self, setup: Setup, settings: PSOSettings) -> None:
        super().__init__(setup)
        given = settings.model_dump(exclude_none=True)
        self.values = {**PAPERS[settings.rule], **{k: v for k, v in given.items() if k in PAPERS[settings.rule]}}
        self.normalised = settings.rule == "model-swarms"
        self.models = _models(setup, self.values["sparse"])
        self.places = _first(setup, len(self.models), bool(self.values["sparse"]), settings.particles, self.values)
        self.size = len(self.places)
        self.speeds = [self._first_speed(i) for i in range(self.size)]
        self.bests: list[tuple[Standing, MixturePoint]] = [(UNKNOWN, place) for place in self.places]
        self.worst: tuple[Standing, MixturePoint] | None = None
        self.idle = [0] * self.size

    def waits_for(self, k: int) -> int:
        return k - k % self.size

    def propose(self, k: int) -> Candidate:
        moves, i = divmod(k, self.size)
        if moves:
            self._move(i, moves, random.Random(f"{self.setup.seed}:pso:{k}"))
        recipe = mixture_of(self.models, self.setup.base, self.places[i])
        used = tuple(m.id for m, c in zip(self.models, self.places[i], strict=True) if c)
        return Candidate(k, recipe, "pso" if moves else "pso/initial", used)

    def learn(self, candidate: Candidate, result: Result) -> None:
        i = candidate.number % self.size
        found = (result.standing, self.places[i])
        better = found[0] > self.bests[i][0]
        self.idle[i] = 0 if better else self.idle[i] + 1
        if better:
            self.bests[i] = found
        if result.score is not None and (self.worst is None or found[0] < self.worst[0]):
            self.worst = found

    def _move(self, i: int, moves: int, draw: random.Random) -> None:
        """Move particle i for the time number ``moves``, from 1."""
        at, own = self.places[i], self.bests[i][1]
        if self.values["restart"] and self.idle[i] >= self.values["restart"]:
            self.idle[i], self.places[i], self.speeds[i] = 0, own, (0.0,) * len(own)
            at = own
        standing, best = max(self.bests, key=lambda found: found[0])  # the first of equals
        leader = at if standing == UNKNOWN else best
        worst = at if self.worst is None else self.worst[1]
        pulls = [self.values[name] * draw.random() for name in ("cognitive", "social", "repulsion")]
        inertia = self.values["inertia"] * (draw.random() if self.normalised else 1.0)
        total = inertia + math.fsum(pulls) if self.normalised else 1.0
        ways = [self.speeds[i], _difference(own, at), _difference(leader, at), _difference(at, worst)]
        self.speeds[i] = combined(ways, [factor / (total or 1.0) for factor in (inertia, *pulls)])
        step = max(SHORTEST_STEP, self.values["step"] * self.values["decay"] ** (moves - 1))
        self.places[i] = combined([at, self.speeds[i]], [1.0, step])

    def _first_speed(self, i: int) -> MixturePoint:
        """Nothing in PSO-Merging; in Model Swarms, towards another particle."""
        if not self.normalised:
            return (0.0,) * len(self.models)
        draw = random.Random(f"{self.setup.seed}:pso:speed:{i}")
        other = draw.choice([j for j in range(self.size) if j != i])
        return _difference(self.places[other], self.places[i])


def _models(setup: Setup, sparse: float) -> tuple[Recipe, ...]:
    """The models that the swarm begins with, but the base: experts and, for ``sparse`` above 0, sparse copies."""
    if not sparse:
        return setup.experts
    copies = []
    for place, expert in enumerate(setup.experts):
        seed = random.Random(f"{setup.seed}:pso:sparse:{place}").getrandbits(31)
        rule = Rule.of({"weight": (1.0,), "density": (1.0 - sparse,), "rescale": "inv_p", "seed": seed})
        copies.append(Merge("dare_linear", (expert,), setup.base, (rule,)))
    return (*setup.experts, *copies)


def _first(
    setup: Setup, count: int, based: bool, particles: int | None, values: Mapping[str, float]
) -> list[MixturePoint]:
    """The first places: those of all models, of the base, and of a·A + (1 − a)·B with two experts and a up to 2."""
    places = [one_hot(i, count) for i in range(count)] + ([(0.0,) * count] if based else [])
    if particles is not None and particles < len(places):
        raise BadInput(
            f"search.particles: the swarm begins with {len(places)} models, but has {particles} particles; write "
            f"{len(places)} or more, or leave particles out."
        )
    for i in range(len(places), int(particles or values["particles"])):
        draw = random.Random(f"{setup.seed}:pso:place:{i}")
        pair, part = draw.sample(range(len(setup.experts)), 2), draw.uniform(0, 2)
        places.append(combined([places[j] for j in pair], [part, 1 - part]))
    return places


def _difference(one: MixturePoint, other: MixturePoint) -> MixturePoint:
    return combined([one, other], [1.0, -1.0])
