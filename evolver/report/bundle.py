"""A finished run as one folder that opens from a disk, without a server: report, tables, recipe and configuration."""

from __future__ import annotations

from pathlib import Path

from evolver.report.html import html_page
from evolver.report.report import CSV_FILES, finished
from evolver.report.text import escaped
from evolver.runs.files import RECIPE_FILE, RUN_FILE, SUMMARY_FILE
from evolver.storage import Storage, check_target, new_folder, storage_at

# What a bundle holds, and what each file is.
CONTENTS = {
    "report.html": "the report, with its pictures",
    "report.md": "the same as Markdown",
    "curve.png": "the picture of the report: the best dev score against scored items",
    CSV_FILES[0]: "every candidate: what was proposed, what it scored, what it took",
    CSV_FILES[1]: "every model on every task: raw and normalised scores",
    CSV_FILES[2]: "the settings of the winner and of the merges without a search",
    SUMMARY_FILE: "the figures of the report, for programs",
    RECIPE_FILE: "the recipe of the model in the run's folder `best/`, from which its weights can be rebuilt",
    RUN_FILE: "the configuration of the run",
}


def write_bundle(run: Storage, out: Path) -> str:
    """Write a run's bundle into a new folder. Models and items are not in it. Returns the verdict.

    Raises BadInput where the folder holds no finished run, where something is at ``out`` already, and where nothing can
    be written.
    """
    check_target(out)
    found = finished(run)
    copies = {name: run.read(name) for name in (RECIPE_FILE, RUN_FILE) if run.exists(name)}
    with new_folder(out) as folder:
        verdict = found.write(storage_at(folder))
        for name, content in copies.items():
            (folder / name).write_bytes(content)
        held = {name: what for name, what in CONTENTS.items() if (folder / name).exists()}
        lines = [f"- [{name}]({name}): {what}" for name, what in held.items()]
        name = found.outcome.config.run
        text = "\n\n".join([f"# {escaped(name)}", f"**{verdict}**", "\n".join(lines)])
        (folder / "index.html").write_text(html_page(text, name, lambda name: (folder / name).read_bytes()))
    return verdict
