"""``evolver evaluate``: scores models on the tasks of a configuration, in the same way as the end of a run does."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from evolver.config import Config
from evolver.config.changes import computing
from evolver.config.reading import load
from evolver.driver.check import answer_again
from evolver.driver.prepare import block_of
from evolver.errors import BadInput
from evolver.evaluation.live import LiveModel, default_device
from evolver.evaluation.scores.comparison import interval
from evolver.evaluation.scores.scoring import Scale
from evolver.evaluation.tasks import Tasks, load_tasks
from evolver.records import Split
from evolver.report.text import markdown_table, score_text
from evolver.workers.compute import is_open, settled
from evolver.workers.opened import (
    Opened,
    chat_folder,
    check_backend_device,
    check_device,
    companions_of,
    draw_up,
    open_alone,
    open_models,
)
from evolver.workers.worker import build_model, choose_compute

if TYPE_CHECKING:
    from evolver.evaluation.language.launched import LaunchedModel

COMMAND = "evolver evaluate"


@dataclass(frozen=True)
class ModelScore:
    """The score of a model on the items of a split.

    Attributes:
        model: the model as the user named it.
        split: ``dev`` or ``report``.
        score: weighted mean of the tasks' metrics; higher is better.
        low, high: ends of the 95 % interval of the score.
        tasks: the metric of each task.
        scale: how items make up the score.
    """

    model: str
    split: Split
    score: float
    low: float
    high: float
    tasks: Mapping[str, float]
    scale: Scale


def score_models(
    file: str, models: Sequence[str], split: Split, warn: Callable[[str], None] = print
) -> list[ModelScore]:  # fmt: skip
    """Score models on the tasks of a configuration.

    Args:
        file: path of the YAML file of a run, whose tasks, items and base are used.
        models: folders, hub ids or URIs of models with the architecture of the base.
        split: the items: ``dev`` or ``report``.
        warn: is called with each warning; default: it is printed.

    Raises BadInput where the configuration is wrong or a model cannot be scored, before any weight is read.
    """
    ready = make_ready(file, models, COMMAND, warn)
    config, scale, found = ready.config, ready.tasks.scale(split), []
    block = block_of(config, file, split, len(scale.tasks))
    for model in models:
        live = ready.live(model, split)
        items = answer_again(ready.tasks.scorer(live, split), range(len(scale.tasks)), block)
        live.close()
        low, high = interval(items, scale, config.seed)
        found.append(ModelScore(model, split, scale.score(items), low, high, scale.of_tasks(items), scale))
    return found


@dataclass(frozen=True)
class ReadyModels:
    """Models that are going to be scored on the tasks of a configuration, all of them checked.

    Attributes:
        opened: every model in the place of the base, by its name.
    """

    config: Config
    tasks: Tasks
    opened: Mapping[str, Opened]
    device: str

    def live(self, model: str, split: Split) -> LiveModel | LaunchedModel:
        """A model with its weights, ready to score the items of a split."""
        given = self.opened[model]
        return build_model(self.config, given, self.device, given.base.path, split)


def make_ready(file: str, models: Sequence[str], command: str, warn: Callable[[str], None]) -> ReadyModels:
    """Open models in the place of a configuration's base, and check that its tasks can be scored with them.

    Args:
        command: that errors name.

    Raises BadInput, before any weight is read.
    """
    config, device = load(file), default_device()
    try:
        check_backend_device(config.evaluation)
        opened = open_models(config)
        config = settled(config, opened.base.headers)
        given = {model: _opened(config, opened, model, device, command) for model in models}
        tasks = load_tasks(config)
        for model, one in given.items():
            with _said_of(model, command):
                tasks.check_model(draw_up(config, one))
        if is_open(config):
            config = computing(config, choose_compute(config).compute)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error
    for warning in dict.fromkeys([*opened.warnings, *tasks.warnings]):
        warn(warning)
    torch.set_num_threads(config.evaluation.threads)
    return ReadyModels(config, tasks, given, device)


def _opened(config: Config, opened: Opened, model: str, device: str, command: str) -> Opened:
    """A model in the place of the base, which the device can hold. It has a head of its own, with its own labels."""
    with _said_of(model, command):
        base = open_alone(config, model, command)
        folders = {"base": opened.base.path, **{n: chat_folder(s, opened.base) for n, s in opened.experts.items()}}
        companions = companions_of(config, folders, base.path, own_template=True)
        found = replace(opened, base=base, labels=(), companions=companions)
        check_device(config, found, device)
        return found


@contextmanager
def _said_of(model: str, command: str) -> Iterator[None]:
    """Errors about the base are said of a model that stands in its place.

    Raises BadInput that names the model.
    """
    try:
        yield
    except BadInput as error:
        said = str(error).removeprefix("model.base: ").removeprefix(f"{command}: ")
        raise BadInput(f"{command} {model}: {said}") from error


def score_table(scores: Sequence[ModelScore]) -> str:
    """The scores as a Markdown table: models, their scores with 95 % intervals, and their metrics for each task."""
    scale, rows = scores[0].scale, []
    for s in scores:
        between = f"{score_text(s.low, scale)} – {score_text(s.high, scale)}"
        metrics = [score_text(s.tasks[task], scale) for task in scale.weights]
        rows.append([s.model, score_text(s.score, scale), between, *metrics])
    return markdown_table(["model", scores[0].split, "95 % interval", *scale.weights], rows)
