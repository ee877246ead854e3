"""Which model an adapter was trained on, as far as its ``adapter_config.json`` says so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from evolver.checkpoints.adapted import seen_through
from evolver.checkpoints.adapter import Adapter
from evolver.checkpoints.weights import Checkpoint, Source
from evolver.errors import BadInput
from evolver.storage.paths import expand

NAMED_BASE = "base_model_name_or_path"
# How the cache of the hub's client calls a model.
CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[^/]+$")
# Words that say nothing of which model a folder holds. One name of such words is as good as none.
SAYS_NOTHING = re.compile(
    r"(base|model|llm|lm|encoder|checkpoint|ckpt|step|epoch|iter|snapshot|weights|pretrained|foundation|origin|original"
    r"|source|start|init|merged|output|out|results?|run|final|best|last|latest|new|old|copy|local|cache|hf|my|the"
    r"|tmp\w*|small|medium|large)s?\d*|v?\d+|[a-z]|[0-9a-f]{16,}"
)
# What is put behind the name of a model that was quantised for training.
FOR_TRAINING = re.compile(r"(-unsloth)?-bnb-4bit$|-4bit$")


@dataclass(frozen=True)
class OtherBase:
    """An adapter's base, and the other model that the adapter names.

    Attributes:
        by_weights: only their weights show that they differ.
    """

    named: str
    used: Path
    by_weights: bool = False


def other_base(source: Source, weights: bool) -> OtherBase | None:
    """The model that an adapter was trained on, if it is another one than its base; None for anything else.

    A folder that is on this machine is compared by its tensors. Otherwise names are compared, by their last parts: a
    copy of ``org/name`` lies in a folder ``name``, or its config.json says where it is from. A name such as ``base``
    or ``checkpoint-500`` says nothing, so it contradicts none.

    Args:
        weights: whether tensors may be read; without, models with the same names and shapes of tensors are taken for
            the same.
    """
    adapter = seen_through(source)
    if not isinstance(adapter, Adapter):
        return None
    named, base = adapter.config.get(NAMED_BASE), adapter.base
    if not isinstance(named, str) or not named.strip():
        return None
    other = _opened(named, base)
    if other is not None and other.in_files() == base.in_files():
        if _look_apart(other, base):
            return OtherBase(named, base.path)
        return OtherBase(named, base.path, by_weights=True) if weights and _differ(other, base) else None
    known = (base.location, str(base.path), str(base.config.get("_name_or_path") or ""))
    if _last_part(named) in {part for name in known for part in _parts(name)}:
        return None
    says = _says_something(named) and any(_says_something(name) for name in known)
    return OtherBase(named, base.path) if says else None


def _opened(named: str, base: Checkpoint) -> Checkpoint | None:
    """The model in a folder of this machine, where there is one."""
    try:
        folder = Path(expand(named))
        return Checkpoint(folder, NAMED_BASE, base.headless) if (folder / "config.json").exists() else None
    except (BadInput, OSError, ValueError):  # nothing that could be compared
        return None


def _look_apart(one: Checkpoint, base: Checkpoint) -> bool:
    shapes, others = ({c.stored[n]: i.shape for n, i in c.headers.items()} for c in (one, base))
    return any(shapes[n] != others[n] for n in shapes.keys() & others.keys())


def _differ(one: Checkpoint, base: Checkpoint) -> bool:
    return one.path.resolve() != base.path.resolve() and one.digest() != base.digest()


def _says_something(name: str) -> bool:
    """Whether the last part of a name has a word that can be of one model only."""
    plain = min(_parts(name), key=len, default="")
    return any(not SAYS_NOTHING.fullmatch(word) for word in re.split(r"[^a-z0-9]+", plain) if word)


def _parts(name: str) -> set[str]:
    """The last part of a name, and without what a file adds to it: ``name.q4_0.gguf`` is of ``name``."""
    last = _last_part(name)
    return {last, last.removesuffix(".gguf").rpartition(".")[0] if last.endswith(".gguf") else last} - {""}


def _last_part(name: str) -> str:
    plain = CACHED.sub(r"\1/\2", name.rstrip("/").replace("\\", "/"))
    last = plain.rpartition("/")[2].partition("@")[0].lower()
    return FOR_TRAINING.sub("", last)
