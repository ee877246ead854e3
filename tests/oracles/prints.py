"""Fingerprints of tensors: small enough to be kept, telling enough to compare by."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

SAMPLES = 12


def prints(tensors: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Shape, digest of the float32 bytes, norm, and the scalars at a few places, by tensor."""
    return {n: _print(n, t) for n, t in tensors.items()}


def places(name: str, size: int) -> torch.Tensor:
    """Where the samples are taken."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return torch.randint(0, size, (SAMPLES,), generator=torch.Generator().manual_seed(seed))


def _print(name: str, tensor: torch.Tensor) -> dict[str, Any]:
    flat = tensor.float().contiguous().reshape(-1)
    return {
        "shape": list(tensor.shape),
        "digest": hashlib.sha256(flat.numpy().tobytes()).hexdigest()[:16],
        "norm": flat.double().norm().item(),
        "samples": flat[places(name, flat.numel())].tolist(),
    }
