"""Numbers of items that are given as shares of a task's documents."""

from __future__ import annotations

import pytest
import toys

from evolver.config.evaluation import TaskEntry
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.evaluation.items import Item, ItemSource, draw


def documents(count, task="t", first=0):
    return [Item(task, k, f"{task}{first + k:019d}") for k in range(count)]


def source(dev, report, count, other=None):
    entry = TaskEntry(task="t", dev=dev, report=report)
    return ItemSource(entry, "tasks[0]", documents(count), other)


@pytest.mark.parametrize(
    ("dev", "report", "count", "wanted"),
    [
        (0.2, 0.5, 50, (10, 25)),  # the float 0.2 is above a fifth; it is not 11
        (0.2, 0.5, 11, (3, 6)),  # rounded up, as lm-eval rounds a limit
        (0.5, 0.5, 7, (4, 3)),  # but not beyond the documents that there are
        (0.9, 0.1, 9, (9, 1)),  # nothing is left, and one is asked for: refused when items are drawn
        (3, 0.25, 40, (3, 10)),
        (0.01, 5, 40, (1, 5)),
        (12, 8, 40, (12, 8)),
    ],
)
def test_a_share_is_that_of_the_documents(dev, report, count, wanted):
    assert source(dev, report, count).wanted == wanted


def test_documents_that_are_the_same_count_once():
    twice = ItemSource(TaskEntry(task="t", dev=0.5, report=0.25), "tasks[0]", documents(20) * 2)
    assert twice.wanted == (10, 5)


def test_the_share_of_another_task_is_that_of_its_own_documents():
    other = documents(30, "r")
    found = source(0.5, 0.1, 8, other)
    assert found.wanted == (4, 3)
    (items,) = draw([found], 1)
    assert (len(items.dev), len(items.report)) == (4, 3)
    assert {i.task for i in items.report} == {"r"}


def test_a_share_draws_the_items_that_its_number_draws():
    shares, numbers = (draw([source(*given, 40)], 7) for given in ((0.25, 0.5), (10, 20)))
    assert shares == numbers


@pytest.mark.parametrize(
    ("dev", "report", "count", "said"),
    [
        (0.6, 0.5, 40, r"tasks\[0\].dev \+ report: the shares 0.6 and 0.5 .* add up to more than 1"),
        (30, 0.5, 40, "50 items are asked for, but t has 40"),
        (0.9, 0.1, 9, "10 items are asked for, but t has 9"),
    ],
)
def test_what_cannot_be_drawn_is_refused(dev, report, count, said):
    with pytest.raises(BadInput, match=said):
        draw([source(dev, report, count)], 1)


@pytest.mark.parametrize("value", [1.0, 0.0, -0.5, 0, 2.5, True, "0.5", None])
def test_other_numbers_are_refused(make_config, tmp_path, value):
    file = make_config(tmp_path, {"evaluation.tasks": [{"task": "toy", "dev": value, "report": 4}]})
    toys.refused(
        lambda: config_at(file).parsed(), file, f"evaluation.tasks[0].dev: {value!r} is not usable",
        "greater than or equal to 1, or a share of the task's documents above 0 and below 1",
    )  # fmt: skip


@pytest.mark.whole
def test_validate_says_how_many_they_are(make_config, tmp_path):
    tasks = [{"task": "toy", "dev": 0.2, "select": 0.3, "report": 0.5}, {"task": "pair", "dev": 9, "report": 8}]
    file = make_config(tmp_path, {"evaluation.tasks": tasks})
    ended = toys.evolver("validate", file)
    assert ended.code == 0, ended.err
    assert "31 dev, 33 select and 63 report items" in ended.out
    assert "toy: dev 0.2 is 22 items\ntoy: select 0.3 is 33 items\ntoy: report 0.5 is 55 items\n" in ended.out
    assert "pair: dev" not in ended.out
    assert prepare(config_at(file)).tasks.sizes == {
        "toy": {"dev": 22, "select": 33, "report": 55},
        "pair": {"dev": 9, "select": 0, "report": 8},
    }
