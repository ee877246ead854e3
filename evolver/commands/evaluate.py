"""``evolver evaluate``: scores models on the tasks of a configuration, in the same way as the end of a run does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from evolver.checkpoints.sources import open_base
from evolver.config import Config, computing, load
from evolver.driver.check import answer_again
from evolver.driver.prepare import block_of
from evolver.errors import BadInput
from evolver.evaluation.live import default_device
from evolver.evaluation.scores.comparison import interval
from evolver.evaluation.scores.scoring import Scale
from evolver.evaluation.tasks import Tasks, load_tasks
from evolver.records import Split
from evolver.report.text import markdown_table, score_text
from evolver.workers.compute import is_open, settled
from evolver.workers.opened import Opened, draw_up, open_models
from evolver.workers.worker import build_model, choose_compute

# Under this name, messages speak of the models that the user gave.
NAMED_UNDER = "evolver evaluate"


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


def score_models(file: str, models: Sequence[str], split: Split) -> list[ModelScore]:
    """Score models on the tasks of a configuration.

    Args:
        file: path of the YAML file of a run, whose tasks, items and base are used.
        models: folders, hub ids or URIs of models with the architecture of the base.
        split: the items: ``dev`` or ``report``.

    Raises BadInput where the configuration is wrong or a model cannot be scored.
    """
    config = load(file)
    try:
        opened, tasks = open_models(config), load_tasks(config)
        config = settled(config, opened.base.headers)
        if is_open(config):
            config = computing(config, choose_compute(config).compute)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error
    torch.set_num_threads(config.evaluation.threads)
    scale, found = tasks.scale(split), []
    block = block_of(config, file, split, len(scale.tasks))
    folders = [_checked(model, config, opened, tasks) for model in models]
    for model, folder in zip(models, folders, strict=True):
        live = build_model(config, opened, default_device(), folder)
        items = answer_again(tasks.scorer(live, split), len(scale.tasks), block)
        live.close()
        low, high = interval(items, scale, config.seed)
        found.append(ModelScore(model, split, scale.score(items), low, high, scale.of_tasks(items), scale))
    return found


def _checked(model: str, config: Config, opened: Opened, tasks: Tasks) -> Path:
    """The folder of a model, whose configuration and tokenizer are checked as a run checks its base's.

    Raises BadInput where the tasks cannot be scored with it.
    """
    found = open_base(model, NAMED_UNDER)
    try:
        tasks.check_model(draw_up(config, replace(opened, base=found, labels=())))
    except BadInput as error:  # what is checked is the base of a run everywhere else
        raise BadInput(f"{NAMED_UNDER}: {str(error).removeprefix('model.base: ')}") from error
    return found.path


def score_table(scores: Sequence[ModelScore]) -> str:
    """The scores as a Markdown table: models, their scores with 95 % intervals, and their metrics for each task."""
    scale, rows = scores[0].scale, []
    for s in scores:
        between = f"{score_text(s.low, scale)} – {score_text(s.high, scale)}"
        metrics = [score_text(s.tasks[task], scale) for task in scale.weights]
        rows.append([s.model, score_text(s.score, scale), between, *metrics])
    return markdown_table(["model", scores[0].split, "95 % interval", *scale.weights], rows)
