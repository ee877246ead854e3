"""Token classifiers: a tag for each word, held against a plain loop, and spans as seqeval counts them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
import toys
import yaml
from toys import TAGS, refused, rows, run_here, tagged
from transformers import (
    AutoModelForTokenClassification,
    AutoTokenizer,
    BertConfig,
    BertForMaskedLM,
    BertForTokenClassification,
)

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.evaluation.judges.token_classifier import first_tokens, of_words, spans
from evolver.evaluation.scores.metrics import right_share, span_f1
from evolver.records import Candidate
from evolver.workers.worker import Worker

SPACES = {"things": ("O", "B-thing", "I-thing"), "colours": ("B-colour", "I-colour", "O")}


@pytest.fixture(scope="module")
def taggers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("taggers")
    toys.make_taggers(folder)
    return folder


@pytest.fixture
def configured(taggers, tmp_path):
    """``configured(rows, **changes of the task)`` writes the data and a configuration over them."""

    def make(lines=None, **changes):
        data = toys.write_rows(tmp_path / "data.jsonl", tagged() if lines is None else lines)
        entry = {"task": "tags", "data": data, "dev": 40, "report": 30, **changes}
        settings = {
            "run": "tags",
            "model": {"base": str(taggers / "base"), "kind": "token-classifier"},
            "experts": {n: str(taggers / n) for n in ("a", "b")},
            "search": {"algorithm": "evolver", "generations": 3},
            "budget": {"candidates": 8},
            "evaluation": {"tasks": [entry], "batch_tokens": 128},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        return tmp_path / "run.yaml"

    return make


def plain_tags(folder, lines, tags=TAGS):
    """The tags that Transformers gives to the words of each row, one row at a time."""
    model = AutoModelForTokenClassification.from_pretrained(folder).eval()
    words, out = AutoTokenizer.from_pretrained(folder), []
    for row in lines:
        pieces = [words(f" {word}")["input_ids"] for word in row["text"]]
        with torch.inference_mode():
            said = model(torch.tensor([[token for piece in pieces for token in piece]])).logits[0].argmax(-1).tolist()
        starts = np.cumsum([0, *map(len, pieces[:-1])])
        out.append([tags[said[start]] for start in starts])
    return out


def worker_of(file):
    ready = prepare(config_at(file))
    return ready, Worker(ready.plan, "dev", tasks=ready.tasks)


@pytest.mark.parametrize("form", ["lists", "texts", "numbers", "parquet"])
def test_words_are_tagged_as_a_plain_loop_tags_them(configured, taggers, tmp_path, form):
    lines, changes = tagged(), {}
    given = [{"words": r["text"], "tags": r["label"]} for r in lines]
    if form == "texts":
        given = [{k: " ".join(v) for k, v in row.items()} for row in given]
    if form == "numbers":
        given = [{**row, "tags": [TAGS.index(t) for t in row["tags"]]} for row in given]
    if form == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(given), tmp_path / "data.parquet")
        changes = {"data": str(tmp_path / "data.parquet")}
    ready, worker = worker_of(configured(given, text="words", label="tags", **changes))
    chosen = [lines[i.index] for i in ready.tasks.items.dev]
    expected = plain_tags(taggers / "base", chosen)
    found = worker.scorer.score(0, 40)
    assert found.words == [" ".join(tags) for tags in expected]
    right = [sum(a == b for a, b in zip(e, r["label"], strict=True)) for e, r in zip(expected, chosen, strict=True)]
    lengths = [len(r["text"]) for r in chosen]
    assert found.items == [(hits / n, hits, n) for hits, n in zip(right, lengths, strict=True)]
    words = sum(lengths)
    assert 0 < sum(right) < words
    assert worker.scale.score(found.items) == pytest.approx(sum(right) / words)
    shown = ready.tasks.show("dev", [0])[0]
    assert (shown.prompt, shown.right) == (" ".join(chosen[0]["text"]), " ".join(chosen[0]["label"]))


def test_f1_is_that_of_all_spans_together(configured, taggers):
    ready, worker = worker_of(configured(metric="f1"))
    chosen = [tagged()[i.index] for i in ready.tasks.items.dev]
    given, right = ([spans(t) for t in tags] for tags in (plain_tags(taggers / "base", chosen), [r["label"] for r in chosen]))  # fmt: skip  # noqa: E501
    hits = sum(len(g & r) for g, r in zip(given, right, strict=True))
    assert hits > 0
    expected = 2 * hits / (sum(map(len, given)) + sum(map(len, right)))
    assert worker.scale.score(worker.scorer.score(0, 40).items) == pytest.approx(expected)


@pytest.mark.parametrize("metric", ["acc", "f1"])
def test_workers_that_share_the_items_have_the_same_value(configured, metric):
    file = configured(metric=metric)
    file.write_text(file.read_text().replace("batch_tokens: 128", "block_items: 8"))
    ready, worker = worker_of(file)
    candidate = Candidate(0, ready.experts[0], "test")
    alone, shared = worker.evaluate(candidate), toys.shared_result(worker, candidate, 3)
    assert (shared.score, shared.items, shared.tasks) == (alone.score, alone.items, alone.tasks)
    assert 0 < alone.score < 1


# What seqeval 1.2.2 (get_entities) says of these tags; the end counts the last word there.
@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("B-PER I-PER O B-LOC", {("PER", 0, 2), ("LOC", 3, 4)}),
        ("B-PER B-PER I-PER", {("PER", 0, 1), ("PER", 1, 3)}),
        ("O I-PER I-PER O", {("PER", 1, 3)}),
        ("B-PER I-LOC I-LOC", {("PER", 0, 1), ("LOC", 1, 3)}),
        ("I-PER B-PER", {("PER", 0, 1), ("PER", 1, 2)}),
        ("B-PER I-PER E-PER I-PER", {("PER", 0, 3), ("PER", 3, 4)}),
        ("S-LOC E-LOC S-LOC S-LOC", {("LOC", 0, 1), ("LOC", 1, 2), ("LOC", 2, 3), ("LOC", 3, 4)}),
        ("B-a-b I-a-b I-a", {("a-b", 0, 2), ("a", 2, 3)}),
        ("O O", set()),
        ("", set()),
    ],
)
def test_spans_are_those_of_seqeval(tags, found):
    assert spans(tags.split()) == found


def test_metrics_of_counts_are_sums_over_the_items_of_each_resample():
    sums = np.array([[2.0, 5.0, 4.0], [4.0, 8.0, 7.0], [0.0, 0.0, 0.0]])
    assert span_f1(sums, np.zeros(3)) == pytest.approx([4 / 9, 8 / 15, 0.0])
    assert right_share(np.array([[2.0, 4.0], [0.0, 0.0]]), np.zeros(2)) == pytest.approx([0.5, 0.0])


def test_the_first_token_of_a_word_counts_and_a_word_without_tokens_has_none():
    assert first_tokens([None, 0, 0, 2, None], 4) == (1, None, 3, None)


def test_tokenizers_of_bytes_are_told_of_the_space_before_a_word():
    words = toys.tokenizer()
    assert of_words(words)(["red", "house"], is_split_into_words=True)["input_ids"] == words(" red house")["input_ids"]
    assert words("red")["input_ids"] != words(" red")["input_ids"]  # the given one is left as it was


def test_words_that_are_cut_off_are_wrong_and_in_no_span(configured, taggers):
    long = [{"text": [str(n), *["house"] * 200], "label": ["B-thing"] * 201} for n in range(75)]
    for metric in ("acc", "f1"):
        _, worker = worker_of(configured(long, metric=metric))
        scored = worker.scorer.score(0, 3)
        assert scored.truncated == 3
        for said in scored.words:
            assert len(said.split()) >= 2
        assert worker.scale.metrics["tags"].best == 1.0
        if metric == "acc":
            assert all(0 <= right < toys.LENGTH < words for _, right, words in scored.items)


@pytest.mark.parametrize(
    ("lines", "changes", "said"),
    [
        ([{"text": ["a", "b"], "label": ["O"]}], {}, "row 1 has 2 words in 'text' and 1 tags in 'label'"),
        ([{"text": [], "label": []}], {}, "row 1 has 0 words"),
        ([{"text": ["a"], "label": ["B-thingy"]}], {}, "has the label 'B-thingy', which the model lacks; did you mean"),
        ([{"text": ["a"], "label": [-100]}], {}, "has the label -100, which the model lacks"),
        ([{"text": ["a"], "label": ["O"]}], {"metric": "macro_f1"}, "unknown metric 'macro_f1'"),
        ([{"text": ["a"], "label": ["O"]}], {"threshold": 0.5}, "tasks[0].threshold: the kind of evaluation token-cl"),
    ],
)
def test_what_cannot_be_scored_is_refused(configured, lines, changes, said):
    changes = {"dev": 3, "report": 3, **changes}
    more = [{"text": [f"w{n}"], "label": ["O"]} for n in range(5)]
    refused(lambda: prepare(config_at(configured([*lines, *more], **changes)), device="cpu"), said)


def test_spans_need_tags_that_name_them(configured, taggers, tmp_path):
    config = BertConfig.from_pretrained(taggers / "base", num_labels=6)  # LABEL_0 …
    toys.noisy_experts(BertForTokenClassification(config), tmp_path, toys.tokenizer())
    numbers = [{"text": r["text"], "label": [TAGS.index(t) for t in r["label"]]} for r in tagged()]
    file = configured(numbers, metric="f1")
    raw = yaml.safe_load(file.read_text())
    raw["model"]["base"] = str(tmp_path / "base")
    raw["experts"] = {n: str(tmp_path / n) for n in ("a", "b")}
    file.write_text(yaml.safe_dump(raw))
    refused(lambda: prepare(config_at(file)), "evaluation.tasks[0].metric: f1 counts spans", "'LABEL_0'", "write acc")


@pytest.mark.whole
@pytest.mark.parametrize("metric", ["acc", "f1"])
def test_a_whole_run(configured, tmp_path, metric):
    folder = run_here(configured(metric=metric), tmp_path / "results")
    assert json.loads((folder / "best.json").read_text()) == {"items": 40, "equal": 40}
    _, info = AutoModelForTokenClassification.from_pretrained(folder / "best", output_loading_info=True)
    assert (info["missing_keys"], info["unexpected_keys"]) == (set(), set())
    assert "token-classification" in (folder / "best" / "README.md").read_text()
    ended = toys.evolver("export", folder, tmp_path / "out.gguf", "--gguf", "q8_0")
    assert "only models of the kind causal-lm can be written as GGUF" in toys.refusal(ended.code, ended.err)


@pytest.fixture
def headed(taggers, tmp_path):
    """``headed(heads)``: two experts with tags of their own, on a masked language model as it is published."""
    torch.manual_seed(3)
    published = BertForMaskedLM(BertConfig.from_pretrained(taggers / "base"))
    published.save_pretrained(tmp_path / "base")
    body = {k: v for k, v in published.state_dict().items() if k.startswith("bert.")}
    for name, tags in SPACES.items():
        ids = {"id2label": dict(enumerate(tags)), "label2id": {t: i for i, t in enumerate(tags)}}
        model = BertForTokenClassification(BertConfig.from_pretrained(taggers / "base", **ids))
        model.load_state_dict({k: v + 0.1 * torch.randn_like(v) for k, v in body.items()}, strict=False)
        model.save_pretrained(tmp_path / name)
    for name in ("base", *SPACES):
        toys.tokenizer().save_pretrained(tmp_path / name)

    def make(heads):
        tasks = [
            {"task": name, "metric": metric, "dev": 20, "report": 10,
             "data": toys.write_rows(tmp_path / f"{name}.jsonl", tagged(tags=SPACES[name]))}
            for name, metric in zip(SPACES, ("acc", "f1"), strict=True)
        ]  # fmt: skip
        settings = {
            "run": "heads",
            "model": {"base": str(tmp_path / "base"), "kind": "token-classifier", "heads": heads},
            "experts": {n: str(tmp_path / n) for n in SPACES},
            "search": {"algorithm": "tpe", "method": "task_arithmetic"},
            "budget": {"candidates": 3},
            "evaluation": {"tasks": tasks},
        }
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
        return tmp_path / "run.yaml"

    return make


@pytest.mark.whole
def test_heads_apart_on_a_published_base(headed, tmp_path):
    folder = run_here(headed("apart"), tmp_path / "results")
    assert json.loads((folder / "best.json").read_text()) == {"items": 40, "equal": 40}
    for name, tags in SPACES.items():
        model, info = AutoModelForTokenClassification.from_pretrained(
            folder / "best" / name, output_loading_info=True
        )  # fmt: skip
        assert (info["missing_keys"], info["unexpected_keys"]) == (set(), set())
        assert tuple(model.config.id2label.values()) == tags
        own = AutoModelForTokenClassification.from_pretrained(tmp_path / name)
        assert torch.equal(model.classifier.weight, own.classifier.weight)


@pytest.mark.whole
def test_a_union_of_tags(headed, tmp_path):
    folder = run_here(headed("union"), tmp_path / "results")
    assert json.loads((folder / "best.json").read_text()) == {"items": 40, "equal": 40}
    best = AutoModelForTokenClassification.from_pretrained(folder / "best")
    tags = ("O", "B-thing", "I-thing", "B-colour", "I-colour")
    assert tuple(best.config.id2label.values()) == tags
    ready = prepare(config_at(tmp_path / "run.yaml"))
    dev = ready.tasks.items.dev
    data = {name: [json.loads(r) for r in (tmp_path / f"{name}.jsonl").read_text().splitlines()] for name in SPACES}
    words = [(i, data["things"][i.index]) for i in dev if i.task.startswith("things:")]
    expected = plain_tags(folder / "best", [row for _, row in words], tags)
    right = [sum(map(str.__eq__, e, r["label"])) / len(e) for e, (_, r) in zip(expected, words, strict=True)]
    found = next(r for r in rows(folder).values() if r["recipe"] == toys.winner(folder) and r["stage"] == "search")
    assert [a for a, i in zip(found["items"], dev, strict=True) if i.task.startswith("things:")] == right
