"""The settings of the merges of a report: what the search and the tuning of the plain merges found."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from evolver.records.noise import Noise
from evolver.records.recipe import Cross, Expert, Layers, Merge, Place, Recipe, ancestors
from evolver.report.text import escaped, layers_in_words, markdown_table, part_in_words
from evolver.runs.outcome import Outcome

# Rows that a report shows; all of them are in the CSV file.
MOST_ROWS = 40


def settings_section(outcome: Outcome) -> str:
    """The section of a report."""
    rows = [_cells(row) for row in merged_rows(outcome)]
    if not rows:
        return ""
    more = ""
    if len(rows) > MOST_ROWS:
        more = f" The first {MOST_ROWS} of {len(rows)} rows are shown; `evolver report` writes all to `settings.csv`."
    table = markdown_table(["model", "node", "method", "setting", "tensors", "value"], rows[:MOST_ROWS])
    return (
        "## The settings of the merges\n\nThe settings of the winner and of the merges without a search. A node is one "
        f"operation of a recipe, named by the first digits of its id.{more}\n\n{table}"
    )


def merged_rows(outcome: Outcome) -> Iterator[dict[str, Any]]:
    """A row for each setting of each operation of each merge; a setting with one number per input is one row."""
    for finalist in (outcome.winner, *outcome.finalists[:-1]):
        if finalist.label != "base" and finalist.label not in outcome.config.experts:
            if isinstance(finalist.recipe, Expert):
                given = _row("none", "", f"the expert {finalist.recipe.name} as it is")
                yield {"model": finalist.label, "node": finalist.recipe.id[:8], **given}
            for node in ancestors(finalist.recipe):
                for row in _of_node(node):
                    yield {"model": finalist.label, "node": node.id[:8], **row}


def setting_rows(outcome: Outcome) -> Iterator[dict[str, Any]]:
    """The same for CSV: a setting with one number per input is a row for each input."""
    for row in merged_rows(outcome):
        inputs, value = row.pop("inputs"), row.pop("value")
        if isinstance(value, tuple):
            yield from ({**row, "input": name, "value": v} for name, v in zip(inputs, value, strict=True))
        else:
            yield {**row, "input": "", "value": value}


def _of_node(node: Recipe) -> Iterator[dict[str, Any]]:
    if isinstance(node, Merge):
        names = [i.label for i in node.inputs]
        for rule in node.rules:
            for setting, value in rule.values:
                inputs = names if isinstance(value, tuple) and len(value) == len(names) else _numbered(value)
                yield _row(node.method, setting, value, _tensors(rule.place), inputs)
        if not node.rules:
            yield _row(node.method, "", "no settings")
    elif isinstance(node, Cross):
        for setting in ("strategy", "F", "Cr", "mask", "seed"):
            yield _row("crossover", setting, getattr(node, setting))
    elif isinstance(node, Noise):
        for setting in ("distribution", "rank"):
            yield _row("noise", setting, getattr(node, setting))
        yield _row("noise", "number of seeds", len(node.terms))
        yield _row("noise", "size (of a task vector)", node.size)
    elif isinstance(node, Layers):
        program = " ".join(f"{node.inputs[i].label}:{layer}" for i, layer in node.program)
        yield _row("layers", "program (model:layer)", program)


def _row(method: str, setting: str, value: Any, tensors: str = "all", inputs: Any = ()) -> dict[str, Any]:
    return {"method": method, "setting": setting, "tensors": tensors, "inputs": inputs, "value": value}


def _numbered(value: Any) -> list[str]:
    return [str(n) for n in range(1, len(value) + 1)] if isinstance(value, tuple) else []


def _tensors(place: Place) -> str:
    """Which tensors a rule is for, in words."""
    said = []
    if place.layers is not None:
        said.append(layers_in_words(place.layers))
    if place.outside:
        said.append("outside the layers")
    if place.contains:
        said.append(f"names with {place.contains}")
    if place.part is not None:
        said.append(part_in_words(place.part))
    return ", ".join(said) or "all"


def _cells(row: dict[str, Any]) -> list[str]:
    value = row["value"]
    if isinstance(value, tuple):
        shown = ", ".join(f"{name} {_number(v)}" for name, v in zip(row["inputs"], value, strict=True))
    else:
        shown = _number(value)
    cells = [row[key] for key in ("model", "node", "method", "setting", "tensors")]
    return [f"`{cell}`" if key == 1 else escaped(cell) for key, cell in enumerate(cells)] + [escaped(shown)]


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
