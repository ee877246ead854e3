"""``evolver extract``: what a model changed in its base, as an adapter."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent / "oracles"))

from checkpoints import HIDDEN, make

from evolver.checkpoints.sources import open_base, open_expert


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make(tmp_path_factory.mktemp("models") / "m")


def is_whole(name):
    return "norm" in name or "embed" in name or name == "lm_head.weight"


def shares(one, two, rank):
    """The share of the squared difference that the best matrices of a rank hold, by all singular values."""
    held = total = 0.0
    for name, tensor in two.items():
        delta = tensor.double() - one[name].double()
        total += float(delta.square().sum())
        values = torch.linalg.svdvals(delta).square() if not is_whole(name) else delta.square().flatten()
        held += float((values if is_whole(name) else values[:rank]).sum())
    return held / total


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_the_share_that_is_said_is_the_share_that_is_held(world, tmp_path, rank):
    ended = toys.evolver("extract", world["base"], world["e1"], tmp_path / "out", "--rank", rank)
    assert (ended.code, ended.err) == (0, "")
    one, two = (load_file(world[n] / "model.safetensors") for n in ("base", "e1"))
    assert ended.out.startswith(f"{tmp_path / 'out'}: rank {rank}, 11 tensors whole; holds ")
    said = float(ended.out.partition("holds ")[2].partition(" %")[0])
    assert said == pytest.approx(100 * shares(one, two, rank), abs=0.051)
    base = open_base(str(world["base"]), "base")
    adapter = open_expert(str(tmp_path / "out"), base, "lora")
    missed = sum(float((adapter.tensor(n) - two[n]).double().square().sum()) for n in two)
    total = sum(float((two[n].double() - one[n].double()).square().sum()) for n in two)
    assert 1 - missed / total == pytest.approx(shares(one, two, rank), abs=1e-5)


def test_an_adapter_of_full_rank_is_the_model(world, tmp_path):
    ended = toys.evolver("extract", world["base"], world["e2"], tmp_path / "out", "-r", HIDDEN)
    assert "holds 100.0 %" in ended.out
    base = open_base(str(world["base"]), "base")
    adapter = open_expert(str(tmp_path / "out"), base, "lora")
    for name, tensor in load_file(world["e2"] / "model.safetensors").items():
        torch.testing.assert_close(adapter.tensor(name), tensor, rtol=0, atol=1e-6)


def test_a_share_can_be_asked_for_instead_of_a_rank(world, tmp_path):
    ended = toys.evolver("extract", world["base"], world["e1"], tmp_path / "out", "--energy", 0.9)
    assert ended.code == 0
    assert 90 <= float(ended.out.partition("holds ")[2].partition(" %")[0]) < 100


@pytest.mark.parametrize(
    ("options", "model", "says"),
    [
        ([], "e1", "--rank, --energy: give a rank"),
        (["--rank", "4", "--energy", "0.5"], "e1", "--rank, --energy: give a rank"),
        (["--energy", "1.5"], "e1", "--energy: 1.5 is not usable"),
        (["--rank", "4"], "base", "differs from its base in no matrix"),
        (["--rank", "4"], "nowhere", "MODEL: there is no folder"),
    ],
)
def test_what_cannot_be_extracted_is_refused(options, model, says, world, tmp_path):
    place = world.get(model, tmp_path / "at" / "all" / "nowhere")
    ended = toys.evolver("extract", world["base"], place, tmp_path / "out", *options)
    assert says in toys.refusal(ended.code, ended.err)
    assert not (tmp_path / "out").exists()


def test_nothing_is_written_over(world, tmp_path):
    (tmp_path / "diary.txt").write_text("mine")
    ended = toys.evolver("extract", world["base"], world["e1"], tmp_path, "--rank", "4")
    assert "not empty" in toys.refusal(ended.code, ended.err)
    assert [f.name for f in tmp_path.iterdir()] == ["diary.txt"]


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=100,
            max_position_embeddings=32, initializer_range=0.3, tie_word_embeddings=False, attention_bias=True,
        )
    )  # fmt: skip


def gpt2():
    """Its layers hold transposes, and its head is its embedding."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(
            n_embd=32, n_layer=2, n_head=2, vocab_size=100, n_positions=32, initializer_range=0.3, bos_token_id=0,
            eos_token_id=1,
        )
    )  # fmt: skip


def bert():
    """Its layers have biases, which every fine-tune changes."""
    from transformers import BertConfig, BertForSequenceClassification

    return BertForSequenceClassification(
        BertConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, vocab_size=100,
            max_position_embeddings=32, num_labels=3, initializer_range=0.3,
        )
    )  # fmt: skip


@pytest.mark.whole
@pytest.mark.parametrize("make_model", [llama, gpt2, bert])
def test_peft_makes_the_model_of_the_base_and_the_adapter(make_model, tmp_path):
    from peft import PeftModel

    torch.manual_seed(0)
    model = make_model().eval()
    toys.noisy_experts(model, tmp_path)
    tuned = type(model).from_pretrained(tmp_path / "a").eval()
    ended = toys.evolver("extract", tmp_path / "base", tmp_path / "a", tmp_path / "out", "--rank", 64)
    assert ended.code == 0
    loaded = PeftModel.from_pretrained(type(model).from_pretrained(tmp_path / "base"), tmp_path / "out").eval()
    tokens = torch.arange(2, 14)[None]
    with torch.no_grad():
        found, wanted, origin = (
            m(tokens).logits for m in (loaded, tuned, type(model).from_pretrained(tmp_path / "base").eval())
        )
    assert float((origin - wanted).abs().max()) > 0.1
    assert math.isclose(float((found - wanted).abs().max()), 0, abs_tol=1e-4)


# A pool: every expert of a run.


@pytest.mark.whole
def test_a_pool_of_adapters_is_the_pool(make_config, models, tmp_path):
    config = make_config(tmp_path, toys.SHORT)
    ended = toys.evolver("extract", config, tmp_path / "out", "--rank", 64)
    assert ended.code == 0, ended.err
    assert [line.partition(": ")[0] for line in ended.out.splitlines()] == [str(tmp_path / "out" / n) for n in "abc"]
    assert ended.out.count("holds 100.0 % of the squared difference") == 3
    base = open_base(str(models / "base"))
    for name in "abc":
        adapter = open_expert(str(tmp_path / "out" / name), base, "lora")
        for tensor, wanted in load_file(models / name / "model.safetensors").items():
            torch.testing.assert_close(adapter.tensor(tensor), wanted, rtol=0, atol=1e-5)
    found = make_config(tmp_path, toys.SHORT | {f"experts.{n}": str(tmp_path / "out" / n) for n in "abc"}, "again.yaml")
    again = toys.evolver("validate", found)
    assert (again.code, again.err) == (0, "")


@pytest.mark.whole
def test_a_pool_of_small_rank_says_what_each_expert_keeps(make_config, models, tmp_path):
    ended = toys.evolver("extract", make_config(tmp_path), tmp_path / "out", "-r", 1)
    one, two = (load_file(models / n / "model.safetensors") for n in ("base", "b"))
    said = next(line for line in ended.out.splitlines() if line.startswith(f"{tmp_path / 'out' / 'b'}: rank 1"))
    assert float(said.partition("holds ")[2].partition(" %")[0]) == pytest.approx(100 * shares(one, two, 1), abs=0.051)


@pytest.mark.whole
@pytest.mark.parametrize(
    ("change", "options", "says"),
    [
        ({}, [], "--rank, --energy: give a rank"),
        ({"experts.b": "nowhere/at/all"}, ["-r", 2], "experts.b: there is no folder"),
        ({"experts.b": "BASE"}, ["-r", 2], "experts.b: the model differs from its base in no matrix"),
        ({"model.sort": 1}, ["-r", 2], "model.sort: unknown key"),
    ],
)
def test_a_pool_that_cannot_be_extracted_leaves_nothing(make_config, models, tmp_path, change, options, says):
    change = {k: str(models / "base") if v == "BASE" else v for k, v in change.items()}
    ended = toys.evolver("extract", make_config(tmp_path, change), tmp_path / "out", *options)
    assert says in toys.refusal(ended.code, ended.err)
    assert not (tmp_path / "out").exists()


@pytest.mark.whole
@pytest.mark.parametrize("heads", ["apart", "union"])
def test_heads_that_a_run_does_not_merge_come_whole(heads, tmp_path):
    """So that the run scores the adapters as it scores the experts."""
    from transformers import BertConfig, BertForSequenceClassification

    labels = {"base": ("x", "y"), "mood": ("bad", "fair", "good"), "colour": ("red", "good")}
    for seed, (name, known) in enumerate(labels.items()):
        torch.manual_seed(0)
        model = bert()
        torch.manual_seed(seed + 1)
        sizes = {"num_labels": len(known), "id2label": dict(enumerate(known)), "label2id": {n: i for i, n in enumerate(known)}}  # fmt: skip  # noqa: E501
        own = BertForSequenceClassification(BertConfig(**model.config.to_diff_dict() | sizes))
        body = {n: t + 0.01 * seed * torch.randn_like(t) for n, t in model.bert.state_dict().items() if t.dtype.is_floating_point}  # fmt: skip  # noqa: E501
        own.bert.load_state_dict(body, strict=False)
        own.save_pretrained(tmp_path / name)
        toys.tokenizer().save_pretrained(tmp_path / name)
    rows = [{"text": t, "label": "good"} for t in toys.texts()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    settings = {
        "run": "heads", "model": {"base": str(tmp_path / "base"), "kind": "classifier", "heads": heads},
        "experts": {n: str(tmp_path / n) for n in ("mood", "colour")},
        "search": {"algorithm": "evolver", "generations": 2},
        "budget": {"candidates": 2},
        "evaluation": {"tasks": [
            {"task": n, "data": str(tmp_path / "rows.jsonl"), "dev": 20, "report": 20} for n in ("mood", "colour")]},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    ended = toys.evolver("extract", tmp_path / "run.yaml", tmp_path / "out", "--rank", 64)
    assert ended.code == 0, ended.err
    for name in ("mood", "colour"):
        wanted = load_file(tmp_path / name / "model.safetensors")
        held = load_file(tmp_path / "out" / name / "adapter_model.safetensors")
        for part in ("classifier.weight", "classifier.bias"):
            assert torch.equal(held[f"base_model.model.{part}"], wanted[part])
