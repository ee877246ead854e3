"""Folders of sentence-transformers are merged and kept whole; other files are kept, or said to be lost."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file, save_file
from transformers import BertConfig, BertModel

SIZE, OUT = 16, 8
NAMES = ("base", "a", "b")
POOLING = {"word_embedding_dimension": SIZE, "pooling_mode_mean_tokens": True}
DENSE = {"in_features": SIZE, "out_features": OUT, "bias": True, "activation_function": "torch.nn.Identity"}
PROMPTS = {"prompts": {"query": "Q: "}, "default_prompt_name": "query", "__version__": {"transformers": "5"}}
ENTRIES = (
    "modules.json", "config_sentence_transformers.json", "sentence_bert_config.json", "1_Pooling/config.json",
    "2_Dense/config.json", "3_Normalize/config.json",
)  # fmt: skip


def module(number, path):
    kind = path.partition("_")[2] or "Transformer"
    return {"idx": number, "name": str(number), "path": path, "type": f"sentence_transformers.models.{kind}"}


def dump(file, content):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content))


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """A tiny sentence encoder and two fine-tunes of it."""
    folder = tmp_path_factory.mktemp("encoders")
    words = toys.tokenizer()
    config = BertConfig(
        hidden_size=SIZE, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=len(words),
        initializer_range=0.3, max_position_embeddings=32, pad_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    toys.noisy_experts(BertModel(config), folder, words)
    for seed, name in enumerate(NAMES):
        at = folder / name
        dump(at / "modules.json", [module(n, p) for n, p in enumerate(("", "1_Pooling", "2_Dense", "3_Normalize"))])
        dump(at / "config_sentence_transformers.json", PROMPTS | {"__version__": {"transformers": f"5.{seed}"}})
        dump(at / "sentence_bert_config.json", {"max_seq_length": 32, "do_lower_case": False})
        dump(at / "1_Pooling" / "config.json", POOLING)
        dump(at / "2_Dense" / "config.json", DENSE)
        dump(at / "3_Normalize" / "config.json", {})
        draw = torch.Generator().manual_seed(seed)
        weights = {"linear.weight": (OUT, SIZE), "linear.bias": (OUT,)}
        save_file({n: torch.randn(s, generator=draw) for n, s in weights.items()}, at / "2_Dense" / "model.safetensors")
    return folder


@pytest.fixture
def own(encoders, tmp_path):
    """The same in a folder that a test may change."""
    return shutil.copytree(encoders, tmp_path / "models")


def merge(models, tmp_path, **more):
    entries = [{"model": str(models / n), "parameters": {"weight": w}} for n, w in (("a", 0.6), ("b", 0.3))]
    config = {"merge_method": "task_arithmetic", "base_model": str(models / "base"), "models": entries, **more}
    file, out = tmp_path / "merge.yml", tmp_path / "out"
    file.write_text(yaml.safe_dump(config))
    return toys.evolver("merge", file, out), out


def dense(models, name="2_Dense"):
    return [load_file(models / n / name / "model.safetensors") for n in NAMES]


def test_the_folder_is_kept_whole_and_the_modules_are_merged(encoders, tmp_path):
    ended, out = merge(encoders, tmp_path, dtype="float32")
    assert (ended.code, ended.err) == (0, "")
    for name in ENTRIES:
        assert (out / name).read_bytes() == (encoders / "base" / name).read_bytes(), name
    base, a, b = dense(encoders)
    merged = load_file(out / "2_Dense" / "model.safetensors")
    assert set(merged) == set(base)
    for name, tensor in merged.items():
        origin, one, two = (t[name].double() for t in (base, a, b))
        wanted = origin + 0.6 * (one - origin) + 0.3 * (two - origin)
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-6, atol=1e-6)
    assert BertModel.from_pretrained(out).config.hidden_size == SIZE
    torch.nn.Linear(SIZE, OUT).load_state_dict({n.removeprefix("linear."): t for n, t in merged.items()})


def test_the_dtype_of_a_merge_is_that_of_its_modules(encoders, tmp_path):
    _, out = merge(encoders, tmp_path, dtype="bfloat16")
    assert {t.dtype for t in load_file(out / "2_Dense" / "model.safetensors").values()} == {torch.bfloat16}


def test_a_filter_may_name_a_module(encoders, tmp_path):
    _, out = merge(encoders, tmp_path, parameters={"lambda": [{"filter": "2_Dense", "value": 0.0}, {"value": 1.0}]})
    merged, (base, _, _) = load_file(out / "2_Dense" / "model.safetensors"), dense(encoders)
    assert all(torch.equal(merged[n], base[n]) for n in base)
    body, origin = (load_file(f / "model.safetensors") for f in (out, encoders / "base"))
    assert not all(torch.equal(body[n], origin[n]) for n in origin)


def other_shape(models):
    save_file({"linear.weight": torch.ones(4, SIZE)}, models / "b" / "2_Dense" / "model.safetensors")


def no_weights(models):
    (models / "b" / "2_Dense" / "model.safetensors").unlink()


@pytest.mark.parametrize(
    ("change", "says"),
    [(other_shape, "holds tensors of other names or shapes"), (no_weights, "holds no model.safetensors")],
)
def test_where_one_model_has_no_such_weights_the_base_s_are_kept_and_this_is_said(change, says, own, tmp_path):
    change(own)
    ended, out = merge(own, tmp_path)
    assert ended.code == 0
    (warning,) = ended.err.splitlines()
    assert warning.startswith(
        f"warning: {own / 'base' / '2_Dense'}: the weights of this module are copied from the base"
    )
    assert f"{own / 'b' / '2_Dense'} {says}" in warning
    kept = (out / "2_Dense" / "model.safetensors").read_bytes()
    assert kept == (own / "base" / "2_Dense" / "model.safetensors").read_bytes()


def test_slices_of_layers_have_no_part_in_modules(encoders, tmp_path):
    parts = [{"model": str(encoders / n), "layer_range": [0, 2], "parameters": {"weight": 0.5}} for n in NAMES]
    config = {"merge_method": "task_arithmetic", "base_model": str(encoders / "base"), "slices": [{"sources": parts}]}
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(config))
    ended = toys.evolver("merge", tmp_path / "merge.yml", tmp_path / "out")
    assert ended.code == 0
    assert "a module has no layers" in ended.err
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").exists()


def test_a_pickled_module_is_copied_unread_and_this_is_said(own, tmp_path):
    for name in NAMES:
        (own / name / "2_Dense" / "model.safetensors").unlink()
        (own / name / "2_Dense" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    ended, out = merge(own, tmp_path)
    assert ended.code == 0
    assert f"{own / 'base' / '2_Dense' / 'pytorch_model.bin'} is a pickle" in ended.err
    assert (out / "2_Dense" / "pytorch_model.bin").read_bytes() == b"\x80\x04."


def test_models_whose_modules_compute_differently_are_warned_of(own, tmp_path):
    dump(own / "a" / "1_Pooling" / "config.json", POOLING | {"pooling_mode_mean_tokens": False})
    dump(own / "b" / "config_sentence_transformers.json", {"prompts": {"query": "other: "}})
    ended, out = merge(own, tmp_path)
    assert [line.partition(" in ")[2].partition(";")[0] for line in ended.err.splitlines()] == [
        "1_Pooling/config.json", "config_sentence_transformers.json",
    ]  # fmt: skip
    assert json.loads((out / "1_Pooling" / "config.json").read_text()) == POOLING


def test_modules_of_experts_are_lost_where_the_base_has_none(own, tmp_path):
    (own / "base" / "modules.json").unlink()
    ended, out = merge(own, tmp_path)
    assert ended.code == 0
    for name in ("a", "b"):
        assert f"{own / name} is a folder of sentence-transformers and the base" in ended.err
    assert not (out / "modules.json").exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ([module(0, ""), module(1, "../elsewhere")], "names '../elsewhere', which is no folder beside it"),
        ([module(0, ""), module(1, "..")], "names '..', which is no folder beside it"),
        ([{"idx": 0}], "is no list of modules"),
        ({"modules": 1}, "is no list of modules"),
    ],
)
def test_a_list_of_modules_that_cannot_be_used_is_refused(content, says, own, tmp_path):
    dump(own / "base" / "modules.json", content)
    ended, out = merge(own, tmp_path)
    assert says in toys.refusal(ended.code, ended.err)
    assert not out.exists()


def test_other_files_are_kept_or_their_loss_is_said(own, tmp_path):
    base = own / "base"
    kept = {"LICENSE": "free", "NOTICE.txt": "of", "sentencepiece.bpe.model": "pieces", "custom.json": "{}"}
    left = (
        "training_args.bin",
        "trainer_state.json",
        "README.md",
        ".gitattributes",
        "model.safetensors.index.json.old",
    )
    for name, text in {**kept, **dict.fromkeys(left, "x"), "pytorch_model.bin": "x"}.items():
        (base / name).write_text(text)
    (base / "onnx").mkdir()
    (base / "checkpoint-500").mkdir()
    ended, out = merge(own, tmp_path)
    assert ended.code == 0
    assert {n: (out / n).read_text() for n in kept} == kept
    (said,) = ended.err.splitlines()
    assert said == (
        f"warning: {base}: these are not copied to the merged model: model.safetensors.index.json.old, onnx/, "
        "pytorch_model.bin."
    )
    assert (out / "README.md").read_text() != "x"


@pytest.mark.whole
def test_a_run_keeps_the_files_of_its_base_and_says_which_modules_it_loses(models, make_config, tmp_path):
    base = shutil.copytree(models / "base", tmp_path / "base")
    (base / "LICENSE").write_text("free")
    (base / "1_Pooling").mkdir()
    dump(base / "modules.json", [module(0, ""), module(1, "1_Pooling")])
    file = make_config(tmp_path, toys.SHORT | {"model.base": str(base)})
    lost = f"{base}: these are not copied to the merged model: 1_Pooling/, modules.json."
    ended = toys.evolver("run", file, "--results", tmp_path / "results")
    assert ended.code == 0
    again = toys.evolver("export", tmp_path / "results" / "toy", tmp_path / "again")
    assert lost in " ".join((again.out + again.err).split())
    for folder in (tmp_path / "results" / "toy" / "best", tmp_path / "again"):
        assert (folder / "LICENSE").read_text() == "free"
        assert not (folder / "modules.json").exists()
