"""The table of a run: every model that it scored, its recipe, and its answers to every item, without any text.

Selection rules can be compared on such a table without scoring anything again. Several runs over the same items make
one table: an item is known by its task and the hash of its content, and a model by the id of its recipe.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from evolver import ledger
from evolver.config.changes import FREE_EVALUATION_KEYS, FREE_TASK_KEYS
from evolver.config.evaluation import EvaluationSettings
from evolver.errors import BadInput
from evolver.records import Split, split_of
from evolver.records.graph import NodeTable, UnknownNode
from evolver.records.noise import Noise
from evolver.records.order import item_order
from evolver.records.recipe import Cross, Merge, Recipe, dump_recipe
from evolver.runs.about import About, read_about
from evolver.runs.files import IDENTITY_FILE, mapping_of
from evolver.runs.table_card import card
from evolver.storage import Storage, check_export, exported_folder

# Keys of ``evaluation``, and of its tasks, that say which items are scored and how, and not what an answer means.
AMOUNTS = {
    *FREE_EVALUATION_KEYS, "tasks", "block_items", "quantise_search", "batch_tokens", "batch_size", "threads",
}  # fmt: skip
AMOUNTS_OF_TASK = {*FREE_TASK_KEYS, "dev", "select", "report"}
ItemKey = tuple[str, str]


@dataclass(frozen=True)
class AnswerTable:
    """All answers of one run or several.

    Attributes:
        runs: names of the runs.
        items: one row for each item: task, hash, split, weight, label.
        models: one row for each model: recipe_id, kind, method, settings, inputs, recipe, complete (whether it has
            answered all dev items), answers, and probabilities of the right answers if any is known. Answers and
            probabilities are in the order of the items, null where the item was not scored or nothing is known.
        proposals: one row for each result of a run: run, stage, number, recipe_id, label, proposer, parents, limit,
            status, score, scored.
    """

    runs: tuple[str, ...]
    items: pa.Table
    models: pa.Table
    proposals: pa.Table


def export_table(runs: Sequence[Storage], out: Path, force: bool = False) -> str:
    """Write the table of runs over the same items into a new folder, and return what was written, in one sentence.

    Raises BadInput for what ``join_runs`` refuses, and if something else is at ``out``.
    """
    check_export(out, force)
    found = join_runs(runs)
    with exported_folder(out, force) as folder:
        write_table(found, folder)
    return f"{out}: {found.models.num_rows} models × {found.items.num_rows} items of {', '.join(found.runs)}"


def write_table(table: AnswerTable, folder: Path) -> None:
    """Write a table and its data card into a folder."""
    for name in ("items", "models", "proposals"):
        pq.write_table(getattr(table, name), folder / f"{name}.parquet", compression="zstd", compression_level=19)
    (folder / "README.md").write_text(card(table.runs, table.items, table.models, table.proposals))


def join_runs(runs: Sequence[Storage]) -> AnswerTable:
    """The table of one run, or of several over the same items. The runs may be going on meanwhile.

    Raises BadInput for a folder that holds no run, for one without any result, for runs that share no item, and for
    runs in which an answer means something else.
    """
    abouts = [read_about(run) for run in runs]
    for run in runs[1:]:
        _refuse_other_scoring(runs[0], run)
    items: dict[ItemKey, dict[str, Any]] = {}
    places: list[dict[str, NDArray[np.int64]]] = []
    for run, about in zip(runs, abouts, strict=True):
        own = _items(run, about)
        if items and not any(key in items for keys in own.values() for key in keys):
            raise BadInput(
                f"{run.location}: this run shares no item with {runs[0].location}; give runs over the same items, or "
                "export them one by one."
            )
        for rows in own.values():
            items.update({key: row for key, row in rows.items() if key not in items})
        at = {key: place for place, key in enumerate(items)}
        places.append({split: np.array([at[key] for key in rows], dtype=np.int64) for split, rows in own.items()})
    models = _Models(len(items))
    proposals: list[dict[str, Any]] = []
    for run, about, at_split in zip(runs, abouts, places, strict=True):
        count = len(proposals)
        proposals += list(_results(run, about.config.run, at_split, models))
        if len(proposals) == count:
            raise BadInput(
                f"{run.location}: no model of this run has been scored yet; continue the run first (evolver resume)."
            )
    rows = pa.Table.from_pylist(list(items.values()), schema=ITEM_COLUMNS)
    return AnswerTable(
        tuple(about.config.run for about in abouts), rows, models.table([r["split"] == "dev" for r in items.values()]),
        pa.Table.from_pylist(proposals, schema=PROPOSAL_COLUMNS),
    )  # fmt: skip


ITEM_COLUMNS = pa.schema(
    [
        ("task", pa.string()),
        ("hash", pa.string()),
        ("split", pa.string()),
        ("weight", pa.float64()),
        ("label", pa.float64()),
    ]
)
OF_LEDGER = ("stage", "number", "recipe_id", "label", "proposer", "parents", "limit", "status", "score")
PROPOSAL_COLUMNS = pa.schema(
    [("run", pa.string()), *((name, ledger.SCHEMA.field(name).type) for name in OF_LEDGER), ("scored", pa.int64())]
)


class _Models:
    """The models of a table and their answers to N items, NaN where an item was not scored."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._answers: dict[str, NDArray[np.float32]] = {}
        self._probabilities: dict[str, NDArray[np.float32]] = {}
        self._recipes: dict[str, Recipe] = {}

    def add(self, recipe: Recipe, places: NDArray[np.int64], answers: NDArray[np.float64]) -> None:
        """Note a model's answers to the items at these places. Of two answers to an item the first one is kept."""
        self._recipes.setdefault(recipe.id, recipe)
        row = self._answers.setdefault(recipe.id, np.full(self._count, np.nan, dtype=np.float32))
        new = np.isnan(row[places])
        row[places[new]] = answers[new]

    def add_probabilities(self, recipe_id: str, places: NDArray[np.int64], found: NDArray[np.float32]) -> None:
        """Note how probable a model that was added finds the right answers to the items at these places."""
        row = self._probabilities.setdefault(recipe_id, np.full(self._count, np.nan, dtype=np.float32))
        row[places] = np.where(np.isnan(row[places]), found, row[places])

    def table(self, dev: Sequence[bool]) -> pa.Table:
        """One row for each model. Where every answer is right or wrong, the answers are bits.

        Args:
            dev: which items are dev items, (N).
        """
        found = np.stack(list(self._answers.values()))
        missing = np.isnan(found)
        bits = bool(np.all(missing | (found == 0) | (found == 1)))
        flat = found.ravel() == 1 if bits else found.ravel()
        values = pa.array(flat, type=pa.bool_() if bits else pa.float32(), mask=missing.ravel())
        offsets = np.arange(0, found.size + 1, self._count, dtype=np.int64)
        rows = [_described(recipe) for recipe in self._recipes.values()]
        columns = {name: [row[name] for row in rows] for name in rows[0]}
        complete = ~missing[:, np.asarray(dev)].any(1)
        answers = pa.LargeListArray.from_arrays(offsets, values).cast(pa.list_(values.type))
        more = {"probabilities": self._likely()} if self._probabilities else {}
        return pa.table({**columns, "complete": complete, "answers": answers, **more})

    def _likely(self) -> pa.Array:
        """The probabilities of every model, in 16 bits each; null for a model of which none is known."""
        rows = [
            None if found is None else pa.array(found.astype(np.float16), mask=np.isnan(found))
            for found in map(self._probabilities.get, self._answers)
        ]
        return pa.array(rows, type=pa.list_(pa.float16()))


def _described(recipe: Recipe) -> dict[str, Any]:
    """What the table says of a model beside its answers."""
    settings: Any = {}
    if isinstance(recipe, Merge):
        settings = [rule.form() for rule in recipe.rules]
    elif isinstance(recipe, Cross):
        settings = {key: getattr(recipe, key) for key in ("strategy", "F", "Cr", "seed", "mask")}
    elif isinstance(recipe, Noise):
        settings = {"terms": recipe.terms, "distribution": recipe.distribution, "rank": recipe.rank}
    method = recipe.method if isinstance(recipe, Merge) else recipe.kind
    return {
        "recipe_id": recipe.id, "kind": recipe.kind, "method": method, "settings": json.dumps(settings),
        "inputs": [node.id for node in recipe.inputs], "recipe": dump_recipe(recipe),
    }  # fmt: skip


def _items(run: Storage, about: About) -> dict[Split, dict[ItemKey, dict[str, Any]]]:
    """The items of every split, in the order in which the answers to them are in the ledger."""
    found: dict[Split, dict[ItemKey, dict[str, Any]]] = {split: {} for split in about.scales}
    for row in ledger.items_of(run):
        split, scale = row["split"], about.scales[row["split"]]
        place = len(found[split])
        task = scale.tasks[place]
        label = scale.right[place] if scale.right and scale.metrics[task].compares else None
        found[split][row["task"], row["hash"]] = {
            "task": task, "hash": row["hash"], "split": split, "weight": scale.task_share(task), "label": label,
        }  # fmt: skip
    return found


def _results(
    run: Storage, name: str, places: Mapping[str, NDArray[np.int64]], models: _Models
) -> Iterator[dict[str, Any]]:
    """The rows of a run's results; their answers are added to the models."""
    parts = ledger.standing(ledger.read_all_parts(run.folder("ledger"))).values()
    nodes = ledger.nodes_of(parts)
    for part in parts:
        read = {*PROPOSAL_COLUMNS.names, "event", "complete", "order", "given"}
        rows = part.select([name for name in part.column_names if name in read])
        for batch, row in enumerate(rows.to_pylist()):
            if row.pop("event") != "finished" or (recipe := _recipe(row, nodes, run)) is None:
                continue
            answers = np.asarray(part["items"][batch].values, dtype=np.float64)
            likely = np.asarray(part["probabilities"][batch].values, dtype=np.float32)
            own = places[split_of(row["stage"])]
            asked = own[list(item_order(row.pop("order"), len(own)))]
            at = (own if row.pop("complete") else asked)[: len(answers)]
            new = asked[row.pop("given") :][: len(likely)]
            if len(answers):
                models.add(recipe, at, answers[: len(at)])
            if len(new):
                models.add_probabilities(row["recipe_id"], new, likely[: len(new)])
            yield {"run": name, **row, "scored": len(answers)}


def _recipe(row: Mapping[str, Any], nodes: NodeTable, run: Storage) -> Recipe | None:
    """The recipe of a row; None where a part of it was lost with a damaged file."""
    try:
        return nodes.recipe(row["recipe_id"])
    except UnknownNode:
        return None
    except ValueError as error:
        reason = f"the recipe of candidate {row['number']} of stage {row['stage']} cannot be read"
        raise ledger.damaged(f"{run.location}/ledger", reason) from error


def _refuse_other_scoring(first: Storage, other: Storage) -> None:
    """Raises BadInput where two runs score in another way, so that their answers cannot stand in one table."""
    one, two = (_scoring(mapping_of(run, IDENTITY_FILE, "restore the file from a copy")) for run in (first, other))
    differing = sorted(key for key in {*one, *two} if one.get(key) != two.get(key))
    if differing:
        raise BadInput(
            f"{other.location}: this run scores items in another way than {first.location} ({differing[0]} differs); "
            "export them one by one."
        )


def _scoring(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What decides the answer of a model to an item, by key."""
    before = {n: f.default for n, f in EvaluationSettings.model_fields.items() if not f.is_required()}
    evaluation = before | identity["evaluation"]  # runs from before there was a key behave as by its default
    found = {f"evaluation.{k}": v for k, v in evaluation.items() if k not in AMOUNTS}
    found |= {f"model.{k}": v for k, v in identity["model"].items() if k in ("kind", "compute", "base", "tokenizer")}
    for task in evaluation["tasks"]:
        own = {k: v for k, v in task.items() if k not in AMOUNTS_OF_TASK and v is not None}
        found[f"evaluation.tasks, {task['task']}"] = own
    return found
