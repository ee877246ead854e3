"""The command ``evolver export``: a candidate of a run in one of several forms, or the answers of all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from evolver.errors import BadInput

if TYPE_CHECKING:
    from evolver.storage import Storage

ExportTo = Annotated[
    Path | None,
    typer.Argument(
        help="folder to write, new or empty; with --gguf, the file to write; default with --table: RUN-table",
        show_default=False,
    ),
]
ForWeights = Annotated[
    str | None,
    typer.Option(
        help="instead of a candidate: weights of the run's objectives, such as maths=2,safety=1; exports the model on "
        "the front that is best for them"
    ),
]
WithTable = Annotated[
    bool,
    typer.Option(
        "--table", help="write all models with their recipes and their answers to every item instead, as Parquet"
    ),
]
AlsoRuns = Annotated[
    list[str] | None, typer.Option(help="with --table, a further run over the same items; may be repeated")
]


def export(
    folder: Annotated[str, typer.Argument(help="the folder of a run, or its URI")],
    out: ExportTo = None,
    candidate: Annotated[
        str | None, typer.Option(help="number of the candidate, or the beginning of its recipe's id; default: the best")
    ] = None,
    weights: ForWeights = None,
    lora: Annotated[int | None, typer.Option(min=1, help="write a LoRA adapter of this rank instead")] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            help="write a LoRA adapter instead, with the rank that keeps this share (0 to 1) of the squared difference "
            "to the base"
        ),
    ] = None,
    delta: Annotated[
        bool, typer.Option(help="write the difference to the base instead, as one safetensors file")
    ] = False,
    gguf: Annotated[str | None, typer.Option(help="write a GGUF file of this type instead: bf16, q8_0, …")] = None,
    table: WithTable = False,
    also: AlsoRuns = None,
    push_to_hub: Annotated[
        str | None, typer.Option(help="also upload the result to the Hugging Face hub, under this org/name")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="replace an earlier export at the same place")] = False,
) -> None:
    """Export a candidate of a run as a Hugging Face folder, a LoRA adapter, a delta or a GGUF file, and check it.

    With --table it exports the answers of all candidates instead.

    The command never overwrites files, except with --force, which replaces an earlier export that nobody has changed.
    """
    asked = {
        "--lora": lora is not None or energy is not None, "--delta": delta, "--gguf": gguf is not None,
        "--table": table,
    }  # fmt: skip
    _check_form(asked, energy)
    if table or also:
        typer.echo(_export_table(folder, also or [], out, table, candidate or weights or push_to_hub, force))
        return
    if out is None:
        raise BadInput("evolver export: OUT is missing; name the folder to write, or with --gguf the file.")
    from evolver.driver import deliver  # it brings torch
    from evolver.storage import storage_at

    run = storage_at(folder)
    if weights is not None:
        candidate = _weighed(run, candidate, weights)
    if gguf is not None:
        deliver.deliver_gguf(run, out, candidate, gguf, typer.echo, force)
    elif delta:
        deliver.deliver_delta(run, out, candidate, typer.echo, force)
    elif lora is not None or energy is not None:
        deliver.deliver_lora(run, out, candidate, lora, energy, typer.echo, force)
    else:
        deliver.deliver(run, out, candidate, typer.echo, force)
    if push_to_hub:
        _upload(out, push_to_hub)


def _check_form(asked: dict[str, bool], energy: float | None) -> None:
    """Raises BadInput if a model is to be exported in more than one form, or in one that does not exist."""
    if sum(asked.values()) > 1:
        raise BadInput(
            f"{', '.join(o for o, given in asked.items() if given)}: a model is exported in one form at a time; give "
            "one of these options."
        )
    check_energy(energy)


def _upload(out: Path, name: str) -> None:
    """Upload an exported file or folder to a repository of the hub."""
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(name, exist_ok=True)
    if out.is_file():
        api.upload_file(path_or_fileobj=out, path_in_repo=out.name, repo_id=name)
    else:
        api.upload_folder(folder_path=out, repo_id=name)
    typer.echo(f"uploaded to {name}")


def _export_table(
    folder: str, also: list[str], out: Path | None, asked: bool, other: str | None, force: bool
) -> str:  # fmt: skip
    """Export the table of runs, and return what was written."""
    from evolver.runs.table import export_table
    from evolver.storage import storage_at
    from evolver.storage.paths import last_part

    if not asked:
        raise BadInput("--also: only the tables of several runs are joined; add --table, or leave it out.")
    if other is not None:
        raise BadInput(
            "--table: a table holds all candidates and is written to this machine; leave --candidate, --weights "
            "and --push-to-hub out."
        )
    name = last_part(folder) or "run"
    return export_table([storage_at(run) for run in (folder, *also)], out or Path(f"{name}-table"), force)


def _weighed(run: Storage, candidate: str | None, weights: str) -> str:
    """The number of the candidate that is best for the weights that a user gives."""
    from evolver.driver.weighing import best_for
    from evolver.runs.history import read_history

    if candidate is not None:
        raise BadInput("--candidate, --weights: each of them names a model; give one of these options.")
    number = best_for(read_history(run), weights).number
    typer.echo(f"candidate {number} is the best on the front for these weights")
    return str(number)


def check_energy(energy: float | None) -> None:
    """Raises BadInput for a share of energy that is none."""
    if energy is not None and not 0 < energy <= 1:
        raise BadInput(f"--energy: {energy:g} is not usable; write a number above 0 and not above 1.")
