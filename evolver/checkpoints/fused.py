"""Layers whose tensors one file holds apart and another one in one: the experts of a mixture, queries, keys and values.

Transformers reads both, as its class has one parameter for them. An expert is seen in the layout of its base.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch

from evolver.checkpoints.weights import Checkpoint, Derived, TensorInfo
from evolver.errors import BadInput
from evolver.evaluation.fused import ParameterSlice, slices_of


def as_in_base(expert: Checkpoint, base: Checkpoint, module: Any, of_base: Mapping[str, str], of_expert: Mapping[str, str]) -> None:  # fmt: skip  # noqa: E501
    """See an expert's tensors as its base has them, as far as one of the two holds parameters of the class as a whole.

    Args:
        module: a model of their class, without weights.
        of_base: the base's names by those of the class.
        of_expert: the expert's names by those of the class.
    """
    made = dict[str, Derived]()
    for name, part in _parts(module, base).items():
        if name not in expert.headers and part.parameter in of_expert:
            made |= _cut(expert, name, of_expert[part.parameter], part)
    own, pieces = _parts(module, expert), defaultdict[str, dict[str, ParameterSlice]](dict)
    for name, part in own.items():
        if name not in base.headers and part.parameter in of_base:
            pieces[of_base[part.parameter]][name] = part
    made |= {name: _joined(expert, base.headers[name], found) for name, found in pieces.items()}
    if made:
        expert.derive(made)


def _parts(module: Any, model: Checkpoint) -> dict[str, ParameterSlice]:
    """The slices that a model's tensors are of parameters of the class; empty where they are not only slices."""
    try:
        return slices_of(module, {n: i.shape for n, i in model.headers.items()}, model.path)
    except BadInput:  # then names tell what is wrong
        return {}


def _cut(expert: Checkpoint, name: str, whole: str, part: ParameterSlice) -> dict[str, Derived]:
    """A part of a tensor, by its name; none where the tensor is too small to have it."""
    info = expert.headers[whole]
    try:
        shape = tuple(part.within(torch.empty(info.shape, device="meta")).shape)
    except (IndexError, RuntimeError):
        return {}
    made = Derived(TensorInfo(shape, info.dtype), (expert.stored[whole],), lambda read: part.within(read[0]).contiguous())  # fmt: skip  # noqa: E501
    return {name: made}


def _joined(expert: Checkpoint, whole: TensorInfo, parts: Mapping[str, ParameterSlice]) -> Derived:
    dtype = expert.headers[next(iter(parts))].dtype

    def make(read: Any) -> torch.Tensor:
        out = torch.empty(whole.shape, dtype=dtype)
        for part, tensor in zip(parts.values(), read, strict=True):
            part.within(out).copy_(tensor)
        return out

    return Derived(TensorInfo(whole.shape, dtype), tuple(expert.stored[n] for n in parts), make)
