"""``evolver doctor``: finds out what this machine offers, what a run would use of it, and what is missing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from evolver.evaluation.live import default_device
from evolver.kernels import native
from evolver.loggers.base import installed
from evolver.storage.paths import expand
from evolver.threads import usable_cores, waiting
from evolver.workers.compute import choose_for_any
from evolver.workers.opened import GIB

Finding = tuple[str, str, str]  # what was looked for, what was found, and what to do about it or ""

SHOWN_PACKAGES = ("torch", "transformers", "lm-eval", "optuna", "ray", "pyarrow", "safetensors")
EXTRAS = {
    "gguf": ("gguf", "reading GGUF files"),
    "peft": ("experts", "training LoRA experts, reading other kinds of adapters"),
    "s3fs": ("s3", "runs and models on s3://"),
    "gcsfs": ("gs", "runs and models on gs://"),
    "tensorboard": ("tensorboard", "following runs in TensorBoard"),
    "mlflow": ("mlflow", "following runs in MLflow"),
    "wandb": ("wandb", "following runs in Weights & Biases"),
}


def findings() -> Iterator[Finding]:
    """All findings, one after the other, as some of them take a moment."""
    yield "python", platform.python_version(), ""
    for package in SHOWN_PACKAGES:
        yield package, importlib.metadata.version(package), ""
    yield "processor", f"{usable_cores()} of {os.cpu_count()} cores may be used, {platform.machine()}", ""
    yield "waiting threads", " ".join(f"{name}={value}" for name, value in waiting().items()), ""
    memory = psutil.virtual_memory()
    few = memory.available < 2 * GIB
    yield (
        "memory", f"{memory.available / GIB:.1f} of {memory.total / GIB:.1f} GiB free",
        "a model with 1B parameters takes 2 GiB in bfloat16, and its experts need memory, too" if few else "",
    )  # fmt: skip
    yield from _accelerator()
    choice = choose_for_any("bfloat16", default_device())
    yield "model.compute: auto", f"{choice.compute} for weights in bfloat16: {choice.why}", ""
    yield from _compiled()
    yield from _cache()
    for module, (extra, purpose) in EXTRAS.items():
        found = installed(module)
        yield (
            extra,
            "installed" if found else "not installed",
            "" if found else f"for {purpose}: pip install 'evolver[{extra}]'",
        )
    address = os.environ.get("RAY_ADDRESS")
    yield "cluster", address or "RAY_ADDRESS is not set; a run with pool.kind: ray starts Ray on this machine", ""
    token = os.environ.get("RAY_AUTH_MODE") == "token"
    yield "Ray's tokens", "on" if token else "off", "" if token else "export RAY_AUTH_MODE=token before `ray start`"


def _compiled() -> Iterator[Finding]:
    """Findings about the C compiler and the loops that merging has compiled with it."""
    compiler, there = native.compiler(), native.library_file().exists()
    lacking = "" if compiler or there else "without a compiler, merging is several times slower; install gcc or clang"
    yield "compiler", compiler or "none", lacking
    if there:
        yield "compiled loops", f"{native.library_file()}", ""
    elif compiler:
        yield (
            "compiled loops",
            "none yet",
            "the first merge compiles them in some seconds; evolver doctor --prepare does so now",
        )


def compile_ahead() -> str:
    """Compile the loops that merging on the CPU uses, unless they are compiled, and return a sentence about it.

    They are compiled once for each machine and version of Evolver.

    Raises BadInput where they cannot be compiled.
    """
    seconds, file = native.compile_loops(), native.library_file()
    if seconds:
        return f"compiled the loops for merging on the CPU in {seconds:.1f} s: {file}"
    return f"the loops for merging on the CPU are compiled already: {file}"


def _accelerator() -> Iterator[Finding]:
    device = default_device()
    if device == "cpu":
        yield "accelerator", "torch finds no GPU, so candidates are scored on the CPU", ""
        return
    name = torch.cuda.get_device_name() if device.startswith("cuda") else device
    yield "accelerator", f"{torch.cuda.device_count() if torch.cuda.is_available() else 1} × {name}", ""


def _cache() -> Iterator[Finding]:
    folder = Path(expand("$EVOLVER_CACHE"))
    there = next(p for p in (folder, *folder.parents) if p.exists())
    free = shutil.disk_usage(there).free
    problem = "" if os.access(there, os.W_OK) else "this folder cannot be written; set EVOLVER_CACHE to another folder"
    yield "cache", f"{folder}, {free / GIB:.0f} GiB free", problem
