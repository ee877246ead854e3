"""The command line ``evolver``: running a search, and the commands around it.

Exit status: 0 when the command is done; 2 when the user's input is wrong; 3 when a run, or a run of a sweep, was
stopped (every finished evaluation is kept); 1 when Evolver itself has a bug. `evolver gate` also knows 4 (worse) and 5
(undecided).
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from cluster import options
from evolver.commands import exporting, going_on, mergekit_evolve, tables
from evolver.commands import mergekit_options as mk
from evolver.errors import BadInput, file_sentence, takes_nothing
from evolver.threads import let_threads_sleep

# Each command imports what it needs in its function: importing torch takes a second, and --help should not wait for it.

app = typer.Typer(add_completion=True, no_args_is_help=True, help="Search for the best merge of fine-tuned models.")
# Python's garbage collector runs after so many new objects; see main().
SELDOM = 50_000
UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "G": 10**9}
RetryFailed = Annotated[bool, typer.Option("--retry-failed", help=options.RETRY_FAILED)]


@app.command()
def run(
    config: Annotated[Path, typer.Argument(help="the YAML file of the run")],
    results: Annotated[str | None, typer.Option(help=options.RESULTS)] = None,
    name: Annotated[str | None, typer.Option("--run", help=options.RUN_NAME)] = None,
    retry_failed: RetryFailed = False,
) -> None:
    """Search for the best merge, or continue where an earlier call stopped."""
    raise typer.Exit(_job(config, results, name, retry_failed))


@app.command()
def resume(
    folder: Annotated[str, typer.Argument(help="the folder of a run, or its URI")],
    candidates: Annotated[int | None, typer.Option(min=1, help="new budget: candidates in all")] = None,
    items: Annotated[int | None, typer.Option(min=1, help="new budget: scored items in all")] = None,
    minutes: Annotated[float | None, typer.Option(help="new budget: minutes of searching in all")] = None,
    patience: Annotated[
        int | None, typer.Option(min=1, help="new budget: candidates in a row without an improvement")
    ] = None,
    target: Annotated[float | None, typer.Option(help="new budget: dev score to be reached")] = None,
    retry_failed: RetryFailed = False,
) -> None:
    """Continue a run from its folder, with a new budget if you give one."""
    from evolver.driver.early import refuse_early
    from evolver.runs.folder import config_of_run
    from evolver.storage import storage_at

    place, _, name = folder.rstrip("/").rpartition("/")
    limits = {"minutes": minutes, "patience": patience, "target": target}
    config = config_of_run(storage_at(folder), candidates=candidates, items=items, **limits)
    refuse_early(config)
    from cluster.job import drive  # it brings torch

    raise typer.Exit(drive(config, place or ".", name, retry_failed))


app.command("mergekit-evolve")(mergekit_evolve.mergekit_evolve)
app.command()(going_on.retarget)
app.command()(going_on.fork)


@app.command()
def validate(config: Annotated[Path, typer.Argument(help="the YAML file of a run")]) -> None:
    """Check a configuration, its models and its tasks, as far as this is possible without reading weights."""
    from evolver.config.reading import config_at
    from evolver.driver.early import refuse_early

    written = config_at(config)
    refuse_early(written)
    # These bring torch.
    from cluster.job import device_of, unread_by_pool
    from evolver.driver.foresight import foresight, training_lines
    from evolver.driver.prepare import prepare
    from evolver.records import SPLITS
    from evolver.storage import storage_at
    from evolver.workers.worker import choose_compute

    given = written.parsed()
    device = device_of(given, written.origin)
    prepared = prepare(written, weights=False, device=device)
    for line in written.preset_lines():
        typer.echo(line)
    seen, unseen = training_lines(prepared)
    for warning in (*unread_by_pool(given.pool), *prepared.warnings, *prepared.tasks.warnings, *seen):
        typer.echo(f"warning: {warning}", err=True)
    sizes = {split: len(prepared.tasks.items.of(split)) for split in SPLITS}
    total = prepared.search.total
    typer.echo(
        f"{config}: {len(prepared.experts)} experts, {sizes['dev']} dev, {sizes['select']} select and "
        f"{sizes['report']} report items, "
        f"{'no fixed number of' if total is None else total} candidates: ready to run"
    )
    for task in given.evaluation.tasks:
        for split, count in prepared.tasks.sizes[task.task].items():
            if isinstance(share := getattr(task, split), float):
                typer.echo(f"{task.task}: {split} {share} is {count} items")
    for value in prepared.template.free if prepared.template else ():
        typer.echo(f"searched: {value.said}")
    for line in (*foresight(prepared, storage_at("results").folder(given.run)), *unseen):
        typer.echo(line)
    if given.model.compute == "auto" and given.evaluation.backend == "resident":
        choice = choose_compute(given, device)
        typer.echo(f"model.compute: auto is {choice.compute} on this machine: {choice.why}")


@app.command()
def status(
    results: Annotated[str, typer.Argument(help="folder of all runs, or its URI")] = "results",
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, for programs, instead of a table")] = False,
) -> None:
    """List the runs in a folder: their state, best scores and how much of the budget is spent."""
    import json
    from dataclasses import asdict

    from evolver.dashboard.status import statuses
    from evolver.storage import storage_at

    found = statuses(storage_at(results))
    if as_json:
        typer.echo(json.dumps([asdict(s) for s in found], indent=1))
        return
    tables.console().print(tables.statuses_table(found))


@app.command()
def dashboard(
    results: Annotated[str, typer.Argument(help="folder of all runs, or its URI")] = "results",
    port: Annotated[int, typer.Option(help="port to listen on; 0 takes any free one")] = 8421,
    host: Annotated[
        str, typer.Option(help="address to listen on; with the default, only this machine can reach the dashboard")
    ] = "127.0.0.1",
) -> None:
    """Show the runs of a folder live in a browser, where you can also stop, resume, extend and export them."""
    import secrets

    import uvicorn

    from cluster.jobs import RayJobs
    from evolver.dashboard.app import build_app
    from evolver.dashboard.listener import listener_at
    from evolver.runs.about import runs_in
    from evolver.storage import storage_at

    root = storage_at(results)
    runs_in(root)  # what cannot be read is refused here, not in the browser
    token = secrets.token_urlsafe(24)
    listener = listener_at(host, port)
    address = f"{host}:{listener.getsockname()[1]}"
    typer.echo(f"http://{address}/?token={token}")
    hosts = frozenset({host, "127.0.0.1", "localhost"})
    made = build_app(root, token, RayJobs(), hosts)
    server = uvicorn.Server(uvicorn.Config(made, log_level="warning"))
    server.run(sockets=[listener])


@app.command()
def report(
    folder: Annotated[str, typer.Argument(help="the folder of a run, or its URI")],
    out: Annotated[str | None, typer.Option(help="folder to write to; default: the run's folder")] = None,
) -> None:
    """Write the report of a run again: as Markdown, as one HTML file, and its tables as CSV."""
    from evolver.report.report import write_again
    from evolver.storage import storage_at

    target = storage_at(folder if out is None else out)
    typer.echo(write_again(storage_at(folder), target))
    typer.echo(f"{target.location}/report.html")


@app.command()
def bundle(
    folder: Annotated[str, typer.Argument(help="the folder of a run, or its URI")],
    out: Annotated[
        Path | None, typer.Option(help="folder to write, new or empty; default: the run's name and -bundle, here")
    ] = None,
) -> None:
    """Write a finished run as one folder that a browser opens without a server: report, tables, recipe, no models."""
    from evolver.report.bundle import write_bundle
    from evolver.storage import storage_at
    from evolver.storage.paths import last_part

    run = storage_at(folder)
    target = out or Path(f"{last_part(run.location)}-bundle")
    typer.echo(write_bundle(run, target))
    typer.echo(target / "index.html")


app.command()(exporting.export)


@app.command()
def study(
    folder: Annotated[str, typer.Argument(help="the folder of a run, or its URI")],
    out: Annotated[
        str,
        typer.Argument(
            help="SQLite file to write, which must not exist; a journal, if its name ends with .journal or .log; or a "
            "database, as postgresql://USER:PASSWORD@HOST/DATABASE"
        ),
    ],
) -> None:
    """Write a coefficient search as an Optuna study, for optuna-dashboard and other tools of Optuna's."""
    from evolver.driver.prepare import prepare_run
    from evolver.runs.history import read_history
    from evolver.search.continued import continued
    from evolver.search.study import write_study
    from evolver.search.study_target import shown_with, study_target
    from evolver.storage import storage_at
    from evolver.storage.paths import last_part

    run = storage_at(folder)
    target = study_target(out)  # a database that does not answer is found before the models are read
    scored = read_history(run).stages["search"]
    found = {(c.number, c.recipe.id): r for c, r in scored}
    prepared = prepare_run(run)
    listed = [candidate for candidate, _ in scored[: prepared.taken_over]]
    search = continued(listed, prepared.search) if listed else prepared.search
    # By its folder: a run may have another name than its configuration says, and one database holds many runs.
    count = write_study(search, lambda c: found.get((c.number, c.recipe.id)), last_part(run.location), target)
    shown = shown_with(out)
    typer.echo(f"{shown.removeprefix('sqlite:///')}: {count} trials; optuna-dashboard {shown} shows them")


@app.command()
def evaluate(
    config: Annotated[Path, typer.Argument(help="the YAML file of a run; its base and tasks are used")],
    models: Annotated[list[str], typer.Argument(help="folders, hub ids or URIs of models")],
    dev: Annotated[bool, typer.Option(help="score on the dev items; default: the report items")] = False,
) -> None:
    """Score any models on the tasks of a configuration, and print them in one table with 95 % intervals."""
    from evolver.commands.evaluate import score_models, score_table

    def warn(sentence: str) -> None:
        typer.echo(f"warning: {sentence}", err=True)

    typer.echo(score_table(score_models(str(config), models, "dev" if dev else "report", warn)))


@app.command("compare")
def compare_side_by_side(
    runs: Annotated[list[str], typer.Argument(help="the folders of two or more runs, or their URIs")],
    out: Annotated[
        str | None, typer.Option(help="also write the comparison as Markdown and HTML to this folder")
    ] = None,
) -> None:
    """Compare runs: best score against scored items, winners on shared report items, and keys that differ."""
    from evolver.report.compare import compare_runs, comparison_text, write_comparison
    from evolver.storage import storage_at

    found = compare_runs([storage_at(folder) for folder in runs])
    typer.echo(comparison_text(found).rstrip())
    if out is not None:
        target = storage_at(out)
        write_comparison(target, found)
        typer.echo(f"{target.location}/comparison.html")


@app.command()
def gate(
    first: Annotated[str, typer.Argument(metavar="A", help="folder, hub id or URI of the model to let through")],
    second: Annotated[str, typer.Argument(metavar="B", help="the model that it must not be worse than")],
    config: Annotated[Path, typer.Option(help="the YAML file of a run; its base and tasks are used")],
    max_items: Annotated[
        int | None, typer.Option(min=1, help="score each model on at most so many items; default: all")
    ] = None,
    margin: Annotated[
        float, typer.Option(help="by how much A may be worse, as a difference of scores: 0.01 is one point")
    ] = 0.01,
    error_rate: Annotated[
        float, typer.Option(help="probability with which either verdict may be wrong, at most")
    ] = 0.05,
    dev: Annotated[bool, typer.Option(help="score on the dev items; default: the report items")] = False,
) -> None:
    """Say whether model A is worse than model B, by a sequential paired test on as few items as that takes.

    Exit status: 0 if A is not worse by more than the margin, 4 if it is, 5 if the items do not decide it.
    """
    from evolver.commands.gate import gate_text, pass_gate

    def warn(sentence: str) -> None:
        typer.echo(f"warning: {sentence}", err=True)

    found = pass_gate(
        str(config), first, second, split="dev" if dev else "report", most=max_items, margin=margin, alpha=error_rate,
        warn=warn,
    )  # fmt: skip
    typer.echo(gate_text(found, first, second))
    raise typer.Exit(found.status)


@app.command()
def stats(
    config: Annotated[Path, typer.Argument(help="the YAML file of a run")],
    kind: Annotated[
        list[str] | None,
        typer.Option(help="a kind, such as gram or fisher; default: what the search needs"),
    ] = None,
) -> None:
    """Collect the statistics of the experts that merge methods need, or continue where an earlier call stopped."""
    from evolver.config.reading import config_at

    written = config_at(config)
    # These bring torch.
    from cluster.job import choose_for_workers, device_of, make_pool
    from evolver.commands.collecting import collect_statistics

    device = device_of(written.parsed(), written.origin)
    for found in collect_statistics(written, kind or [], device, make_pool, choose_for_workers):
        typer.echo(found.line)


@app.command()
def searches(
    name: Annotated[str | None, typer.Argument(help="name of one search or preset; default: all")] = None,
) -> None:
    """List the searches and their settings, and the presets, which are published searches."""
    from evolver.commands.words import first_paragraph
    from evolver.config.presets import presets
    from evolver.errors import nearest
    from evolver.search import SEARCHES

    known = {*SEARCHES, *presets()}
    if name is not None and name not in known:
        raise BadInput(f"evolver searches: unknown search {name!r}; {nearest(name, known)}")
    console = tables.console()
    for algorithm in (a for a in SEARCHES.values() if name in (None, a.name)):
        console.print(f"[bold]{algorithm.name}[/bold]  {first_paragraph(algorithm.build)}", highlight=False)
        console.print(tables.settings_table(algorithm))
    if found := [preset for preset in presets().values() if name in (None, preset.name)]:
        console.print("Presets, as in [bold]search: {preset: NAME}[/bold]; docs/presets.md says more.", highlight=False)
        console.print(tables.presets_table(found))


@app.command()
def doctor(
    prepare: Annotated[
        bool, typer.Option("--prepare", help="first compile the loops that the first merge would otherwise compile")
    ] = False,
) -> None:
    """Show what this machine offers, what a run would use of it, and what is missing."""
    from evolver.commands import doctor as looking

    if prepare:
        typer.echo(looking.compile_ahead())
    tables.console().print(tables.findings_table(looking.findings()))


@app.command()
def merge(
    config: Annotated[Path, typer.Argument(help="a mergekit YAML file")],
    out: Annotated[Path, typer.Argument(help="folder to write, new or empty")],
    cuda: Annotated[bool, typer.Option(help="compute on the GPU")] = False,
    device: mk.Device = None,
    gpu_rich: mk.GpuRich = False,
    copy_tokenizer: Annotated[bool, typer.Option(help="copy the tokenizer to the merged model")] = True,
    write_model_card: Annotated[bool, typer.Option(help="write a README and a copy of the mergekit file")] = True,
    out_shard_size: Annotated[
        str, typer.Option(help="largest size of a weights file, such as 5B or 500M bytes")
    ] = "5B",
    random_seed: Annotated[int, typer.Option(help="seed of methods that draw at random")] = 0,
    strict: Annotated[bool, typer.Option(help="refuse models that are no fine-tunes of the base")] = False,
    align: mk.Align = "none",
    statistics: mk.StatisticsFrom = None,
    num_threads: Annotated[int, typer.Option("--num-threads", "-j", help="CPU threads; 0 means all cores")] = 0,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="print nothing")] = False,
    verbose: mk.Verbosity = 0, async_write: mk.NoEffect = False, write_threads: mk.NoEffectCount = None,
    lazy_unpickle: mk.NoEffect = False, clone_tensors: mk.NoEffect = False, low_cpu_memory: mk.NoEffect = False,
    read_to_gpu: mk.NoEffect = False, multi_gpu: mk.NoEffect = False, lora_merge_cache: mk.NoEffectText = None,
    safe_serialization: mk.NoEffect = True, trust_remote_code: mk.Refused = False, allow_crimes: mk.Refused = False,
    unsafe_truncate_embeddings: mk.Refused = False, lora_merge_dtype: mk.RefusedText = None,
    transformers_cache: mk.RefusedText = None,
) -> None:  # fmt: skip
    """Merge models as a mergekit file says. All options of mergekit-yaml are taken, those without effect here, too."""
    del verbose, async_write, write_threads, lazy_unpickle, clone_tensors, low_cpu_memory, read_to_gpu, multi_gpu
    del lora_merge_cache
    mk.refuse_options({
        "--trust-remote-code": trust_remote_code, "--allow-crimes": allow_crimes,
        "--no-safe-serialization": not safe_serialization, "--unsafe-truncate-embeddings": unsafe_truncate_embeddings,
        "--lora-merge-dtype": lora_merge_dtype, "--transformers-cache": transformers_cache,
    })  # fmt: skip
    import torch

    from evolver.commands import merge as merging

    if num_threads:
        torch.set_num_threads(num_threads)
    merging.merge_file(
        config, out, device=mk.chosen_device(cuda or gpu_rich, device), seed=random_seed,
        shard_bytes=_bytes(out_shard_size), tokenizer=copy_tokenizer, card=write_model_card,
        strict=strict, align=align, statistics=statistics,
        warn=lambda line: None if quiet else typer.echo(f"warning: {line}", err=True),
    )  # fmt: skip
    if not quiet:
        typer.echo(f"wrote {out}")


@app.command()
def extract(
    base: Annotated[
        str, typer.Argument(help="folder, hub id or URI of the base; for a whole pool, the YAML file of a run")
    ],
    model: Annotated[
        str, typer.Argument(help="folder, hub id or URI of a fine-tune of the base; for a pool, the folder to write")
    ],
    out: Annotated[
        Path | None, typer.Argument(help="folder to write, new or empty; left out for a pool", show_default=False)
    ] = None,
    rank: Annotated[int | None, typer.Option("--rank", "-r", min=1, help="rank of the adapter")] = None,
    energy: Annotated[
        float | None, typer.Option(help="instead of a rank: the share (0 to 1) of the squared difference to keep")
    ] = None,
) -> None:
    """Write what a model changed in its base as a LoRA adapter, and say how much of the change the adapter holds.

    With the YAML file of a run instead of two models, it writes one adapter for each expert.
    """
    from evolver.commands.extract import extract_lora, extract_pool

    exporting.check_energy(energy)

    def warn(line: str) -> None:
        typer.echo(f"warning: {line}", err=True)

    if out is None:
        for name, adapter in extract_pool(Path(base), Path(model), rank=rank, energy=energy, warn=warn).items():
            typer.echo(f"{Path(model) / name}: {adapter.said}")
        return
    made = extract_lora(base, model, out, rank=rank, energy=energy, warn=warn)
    typer.echo(f"{out}: {made.said}")


@app.command()
def explain(
    config: Annotated[
        Path,
        typer.Argument(help="a mergekit file, the YAML file of a run, the folder of a finished run, or a model folder"),
    ],
    prompts: Annotated[
        bool,
        typer.Option(
            "--prompts",
            help="for the file or the folder of a run: print the prompts of the first dev items instead, as the model "
            "reads them",
        ),
    ] = False,
    experts: Annotated[
        bool,
        typer.Option(
            "--experts",
            help="for a mergekit file or the file of a run: print instead how large the experts' changes are and how "
            "much alike, by layer; the weights are read",
        ),
    ] = False,
    picture: Annotated[Path | None, typer.Option(help="with --experts: write a picture of it, a PNG file")] = None,
) -> None:
    """Print, for every tensor of a merge, which method makes it and which settings apply.

    Of a model folder without a mergekit file it prints under which name every tensor is read.
    """
    from evolver.commands import explain as explaining

    if experts or picture is not None:
        _explain_experts(config, experts, prompts, picture)
        return
    if explaining.is_model(config) and not prompts:
        typer.echo(explaining.names_table(config))
        return
    for line in explaining.preset_set(config):
        typer.echo(line, err=True)
    if prompts:
        typer.echo(explaining.prompts(config))
        return
    for line in explaining.searched(config):
        typer.echo(line)
    typer.echo(explaining.table(explaining.explain(config)))


def _explain_experts(config: Path, asked: bool, prompts: bool, picture: Path | None) -> None:
    """Print what the experts' task vectors have in common, and write the picture."""
    from evolver.commands.experts import ancestry_text, experts_picture, experts_text
    from evolver.commands.explain import experts_compared, row_cosines

    if prompts or not asked:
        other = "--prompts shows something else" if prompts else "--picture is a picture of what --experts prints"
        raise BadInput(f"evolver explain: {other}; write --experts alone, or with --picture FILE.")
    with tables.counting("tensors measured") as measured:
        names, model, layers = experts_compared(config, measured)
    typer.echo(experts_text(names, model, layers))
    if rows := row_cosines(config):
        typer.echo(f"\n{ancestry_text(rows)}")
    if picture is not None:
        try:
            picture.write_bytes(experts_picture(names, model, layers))
        except OSError as error:
            raise BadInput(file_sentence(error, str(picture))) from error


@app.command()
def methods(name: Annotated[str | None, typer.Argument(help="name of one method; default: all")] = None) -> None:
    """List the merge methods with their settings, defaults, search ranges and papers."""
    from evolver.commands.words import first_paragraph, remarks_of
    from evolver.merging.methods import METHODS, get

    console = tables.console()
    if name is None:
        console.print(tables.methods_table(METHODS.values()))
        return
    method = get(name, "evolver methods")
    said = "\n".join([first_paragraph(method.function), *remarks_of(method)])
    console.print(f"[bold]{method.name}[/bold] ({method.paper})\n{said}", highlight=False)
    console.print(tables.method_table(method))


@app.command()
def experts(
    config: Annotated[
        Path, typer.Argument(help="the YAML file of a pool of experts, such as configs/pools/emotion.yaml")
    ],
    measure: Annotated[bool, typer.Option(help="at the end, score base and experts on the pool's tasks")] = True,
) -> None:
    """Train a pool of experts for experiments, as far as they are not there yet, and score them."""
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
    config: Annotated[Path, typer.Argument(help="the YAML file of the sweep")],
    results: Annotated[str, typer.Option(help="folder for all runs, or its URI")] = "results",
    at_once: Annotated[int, typer.Option(min=1, help="number of runs at the same time")] = 1,
    address: Annotated[
        str | None, typer.Option(help="address of a Ray cluster's dashboard; every run then becomes a Ray job there")
    ] = None,
) -> None:
    """Run a grid of configurations and seeds, skipping runs that are done, and gather the results into one table."""
    from cluster.sweep import gather, load_sweep, run_all

    found = load_sweep(config)
    ended = run_all(found, results, at_once, address, typer.echo)
    typer.echo(gather(found, results))
    if any(ended.values()):
        raise typer.Exit(3)


def main() -> None:
    """Run the command line. Bad input ends with one sentence on standard error and exit status 2."""
    let_threads_sleep()
    # Importing torch creates half a million objects that stay alive. Python's garbage collector would search them
    # during the import and at the end, which takes a third of a second of every command.
    gc.set_threshold(SELDOM)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names of files need not be valid text
    try:
        app()
    except BadInput as error:
        typer.echo(str(error), err=True)
        raise SystemExit(2) from None
    except OSError as error:
        if not takes_nothing(error):
            raise
        typer.echo(file_sentence(error, "a file of this command"), err=True)
        with contextlib.suppress(OSError):  # what is left of the output, of which Python would complain at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(2) from None
    finally:
        gc.freeze()


def _job(config: Path, results: str | None, name: str | None, retry_failed: bool = False) -> int:
    """Run a search as ``evolve.py`` does, and return its exit status."""
    from cluster.command import run_job as job

    given = [*(["--results", results] if results is not None else []), *(["--run", name] if name is not None else [])]
    return job([str(config), *given, *(["--retry-failed"] if retry_failed else [])])


def _bytes(size: str) -> int:
    match = re.fullmatch(r"(\d+)([KMGB]?)", size.upper())
    if match is None or int(match.group(1)) == 0:
        raise BadInput(
            f"--out-shard-size: {size!r} is not usable; write a number of bytes with K, M, B or G, such as 500M or 5B."
        )
    return int(match.group(1)) * UNITS[match.group(2)]
