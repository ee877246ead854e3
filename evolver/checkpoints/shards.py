"""Model weights to safetensors files, one tensor at a time: no more than two tensors are in memory.

The format: eight bytes with the length of a JSON header, the header, then the tensors' bytes in its order.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError
from torch import Tensor

from evolver.checkpoints.weights import DTYPES, INDEX, WEIGHTS, TensorInfo

SHARD_BYTES = 5 * 10**9
DTYPE_CODES = {dtype: code for code, dtype in DTYPES.items()}


def write_shards(
    tensors: Iterable[tuple[str, Tensor]], infos: Mapping[str, TensorInfo], folder: Path, shard_bytes: int
) -> None:
    """Write a stream of tensors as one file, or as shards of at most ``shard_bytes`` with their index.

    Args:
        infos: shape and dtype of every tensor, in the order in which the stream brings them.

    Raises ValueError for a tensor that is not as announced.
    """
    shards = _plan(infos, shard_bytes)
    stream = iter(tensors)
    for file, names in shards.items():
        # The next tensor is made while one is written; no more than these two are in memory.
        with (folder / file).open("wb") as out, ThreadPoolExecutor(1) as writer:
            written: Future[int] | None = None
            _header(out, {n: infos[n] for n in names})
            for wanted in names:
                name, tensor = next(stream)
                info = infos[wanted]
                if name != wanted or tuple(tensor.shape) != info.shape or tensor.dtype != info.dtype:
                    raise ValueError(
                        f"{wanted} was announced as {info}, and {name} came: {tensor.dtype} {tensor.shape}"
                    )
                if written is not None:
                    written.result()
                written = writer.submit(out.write, _bytes(tensor))
            if written is not None:
                written.result()
    if len(shards) > 1:
        write_index(folder, shards, sum(map(size, infos.values())))


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """While the library safetensors writes: what the disk says is an OSError, as it is from everything else."""
    try:
        yield
    except SafetensorError as error:
        if number := re.search(r"\(os error (\d+)\)", str(error)):
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error
        raise


def write_file(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a few tensors as one file."""
    with path.open("wb") as out:
        _header(out, {n: TensorInfo(tuple(t.shape), t.dtype) for n, t in tensors.items()})
        for tensor in tensors.values():
            out.write(_bytes(tensor))


def write_index(folder: Path, shards: Mapping[str, Sequence[str]], total: int) -> None:
    """Write the index of a model in several files.

    Args:
        shards: the tensors' names by file.
        total: bytes of all tensors.
    """
    index = {"metadata": {"total_size": total}, "weight_map": {n: f for f, names in shards.items() for n in names}}
    (folder / INDEX).write_text(json.dumps(index, indent=1, sort_keys=True))


def read_header(path: Path) -> list[str]:
    """The names of a file's tensors."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    return [name for name in header if name != "__metadata__"]


def size(info: TensorInfo) -> int:
    """Bytes of a tensor."""
    return info.dtype.itemsize * math.prod(info.shape)


def _plan(infos: Mapping[str, TensorInfo], shard_bytes: int) -> dict[str, list[str]]:
    shards = list(_fill(infos, shard_bytes))
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": names for i, names in enumerate(shards, 1)}


def _fill(infos: Mapping[str, TensorInfo], shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    held = 0
    for name, info in infos.items():
        if names and held + size(info) > shard_bytes:
            yield names
            names, held = [], 0
        names.append(name)
        held += size(info)
    yield names


def _header(out: BinaryIO, infos: Mapping[str, TensorInfo]) -> None:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, info in infos.items():
        end = at + size(info)
        entries[name] = {"dtype": DTYPE_CODES[info.dtype], "shape": list(info.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    out.write(len(text).to_bytes(8, "little"))
    out.write(text)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
