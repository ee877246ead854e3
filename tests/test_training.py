"""Pools of experts: trained once for their content, resumed where they were killed, measured on their tasks."""

from __future__ import annotations

import json
import random

import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

from evolver.cli import app
from evolver.errors import BadInput
from evolver.training.experts import cache, make_pool
from evolver.training.losses import Learner, lessons_of, loss_of
from evolver.training.settings import PoolConfig, load_pool

LABELS = ["red", "green", "blue"]


class Silent:
    def __init__(self):
        self.steps, self.said = [], []

    def say(self, line):
        self.said.append(line)

    def begin(self, name, steps):
        self.steps.append((name, steps))

    def step(self, step, loss):
        self.steps.append((step, loss))

    def close(self): ...


def rows(seed, count=60):
    draw = random.Random(seed)
    out = []
    for number in range(count):
        label = draw.choice(LABELS)
        out.append({"text": f"the {label} {draw.choice(toys.THINGS)} {number}", "label": label})
    return out


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A tiny BERT without a head or a pooler."""
    from transformers import BertConfig, BertModel

    folder, words = tmp_path_factory.mktemp("encoder"), toys.tokenizer()
    torch.manual_seed(0)
    config = BertConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(words),
        max_position_embeddings=toys.LENGTH, pad_token_id=2, initializer_range=0.2,
    )  # fmt: skip
    BertModel(config, add_pooling_layer=False).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path / "cache"))


def classifiers(encoder, tmp_path, **changes):
    data = {name: write(tmp_path / f"{name}.jsonl", rows(seed)) for seed, name in enumerate(("one", "two"))}
    tasks = [{"task": n, "data": f, "dev": 5, "report": 40} for n, f in data.items()]
    return {
        "pool": "toys", "base": str(encoder), "kind": "classifier", "labels": LABELS,
        "train": {"steps": 12, "batch": 16, "peak_rate": 0.01, "warmup": 2, "save_every": 5},
        "experts": {n: {"data": [f]} for n, f in data.items()},
        "evaluation": {"tasks": tasks}, **changes,
    }  # fmt: skip


def test_experts_of_one_label_space_share_their_head(encoder, tmp_path):
    pool, show = PoolConfig.model_validate(classifiers(encoder, tmp_path)), Silent()
    folders = make_pool(pool, show)
    weights = {n: load_file(f / "model.safetensors") for n, f in folders.items()}
    assert weights["base"].keys() == weights["one"].keys() == weights["two"].keys()
    assert weights["base"]["classifier.weight"].shape == (3, 32)
    moved = {
        n: float((weights[n]["classifier.weight"] - weights["base"]["classifier.weight"]).abs().max()) for n in weights
    }
    assert 0 == moved["base"] < moved["one"] < 1  # trained from the base's head, not from one of its own
    assert show.steps[0] == ("one", 12)
    losses = [loss for _, loss in show.steps[1:13]]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_an_expert_is_trained_once_for_its_content(encoder, tmp_path):
    raw = classifiers(encoder, tmp_path)
    make_pool(PoolConfig.model_validate(raw), Silent())
    again = Silent()
    make_pool(PoolConfig.model_validate(raw), again)
    assert again.steps == []
    write(tmp_path / "two.jsonl", rows(9))
    other = Silent()
    make_pool(PoolConfig.model_validate(raw), other)
    assert [s[0] for s in other.steps if isinstance(s[0], str)] == ["two"]


@pytest.mark.parametrize("killed_at", [3, 7, 11])
def test_a_killed_training_ends_with_the_same_weights(encoder, tmp_path, killed_at):
    pool = PoolConfig.model_validate(classifiers(encoder, tmp_path))
    whole = {n: load_file(f / "model.safetensors") for n, f in make_pool(pool, Silent()).items()}
    for folder in cache().iterdir():
        if folder.name != "toys" and (folder / "training.json").exists():
            (folder / "model.safetensors").unlink()
            folder.rename(folder.with_name(f"{folder.name}.gone"))

    class Killed(Silent):
        def step(self, step, loss):
            if step == killed_at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_pool(pool, Killed())
    rest = Silent()
    folders = make_pool(pool, rest)
    assert rest.steps[1][0] == killed_at // 5 * 5 + (0 if killed_at % 5 == 0 and killed_at else 1)
    again = load_file(folders["one"] / "model.safetensors")
    assert all(torch.equal(again[n], t) for n, t in whole["one"].items())
    assert not list(cache().glob("*.training"))


def test_heads_of_their_own(encoder, tmp_path):
    raw = classifiers(encoder, tmp_path, labels=None)
    write(tmp_path / "two.jsonl", [{**r, "label": "other" if r["label"] == "red" else "same"} for r in rows(1)])
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump(raw))
    done = CliRunner().invoke(app, ["experts", str(tmp_path / "pool.yaml")])
    assert done.exit_code == 0, done.output
    base, one, two = (load_file(cache() / "toys" / n / "model.safetensors") for n in ("base", "one", "two"))
    assert not [n for n in base if n.startswith("classifier")]
    assert (one["classifier.weight"].shape, two["classifier.weight"].shape) == ((3, 32), (2, 32))
    assert "bert.pooler.dense.weight" in base  # drawn once, so that it has an ancestor
    table = (cache() / "toys" / "table.md").read_text()
    assert table.count("**") == 4
    assert "failed" not in table


def test_an_adapter(encoder, tmp_path):
    pool = PoolConfig.model_validate(classifiers(encoder, tmp_path))
    raw = {**pool.model_dump(), "train": {**pool.train, "method": "lora"}}
    folders = make_pool(PoolConfig.model_validate(raw), Silent())
    assert (folders["one"] / "adapter_model.safetensors").exists()


def test_language_models_learn_to_choose_and_to_write(models, tmp_path):
    choose = [
        {"prompt": f"Is the {r['text']}?", "choices": [f" {c}" for c in LABELS], "answer": LABELS.index(r["label"])}
        for r in rows(0)
    ]
    written = [{"prompt": f"Is the {r['text']}?", "completion": f" {r['label']}"} for r in rows(1)]
    raw = {
        "pool": "talkers", "base": str(models / "base"), "kind": "causal-lm",
        "train": {"steps": 15, "batch": 8, "peak_rate": 0.01, "warmup": 2, "max_tokens": 100},
        "experts": {"both": {"data": [write(tmp_path / "c.jsonl", choose), write(tmp_path / "w.jsonl", written)]}},
        "evaluation": {"tasks": [{"task": "t", "dev": 1, "report": 1}]},
    }  # fmt: skip
    show = Silent()
    folders = make_pool(PoolConfig.model_validate(raw), show)
    losses = [loss for step, loss in show.steps if isinstance(step, int)]
    assert sum(losses[-4:]) < sum(losses[:4]) / 2
    assert folders["base"].resolve() == (models / "base").resolve()


def test_a_choice_is_learnt_by_what_decides_it(models):
    """The loss is the cross-entropy over the choices' summed log-likelihoods, held against separate passes."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32).eval()
    words = AutoTokenizer.from_pretrained(models / "base")
    raw = {
        "pool": "x", "base": "x", "kind": "causal-lm", "train": {"steps": 1}, "experts": {"a": {"data": ["x"]}},
        "evaluation": {"tasks": [{"task": "t", "dev": 1, "report": 1}]},
    }  # fmt: skip
    loss = loss_of(PoolConfig.model_validate(raw), "a", words, [])
    row = {"prompt": "Is the red house 1?", "choices": [" red house", " green", " blue bird"], "answer": 2}
    found = loss(Learner(module, words), lessons_of(loss, [row], "data"))
    sums = []
    for choice in row["choices"]:
        context = words(row["prompt"])["input_ids"]
        whole = torch.tensor([words(row["prompt"] + choice)["input_ids"]])
        logs = module(whole).logits[0].log_softmax(-1)
        sums.append(sum(logs[i - 1, whole[0, i]] for i in range(len(context), whole.shape[1])))
    assert found.item() == pytest.approx(-torch.stack(sums).log_softmax(0)[2].item(), rel=1e-4)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "classifer"}, "kind: 'classifer' is not usable"),
        ({"train": {"steps": 3, "bach": 4}}, "experts.one.train.bach: unknown key; did you mean 'batch'"),
        ({"experts": {}}, "experts: "),
    ],
)
def test_a_bad_configuration_is_one_sentence(encoder, tmp_path, change, said):
    (tmp_path / "pool.yaml").write_text(yaml.safe_dump({**classifiers(encoder, tmp_path), **change}))
    with pytest.raises(BadInput) as refused:
        load_pool(tmp_path / "pool.yaml")
    assert said in str(refused.value)


def test_rows_that_cannot_be_learnt_from_are_named(encoder, tmp_path):
    raw = classifiers(encoder, tmp_path)
    write(tmp_path / "one.jsonl", [{"text": "the red boat", "label": "purple"}])
    with pytest.raises(BadInput, match=r"experts.one.data: row 1 cannot be learnt from"):
        make_pool(PoolConfig.model_validate(raw), Silent())


def test_what_is_missing_for_adapters_is_named(encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    raw = classifiers(encoder, tmp_path)
    raw["train"]["method"] = "lora"
    with pytest.raises(BadInput, match=r"lora needs peft; run pip install 'evolver\[experts\]'"):
        make_pool(PoolConfig.model_validate(raw), Silent())
