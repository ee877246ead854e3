"""Encoder classifiers: a whole run, and scores held against a plain loop."""

from __future__ import annotations

import json
import random

import pytest
import torch
import toys
import yaml
from scipy import stats
from sklearn.metrics import f1_score
from toys import MOODS, rows, run_here, texts
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.workers.worker import Worker


@pytest.fixture
def classify(encoders, tmp_path):
    """``classify(rows)`` writes the data and a configuration over them."""

    def make(lines, **changes):
        data = toys.write_rows(tmp_path / "data.jsonl", lines)
        entry = {"task": "mood", "data": data, "dev": 40, "report": 30, **changes}
        settings = {
            "run": "mood",
            "model": {"base": str(encoders / "base"), "kind": "classifier"},
            "experts": {n: str(encoders / n) for n in ("a", "b")},
            "search": {"algorithm": "evolver", "generations": 3},
            "budget": {"candidates": 8},
            "evaluation": {"tasks": [entry], "batch_tokens": 128},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
        return tmp_path / "run.yaml"

    return make


@pytest.mark.whole
def test_whole_run_and_a_plain_loop_agree(classify, tmp_path):
    draw = random.Random(1)
    data = [{"text": t, "label": draw.choice(MOODS)} for t in texts()]
    file = classify(data)
    folder = run_here(file, tmp_path / "results")
    assert json.loads((folder / "best.json").read_text()) == {"items": 40, "equal": 40}
    best = AutoModelForSequenceClassification.from_pretrained(folder / "best").eval()
    words = AutoTokenizer.from_pretrained(folder / "best")
    expected = []
    for item in prepare(config_at(file)).tasks.items.dev:
        row = data[item.index]
        with torch.inference_mode():
            logits = best(torch.tensor([words(row["text"])["input_ids"]])).logits[0]
        expected.append(float(MOODS[int(logits.argmax())] == row["label"]))
    on_dev = [r for r in rows(folder).values() if r["stage"] in ("baseline", "search")]
    found = [r for r in on_dev if r["recipe"] == toys.winner(folder)]
    assert found
    assert all(r["items"] == expected for r in found)
    assert 0 < sum(expected) < 40


def questions(scorer):
    (part, _), *others = scorer.parts
    assert not others
    return part.questions


def test_labels_as_words_and_as_numbers_mean_the_same(classify):
    numbers = [random.Random(2).randrange(3) for _ in range(75)]
    said = [{"text": t, "label": MOODS[n]} for t, n in zip(texts(), numbers, strict=True)]
    counted = [{"text": t, "label": n} for t, n in zip(texts(), numbers, strict=True)]
    golds = []
    for data in (said, counted):
        ready = prepare(config_at(classify(data)))
        scorer = Worker(ready.plan, "dev", tasks=ready.tasks).scorer
        golds.append({i.index: a.right for i, a in zip(ready.tasks.items.dev, questions(scorer), strict=True)})
    shared = golds[0].keys() & golds[1].keys()
    assert {i: golds[0][i] for i in shared} == {i: numbers[i] for i in shared} == {i: golds[1][i] for i in shared}


@pytest.mark.parametrize(("label", "hint"), [("goood", "did you mean 'good'"), (7, "known: bad"), (1.5, "known: bad")])
def test_unknown_label_is_refused(classify, tmp_path, label, hint):
    data = [{"text": t, "label": label} for t in texts()]
    with pytest.raises(BadInput) as refused:
        run_here(classify(data), tmp_path / "results")
    assert str(refused.value).startswith("evaluation: mood has the label")
    assert hint in str(refused.value)


def test_base_without_a_head_is_refused(classify, models, tmp_path):
    """Transformers would give it a head of random numbers, and the run would be about nothing."""
    file = classify([{"text": t, "label": 0} for t in texts()])
    raw = yaml.safe_load(file.read_text())
    raw |= {"model": {"base": str(models / "base"), "kind": "classifier"}}
    raw |= {"experts": {n: str(models / n) for n in ("a", "b")}}
    file.write_text(yaml.safe_dump(raw))
    with pytest.raises(BadInput, match=r"model\.base: .* lacks score\.weight, which a model of its config"):
        run_here(file, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def said(file, words_of, base):
    """What the scorer keeps of every dev item, and the logits that a plain loop over single items finds."""
    ready = prepare(config_at(file))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    model, words = AutoModelForSequenceClassification.from_pretrained(base).eval(), AutoTokenizer.from_pretrained(base)
    logits = []
    for item in ready.tasks.items.dev:
        with torch.inference_mode():
            logits.append(model(**words(*words_of(item.index), return_tensors="pt")).logits[0])
    return ready, worker, worker.scorer.score(0, len(logits)).items, logits


def test_a_metric_of_all_answers_keeps_the_answers(classify, encoders):
    data = [{"text": t, "label": random.Random(t).choice(MOODS)} for t in texts()]
    file = classify(data, metric="macro_f1")
    ready, worker, kept, logits = said(file, lambda i: (data[i]["text"],), encoders / "base")
    assert kept == [float(row.argmax()) for row in logits]
    assert worker.scorer.score(0, 40).words == [MOODS[int(row.argmax())] for row in logits]
    right = [MOODS.index(data[i.index]["label"]) for i in ready.tasks.items.dev]
    assert worker.scale.score(kept) == pytest.approx(f1_score(right, kept, average="macro"))


@pytest.mark.whole
def test_a_whole_run_by_a_metric_of_all_answers(classify, tmp_path):
    data = [{"text": t, "label": random.Random(t).choice(MOODS)} for t in texts()]
    folder = run_here(classify(data, metric="mcc"), tmp_path / "results")
    report = (folder / "report.md").read_text()
    assert "on 30 report items" in report
    finished = [r for r in rows(folder).values() if r["status"] == "ok" and r["complete"]]
    assert finished
    assert all(set(r["items"]) <= {0.0, 1.0, 2.0} for r in finished)


def test_pairs_of_texts_from_a_table(classify, encoders, tmp_path):
    lines, path = texts(), tmp_path / "pairs.tsv"
    cells = [f"{t}\t{u}\t{len(t) % 3}" for t, u in zip(lines, reversed(lines), strict=True)]
    path.write_text("\n".join(["one\ttwo\tlabel", *cells]))
    file = classify([], data=str(path), text="one", text_pair="two")
    ready, _, kept, logits = said(file, lambda i: (lines[i], lines[-1 - i]), encoders / "base")
    right = [len(lines[i.index]) % 3 for i in ready.tasks.items.dev]
    assert kept == [float(int(row.argmax()) == r) for row, r in zip(logits, right, strict=True)]
    assert 0 < sum(kept) < len(kept)


@pytest.mark.parametrize("metric", ["acc", "macro_f1"])
def test_sets_of_labels(classify, encoders, metric):
    data = [{"text": t, "label": [n for n in MOODS if random.Random(t + n).random() < 0.5]} for t in texts()]
    file = classify(data, metric=metric, threshold=0.4)
    ready, worker, kept, logits = said(file, lambda i: (data[i]["text"],), encoders / "base")
    chosen = [(row.sigmoid() > 0.4).int().tolist() for row in logits]
    right = [[int(n in data[i.index]["label"]) for n in MOODS] for i in ready.tasks.items.dev]
    words = [", ".join(n for n, c in zip(MOODS, row, strict=True) if c) or "no label" for row in chosen]
    assert worker.scorer.score(0, 40).words == words
    shown = ready.tasks.show("dev", range(40))
    assert {p: (text.prompt, text.right) for p, text in shown.items()} == {
        p: (data[i.index]["text"], ", ".join(data[i.index]["label"]) or "no label")
        for p, i in enumerate(ready.tasks.items.dev)
    }
    if metric == "acc":
        assert kept == [float(c == r) for c, r in zip(chosen, right, strict=True)]
    else:
        assert worker.scale.score(kept) == pytest.approx(f1_score(right, chosen, average="macro"))


def test_a_number_each(classify, encoders, tmp_path):
    """A model with one output, as it is trained for STS-B."""
    folder = tmp_path / "one"
    config = BertConfig.from_pretrained(encoders / "base", num_labels=1)
    torch.manual_seed(5)
    BertForSequenceClassification(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(encoders / "base").save_pretrained(folder)
    data = [{"text": t, "label": len(t) / 10} for t in texts()]
    file = classify(data, metric="pearson")
    raw = yaml.safe_load(file.read_text())
    raw |= {"model": {"base": str(folder), "kind": "classifier"}, "experts": {n: str(folder) for n in ("a", "b")}}
    file.write_text(yaml.safe_dump(raw))
    ready, worker, kept, logits = said(file, lambda i: (data[i]["text"],), folder)
    assert kept == pytest.approx([row.item() for row in logits], abs=1e-5)
    assert worker.scorer.score(0, 40).words == [f"{value:.4g}" for value in kept]
    right = [len(data[i.index]["text"]) / 10 for i in ready.tasks.items.dev]
    assert worker.scale.score(kept) == pytest.approx(stats.pearsonr(kept, right).statistic)


def test_a_number_is_not_asked_of_a_model_that_names_classes(classify):
    ready = prepare(config_at(classify([{"text": t, "label": 0.5} for t in texts()], metric="pearson")))
    with pytest.raises(BadInput, match=r"^evaluation: mood asks for a number, but the model gives one of 3 labels\."):
        Worker(ready.plan, "dev", tasks=ready.tasks)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"metric": "f1"}, "evaluation.tasks[0].metric: unknown metric 'f1'"),
        ({"data": "nowhere.jsonl"}, "evaluation.tasks[0].data: nowhere.jsonl cannot be read"),
        ({"text": "sentence"}, "lacks the key 'sentence'"),
        ({"report": 100}, "140 items are asked for"),
    ],
)
def test_unusable_data_are_refused(classify, changes, says):
    data = [{"text": t, "label": 0} for t in texts()]
    with pytest.raises(BadInput) as refused:
        prepare(config_at(classify(data, **changes)))
    assert says in str(refused.value)
