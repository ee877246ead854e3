"""Tasks that a function of the user's own judges."""

from __future__ import annotations

import json

import pytest
import torch
import toys
import yaml
from toys import rows, run_here
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertForSequenceClassification

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.records import Candidate
from evolver.workers.worker import Worker

pytestmark = pytest.mark.whole

LENGTHS = """
from __future__ import annotations
import dataclasses, sys

@dataclasses.dataclass
class Answer:  # looks for its module by name
    value: float

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

def nothing(model, items):
    pass

def leaving(model, items):
    sys.exit("bye")

def untidy(model, items):
    assert not model.module.training
    model.module.train()
    return [float(len(item.pop("question")) % 2) for item in items]

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
    ready = prepare(config_at(configured()))
    result = Worker(ready.plan, "dev", tasks=ready.tasks).evaluate(Candidate(0, ready.experts[0], "test"))
    data = [json.loads(line) for line in (tasks / "toy.jsonl").read_text().splitlines()]
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
        ("nothing", "TypeError: the function of mine returned a NoneType of which no list of numbers can be made"),
        ("leaving", "RuntimeError: the function of mine left the program with 'bye'"),
    ],
)
def test_what_goes_wrong_is_a_failed_result_and_the_worker_goes_on(configured, name, said):
    ready = prepare(config_at(configured(name)))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    for number in range(2):
        result = worker.evaluate(Candidate(number, ready.experts[number], "test"))
        assert (result.status, result.reason) == ("failed", said)


def test_what_a_function_leaves_behind_does_not_meet_the_next_candidate(configured):
    ready = prepare(config_at(configured("untidy")))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    first, second = (worker.evaluate(Candidate(n, ready.experts[0], "test")) for n in range(2))
    assert first.status == "ok", first.reason
    assert second.items == first.items
    assert 0 < sum(first.items) < 20


def test_code_that_cannot_be_run_is_one_sentence(configured, tmp_path):
    file = configured()
    (tmp_path / "mine.py").write_text("raise SystemExit(3)")
    with pytest.raises(BadInput, match=r"function: .*mine.py cannot be run \(SystemExit: 3\); correct the file"):
        prepare(config_at(file))


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """A tiny BERT and two fine-tunes of it with heads of their own."""
    folder, words = tmp_path_factory.mktemp("classifiers"), toys.tokenizer()
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=len(words),
        max_position_embeddings=toys.LENGTH, initializer_range=0.3, pad_token_id=2, num_labels=3,
    )  # fmt: skip
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        BertForSequenceClassification(config).save_pretrained(folder / name)
        words.save_pretrained(folder / name)
    return folder


# What a classifier is sure of, item by item.
SURE = """
def score(model, items):
    import torch
    assert not torch.is_grad_enabled()
    rows = [model.tokenizer(item["question"], return_tensors="pt") for item in items]
    return [float(model.module(**row.to(model.device)).logits.softmax(-1).max()) for row in rows]
"""


@pytest.mark.parametrize("heads", ["merged", "apart"])
def test_it_judges_classifiers_each_with_its_head(classifiers, tasks, tmp_path, heads):
    (tmp_path / "sure.py").write_text(SURE)
    task = {"function": f"{tmp_path / 'sure.py'}:score", "data": str(tasks / "toy.jsonl"), "dev": 8, "report": 8}
    raw = {
        "run": "sure", "model": {"base": str(classifiers / "base"), "kind": "classifier", "heads": heads},
        "experts": {n: str(classifiers / n) for n in ("a", "b")},
        "search": {"algorithm": "evolver", "generations": 2}, "budget": {"candidates": 4},
        "evaluation": {"tasks": [{"task": "mine", "head": "b", **task}]},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    ready = prepare(config_at(tmp_path / "run.yaml"))
    result = Worker(ready.plan, "dev", tasks=ready.tasks).evaluate(Candidate(0, ready.experts[0], "test"))
    assert result.status == "ok", result.reason
    model = AutoModelForSequenceClassification.from_pretrained(classifiers / "a").eval()
    if heads == "apart":
        model.classifier = AutoModelForSequenceClassification.from_pretrained(classifiers / "b").classifier
    words = AutoTokenizer.from_pretrained(classifiers / "a")
    data = [json.loads(line) for line in (tasks / "toy.jsonl").read_text().splitlines()]
    for item, value in zip(ready.tasks.items.dev, result.items, strict=True):
        with torch.inference_mode():
            logits = model(**words(data[item.index]["question"], return_tensors="pt")).logits
        assert value == pytest.approx(float(logits.softmax(-1).max()), rel=1e-5)


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
        prepare(config_at(configured(**changes)))


@pytest.mark.parametrize(("name", "said"), [("scor", "did you mean 'score'"), ("word", "has no function 'word'")])
def test_a_name_that_is_no_function(configured, name, said):
    with pytest.raises(BadInput, match=said):
        prepare(config_at(configured(name)))


def test_another_function_is_another_run(configured, tmp_path):
    first = prepare(config_at(configured())).identity["items"]
    (tmp_path / "mine.py").write_text(LENGTHS.replace("% 2", "% 3 == 0"))
    assert prepare(config_at(configured())).identity["items"] != first
