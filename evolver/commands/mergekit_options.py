"""The options of ``mergekit-yaml`` that ``evolver merge`` takes as well, so that a command line works with both."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from evolver.config.model import AlignmentWord
from evolver.errors import BadInput

IN_MERGEKIT = "an option of mergekit-yaml"
# These are left out of the pages of help, since nothing comes of them; docs/merging.md lists them.
NoEffect = Annotated[bool, typer.Option(help=IN_MERGEKIT, hidden=True)]
NoEffectText = Annotated[str | None, typer.Option(help=IN_MERGEKIT, hidden=True)]
NoEffectCount = Annotated[int | None, typer.Option(help=IN_MERGEKIT, hidden=True)]
Verbosity = Annotated[int, typer.Option("--verbose", "-v", count=True, help=IN_MERGEKIT, hidden=True)]
Refused = NoEffect
RefusedText = NoEffectText
GpuRich = Annotated[bool, typer.Option("--gpu-rich", help="the same as --cuda")]
Device = Annotated[str | None, typer.Option(help="where to compute: cpu, cuda, or auto (cuda if there is a GPU)")]
Align = Annotated[
    AlignmentWord,
    typer.Option(
        help="bring hidden units of the models into the base's order first: none, auto (all, of models of another "
        "ancestry than the base), mlp, heads, both or all"
    ),
]
StatisticsFrom = Annotated[
    Path | None,
    typer.Option(
        help="the YAML file of a run with the same base, on whose items statistics are collected for methods that need "
        "them, such as aim"
    ),
]

WHY = {
    "--trust-remote-code": "Evolver runs no code that comes with a model",
    "--allow-crimes": "Evolver merges only models of one architecture",
    "--no-safe-serialization": "Evolver writes no pickles, which can run code when they are read",
    "--unsafe-truncate-embeddings": "it would merge the rows of different tokens; write tokenizer_source in the file, "
    "with which rows are matched by token",
    "--lora-merge-dtype": "Evolver merges an adapter in float32 and rounds to the dtype of its base",
    "--transformers-cache": "models of the hub lie where the environment variable HF_HUB_CACHE says; set it",
}


def refuse_options(given: Mapping[str, Any]) -> None:
    """Raises BadInput for the first option that was given and is not supported, with the reason."""
    for option, value in given.items():
        if value:
            raise BadInput(f"{option}: {WHY[option]}; leave this option out.")


def chosen_device(cuda: bool, device: str | None) -> str:
    """Where to compute: ``cpu`` or ``cuda``.

    Raises BadInput for another device, and for a GPU that is not there.
    """
    import torch

    if device not in (None, "cpu", "cuda", "auto"):
        raise BadInput(f"--device: {device!r} is not usable; write cpu, cuda or auto.")
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if (wanted := device or ("cuda" if cuda else "cpu")) == "cuda" and not torch.cuda.is_available():
        raise BadInput(
            f"{'--device' if device else '--cuda'}: torch finds no GPU on this machine; leave the option out."
        )
    return wanted
