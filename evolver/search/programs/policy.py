"""Reinforced Model Merging: a policy writes a program of layers step by step, and learns from the scores of programs.

An episode begins at layer 0. At layer l an action either takes layer l from one of the sources, which are the experts
and a few merges of them, and goes on to l + 1; or leaves layer l out (skip); or goes back to l - 1 without taking
anything away, so that layers come twice (back). The episode ends above the last layer. Its reward is 100 times the
score, and going back at layer 0 costs ``fine``.

With logits θ[l, a] and values V[l], a generation of episodes changes the policy π(a | l) = softmax θ[l] by proximal
policy optimisation (PPO, Schulman et al. 2017): A_t = G_t - V[l_t] with the discounted return G_t, scaled to a standard
deviation of 1, and ``epochs`` steps of gradient ascent on the mean of min(ρA, clip(ρ, 1 - ε, 1 + ε)A) per layer, where
ρ = π(a | l) / π_old(a | l). Then V[l] moves halfway to the mean return of its layer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field

from evolver.config.section import Section
from evolver.errors import BadInput, nearest
from evolver.records import Candidate, Result
from evolver.records.recipe import Recipe
from evolver.search.base import Ordered, Setup, algorithm
from evolver.search.programs.layers import BASE_NAME
from evolver.search.programs.sources import whole_or_program

SKIP, BACK = "skip", "back"
MERGES: tuple[Mapping[str, Any], ...] = (  # with equal weights that sum to 1
    {"method": "ties", "density": 0.3},
    {"method": "dare_linear", "density": 0.66, "rescale": "inv_p"},
    {"method": "dare_ties", "density": 0.66, "rescale": "inv_p"},
)
# What a candidate that breaks constraints loses of its score for each unit, as in cmaes.
PENALTY = 10.0
# An episode that has gone back very often may not do so any more after so many steps for each layer.
MOST_STEPS = 4
FOLLOWED = 0.5  # how far the value of a layer moves towards the mean return of a generation


class PolicySettings(Section):
    """Settings of Reinforced Model Merging. The defaults are the paper's, but ``rate``, ``population`` and ``most``."""

    algorithm: Literal["policy"] = Field(description="name of this search")
    sources: list[str] | None = Field(
        None, min_length=1, description="models that layers are taken from: names of experts, or base; default: experts"
    )
    merges: list[dict[str, Any]] | None = Field(
        None,
        description="merges of all experts that layers are also taken from, each with its method and settings; "
        "default: ties with density 0.3, and dare_linear and dare_ties with density 0.66, with equal weights that sum "
        "to 1",
    )
    edits: bool = Field(
        True, description="whether layers may be left out and come again; false: as many layers as the experts have"
    )
    most: int | None = Field(
        None, ge=1, le=100_000, description="the most layers of a model; default: twice as many as the experts have"
    )
    ends: str | None = Field(
        None, description="the source of the embeddings, the last norm and the head; default: the first source"
    )
    population: int = Field(8, ge=1, le=100_000, description="number of episodes from which the policy learns at once")
    rate: float = Field(0.2, gt=0, le=100, description="step size of the gradient ascent")
    epochs: int = Field(40, ge=1, le=10_000, description="steps of gradient ascent after each generation")
    clip: float = Field(0.2, gt=0, lt=1, description="ε, by which the ratio of probabilities may differ from 1")
    discount: float = Field(0.99, gt=0, le=1, description="what a later reward counts, for each step that it is later")
    fine: float = Field(10.0, ge=0, le=1e6, description="what going back at the first layer costs, in points of 100")


@dataclass(frozen=True)
class EpisodeStep:
    """One action of an episode.

    Attributes:
        layer: where it was taken.
        action: its number.
        allowed: the numbers of all actions that were allowed there.
        reward: what it gave at once; the last step also gets the score.
    """

    layer: int
    action: int
    allowed: tuple[int, ...]
    reward: float


@algorithm("policy", PolicySettings)
class Policy(Ordered):
    """Reinforced Model Merging (Han et al. 2025, arXiv 2503.21272): a layer program as an episode of PPO.

    Unlike ``layers``, which asks a sampler for a whole program at once, it builds programs layer by layer and learns at
    which layer which action pays. The paper's policy is a network that sees how often each layer of each source was
    taken; here it is a table with a row for each layer, which learns from the few hundred programs that a budget
    allows. It assumes that what is good at a layer depends little on what was done at the others. A candidate that
    failed teaches as if it had the lowest score of all.

    Raises BadInput for sources that are none, and for models whose layers cannot be put together anew.
    """

    def __init__(self, setup: Setup, settings: PolicySettings) -> None:
        super().__init__(setup)
        self.settings, self.depth = settings, setup.maker.depth(anew=settings.edits)
        self.models, self.ends = _sources(setup, settings)
        self.actions = (*self.models, *((SKIP, BACK) if settings.edits else ()))
        self.most = settings.most or 2 * self.depth
        if self.most < self.depth and not settings.edits:
            raise BadInput(f"search.most: without edits, a model has {self.depth} layers; leave most out.")
        self.logits = [[0.0] * len(self.actions) for _ in range(self.depth)]
        self.expected = [0.0] * self.depth
        self.lowest: float | None = None
        self._episodes: dict[int, list[EpisodeStep]] = {}
        self._told_of: dict[int, float | None] = {}

    def waits_for(self, k: int) -> int:
        return k - k % self.settings.population

    def propose(self, k: int) -> Candidate:
        steps, layers = self._episode(random.Random(f"{self.setup.seed}:policy:{k}"))
        self._episodes[k] = steps
        recipe = whole_or_program(layers, self.ends, self.depth)
        return Candidate(k, recipe, "policy", tuple(dict.fromkeys(model.id for model, _ in layers)))

    def learn(self, candidate: Candidate, result: Result) -> None:
        score = None if result.score is None else result.score - PENALTY * result.violation
        if score is not None and (self.lowest is None or score < self.lowest):
            self.lowest = score
        self._told_of[candidate.number] = score
        if len(self._told_of) == self.settings.population:
            told = sorted(self._told_of.items())
            self._improve([(self._episodes.pop(k), self._reward(score)) for k, score in told])
            self._told_of = {}

    def _reward(self, score: float | None) -> float:
        return 100.0 * (score if score is not None else self.lowest or 0.0)

    def _episode(self, draw: random.Random) -> tuple[list[EpisodeStep], list[tuple[Recipe, int]]]:
        """The steps of an episode, and the layers of its model."""
        steps, layers, at = list[EpisodeStep](), list[tuple[Recipe, int]](), 0
        while at < self.depth and len(layers) < self.most:
            allowed = self._allowed(at, len(steps), bool(layers))
            (action,) = draw.choices(allowed, _softmax([self.logits[at][a] for a in allowed]))
            name = self.actions[action]
            steps.append(EpisodeStep(at, action, allowed, -self.settings.fine if name == BACK and at == 0 else 0.0))
            if name in self.models:
                layers.append((self.models[name], at))
            at = max(0, at - 1) if name == BACK else at + 1
        return steps, layers

    def _allowed(self, at: int, steps: int, some: bool) -> tuple[int, ...]:
        """The actions that may follow: a model has a layer at least, and no episode goes back for ever."""
        refused = set[str]()
        if at == self.depth - 1 and not some:
            refused.add(SKIP)
        if steps >= MOST_STEPS * self.depth:
            refused.add(BACK)
        return tuple(a for a, name in enumerate(self.actions) if name not in refused)

    def _improve(self, episodes: Sequence[tuple[Sequence[EpisodeStep], float]]) -> None:
        """One update of policy and values from a generation of episodes with their rewards."""
        pairs = [pair for steps, reward in episodes for pair in returns(steps, reward, self.settings.discount)]
        gaps = [value - self.expected[step.layer] for step, value in pairs]
        middle = math.fsum(gaps) / len(gaps)
        spread = math.sqrt(math.fsum((g - middle) ** 2 for g in gaps) / len(gaps)) or 1.0
        told = [(step, (gap - middle) / spread) for (step, _), gap in zip(pairs, gaps, strict=True)]
        before = [_softmax([self.logits[s.layer][a] for a in s.allowed])[s.allowed.index(s.action)] for s, _ in told]
        for _ in range(self.settings.epochs):
            self._ascend(told, before)
        for layer in {step.layer for step, _ in pairs}:
            own = [value for step, value in pairs if step.layer == layer]
            self.expected[layer] += FOLLOWED * (math.fsum(own) / len(own) - self.expected[layer])

    def _ascend(self, told: Sequence[tuple[EpisodeStep, float]], before: Sequence[float]) -> None:
        """One step of gradient ascent on the clipped objective; a layer's gradient is the mean over its steps."""
        slopes = [[0.0] * len(self.actions) for _ in range(self.depth)]
        counts = [0] * self.depth
        for (step, advantage), old in zip(told, before, strict=True):
            chances = _softmax([self.logits[step.layer][a] for a in step.allowed])
            ratio = chances[step.allowed.index(step.action)] / old
            counts[step.layer] += 1
            if advantage * (ratio - 1) > abs(advantage) * self.settings.clip:
                continue  # the clipped objective is flat here
            for a, chance in zip(step.allowed, chances, strict=True):
                slopes[step.layer][a] += advantage * ratio * ((a == step.action) - chance)
        for row, slope, count in zip(self.logits, slopes, counts, strict=True):
            for a, value in enumerate(slope):
                row[a] += self.settings.rate * value / max(1, count)


def returns(steps: Sequence[EpisodeStep], reward: float, discount: float) -> list[tuple[EpisodeStep, float]]:
    """The steps of an episode, each with its discounted return: its own reward and what came after it.

    Args:
        reward: what the last step gets beside its own.
    """
    out, later = list[tuple[EpisodeStep, float]](), 0.0
    for place, step in enumerate(reversed(steps)):
        later = step.reward + (reward if place == 0 else discount * later)
        out.append((step, later))
    return out[::-1]


def _softmax(logits: Sequence[float]) -> list[float]:
    """e^x / Σ e^x."""
    highest = max(logits)
    powers = [math.exp(x - highest) for x in logits]
    total = math.fsum(powers)
    return [p / total for p in powers]


def _sources(setup: Setup, settings: PolicySettings) -> tuple[dict[str, Recipe], Recipe]:
    """The models that layers are taken from, by name, and that of what lies outside the layers."""
    known: dict[str, Recipe] = {BASE_NAME: setup.base, **{e.name: e for e in setup.experts}}
    names = settings.sources or [e.name for e in setup.experts]
    for name in names:
        if name not in known:
            raise BadInput(f"search.sources: there is no source {name!r}; {nearest(name, known)}")
    models = {name: known[name] for name in names}
    equal = {"weight": 1.0 / len(setup.experts)}
    merges = [{**merge, **equal} for merge in MERGES] if settings.merges is None else settings.merges
    for number, given in enumerate(merges):
        try:
            models[f"merge {number + 1}"] = setup.maker.merger(given)(setup.experts)
        except BadInput as error:
            raise BadInput(str(error).replace("search.merger", f"search.merges[{number}]", 1)) from error
    if taken := {SKIP, BACK} & models.keys():
        raise BadInput(f"experts.{min(taken)}: this names an action of the policy; give the expert another name.")
    ends = settings.ends or names[0]
    if ends not in models:
        raise BadInput(f"search.ends: there is no source {ends!r}; {nearest(ends, models)}")
    return models, models[ends]
