"""One training, which can be killed at any step: steps in a fixed order, a checkpoint now and then."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from evolver.training.losses import Learner, Loss
from evolver.training.settings import Training

STATE, STEP = "state.safetensors", "step.json"
FAST_BF16 = {"avx512_bf16", "amx_bf16"}
Watch = Callable[[int, float], None]


def fit(
    learner: Learner, loss: Loss, lessons: Sequence[Any], settings: Training, seed: int, scratch: Path, watch: Watch
) -> None:
    """Train the parameters that ask for it, from the last checkpoint in ``scratch`` on.

    What a step does depends on the seed, its number and the weights alone, so that an interrupted training ends with
    the weights of one that was not.

    Args:
        watch: told the number of every finished step, and its loss.
    """
    weights = {n: p for n, p in learner.module.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(weights.values(), lr=settings.peak_rate, weight_decay=0.0)
    done = _resume(weights, optimizer, scratch)
    order = list(_order(len(lessons), settings, seed))
    learner.module.train()
    for step in range(done, settings.steps):
        torch.manual_seed(seed * 1_000_003 + step)  # of dropout
        for group in optimizer.param_groups:
            group["lr"] = settings.peak_rate * _rate(step, settings)
        with _autocast(learner.device):
            value = loss(learner, [lessons[i] for i in order[step]])
        torch.autograd.backward(value)
        torch.nn.utils.clip_grad_norm_(list(weights.values()), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        watch(step + 1, value.item())
        if (step + 1) % settings.save_every == 0 and step + 1 < settings.steps:
            _save(weights, optimizer, step + 1, scratch)
    learner.module.eval()


def _order(count: int, settings: Training, seed: int) -> Iterator[list[int]]:
    """The items of every step: pass after pass, each in an order of its own."""
    shuffler, queue = random.Random(seed), list[int]()
    for _ in range(settings.steps):
        while len(queue) < settings.batch:
            queue += shuffler.sample(range(count), count)
        yield queue[: settings.batch]
        del queue[: settings.batch]


def _rate(step: int, settings: Training) -> float:
    """Share of the peak learning rate."""
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    return 0.5 * (1 + math.cos(math.pi * (step - settings.warmup) / max(1, settings.steps - settings.warmup)))


def _autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    if device.type == "cpu" and not fast_bf16():
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)


def fast_bf16() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 in hardware."""
    try:
        return bool(FAST_BF16 & set(Path("/proc/cpuinfo").read_text().split()))
    except OSError:
        return False


def _resume(weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, scratch: Path) -> int:
    """Steps that are done: weights and moments are put back as they were."""
    if not (scratch / STEP).exists():
        return 0
    held, done = load_file(scratch / STATE), json.loads((scratch / STEP).read_text())
    if held["step"].item() != done["step"]:
        return 0  # the crash came between the two files: better anew than mixed
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(held[f"weight.{name}"])
            optimizer.state[weight] = {
                "step": torch.tensor(float(done["step"])),
                "exp_avg": held[f"first.{name}"].to(weight.device),
                "exp_avg_sq": held[f"second.{name}"].to(weight.device),
            }
    return int(done["step"])


def _save(weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int, scratch: Path) -> None:
    held = {"step": torch.tensor(step)}
    for name, weight in weights.items():
        state = optimizer.state[weight] or dict.fromkeys(("exp_avg", "exp_avg_sq"), torch.zeros_like(weight))
        held[f"weight.{name}"] = weight.detach().cpu().contiguous()
        held[f"first.{name}"], held[f"second.{name}"] = (state[k].cpu().contiguous() for k in ("exp_avg", "exp_avg_sq"))
    scratch.mkdir(parents=True, exist_ok=True)
    save_file(held, scratch / f".{STATE}")
    (scratch / f".{STEP}").write_text(json.dumps({"step": step}))
    for name in (STATE, STEP):
        os.replace(scratch / f".{name}", scratch / name)
