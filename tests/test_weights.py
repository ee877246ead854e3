"""Checkpoints and LoRA adapters: identity, contents, and what is refused with the file and the key in the message."""

import json
import math
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evolver.checkpoints.lora import LoraAdapter
from evolver.checkpoints.sources import open_base, open_expert
from evolver.checkpoints.weights import Checkpoint, digests
from evolver.errors import BadInput
from evolver.records.recipe import layer_of

Q = "model.layers.0.self_attn.q_proj"
UP = "model.layers.1.mlp.up_proj"


def tensors(seed=0):
    torch.manual_seed(seed)
    return {
        "model.embed_tokens.weight": torch.randn(8, 6),
        f"{Q}.weight": torch.randn(6, 6),
        f"{UP}.weight": torch.randn(10, 6),
        "model.norm.weight": torch.randn(6).bfloat16(),
        "model.steps": torch.tensor(3),
    }


def write(folder, content, config=None, **files):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(content, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"} | (config or {})))
    for name, text in files.items():
        (folder / f"{name}.json").write_text(json.dumps(text))
    return folder


def write_adapter(folder, pairs, **config):
    """An adapter of {module: (A, B)}."""
    folder.mkdir(parents=True, exist_ok=True)
    content = {}
    for module, (a, b) in pairs.items():
        content |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    save_file(content, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 6, "r": 2} | config))
    return folder


def low_rank(rows, columns, rank=2, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rank, columns, generator=generator), torch.randn(rows, rank, generator=generator)


@pytest.fixture
def base(tmp_path):
    return open_base(str(write(tmp_path / "base", tensors())))


def refused(call, *said):
    with pytest.raises(BadInput) as caught:
        call()
    for part in said:
        assert str(part) in str(caught.value)
    return str(caught.value)


def test_a_checkpoint_says_what_it_holds(base):
    assert base.names() == sorted(tensors())
    assert torch.equal(base.tensor(f"{Q}.weight"), tensors()[f"{Q}.weight"])
    assert base.headers["model.norm.weight"].dtype == torch.bfloat16
    assert base.headers["model.steps"].shape == ()
    assert base.size == 4 * (48 + 36 + 60) + 2 * 6 + 8
    assert base.layers == 2


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("model.layers.12.mlp.up_proj.weight", 12),
        ("roberta.encoder.layer.3.output.dense.bias", 3),
        ("transformer.h.0.attn.c_attn.weight", 0),
        ("encoder.block.7.layer.1.x", 7),
        ("model.embed_tokens.weight", None),
        ("lm_head.weight", None),
    ],
)
def test_the_layer_of_a_tensor(name, layer):
    assert layer_of(name) == layer


def shard(folder, content):
    """The same tensors in three files and an index."""
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    weight_map = {n: f"model-{i % 3}.safetensors" for i, n in enumerate(content)}
    for file in set(weight_map.values()):
        save_file({n: content[n] for n in content if weight_map[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def test_shards_and_one_file_are_the_same_model(tmp_path, base):
    shards = Checkpoint(shard(tmp_path / "shards", tensors()), "k")
    assert shards.names() == base.names()
    assert all(torch.equal(shards.tensor(n), base.tensor(n)) for n in base.names())
    assert shards.digest() == base.digest()


def test_a_digest_is_that_of_the_tensors(tmp_path, base):
    same = Checkpoint(write(tmp_path / "elsewhere", dict(reversed(tensors().items())), {"note": 1}), "k")
    assert same.digest() == base.digest()
    assert digests({"one": base, "two": same}) == {"one": base.digest(), "two": base.digest()}


def test_one_bit_makes_another_digest(tmp_path, base):
    content = tensors()
    content[f"{Q}.weight"].view(torch.int32)[3, 3] ^= 1
    assert Checkpoint(write(tmp_path / "bit", content), "k").digest() != base.digest()
    content = tensors()
    content["model.norm.weight"] = content["model.norm.weight"].view(torch.float16)
    assert Checkpoint(write(tmp_path / "dtype", content), "k").digest() != base.digest()
    content = tensors()
    content["model.normal.weight"] = content.pop("model.norm.weight")
    assert Checkpoint(write(tmp_path / "name", content), "k").digest() != base.digest()


def test_a_remembered_digest_is_not_that_of_a_changed_file(tmp_path):
    folder = write(tmp_path / "m", tensors())
    before = Checkpoint(folder, "k").digest()
    assert Checkpoint(folder, "k").digest() == before
    write(folder, tensors(1))
    assert Checkpoint(folder, "k").digest() != before


def test_a_lora_is_base_plus_scaled_product(tmp_path, base):
    """Scale = alpha / rank = 6 / 2 = 3; what the adapter does not name is the base's."""
    a, b = low_rank(6, 6)
    expert = open_expert(str(write_adapter(tmp_path / "lora", {Q: (a, b)})), base, "k")
    assert isinstance(expert, LoraAdapter)
    assert torch.allclose(expert.tensor(f"{Q}.weight"), base.tensor(f"{Q}.weight") + 3 * (b @ a), atol=1e-5)
    for name in base.names():
        if name != f"{Q}.weight":
            assert torch.equal(expert.tensor(name), base.tensor(name))
    assert expert.names() == base.names()


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({"use_rslora": True}, 6 / math.sqrt(2)),
        ({"alpha_pattern": {"q_proj": 10}}, 5.0),
        ({"alpha_pattern": {"model.layers.0.self_attn.q_proj": 10}}, 5.0),
        ({"alpha_pattern": {"proj": 10}}, 3.0),  # no module is called that
        ({"alpha_pattern": {r"layers\.\d+\.self_attn\.q_proj": 8}, "use_rslora": True}, 8 / math.sqrt(2)),
        ({"rank_pattern": {"q_proj": 2}, "r": 64}, 3.0),  # the rank is that of the matrices
    ],
)
def test_the_scale_of_a_lora(tmp_path, base, config, scale):
    a, b = low_rank(6, 6)
    expert = LoraAdapter(write_adapter(tmp_path / "lora", {Q: (a, b)}, **config), "k", base)
    delta = expert.tensor(f"{Q}.weight") - base.tensor(f"{Q}.weight")
    assert torch.allclose(delta, scale * (b @ a), atol=1e-5)


def test_a_lora_of_a_transposed_layer(tmp_path, base):
    """GPT-2's layers hold their weights as (in, out): 10 inputs and 6 outputs for this tensor of shape (10, 6)."""
    a, b = low_rank(6, 10)
    expert = LoraAdapter(write_adapter(tmp_path / "lora", {UP: (a, b)}, fan_in_fan_out=True), "k", base)
    delta = expert.tensor(f"{UP}.weight") - base.tensor(f"{UP}.weight")
    assert torch.allclose(delta, 3 * (b @ a).T, atol=1e-5)


def test_the_digest_of_a_lora_is_that_of_what_it_adds(tmp_path, base):
    a, b = low_rank(6, 6)
    one = LoraAdapter(write_adapter(tmp_path / "one", {Q: (a, b)}), "k", base)
    assert LoraAdapter(write_adapter(tmp_path / "same", {Q: (a, b)}, note=1), "k", base).digest() == one.digest()
    another = Checkpoint(write(tmp_path / "base2", tensors(1)), "k")
    others = [
        LoraAdapter(write_adapter(tmp_path / "alpha", {Q: (a, b)}, lora_alpha=7), "k", base),
        LoraAdapter(write_adapter(tmp_path / "b", {Q: (a, b + 1)}), "k", base),
        LoraAdapter(write_adapter(tmp_path / "on base2", {Q: (a, b)}), "k", another),
        base,
    ]  # fmt: skip
    assert len({one.digest(), *(o.digest() for o in others)}) == 5


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"target_parameters": ["x"]}, "uses target_parameters"),
        ({"trainable_token_indices": [1]}, "uses trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "uses pissa_niter_4"),
    ],
)
def test_adapters_that_are_more_than_low_rank_are_refused(tmp_path, base, config, said):
    folder = write_adapter(tmp_path / "lora", {Q: low_rank(6, 6)}, **config)
    refused(lambda: open_expert(str(folder), base, "experts.x"), "experts.x: ", folder, said, "merge it into its base")


def test_adapters_that_do_not_fit_are_refused(tmp_path, base):
    wrong = write_adapter(tmp_path / "shape", {UP: low_rank(6, 6)})
    refused(lambda: LoraAdapter(wrong, "experts.x", base), "experts.x: ", wrong, f"{UP}.weight", "(6, 6)")
    ranks = write_adapter(tmp_path / "ranks", {Q: (torch.ones(2, 6), torch.ones(6, 3))})
    refused(lambda: LoraAdapter(ranks, "experts.x", base), ranks, f"{Q}.weight")
    flat = write_adapter(tmp_path / "flat", {Q: (torch.ones(0), torch.ones(6, 2))})
    refused(lambda: LoraAdapter(flat, "experts.x", base), flat, f"{Q}.weight")
    other = write_adapter(tmp_path / "name", {"model.layers.9.q": low_rank(6, 6)})
    refused(lambda: LoraAdapter(other, "experts.x", base), "model.layers.9.q.weight")
    empty = write_adapter(tmp_path / "empty", {})
    refused(lambda: LoraAdapter(empty, "experts.x", base), empty, "holds no LoRA matrices")
    odd = write_adapter(tmp_path / "odd", {Q: low_rank(6, 6)})
    add(odd, {"base_model.model.x.lora_magnitude_vector": torch.ones(6)})
    refused(lambda: LoraAdapter(odd, "experts.x", base), "lora_magnitude_vector", "neither a LoRA matrix of a layer")
    resized = write_adapter(tmp_path / "resized", {Q: low_rank(6, 6)})
    add(resized, {"base_model.model.model.embed_tokens.weight": torch.ones(9, 6)})
    refused(lambda: LoraAdapter(resized, "experts.x", base), resized, "model.embed_tokens.weight", "(9, 6)")


def add(folder, content):
    """Further tensors in an adapter."""
    file = folder / "adapter_model.safetensors"
    save_file(load_file(file) | content, file)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_with_values_that_are_no_numbers_is_refused(tmp_path, base, value):
    a, b = low_rank(6, 6)
    a[1, 2] = value
    adapter = LoraAdapter(write_adapter(tmp_path / "lora", {Q: (a, b)}), "experts.x", base)
    for _ in range(2):
        refused(adapter.digest, "experts.x: ", f"{Q}.lora_A.weight", tmp_path / "lora", "NaN or infinite")


@pytest.mark.parametrize("half", ["A", "B"])
def test_half_a_pair_is_refused(tmp_path, base, half):
    folder = write_adapter(tmp_path / "lora", {Q: low_rank(6, 6), UP: low_rank(10, 6)})
    file = folder / "adapter_model.safetensors"
    content = load_file(file)
    del content[f"base_model.model.{UP}.lora_{half}.weight"]
    save_file(content, file)
    refused(lambda: LoraAdapter(folder, "experts.x", base), "experts.x: ", folder, UP)


def test_an_adapter_without_its_weights_is_refused(tmp_path, base):
    folder = write_adapter(tmp_path / "lora", {Q: low_rank(6, 6)})
    (folder / "adapter_model.safetensors").unlink()
    refused(lambda: LoraAdapter(folder, "experts.x", base), "experts.x: ", "adapter_model.safetensors is missing")


def test_what_is_no_folder_is_refused(tmp_path):
    refused(lambda: open_base(str(tmp_path / "none")), "model.base: ", tmp_path / "none", "there is no folder")
    file = tmp_path / "file"
    file.touch()
    refused(lambda: open_base(str(file)), "model.base: ", file, "is a file")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    folder = tmp_path / "empty"
    folder.mkdir()
    refused(lambda: open_base(str(folder)), "model.base: ", folder, "no config.json")
    (folder / "config.json").write_text("{}")
    refused(lambda: open_base(str(folder)), "model.base: ", folder, "holds no model.safetensors")
    (folder / "pytorch_model.bin").touch()
    refused(
        lambda: open_base(str(folder)), folder / "pytorch_model.bin", "is a pickle", "save the model as safetensors"
    )


@pytest.mark.parametrize("keep", [0, 4, 200, -1])
def test_a_truncated_file_is_refused(tmp_path, keep):
    file = write(tmp_path / "m", tensors()) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    refused(
        lambda: open_base(str(tmp_path / "m")), "model.base: ", file, "truncated or not safetensors", "copy it again"
    )


def test_a_missing_shard_is_refused(tmp_path):
    folder = shard(tmp_path / "shards", tensors())
    (folder / "model-1.safetensors").unlink()
    refused(lambda: open_base(str(folder)), "model.base: ", folder / "model-1.safetensors", "is missing")


@pytest.mark.parametrize("text", ["{", "[]"])
def test_a_broken_config_is_refused(tmp_path, base, text):
    folder = write(tmp_path / "m", tensors())
    (folder / "config.json").write_text(text)
    refused(
        lambda: open_expert(str(folder), base, "experts.x"), "experts.x: ", folder / "config.json", "copy the model"
    )


def test_a_quantised_dtype_is_refused(tmp_path):
    content = tensors() | {"model.odd": torch.ones(4).to(torch.float8_e4m3fn)}
    folder = write(tmp_path / "m", content)
    refused(lambda: open_base(str(folder)).headers, "model.base: ", "model.odd", folder, "dequantise")


def test_experts_of_another_family_are_refused(tmp_path, base):
    def expert(name, content, config=None, **files):
        folder = write(tmp_path / name, content, config, **files)
        return folder, lambda: open_expert(str(folder), base, "experts.x")

    folder, call = expert("kind", tensors(), {"model_type": "gpt2"})
    refused(call, "experts.x: ", folder, "gpt2", "llama", base.path)
    less = {n: t for n, t in tensors().items() if n != f"{Q}.weight"}
    folder, call = expert("less", less)
    refused(call, "experts.x: ", folder, f"lacks the tensor {Q}.weight")
    folder, call = expert("more", tensors() | {"model.extra": torch.ones(1)})
    refused(call, "experts.x: ", folder, "has, unlike the base, the tensor model.extra")
    folder, call = expert("shape", tensors() | {f"{Q}.weight": torch.ones(6, 7)})
    refused(call, "experts.x: ", folder, f"{Q}.weight has shape (6, 7)", "(6, 6)")
    folder, call = expert("fine", tensors(1))
    assert call().names() == base.names()


def test_a_tied_head_may_stand_in_the_expert_under_its_second_name(tmp_path, base):
    folder = write(tmp_path / "tied", tensors() | {"lm_head.weight": torch.ones(8, 6)})
    assert open_expert(str(folder), base, "k").tensor(f"{Q}.weight").shape == (6, 6)
    untied = open_base(str(write(tmp_path / "untied", tensors(), {"tie_word_embeddings": False})))
    refused(lambda: open_expert(str(folder), untied, "k"), "lm_head.weight")


def test_experts_with_another_vocabulary_are_refused(tmp_path):
    def words(*tokens, added=()):
        more = [{"content": t, "id": 90 + i} for i, t in enumerate(added)]
        return {"model": {"vocab": {t: i for i, t in enumerate(tokens)}}, "added_tokens": more}

    base = open_base(str(write(tmp_path / "b", tensors(), tokenizer=words("x", "y"))))
    same = write(tmp_path / "same", tensors(), tokenizer=words("x", "y"))
    none = write(tmp_path / "none", tensors())
    more = write(tmp_path / "more", tensors(), tokenizer=words("x", "y", "z"))
    moved = write(tmp_path / "moved", tensors(), tokenizer=words("y", "x"))
    added = write(tmp_path / "added", tensors(), tokenizer=words("x", "y", added=["<a>"]))
    open_expert(str(same), base, "experts.x")
    open_expert(str(none), base, "experts.x")
    for folder, count in ((more, 3), (moved, 2), (added, 3)):
        refused(lambda f=folder: open_expert(str(f), base, "experts.x"), "experts.x: ", folder, f"({count} tokens)")


def test_every_refusal_here_is_one_line(tmp_path):
    said = refused(lambda: open_base(str(tmp_path / "none")))
    assert re.fullmatch(r"[^\n]+\.", said)
    assert Path(said.split("no folder ")[1].split(";")[0]) == tmp_path / "none"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_values_that_are_no_numbers_are_named(tmp_path, value):
    """Found in the pass that computes the digest, and never remembered as fine."""
    tensors = {"model.norm.weight": torch.ones(8), "model.layers.0.mlp.weight": torch.tensor([[1.0, value]])}
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    for _ in range(2):
        with pytest.raises(BadInput, match=r"^experts\.a: tensor model\.layers\.0\.mlp\.weight of .* NaN or infinite"):
            Checkpoint(tmp_path, "experts.a").digest()
