"""``evolver extract``: what a model changed in its base, as an adapter."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import toys
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
