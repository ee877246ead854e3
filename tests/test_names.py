"""Names of tensors: what Transformers undoes when it loads a file is undone here; what it leaves out is left out."""

from __future__ import annotations

import random
import shutil

import pytest
import torch
import transformers
import yaml
from safetensors.torch import load_file, save_file
from toys import SHORT, evolver, refused, run_here

from evolver.checkpoints.agreement import Agreement
from evolver.checkpoints.doubts import left_out
from evolver.checkpoints.names import is_computed, plain_names, wrapper_patterns
from evolver.checkpoints.sources import open_base, open_expert
from evolver.commands.evaluate import score_models
from evolver.commands.merge import open_merge
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.evaluation.blueprint import without_weights
from evolver.runs.history import read_history
from evolver.storage import storage_at

SIZES = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
T5 = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, **SPECIAL}
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 12, **SPECIAL}
DISTIL = {"vocab_size": 40, "dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2}
FAMILIES = {
    "llama": ("LlamaForCausalLM", {**SIZES, **SPECIAL, "tie_word_embeddings": True}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "bert": ("BertForSequenceClassification", {**SIZES, "num_labels": 3}),
    "roberta": ("RobertaForMaskedLM", {**SIZES, **SPECIAL, "max_position_embeddings": 16}),
    "distilbert": ("DistilBertForMaskedLM", DISTIL),
    "t5": ("T5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "encoder_attention_heads": 2, "decoder_attention_heads": 2, **SPECIAL}),  # noqa: E501
}  # fmt: skip


def model_of(family, seed=0, **changes):
    name, settings = FAMILIES[family]
    torch.manual_seed(seed)
    config = getattr(transformers, name).config_class(**settings | changes)
    return getattr(transformers, name)(config)


def rewrite(folder, target, change):
    """A copy of a model's folder with other tensors in its file."""
    shutil.copytree(folder, target)
    tensors = {n: t.contiguous().clone() for n, t in change(load_file(target / "model.safetensors")).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def renamed(model, draw):
    """A change of names and of superfluous tensors, drawn at random, that Transformers undoes when it loads a file."""
    prefix = f"{model.base_model_prefix}."
    strips, old, computed, twins = (draw.random() < 0.5 for _ in range(4))

    def change(tensors):
        if computed:
            tensors["positions.position_ids"] = torch.arange(12)[None]
            tensors["h.0.rotary_emb.inv_freq"] = torch.ones(4)
        if twins:
            for twin, source in model.all_tied_weights_keys.items():
                tensors.setdefault(twin, tensors[source])
        if old:
            norm = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
            for name, other in norm.items():
                tensors = {n.replace(name, other): t for n, t in tensors.items()}
        return {(n.removeprefix(prefix) if strips else n): t for n, t in tensors.items()}

    return change


def opened(base, *experts):
    found = open_base(str(base))
    names = Agreement(found, lambda m: without_weights(m.path, m.config))
    sources = [open_expert(str(e), found, f"experts.{e.name}", names=names) for e in experts]
    names.settle(sources)
    return found, sources


def test_wrappers_and_old_words_leave_a_name():
    stored = ["module.model.a.weight", "module.model._orig_mod.LayerNorm.gamma", "module.x.my_orig_mod.weight"]
    plain = ["model.a.weight", "model.LayerNorm.weight", "x.my_orig_mod.weight"]
    assert list(plain_names(stored).values()) == plain
    assert plain_names(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}  # an architecture's own word
    both = ["a.LayerNorm.gamma", "a.LayerNorm.weight"]
    assert plain_names(both) == {n: n for n in both}  # two tensors, of which the class takes one
    assert wrapper_patterns(stored) == {"^module\\.": "", "_orig_mod\\.": ""}
    assert wrapper_patterns(["a.weight"]) == {}


def test_tables_are_known_by_name_and_masks_by_their_shape_too():
    def shaped(name, *shape):
        return is_computed(name, lambda: shape)

    assert shaped("model.layers.0.self_attn.rotary_emb.inv_freq", 4)
    assert shaped("embeddings.position_ids", 1, 12)
    assert shaped("h.0.attn.bias", 1, 1, 12, 12)
    assert shaped("h.0.attn.masked_bias")
    assert not shaped("h.0.attn.bias", 12)  # of a linear layer
    assert not shaped("h.0.attn.c_attn.bias", 1, 1, 12, 12)


@pytest.mark.whole
@pytest.mark.parametrize("family", FAMILIES)
def test_what_transformers_undoes_is_undone(family, tmp_path):
    """Both ways round: a renamed expert of a plain base, and a plain expert of a renamed base."""
    base, expert = model_of(family), model_of(family, 1)
    base.save_pretrained(tmp_path / "base")
    expert.save_pretrained(tmp_path / "expert")
    right = {n: load_file(tmp_path / n / "model.safetensors") for n in ("base", "expert")}
    for seed in range(6):
        change, place = renamed(base, random.Random(seed)), tmp_path / str(seed)
        odd = {n: rewrite(tmp_path / n, place / n, change) for n in right}
        loaded, info = type(base).from_pretrained(odd["expert"], output_loading_info=True)
        assert (info["missing_keys"], info["mismatched_keys"]) == (set(), set())
        assert all(torch.equal(t, right["expert"][n]) for n, t in loaded.named_parameters() if n in right["expert"])
        for folders in ((tmp_path / "base", odd["expert"]), (odd["base"], tmp_path / "expert")):
            one, (other,) = opened(*folders)
            assert set(one.names()) == set(other.names()) == set(right["base"])
            assert left_out([one, other]) == []
            for name in one.names():
                assert torch.equal(one.tensor(name), right["base"][name])
                assert torch.equal(other.tensor(name), right["expert"][name])


@pytest.mark.whole
def test_a_digest_is_that_of_the_file(tmp_path):
    """So a run that began before names were read goes on."""
    model_of("gpt2").save_pretrained(tmp_path / "base")
    strip = lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()}  # noqa: E731
    odd = rewrite(tmp_path / "base", tmp_path / "odd", strip)
    alone = open_base(str(odd)).digest()
    base, (expert,) = opened(tmp_path / "base", odd)
    assert expert.names() == base.names()
    assert expert.digest() == alone != base.digest()


@pytest.mark.whole
def test_what_the_class_has_no_place_for_is_left_out_and_said(tmp_path):
    model_of("llama").save_pretrained(tmp_path / "base")
    value = {"v_head.summary.weight": torch.ones(1, 16), "v_head.summary.bias": torch.ones(1)}
    expert = rewrite(tmp_path / "base", tmp_path / "expert", lambda tensors: tensors | value)
    base, (found,) = opened(tmp_path / "base", expert)
    assert found.names() == base.names()
    (said,) = left_out([base, found])
    assert f"experts.expert ({expert}) holds 2 tensors that the model's class has no place for" in said
    assert "v_head.summary.bias" in said


@pytest.mark.whole
def test_differences_that_matter_name_both_models(tmp_path):
    model_of("gpt2").save_pretrained(tmp_path / "base")
    model_of("gpt2", n_layer=1).save_pretrained(tmp_path / "less")
    model_of("gpt2", n_layer=3).save_pretrained(tmp_path / "more")
    model_of("gpt2", n_embd=8).save_pretrained(tmp_path / "narrow")
    for name, words in (
        ("less", "lacks the tensor transformer.h.1.attn.c_attn.bias and 11 more, which the base"),
        ("more", "has, unlike the base, the tensor transformer.h.2.attn.c_attn.bias and 11 more"),
        ("narrow", "has shape (24,)"),
    ):
        place = tmp_path / name
        refused(lambda place=place: opened(tmp_path / "base", place), f"experts.{name}: ", place, words)


@pytest.mark.whole
def test_a_head_of_its_own_in_one_model_is_one_in_all(tmp_path):
    """In either order of the models; a copy of the embedding under the head's name is none."""
    tied, own = model_of("llama"), model_of("llama", 1, tie_word_embeddings=False)
    tied.save_pretrained(tmp_path / "tied")
    own.save_pretrained(tmp_path / "own")
    copy_ = rewrite(
        tmp_path / "tied", tmp_path / "copy", lambda t: t | {"lm_head.weight": t["model.embed_tokens.weight"]}
    )
    for order in (("tied", "own", "copy"), ("own", "tied", "copy"), ("copy", "tied", "own")):
        file = tmp_path / f"{order[0]}.yml"
        rows = [{"model": str(tmp_path / n), "parameters": {"weight": 1.0}} for n in order]
        file.write_text(yaml.safe_dump({"merge_method": "linear", "models": rows, "dtype": "float32"}))
        done = evolver("merge", file, tmp_path / f"out-{order[0]}")
        assert done.code == 0, done.err
        made = transformers.LlamaForCausalLM.from_pretrained(tmp_path / f"out-{order[0]}")
        embedding, head = tied.model.embed_tokens.weight, own.lm_head.weight
        assert torch.allclose(made.lm_head.weight, (2 * embedding + head) / 3, atol=1e-6)
        assert torch.allclose(made.model.embed_tokens.weight, (2 * embedding + own.model.embed_tokens.weight) / 3, atol=1e-6)  # noqa: E501  # fmt: skip
    base, (found,) = opened(tmp_path / "tied", copy_)
    assert "lm_head.weight" not in base.names()
    assert found.names() == base.names()


@pytest.mark.whole
def test_a_run_scores_an_expert_with_a_head_of_its_own_as_it_is(models, make_config, tmp_path):
    """The adapter of the same run keeps its base's tie: its head is its embedding."""
    own = transformers.LlamaForCausalLM.from_pretrained(models / "a", tie_word_embeddings=False)
    torch.manual_seed(3)
    own.lm_head.weight.data = 0.1 * torch.randn_like(own.lm_head.weight)
    shutil.copytree(models / "a", tmp_path / "own")
    own.save_pretrained(tmp_path / "own")
    experts = {"own": str(tmp_path / "own"), "b": str(models / "b"), "lora": str(models / "lora")}
    file = make_config(tmp_path, {**SHORT, "experts": experts})
    folder = run_here(file, tmp_path / "results")
    read = read_history(storage_at(folder)).outcome()
    scores = {n: score_models(str(file), [p], "report")[0].score for n, p in experts.items() if n != "lora"}
    ready = prepare(config_at(file))
    assert "lm_head.weight" in ready.opened.base.names()
    lora = ready.opened.experts["lora"]
    assert torch.equal(lora.tensor("lm_head.weight"), lora.tensor("model.embed_tokens.weight"))
    told = {f.label: f.report.score for f in read.finalists}
    assert {n: told[n] for n in scores} == scores
    assert "lm_head.weight" in load_file(folder / "best" / "model.safetensors")
    assert not transformers.AutoConfig.from_pretrained(folder / "best").tie_word_embeddings


@pytest.mark.whole
def test_a_merge_of_wrapped_and_published_names_is_that_of_plain_ones(tmp_path):
    """Against float64 on the loaded models: a base as published, one expert as a compiler left it, one as saved."""
    models = {n: model_of("gpt2", seed) for seed, n in enumerate(("base", "a", "b"))}
    for name, model in models.items():
        model.save_pretrained(tmp_path / name)

    def published(tensors):
        masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 12, 12).tril() for i in range(2)}
        return masks | {n.removeprefix("transformer."): t for n, t in tensors.items()}

    base = rewrite(tmp_path / "base", tmp_path / "published", published)
    compiled = rewrite(tmp_path / "a", tmp_path / "compiled", lambda ts: {f"_orig_mod.{n}": t for n, t in ts.items()})
    rows = [{"model": str(compiled), "parameters": {"weight": 0.5}}, {"model": str(tmp_path / "b"), "parameters": {"weight": 0.25}}]  # noqa: E501  # fmt: skip
    file = tmp_path / "merge.yml"
    file.write_text(yaml.safe_dump({"merge_method": "task_arithmetic", "base_model": str(base), "models": rows}))
    done = evolver("merge", file, tmp_path / "out")
    assert done.code == 0, done.err
    made, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert (info["missing_keys"], info["unexpected_keys"]) == (set(), set())
    mine = dict(made.named_parameters())
    start, a, b = (dict(models[n].double().named_parameters()) for n in ("base", "a", "b"))
    for name, tensor in start.items():
        right = tensor + 0.5 * (a[name] - tensor) + 0.25 * (b[name] - tensor)
        assert torch.allclose(mine[name].double(), right, atol=1e-6)
    assert {n.split(".")[0] for n in load_file(tmp_path / "out" / "model.safetensors")} == {"transformer"}
    assert set(open_merge(file).base.names()) == set(mine)


@pytest.mark.whole
def test_an_adapter_finds_the_tensors_of_a_published_base(tmp_path):
    """PEFT names them as the class does, and the base's file has names without the prefix."""
    model = model_of("gpt2")
    model.save_pretrained(tmp_path / "base")
    strip = lambda tensors: {n.removeprefix("transformer."): t for n, t in tensors.items()}  # noqa: E731
    odd = rewrite(tmp_path / "base", tmp_path / "odd", strip)
    adapter, key = tmp_path / "lora", "base_model.model.transformer.h.1.mlp.c_fc.lora_"
    adapter.mkdir()
    a, b = torch.randn(2, 16), torch.randn(64, 2)
    save_file({f"{key}A.weight": a, f"{key}B.weight": b}, adapter / "adapter_model.safetensors")
    (adapter / "adapter_config.json").write_text(
        '{"peft_type": "LORA", "r": 2, "lora_alpha": 2, "fan_in_fan_out": true}'
    )
    base, (found,) = opened(odd, adapter)
    name = "transformer.h.1.mlp.c_fc.weight"
    assert torch.allclose(found.tensor(name), model.get_parameter(name) + (b @ a).T, atol=1e-6)
    assert found.names() == base.names()


@pytest.mark.whole
def test_explain_shows_how_every_name_of_a_folder_is_read(tmp_path):
    model_of("gpt2").save_pretrained(tmp_path / "base")
    mask = {"h.0.attn.bias": torch.ones(1, 1, 12, 12)}
    change = lambda tensors: mask | {n.removeprefix("transformer."): t for n, t in tensors.items()}  # noqa: E731
    done = evolver("explain", rewrite(tmp_path / "base", tmp_path / "odd", change))
    assert (done.code, done.err) == (0, "")
    rows = dict(line.split(maxsplit=1) for line in done.out.splitlines())
    assert rows["h.0.attn.bias"] == "(left out)"
    assert rows["wte.weight"] == "transformer.wte.weight"
    assert len(rows) == 1 + len(load_file(tmp_path / "base" / "model.safetensors"))
