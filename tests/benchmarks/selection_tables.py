"""Makes the published tables of answers from runs: ``python tests/benchmarks/selection_tables.py NAME RUN RUN …``.

It writes ``results/tables/NAME/`` and, from all tables there, ``results/tables/README.md``. ``configs`` says which runs
it took: the experts of a pool are trained by ``make pools``, and each run is a search over them with ``early_stopping:
false``, so that every model answers every dev item. Runs that are still going on are taken as they are.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from collections import Counter
from pathlib import Path

import pyarrow.compute as pc
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from evolver.config import Config  # noqa: E402
from evolver.report.text import markdown_table  # noqa: E402
from evolver.runs.about import read_about  # noqa: E402
from evolver.runs.table import join_runs, write_table  # noqa: E402
from evolver.storage import Storage, storage_at  # noqa: E402

TABLES = ROOT / "results" / "tables"
MOST_BYTES = 20 * 2**20
HEAD = """# Tables of answers

Each folder holds the answers of merged models to items, as `evolver export --table` writes them: which model answered
which item right, and how each model was made, without any text. Rules for choosing among merges can be compared on them
in moments; [the page on selection](../benchmarks/selection.md) does so (`make benchmark-selection`). The `README.md` in
each folder explains its columns.

The tables are made by `python tests/benchmarks/selection_tables.py NAME RUN RUN …` from the folders of runs. The
experts are those of the pools that `make pools` trains (configs/pools). Every run is a search over them with
`evaluation.early_stopping: false`, so that each model answers all dev items, and with the same seed, so that all runs
of a pool have the same items. A search named random draws its coefficients at random (`tpe` that never ends its
startup); the others are adaptive, so they proposed later models for what earlier ones scored on these items. Models
compute in bfloat16.

`correction.csv` has a row for each of some searches of the demo: the dev score of the winner, the same after the
bootstrap correction, and its report score; and the mean dev and report scores of the models that no search has chosen.
`python tests/benchmarks/correction_runs.py` makes it.
"""


def main() -> None:
    """Join the runs, write the table, and say how it was made."""
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("name", help="name of the table, such as emotion-l3")
    given.add_argument("runs", nargs="+", help="folders of the runs")
    asked = given.parse_args()
    storages = [storage_at(run) for run in asked.runs]
    folder = TABLES / asked.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_table(join_runs(storages), folder)
    _say_how(folder, storages)
    _write_index()
    size = sum(file.stat().st_size for file in TABLES.rglob("*") if file.is_file())
    if size > MOST_BYTES:
        raise SystemExit(f"{TABLES}: {size / 2**20:.1f} MB are more than {MOST_BYTES / 2**20:.0f} MB; give fewer runs.")
    print((folder / "README.md").read_text())


def _say_how(folder: Path, runs: list[Storage]) -> None:
    """Add to a table's card which searches its models come from."""
    counts = Counter(pq.read_table(folder / "proposals.parquet", columns=["run"])["run"].to_pylist())
    configs = [read_about(run).config for run in runs]
    rows = [[c.run, _search(c), str(counts[c.run]), _tasks(c)] for c in configs]
    made = markdown_table(["run", "search", "results", "dev items of each task"], rows)
    experts = ", ".join(configs[0].experts)
    with (folder / "README.md").open("a") as file:
        file.write(f"\n## How it was made\n\nExperts: {experts}.\n\n{made}\n")


def _search(config: Config) -> str:
    settings = {k: v for k, v in config.search.items() if k != "algorithm"}
    if settings.get("startup", 0) > (config.budget.candidates or 0):
        settings.pop("startup")
        name = "random"
    else:
        name = str(config.search["algorithm"])
    return ", ".join([name, *(f"{key}: {value}" for key, value in settings.items())])


def _tasks(config: Config) -> str:
    return ", ".join(f"{task.task} {task.dev}" for task in config.evaluation.tasks)


def _write_index() -> None:
    """Write the page that lists all tables."""
    rows = []
    for folder in sorted(p for p in TABLES.iterdir() if p.is_dir()):
        models, items = (pq.read_table(folder / f"{name}.parquet") for name in ("models", "items"))
        dev = pc.sum(pc.equal(items["split"], "dev")).as_py()
        size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
        complete = pc.sum(models["complete"]).as_py()
        rows.append([f"[{folder.name}]({folder.name}/README.md)", str(complete), str(dev), f"{size:.1f} MB"])
    table = markdown_table(["table", "models that answered all dev items", "dev items", "size"], rows)
    (TABLES / "README.md").write_text(f"{HEAD}\n{table}\n")


if __name__ == "__main__":
    main()
