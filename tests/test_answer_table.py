"""The exported table of a run: its figures are the ledger's, it joins runs over the same items, and holds no text."""

from __future__ import annotations

import json
import re

import numpy as np
import pyarrow.parquet as pq
import pytest
import toys
import yaml

from evolver.config import Config
from evolver.config.reading import ConfigText
from evolver.errors import BadInput
from evolver.evaluation.scores.metrics import JUDGED
from evolver.evaluation.scores.scoring import Scale
from evolver.ledger import Ledger, answer_table, write_items
from evolver.records import Candidate, Result
from evolver.records.canonical import content_hash
from evolver.records.order import item_order, reordered
from evolver.records.recipe import Cross, Expert, Merge, Rule
from evolver.runs.about import About, read_about, write_about
from evolver.runs.table import join_runs
from evolver.storage import storage_at

BASE, A, B = (Expert(name, digit * 64) for name, digit in (("base", "0"), ("a", "1"), ("b", "2")))
MERGE = Merge("ties", (A, B), BASE, (Rule.of({"density": 0.5}),))
CHILD = Cross(A, (B,), "evolver", 0.5, 0.5, 7)
TASKS = ("x", "y", "x", "y")


def make_run(
    folder, answers, dev=range(4), report=range(10, 12), metric="acc", draw=0, probabilities=(), fitness="score"
):
    """A run's folder without models: of each stage, recipes with their answers."""
    text = yaml.safe_dump(
        {
            "run": folder.name, "model": {"base": "base"}, "experts": {"a": "a", "b": "b"},
            "search": {"algorithm": "tpe", "method": "ties"}, "budget": {"candidates": 3},
            "evaluation": {
                "tasks": [{"task": t, "dev": 2, "report": 1, "metric": metric} for t in "xy"], "report_draw": draw,
            },
        }
    )  # fmt: skip
    config: Config = ConfigText(text, "f").parsed()
    storage = storage_at(folder)
    identity = json.loads(config.model_dump_json()) | {"experts": {"a": "1", "b": "2"}}
    identity["evaluation"] |= {"fitness": fitness}
    if fitness is None:  # a run from before there was this key
        del identity["evaluation"]["fitness"]
    storage.write("config.yaml", text.encode())
    storage.write("identity.json", json.dumps(identity).encode())
    scales = {
        "dev": Scale(TASKS[: len(dev)], {"x": 1.0, "y": 3.0}, dict.fromkeys("xy", JUDGED)),
        "report": Scale(TASKS[: len(report)], {"x": 1.0, "y": 3.0}, dict.fromkeys("xy", JUDGED)),
    }
    write_about(storage, About(config, scales, {}, owner=content_hash(identity)))
    names = {
        s: [(TASKS[p], k, f"{k:020x}") for p, k in enumerate(own)] for s, own in (("dev", dev), ("report", report))
    }
    write_items(storage, names)
    ledger = Ledger(storage.folder("ledger"), content_hash(identity))
    for number, (stage, recipe, items) in enumerate(answers):
        candidate = Candidate(number, recipe, "test", tuple(i.id for i in recipe.inputs), stage=stage, label="a secret")
        whole = len(items) == len(names["report" if stage == "report" else "dev"])
        status = "ok" if items else "failed"
        score = float(np.mean(items)) if whole else None
        result = Result(
            number, recipe.id, status, score, score, whole, tuple(items), {}, stage=stage, reason="a text of the user",
            said=("a text",) * (stage == "report"), probabilities=probabilities if recipe is MERGE else (),
        )  # fmt: skip
        ledger.write_result(candidate, result)
    ledger.close()
    return folder


FIRST = [
    ("baseline", A, [1.0, 0.0, 1.0, 0.0]),
    ("search", MERGE, [1.0, 1.0]),
    ("search", CHILD, []),
    ("report", A, [1.0, 0.0]),
]


def export(*arguments):
    return toys.evolver("export", *arguments)


def read(folder):
    return {n: pq.read_table(folder / f"{n}.parquet").to_pylist() for n in ("items", "models", "proposals")}


def test_the_table_says_what_the_ledger_says(tmp_path):
    run = make_run(tmp_path / "one", FIRST)
    done = export(run, tmp_path / "out", "--table")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{tmp_path}/out: 2 models × 6 items of one\n"
    found = read(tmp_path / "out")
    assert [(i["task"], i["split"], int(i["hash"], 16)) for i in found["items"]] == [
        ("x", "dev", 0), ("y", "dev", 1), ("x", "dev", 2), ("y", "dev", 3), ("x", "report", 10), ("y", "report", 11),
    ]  # fmt: skip
    assert {i["task"]: i["weight"] for i in found["items"]} == {"x": 0.25, "y": 0.75}
    assert {m["recipe_id"]: m["answers"] for m in found["models"]} == {
        A.id: [True, False, True, False, True, False],
        MERGE.id: [True, True, None, None, None, None],
    }
    merge = found["models"][1]
    assert (merge["kind"], merge["method"], merge["complete"], merge["inputs"]) == (
        "merge",
        "ties",
        False,
        [A.id, B.id],
    )
    assert json.loads(merge["settings"])[0][1] == [["density", 0.5]]
    assert [(p["stage"], p["recipe_id"], p["status"], p["scored"]) for p in found["proposals"]] == [
        ("baseline", A.id, "ok", 4), ("search", MERGE.id, "ok", 2), ("search", CHILD.id, "failed", 0),
        ("report", A.id, "ok", 2),
    ]  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "Answers of 2 merged models to 6 items" in card
    assert "1 of the 2 models have answered all dev items" in card
    for file in (tmp_path / "out").iterdir():
        assert b"a text" not in file.read_bytes()


def test_a_second_run_over_the_same_items_is_joined(tmp_path):
    one = make_run(tmp_path / "one", FIRST)
    two = make_run(
        tmp_path / "two", [("search", MERGE, [0.0, 1.0, 1.0, 1.0]), ("search", CHILD, [0.0] * 4)], (3, 2, 1, 9)
    )
    # In the second run the same contents stand at other places, and those of one task do not belong to another.
    found = join_runs([storage_at(one), storage_at(two)])
    assert found.runs == ("one", "two")
    items = [(r["task"], int(r["hash"], 16)) for r in found.items.to_pylist()]
    assert items == [
        ("x", 0),
        ("y", 1),
        ("x", 2),
        ("y", 3),
        ("x", 10),
        ("y", 11),
        ("x", 3),
        ("y", 2),
        ("x", 1),
        ("y", 9),
    ]
    models = {m["recipe_id"]: m["answers"] for m in found.models.to_pylist()}
    assert models[MERGE.id] == [True, True, None, None, None, None, False, True, True, True]
    assert [p["run"] for p in found.proposals.to_pylist()] == ["one"] * 4 + ["two"] * 2


def test_a_run_from_before_there_was_a_key_is_joined(tmp_path):
    old, now, other = (storage_at(make_run(tmp_path / str(f), FIRST, fitness=f)) for f in (None, "score", "both"))
    assert join_runs([old, now]).runs == ("None", "score")
    with pytest.raises(BadInput, match=r"scores items in another way .* \(evaluation\.fitness differs\)"):
        join_runs([old, other])


def test_probabilities_stand_beside_the_answers(tmp_path):
    run = make_run(tmp_path / "one", FIRST, probabilities=(0.25, 0.75))
    found = {m["recipe_id"]: m["probabilities"] for m in join_runs([storage_at(run)]).models.to_pylist()}
    assert found == {A.id: None, MERGE.id: [0.25, 0.75, None, None, None, None]}
    assert export(run, tmp_path / "out", "--table").code == 0
    assert "`probabilities`, how probable the model" in (tmp_path / "out" / "README.md").read_text()


def test_an_answer_that_two_runs_have_stands_once(tmp_path):
    one = make_run(tmp_path / "one", FIRST)
    two = make_run(tmp_path / "two", [("search", MERGE, [0.0, 0.0, 1.0, 1.0])])
    models = {m["recipe_id"]: m["answers"] for m in join_runs([storage_at(one), storage_at(two)]).models.to_pylist()}
    assert models[MERGE.id] == [True, True, True, True, None, None]


def test_runs_with_other_report_items_of_one_family_are_joined(tmp_path):
    """Which report items a run has drawn says nothing of what an answer means."""
    one = make_run(tmp_path / "one", FIRST)
    other = make_run(tmp_path / "other", FIRST, report=range(20, 22), draw=1)
    found = join_runs([storage_at(one), storage_at(other)])
    assert found.items.num_rows == 4 + 2 + 2


def test_answers_along_another_order_stand_at_their_items(tmp_path):
    run = make_run(tmp_path / "one", [])
    ledger = Ledger(storage_at(run).folder("ledger"), read_about(storage_at(run)).owner)
    whole, order = [1.0, 0.0, 0.0, 0.0], "another"
    assert reordered(whole, order)[:2] != tuple(whole[:2])
    for number, (recipe, items, complete) in enumerate([(A, reordered(whole, order)[:2], False), (B, whole, True)]):
        result = Result(number, recipe.id, "ok", 0.25 if complete else None, 1.0, complete, tuple(items), order=order)
        ledger.write_result(Candidate(number, recipe, "test").asking(order=order), result)
    ledger.close()
    models = {m["recipe_id"]: m["answers"] for m in join_runs([storage_at(run)]).models.to_pylist()}
    first = item_order(order, 4)[:2]
    assert models[A.id] == [bool(whole[p]) if p in first else None for p in range(4)] + [None, None]
    assert models[B.id] == [True, False, False, False, None, None]
    found = [(r["recipe_id"], int(r["hash"], 16), r["answer"]) for r in answer_table(storage_at(run)).to_pylist()]
    assert found[:2] == [(A.id, p, whole[p]) for p in first]
    assert found[2:] == [(B.id, p, whole[p]) for p in range(4)]


def test_graded_answers_stay_numbers(tmp_path):
    run = make_run(tmp_path / "one", [("search", A, [0.5, 0.0, 1.0, 0.25])])
    (model,) = join_runs([storage_at(run)]).models.to_pylist()
    assert model["answers"] == [0.5, 0.0, 1.0, 0.25, None, None]


def test_the_folder_is_named_after_the_run_and_never_overwritten(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "one", FIRST)
    assert export(run, "--table").code == 0
    assert {f.name for f in (tmp_path / "one-table").iterdir()} >= {"README.md", "models.parquet"}
    again = export(run, "--table")
    assert (again.code, again.err.count("\n")) == (2, 1)
    assert "is there already and not empty" in again.err
    assert export(run, "--table", "--force").code == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--table", "--lora", "4"], "one form at a time"),
        (["--table", "--candidate", "3"], "holds all candidates"),
        (["--also", "two"], "add --table"),
        ([], "OUT is missing"),
        (["--table", "--also", "{there}/none"], "there is no run in this folder"),
        (["--table", "--also", "{there}/apart"], "shares no item with"),
        (["--table", "--also", "{there}/other"], r"in another way than .* \(evaluation.tasks, x differs\)"),
        (["--table", "--also", "{there}/empty"], "has been scored yet"),
    ],
)
def test_what_cannot_be_exported_is_refused_and_nothing_written(tmp_path, monkeypatch, arguments, said):
    monkeypatch.chdir(tmp_path)
    run = make_run(tmp_path / "one", FIRST)
    make_run(tmp_path / "apart", [("search", A, [1.0] * 4)], range(20, 24), range(30, 32))
    make_run(tmp_path / "other", [("search", A, [1.0] * 4)], metric="macro_f1")
    make_run(tmp_path / "empty", [])
    before = sorted(tmp_path.rglob("*"))
    done = export(run, *(a.format(there=tmp_path) for a in arguments))
    assert (done.code, done.out) == (2, "")
    assert re.search(said, done.err)
    assert len(done.err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before
