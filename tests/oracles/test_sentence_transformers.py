"""Merged folders of sentence-transformers, loaded by that library: embeddings, prompts and modules.

The library is no dependency of the tests, as nothing else here needs it. To run this file, put the library into a folder
of its own and name that folder:

    pip install --target FOLDER --no-deps sentence-transformers
    PYTHONPATH=FOLDER .venv/bin/python -m pytest tests/oracles/test_sentence_transformers.py
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
import toys
import yaml
from transformers import BertConfig, BertModel

library = pytest.importorskip("sentence_transformers", reason="sentence-transformers is not installed")
modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
pytestmark = pytest.mark.whole

SIZE, OUT, LONGEST = 32, 12, 64
PROMPTS = {"query": "Question: is the ", "document": "Answer: "}
TEXTS = toys.texts(20)


@pytest.fixture(scope="module", params=["mean", "cls"])
def encoders(request, tmp_path_factory):
    """Folders that the library itself has written: a sentence encoder, and two fine-tunes of all its weights."""
    folder, words = tmp_path_factory.mktemp(request.param), toys.tokenizer()
    config = BertConfig(
        hidden_size=SIZE, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(words),
        initializer_range=0.3, max_position_embeddings=LONGEST, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    for part in (BertModel(config), words):
        part.save_pretrained(folder / "body")
    body = modules.Transformer(str(folder / "body"), max_seq_length=LONGEST)
    pooling = modules.Pooling(SIZE, pooling_mode=request.param)
    dense = modules.Dense(SIZE, OUT, activation_function=torch.nn.Tanh())
    model = library.SentenceTransformer(
        modules=[body, pooling, dense, modules.Normalize()], prompts=PROMPTS, default_prompt_name="query",
        device="cpu",
    )  # fmt: skip
    weights = {n: t.clone() for n, t in model.state_dict().items()}
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        changed = {n: t + 0.1 * torch.randn_like(t) for n, t in weights.items() if seed and t.is_floating_point()}
        model.load_state_dict({**weights, **changed})
        model.save(str(folder / name))
    return folder


@pytest.fixture(scope="module")
def merged(encoders):
    """The folder that ``evolver merge`` makes of the two fine-tunes."""
    raw = {
        "merge_method": "task_arithmetic", "base_model": str(encoders / "base"), "dtype": "float32",
        "models": [{"model": str(encoders / n), "parameters": {"weight": 0.5}} for n in ("a", "b")],
    }  # fmt: skip
    (encoders / "merge.yml").write_text(yaml.safe_dump(raw))
    ended = toys.evolver("merge", encoders / "merge.yml", encoders / "out")
    assert ended.code == 0, ended.err
    return encoders / "out"


def opened(folder):
    return library.SentenceTransformer(str(folder), device="cpu")


def average(encoders):
    """The base in float64 with the mean of the state dicts of the two fine-tunes."""
    model, states = opened(encoders / "base").double(), [opened(encoders / n).state_dict() for n in ("a", "b")]
    mean = {n: sum(s[n].double() for s in states) / 2 if t.is_floating_point() else t for n, t in states[0].items()}
    model.load_state_dict(mean)
    return model


@pytest.mark.parametrize("prompt", [None, "query", "document"])
def test_embeddings_are_those_of_the_averaged_state_dicts(encoders, merged, prompt):
    ours, theirs = (m.encode(TEXTS, prompt_name=prompt) for m in (opened(merged), average(encoders)))
    assert ours.shape == (len(TEXTS), OUT)
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)
    np.testing.assert_allclose(np.linalg.norm(ours, axis=1), 1, atol=1e-6)
    base = opened(encoders / "base").encode(TEXTS, prompt_name=prompt)
    assert np.abs(ours - base).max() > 0.01


def test_modules_and_prompts_are_the_bases(encoders, merged):
    ours, theirs = opened(merged), opened(encoders / "base")
    assert [type(m) for m in ours] == [type(m) for m in theirs]
    assert [type(m).__name__ for m in ours] == ["Transformer", "Pooling", "Dense", "Normalize"]
    assert (ours.prompts, ours.default_prompt_name) == (theirs.prompts, theirs.default_prompt_name)
    assert (ours.prompts["query"], ours.default_prompt_name) == (PROMPTS["query"], "query")
    assert [m.get_config_dict() for m in ours][1:3] == [m.get_config_dict() for m in theirs][1:3]
    assert ours.max_seq_length == theirs.max_seq_length == LONGEST
    states = [opened(encoders / n)[2].state_dict() for n in ("a", "b")]
    for name, tensor in ours[2].state_dict().items():
        torch.testing.assert_close(tensor.double(), sum(s[name].double() for s in states) / 2, rtol=0, atol=1e-7)


def test_the_default_prompt_is_put_before_texts(encoders, merged):
    model = opened(merged)
    by_hand = model.encode([PROMPTS["query"] + t for t in TEXTS], prompt="")
    np.testing.assert_allclose(model.encode(TEXTS), by_hand, rtol=0, atol=2e-6)
