"""Answers in words: they say what the scores say, whatever the kind of task, and are kept for the report only."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import pytest

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.evaluation.base import SAID_LENGTH, Scored
from evolver.ledger import Ledger
from evolver.records import Candidate, Result
from evolver.records.recipe import Expert
from evolver.storage import storage_at
from evolver.workers.messages import pack_result, unpack_result
from evolver.workers.worker import Worker

TASKS = {
    "toy": "acc_norm", "mutual": "acc_mutual_info", "yesno": "mcc", "free": "exact_match", "last": "acc",
    "roll": "bits_per_byte",
}  # fmt: skip


@pytest.fixture(scope="module")
def scored(make_config, tmp_path_factory):
    """``scored(split)``: an expert's result on every kind of task, with the tasks that it is of."""
    entries = [{"task": t, "metric": m, "dev": 2, "report": 9 if t == "roll" else 25} for t, m in TASKS.items()]
    ready = prepare(config_at(make_config(tmp_path_factory.mktemp("said"), {"evaluation.tasks": entries})))

    def evaluate(split):
        worker = Worker(ready.plan, split, tasks=ready.tasks)
        stage = "report" if split == "report" else "search"
        result = worker.evaluate(Candidate(0, ready.experts[0], "test", stage=stage))
        assert result.status == "ok", result.reason
        return ready.tasks, result

    return evaluate


def of_task(scored, name):
    """Of the report items of a task the answer, the answer in words, and the text of the item."""
    tasks, result = scored("report")
    places = [p for p, task in enumerate(tasks.scale("report").tasks) if task == name]
    texts = tasks.show("report", places)
    return [(result.items[p], result.said[p], texts[p]) for p in places]


@pytest.mark.parametrize("name", ["toy", "mutual"])
def test_the_chosen_option_is_right_where_the_score_says_so(scored, name):
    found = of_task(scored, name)
    for answer, said, text in found:
        options = [line.removeprefix("- ") for line in text.prompt.splitlines()[-4:]]
        assert {said, text.right} <= set(options)
        assert (answer == 1.0) == (said == text.right)
    assert {answer for answer, *_ in found} == {0.0, 1.0}


def test_the_option_of_a_metric_of_all_answers(scored):
    found = of_task(scored, "yesno")
    assert {said for _, said, _ in found} == {" stone", " tree"}
    assert all(said == (" stone", " tree")[int(answer)] for answer, said, _ in found)


def test_a_written_answer_and_what_was_taken_of_it(scored):
    found = of_task(scored, "free")
    for answer, said, text in found:
        assert (answer == 1.0) == (said.rpartition(" → ")[2] == text.right)
    assert any(" → " in said for _, said, _ in found)


def test_a_given_text_is_more_or_less_likely(scored):
    for answer, said, text in of_task(scored, "last"):
        assert said.startswith("log-likelihood -")
        assert said.endswith(", and the model's first choice") == (answer == 1.0)
        assert text.prompt
        assert text.right
    for answer, said, text in of_task(scored, "roll"):
        assert said == f"log-likelihood {answer:.2f}"
        assert text.prompt.startswith("number ")
        assert text.right == ""


def test_of_a_search_they_are_not_kept(scored):
    assert scored("dev")[1].said == ()


def test_long_answers_and_half_characters_can_be_kept():
    scored = Scored({4: 1.0, 2: 0.0, 3: 0.0}, said={4: "x" * 9999, 2: "\ud83d"})
    assert scored.words[:2] == ["?", ""]
    assert len(scored.words[2]) == SAID_LENGTH


def test_they_come_to_the_driver_and_stay_in_the_ledger(tmp_path):
    candidate = Candidate(0, Expert("a", "aa"), "finalist", stage="report")
    result = Result(0, candidate.recipe.id, "ok", 0.5, None, True, (1.0, 0.0), stage="report", said=("ja ü", ""))
    assert unpack_result(pack_result(result)) == result
    folder = storage_at(tmp_path)
    with contextlib.closing(Ledger(folder, "owner")) as ledger:
        ledger.write_result(candidate, result)
    with contextlib.closing(Ledger(folder, "owner")) as ledger:
        assert ledger.answer(candidate) == result
        again = replace(candidate, number=1)  # the winner may be an expert
        assert ledger.answer(again).said == result.said
