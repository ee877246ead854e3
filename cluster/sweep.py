"""A sweep: a grid of configurations and seeds. Each cell of the grid is a run of its own; one table gathers them."""

from __future__ import annotations

import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from cluster.connection import check_dashboard, no_answer
from evolver.config import Config
from evolver.config.reading import check_config, check_section, config_at
from evolver.config.section import NAME, Section
from evolver.errors import BadInput, file_sentence
from evolver.records.canonical import content_hash
from evolver.report.text import markdown_table
from evolver.runs.files import summary_of
from evolver.storage import storage_at

POLL_SECONDS = 5.0


class SweepSettings(Section):
    """The keys of a sweep file."""

    sweep: str = Field(pattern=NAME, description="name of the sweep; the names of its runs begin with it")
    config: str = Field(description="YAML file of a run; a relative path starts at the folder of the sweep file")
    vary: dict[str, list[Any]] = Field(
        min_length=1, description="key of the configuration (search.F) → its values; every combination is a run"
    )


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: name of the run, which is the sweep's name and a hash of the values.
        values: the keys that are varied, with their values in this run.
        config: the whole configuration of the run.
    """

    name: str
    values: dict[str, Any]
    config: dict[str, Any]


@dataclass(frozen=True)
class Sweep:
    """The name of a sweep and the cells of its grid, in which the last key varies fastest."""

    name: str
    cells: tuple[Cell, ...]


def load_sweep(file: Path) -> Sweep:
    """Read a sweep file and check the configuration of every run in it.

    Raises BadInput, naming file and key, for a file or a configuration that is wrong, and for values that stand twice.
    """
    settings = check_section(SweepSettings, config_at(file).mapping(SweepSettings.model_fields), str(file))
    base = config_at(file.parent / settings.config).mapping(Config.model_fields)
    for key, listed in settings.vary.items():
        if not listed:
            raise BadInput(f"{file}: vary.{key}: the list is empty; list at least one value.")
    cells = []
    for combination in itertools.product(*settings.vary.values()):
        values = dict(zip(settings.vary, combination, strict=True))
        config = json.loads(json.dumps(base))
        for key, value in values.items():
            _set(config, key, value, f"{file}: vary.{key}")
        config["run"] = f"{settings.sweep}-{content_hash(values)[:8]}"
        check_config(config, f"{file} ({_said(values)})")
        cells.append(Cell(config["run"], values, config))
    if len({c.name for c in cells}) < len(cells):
        raise BadInput(f"{file}: vary: a value is listed twice; list every value once.")
    return Sweep(settings.sweep, tuple(cells))


def run_all(
    sweep: Sweep, results: str, at_once: int, address: str | None, say: Callable[[str], None]
) -> dict[str, int]:
    """Run every cell that is not done yet, and return the exit status of each run by its name.

    Args:
        results: folder of all runs, or its URI.
        at_once: how many runs go on at the same time.
        address: address of a Ray cluster's dashboard, where every run becomes a job; None: every run is a process on
            this machine.
        say: is called with each line that is to be printed.
    """
    # The files lie in the working folder because Ray copies this folder to a job (without what git ignores).
    start = _process if address is None else _job(address)
    files = _written(sweep, Path(".evolver-sweeps") / sweep.name)

    def run(cell: Cell) -> int:
        if summary_of(storage_at(results).folder(cell.name))[0]:
            say(f"{cell.name}: done already ({_said(cell.values)})")
            return 0
        say(f"{cell.name}: starts ({_said(cell.values)})")
        status, last = start(cell.name, files[cell.name], results)
        say(f"{cell.name}: " + ("done" if status == 0 else f"ended with status {status}: {last}"))
        return status

    with ThreadPoolExecutor(at_once) as pool:
        return dict(zip([c.name for c in sweep.cells], pool.map(run, sweep.cells), strict=True))


def _written(sweep: Sweep, folder: Path) -> dict[str, Path]:
    """The file of every run's configuration, by the run's name; they are written into a folder.

    Raises BadInput where they cannot be written.
    """
    files = {cell.name: folder / f"{cell.name}.yaml" for cell in sweep.cells}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for cell in sweep.cells:
            files[cell.name].write_text(yaml.safe_dump(cell.config, sort_keys=False))
    except OSError as error:
        raise BadInput(file_sentence(error, str(folder))) from error
    return files


def gather(sweep: Sweep, results: str) -> str:
    """The table of all runs in Markdown. Where seeds vary, a second table has their means and standard errors.

    The text is also written to ``<name of the sweep>.md`` in the folder of all runs.
    """
    root = storage_at(results)
    rows: list[list[str]] = []
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in sweep.cells:
        folder = root.folder(cell.name)
        found = summary_of(folder)[0] or None
        rows.append([cell.name, *_values(cell.values), *_figures(found)])
        if found and found["against"]:
            rest = {k: v for k, v in cell.values.items() if k != "seed"}
            groups.setdefault(_said(rest), []).append(found)
    head = ["run", *sweep.cells[0].values, "dev", "report", "− best expert", "p", "candidates", "items", "seconds"]
    text = markdown_table(head, rows)
    if "seed" in sweep.cells[0].values:
        together = [[said or "all", *_together(runs)] for said, runs in groups.items()]
        text += "\n\n" + markdown_table(["over the seeds", "runs", "report", "− best expert"], together)
    try:
        root.write(f"{sweep.name}.md", f"# {sweep.name}\n\n{text}\n".encode())
    except OSError as error:
        raise BadInput(file_sentence(error, root.location)) from error
    return text


def _figures(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return ["–"] * 7
    against = found["against"]
    gain = ["–", "–"] if against is None else [f"{against['difference']:+.4f}", f"{against['p']:.3g}"]
    scores = [_number(found["winner"]["dev"]), _number(found["winner"]["report"])]
    return [*scores, *gain, str(found["candidates"]), str(found["items"]), f"{found['seconds']:.0f}"]


def _together(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        str(len(runs)),
        _spread([r["winner"]["report"] for r in runs]),
        _spread([r["against"]["difference"] for r in runs], "+"),
    ]


def _spread(values: Sequence[float], sign: str = "") -> str:
    """Mean and standard error of some values; the mean alone of a single value."""
    mean = f"{statistics.fmean(values):{sign}.4f}"
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values) / math.sqrt(len(values)):.4f}"


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"


def _process(name: str, file: Path, results: str) -> tuple[int, str]:
    """Run a configuration in a process of this machine; its exit status, and the last line that it printed."""
    command = [sys.executable, "-m", "evolver", "run", str(file), "--results", results]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    said = (done.stderr or done.stdout).strip().splitlines()
    return done.returncode, said[-1] if said else "it said nothing"


def _job(address: str) -> Callable[[str, Path, str], tuple[int, str]]:
    check_dashboard(address)
    from ray.job_submission import JobStatus, JobSubmissionClient  # importing Ray takes seconds

    try:
        client = JobSubmissionClient(address)
    except (ConnectionError, RuntimeError) as error:  # something else answers there
        raise no_answer("--address", address, error) from error

    def run(name: str, file: Path, results: str) -> tuple[int, str]:
        known = {job.submission_id: job.status for job in client.list_jobs()}
        if name in known and JobStatus(known[name]).is_terminal():
            client.delete_job(name)  # frees the id for a new job; the run itself stays in its folder
        if name not in known or JobStatus(known[name]).is_terminal():
            command = f"python -m evolver run {file} --results {results}"  # runs in a clone and from a wheel
            client.submit_job(entrypoint=command, submission_id=name, runtime_env={"working_dir": os.getcwd()})
        while not client.get_job_status(name).is_terminal():
            time.sleep(POLL_SECONDS)
        if client.get_job_status(name) == JobStatus.SUCCEEDED:
            return 0, ""
        said = client.get_job_logs(name).strip().splitlines()
        return 3, said[-1] if said else "it said nothing"

    return run


def _set(config: dict[str, Any], key: str, value: Any, place: str) -> None:
    """Set a dotted key of a configuration; a number in it is an index in a list, as in ``evaluation.tasks.0.dev``."""
    *path, last = key.split(".")
    inside: Any = config
    for part in path:
        inside = inside.setdefault(part, {}) if isinstance(inside, dict) else _member(inside, part, place)
    if isinstance(inside, dict):
        inside[last] = value
    else:
        _member(inside, last, place)
        inside[int(last)] = value


def _member(inside: Any, part: str, place: str) -> Any:
    if not (isinstance(inside, list) and part.isdigit() and int(part) < len(inside)):
        raise BadInput(f"{place}: the configuration has no such key; in a list, use the index of a member.")
    return inside[int(part)]


def _values(values: Mapping[str, Any]) -> list[str]:
    return [v if isinstance(v, str) else json.dumps(v) for v in values.values()]


def _said(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{k} {v}" for k, v in zip(values, _values(values), strict=True))
