"""Gradients of losses by the coefficients of a merge, for searches that descend.

A merge θ = θ₀ + Σ c_k·τ_k is linear in its coefficients, so that ∂L/∂c_k = ⟨∂L/∂θ, τ_k⟩: one backward pass of the
merged model, and then inner products with the task vectors, tensor by tensor. Nothing but the gradient itself, of the
size of the model, is needed beside what a worker holds anyhow.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from evolver.config import Config
from evolver.errors import BadInput
from evolver.evaluation.adversary import Attack
from evolver.evaluation.base import Scored
from evolver.evaluation.live import LiveModel
from evolver.evaluation.losses import (
    BatchLoss,
    Descending,
    ExpertPass,
    ModelOutputs,
    UnknownBatch,
    differentiable,
    distillation,
    entropy,
    passing,
)
from evolver.evaluation.tasks import SplitScorer, Tasks
from evolver.merging.engine.pieces import by_rows
from evolver.merging.materialise import Materialiser
from evolver.records import Candidate, Result
from evolver.records.loss import Adversary, UnlabelledLoss
from evolver.records.order import item_order
from evolver.records.recipe import Expert, Merge, layer_of, part_rows
from evolver.workers.statistics import tasks_of

# What experts say of the items of a step is kept in memory for the next step, but not more than this.
MOST_BYTES = 2 << 30
# Items that are scored together: those of one task (its name), or those on which one expert is the example.
ScoredPart = tuple[str, Expert | None, frozenset[int]]


class Gradients:
    """Answers the candidates of one worker that ask for a gradient.

    Args:
        config: of the run.
        tasks: of the run.
        materialiser: builds the models.
        live: the worker's live model.
        scorer: scores it on the dev items.
    """

    def __init__(
        self, config: Config, tasks: Tasks, materialiser: Materialiser, live: LiveModel, scorer: SplitScorer
    ) -> None:  # fmt: skip
        self._config, self._build, self._live, self._scorer = config, materialiser, live, scorer
        self._tasks = tasks
        self._owners = [tasks.owner("dev", item) for item in tasks.items.dev]
        # What experts say by the name of the batch; by the expert's digest, the name of the order, and the loss.
        self._said: dict[tuple[str, str, UnlabelledLoss], dict[str, ModelOutputs]] = {}
        self._changed: dict[tuple[str, ...], list[str]] = {}

    def answer(self, candidate: Candidate, name: str) -> Result:
        """The loss on the candidate's first items, and its derivatives by the coefficients of the candidate's merge.

        Args:
            name: of the worker.

        Raises ValueError for a recipe that is not linear in its coefficients, FloatingPointError where outputs or
        gradients are not finite, and BadInput where what the experts say does not fit into ``MOST_BYTES``.
        """
        recipe, loss, began = candidate.recipe, candidate.question.loss, time.perf_counter()
        if not isinstance(recipe, Merge) or recipe.method != "task_arithmetic" or loss is None:
            raise ValueError("a gradient can be taken of merges by task arithmetic only")
        order, limit = candidate.question.order, candidate.question.limit
        places = item_order(order, len(self._owners))[:limit]
        while True:
            try:
                passed, scored = self._pass(recipe, loss, order, places)
                break
            except UnknownBatch:
                self._said.clear()
        forward = time.perf_counter()
        gradient = self._derivatives(recipe, passed.gradients)
        ended = time.perf_counter()
        seconds = {"materialise": ended - forward, "forward": forward - began, "total": ended - began}
        return Result(
            candidate.number, recipe.id, "ok", items=tuple(scored.answers[place] for place in places),
            seconds=seconds, counts=scored.counts, worker=name, stage=candidate.stage, order=order, loss=passed.loss,
            gradient=tuple(gradient),
        )  # fmt: skip

    def _pass(
        self, recipe: Merge, loss: UnlabelledLoss, order: str, places: Sequence[int]
    ) -> tuple[Descending, Scored]:  # fmt: skip
        """The gradient by the weights that task vectors change, after all batches, and what the judges say."""
        parts = list(self._parts(recipe, loss, places))
        if loss.name == "distillation":
            self._ask(parts, order, loss)
        self._live.write(self._build.stream(recipe), whole=True)
        changed = self._names(recipe)
        owners = self._live.parameters()
        wanted = list(dict.fromkeys(owners[name][0] for name in changed))
        out = Scored()
        with differentiable(self._live, wanted) as parameters:
            through = Descending(parameters, loss.name == "distillation" and loss.hidden > 0)
            for task, expert, own in parts:
                measure = self._loss(loss, task, expert, order, own)
                through.follow(measure, 1 / len(parts))
                with passing(self._live, through):
                    out.add(self._scorer.score_at(own))
                if loss.adversary is not None:
                    by = self._disturbance(loss.adversary, task, own)
                    through.follow(measure, loss.adversary.weight / len(parts), by)
                    with passing(self._live, through):
                        self._scorer.score_at(own)
        if rest := set(places) - set(out.answers):  # nobody teaches them
            out.add(self._scorer.score_at(rest))
        return through, out

    def _parts(self, recipe: Merge, loss: UnlabelledLoss, places: Sequence[int]) -> Iterator[ScoredPart]:
        if loss.name == "entropy":
            for task in dict.fromkeys(self._owners[place].task for place in sorted(places)):
                yield task, None, frozenset(p for p in places if self._owners[p].task == task)
            return
        for expert in recipe.inputs:
            if isinstance(expert, Expert):
                tasks = tasks_of(self._config, self._tasks, expert.name)
                if own := frozenset(p for p in places if self._owners[p].task in tasks):
                    yield "", expert, own

    def _ask(self, parts: Sequence[ScoredPart], order: str, loss: UnlabelledLoss) -> None:
        """Let every expert answer its own items, unless it was asked about them before."""
        self._said = {key: said for key, said in self._said.items() if key[1:] == (order, loss)}
        for _, expert, own in parts:
            assert expert is not None
            if (expert.digest, order, loss) in self._said:
                continue
            self._live.write(self._build.stream(expert), whole=True)
            asking = ExpertPass(loss.hidden > 0)
            with passing(self._live, asking):
                self._scorer.score_at(own)
            self._said[expert.digest, order, loss] = asking.said
        held = sum(one.size for said in self._said.values() for one in said.values())
        if held > MOST_BYTES:
            raise BadInput(
                f"search.items: what the experts say of the items of a step takes {held / 2**30:.1f} GiB, and at most "
                f"{MOST_BYTES / 2**30:.0f} GiB of it are kept; write fewer items."
            )

    def _loss(
        self, loss: UnlabelledLoss, task: str, expert: Expert | None, order: str, own: frozenset[int]
    ) -> BatchLoss:  # fmt: skip
        """The loss of a part's batches."""
        if expert is None:
            return entropy(len(own), self._chooses_each(task))
        return distillation(self._said[expert.digest, order, loss], loss.temperature, loss.hidden)

    def _chooses_each(self, task: str) -> bool:
        """Whether each label of a task is chosen by itself."""
        return next(entry for entry in self._owners if entry.task == task).threshold is not None

    def _disturbance(self, adversary: Adversary, task: str, own: frozenset[int]) -> Tensor | None:
        """What the adversary adds to the inputs of a task's items, found against the model that is live."""
        attack = Attack(len(own), self._chooses_each(task), adversary.rate)
        for _ in range(adversary.steps):
            with passing(self._live, attack):
                self._scorer.score_at(own)
            attack.step()
        return attack.by

    def _names(self, recipe: Merge) -> list[str]:
        """The tensors that at least one task vector changes. Those of frozen layers need no gradient."""
        digests = tuple(e.digest for e in recipe.inputs if isinstance(e, Expert))
        if digests not in self._changed:
            self._changed[digests] = [
                name
                for name in self._build.base.names()
                if any(delta.any() for delta in self._deltas(recipe, name))
            ]  # fmt: skip
        return self._changed[digests]

    def _deltas(self, recipe: Merge, name: str) -> Iterator[Tensor]:
        """The task vectors of a tensor, as a merge sees them, float32; none of one that is no floating numbers."""
        assert isinstance(recipe.base, Expert)
        base = self._tensor(recipe.base, name)
        if base.is_floating_point():
            for expert in recipe.inputs:
                assert isinstance(expert, Expert)
                yield self._tensor(expert, name).float() - base.float()

    def _tensor(self, model: Expert, name: str) -> Tensor:
        return self._build.sources[model.digest].tensor(name).to(self._live.device, self._build.info(model, name).dtype)

    def _derivatives(self, recipe: Merge, gradients: Sequence[Tensor | None]) -> list[float]:
        """⟨∂L/∂θ, τ⟩ for every rule and expert, rule by rule, in float64."""
        owners, changed = self._live.parameters(), self._names(recipe)
        by_owner = dict(zip(dict.fromkeys(owners[name][0] for name in changed), gradients, strict=True))
        out = [0.0] * (len(recipe.rules) * len(recipe.inputs))
        for name in changed:
            owner, part = owners[name]
            whole = by_owner[owner]
            ruling = _ruling(recipe, name)
            if whole is None or not ruling:
                continue
            gradient = by_rows((whole if part is None else part.within(whole)).float())
            for number, delta in enumerate(self._deltas(recipe, name)):
                product = gradient * by_rows(delta)
                for rule, own in ruling:
                    found = product[part_rows(own, len(product))].sum(dtype=torch.float64)
                    out[rule * len(recipe.inputs) + number] += float(found)
        if not all(map(_finite, out)):
            raise FloatingPointError("the gradients are not finite")
        return out


def _ruling(recipe: Merge, name: str) -> list[tuple[int, tuple[int, int] | None]]:
    """The rule whose coefficients hold for each part of a tensor, which is the last one for it, and the part."""
    layer = layer_of(name)
    found = [(recipe.ruling(name, layer, part), part) for part in recipe.parts(name, layer)]
    return [(numbers[-1], part) for numbers, part in found if numbers]


def _finite(number: float) -> bool:
    return number - number == 0
