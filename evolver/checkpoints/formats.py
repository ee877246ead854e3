"""The registry of the formats in which models lie on disk, beside plain Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Called as ``opener(path, key, base, headless)``: where a model lies, the key under which the user named it, its base
# (None where it is the base itself), and whether its classification head is left out. Raises BadInput that names the
# key and the file.
Opener = Callable[..., Any]


@dataclass(frozen=True)
class ModelFormat:
    """A registered format.

    Args:
        recognises: whether what lies at a path is of this format, by the names of files.
        delta: it holds what a model changes in its base, so that no base is of this format. What it opens checks itself
            whether it belongs to the base.
    """

    name: str
    recognises: Callable[[Path], bool]
    delta: bool
    open: Opener


FORMATS: dict[str, ModelFormat] = {}


def model_format(name: str, recognises: Callable[[Path], bool], delta: bool = False) -> Callable[[Opener], Opener]:
    """Register what opens models of a format: a ``Checkpoint``, or with ``delta`` any ``Source``."""

    def register(opener: Opener) -> Opener:
        FORMATS[name] = ModelFormat(name, recognises, delta, opener)
        return opener

    return register
