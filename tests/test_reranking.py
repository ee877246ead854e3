"""Rerankers: the rank of the right document, held against a plain loop; and pairs with a number each."""

from __future__ import annotations

import pytest
import torch
import toys
import yaml
from toys import ranked, refused, run_here
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.evaluation.judges.reranking import Query
from evolver.workers.worker import Worker

COLUMNS = {"text": "query", "text_pair": "documents", "label": "marks", "judge": "reranking", "metric": "mrr"}


@pytest.fixture(scope="module")
def rerankers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rerankers")
    toys.make_rerankers(folder)
    return folder


@pytest.fixture
def configured(rerankers, tmp_path):
    def make(lines=None, **changes):
        data = toys.write_rows(tmp_path / "data.jsonl", ranked() if lines is None else lines)
        entry = {"task": "ranks", "data": data, "dev": 40, "report": 30, **COLUMNS, **changes}
        settings = {
            "run": "ranks", "model": {"base": str(rerankers / "base"), "kind": "classifier"},
            "experts": {n: str(rerankers / n) for n in ("a", "b")},
            "search": {"algorithm": "evolver", "generations": 3}, "budget": {"candidates": 8},
            "evaluation": {"tasks": [{k: v for k, v in entry.items() if v is not None}], "batch_tokens": 128},
        }  # fmt: skip
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        return tmp_path / "run.yaml"

    return make


def numbers_of(folder, query, documents):
    model, words = AutoModelForSequenceClassification.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)  # fmt: skip  # noqa: E501
    with torch.inference_mode():
        return [model(**words(query, d, return_tensors="pt")).logits[0, 0].item() for d in documents]


def test_the_rank_is_that_of_a_plain_loop(configured, rerankers):
    ready = prepare(config_at(configured()))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    found, lines, expected = worker.scorer.score(0, 40), ranked(), []
    for item in ready.tasks.items.dev:
        row = lines[item.index]
        numbers = numbers_of(rerankers / "base", row["query"], row["documents"])
        order = sorted(range(4), key=lambda n: -numbers[n])
        expected.append(1 / (1 + order.index(row["marks"].index(1))))
    assert found.items == expected
    assert len(set(expected)) > 2
    assert worker.scale.score(expected) == pytest.approx(sum(expected) / 40)
    row = lines[ready.tasks.items.dev[0].index]
    shown = ready.tasks.show("dev", [0])[0]
    assert (shown.prompt, shown.right) == (row["query"], row["documents"][row["marks"].index(1)])
    assert found.words[0] in row["documents"]


def test_a_wrong_document_with_the_same_number_stands_before_a_right_one():
    query = Query("q", ("a", "b", "c"), (True, False, True))
    assert query.reciprocal_rank([1.0, 1.0, 0.0]) == 0.5
    assert query.reciprocal_rank([0.0, 1.0, 2.0]) == 1.0


@pytest.mark.parametrize(
    ("row", "changes", "said"),
    [
        ({"marks": [0, 0]}, {}, "row 1 has no right document, or no wrong one"),
        ({"marks": [1, 1]}, {}, "row 1 has no right document, or no wrong one"),
        ({"marks": [1]}, {}, "row 1 has no list of documents"),
        ({"documents": "one"}, {}, "row 1 has no list of documents"),
        ({"marks": ["x", "y"]}, {}, "row 1 has marks in 'marks' that are no numbers"),
        ({}, {"metric": "acc"}, "tasks[0].metric: unknown metric 'acc'"),
        ({}, {"text_pair": None}, "tasks[0].text_pair: missing"),
    ],
)
def test_what_cannot_be_ranked_is_refused(configured, row, changes, said):
    line = {"query": "red", "documents": ["a", "b"], "marks": [0, 1]}
    more = [{**line, "query": f"blue {n}"} for n in range(5)]
    refused(lambda: prepare(config_at(configured([{**line, **row}, *more], dev=1, report=1, **changes))), said)


def test_a_model_of_several_labels_ranks_nothing(configured, tmp_path):
    toys.make_encoders(tmp_path / "moods")
    raw = yaml.safe_load((file := configured()).read_text())
    raw["model"]["base"] = str(tmp_path / "moods" / "base")
    raw["experts"] = {n: str(tmp_path / "moods" / n) for n in ("a", "b")}
    file.write_text(yaml.safe_dump(raw))
    refused(lambda: prepare(config_at(file)), "tasks[0].judge: reranking needs a model that gives one number", "3 lab")


def test_a_class_is_not_asked_of_a_model_with_one_output(configured):
    pairs = [{"one": t, "two": t[::-1], "label": 0} for t in toys.texts()]
    file = configured(pairs, judge="classifier", metric="acc", text="one", text_pair="two", label="label")
    refused(lambda: prepare(config_at(file), device="cpu"), "tasks[0].metric: acc asks for one of several labels")


def test_numbers_of_pairs_are_correlated(configured, rerankers):
    lines = toys.texts()
    pairs = [{"one": a, "two": b, "label": len(a) / 9} for a, b in zip(lines, reversed(lines), strict=True)]
    file = configured(pairs, judge=None, metric="pearson", text="one", text_pair="two", label="label")
    ready = prepare(config_at(file), device="cpu")
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    row = pairs[ready.tasks.items.dev[0].index]
    assert worker.scorer.score(0, 1).items == pytest.approx(numbers_of(rerankers / "base", row["one"], [row["two"]]), abs=1e-5)  # fmt: skip  # noqa: E501


@pytest.mark.whole
def test_a_whole_run(configured, tmp_path):
    folder = run_here(configured(), tmp_path / "results")
    assert '"equal": 40' in (folder / "best.json").read_text()
    AutoModelForSequenceClassification.from_pretrained(folder / "best")
