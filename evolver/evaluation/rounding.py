"""Weights as they are after the quantisation that a user deploys: rounded through its format, and plain floats again.

The formats are llama.cpp's ``q4_0`` and ``q8_0``, which cut each row into blocks of 32 weights with one scale, and
``int8``, with one scale for each row. Which matrices they round is what llama.cpp rounds when it quantises a model, and
what ``load_in_8bit`` of Transformers rounds.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evolver.errors import BadInput

BLOCK_WEIGHTS = 32
# What llama.cpp leaves as it is: tables of positions, and what chooses among the experts of a layer. The last one is a
# bias for each token, of the shape (1, tokens).
LEFT_ALONE = re.compile(
    r"position|relative_attention_bias|\bwpe\b|(^|\.)(gate|router)\.weight$|token_type|final_logits_bias$"
)


def rounded(matrix: Tensor, kind: str) -> Tensor:
    """A matrix after it was quantised, in float32.

    Args:
        matrix: (rows, columns); a block or a row of the format lies within a row.
        kind: ``q4_0``, ``q8_0`` or ``int8``. Rows that cannot be cut into blocks are rounded to float16 instead.
    """
    values = matrix.float()
    if kind == "int8":
        return _by_largest(values)
    if values.shape[-1] % BLOCK_WEIGHTS:
        return values.half().float()
    blocks = values.reshape(-1, BLOCK_WEIGHTS)
    found = _to_4_bits(blocks) if kind == "q4_0" else _by_largest(blocks, half=True)
    return found.reshape(values.shape)


def _by_largest(rows: Tensor, half: bool = False) -> Tensor:
    """Rows as integers from -127 to 127 times a scale of the row; ``half``: the scale is kept in float16."""
    scale = rows.abs().amax(-1, keepdim=True) / 127
    whole = _nearest(rows * _inverse(scale))
    return whole * (scale.half().float() if half else scale)


def _to_4_bits(blocks: Tensor) -> Tensor:
    """Blocks as integers from -8 to 7 times a scale, by which the value that is furthest from 0 becomes -8."""
    sizes = blocks.abs()
    places = torch.arange(BLOCK_WEIGHTS, device=blocks.device).expand(blocks.shape)
    # The first of equals, as in llama.cpp.
    first = torch.where(sizes == sizes.amax(-1, keepdim=True), places, BLOCK_WEIGHTS - 1).amin(-1, keepdim=True)
    scale = blocks.gather(-1, first) / -8
    whole = torch.trunc(blocks * _inverse(scale) + 8.5).clamp(0, 15)
    return (whole - 8) * scale.half().float()


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale == 0, torch.zeros_like(scale), 1 / scale)


def _nearest(values: Tensor) -> Tensor:
    """The nearest integers; halves go away from 0, as in C."""
    sizes = values.abs()
    below = sizes.floor()
    return values.sign() * (below + (2 * (sizes - below)).floor())


def refuse_stacks(shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises BadInput for a model whose files hold the matrices of several experts in one tensor.

    Args:
        shapes: of the tensors in the model's files, by name.
    """
    stack = next((name for name, shape in shapes.items() if len(shape) > 2 and ".experts." in name), None)
    if stack is not None:
        raise BadInput(
            f"evaluation.quantise: {stack} holds the matrices of several experts, which cannot be told apart here; "
            "leave quantise out."
        )


class Rounding:
    """Rounds the tensors of a checkpoint as a user's quantised copy of the model has them.

    Args:
        module: the model.
        kind: see ``rounded``.
    """

    def __init__(self, module: Any, kind: str) -> None:
        from transformers.pytorch_utils import Conv1D
        from transformers.quantizers.base import get_keys_to_not_convert
        from transformers.quantizers.quantizers_utils import should_convert_module

        self.kind = kind
        last = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
        self._tables = {n for n, m in module.named_modules() if isinstance(m, torch.nn.Embedding) or m is last}
        if kind == "int8":
            whole = [*get_keys_to_not_convert(module), *(module._keep_in_fp32_modules or ())]
            self._tables |= {n for n, _ in module.named_modules() if not should_convert_module(n, whole)}
        self._turned = {n for n, m in module.named_modules() if isinstance(m, Conv1D)}

    def __call__(self, name: str, place: str, tensor: Tensor) -> Tensor:
        """A tensor as it is computed with.

        Args:
            name: of the tensor in its checkpoint.
            place: of the parameter in the model.
            tensor: what the checkpoint holds.
        """
        owner = place.rpartition(".")[0]
        if tensor.ndim != 2 or not tensor.is_floating_point() or LEFT_ALONE.search(name):
            return tensor
        if self.kind == "int8" and owner in self._tables:
            return tensor
        if owner in self._turned:  # GPT-2 holds the transposes of its matrices
            return rounded(tensor.T, self.kind).T
        return rounded(tensor, self.kind)
