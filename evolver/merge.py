"""One merge from a mergekit file: what ``mergekit-yaml`` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from evolver.errors import BadInput
from evolver.export import export
from evolver.merging import mergekit, mergekit_out
from evolver.merging.kernels import Kernels
from evolver.merging.materialise import Materialiser
from evolver.merging.weights import Checkpoint, Source, digests, doubts, open_base, open_expert
from evolver.records import Expert
from evolver.shards import SHARD_BYTES

CARD = """---
tags: [merge, evolver]
---

# {name}

A merge made by Evolver from this configuration:

```yaml
{text}```
"""
# Kernels cost some ten seconds each to compile, once on a machine; below so many scalars of all models, plain code is
# sooner done. Random draws are slow in plain code.
COMPILE_FROM, COMPILE_DRAWS_FROM = 10**10, 3 * 10**8


@dataclass(frozen=True)
class Opened:
    """A configuration with its models, opened."""

    configuration: mergekit.Configuration
    base: Checkpoint
    sources: dict[str, Source]


def open_file(path: str | Path) -> Opened:
    """Read a mergekit file and open its models; of their weights only headers are read.

    Raises BadInput that names file and key.
    """
    configuration = mergekit.read(path)
    if configuration.tokenizer_source not in (None, "base"):
        raise BadInput(
            f"{path}: tokenizer_source: {configuration.tokenizer_source!r} is not supported yet; "
            "leave it out, or write base, with models that have the same tokens."
        )
    if configuration.raw.chat_template not in (None, "auto"):
        raise BadInput(f"{path}: chat_template: a template of its own is not supported yet; write auto.")
    location, _, adapter = configuration.origin.partition("+")
    if adapter:
        raise BadInput(f"{path}: base_model: {configuration.origin} has an adapter; give a model without one.")
    base = open_base(location, f"{path}: base_model")
    return Opened(configuration, base, {r: _open(r, base, location, path) for r in configuration.references})


def merge(
    path: str | Path, target: Path, *, device: str = "cpu", seed: int = 0, shard_bytes: int = SHARD_BYTES,
    tokenizer: bool = True, warn: Callable[[str], None] = lambda _: None,
) -> None:  # fmt: skip
    """Merge as the file says and write a Hugging Face folder; an interrupted merge leaves nothing under its name.

    Args:
        device: where to compute.
        seed: of methods that draw at random.
        shard_bytes: how large a file of weights may become.
        tokenizer: copy the base's tokenizer.
        warn: told, a line each, what is odd about the models.

    Raises BadInput for what cannot be merged, before anything is written.
    """
    if target.exists() and any(target.iterdir()):
        raise BadInput(f"{target}: is there already and not empty; name another folder.")
    opened = open_file(path)
    known = digests(opened.sources)
    for doubt in doubts(opened.base, [s for s in opened.sources.values() if s is not opened.base]):
        warn(doubt)
    nodes = {r: Expert(r, d) for r, d in known.items()}
    recipe = opened.configuration.recipe(nodes, opened.base.names(), seed)
    scalars = len(known) * opened.base.scalars
    dtype = opened.configuration.dtype
    draws = "seed" in opened.configuration.method.settings
    materialiser = Materialiser(
        opened.base, {known[r]: s for r, s in opened.sources.items()}, getattr(torch, dtype) if dtype else None,
        device=device, kernels=Kernels(build=scalars >= (COMPILE_DRAWS_FROM if draws else COMPILE_FROM)),
    )  # fmt: skip
    text = Path(path).read_text()
    texts = {"README.md": CARD.format(name=target.name, text=text), mergekit_out.FILE: text}
    export(recipe, materialiser, target, texts, shard_bytes, tokenizer)


def _open(reference: str, base: Checkpoint, base_location: str, path: str | Path) -> Source:
    location, _, adapter = reference.partition("+")
    key = f"{path}: {reference}"
    if not adapter:
        return base if location == base_location else open_expert(location, base, key)
    own = base if location == base_location else open_expert(location, base, key)
    if not isinstance(own, Checkpoint):
        raise BadInput(f"{key}: {location} is an adapter itself; give the model that {adapter} was trained on.")
    return open_expert(adapter, own, key)
