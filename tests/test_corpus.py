"""Metrics of lm-eval that are computed from the answers to all items: BLEU, chrF and TER, held against lm-eval."""

from __future__ import annotations

import random
from dataclasses import asdict, replace

import numpy as np
import pytest
from lm_eval.api import metrics as theirs

from evolver.errors import BadInput
from evolver.evaluation.language import corpus
from evolver.evaluation.language.library import MEANINGS
from evolver.evaluation.scores import comparison
from evolver.evaluation.scores.comparison import compare, interval
from evolver.evaluation.scores.estimates import Estimates
from evolver.evaluation.scores.metrics import CLASS, JUDGED, Metric
from evolver.evaluation.scores.scoring import Scale
from evolver.ledger import Ledger, answer_table, write_items
from evolver.records import Candidate, Question, Result
from evolver.records.recipe import Expert
from evolver.report.text import of_task
from evolver.storage import storage_at
from evolver.workers.messages import pack_candidate, pack_result, unpack_candidate, unpack_result

WORDS = "the red house , and a green river's old (stone) tree . 1,000 U.S. naïve".split()
AGGREGATIONS = {"bleu": theirs.bleu, "chrf": theirs.chrf, "chrfpp": theirs.chrfpp, "ter": theirs.ter}


def meaning(name):
    return next(m for m in MEANINGS[name] if m is not None)


def pairs(seed, count, references=1):
    """References and answers, some of which are near to them, some empty."""
    draw = random.Random(seed)

    def text(least=1):
        return " ".join(draw.choices(WORDS, k=draw.randrange(least, 9)))

    out = []
    for _ in range(count):
        right = text()
        near = " ".join(w if draw.random() < 0.7 else draw.choice(WORDS) for w in right.split())
        said = near if draw.random() < 0.8 else text(0)
        out.append((right if references == 1 else [right, *(text() for _ in range(references - 1))], said))
    return out


def scale_of(name, count):
    return Scale(("t",) * count, {"t": 1.0}, {"t": meaning(name).metric})


def answers_to(name, asked):
    return [meaning(name).answer(pair) for pair in asked]


@pytest.mark.parametrize("name", AGGREGATIONS)
@pytest.mark.parametrize("references", [1, 3])
@pytest.mark.parametrize("count", [1, 2, 40])
def test_the_value_of_all_items_is_that_of_lm_eval(name, references, count):
    for seed in range(6):
        asked = pairs(seed, count, references)
        value = scale_of(name, count).score(answers_to(name, asked))
        assert abs(100 * value) == pytest.approx(AGGREGATIONS[name](asked), rel=1e-9, abs=1e-9)
        assert of_task(value, meaning(name).metric) == f"{AGGREGATIONS[name](asked):.1f}"


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_so_is_that_of_the_first_items(name):
    """A prefix is what halving compares; it is not the mean of what its items score alone."""
    asked = pairs(7, 60)
    answers, scale = answers_to(name, asked), scale_of(name, 60)
    for count in (1, 13, 59):
        assert abs(100 * scale.of_tasks(answers[:count])["t"]) == pytest.approx(AGGREGATIONS[name](asked[:count]))
    assert Estimates(scale, 8).estimate("mean", answers[:13]) == scale.of_tasks(answers[:13])["t"]
    assert np.mean([own for own, *_ in answers]) != pytest.approx(scale.score(answers), rel=1e-3)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_an_item_alone_has_the_score_of_its_sentence(name):
    for right, said in pairs(3, 20):
        own, *_ = corpus.counted(meaning(name).metric.name, right, [said])
        if name == "bleu":  # of a sentence, it is that of the orders that the sentence has
            assert 0 <= own <= 1
        else:
            assert abs(100 * own) == pytest.approx(AGGREGATIONS[name]([(right, said)]))


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_the_spread_is_that_of_lm_evals_bootstrap(name, monkeypatch, capsys):
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")
    asked = pairs(11, 50)
    wanted = theirs.bootstrap_stderr(AGGREGATIONS[name], asked, 300)
    (drawn,) = comparison.resampled([answers_to(name, asked)], scale_of(name, 50), seed=1)
    assert 100 * drawn.std() == pytest.approx(wanted, rel=0.15)  # 300 draws know it within 8 % two times in three
    low, high = interval(answers_to(name, asked), scale_of(name, 50), seed=1)
    assert 100 * (high - low) == pytest.approx(2 * 1.96 * wanted, rel=0.2)


def test_models_are_compared_by_exchanging_answers():
    """By hand, over all 2^6 exchanges, with the corpus value of lm-eval."""
    asked, others = pairs(1, 6), pairs(2, 6)
    others = [(right, said) for (right, _), (_, said) in zip(asked, others, strict=True)]
    ours, rivals = answers_to("chrf", asked), answers_to("chrf", others)
    found = compare(ours, rivals, scale_of("chrf", 6), seed=0)
    difference = theirs.chrf(asked) - theirs.chrf(others)
    assert 100 * found.difference == pytest.approx(difference)
    assert found.low < found.difference < found.high
    above = below = 0
    for bits in range(64):
        mixed = [(a, b) if bits >> k & 1 else (b, a) for k, (a, b) in enumerate(zip(asked, others, strict=True))]
        one, other = (theirs.chrf([pair[side] for pair in mixed]) for side in (0, 1))
        above += one - other >= difference - 1e-9
        below += one - other <= difference + 1e-9
    assert found.p == pytest.approx(min(1.0, 2 * min(above, below) / 64))
    assert compare(ours, ours, scale_of("chrf", 6), seed=0).p == 1.0


def test_a_corpus_metric_stands_beside_metrics_of_other_kinds():
    count = 30
    tasks = tuple("cta"[k % 3] for k in range(count))
    metrics = {"c": meaning("bleu").metric, "t": CLASS["mcc"], "a": JUDGED}
    right = tuple(float(k % 2) for k in range(count))
    scale = Scale(tasks, {"c": 2.0, "t": 1.0, "a": 1.0}, metrics, right)
    asked = pairs(5, 10)
    texts = iter(answers_to("bleu", asked))
    items = [next(texts) if task == "c" else float(k % 5 < 2) for k, task in enumerate(tasks)]
    found = scale.of_tasks(items)
    assert scale.score(items) == pytest.approx((2 * found["c"] + found["t"] + found["a"]) / 4)
    assert 100 * found["c"] == pytest.approx(theirs.bleu(asked))
    assert Scale.from_form(scale.form()) == scale
    worse = [(0.0, *[0.0] * 10) if isinstance(i, tuple) else i for i in items]
    assert compare(items, worse, scale, 0).difference == pytest.approx(found["c"] / 2)


def test_nothing_is_certain_before_the_last_item():
    """The bound is the best value there is until then, so that no bar below it stops an evaluation."""
    answers = answers_to("bleu", [("the red house", "")] * 5)
    scale = scale_of("bleu", 5)
    assert [scale.bound(answers[:k]) for k in range(6)] == [1.0] * 5 + [0.0]
    late = answers_to("ter", [("the red house", "a tree")] * 5)
    assert [scale_of("ter", 5).bound(late[:k]) for k in range(5)] == [0.0] * 5


def test_estimates_of_single_items_are_refused():
    with pytest.raises(BadInput, match=r"estimate: p-irt needs items with scores of their own from 0 to 1, and t has"):
        Estimates(scale_of("bleu", 5), 8).check("p-irt", "estimate")


def result_of(items, complete=True, number=0):
    return Result(
        number, Expert("a", "0" * 64).id, "ok", 0.5 if complete else None, 0.5, complete, tuple(items), {"t": 0.5}
    )  # fmt: skip


def test_the_ledger_keeps_the_counts(tmp_path):
    asked = pairs(2, 9)
    answers, scale = answers_to("chrfpp", asked), scale_of("chrfpp", 9)
    mixed = (*answers, 0.25)
    candidate = Candidate(0, Expert("a", "0" * 64), "test")
    storage = storage_at(tmp_path / "ledger")
    ledger = Ledger(storage, "owner")
    ledger.write_result(candidate, result_of(mixed[:4], complete=False))
    ledger.close()
    ledger = Ledger(storage, "owner")
    (kept,) = ledger.results("search")
    assert kept.items == tuple(mixed[:4])
    assert ledger.with_known_items(candidate).question.known == tuple(mixed[:4])
    assert 100 * scale.of_tasks(kept.items)["t"] == pytest.approx(theirs.chrfpp(asked[:4]))
    ledger.write_result(replace(candidate, number=1), result_of(mixed, number=1))
    ledger.write_result(replace(candidate, number=2), result_of([0.5, 1.0], number=2))
    ledger.close()
    ledger = Ledger(storage, "owner")
    assert [r.items for r in ledger.results("search")] == [tuple(mixed[:4]), mixed, (0.5, 1.0)]
    ledger.close()
    run = storage_at(tmp_path)
    write_items(run, {"dev": [("t", k, f"{k:020x}") for k in range(10)], "report": []})
    table = answer_table(run).to_pylist()
    assert [r["answer"] for r in table if r["number"] == 1] == [*(own for own, *_ in answers), 0.25]


def test_messages_carry_the_counts():
    answers = (*answers_to("ter", pairs(2, 3)), 1.0)
    result = result_of(answers)
    assert unpack_result(pack_result(result)) == result
    candidate = Candidate(
        3, Expert("a", "0" * 64), "test", (), Question(0.2, known=answers, rival=answers, piece=(1, 2))
    )
    assert asdict(unpack_candidate(pack_candidate(candidate))) == asdict(candidate)


def test_the_score_of_probabilities_is_a_mean():
    draw = np.random.default_rng(0)
    outcomes = [(int(draw.integers(3)), draw.dirichlet(np.ones(3))) for _ in range(20)]
    found = meaning("brier_score")
    value = Scale(("t",) * 20, {"t": 1.0}, {"t": found.metric}).score([found.answer(o) for o in outcomes])
    assert value == pytest.approx(-theirs.brier_score(outcomes))
    assert of_task(value, found.metric) == f"{-value:.4g}"


def test_several_answers_to_one_item_are_refused():
    with pytest.raises(ValueError, match="bleu needs one answer to each item, and the filters left 2"):
        corpus.counted("bleu", "a tree", ["a", "b"])


def test_scores_outside_of_the_range_of_their_name_are_refused():
    """Early stopping rests on it that no item of ``acc`` can add more than 1."""
    with pytest.raises(ValueError, match="gave an item the score 100, and a metric of this name lies between 0 and 1"):
        replace(meaning("mean"), metric=JUDGED).answer(100)
    assert meaning("mean").answer(100) == 100.0
    with pytest.raises(ValueError, match="no score"):
        meaning("nanmean").answer(float("nan"))


def test_of_no_words_at_all():
    empty = np.zeros((2, 10))
    metric = Metric("bleu", meaning("bleu").metric.of, counts=10)
    assert metric.of(empty, empty).tolist() == [0.0, 0.0]
    assert meaning("chrf").metric.of(np.zeros((1, 18)), empty).tolist() == [0.0]
    assert meaning("ter").metric.of(np.array([[0.0, 0.0], [3.0, 0.0]]), empty).tolist() == [0.0, -1.0]
