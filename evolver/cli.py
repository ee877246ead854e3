"""The command line beside the main job: merge from a mergekit file, explain one, list the methods, train pools, sweep.

Exit status: 0 done, 2 bad input, 3 a run of a sweep did not end well, 1 a fault of ours.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from evolver.errors import BadInput

# What a command needs is imported by that command: torch alone takes a second, and help should not wait for it.

app = typer.Typer(add_completion=True, no_args_is_help=True, help="Merge fine-tuned models.")
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


@app.command()
def merge(
    config: Annotated[Path, typer.Argument(help="a mergekit YAML file")],
    out: Annotated[Path, typer.Argument(help="folder to write, new or empty")],
    cuda: Annotated[bool, typer.Option(help="compute on the GPU")] = False,
    copy_tokenizer: Annotated[bool, typer.Option(help="copy the base's tokenizer")] = True,
    out_shard_size: Annotated[str, typer.Option(help="largest file of weights, such as 5B or 500M")] = "5B",
    random_seed: Annotated[int, typer.Option(help="seed of methods that draw at random")] = 0,
    num_threads: Annotated[int, typer.Option("--num-threads", "-j", help="threads; 0: all cores")] = 0,
    lazy_unpickle: Annotated[bool, typer.Option(help="mergekit's; weights are always read lazily")] = False,
    trust_remote_code: Annotated[bool, typer.Option(help="mergekit's; refused")] = False,
    allow_crimes: Annotated[bool, typer.Option(help="mergekit's; refused")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print nothing")] = False,
) -> None:
    """Merge models as a mergekit file says."""
    del lazy_unpickle
    import torch

    from evolver import merge as merging

    if trust_remote_code or allow_crimes:
        raise BadInput(
            "--trust-remote-code, --allow-crimes: refused; models bring no code, and only fine-tunes of one base merge."
        )
    if num_threads:
        torch.set_num_threads(num_threads)
    if cuda and not torch.cuda.is_available():
        raise BadInput("--cuda: torch sees no GPU here; leave it out.")
    merging.merge(
        config, out, device="cuda" if cuda else "cpu", seed=random_seed, shard_bytes=_bytes(out_shard_size),
        tokenizer=copy_tokenizer, warn=lambda line: None if quiet else typer.echo(f"warning: {line}", err=True),
    )  # fmt: skip
    if not quiet:
        typer.echo(f"wrote {out}")


@app.command()
def explain(
    config: Annotated[Path, typer.Argument(help="a mergekit YAML file, or the configuration of a run")],
) -> None:
    """Print, for every tensor, the method and the settings in force."""
    from evolver import explain as explaining

    typer.echo(explaining.table(explaining.explain(config)))


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="one method, in full")] = None) -> None:
    """List the merge methods: settings, defaults, what a search may tune, paper."""
    from evolver.merging.methods import METHODS, get
    from evolver.reference import default_of, first_paragraph, kind_of, searched_of

    console = Console()
    if name is None:
        shown = Table("method", "settings (default)", "searched", "paper")
        for method in sorted(METHODS.values(), key=lambda m: m.name):
            settings = method.settings.values()
            searched = [f"{s.name} {searched_of(s)}" for s in settings if searched_of(s)]
            defaults = [f"{s.name}={default_of(s)}" for s in settings]
            shown.add_row(method.name, "\n".join(defaults), "\n".join(searched), method.paper)
        console.print(shown)
        return
    method = get(name, "evolver methods")
    console.print(f"[bold]{method.name}[/bold] ({method.paper})\n{first_paragraph(method.function)}", highlight=False)
    shown = Table("setting", "value", "default", "searched")
    for s in method.settings.values():
        shown.add_row(s.name, kind_of(s).replace("`", ""), str(default_of(s)), searched_of(s))
    console.print(shown)


@app.command()
def experts(
    config: Annotated[Path, typer.Argument(help="the configuration of a pool")],
    measure: Annotated[bool, typer.Option(help="score base and experts on the pool's tasks at the end")] = True,
) -> None:
    """Train a pool of experts, or what is missing of it, and show what they are good at."""
    # Read when torch comes in. Threads that spin while they wait slow a training down many times beside other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from evolver.storage import storage_at
    from evolver.training.experts import locations, make_pool
    from evolver.training.settings import load_pool
    from evolver.training.show import show
    from evolver.training.table import measure as measured

    pool, shown = load_pool(config), show()
    try:
        folders = make_pool(pool, shown)
    finally:
        shown.close()
    for line in locations(folders):
        typer.echo(line)
    if measure:
        table = measured(pool, folders)
        storage_at(folders["base"].parent).write("table.md", f"{table}\n".encode())
        typer.echo(table)


@app.command()
def sweep(
    config: Annotated[Path, typer.Argument(help="the configuration of a sweep")],
    results: Annotated[str, typer.Option(help="folder of all runs, or a URI")] = "results",
    at_once: Annotated[int, typer.Option(min=1, help="runs at the same time")] = 1,
    address: Annotated[str | None, typer.Option(help="of a Ray cluster: every run is a job there")] = None,
) -> None:
    """Run a grid of configurations and seeds, or what is missing of it, and gather them into one table."""
    from cluster.sweep import gather, load_sweep, run_all

    found = load_sweep(config)
    ended = run_all(found, results, at_once, address, typer.echo)
    typer.echo(gather(found, results))
    if any(ended.values()):
        raise typer.Exit(3)


def main() -> None:
    """Run the command line; bad input is one sentence and exit status 2."""
    try:
        app()
    except BadInput as error:
        typer.echo(str(error), err=True)
        raise SystemExit(2) from None


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+)([KMGB]?)", size.upper())
    if match is None or int(match.group(1)) == 0:
        raise BadInput(f"--out-shard-size: {size!r} is not usable; write a number with K, M or B, such as 5B.")
    return int(match.group(1)) * UNITS[match.group(2)]
