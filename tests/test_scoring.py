"""Scores and their bounds, and which items are dev and which are report."""

import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolver.config.evaluation import TaskEntry
from evolver.errors import BadInput
from evolver.evaluation.base import Scored
from evolver.evaluation.batches import PreparedParts, by_length
from evolver.evaluation.items import Item, ItemSource, draw, in_order, item_hash
from evolver.evaluation.scores.metrics import ENDLESS, JUDGED
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Candidate, Question
from evolver.records.order import item_order
from evolver.records.recipe import Expert
from evolver.workers.worker import Worker

ITEM = st.one_of(st.sampled_from([0.0, 1.0]), st.floats(0, 1))


@st.composite
def scored(draw_from):
    """A scale of up to three tasks, the items of one model, and a bar that is often exactly one of its scores."""
    tasks = draw_from(st.lists(st.sampled_from("abc"), min_size=1, max_size=20))
    weights = {t: draw_from(st.floats(0.01, 10)) for t in sorted(set(tasks))}
    scale = Scale(tuple(tasks), weights, dict.fromkeys(weights, JUDGED))
    items = draw_from(st.lists(ITEM, min_size=len(tasks), max_size=len(tasks)))
    exact = scale.score(items)
    bars = st.floats(0, 1) | st.sampled_from([exact, exact - 1e-9, exact + 1e-9])
    return scale, items, draw_from(bars)


@given(scored())
@settings(max_examples=200, deadline=None)
def test_a_bound_is_never_below_the_score(case):
    scale, items, _ = case
    bounds = [scale.bound(items[:k]) for k in range(len(items) + 1)]
    assert all(b >= scale.score(items) for b in bounds)
    assert bounds == sorted(bounds, reverse=True)
    assert bounds[-1] == scale.score(items)


class Answers:
    """A scorer that knows its answers, and counts how many were asked for."""

    def __init__(self, items):
        self.items, self.asked = items, 0

    def score_at(self, places):
        self.asked += len(places)
        return Scored({place: self.items[place] for place in places})


def worker_of(scale, block, answers):
    """The worker's own way through the items, without a model."""
    worker = object.__new__(Worker)
    worker.scale, worker.block = scale, block
    worker.alpha, worker.name = None, "w"
    return worker, Answers(answers)


@given(scored(), st.integers(1, 7))
@settings(max_examples=200, deadline=None)
def test_stopping_early_decides_as_scoring_everything_does(case, block):
    scale, items, bar = case
    worker, scorer = worker_of(scale, block, items)
    candidate = Candidate(0, Expert("a", "1"), "test", question=Question(bar=bar))
    result = worker._score(candidate, scorer)
    assert result.complete == (len(result.items) == len(items))
    assert result.bound == scale.bound(result.items)
    assert (result.standing > (0.0, bar)) == (scale.score(items) > bar)
    assert result.answers(candidate)
    assert scorer.asked == len(result.items)


def test_stopping_saves_items():
    """Ten items, bar 0.5, all wrong: after 5 of them the score is at most 0.5, which does not exceed the bar."""
    worker, scorer = worker_of(Scale(("a",) * 10, {"a": 1.0}, {"a": JUDGED}), 1, [0.0] * 10)
    asked = Candidate(0, Expert("a", "1"), "test")
    assert len(worker._score(asked.asking(bar=0.5), scorer).items) == 5
    assert len(worker._score(asked, scorer).items) == 10


def test_a_limit_ends_with_its_block_and_what_is_known_is_not_asked_again():
    answers = [float(i % 2) for i in range(10)]
    worker, scorer = worker_of(Scale(("a",) * 10, {"a": 1.0}, {"a": JUDGED}), 2, answers)
    asked = Candidate(0, Expert("a", "1"), "test", question=Question(limit=3))
    first = worker._score(asked, scorer).items
    assert list(first) == answers[:4]
    second = worker._score(asked.asking(limit=7, known=first), scorer).items
    assert list(second) == answers[:8]
    assert scorer.asked == 8


def test_a_score_by_hand():
    """Task a: (1 + 0) / 2, weight 3; task b: 1, weight 1. (3 · 0.5 + 1 · 1) / 4 = 0.625."""
    scale = Scale(("a", "b", "a"), {"a": 3.0, "b": 1.0}, {"a": JUDGED, "b": JUDGED})
    assert scale.score([1.0, 1.0, 0.0]) == 0.625
    assert scale.of_tasks([1.0, 1.0]) == {"a": 1.0, "b": 1.0}
    assert scale.bound([0.0]) == (3 * 0.5 + 1) / 4
    with pytest.raises(ValueError, match="2 of 3"):
        scale.score([1.0, 1.0])


def test_a_metric_without_an_upper_end_has_no_bound():
    assert Scale(("a",) * 3, {"a": 1.0}, {"a": ENDLESS}).bound([0.0]) == float("inf")


def some_items(count, task="t"):
    return [Item(task, i, item_hash({"question": f"{task} {i}"})) for i in range(count)]


def draw_one(entry, own, report, seed, key):
    (items,) = draw([ItemSource(entry, key, own, report)], seed)
    return items


def entry(dev, report, **more):
    return TaskEntry(task="t", dev=dev, report=report, **more)


def test_dev_and_report_share_no_item():
    items = draw_one(entry(30, 60), some_items(100), None, 1, "k")
    dev, report = ({i.hash for i in part} for part in (items.dev, items.report))
    assert (len(dev), len(report)) == (30, 60)
    assert not dev & report
    assert items.of("dev") == items.dev
    assert items.of("report") == items.report


def test_the_draw_follows_the_seed_and_not_the_order_of_the_data():
    own = some_items(50)
    shuffled = [Item("t", i, item.hash) for i, item in enumerate(random.Random(0).sample(own, 50))]
    one, two = (draw_one(entry(9, 9), items, None, 1, "k") for items in (own, shuffled))
    assert [i.hash for i in one.dev] == [i.hash for i in two.dev]
    assert [i.hash for i in one.report] == [i.hash for i in two.report]
    assert draw_one(entry(9, 9), own, None, 1, "k") != draw_one(entry(9, 9), own, None, 2, "k")


def test_more_dev_items_contain_the_fewer():
    few, many = (draw_one(entry(n, 10), some_items(50), None, 1, "k").dev for n in (5, 20))
    assert many[:5] == few


def test_items_that_stand_twice_are_drawn_once():
    own = [*some_items(10), *some_items(10)]
    assert len({i.hash for i in draw_one(entry(4, 6), own, None, 1, "k").dev}) == 4
    with pytest.raises(BadInput, match="11 items are asked for, but t has 10 different ones"):
        draw_one(entry(5, 6), own, None, 1, "k")


def test_too_few_items_are_refused():
    with pytest.raises(BadInput, match=r"k\.dev \+ report: .*ask for fewer"):
        draw_one(entry(6, 6), some_items(11), None, 1, "k")
    with pytest.raises(BadInput, match=r"k\.dev \+ report: t has no items"):
        draw_one(entry(6, 6), [], None, 1, "k")
    with pytest.raises(BadInput, match=r"k\.dev: 12"):
        draw_one(entry(12, 1, report_task="u"), some_items(11), some_items(5, "u"), 1, "k")
    with pytest.raises(BadInput, match=r"k\.report: 6 items are asked for, but u has 5"):
        draw_one(entry(2, 6, report_task="u"), some_items(11), some_items(5, "u"), 1, "k")


def test_a_report_set_of_its_own_may_not_hold_dev_items():
    apart = draw_one(entry(5, 5, report_task="u"), some_items(5), some_items(5, "u"), 1, "k")
    assert {i.task for i in apart.report} == {"u"}
    with pytest.raises(BadInput, match=r"k: 5 items are both dev items and report items of t"):
        draw_one(entry(5, 5, report_task="u"), some_items(5), some_items(5), 1, "k")


def test_no_document_is_searched_for_one_task_and_reported_for_another():
    documents = some_items(30)
    ask, tell = (TaskEntry(task=t, dev=n, report=n) for t, n in (("ask", 10), ("tell", 5)))
    theirs = [Item("tell", i.index, i.hash) for i in documents]
    both = draw([ItemSource(ask, "a", documents), ItemSource(tell, "b", theirs)], 1)
    searched = {i.hash for items in both for i in items.dev}
    reported = {i.hash for items in both for i in items.report}
    assert [len(items.report) for items in both] == [10, 5]
    assert not searched & reported
    assert both[0] == draw_one(ask, documents, None, 1, "a")  # the draw of the larger one is what it is alone


def test_two_tasks_over_too_few_documents_are_refused():
    ask, tell = (TaskEntry(task=t, dev=n, report=m) for t, n, m in (("ask", 10, 10), ("tell", 5, 15)))
    with pytest.raises(BadInput, match=r"b\.report: 15 items are asked for, and 10 items of tell share no document"):
        draw([ItemSource(ask, "a", some_items(20)), ItemSource(tell, "b", some_items(20))], 1)


def passages(count, questions):
    """Items of which so many ask about one passage, and what they share with each other."""
    items = some_items(count)
    return items, lambda item: [item.hash, f"passage {item.index // questions}"]


@pytest.mark.parametrize("asked", [{}, {"select": 8}, {"select": 0}])
def test_items_about_one_document_are_in_one_set(asked):
    items, origins = passages(240, 3)
    found = draw([ItemSource(entry(10, 20, **asked), "k", items, origins=origins)], 4, fresh=1)[0]
    before = draw([ItemSource(entry(10, 20, **asked), "k", items, origins=origins)], 4)[0]
    sets = [found.dev, found.select, found.report, before.report]
    assert [len(part) for part in sets] == [10, asked.get("select", 10), 20, 20]
    told = [{origin for item in part for origin in origins(item)} for part in sets]
    assert not any(one & other for k, one in enumerate(told) for other in told[k + 1 :])
    assert max(Counter(item.index // 3 for item in found.report).values()) > 1  # a set may hold several of a document


def test_two_tasks_about_one_document_are_in_one_set():
    items, origins = passages(60, 1)
    theirs = [Item("tell", i.index, item_hash(f"other {i.index}")) for i in items]
    ask, tell = (TaskEntry(task=t, dev=10, report=15) for t in ("ask", "tell"))
    sources = [ItemSource(ask, "a", items, origins=origins), ItemSource(tell, "b", theirs, origins=origins)]
    drawn = draw(sources, 2)
    dev, report = ({i.index for found in drawn for i in found.of(split)} for split in ("dev", "report"))
    assert not dev & report


def test_too_few_documents_are_refused_and_a_share_takes_what_is_left():
    items, origins = passages(40, 10)
    with pytest.raises(BadInput, match=r"k\.report: 20 items are asked for, and (0|10) items of t share no document"):
        draw([ItemSource(entry(12, 20), "k", items, origins=origins)], 1)
    items, origins = passages(40, 2)
    shares = draw([ItemSource(entry(0.25, 0.75), "k", items, origins=origins)], 1)[0]
    assert len(shares.dev) == 10
    assert 20 <= len(shares.report) < 30


def test_the_common_order_mixes_tasks_and_is_fixed():
    items = [*some_items(50, "a"), *some_items(50, "b")]
    order = in_order(items, 3)
    assert order == in_order(reversed(items), 3)
    assert order != in_order(items, 4)
    assert 10 < sum(i.task == "a" for i in order[:50]) < 40


def test_the_hash_of_a_document_is_that_of_its_content():
    assert item_hash({"a": 1, "b": [1, (2, "x")]}) == item_hash({"b": (1, [2, "x"]), "a": 1})
    assert item_hash({"a": 1}) != item_hash({"a": 2})
    assert len(item_hash({"a": object})) == 20


@given(st.dictionaries(st.integers(), st.integers(1, 50), max_size=30), st.integers(1, 120))
@settings(deadline=None)
def test_batches_hold_every_key_once_within_the_budget(lengths, budget):
    batches = list(by_length(lengths, budget))
    assert sorted(k for b in batches for k in b) == sorted(lengths)
    assert all(len(b) == 1 or len(b) * max(lengths[k] for k in b) <= budget for b in batches)
    assert batches == list(by_length(dict(reversed(lengths.items())), budget))


def test_what_was_prepared_for_parts_of_other_orders_is_let_go():
    """The parts of one order all stay; of a hundred orders, the last ones."""
    parts = PreparedParts()
    for start in range(0, 40, 8):
        parts[tuple(range(start, start + 8))] = start
    assert len(parts) == 5
    for order in range(100):
        places = item_order(f"{order}", 40)
        for start in range(0, 40, 8):
            parts[places[start : start + 8]] = order
            assert places[start : start + 8] in parts
    assert sum(map(len, parts)) <= 4 * 40
    assert set(parts.values()) == {96, 97, 98, 99}
