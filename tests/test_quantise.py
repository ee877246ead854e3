"""Scores of models as they are after the quantisation that a user deploys."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from evolver.commands.evaluate import score_models
from evolver.config.model import ModelSettings
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.evaluation.live import LiveModel
from evolver.evaluation.rounding import Rounding, rounded
from evolver.records import Candidate
from evolver.workers.worker import Worker

Q4 = {"evaluation.quantise": "q4_0", "model.compute": "float32"}


def matrices():
    torch.manual_seed(0)
    for scale in (1e-8, 0.02, 1.0, 30.0):
        matrix = torch.randn(40, 96) * scale
        matrix[3] = 0
        matrix[5, :32] = matrix[5, 0]
        matrix[6, 32:64] = -matrix[6, 32:64].abs()
        matrix[7, 1], matrix[7, 9] = -matrix[7, :32].abs().max(), matrix[7, :32].abs().max()  # equals of both signs
        yield matrix


@pytest.mark.parametrize("kind", ["q4_0", "q8_0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_are_those_of_llama_cpp(kind, dtype):
    gguf = pytest.importorskip("gguf")
    format_ = gguf.GGMLQuantizationType[kind.upper()]
    for matrix in matrices():
        given = matrix.to(dtype)
        theirs = gguf.quants.dequantize(gguf.quants.quantize(given.float().numpy(), format_), format_)
        assert np.array_equal(rounded(given, kind).numpy(), theirs)


def test_rows_have_255_steps():
    for matrix in matrices():
        found = rounded(matrix, "int8")
        steps = matrix.abs().amax(1, keepdim=True) / 127
        assert ((found - matrix).abs() <= steps / 2 * (1 + 1e-4)).all()
        whole = torch.where(steps == 0, torch.zeros_like(found), found / steps)
        assert torch.allclose(whole, whole.round(), atol=1e-3)
        assert (whole.abs().amax(1)[matrix.abs().amax(1) > 0] - 127).abs().max() < 1e-3


def test_rows_that_cannot_be_cut_into_blocks_are_float16():
    matrix = torch.randn(4, 50)
    assert torch.equal(rounded(matrix, "q4_0"), matrix.half().float())
    assert not torch.equal(rounded(matrix, "int8"), matrix.half().float())


@pytest.mark.parametrize("kind", ["q4_0", "int8"])
def test_which_tensors_are_rounded(kind):
    module = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=32, n_embd=64, n_layer=1, n_head=2))
    rounding = Rounding(module, kind)
    state = {n: torch.randn_like(t) for n, t in module.state_dict().items()}
    changed = {n for n, t in state.items() if not torch.equal(rounding(n, n, t), t)}
    layers = {f"transformer.h.0.{n}.weight" for n in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert changed == layers | ({"transformer.wte.weight", "lm_head.weight"} if kind == "q4_0" else set())
    name = "transformer.h.0.mlp.c_fc.weight"  # of (64, 256), which llama.cpp holds as (256, 64)
    assert torch.equal(rounding(name, name, state[name]), rounded(state[name].T.contiguous(), kind).T)
    for router in ("model.layers.0.mlp.gate.weight", "model.layers.0.block_sparse_moe.gate.weight"):
        assert torch.equal(rounding(router, router, state[name]), state[name])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"evaluation.quantise": "q5_1"}, ["evaluation.quantise: 'q5_1'", "q4_0"]),
        ({"evaluation.quantise_search": False}, ["evaluation: quantise_search does nothing without quantise"]),
        ({"evaluation.quantise": "int8", "evaluation.backend": "hf"}, ["evaluation: quantise: the backend hf"]),
    ],
)
def test_what_would_do_nothing_is_refused(make_config, tmp_path, changes, said):
    file = make_config(tmp_path, changes)
    toys.refused(lambda: config_at(file).parsed(), file, *said)


@pytest.mark.whole
@pytest.mark.parametrize("kind", ["q4_0", "q8_0", "int8"])
def test_a_model_is_scored_with_rounded_weights(make_config, models, tmp_path, kind):
    """By Transformers, on a folder whose weights were rounded before."""
    changes = {**Q4, "evaluation.quantise": kind}
    ready = prepare(config_at(make_config(tmp_path, changes)))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    worker.evaluate(Candidate(0, ready.experts[0], "test"))
    module = AutoModelForCausalLM.from_pretrained(models / "a", dtype=torch.float32)
    plain = {n: t.clone() for n, t in module.state_dict().items()}
    tables = () if kind != "int8" else ("model.embed_tokens.weight", "lm_head.weight")
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            if tensor.ndim == 2 and name not in tables:
                tensor.copy_(rounded(plain[name], kind))
    found = worker.live.module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in module.state_dict().items())
    assert not all(torch.equal(found[name], tensor) for name, tensor in plain.items())
    words = AutoTokenizer.from_pretrained(models / "a")("Question: a red house", return_tensors="pt")
    assert torch.equal(worker.live.module(**words).logits, module(**words).logits)


@pytest.mark.whole
def test_models_are_evaluated_in_the_same_way(make_config, models, tmp_path):
    """``evolver evaluate`` loads a folder, and a run writes weights into its model."""
    tasks = [{"task": "roll", "metric": "bits_per_byte", "dev": 6, "report": 4}]  # a number in which any weight shows
    file = make_config(tmp_path, {**Q4, "evaluation.tasks": tasks})
    ready = prepare(config_at(file))
    result = Worker(ready.plan, "dev", tasks=ready.tasks).evaluate(Candidate(0, ready.experts[0], "test"))
    plain = make_config(tmp_path, {"model.compute": "float32", "evaluation.tasks": tasks}, "plain.yaml")
    scores = [score_models(str(f), [str(models / "a")], "dev")[0].score for f in (file, plain)]
    assert scores[0] == result.score != scores[1]


@pytest.mark.whole
def test_experts_of_a_mixture_are_rounded_one_by_one(tmp_path):
    config = MixtralConfig(
        vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, num_local_experts=3, tie_word_embeddings=False, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    MixtralForCausalLM(config).save_pretrained(tmp_path / "model")
    toys.tokenizer().save_pretrained(tmp_path / "model")
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    shapes = {n: tuple(t.shape) for n, t in tensors.items()}
    settings = ModelSettings(base=str(tmp_path / "model"), compute="float32")
    live = LiveModel(settings, tmp_path / "model", shapes, "cpu", quantise="q8_0")
    live.write(tensors.items())
    expected = {n: t if t.ndim < 2 or ".gate." in n else rounded(t, "q8_0") for n, t in tensors.items()}
    save_file(expected, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    found = live.module.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in theirs.items())
    live.write(tensors.items(), whole=True)  # as statistics of experts are collected
    assert torch.equal(live.module.state_dict()["lm_head.weight"], tensors["lm_head.weight"])


@pytest.mark.whole
def test_experts_in_one_tensor_are_refused(make_config, tasks, tmp_path):
    config = GptOssConfig(
        vocab_size=len(toys.tokenizer()), hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=toys.LENGTH,
    )  # fmt: skip
    toys.noisy_experts(GptOssForCausalLM(config), tmp_path, toys.tokenizer())
    changes = {
        **Q4, "model.base": str(tmp_path / "base"), "experts": {n: str(tmp_path / n) for n in ("a", "b")},
    }  # fmt: skip
    ended = toys.evolver("validate", make_config(tmp_path, changes))
    said = toys.refusal(ended.code, ended.err)
    assert "evaluation.quantise: model.layers.0.mlp.experts." in said


@pytest.mark.whole
def test_only_finalists(make_config, tmp_path):
    changes = {**Q4, "evaluation.quantise_search": False}
    ready = prepare(config_at(make_config(tmp_path, changes)))
    plain = prepare(config_at(make_config(tmp_path, {"model.compute": "float32"}, "plain.yaml")))
    states = {}
    for name, run in {"ours": ready, "plain": plain}.items():
        for split in ("dev", "report"):
            worker = Worker(run.plan, split, tasks=run.tasks)
            worker.evaluate(Candidate(0, run.experts[0], "test", stage="report" if split == "report" else "search"))
            states[name, split] = worker.live.module.state_dict()["model.layers.0.mlp.up_proj.weight"].clone()
    assert torch.equal(states["ours", "dev"], states["plain", "dev"])
    assert not torch.equal(states["ours", "report"], states["plain", "report"])


@pytest.mark.whole
def test_a_run_says_it_everywhere(make_config, tmp_path):
    file = make_config(tmp_path, {**toys.SHORT, **Q4})
    folder = toys.run_here(file, tmp_path / "results")
    assert json.loads((folder / "best.json").read_text()) == {"items": 12, "equal": 12}
    sentence = "Candidates and finalists were scored as they are after quantisation to q4_0."
    assert sentence in (folder / "report.md").read_text()
    assert f"{sentence} The weights here are not quantised." in (folder / "best" / "README.md").read_text()
    ended = toys.evolver("export", folder, tmp_path / "out")
    assert ended.code == 0, ended.err
    assert f"{sentence} The weights in this folder are not quantised" in ended.out
    assert "on 12 of 12 dev items" in ended.out
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(rounded(whole, "q4_0"), whole.float())
    # It belongs to what a run is.
    other = make_config(tmp_path, {**toys.SHORT, "model.compute": "float32"}, "other.yaml")
    toys.refused(lambda: toys.run_here(other, tmp_path / "results"), "another configuration", "evaluation.quantise")


@pytest.mark.whole
def test_the_gguf_file_of_that_type_is_what_was_scored(make_config, tmp_path):
    pytest.importorskip("gguf")
    file = make_config(tmp_path, {**toys.SHORT, **Q4})
    folder = toys.run_here(file, tmp_path / "results")
    ended = toys.evolver("export", folder, tmp_path / "out.gguf", "--gguf", "q4_0")
    assert ended.code == 0, ended.err
    assert "on 12 of 12 dev items" in ended.out
    assert "so its scores may be others" not in ended.out
    ended = toys.evolver("export", folder, tmp_path / "wide.gguf", "--gguf", "q8_0")
    assert ended.code == 0, ended.err
    assert "This file is q8_0, so its scores may be others." in ended.out


def reference(matrix, kind):
    """A matrix after it was quantised, float32, as the formats' descriptions say it; in NumPy, block by block."""
    values = matrix.detach().numpy().astype(np.float32)
    size = values.shape[1] if kind == "int8" else 32
    if values.shape[1] % size:
        return torch.from_numpy(values.astype(np.float16).astype(np.float32))
    out = np.zeros_like(values)
    for row, line in enumerate(values):
        for start in range(0, len(line), size):
            block = line[start : start + size]
            furthest = block[np.abs(block).argmax()]
            if furthest == 0:
                continue
            if kind == "q4_0":
                scale = np.float32(furthest / np.float32(-8))
                steps = np.minimum(15, np.floor(block * (np.float32(1) / scale) + np.float32(8.5))) - 8
            else:
                scale = np.float32(abs(furthest) / np.float32(127))
                ratios = block * (np.float32(1) / scale)
                steps = np.sign(ratios) * np.floor(np.abs(ratios) + np.float32(0.5))
            kept = scale if kind == "int8" else np.float32(np.float16(scale))
            out[row, start : start + size] = steps.astype(np.float32) * kept
    return torch.from_numpy(out)


# What keeps its precision: tables of positions, biases, and with int8 the tables and heads of tokens, and a T5's wo.
PLAIN = ("position", "token_type", "relative_attention_bias", "final_logits_bias")
WITH_INT8 = ("word_embeddings", "shared", "embed_tokens", "lm_head", "wo")


def rounded_copy(source, target, kind):
    """A copy of a model's folder with its matrices as they are after they were quantised."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    names = [n for n, t in tensors.items() if t.ndim == 2 and not any(p in n for p in PLAIN)]
    chosen = [n for n in names if kind != "int8" or n.split(".")[-2] not in WITH_INT8]
    assert len(chosen) > 10
    changed = {**tensors, **{n: reference(tensors[n], kind) for n in chosen}}
    assert all(not torch.equal(changed[n], tensors[n]) for n in chosen)
    save_file(changed, target / "model.safetensors", metadata={"format": "pt"})


def classifiers(folder):
    toys.make_encoders(folder)
    rows = [{"text": t, "label": toys.MOODS[n % 3]} for n, t in enumerate(toys.texts())]
    data = toys.write_rows(folder / "rows.jsonl", rows)
    return {"task": "moods", "data": data, "metric": "acc", "dev": 60, "report": 10}


def numbers(folder):
    """Models with one output, so that any weight shows in the answers."""
    toys.make_rerankers(folder)
    rows = [{"text": t, "label": n % 7} for n, t in enumerate(toys.texts())]
    data = toys.write_rows(folder / "rows.jsonl", rows)
    return {"task": "numbers", "data": data, "metric": "pearson", "dev": 60, "report": 10}


def encoder_decoders(make):
    def saved(folder):
        words = toys.tokenizer()
        torch.manual_seed(0)
        toys.noisy_experts(make(len(words)), folder, words)
        return ROLL

    return saved


def bart(size):
    sizes = dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim", "d_model"), 32)
    heads = dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads", "encoder_layers", "decoder_layers"), 2)
    return BartForConditionalGeneration(BartConfig(
        vocab_size=size, **sizes, **heads, max_position_embeddings=192, init_std=0.3, decoder_start_token_id=1,
        pad_token_id=2, bos_token_id=0, eos_token_id=1, forced_eos_token_id=1,
    ))  # fmt: skip


def t5(size):
    return T5ForConditionalGeneration(T5Config(
        vocab_size=size, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", decoder_start_token_id=2, pad_token_id=2, eos_token_id=1, n_positions=128,
    ))  # fmt: skip


def decoders(folder):
    toys.make_models(folder)
    return ROLL


ROLL = {"task": "roll", "metric": "bits_per_byte", "dev": 6, "report": 4}
KINDS = {
    "classifier": ("classifier", classifiers), "one output": ("classifier", numbers),
    "t5": ("seq2seq", encoder_decoders(t5)), "bart": ("seq2seq", encoder_decoders(bart)),
    "llama": ("causal-lm", decoders),
}  # fmt: skip
CLASSES = {"classifier": AutoModelForSequenceClassification, "seq2seq": AutoModelForSeq2SeqLM, "causal-lm": AutoModelForCausalLM}  # fmt: skip  # noqa: E501


@pytest.mark.whole
@pytest.mark.parametrize("own_tokens", [False, True])
@pytest.mark.parametrize("quantise", ["q4_0", "int8"])
@pytest.mark.parametrize("name", KINDS)
def test_a_score_is_that_of_a_rounded_copy(name, quantise, own_tokens, tasks, tmp_path):
    """In a run and by ``evolver evaluate``, whose copies are rounded by the reference above and not quantised again."""
    kind, save = KINDS[name]
    entry = save(tmp_path)
    if own_tokens:
        model, words = (part.from_pretrained(tmp_path / "b") for part in (CLASSES[kind], AutoTokenizer))
        words.add_tokens([" stone"])
        model.resize_token_embeddings(len(words), mean_resizing=False)
        for part in (model, words):
            part.save_pretrained(tmp_path / "b")
    rounded_copy(tmp_path / "b", tmp_path / "copy", quantise)
    changes = {"evaluation.tasks": [entry], "model.compute": "float32", "model.kind": kind}
    raw = toys.settings(tmp_path, tasks, changes)
    found, said = {}, {}
    for expert, quantised in (("b", True), ("copy", False), ("b", False)):
        raw["evaluation"]["quantise"] = quantise if quantised else None
        raw["experts"] = {"a": str(tmp_path / "a"), "b": str(tmp_path / expert)}
        (file := tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
        ready = prepare(config_at(file))
        assert bool(ready.opened.own) == own_tokens
        result = Worker(ready.plan, "dev", tasks=ready.tasks).evaluate(Candidate(0, ready.experts[1], "test"))
        assert result.status == "ok", result.reason
        found[expert, quantised] = torch.tensor(result.items)
        said[expert, quantised] = score_models(str(file), [str(tmp_path / expert)], "dev")[0].score
        assert said[expert, quantised] == pytest.approx(result.score, rel=1e-6)
    torch.testing.assert_close(found["b", True], found["copy", False], rtol=1e-5, atol=1e-5)
    assert said["b", True] == pytest.approx(said["copy", False], rel=1e-5)
    assert name == "classifier" or not torch.allclose(found["b", True], found["b", False], rtol=1e-4)
