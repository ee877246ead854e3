"""Weights that are stored as FP8 or MXFP4 with scales, read as the plain numbers that they stand for.

FP8: a weight of eight-bit floats, and a scale for each block of its rows and columns, or for all of it (DeepSeek-V3).
MXFP4: four-bit floats, two in a byte, with a shared exponent for each 32 of them (Open Compute Project, 2023), as the
experts of gpt-oss are stored. Each tensor is computed when it is asked for, in float32, and rounded once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evolver.errors import BadInput

CONFIG_KEY, METHOD = "quantization_config", "quant_method"
# The methods whose weights are read as plain numbers, by how config.json calls them.
READ_METHODS = ("fp8", "mxfp4")
# How files call the scale of a weight; the last two are of DeepSeek-V4 and of Mistral.
SCALES = ("weight_scale_inv", "scale", "qscale_weight")
# Scales of what goes into a layer, which say nothing of its weights.
OF_ACTIVATIONS = (".activation_scale", ".input_scale")
CODES, SHARED_EXPONENTS = "_blocks", "_scales"
# The sixteen numbers of four bits: a sign, two bits of exponent, one of fraction.
FOUR_BITS = tuple(sign * size for sign in (1.0, -1.0) for size in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0))
# A scale that is a byte is a power of two; this one is 1.
BYTE_OF_ONE = 127
# What a user can do about weights of other methods.
WAYS_OUT = {
    "bitsandbytes": "load it with Transformers, call dequantize() and save_pretrained(), and give that folder, or give "
    "the model that was quantised",
    "compressed-tensors": "give the model that was quantised, or decompress it with the package compressed-tensors",
}
WAY_OUT = "give the model that was quantised, in its full precision"

Sizes = tuple[int, ...]


@dataclass(frozen=True)
class Scaled:
    """A tensor that is stored in parts.

    Attributes:
        codes: the name in the files of its numbers without their scale.
        scales: the name in the files of its scales.
        shape: of the plain tensor.
        dtype: of the plain tensor.
        block: rows and columns that share a scale; None: one is for all.
    """

    codes: str
    scales: str
    shape: Sizes
    dtype: torch.dtype
    block: tuple[int, int] | None = None

    @property
    def four_bits(self) -> bool:
        return self.codes.endswith(CODES)

    def plain(self, read: Callable[[str], Tensor]) -> Tensor:
        """The tensor; ``read`` gives the parts."""
        codes, scales = read(self.codes), read(self.scales)
        if self.four_bits:
            return torch.stack([_of_four_bits(*pair, self.dtype).T for pair in zip(codes, scales, strict=True)])
        return _of_eight_bits(codes, scales, self.block).to(self.dtype)


def method_of(config: Mapping[str, Any]) -> str | None:
    """The method by which a model's weights are quantised; None: they are plain numbers."""
    found = config.get(CONFIG_KEY)
    if found is None:
        return None
    return str(found.get(METHOD, "some way")) if isinstance(found, dict) else "some way"


def how_quantised(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """How a model's weights are quantised, where they are read as plain numbers."""
    return dict(config[CONFIG_KEY]) if method_of(config) in READ_METHODS else None


def refuse_quantised(config: Mapping[str, Any], path: Path, key: str) -> None:
    """Raises BadInput for weights that are quantised by a method that is not read."""
    method = method_of(config)
    if method is not None and method not in READ_METHODS:
        raise BadInput(
            f"{key}: the weights of {path} are quantised ({method}), and only plain floating numbers, FP8 with scales "
            f"and MXFP4 can be merged; {WAYS_OUT.get(method, WAY_OUT)}."
        )


def without_quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration of the same model with plain weights."""
    return {name: value for name, value in config.items() if name != CONFIG_KEY or value is None}


class ScaledTensors:
    """The tensors of a checkpoint that are stored in parts.

    Args:
        config: the content of config.json.
        names: of all tensors in the files.
        shape: gives the shape of a tensor in the files.

    Raises BadInput where a part is missing, or parts do not fit.
    """

    def __init__(
        self, config: Mapping[str, Any], names: Iterable[str], shape: Callable[[str], Sizes], path: Path, key: str
    ) -> None:
        self._names, self._shape, self._path, self._key = frozenset(names), shape, path, key
        self._found: dict[str, Scaled] = {}  # by the names of their numbers in the files
        self._beside: frozenset[str] = frozenset()  # what is no tensor of the model
        if (method := method_of(config)) is None:
            return
        self._dtype = _plain_dtype(config)
        self._find_four_bits() if method == "mxfp4" else self._find_eight_bits(config[CONFIG_KEY])
        used = {s.scales for s in self._found.values()}
        self._beside = frozenset(used | {n for n in self._names if method == "fp8" and n.endswith(OF_ACTIVATIONS)})

    def of(self, codes: str) -> Scaled | None:
        """The tensor whose numbers the files call so; None where the name is of a plain tensor."""
        return self._found.get(codes)

    @property
    def scales(self) -> dict[str, str]:
        """The names in the files of numbers, by those of their scales."""
        return {scaled.scales: codes for codes, scaled in self._found.items()}

    @property
    def uneven(self) -> bool:
        """Whether the blocks of a weight do not divide it, so that Transformers does not read it."""
        blocks = [(s, self._shape(s.scales)) for s in self._found.values() if s.block is not None]
        return any(size % parts for s, grid in blocks for size, parts in zip(s.shape[-2:], grid[-2:], strict=True))

    def in_parts(self, stored: Mapping[str, str]) -> dict[str, str]:
        """The names in the files of a model's tensors by their own: without scales, and those of four bits renamed."""
        return {
            name.removesuffix(CODES) if codes in self._found else name: codes
            for name, codes in stored.items()
            if codes not in self._beside
        }

    def _find_four_bits(self) -> None:
        for codes in sorted(n for n in self._names if n.endswith(CODES)):
            sizes, scales = self._shape(codes), codes.removesuffix(CODES) + SHARED_EXPONENTS
            if scales not in self._names:
                raise BadInput(f"{self._key}: {self._path} holds {codes} without its scales; copy the model again.")
            if len(sizes) != 4 or self._shape(scales) != sizes[:-1]:
                raise self._unfit(codes, scales)
            experts, rows, groups, group = sizes
            self._found[codes] = Scaled(codes, scales, (experts, 2 * groups * group, rows), self._dtype)

    def _find_eight_bits(self, settings: Mapping[str, Any]) -> None:
        said = _pair(settings.get("weight_block_size"))
        for name in sorted(self._names):
            module = name.removesuffix("weight")
            names = [module + s for s in SCALES] if name.endswith(".weight") else [f"{name}_scale_inv"]
            scales = next((s for s in names if s in self._names), None)
            if scales is None:
                continue
            sizes, grid = self._shape(name), self._shape(scales)
            of_all = all(n == 1 for n in grid)
            block = None if of_all else _block_of(sizes, grid, said)
            if block is None and not of_all:
                raise self._unfit(name, scales)
            self._found[name] = Scaled(name, scales, sizes, self._dtype, block)

    def _unfit(self, codes: str, scales: str) -> BadInput:
        return BadInput(
            f"{self._key}: {scales} of shape {self._shape(scales)} does not fit {codes} of shape {self._shape(codes)} "
            f"in {self._path}; copy the model again."
        )


def _pair(said: Any) -> tuple[int, int] | None:
    whole = isinstance(said, list) and len(said) == 2 and all(isinstance(n, int) and n > 0 for n in said)
    return (said[0], said[1]) if whole else None


def _plain_dtype(config: Mapping[str, Any]) -> torch.dtype:
    """The dtype that Transformers gives to dequantised weights."""
    inner = config.get("text_config")
    for section in (config, inner if isinstance(inner, dict) else {}):
        said = str(section.get("dtype") or section.get("torch_dtype") or "").removeprefix("torch.")
        if said in ("float32", "float16", "bfloat16"):
            found: torch.dtype = getattr(torch, said)
            return found
    return torch.bfloat16


def _block_of(sizes: Sizes, grid: Sizes, said: tuple[int, int] | None) -> tuple[int, int] | None:
    """Rows and columns that share a scale; None where scales do not fit a weight. The last block may be a part only,
    which Transformers does not consider.

    Args:
        sizes: of the weight.
        grid: of the scales.
        said: rows and columns of a block by config.json, which may hold for other weights only.
    """
    if len(sizes) < 2 or len(grid) != len(sizes) or grid[:-2] != sizes[:-2] or 0 in grid:
        return None
    pairs = list(zip(sizes[-2:], grid[-2:], strict=True))
    if said is not None and all(-(-size // b) == parts for (size, parts), b in zip(pairs, said, strict=True)):
        return said
    rows, columns = (size // parts if size % parts == 0 else 0 for size, parts in pairs)
    return (rows, columns) if rows and columns else None


def _of_eight_bits(codes: Tensor, scales: Tensor, block: tuple[int, int] | None) -> Tensor:
    """Numbers times their scales, float32 of the shape of ``codes``."""
    factors = (scales.float() - BYTE_OF_ONE).exp2() if scales.dtype == torch.uint8 else scales.float()
    if block is None:
        return codes.float() * factors.reshape(())
    for dim in (-2, -1):
        factors = factors.repeat_interleave(block[dim], dim).narrow(dim, 0, codes.shape[dim])
    return codes.float() * factors


def _of_four_bits(codes: Tensor, exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """One expert: codes uint8 (rows, groups, bytes) and exponents uint8 (rows, groups) to (rows, columns)."""
    numbers = torch.tensor(FOUR_BITS)
    low_first = torch.stack([numbers[(codes & 15).int()], numbers[(codes >> 4).int()]], dim=-1).flatten(-2)
    powers = exponents.int() - BYTE_OF_ONE
    return torch.ldexp(low_first, powers[..., None]).flatten(-2).to(dtype)
