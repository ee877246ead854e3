"""Pools of experts: trained once for their content, resumed where they were killed, measured on their tasks."""

from __future__ import annotations

import io
import json
import os
import random
from pathlib import Path

import pytest
import torch
import toys
import yaml
from rich.console import Console
from safetensors.torch import load_file
from typer.testing import CliRunner

from evolver.checkpoints.heads import head_of
from evolver.checkpoints.sources import open_base, open_expert
from evolver.commands.cli import app
from evolver.errors import BadInput
from evolver.evaluation.items import item_hash
from evolver.evaluation.overlap import overlaps
from evolver.evaluation.scores.metrics import JUDGED, Metric
from evolver.evaluation.scores.scoring import Scale
from evolver.evaluation.tasks import load_tasks
from evolver.training.experts import cache, make_experts
from evolver.training.fit import CHECKPOINT
from evolver.training.losses import Learner, lessons_of, loss_of, training_text
from evolver.training.settings import PoolConfig, load_pool
from evolver.training.show import show
from evolver.training.table import standard_error

pytestmark = pytest.mark.whole

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


def learnt(raw):
    """The folders of a pool, whose training has to halve the loss."""
    seen = Silent()
    folders = make_experts(PoolConfig.model_validate(raw), seen)
    losses = [loss for step, loss in seen.steps if isinstance(step, int)]
    assert sum(losses[-4:]) < sum(losses[:4]) / 2
    return folders


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
    pool, seen = PoolConfig.model_validate(classifiers(encoder, tmp_path)), Silent()
    folders = make_experts(pool, seen)
    weights = {n: load_file(f / "model.safetensors") for n, f in folders.items()}
    assert weights["base"].keys() == weights["one"].keys() == weights["two"].keys()
    assert weights["base"]["classifier.weight"].shape == (3, 32)
    moved = {
        n: float((weights[n]["classifier.weight"] - weights["base"]["classifier.weight"]).abs().max()) for n in weights
    }
    assert 0 == moved["base"] < moved["one"] < 1  # trained from the base's head, not from one of its own
    assert seen.steps[0] == ("one", 12)
    losses = [loss for _, loss in seen.steps[1:13]]
    assert sum(losses[-3:]) < sum(losses[:3])


def test_an_expert_is_trained_once_for_its_content(encoder, tmp_path):
    raw = classifiers(encoder, tmp_path)
    make_experts(PoolConfig.model_validate(raw), Silent())
    again = Silent()
    make_experts(PoolConfig.model_validate(raw), again)
    assert again.steps == []
    write(tmp_path / "two.jsonl", rows(9))
    other = Silent()
    make_experts(PoolConfig.model_validate(raw), other)
    assert [s[0] for s in other.steps if isinstance(s[0], str)] == ["two"]


def test_the_record_of_an_expert_lists_its_training_texts(encoder, tmp_path):
    """As a run compares them with its items; a record of an earlier version is completed."""
    pool = PoolConfig.model_validate(classifiers(encoder, tmp_path))
    folders = make_experts(pool, Silent())
    file = folders["one"] / "training.json"
    record = json.loads(file.read_text())
    assert record["texts"] == sorted({item_hash(row["text"]) for row in rows(0)})
    tasks = load_tasks(pool.run({n: str(f) for n, f in folders.items()}, "toys"))
    found = overlaps(tasks.texts, {n: folders[n] for n in ("one", "two")}, ("dev", "report"))
    owners = {split: [i.task.partition(":")[0] for i in tasks.items.of(split)] for split in ("dev", "report")}
    both = {row["text"] for row in rows(0)} & {row["text"] for row in rows(1)}
    for name, overlap in found.items():
        for split, own in owners.items():
            assert own.count(name) <= overlap.shared[split] <= own.count(name) + len(both)
    file.write_text(json.dumps({key: value for key, value in record.items() if key != "texts"}))
    make_experts(pool, Silent())
    assert json.loads(file.read_text()) == record


@pytest.mark.parametrize(("kind", "texts"), [("causal-lm", ["p"]), ("seq2seq", ["say t"]), ("classifier", ["t"])])
def test_the_text_of_a_training_item_is_what_the_model_reads(kind, texts):
    raw = {
        "pool": "x", "base": "b", "kind": kind, "train": {"steps": 1},
        "experts": {"one": {"data": "f"}, "two": {"data": "f"}},
        "evaluation": {"tasks": [{"task": "one", "dev": 1, "report": 1}]}, "template": "say {text}",
    }  # fmt: skip
    pool = PoolConfig.model_validate(raw)
    assert [training_text(pool, pool.experts["one"], {"text": "t", "prompt": "p"})] == texts


@pytest.mark.parametrize("killed_at", [3, 7, 11])
def test_a_killed_training_ends_with_the_same_weights(encoder, tmp_path, killed_at):
    pool = PoolConfig.model_validate(classifiers(encoder, tmp_path))
    whole = {n: load_file(f / "model.safetensors") for n, f in make_experts(pool, Silent()).items()}
    for folder in cache().iterdir():
        if folder.name != "toys" and (folder / "training.json").exists():
            (folder / "model.safetensors").unlink()
            folder.rename(folder.with_name(f"{folder.name}.gone"))

    class Killed(Silent):
        def step(self, step, loss):
            if step == killed_at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_experts(pool, Killed())
    rest = Silent()
    folders = make_experts(pool, rest)
    assert rest.steps[1][0] == killed_at // 5 * 5 + (0 if killed_at % 5 == 0 and killed_at else 1)
    again = load_file(folders["one"] / "model.safetensors")
    assert all(torch.equal(again[n], t) for n, t in whole["one"].items())
    assert not list(cache().glob("*.training"))


def test_a_kill_while_a_checkpoint_is_written_costs_no_more_than_its_steps(encoder, tmp_path, monkeypatch):
    raw = classifiers(encoder, tmp_path)
    whole = {
        n: load_file(f / "model.safetensors") for n, f in make_experts(PoolConfig.model_validate(raw), Silent()).items()
    }
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path / "other"))
    replace, seen = os.replace, []

    def killed(source, target):
        if Path(target).name == CHECKPOINT and seen.append(target) is None and len(seen) == 2:
            raise KeyboardInterrupt  # step 10 is written down, but not under its name
        replace(source, target)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        make_experts(PoolConfig.model_validate(raw), Silent())
    rest = Silent()
    again = load_file(make_experts(PoolConfig.model_validate(raw), rest)["one"] / "model.safetensors")
    assert rest.steps[1][0] == 6
    assert all(torch.equal(again[n], t) for n, t in whole["one"].items())


@pytest.mark.parametrize("terminal", [True, False])
def test_what_a_person_sees(terminal, monkeypatch):
    shown = io.StringIO()
    monkeypatch.setattr("evolver.training.show.Console", lambda: Console(file=shown, force_terminal=terminal, width=90))
    seen = show()
    seen.begin("one", 60)
    seen.step(51, 0.5)  # a training that goes on
    seen.step(60, 0.25)
    seen.close()
    assert "60/60" in shown.getvalue() if terminal else "step 60 of 60, loss 0.250" in shown.getvalue()


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
    assert [row.count("–") for row in table.splitlines()[2:]] == [0, 1, 1]  # no body is judged under another's head


@pytest.mark.parametrize("labels", [LABELS, None])
def test_an_adapter_is_an_expert_of_its_base(encoder, tmp_path, labels):
    raw = classifiers(encoder, tmp_path, labels=labels)
    folders = make_experts(PoolConfig.model_validate({**raw, "train": {**raw["train"], "method": "lora"}}), Silent())
    base = open_base(str(folders["base"]), headless=labels is None)
    expert = open_expert(str(folders["one"]), base, "experts.one")
    moved = {n for n in base.names() if not torch.equal(base.tensor(n), expert.tensor(n))}
    assert {n for n in moved if "query" in n} == {f"bert.encoder.layer.{k}.attention.self.query.weight" for k in (0, 1)}
    assert head_of(expert, base)["classifier.weight"].shape == (3, 32)
    assert ("classifier.weight" in moved) == (labels is not None)


def test_what_is_frozen_stays(encoder, tmp_path):
    raw = classifiers(encoder, tmp_path)
    raw["train"]["freeze"] = ["embeddings"]
    folders = make_experts(PoolConfig.model_validate(raw), Silent())
    base, one = (load_file(folders[n] / "model.safetensors") for n in ("base", "one"))
    still = {n for n in base if torch.equal(base[n], one[n])}
    assert {n for n in base if "embeddings" in n} <= still
    assert "bert.encoder.layer.0.output.dense.weight" not in still


@pytest.mark.parametrize(
    ("freeze", "said"), [("embedings", "is not in the name of any parameter"), ("e", "nothing can be trained")]
)
def test_what_cannot_be_frozen_is_named(encoder, tmp_path, freeze, said):
    raw = classifiers(encoder, tmp_path)
    raw["train"]["freeze"] = [freeze]
    with pytest.raises(BadInput, match=f"train.freeze: .*{said}"):
        make_experts(PoolConfig.model_validate(raw), Silent())


def test_an_encoder_decoder_learns_to_say_its_labels(tmp_path):
    """The files are those of the base: the same names, the same dtypes, an untied head called untied."""
    from transformers import T5Config, T5ForConditionalGeneration

    words = toys.tokenizer()
    torch.manual_seed(0)
    config = T5Config(
        d_model=32, d_kv=8, d_ff=64, num_layers=1, num_heads=4, vocab_size=len(words), pad_token_id=2, eos_token_id=1,
        decoder_start_token_id=2, tie_word_embeddings=False,
    )  # fmt: skip
    origin = T5ForConditionalGeneration(config)
    torch.nn.init.normal_(origin.lm_head.weight)
    origin.bfloat16().save_pretrained(tmp_path / "t5")
    words.save_pretrained(tmp_path / "t5")
    raw = {
        "pool": "talkers", "base": str(tmp_path / "t5"), "kind": "seq2seq", "template": "Which colour? {text}",
        "train": {"steps": 40, "batch": 16, "peak_rate": 0.02, "warmup": 2},
        "experts": {"one": {"data": write(tmp_path / "one.jsonl", rows(0))}},
        "evaluation": {"tasks": [{"task": "t", "dev": 1, "report": 1}]},
    }  # fmt: skip
    folders = learnt(raw)
    base, one = (open_base(str(folders[n])) for n in ("base", "one"))
    assert base.headers == one.headers
    tied = [json.loads((folders[n] / "config.json").read_text())["tie_word_embeddings"] for n in ("base", "one")]
    assert tied[0] == tied[1]


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
    folders = learnt(raw)
    assert folders["base"].resolve() == (models / "base").resolve()
    assert open_base(str(folders["both"])).headers == open_base(str(models / "base")).headers


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_choice_is_learnt_by_what_decides_it(models, architecture):
    """The loss is the cross-entropy over the choices' summed log-likelihoods, held against separate passes: of an
    architecture whose choices share a row, and of one whose cannot.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

    words = AutoTokenizer.from_pretrained(models / "base")
    if architecture == "llama":
        module = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32).eval()
    else:
        torch.manual_seed(0)
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": toys.LENGTH, "initializer_range": 0.3}
        module = GPT2LMHeadModel(GPT2Config(vocab_size=len(words), **sizes)).eval()
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


def test_standard_errors():
    """Of a mean by its formula; of other metrics by resampling, held against the formula where both are known."""
    draw = random.Random(0)
    right = [draw.randrange(2) for _ in range(400)]
    said = [r if draw.random() < 0.7 else 1 - r for r in right]
    hits = [float(s == r) for s, r in zip(said, right, strict=True)]
    share = sum(hits) / 400
    expected = (share * (1 - share) / 399) ** 0.5
    judged = Scale(("t",) * 400, {"t": 1.0}, {"t": JUDGED})
    assert standard_error(hits, judged, "t") == pytest.approx(expected)
    together = Metric("share", lambda answers, right: (answers == right).mean(-1))
    whole = Scale(("t",) * 400, {"t": 1.0}, {"t": together}, tuple(right))
    assert standard_error(said, whole, "t") == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"kind": "classifer"}, "kind: 'classifer' is not usable"),
        ({"train": {"steps": 3, "bach": 4}}, "experts.one.train.bach: unknown key; did you mean 'batch'"),
        ({"experts": {}}, "experts: "),
        (
            {"experts": {"one": {"data": "one.jsonl"}}},
            "experts: a merge needs several models; give at least two experts",
        ),
        ({"kind": "seq2seq", "template": "Which?"}, "template: write {text} where the text belongs"),
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
    with pytest.raises(BadInput, match=r"experts.one.data: row 1 cannot be used for training"):
        make_experts(PoolConfig.model_validate(raw), Silent())


def test_rows_without_a_label_are_named(encoder, tmp_path):
    raw = classifiers(encoder, tmp_path, labels=None)
    raw["experts"]["one"]["label"] = "colour"
    with pytest.raises(BadInput, match=r"experts.one.label: row 1 of the data has no 'colour'"):
        make_experts(PoolConfig.model_validate(raw), Silent())


def test_what_is_missing_for_adapters_is_named(encoder, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    raw = classifiers(encoder, tmp_path)
    raw["train"]["method"] = "lora"
    with pytest.raises(BadInput, match=r"lora needs peft; run pip install 'evolver\[experts\]'"):
        make_experts(PoolConfig.model_validate(raw), Silent())
