"""A worker builds the model of a recipe and scores it. It is the only place that turns an exception into a result."""

from __future__ import annotations

import contextlib
import gc
import json
import math
import tempfile
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from evolver.evaluation.language.launched import LaunchedModel

from evolver.checkpoints.adapted import Adapted
from evolver.checkpoints.shards import SHARD_BYTES, write_shards
from evolver.checkpoints.sources import open_base
from evolver.checkpoints.weights import Checkpoint
from evolver.config import Config
from evolver.config.changes import computing
from evolver.errors import BadInput
from evolver.evaluation.base import Scored
from evolver.evaluation.live import LiveModel, default_device
from evolver.evaluation.scores.course import Evaluation, blocks
from evolver.evaluation.tasks import SplitScorer, Tasks, load_tasks
from evolver.kernels.compiled import Kernels
from evolver.merging.companions import Companions
from evolver.merging.export import export
from evolver.merging.materialise import Materialiser
from evolver.records import Candidate, Result, Split
from evolver.records.depth import layer_origins
from evolver.records.order import item_order
from evolver.records.recipe import Expert
from evolver.storage.references import parts_of
from evolver.workers.compute import ComputeChoice, choose, is_open, refuse_compute
from evolver.workers.failures import BrokenDevice, is_broken_device, is_out_of_memory, is_transient, told_reason
from evolver.workers.gradients import Gradients
from evolver.workers.measures import Measures
from evolver.workers.opened import GIB, Opened, OwnModel, check_backend_device, open_models
from evolver.workers.plan import Plan, items_hash
from evolver.workers.statistics import Statistics

# Models with fewer scalars are merged without compiling kernels first: compiling one takes some ten seconds.
COMPILE_FROM = 3 * 10**7
# How long a worker waits after its first failure for lack of a file or a server, and at most.
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 30.0


def choose_compute(config: Config, device: str | None = None) -> ComputeChoice:
    """Measure in which dtype forward passes are faster on this machine, for a configuration that leaves it open.

    Args:
        device: where to measure; default: the accelerator if there is one, else the CPU.

    Raises BadInput where there is no usable base.
    """
    return choose(config, open_base(parts_of(config.model.base)[0]).headers, device or default_device())


def build_materialiser(
    plan: Plan, opened: Opened, device: str = "cpu", statistics: Statistics | None = None
) -> Materialiser:  # fmt: skip
    """The materialiser that builds the models of a plan. It keeps models in memory up to ``pool.cache_gb``."""
    config = plan.config
    dtype = None if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    sources = {plan.digests[n]: s for n, s in {"base": opened.base, **opened.experts}.items()}
    kernels = Kernels(build=opened.base.scalars >= COMPILE_FROM)
    return Materialiser(opened.base, sources, dtype, int(config.pool.cache_gb * GIB), device, kernels, statistics)


def own_materialiser(config: Config, own: OwnModel, recipe: Expert, device: str = "cpu") -> Materialiser:
    """The materialiser that builds a model as it is."""
    dtype = None if config.model.dtype == "auto" else getattr(torch, config.model.dtype)
    return Materialiser(own.base, {recipe.digest: own.source}, dtype, device=device)


def statistics_of(plan: Plan, opened: Opened, tasks: Tasks) -> Statistics:
    """The statistics of a plan's experts where there is no worker: a live model is made if one has to be collected."""
    model = cache(lambda: build_model(plan.config, opened, default_device()))
    return Statistics(plan, tasks, model, lambda live: tasks.scorer(live, "dev"))


def build_model(
    config: Config, opened: Opened, device: str, folder: Path | None = None, split: Split = "dev"
) -> LiveModel | LaunchedModel:  # fmt: skip
    """The model that candidates are evaluated with: one resident model whose weights are overwritten, or, where
    ``evaluation.backend`` says so, a model class of lm-eval that is started on each candidate.

    Args:
        folder: folder of a model that is to be scored as it is, but for what ``opened.companions`` changes in this very
            folder; default: the base, whose weights are overwritten.
        split: the items that models are scored on, which decides whether their weights are rounded before.

    Raises BadInput for a backend that is not installed, and for a base that is not of the kind ``model.kind``.
    """
    companions = opened.companions if folder in (None, opened.companions.folder) else Companions(folder)
    if config.evaluation.backend == "resident":
        quantise = config.evaluation.rounding(split)
        labels = opened.labels if folder is None else ()
        path = folder or opened.base.path
        fresh = Checkpoint(path, "model.base")
        own = opened.base if path == opened.base.path else fresh
        written = folder is not None and (bool(quantise) or isinstance(own, Adapted))
        shapes = {n: i.shape for n, i in own.headers.items()} if folder is None or written else {}
        with companions.shown() as beside, _plain(fresh) as plain:
            live = LiveModel(
                config.model, path, shapes, device, opened.heads, labels, beside, {} if plain else fresh.wrappers,
                quantise, fresh.quantisation, plain,
            )  # fmt: skip
        if written:
            live.write((name, own.tensor(name)) for name in own.headers)
        return live
    from evolver.evaluation.language.launched import LaunchedModel  # imports lm-eval, which takes seconds

    model = LaunchedModel(config.evaluation, room=4 * opened.base.scalars)  # 4 bytes a scalar: the widest dtype
    alone: Checkpoint | None = opened.base if folder == opened.base.path else None
    # Its folder holds other weights, or codes that Transformers does not read.
    if isinstance(alone, Adapted) or (type(alone) is Checkpoint and alone.uneven):
        recipe = Expert("model", alone.digest())
        export(recipe, Materialiser(alone, {recipe.digest: alone}), model.folder, {}, companions=companions)
        model.launch(model.folder)
    elif folder is not None:
        model.launch(companions.dress(folder, model.folder) if companions.changed else folder)
    return model


@contextlib.contextmanager
def _plain(model: Checkpoint) -> Iterator[Path | None]:
    """A folder of the same weights as plain numbers as long as the context lasts, where Transformers cannot read them.

    Raises BadInput where there is no room for it.
    """
    if not model.uneven:
        yield None
        return
    with tempfile.TemporaryDirectory(prefix="evolver-plain-") as place:
        try:
            write_shards(((n, model.tensor(n)) for n in model.names()), model.headers, Path(place), SHARD_BYTES)
            (Path(place) / "config.json").write_text(json.dumps(model.config))
        except OSError as error:
            raise BadInput(
                f"{model.key}: the weights of {model.path} cannot be written as plain numbers, as which Transformers "
                f"loads them ({error.strerror or error}); free {model.size / GIB:.1f} GiB in {place}, or set TMPDIR to "
                "a larger folder."
            ) from error
        yield Path(place)


class Worker:
    """A worker on one device. It holds the opened experts, the models in its cache, and one live model.

    Args:
        plan: describes the run.
        split: the items that this worker scores. It never prepares those of the other split.
        name: the worker's name in the ledger.
        tasks: the tasks, if this process has loaded them already.
        device: device of the live model; default: the accelerator if there is one, else the CPU.

    Raises BadInput where this machine has other weights or items than the driver, where the device cannot compute in
    the dtype of the run, and for what ``open_models``, ``load_tasks`` and ``build_model`` refuse.
    """

    def __init__(
        self,
        plan: Plan,
        split: Split,
        name: str = "local",
        tasks: Tasks | None = None,
        device: str | None = None,
    ) -> None:
        config = plan.config
        self.name = name
        torch.set_num_threads(config.evaluation.threads)
        device = device or default_device()
        if is_open(config):
            config = computing(config, choose_compute(config, device).compute)
        elif config.model.compute != "auto":
            refuse_compute(config.model.compute, device)
        check_backend_device(config.evaluation)
        opened = open_models(config)
        if opened.digests() != plan.digests:
            raise BadInput(
                f"experts: the worker {name} finds different weights than the driver under the same paths; put the "
                "models into a shared folder."
            )
        tasks = tasks or load_tasks(config)
        if items_hash(tasks, split) != plan.items[split]:
            raise BadInput(
                f"evaluation.tasks: the worker {name} finds different items than the driver; put the data into a "
                "shared folder."
            )
        self.materialiser = build_materialiser(plan, opened, device)
        self._companions, self._config, self._device, self._tasks = opened.companions, config, device, tasks
        self._own = {plan.own_digest(name): own for name, own in opened.own.items()}
        self._heads = opened.heads
        self.live = build_model(config, opened, device, split=split)
        self.scale = tasks.scale(split)
        self.block = plan.block(split, len(self.scale.tasks))
        self.scorer = tasks.scorer(self.live, split)
        scorer = self.scorer if split == "dev" else None
        statistics = Statistics(plan, tasks, lambda: self.live, lambda live: scorer or tasks.scorer(live, "dev"))
        self._statistics = statistics
        self.materialiser = build_materialiser(plan, opened, device, statistics)
        self.measures = Measures(plan, self.materialiser) if split == "dev" and config.constraints else None
        self.alpha = config.evaluation.racing
        self.gradients = None
        if isinstance(self.live, LiveModel) and split == "dev":
            self.gradients = Gradients(config, tasks, self.materialiser, self.live, self.scorer)
        self._failed_in_a_row = 0

    def evaluate(self, candidate: Candidate) -> Result:
        """Score a candidate. An exception becomes a failed result that says the reason.

        After a failure that is not the candidate's own, the worker waits before it answers, longer each time, because
        a server or a file system may need a moment.

        Raises BrokenDevice where the accelerator has failed.
        """
        began = time.perf_counter()
        try:
            result = self._with_memory(candidate)
        except Exception as error:
            if is_broken_device(error):
                raise BrokenDevice(f"the accelerator of worker {self.name} has failed: {told_reason(error)}") from error
            seconds = {"materialise": 0.0, "forward": 0.0, "total": time.perf_counter() - began}
            result = Result.failed(
                candidate, told_reason(error), transient=is_transient(error), seconds=seconds, worker=self.name
            )
        self._failed_in_a_row = self._failed_in_a_row + 1 if result.transient else 0
        if result.transient:
            time.sleep(min(FIRST_PAUSE_SECONDS * 2 ** (self._failed_in_a_row - 1), LONGEST_PAUSE_SECONDS))
        return result

    def _with_memory(self, candidate: Candidate) -> Result:
        """Score a candidate; where memory runs out, once more after the models in the cache were let go."""
        try:
            return self._timed(candidate)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        self.materialiser.clear()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._timed(candidate)

    def _timed(self, candidate: Candidate) -> Result:
        if candidate.question.loss is not None and self.gradients is not None:
            return self.gradients.answer(candidate, self.name)
        began, before = time.perf_counter(), self._statistics.tokens
        scorer = self._load(candidate)
        built = time.perf_counter()
        result = self._measured(candidate, self._score(candidate, scorer))
        if spent := self._statistics.tokens - before:
            result = replace(result, counts={**result.counts, "tokens": result.counts["tokens"] + spent})
        ended = time.perf_counter()
        return replace(result, seconds={"materialise": built - began, "forward": ended - built, "total": ended - began})

    def close(self) -> None:
        """End servers that were started, and free node-local memory."""
        self.live.close()

    def _load(self, candidate: Candidate) -> SplitScorer:
        """Make the candidate's model, and return its scorer."""
        recipe, scorer = candidate.recipe, self.scorer
        materialiser, companions, live = self.materialiser, self._companions, self.live
        if isinstance(recipe, Expert) and (own := self._own.get(recipe.digest)) is not None:
            materialiser, companions = own_materialiser(self._config, own, recipe, self._device), own.companions
            if isinstance(live, LiveModel):
                as_it_is = Opened(own.base, {}, companions, self._heads, own.labels)
                live = build_model(self._config, as_it_is, self._device, split=candidate.split)
            scorer = self._tasks.scorer(live, candidate.split)
        measures = self.measures if live is self.live and materialiser is self.materialiser else None
        tensors = materialiser.stream(recipe)
        if isinstance(live, LiveModel):
            if measures:
                measures.prepare(live)
            layers = layer_origins(recipe, materialiser.base.layers) if live is self.live else ()
            live.write(measures.watch(tensors, recipe) if measures else tensors, layers=layers)
        else:
            if measures and measures.weighs:
                deque(measures.watch(tensors, recipe), maxlen=0)
            live.clear()
            export(recipe, materialiser, live.folder, {}, companions=companions)
            live.launch(live.folder)
        return scorer

    def _measured(self, candidate: Candidate, result: Result) -> Result:
        """The result with what the run's constraints say of the model; a piece of a result may become a whole one.

        An expert that is scored as it is, with labels or tokens of its own, is no merge, and nothing is measured.
        """
        recipe = candidate.recipe
        whole = result.complete or candidate.question.piece is not None
        if self.measures is None or not whole or (isinstance(recipe, Expert) and recipe.digest in self._own):
            return result
        live = self.live if isinstance(self.live, LiveModel) else None
        return replace(result, violations=self.measures.violations(live))

    def _score(self, candidate: Candidate, scorer: SplitScorer) -> Result:
        """Score the items block by block, until the last one or until the evaluation may stop early."""
        course, piece = Evaluation(candidate, self.scale, self.block, self.alpha), candidate.question.piece
        items, counts, said = list(candidate.question.known), Scored().counts, list[str]()
        probabilities: list[float] = []
        order = item_order(candidate.question.order, len(self.scale.tasks))
        for start, stop in course.blocks() if piece is None else blocks(*piece, self.block):
            scored = scorer.score_at(set(order[start:stop]))
            items += [scored.answers[place] for place in order[start:stop]]
            probabilities += scored.probabilities_at(order[start:stop])
            if candidate.split == "report" or candidate.question.words:  # nobody reads those of a whole search
                said += scored.words
            counts = {name: counts[name] + value for name, value in scored.counts.items()}
            if piece is None and course.ended(items):
                break
        known = () if all(map(math.isnan, probabilities)) else tuple(probabilities)
        if piece is None:
            return replace(course.result(items, {}, counts, self.name), said=tuple(said), probabilities=known)
        return Result(
            candidate.number, candidate.recipe.id, "ok", items=tuple(items), counts=counts, worker=self.name,
            stage=candidate.stage, given=piece[0], said=tuple(said), probabilities=known,
            order=candidate.question.order,
        )  # fmt: skip
