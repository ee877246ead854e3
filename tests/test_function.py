"""Tasks that a function of the user's own judges."""

from __future__ import annotations

import json

import pytest
from toys import rows, run_here

from evolver.errors import BadInput
from evolver.records import Candidate
from evolver.run import prepare
from evolver.worker import Worker

LENGTHS = """
def score(model, items):
    return [len(model.tokenizer(item["question"])["input_ids"]) % 2 for item in items]

def weights(model, items):
    value = float(next(model.module.parameters()).abs().mean())
    return [value * len(item["question"]) for item in items]

def short(model, items):
    return [1.0] * (len(items) - 1)

def large(model, items):
    return [2.0 for _ in items]

def nan(model, items):
    return [float("nan") for _ in items]

def raising(model, items):
    raise ValueError("no such colour")

word = "not a function"
"""


@pytest.fixture
def configured(make_config, tasks, tmp_path):
    (tmp_path / "mine.py").write_text(LENGTHS)

    def make(name="score", **changes):
        task = {"task": "mine", "function": f"{tmp_path / 'mine.py'}:{name}", "data": str(tasks / "toy.jsonl")}
        return make_config(tmp_path, {"evaluation.tasks": [{**task, "dev": 20, "report": 20, **changes}]})

    return make


def test_it_judges_the_rows_of_its_data(configured, tasks):
    ready = prepare(str(configured()))
    result = Worker(ready.plan, "dev", tasks=ready.tasks).evaluate(Candidate(0, ready.experts[0], "test"))
    data = [json.loads(line) for line in (tasks / "toy.jsonl").read_text().splitlines()]
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(ready.opened.base.path)
    expected = [float(len(words(data[i.index]["question"])["input_ids"]) % 2) for i in ready.tasks.items.dev]
    assert list(result.items) == expected
    assert 0 < sum(expected) < 20


def test_a_whole_run_on_a_function_that_looks_at_the_model(configured, tmp_path):
    folder = run_here(configured("weights", metric="mean"), tmp_path / "results")
    found = rows(folder)
    assert not [r["reason"] for r in found.values() if r["status"] != "ok"]
    assert len({r["score"] for r in found.values() if r["stage"] == "search"}) > 2
    assert json.loads((folder / "best.json").read_text()) == {"items": 20, "equal": 20}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("short", "ValueError: the function of mine returned 7 numbers for 8 items"),
        ("large", "ValueError: the function of mine returned a number outside 0 … 1; use the metric mean"),
        ("nan", "FloatingPointError: the function of mine returned a number that is not finite"),
        ("raising", "ValueError: no such colour"),
    ],
)
def test_what_goes_wrong_is_a_failed_result_and_the_worker_goes_on(configured, name, said):
    ready = prepare(str(configured(name)))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    for number in range(2):
        result = worker.evaluate(Candidate(number, ready.experts[number], "test"))
        assert (result.status, result.reason) == ("failed", said)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"function": "nowhere.py:score"}, r"evaluation.tasks\[0\].function: there is no file nowhere.py"),
        ({"function": "score"}, r"evaluation.tasks\[0\].function: 'score' is not usable"),
        ({"metric": "akk"}, r"evaluation.tasks\[0\].metric: unknown metric 'akk'"),
        ({"data": None}, r"evaluation.tasks\[0\].data: missing"),
    ],
)
def test_bad_settings_are_one_sentence(configured, changes, said):
    with pytest.raises(BadInput, match=said):
        prepare(str(configured(**changes)))


@pytest.mark.parametrize(("name", "said"), [("scor", "did you mean 'score'"), ("word", "has no function 'word'")])
def test_a_name_that_is_no_function(configured, name, said):
    with pytest.raises(BadInput, match=said):
        prepare(str(configured(name)))


def test_another_function_is_another_run(configured, tmp_path):
    first = prepare(str(configured())).identity["items"]
    (tmp_path / "mine.py").write_text(LENGTHS.replace("% 2", "% 3 == 0"))
    assert prepare(str(configured())).identity["items"] != first
