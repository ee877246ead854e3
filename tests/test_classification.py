"""Encoder classifiers: a whole run, and scores held against a plain loop."""

from __future__ import annotations

import json
import random

import pytest
import torch
import toys
import yaml
from toys import rows, run_here
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from evolver.errors import BadInput
from evolver.run import prepare
from evolver.worker import Worker

LABELS = ("bad", "fair", "good")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A tiny BERT with three labels, and two noisy fine-tunes of it."""
    folder, words = tmp_path_factory.mktemp("encoders"), toys.tokenizer()
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(words),
        max_position_embeddings=toys.LENGTH, initializer_range=0.3, pad_token_id=2,
        id2label=dict(enumerate(LABELS)), label2id={n: i for i, n in enumerate(LABELS)},
    )  # fmt: skip
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        noisy = {k: v + 0.1 * (seed > 0) * torch.randn_like(v) for k, v in weights.items()}
        model.load_state_dict(noisy)
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return folder


@pytest.fixture
def classify(encoders, tmp_path):
    """``classify(rows)`` writes the data and a configuration over them."""

    def make(lines, **changes):
        (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
        entry = {"task": "mood", "data": str(tmp_path / "data.jsonl"), "dev": 40, "report": 30, **changes}
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


def texts(count=75):
    draw = random.Random(3)
    return [" ".join([str(n), *draw.choices(toys.COLOURS + toys.THINGS, k=draw.randint(1, 20))]) for n in range(count)]


def test_whole_run_and_a_plain_loop_agree(classify, tmp_path):
    draw = random.Random(1)
    data = [{"text": t, "label": draw.choice(LABELS)} for t in texts()]
    file = classify(data)
    folder = run_here(file, tmp_path / "results")
    assert json.loads((folder / "best.json").read_text()) == {"items": 40, "equal": 40}
    best = AutoModelForSequenceClassification.from_pretrained(folder / "best").eval()
    words = AutoTokenizer.from_pretrained(folder / "best")
    expected = []
    for item in prepare(str(file)).tasks.items.dev:
        row = data[item.index]
        with torch.inference_mode():
            logits = best(torch.tensor([words(row["text"])["input_ids"]])).logits[0]
        expected.append(float(LABELS[int(logits.argmax())] == row["label"]))
    found = [r for r in rows(folder).values() if r["recipe"] == toys.winner(folder) and r["stage"] != "report"]
    assert found
    assert all(r["items"] == expected for r in found)
    assert 0 < sum(expected) < 40


def test_labels_as_words_and_as_numbers_mean_the_same(classify):
    numbers = [random.Random(2).randrange(3) for _ in range(75)]
    said = [{"text": t, "label": LABELS[n]} for t, n in zip(texts(), numbers, strict=True)]
    counted = [{"text": t, "label": n} for t, n in zip(texts(), numbers, strict=True)]
    golds = []
    for data in (said, counted):
        ready = prepare(str(classify(data)))
        scorer = Worker(ready.plan, "dev", tasks=ready.tasks).scorer
        golds.append({i.index: g for i, g in zip(ready.tasks.items.dev, scorer.golds, strict=True)})
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
    with pytest.raises(BadInput, match=r"model\.base: .* lacks score\.weight, which LlamaForSequenceClassification"):
        run_here(file, tmp_path / "results")


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
        prepare(str(classify(data, **changes)))
    assert says in str(refused.value)
