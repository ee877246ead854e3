"""Files that mergekit's other commands read: each is called by its name, and the user learns what to do instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from evolver.errors import BadInput


@dataclass(frozen=True)
class OtherTool:
    """A command of mergekit whose files are no merges.

    Args:
        keys: the keys at the top of its files, by which they are known.
        what: the command, and what it makes.
        instead: what the user can do.
    """

    keys: tuple[str, ...]
    what: str
    instead: str


TOOLS = (
    OtherTool(
        ("experts", "base_model"),
        "mergekit-moe, which puts dense models side by side as the experts of a mixture",
        "Evolver has no such command, so build the mixture with mergekit-moe, and give the folder that it writes",
    ),
    OtherTool(
        ("genome", "tasks"),
        "mergekit-evolve, which searches for a merge",
        "call `evolver run` or `evolver mergekit-evolve` with this file",
    ),
    OtherTool(
        ("layer_slices",),
        "bakllama, which stacks layers of models",
        "Evolver has no such command, so write the layers as slices with merge_method: passthrough",
    ),
)


def refuse_other_tools(raw: Mapping[str, Any], file: str) -> None:
    """Raises BadInput for a file of another command of mergekit."""
    if "merge_method" in raw:
        return
    for tool in TOOLS:
        if all(key in raw for key in tool.keys):
            raise BadInput(f"{file}: this is a file of {tool.what}; {tool.instead}.")
