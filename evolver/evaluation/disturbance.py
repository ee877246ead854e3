"""Disturbs the inputs of a module: adds one image to every image, or one vector to the embedding of every token."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# The size of embeddings is measured on so many tokens, or a few more, spread over the vocabulary.
MEASURED_TOKENS = 1024
PIXELS = "pixel_values"


@contextlib.contextmanager
def disturbed(module: Any, inputs: dict[str, Any], by: Tensor | None) -> Iterator[dict[str, Any]]:
    """The inputs to give to the module while the context is open.

    Args:
        inputs: of the module, by name.
        by: (channels, rows, columns) for images, (d,) for texts; None: nothing is disturbed.
    """
    if by is None:
        yield inputs
    elif PIXELS in inputs:
        yield inputs | {PIXELS: inputs[PIXELS] + by.to(inputs[PIXELS].dtype)}
    else:
        hook = module.get_input_embeddings().register_forward_hook(lambda _, __, found: found + by.to(found.dtype))
        try:
            yield inputs
        finally:
            hook.remove()


def no_disturbance(module: Any, inputs: dict[str, Any]) -> tuple[Tensor, float]:
    """A disturbance of zeros, float32, and the unit of its numbers.

    For images the unit is 1, as a processor brings them to a size of about 1. For texts it is the root mean square of
    the embeddings of tokens spread over the vocabulary, so that it does not depend on the items.

    Raises ValueError for a module that reads neither images nor tokens.
    """
    if PIXELS in inputs:
        return torch.zeros_like(inputs[PIXELS][0], dtype=torch.float32), 1.0
    table = module.get_input_embeddings()
    if getattr(table, "weight", None) is None:
        raise ValueError(
            "this architecture has no embeddings of tokens that could be disturbed; search with adamerging"
        )
    rows, width = table.weight.shape
    with torch.no_grad():
        some = table(torch.arange(0, rows, max(1, rows // MEASURED_TOKENS), device=table.weight.device)).float()
    return torch.zeros(width, device=some.device), float(some.square().mean().sqrt())
