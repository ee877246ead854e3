"""The limit of an evaluation: the model called on its very batches, the outputs thrown away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from evolver.evaluation.language.decoder import DecoderOnly
from evolver.evaluation.language.resident import LanguageScorer
from evolver.workers.worker import Worker


def bare_forward(worker: Worker) -> Callable[[], None]:
    """The forward passes of the log-likelihoods that the worker has scored so far, with their inputs at hand."""
    inputs: list[dict[str, Any]] = []
    for scorer, _ in worker.scorer.parts:
        assert isinstance(scorer, LanguageScorer)
        likely = scorer._likely
        assert isinstance(likely._forward, DecoderOnly)
        for _, batches, _ in likely._ready.values():
            inputs += [likely._forward.inputs(batch) for _, batch in batches._batches if batch is not None]

    @torch.inference_mode()
    def run() -> None:
        for given in inputs:
            worker.live.module(**given)

    return run
