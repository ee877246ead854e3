"""One training, which can be killed at any step: steps in a fixed order, a checkpoint now and then."""

from __future__ import annotations

import contextlib
import math
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from evolver.checkpoints.shards import disk_errors
from evolver.training.losses import Learner, Loss
from evolver.training.settings import Training

CHECKPOINT = "checkpoint.safetensors"
FAST_BF16 = {"avx512_bf16", "amx_bf16"}
StepWatch = Callable[[int, float], None]


def fit(
    learner: Learner, loss: Loss, lessons: Sequence[Any], settings: Training, seed: int, scratch: Path, watch: StepWatch
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
    if not (scratch / CHECKPOINT).exists():
        return 0
    with safe_open(str(scratch / CHECKPOINT), framework="pt") as held, torch.no_grad():
        for key in held.keys():  # noqa: SIM118  # it is no mapping
            kind, name = key.split(".", 1)
            if kind == "weight":
                weights[name].copy_(held.get_tensor(key))
            else:  # AdamW keeps its count of steps on the CPU
                device = "cpu" if kind == "step" else weights[name].device
                optimizer.state[weights[name]][kind] = held.get_tensor(key).to(device)
        return int(held.metadata()["step"])


def _save(weights: dict[str, Tensor], optimizer: torch.optim.Optimizer, step: int, scratch: Path) -> None:
    """One file, so that weights, moments and the number of the step are never of two different steps."""
    held = {f"weight.{n}": w.detach().cpu().contiguous() for n, w in weights.items()}
    for name, weight in weights.items():
        held |= {f"{kind}.{name}": t.cpu().contiguous() for kind, t in optimizer.state.get(weight, {}).items()}
    scratch.mkdir(parents=True, exist_ok=True)
    temporary = scratch / f".{CHECKPOINT}-{os.getpid()}"
    with disk_errors():
        save_file(held, temporary, {"step": str(step)})
    os.replace(temporary, scratch / CHECKPOINT)
