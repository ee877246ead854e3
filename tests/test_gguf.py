"""GGUF files against the weights that they were written from, and what is refused."""

import importlib.metadata
import json
import os
import shutil

import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from toys import refused
from typer.testing import CliRunner

from evolver.checkpoints.gguf import reader
from evolver.checkpoints.sources import open_base, open_expert
from evolver.checkpoints.weights import Checkpoint
from evolver.commands.cli import app

WIDTH, INNER, LAYERS, HEADS, KV_HEADS = 16, 24, 2, 4, 2
WORDS = ["<s>", "</s>", *"abcdefgh", "ab", "cd"]
ROWS = len(WORDS)
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip


def weights(words=ROWS, tied=True, seed=0, width=WIDTH):
    """A llama of a few thousand weights under its Hugging Face names; every value is one of float16's."""
    shapes = {"model.embed_tokens": (words, width), "model.norm": (width,)}
    shapes |= {} if tied else {"lm_head": (words, width)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{p}_proj": (width, width) for p in "qo"}
        shapes |= {f"{at}self_attn.{p}_proj": (width * KV_HEADS // HEADS, width) for p in "kv"}
        shapes |= {f"{at}mlp.{p}_proj": (INNER, width) for p in ("gate", "up")} | {f"{at}mlp.down_proj": (width, INNER)}
        shapes |= {f"{at}{p}_layernorm": (width,) for p in ("input", "post_attention")}
    draw = torch.Generator().manual_seed(seed)
    return {f"{n}.weight": torch.randn(s, generator=draw).half().float() for n, s in shapes.items()}


def their_name(name):
    name = name.removesuffix(".weight")
    if not name.startswith("model.layers."):
        return f"{NAMES[name]}.weight"
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}.weight"


def rotated(tensor, heads):
    """The rows of a head as llama.cpp has them: the halves that rotary embeddings pair stand side by side."""
    half = tensor.shape[0] // heads // 2
    return tensor.reshape(heads, 2, half, -1).transpose(1, 2).reshape(tensor.shape)


def write(path, content, dtype="float32", words=WORDS, architecture="llama", more=(), quantised=False):
    """A GGUF file as llama.cpp's converter writes it: norms are always float32."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType
    from gguf.quants import quantize

    rows, width = content["model.embed_tokens.weight"].shape
    writer = GGUFWriter(path, architecture)
    writer.add_context_length(32)
    writer.add_embedding_length(width)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(rows)
    if words:
        writer.add_tokenizer_model("gpt2")
        writer.add_token_list(words)
        writer.add_token_merges(["a b", "c d"])
        writer.add_token_types([TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(words) - 2))
        writer.add_bos_token_id(0)
        writer.add_eos_token_id(1)
    for name, tensor in content.items():
        heads = HEADS if "q_proj" in name else KV_HEADS if "k_proj" in name else None
        array = (rotated(tensor, heads) if heads else tensor).numpy()
        if quantised and "embed" in name:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(their_name(name), quantize(array, kind), raw_dtype=kind)
        else:
            writer.add_tensor(their_name(name), array.astype(dtype if array.ndim > 1 else "float32"))
    for name, tensor in more:
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def conversions():
    folder = os.path.join(os.environ["EVOLVER_CACHE"], "gguf")
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()


@pytest.mark.parametrize(("dtype", "kept"), [("float32", torch.float32), ("float16", torch.float16)])
@pytest.mark.parametrize("tied", [True, False])
def test_the_weights_are_those_that_were_written(tmp_path, dtype, kept, tied):
    wanted = weights(tied=tied)
    found = open_base(str(write(tmp_path / "m.gguf", wanted, dtype)))
    assert found.names() == sorted(wanted)
    for name, tensor in wanted.items():
        assert found.headers[name].dtype == kept
        assert torch.equal(found.tensor(name).float(), tensor), name
    assert found.config["tie_word_embeddings"] is tied
    assert found.vocabulary == {w: i for i, w in enumerate(WORDS)}


def test_what_was_converted_loads_and_computes_what_the_weights_say(tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    wanted = weights()
    folder = open_base(str(write(tmp_path / "m.gguf", wanted))).path
    model = AutoModelForCausalLM.from_pretrained(folder)
    reference = LlamaForCausalLM(LlamaConfig(
        hidden_size=WIDTH, intermediate_size=INNER, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, vocab_size=len(WORDS), max_position_embeddings=32, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ))  # fmt: skip
    reference.load_state_dict(wanted, strict=False)
    ids = AutoTokenizer.from_pretrained(folder).encode("abcda", return_tensors="pt")
    assert ids.flatten().tolist() == [10, 11, 2]
    with torch.no_grad():
        assert torch.allclose(model(ids).logits, reference(ids).logits, atol=1e-5)


def test_a_quantised_file_becomes_bfloat16(tmp_path):
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize, quantize

    wanted = weights(600, width=32)  # most scalars are the embedding's
    found = open_base(str(write(tmp_path / "m.gguf", wanted, words=None, quantised=True)))
    embedding = quantize(wanted["model.embed_tokens.weight"].numpy(), GGMLQuantizationType.Q8_0)
    wanted["model.embed_tokens.weight"] = torch.from_numpy(dequantize(embedding, GGMLQuantizationType.Q8_0))
    for name, tensor in wanted.items():
        assert torch.equal(found.tensor(name), tensor.bfloat16()), name
    assert found.vocabulary is None  # the file has no tokens


def test_a_file_is_converted_once(tmp_path, monkeypatch):
    file = write(tmp_path / "m.gguf", weights())
    first = open_base(str(file)).path
    before = conversions()
    assert first.name in before
    monkeypatch.setattr(reader, "convert", lambda *_: pytest.fail("converted again"))
    assert open_base(str(file)).path == first
    assert open_base(str(tmp_path)).path == first  # the folder that holds nothing else
    monkeypatch.undo()
    write(file, weights(seed=1))
    other = open_base(str(file))
    assert other.path != first
    assert torch.equal(other.tensor("model.norm.weight"), weights(seed=1)["model.norm.weight"])
    assert conversions() - before == {other.path.name}


def test_an_interrupted_conversion_leaves_nothing(tmp_path, monkeypatch):
    file = write(tmp_path / "m.gguf", weights())
    before = conversions()
    monkeypatch.setattr(reader, "_clean_config", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        open_base(str(file))
    assert conversions() == before


def test_safetensors_come_before_a_gguf_beside_them(tmp_path):
    write(tmp_path / "m.gguf", weights(seed=1))
    save_file(weights(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert open_base(str(tmp_path)).path == tmp_path


def test_of_several_files_one_has_to_be_named(tmp_path):
    for name in ("q4", "q8"):
        write(tmp_path / f"{name}.gguf", weights())
    refused(lambda: open_base(str(tmp_path)), "model.base: ", tmp_path, "several GGUF files", tmp_path / "q4.gguf")


def test_rows_without_a_token_are_not_part_of_the_vocabulary(tmp_path):
    """llama.cpp's converter calls them [PAD12], [PAD13], …; the Hugging Face folder has no name for them."""
    padded = [*WORDS, "[PAD12]", "[PAD13]"]
    file = write(tmp_path / "m.gguf", weights(len(padded)), words=padded)
    assert open_base(str(file)).vocabulary == {w: i for i, w in enumerate(WORDS)}


@pytest.mark.parametrize("keep", [4, 30, 300, 0.5, -200])
def test_a_truncated_file_is_refused(tmp_path, keep):
    file = write(tmp_path / "m.gguf", weights())
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    refused(lambda: open_base(str(file)), "model.base: ", file, "truncated or garbled", "copy it again")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip", b"# GGUF\n"])
def test_a_foreign_file_is_refused(tmp_path, content):
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    refused(lambda: open_base(str(file)), "model.base: ", file, "is not a GGUF file", "give a GGUF file")


@pytest.mark.parametrize("architecture", ["bert", "nonesuch"])
def test_an_architecture_that_cannot_be_converted_is_refused(tmp_path, architecture):
    file = write(tmp_path / "m.gguf", weights(), architecture=architecture)
    refused(lambda: open_base(str(file)), "model.base: ", file, "cannot convert", architecture, "Hugging Face folder")


def test_a_tensor_that_is_missing_is_not_made_up(tmp_path):
    less = {n: t for n, t in weights().items() if "layers.1.mlp.up" not in n}
    file = write(tmp_path / "m.gguf", less)
    refused(
        lambda: open_base(str(file)), "model.base: ", file, "lacks model.layers.1.mlp.up_proj.weight", "whole model"
    )


def test_a_tensor_that_would_be_lost_is_refused(tmp_path):
    bias = ("blk.0.attn_q.bias", torch.ones(WIDTH))
    file = write(tmp_path / "m.gguf", weights(), more=[bias])
    refused(lambda: open_base(str(file)), "model.base: ", file, "scalars", "Hugging Face folder")
    tables = ("rope_freqs.weight", torch.ones(WIDTH // HEADS // 2))
    file = write(tmp_path / "tables.gguf", weights(), more=[tables])
    assert open_base(str(file)).names() == sorted(weights())


@pytest.mark.parametrize("package", reader.NEEDED_PACKAGES)
def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, package):
    file = write(tmp_path / "m.gguf", weights())
    installed = importlib.metadata.version

    def version(name):
        if name == package:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    refused(lambda: open_base(str(file)), "model.base: ", file, package, "pip install 'evolver[gguf]'")


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    file = write(tmp_path / "m.gguf", weights())
    (tmp_path / "cache").write_text("a file")
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path / "cache"))
    refused(lambda: open_base(str(file)), "model.base: ", file, tmp_path / "cache", "set EVOLVER_CACHE")


def test_a_gguf_and_a_folder_of_the_same_weights_are_one_model(tmp_path):
    base = open_base(str(write(tmp_path / "m.gguf", weights())))
    shutil.copytree(base.path, tmp_path / "folder")
    expert = open_expert(str(tmp_path / "folder"), base, "experts.x")
    assert isinstance(expert, Checkpoint)
    assert expert.digest() == base.digest()


def test_mergekit_files_may_name_them(tmp_path):
    files = {n: str(write(tmp_path / f"{n}.gguf", weights(seed=s))) for s, n in enumerate(("base", "one"))}
    (tmp_path / "two").mkdir()
    write(tmp_path / "two" / "m.gguf", weights(seed=2))
    models = [{"model": files["one"]}, {"model": str(tmp_path / "two")}]
    config = {
        "merge_method": "task_arithmetic", "base_model": files["base"], "parameters": {"weight": 0.5}, "models": models
    }  # fmt: skip
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config))
    done = CliRunner().invoke(app, ["merge", str(tmp_path / "merge.yml"), str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    merged = load_file(tmp_path / "out" / "model.safetensors")
    one, two = weights(seed=1), weights(seed=2)
    assert all(torch.allclose(merged[n], (one[n] + two[n]) / 2, atol=1e-6) for n in one)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == "llama"
    assert (tmp_path / "out" / "tokenizer.json").exists()


@pytest.mark.whole
def test_a_run_may_name_them(make_config, tasks, tmp_path):
    """Base, experts and their tokenizer; only the toy tasks are of another origin."""
    words = list(pre_tokenizers.ByteLevel.alphabet())
    words = ["<s>", "</s>", *sorted(words), "ab", "cd"]
    names = ("base", "a", "b", "c")
    files = {
        n: str(write(tmp_path / f"{n}.gguf", weights(len(words), seed=s), words=words)) for s, n in enumerate(names)
    }
    changes = {"model.base": files.pop("base"), "experts": files, "budget.candidates": 1}
    folder = toys.run_here(make_config(tmp_path, changes), tmp_path / "results")
    assert all(f"| {name} |" in (folder / "report.md").read_text() for name in names)
    assert json.loads((folder / "best.json").read_text()) == {"items": 40, "equal": 40}
