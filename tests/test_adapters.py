"""Adapters in every place of a mergekit file, adapters of another base, and what strict refuses."""

from __future__ import annotations

import json
import shutil

import pytest
import tokenizers
import torch
import toys
import yaml
from safetensors.torch import load_file
from test_lora import train
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evolver.checkpoints.doubts import strange_bases, suspicions
from evolver.checkpoints.sources import open_base, open_expert

pytestmark = pytest.mark.whole

WORDS = 40
ADAPTERS = {
    "lora": {"target_modules": ["q_proj", "up_proj"]},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True},
    "loha": {"kind": "LoHaConfig", "r": 3, "alpha": 5, "target_modules": ["v_proj"]},
}


def llama(seed, rows=WORDS):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=rows,
            tie_word_embeddings=False, initializer_range=1.0,  # so that adapters are small beside it
        )
    )  # fmt: skip


def words(*added):
    tokens = ["<unk>", "<s>", "</s>", *(f"w{n}" for n in range(3, WORDS))]
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []}
    inner = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    out = PreTrainedTokenizerFast(tokenizer_object=inner)
    out.add_tokens(list(added))
    return out


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Two models, an adapter of each kind on both, and what PEFT makes of each pair: ``x+lora`` beside ``x-lora``."""
    folder = tmp_path_factory.mktemp("world")
    for seed, name in enumerate("xy"):
        for kind, settings in ADAPTERS.items():
            tuned = train(folder / "made" / f"{name}-{kind}", llama(seed), seed=seed + 5, **settings)
            (folder / "made" / f"{name}-{kind}" / "lora").rename(folder / f"{kind}-of-{name}")
            tuned.merge_and_unload().save_pretrained(folder / f"{name}-{kind}")
        llama(seed).save_pretrained(folder / name)
        for place in (name, *(f"{name}-{kind}" for kind in ADAPTERS)):
            words().save_pretrained(folder / place)
    return folder


def merge(world, raw, out, *options):
    """``evolver merge`` of a file in which ``x+lora`` stands for a model and its adapter in the world."""
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(_placed(world, raw)))
    return toys.evolver("merge", file, out, *options)


def _placed(world, raw):
    if isinstance(raw, dict):
        return {k: _placed(world, v) for k, v in raw.items()}
    if isinstance(raw, list):
        return [_placed(world, v) for v in raw]
    name, _, kind = raw.partition("+") if isinstance(raw, str) else (raw, "", "")
    if name not in ("x", "y", "x-lora", "y-lora", "x-dora", "y-dora", "x-loha", "y-loha"):
        return raw
    return f"{world / name}+{world / f'{kind}-of-{name}'}" if kind else str(world / name)


def merged(raw):
    """The file in which adapters were merged into their models before: ``x+lora`` is the folder ``x-lora``."""
    return json.loads(json.dumps(raw).replace("+", "-"))


def models(*names, **weights):
    return [{"model": n, "parameters": {"weight": w}} for n, w in zip(names, (0.6, 0.4, 0.3), strict=False)]


def sliced(*names):
    return [{"sources": [{"model": n, "layer_range": [i, i + 1]}]} for i, n in enumerate(names)]


PLACES = {
    "models without a base": {"merge_method": "linear", "models": models("x+lora", "y+dora")},
    "the first model only": {"merge_method": "linear", "models": models("x+loha", "y")},
    "models on a base": {"merge_method": "task_arithmetic", "base_model": "x", "models": models("x+lora", "x+dora")},
    "models on another base": {"merge_method": "ties", "base_model": "x", "models": models("y+lora", "y+loha"),
                               "parameters": {"density": 0.5}},
    "the base": {"merge_method": "task_arithmetic", "base_model": "x+dora", "models": models("x+lora", "y")},
    "the base of slerp": {"merge_method": "slerp", "base_model": "x+lora", "models": [{"model": "y+lora"}],
                          "parameters": {"t": 0.3}},
    "slices": {"merge_method": "passthrough", "slices": sliced("x+lora", "y+dora", "x")[:2]},
    "slices with a base of their own": {"merge_method": "slerp", "parameters": {"t": 0.3}, "slices": [
        {"sources": [{"model": m, "layer_range": [0, 2]} for m in ("x+lora", "y+loha")], "base_model": "x+lora"}]},
    "a tokenizer's source": {"merge_method": "linear", "models": models("x+lora", "y+dora"),
                             "tokenizer_source": "y+dora"},
    "a tokenizer of all": {"merge_method": "linear", "models": models("x+lora", "y"), "tokenizer_source": "union"},
    "a token's source": {"merge_method": "linear", "base_model": "x+lora", "models": models("x+lora", "y+loha"),
                         "tokenizer": {"source": "base", "tokens": {"w5": {"source": "y+loha", "force": True}}}},
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_a_model_with_an_adapter_is_the_model_that_peft_makes(world, tmp_path, place):
    raw = PLACES[place] | {"dtype": "float32"}
    ended = merge(world, raw, tmp_path / "out")
    assert ended.code == 0, ended.err
    assert merge(world, merged(raw), tmp_path / "wanted").code == 0
    found, wanted = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "wanted"))
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=2e-6, msg=name)
    files = [{f.name for f in (tmp_path / n).iterdir()} for n in ("out", "wanted")]
    assert files[0] == files[1]
    assert (tmp_path / "out" / "tokenizer.json").read_text() == (tmp_path / "wanted" / "tokenizer.json").read_text()
    LlamaForCausalLM.from_pretrained(tmp_path / "out")


def test_a_model_written_as_a_mapping(world, tmp_path):
    written = {"model": {"model": {"path": "x"}, "lora": str(world / "dora-of-x")}, "parameters": {"weight": 1.0}}
    raw = {"merge_method": "linear", "models": [written], "dtype": "float32"}
    raw["models"][0]["model"]["model"]["path"] = str(world / "x")
    assert merge(world, raw, tmp_path / "out").code == 0
    wanted = load_file(world / "x-dora" / "model.safetensors")
    for name, tensor in load_file(tmp_path / "out" / "model.safetensors").items():
        torch.testing.assert_close(tensor, wanted[name], rtol=0, atol=1e-6)


def test_an_adapter_alone_is_no_base(world, tmp_path):
    adapter = str(world / "lora-of-x")
    ended = merge(world, {"merge_method": "linear", "models": models(adapter)}, tmp_path / "out")
    said = toys.refusal(ended.code, ended.err)
    assert f"write MODEL+{adapter}, or give the model that it was trained on" in said
    assert not (tmp_path / "out").exists()


# Adapters that name another base.


def named(world, tmp_path, base):
    """A copy of an adapter of x that names this base."""
    folder = tmp_path / "adapter"
    shutil.copytree(world / "lora-of-x", folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base}))
    return folder


def said_of(world, adapter, base="x", weights=False):
    opened = open_base(str(world / base))
    expert = open_expert(str(adapter), opened, "experts.a")
    return strange_bases([expert]) + (suspicions(opened, [expert]) if weights else [])


@pytest.mark.parametrize(
    "base", [None, "", "x", "/far/away/x", "org/x", "org/x@main", "unsloth/X-bnb-4bit", "C:\\m\\x"]
)
def test_a_base_of_the_same_name_is_not_doubted(world, tmp_path, base):
    assert said_of(world, named(world, tmp_path, base), weights=True) == []


@pytest.mark.parametrize("base", ["org/another", "/far/away/another", "../nowhere", "x" * 5000])
def test_another_base_is_named_before_weights_are_read(world, tmp_path, base):
    adapter, used = named(world, tmp_path, base), shutil.copytree(world / "x", tmp_path / "llama-7b")
    (said,) = said_of(world, adapter, used)
    assert said.startswith(f"experts.a ({adapter}) was trained on {base} (base_model_name_or_path in its")
    assert f"is used on {used}; check" in said


@pytest.mark.parametrize(
    "folder", ["base", "model", "checkpoint-500", "my_base_model", "tmpx4q", "v2", "base.q8_0.gguf"]
)
@pytest.mark.parametrize("base", ["org/SmolLM2-135M", "gpt2"])
def test_a_folder_whose_name_says_nothing_contradicts_no_name(world, tmp_path, folder, base):
    adapter, copy = named(world, tmp_path, base), shutil.copytree(world / "x", tmp_path / folder)
    assert said_of(world, adapter, copy) == []


@pytest.mark.parametrize("base", ["./base", "/tmp/tmp3k/model", "\0", "org/base"])
def test_an_adapter_that_names_nothing_is_not_doubted(world, tmp_path, base):
    assert said_of(world, named(world, tmp_path, base), shutil.copytree(world / "x", tmp_path / "llama-7b")) == []


def test_a_base_says_in_its_config_where_it_is_from(world, tmp_path):
    adapter, copy = named(world, tmp_path, "org/true-name"), shutil.copytree(world / "x", tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    for origin, doubts in {"org/another-name": 1, "org/true-name": 0, "./base": 0}.items():
        (copy / "config.json").write_text(json.dumps(config | {"_name_or_path": origin}))
        assert len(said_of(world, adapter, copy)) == doubts


def test_a_base_in_another_folder_of_this_machine_is_compared_by_its_weights(world, tmp_path):
    """A copy is the same model, whatever its name; another model is another one, though its tensors look alike."""
    same, other = shutil.copytree(world / "x", tmp_path / "renamed"), shutil.copytree(world / "y", tmp_path / "z" / "x")
    adapter = named(world, tmp_path, str(same))
    assert said_of(world, adapter, weights=True) == []
    shutil.rmtree(adapter)
    adapter = named(world, tmp_path, str(other))
    assert said_of(world, adapter) == []
    (said,) = said_of(world, adapter, weights=True)
    assert f"was trained on {other}" in said
    shutil.rmtree(adapter)
    llama(0, rows=WORDS + 8).save_pretrained(tmp_path / "larger" / "x")
    (said,) = said_of(world, named(world, tmp_path, str(tmp_path / "larger" / "x")))  # by its shapes
    assert "larger" in said


def test_a_merge_warns_of_another_base_and_strict_refuses_it(world, tmp_path):
    adapter = named(world, tmp_path, "org/another")
    base = str(shutil.copytree(world / "x", tmp_path / "llama-7b"))
    raw = {"merge_method": "linear", "models": models(f"{base}+{adapter}", base)}
    ended = merge(world, raw, tmp_path / "out")
    assert ended.code == 0
    assert ended.err.count("was trained on org/another") == 1
    ended = merge(world, raw, tmp_path / "strict", "--strict")
    assert f"{adapter} was trained on org/another" in toys.refusal(ended.code, ended.err)
    assert not (tmp_path / "strict").exists()


def test_a_merge_of_strangers_is_refused_if_strict(world, tmp_path):
    raw = {"merge_method": "task_arithmetic", "base_model": "x", "models": models("y")}
    ended = merge(world, raw, tmp_path / "out")
    assert ended.code == 0
    assert "norms of the base away" in ended.err
    ended = merge(world, raw, tmp_path / "strict", "--strict")
    assert f"{world / 'y'} is 1." in toys.refusal(ended.code, ended.err)
    assert not (tmp_path / "strict").exists()
    assert merge(world, raw | {"models": models("x+lora")}, tmp_path / "kin", "--strict").code == 0


def test_a_merge_of_strangers_with_tokens_of_their_own_is_refused_if_strict(world, tmp_path):
    raw = {"merge_method": "linear", "models": models("x", "y"), "tokenizer_source": "union"}
    assert merge(world, raw, tmp_path / "out").code == 0
    ended = merge(world, raw, tmp_path / "strict", "--strict")
    assert "--strict refuses it" in toys.refusal(ended.code, ended.err)


# In a run.


@pytest.fixture
def strangers(models, tmp_path):
    """An expert with the shapes and tokens of the base, whose weights were drawn anew."""
    shutil.copytree(models / "a", tmp_path / "stranger")
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(77)
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models / "base")).save_pretrained(tmp_path / "stranger")
    return tmp_path / "stranger"


def test_a_strict_run_refuses_a_stranger_before_it_writes_anything(make_config, strangers, tmp_path):
    changes = toys.SHORT | {"experts.b": str(strangers)}
    strict = make_config(tmp_path, changes | {"model.strict": True})
    assert toys.evolver("validate", strict).code == 0  # this takes weights
    ended = toys.evolver("run", strict, "--results", tmp_path / "results")
    said = toys.refusal(ended.code, ended.err)
    assert said.startswith(f"{strict}: experts.b: {strangers} is 1.")
    assert said.endswith("(model.strict refuses it).")
    assert not (tmp_path / "results" / "toy").exists()


def test_validate_refuses_an_adapter_of_another_base_if_strict(make_config, models, tmp_path):
    from transformers import AutoModelForCausalLM

    train(tmp_path, AutoModelForCausalLM.from_pretrained(models / "base"), target_modules=["q_proj"])
    file = tmp_path / "lora" / "adapter_config.json"
    config = json.loads(file.read_text())
    used = shutil.copytree(models / "base", tmp_path / "llama-7b")
    for base, code in (("org/another", 2), (str(models / "base"), 0)):
        file.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        changes = {"experts.b": str(tmp_path / "lora"), "model.base": str(used)}
        loose = toys.evolver("validate", make_config(tmp_path, changes))
        assert loose.code == 0, loose.err
        assert ("experts.b (" in loose.err and "was trained on org/another" in loose.err) is (code == 2)
        strict = toys.evolver("validate", make_config(tmp_path, changes | {"model.strict": True}))
        assert strict.code == code
        assert not code or "model.strict refuses it" in toys.refusal(strict.code, strict.err)


def test_strict_is_no_part_of_what_a_run_is(make_config, tmp_path):
    """It may refuse a run; a run that it lets pass can be called with it and without."""
    folder = toys.run_here(make_config(tmp_path, toys.SHORT), tmp_path / "results")
    again = make_config(tmp_path, toys.SHORT | {"model.strict": True})
    before = toys.essence(folder)
    assert toys.essence(toys.run_here(again, tmp_path / "results")) == before


# A search whose models mergekit can make, too.
BY_COEFFICIENTS = {"search": {"algorithm": "tpe", "method": "task_arithmetic"}}


@pytest.mark.parametrize("kind", ["dora", "loha"])
def test_a_search_over_an_adapter_is_one_over_what_peft_makes_of_it(make_config, models, tmp_path, kind):
    from transformers import AutoModelForCausalLM

    tuned = train(tmp_path, AutoModelForCausalLM.from_pretrained(models / "base"), **ADAPTERS[kind])
    shutil.copytree(models / "b", tmp_path / "merged")
    tuned.merge_and_unload().save_pretrained(tmp_path / "merged")
    scores = {}
    for name in ("lora", "merged"):
        (tmp_path / f"run-{name}").mkdir()
        config = make_config(
            tmp_path / f"run-{name}", toys.SHORT | BY_COEFFICIENTS | {"experts.b": str(tmp_path / name)}
        )
        folder = toys.run_here(config, tmp_path / f"run-{name}")
        scores[name] = sorted((r["stage"], r["number"], r["score"]) for r in toys.all_rows(folder, "finished"))
        best = folder / "best"
        again = toys.evolver("merge", best / "mergekit_config.yml", tmp_path / f"again-{name}")
        assert again.code == 0, again.err
        made = [load_file(place / "model.safetensors") for place in (best, tmp_path / f"again-{name}")]
        assert all(torch.equal(tensor, made[1][n]) for n, tensor in made[0].items())
        if name == "lora":  # mergekit knows an adapter behind its base only
            assert f"{models / 'base'}+{tmp_path / 'lora'}" in (best / "mergekit_config.yml").read_text()
    assert len(scores["lora"]) > 5
    assert scores["lora"] == scores["merged"]
