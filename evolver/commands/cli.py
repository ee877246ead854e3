"""The command line: the main job and what stands around it.

Exit status: 0 done, 2 bad input, 3 stopped with everything finished kept (or a run of a sweep was), 1 a fault of ours.
"""

from __future__ import annotations

import gc
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evolver.errors import BadInput
from evolver.threads import let_threads_sleep

# What a command needs is imported by that command: torch alone takes a second, and help should not wait for it.

app = typer.Typer(add_completion=True, no_args_is_help=True, help="Search for the best merge of fine-tuned models.")
# So many new objects are made before Python looks for those that only hold each other.
SELDOM = 50_000
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="the configuration of a run")],
    results: Annotated[str | None, typer.Option(help="folder of all runs, or a URI; default: results")] = None,
    name: Annotated[str | None, typer.Option("--run", help="name of the run, instead of the configuration's")] = None,
) -> None:
    """Search for the best merge, or go on where an earlier call stopped."""
    raise typer.Exit(_job(config, results, name))


@app.command()
def resume(
    folder: Annotated[str, typer.Argument(help="the folder of a run, or its URI")],
    candidates: Annotated[int | None, typer.Option(min=1, help="another budget of candidates")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="another budget of scored items")] = None,
) -> None:
    """Go on with a run, from its folder alone; with another budget where one is given."""
    from cluster.job import drive
    from evolver.runs.folder import config_of_run
    from evolver.storage import storage_at

    place, _, name = folder.rstrip("/").rpartition("/")
    raise typer.Exit(drive(config_of_run(storage_at(folder), candidates, items), place or ".", name))


@app.command()
def validate(config: Annotated[Path, typer.Argument(help="the configuration of a run")]) -> None:
    """Check a configuration: all that can be known without reading weights."""
    from cluster.job import device_of
    from evolver.config import config_at
    from evolver.driver.prepare import prepare
    from evolver.workers.worker import choose_compute

    written = config_at(config)
    given = written.parsed()
    device = device_of(given.pool)
    prepared = prepare(written, weights=False, device=device)
    for warning in (*prepared.warnings, *prepared.tasks.warnings):
        typer.echo(f"warning: {warning}", err=True)
    sizes = {split: len(prepared.tasks.items.of(split)) for split in ("dev", "report")}
    total = prepared.search.total
    typer.echo(
        f"{config}: {len(prepared.experts)} experts, {sizes['dev']} dev and {sizes['report']} report items, "
        f"{'no limit on' if total is None else total} candidates: ready to run"
    )
    if given.model.compute == "auto" and given.evaluation.backend == "resident":
        choice = choose_compute(given, device)
        typer.echo(f"model.compute: auto is {choice.compute} on this machine: {choice.why}")


@app.command()
def status(
    results: Annotated[str, typer.Argument(help="folder of all runs, or a URI")] = "results",
    as_json: Annotated[bool, typer.Option("--json", help="for programs")] = False,
) -> None:
    """Say how far the runs of a folder have come."""
    import json
    from dataclasses import asdict

    from evolver.dashboard.status import statuses
    from evolver.storage import storage_at

    found = statuses(storage_at(results))
    if as_json:
        typer.echo(json.dumps([asdict(s) for s in found], indent=1))
        return
    shown = Table("run", "state", "search", "best dev", "best expert", "candidates", "items", "failed", "last result")
    for s in found:
        score, expert = ("–" if v is None else f"{v:.4f}" for v in (s.best, s.expert))
        spent = [f"{n}" if limit is None else f"{n} of {limit}" for n, limit in zip(s.spent, s.budget, strict=True)]
        age = "–" if s.age is None else f"{_duration(s.age)} ago"
        shown.add_row(s.name, s.state, s.algorithm, score, expert, *spent, str(s.failed), age)
    _console().print(shown)


@app.command()
def dashboard(
    results: Annotated[str, typer.Argument(help="folder of all runs, or a URI")] = "results",
    port: Annotated[int, typer.Option(help="0: any free one")] = 8421,
    host: Annotated[
        str, typer.Option(help="address to listen on; beyond this machine only if you say so")
    ] = "127.0.0.1",
) -> None:
    """Show the runs of a folder in a browser, as they go; stop, resume and export them there."""
    import secrets
    import socket

    import uvicorn

    from cluster.jobs import RayJobs
    from evolver.dashboard.app import build_app
    from evolver.storage import storage_at

    token = secrets.token_urlsafe(24)
    listener = socket.create_server((host, port))
    address = f"{host}:{listener.getsockname()[1]}"
    typer.echo(f"http://{address}/?token={token}")
    hosts = frozenset({host, "127.0.0.1", "localhost"})
    made = build_app(storage_at(results), token, RayJobs(), hosts)
    server = uvicorn.Server(uvicorn.Config(made, log_level="warning"))
    server.run(sockets=[listener])


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="the folder of a run, or its URI")],
    out: Annotated[str | None, typer.Option(help="where to write; default: the run's folder")] = None,
) -> None:
    """Write the report of a run anew: Markdown, one HTML file, and all candidates as CSV."""
    from evolver.report.report import write_again
    from evolver.storage import storage_at

    target = storage_at(out or folder)
    typer.echo(write_again(storage_at(folder), target))
    typer.echo(f"{target.location}/report.html")


@app.command()
def export(
    folder: Annotated[str, typer.Argument(help="the folder of a run, or its URI")],
    out: Annotated[Path, typer.Argument(help="folder to write, new or empty; with --gguf, the file")],
    candidate: Annotated[str | None, typer.Option(help="its number, or its recipe's id; default: the best")] = None,
    lora: Annotated[int | None, typer.Option(min=1, help="write a LoRA adapter of this rank instead")] = None,
    energy: Annotated[float | None, typer.Option(help="… of the ranks that keep this share of the difference")] = None,
    delta: Annotated[bool, typer.Option(help="write the difference to the base instead")] = False,
    gguf: Annotated[str | None, typer.Option(help="write a GGUF file of this type instead: bf16, q8_0, …")] = None,
    push_to_hub: Annotated[str | None, typer.Option(help="also upload it there, as org/name")] = None,
    force: Annotated[bool, typer.Option("--force", help="take the place of an earlier export")] = False,
) -> None:
    """Write a model of a run as a Hugging Face folder, a LoRA adapter, a delta or a GGUF file, and check it.

    Nothing that is there already is written over; --force replaces what an earlier export wrote, if nobody has changed
    it since.
    """
    from evolver.driver import deliver
    from evolver.storage import storage_at

    run = storage_at(folder)
    asked = {"--lora": lora is not None or energy is not None, "--delta": delta, "--gguf": gguf is not None}
    if sum(asked.values()) > 1:
        raise BadInput(f"{', '.join(o for o, given in asked.items() if given)}: each is a form of its own; give one.")
    if energy is not None and not 0 < energy <= 1:
        raise BadInput(f"--energy: {energy:g} is not usable; write a share above 0 and up to 1.")
    if gguf is not None:
        deliver.deliver_gguf(run, out, candidate, gguf, typer.echo, force)
    elif delta:
        deliver.deliver_delta(run, out, candidate, typer.echo, force)
    elif lora is not None or energy is not None:
        deliver.deliver_lora(run, out, candidate, lora, energy, typer.echo, force)
    else:
        deliver.deliver(run, out, candidate, typer.echo, force)
    if push_to_hub:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(push_to_hub, exist_ok=True)
        if out.is_file():
            api.upload_file(path_or_fileobj=out, path_in_repo=out.name, repo_id=push_to_hub)
        else:
            api.upload_folder(folder_path=out, repo_id=push_to_hub)
        typer.echo(f"uploaded to {push_to_hub}")


@app.command()
def study(
    folder: Annotated[str, typer.Argument(help="the folder of a run, or its URI")],
    out: Annotated[Path, typer.Argument(help="SQLite file to write")],
) -> None:
    """Write a coefficient search as an Optuna study: optuna-dashboard sqlite:///OUT shows it."""
    from evolver.driver.prepare import prepare_run
    from evolver.runs.history import read_history
    from evolver.search.study import write_study
    from evolver.storage import storage_at

    run = storage_at(folder)
    found = {(c.number, c.recipe.id): r for c, r in read_history(run).stages["search"]}
    prepared = prepare_run(run)
    count = write_study(prepared.search, lambda c: found.get((c.number, c.recipe.id)), prepared.config.run, out)
    typer.echo(f"{out}: {count} trials; optuna-dashboard sqlite:///{out} shows them")


@app.command()
def evaluate(
    config: Annotated[Path, typer.Argument(help="the configuration whose tasks are meant")],
    models: Annotated[list[str], typer.Argument(help="folders, hub ids or URIs of models")],
    dev: Annotated[bool, typer.Option(help="on the dev items instead of the report items")] = False,
) -> None:
    """Score models on the tasks of a configuration."""
    from evolver.commands.evaluate import score_models, score_table

    typer.echo(score_table(score_models(str(config), models, "dev" if dev else "report")))


@app.command()
def searches(name: Annotated[str | None, typer.Argument(help="one search, in full")] = None) -> None:
    """List the searches and their settings."""
    from evolver.commands.words import first_paragraph
    from evolver.errors import nearest
    from evolver.search import SEARCHES

    if name is not None and name not in SEARCHES:
        raise BadInput(f"evolver searches: unknown search {name!r}; {nearest(name, SEARCHES)}")
    console = _console()
    for algorithm in SEARCHES.values() if name is None else [SEARCHES[name]]:
        console.print(f"[bold]{algorithm.name}[/bold]  {first_paragraph(algorithm.build)}", highlight=False)
        shown = Table("setting", "default", "meaning")
        for key, field in algorithm.settings.model_fields.items():
            if key != "algorithm":
                default = "" if field.is_required() else repr(field.get_default(call_default_factory=True))
                shown.add_row(key, default, field.description or "")
        console.print(shown)


@app.command()
def doctor(
    prepare: Annotated[
        bool, typer.Option("--prepare", help="first compile what the first merge would compile")
    ] = False,
) -> None:
    """Say what this machine offers, what a run would use, and what is missing."""
    from evolver.commands import doctor as looking

    if prepare:
        typer.echo(looking.compile_ahead())
    shown = Table("", "found", "to do")
    for what, found, remedy in looking.findings():
        shown.add_row(what, escape(found), escape(remedy))
    _console().print(shown)


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

    from evolver.commands import merge as merging

    if trust_remote_code or allow_crimes:
        raise BadInput(
            "--trust-remote-code, --allow-crimes: refused; models bring no code, and only fine-tunes of one base merge."
        )
    if num_threads:
        torch.set_num_threads(num_threads)
    if cuda and not torch.cuda.is_available():
        raise BadInput("--cuda: torch sees no GPU here; leave it out.")
    merging.merge_file(
        config, out, device="cuda" if cuda else "cpu", seed=random_seed, shard_bytes=_bytes(out_shard_size),
        tokenizer=copy_tokenizer, warn=lambda line: None if quiet else typer.echo(f"warning: {line}", err=True),
    )  # fmt: skip
    if not quiet:
        typer.echo(f"wrote {out}")


@app.command()
def explain(
    config: Annotated[
        Path, typer.Argument(help="a mergekit YAML file, the configuration or the folder of a run, or a model folder")
    ],
) -> None:
    """Print, for every tensor, the method and the settings in force."""
    from evolver.commands import explain as explaining

    typer.echo(explaining.table(explaining.explain(config)))


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="one method, in full")] = None) -> None:
    """List the merge methods: settings, defaults, what a search may tune, paper."""
    from evolver.commands.words import default_of, first_paragraph, kind_of, remarks_of, searched_of
    from evolver.merging.methods import METHODS, get

    console = _console()
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
    said = "\n".join([first_paragraph(method.function), *remarks_of(method)])
    console.print(f"[bold]{method.name}[/bold] ({method.paper})\n{said}", highlight=False)
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
    from evolver.storage import storage_at
    from evolver.training.experts import locations, make_experts
    from evolver.training.settings import load_pool
    from evolver.training.show import show
    from evolver.training.table import measure as measured

    pool, shown = load_pool(config), show()
    try:
        folders = make_experts(pool, shown)
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
    let_threads_sleep()
    # Importing torch makes half a million objects that stay; to look through them, then and at the end, takes a third
    # of a second of every command.
    gc.set_threshold(SELDOM)
    try:
        app()
    except BadInput as error:
        typer.echo(str(error), err=True)
        raise SystemExit(2) from None
    finally:
        gc.freeze()


def _job(config: Path, results: str | None, name: str | None) -> int:
    """The main job, as ``evolve.py`` runs it; its exit status."""
    from cluster.job import run_job as job

    given = [*(["--results", results] if results else []), *(["--run", name] if name else [])]
    return job([str(config), *given])


def _console() -> Console:
    """Where tables are printed: as wide as the terminal, and wide enough in a file."""
    return Console(width=None if sys.stdout.isatty() else 160)


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+)([KMGB]?)", size.upper())
    if match is None or int(match.group(1)) == 0:
        raise BadInput(f"--out-shard-size: {size!r} is not usable; write a number with K, M or B, such as 5B.")
    return int(match.group(1)) * UNITS[match.group(2)]
