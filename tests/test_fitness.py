"""The probability of the right answer: kept of every item, and, where the user wants it, what a search goes by."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
import toys
import yaml
from toys import MOODS, rows, run_here, shared_result, texts
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.records import Candidate, Result
from evolver.records.recipe import Expert
from evolver.report.scores import score_rows
from evolver.runs.history import read_history
from evolver.storage import storage_at
from evolver.workers.messages import pack_result, unpack_result
from evolver.workers.worker import Worker


@pytest.fixture
def classify(encoders, tmp_path):
    """``classify(fitness, task…)`` writes data and a configuration over them."""

    def make(fitness="score", select=0, **changes):
        draw = random.Random(1)
        lines = [{"text": t, "label": draw.choice(MOODS)} for t in texts(110)]
        data = toys.write_rows(tmp_path / "data.jsonl", lines)
        entry = {"task": "mood", "data": data, "dev": 40, "report": 30, "select": select, **changes}
        settings = {
            "run": f"mood-{fitness}",
            "model": {"base": str(encoders / "base"), "kind": "classifier"},
            "experts": {n: str(encoders / n) for n in ("a", "b")},
            "search": {"algorithm": "evolver", "generations": 2},
            "budget": {"candidates": 6},
            "evaluation": {"tasks": [entry], "batch_tokens": 128, "block_items": 8, "fitness": fitness},
        }
        file = tmp_path / f"{fitness}.yaml"
        file.write_text(yaml.safe_dump(settings))
        return file, lines

    return make


def worker_of(file):
    ready = prepare(config_at(file))
    return ready, Worker(ready.plan, "dev", tasks=ready.tasks)


def of_classes(folder, lines, items):
    """The probabilities of the right classes, from a plain loop over single texts."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    words = AutoTokenizer.from_pretrained(folder)
    out = []
    for item in items:
        row = lines[item.index]
        with torch.inference_mode():
            logits = model(torch.tensor([words(row["text"])["input_ids"]])).logits[0].double()
        out.append((torch.exp(logits) / torch.exp(logits).sum())[MOODS.index(row["label"])].item())
    return out


def test_a_classifier_s_probabilities_are_those_of_a_plain_loop(classify, encoders):
    file, lines = classify()
    ready, worker = worker_of(file)
    expected = of_classes(encoders / "a", lines, ready.tasks.items.dev)
    result = worker.evaluate(Candidate(0, ready.experts[0], "test"))
    assert result.probabilities == pytest.approx(expected, abs=2e-6)
    assert set(result.items) <= {0.0, 1.0}
    assert unpack_result(pack_result(result)) == result


def test_sets_of_labels_are_chosen_label_by_label(classify, encoders):
    file, lines = classify(threshold=0.5)
    ready, worker = worker_of(file)
    model = AutoModelForSequenceClassification.from_pretrained(encoders / "a").eval()
    words, expected = AutoTokenizer.from_pretrained(encoders / "a"), []
    for item in ready.tasks.items.dev:
        row = lines[item.index]
        with torch.inference_mode():
            each = model(torch.tensor([words(row["text"])["input_ids"]])).logits[0].sigmoid().tolist()
        expected.append(math.prod(p if MOODS[n] == row["label"] else 1 - p for n, p in enumerate(each)))
    result = worker.evaluate(Candidate(0, ready.experts[0], "test"))
    assert result.probabilities == pytest.approx(expected, abs=2e-6)


def test_options_are_weighed_by_their_likelihoods(make_config, tmp_path, models):
    ready, worker = worker_of(make_config(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(models / "a").eval()
    words = AutoTokenizer.from_pretrained(models / "a")
    documents = ready.tasks.judges["toy"].library.tasks["toy"].eval_docs

    def likelihood(question, option):
        context, whole = (words(text)["input_ids"] for text in (question, f"{question} {option}"))
        with torch.inference_mode():
            said = model(torch.tensor([whole])).logits[0].double().log_softmax(-1)
        return sum(said[k - 1, whole[k]].item() for k in range(len(context), len(whole)))

    expected = []
    for item in ready.tasks.items.dev:
        document = documents[item.index]
        found = [likelihood(f"Question: {document['question']}\nAnswer:", o) for o in document["choices"]]
        expected.append(np.exp(found)[document["answer"]] / np.exp(found).sum())
    result = worker.evaluate(Candidate(0, ready.experts[0], "test"))
    assert result.probabilities == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("fitness", ["probability", "both"])
def test_a_search_may_go_by_probabilities(classify, fitness):
    plain, other = (worker_of(classify(f)[0]) for f in ("score", fitness))
    scored, fit = (w.evaluate(Candidate(0, ready.experts[1], "test")) for ready, w in (plain, other))
    assert fit.probabilities == scored.probabilities
    expected = [
        p if fitness == "probability" else (p + s) / 2 for p, s in zip(scored.probabilities, scored.items, strict=True)
    ]
    assert fit.items == pytest.approx(expected, abs=1e-6)
    assert fit.score == pytest.approx(math.fsum(expected) / len(expected), abs=1e-6)


def test_shared_items_and_those_known_before_give_the_same(classify):
    ready, worker = worker_of(classify("both")[0])
    whole = worker.evaluate(Candidate(0, ready.experts[0], "test"))
    shared = shared_result(worker, Candidate(0, ready.experts[0], "test"), 3)
    assert (shared.items, shared.probabilities) == (whole.items, whole.probabilities)
    rest = worker.evaluate(Candidate(0, ready.experts[0], "test").asking(known=whole.items[:16]))
    assert rest.items == whole.items
    assert rest.probability_of(40) == {k: whole.probabilities[k] for k in range(16, 40)}


def test_probabilities_stand_at_their_items_along_any_order(classify):
    ready, worker = worker_of(classify()[0])
    whole = worker.evaluate(Candidate(0, ready.experts[0], "test"))
    along = worker.evaluate(Candidate(1, ready.experts[0], "test").asking(order="another"))
    assert along.probabilities != whole.probabilities
    assert along.probability_of(40) == pytest.approx(whole.probability_of(40), abs=2e-6)


@pytest.mark.whole
@pytest.mark.parametrize("fitness", ["score", "both"])
def test_a_whole_run_keeps_them_and_is_decided_by_scores(classify, tmp_path, fitness):
    file, _ = classify(fitness, select=25)
    folder = run_here(file, tmp_path / "results")
    found = rows(folder)
    assert all(len(r["probabilities"]) == len(r["items"]) - r["given"] for r in found.values() if not r["reused"])
    own = [r["items"] for r in found.values() if r["stage"] == "search"]
    assert all(set(items) <= {0.0, 1.0} for items in own) == (fitness == "score")
    assert all(set(r["items"]) <= {0.0, 1.0} for r in found.values() if r["stage"] in ("select", "report"))
    outcome = read_history(storage_at(folder)).outcome()
    finals = outcome.finals
    if fitness == "both":
        assert finals.apart
        assert finals.ranked[0].select.score == max(c.select.score for c in finals.searched)
        assert finals.best_expert.select.score == max(c.select.score for c in finals.experts)
        assert {r["metric"] for r in score_rows(outcome) if r["task"]} == {"acc", "both"}
        assert "that leads on the select items alone" in (folder / "report.md").read_text()
    assert ("the means of the items' scores and of the probabilities" in (folder / "report.md").read_text()) == (
        fitness == "both"
    )


@pytest.mark.parametrize(
    ("fitness", "task", "metric", "said"),
    [
        ("probability", "echo", "exact_match", "the probability of the right answer to an item of echo"),
        ("both", "yesno", "mcc", "mcc of yesno"),
    ],
)
def test_what_has_no_probability_is_refused(make_config, tmp_path, fitness, task, metric, said):
    entry = {"task": task, "metric": metric, "dev": 9, "report": 9}
    file = make_config(tmp_path, {"evaluation.fitness": fitness, "evaluation.tasks": [entry]})
    with pytest.raises(BadInput) as refused:
        prepare(config_at(file))
    assert f": evaluation.fitness: {said}" in str(refused.value)


def test_results_of_nothing_known_have_none():
    assert Result(0, Expert("a", "1").id, "ok", items=(1.0,)).probability_of(1) == {}
