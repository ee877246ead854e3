"""What compiled code depends on: this machine, and the sources that it was made of."""

from __future__ import annotations

import hashlib
import platform
from functools import cache
from pathlib import Path

import torch

from evolver.storage.paths import expand


def kernel_folder() -> Path:
    """Where compiled code is kept; whoever writes there makes it."""
    return Path(expand("$EVOLVER_CACHE")) / "kernels"


def make_kernel_folder() -> Path:
    """The same, made where it is missing, readable by this user only. Raises OSError."""
    folder = kernel_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    return folder


@cache
def processor_of(device: torch.device) -> str:
    """What code was compiled for."""
    flags = ""
    if Path("/proc/cpuinfo").exists():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return f"{torch.__version__} {platform.machine()} {flags} {gpu}"


@cache
def digest_of(file: str) -> str:
    """Digest of a source file."""
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()
