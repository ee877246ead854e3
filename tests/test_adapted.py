"""``MODEL+ADAPTER`` in the configuration of a run: as its base, and as an expert."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import toys
import yaml
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_lora import train
from transformers import AutoModelForCausalLM, AutoTokenizer

from evolver.commands.evaluate import score_models
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.storage.references import parts_of

pytestmark = pytest.mark.whole

BY_COEFFICIENTS = {"search": {"algorithm": "tpe", "method": "task_arithmetic"}}


@pytest.fixture(scope="module")
def world(models, tmp_path_factory):
    """Adapters of the base (``one``, ``two``) and of ``a`` (``third``), and what PEFT makes of them: ``base-one`` …"""
    folder = tmp_path_factory.mktemp("world")
    for name, model, settings in (
        ("one", "base", {"target_modules": ["q_proj", "up_proj"]}),
        ("two", "base", {"target_modules": ["v_proj"], "use_dora": True}),
        ("three", "a", {"kind": "LoHaConfig", "r": 2, "target_modules": ["down_proj"]}),
    ):  # fmt: skip
        made = folder / "made"
        tuned = train(made, AutoModelForCausalLM.from_pretrained(models / model), seed=len(name), **settings)
        weights = load_file(made / "lora" / "adapter_model.safetensors")
        config = json.loads((made / "lora" / "adapter_config.json").read_text())
        (made / "lora" / "adapter_config.json").write_text(
            json.dumps(config | {"base_model_name_or_path": str(models / model)})
        )
        (made / "lora").rename(folder / name)
        assert weights
        shutil.copytree(models / model, folder / f"{model}-{name}")
        tuned.merge_and_unload().save_pretrained(folder / f"{model}-{name}")
    for name in ("base", "a", "b"):
        (folder / name).symlink_to(models / name)
    return folder


PLACES = {
    "an expert on the base": ("base", "base+one", "a+three"),
    "the base": ("base+one", "base+two", "a"),
    "all": ("base+two", "base+one", "a+three"),
}


def placed(world, name):
    return "+".join(str(world / part) for part in name.split("+"))


def configured(make_config, world, folder, names, **changes):
    folder.mkdir(parents=True)
    base, *experts = (placed(world, name) for name in names)
    named = {"model.base": base, "experts": dict(zip("xy", experts, strict=True))}
    return make_config(folder, toys.SHORT | BY_COEFFICIENTS | named | changes)


@pytest.mark.parametrize("place", PLACES)
def test_a_run_is_the_run_over_the_models_that_peft_makes(make_config, world, tmp_path, place):
    found = {}
    for kind, names in (("plus", PLACES[place]), ("merged", [n.replace("+", "-") for n in PLACES[place]])):
        file = configured(make_config, world, tmp_path / kind, names)
        ended = toys.evolver("validate", file)
        assert (ended.code, ended.err) == (0, "")
        folder = toys.run_here(file, tmp_path / kind)
        found[kind] = sorted((r["stage"], r["number"], r["score"]) for r in toys.all_rows(folder, "finished"))
    assert len(found["plus"]) > 5
    assert found["plus"] == found["merged"]
    folder = tmp_path / "plus" / "toy"
    assert toys.evolver("resume", folder).code == 0
    assert toys.evolver("export", folder, tmp_path / "out").code == 0
    best = folder / "best"
    text = (best / "mergekit_config.yml").read_text()
    assert all(placed(world, name) in text for name in PLACES[place])
    again = toys.evolver("merge", best / "mergekit_config.yml", tmp_path / "again")
    assert again.code == 0, again.err
    ours, theirs, out = (load_file(f / "model.safetensors") for f in (best, tmp_path / "again", tmp_path / "out"))
    assert all(t.equal(theirs[n]) and t.equal(out[n]) for n, t in ours.items())
    card = yaml.safe_load((best / "README.md").read_text().split("---")[1])
    parts = [part for name in PLACES[place] for part in placed(world, name).split("+")]
    assert card["base_model"] == list(dict.fromkeys(parts))


def test_another_class_loads_what_is_written(make_config, world, tmp_path):
    changes = {"evaluation.backend": "hf", "evaluation.model_args": {"device": "cpu", "dtype": "float32"}}
    file = configured(make_config, world, tmp_path / "run", ("base+one", "base+two", "a"), **changes)
    folder = toys.run_here(file, tmp_path)
    agreed = json.loads((folder / "best.json").read_text())
    assert agreed["equal"] == agreed["items"]


@pytest.mark.parametrize("part", ["base", "one"])
def test_a_run_knows_when_either_part_has_changed(make_config, world, tmp_path, part):
    for name in ("base", "one"):
        shutil.copytree(world / name, tmp_path / name)
    base = f"{tmp_path / 'base'}+{tmp_path / 'one'}"
    file = configured(make_config, world, tmp_path / "run", ("base", "a", "b"), **{"model.base": base})
    folder = toys.run_here(file, tmp_path)
    weights = next((tmp_path / part).glob("*.safetensors"))
    changed = load_file(weights)
    changed[min(changed)] += 1
    save_file(changed, weights, {"format": "pt"})
    ended = toys.evolver("run", file, "--results", tmp_path)
    assert "model.base: other weights" in toys.refusal(ended.code, ended.err)
    assert folder.exists()


def test_an_adapter_alone_is_on_the_model_of_the_base(make_config, world, tmp_path):
    """As PEFT would load it, and as in a mergekit file."""
    files = [
        configured(make_config, world, tmp_path / n, ("base+one", n, "b")) for n in ("two", "base+two")
    ]  # fmt: skip
    found = [prepare(config_at(file)).plan.digests for file in files]
    assert found[0] == found[1]


@pytest.mark.parametrize("backend", ["resident", "hf"])
def test_a_score_of_a_model_with_an_adapter_is_that_of_the_merged_model(make_config, world, tmp_path, backend):
    changes = {"evaluation.backend": backend}
    if backend == "hf":
        changes["evaluation.model_args"] = {"device": "cpu", "dtype": "float32"}
    file = configured(make_config, world, tmp_path / "run", ("base", "a", "b"), **changes)
    scores = score_models(str(file), [placed(world, n) for n in ("base+one", "base-one", "base")], "dev")
    assert scores[0].score == scores[1].score != scores[2].score


def test_an_adapter_that_is_exported_is_one_of_the_model_below(make_config, world, tmp_path):
    """PEFT knows no base that has an adapter itself."""
    file = configured(make_config, world, tmp_path / "run", ("base+one", "base+two", "a+three"))
    folder = toys.run_here(file, tmp_path)
    assert toys.evolver("export", folder, tmp_path / "lora", "--lora", "64").code == 0
    assert toys.evolver("extract", file, tmp_path / "loras", "--rank", "64").code == 0
    for out, whole in (("lora", folder / "best"), ("loras/x", world / "base-two"), ("loras/y", world / "a-three")):
        assert json.loads((tmp_path / out / "adapter_config.json").read_text())["base_model_name_or_path"] == placed(
            world, "base"
        )
        model = AutoModelForCausalLM.from_pretrained(world / "base")
        state = PeftModel.from_pretrained(model, tmp_path / out).merge_and_unload().state_dict()
        for name, tensor in load_file(whole / "model.safetensors").items():
            torch.testing.assert_close(state[name], tensor, rtol=0, atol=2e-5, msg=name)


def test_what_is_not_model_and_adapter_is_refused(make_config, world, tmp_path):
    for number, (names, said) in enumerate({
        ("one", "a", "b"): "model.base: {0} is an adapter, which is no model without its base; write MODEL+{0}",
        ("base+a", "a", "b"): "model.base: {1} is no adapter",
        ("base", "one+two", "b"): "experts.x: {0} is an adapter itself; give the model that {1} was trained on",
        ("base", "base+one+two", "b"): "experts.x: {all} has more than one plus sign",
        ("base", "base+nowhere", "b"): "experts.x: there is no folder {1}",
        ("base", "nowhere+one", "b"): "experts.x: there is no folder {0}",
        ("base", "base+", "b"): "experts.x: there is no folder {all}",
    }.items()):  # fmt: skip
        file = configured(make_config, world, tmp_path / str(number), names)
        wrong = next(n for n in names if n not in ("a", "b", "base"))
        place = str(world / "base") + "+" if wrong == "base+" else placed(world, wrong)
        if wrong == "base+":
            raw = yaml.safe_load(file.read_text())
            raw["experts"]["x"] = place
            file.write_text(yaml.safe_dump(raw))
        ended = toys.evolver("validate", file)
        said = said.format(*place.split("+"), all=place)
        assert f": {said}" in toys.refusal(ended.code, ended.err)


def test_a_plus_sign_in_the_name_of_a_folder_divides_nothing(tmp_path):
    for name in ("base", "adapter", "c++", "base+adapter"):
        (tmp_path / name).mkdir()
    at = str(tmp_path) + "/"
    for text, wanted in {
        at + "base": (at + "base", ""),
        at + "c++": (at + "c++", ""),
        at + "base+adapter": (at + "base+adapter", ""),
        at + "c+++" + at + "adapter": (at + "c++", at + "adapter"),
        at + "base+" + at + "c++": (at + "base", at + "c++"),
        at + "c++/typo": (at + "c++/typo", ""),
        at + "typo+" + at + "adapter": (at + "typo", at + "adapter"),
        at + "base+" + at + "typo": (at + "base", at + "typo"),
        "org/name+" + at + "adapter": ("org/name", at + "adapter"),
        "org/name@v1+org/lora@v2": ("org/name@v1", "org/lora@v2"),
        "s3://bucket/a+b/c": ("s3://bucket/a+b/c", ""),
        "s3://bucket/a+b+s3://bucket/c": ("s3://bucket/a+b", "s3://bucket/c"),
        "s3://bucket/a+" + at + "adapter": ("s3://bucket/a", at + "adapter"),
        at + "base+": (at + "base+", ""),
        "+" + at + "adapter": ("+" + at + "adapter", ""),
    }.items():
        assert parts_of(text) == wanted


def test_an_adapter_of_another_base_is_said_of_the_base(make_config, world, tmp_path):
    file = configured(make_config, world, tmp_path / "run", ("base+three", "a", "b"))
    loose = toys.evolver("run", file, "--results", tmp_path)
    assert loose.code == 0, loose.err
    assert loose.out.count(f"model.base ({world / 'three'}) was trained on ") == 1
    strict = configured(make_config, world, tmp_path / "strict", ("base+three", "a", "b"), **{"model.strict": True})
    ended = toys.evolver("run", strict, "--results", tmp_path / "results")
    assert "model.strict refuses it" in toys.refusal(ended.code, ended.err)


@pytest.mark.parametrize("resized", ["the model", "the adapter"])
def test_tokens_and_template_are_those_of_the_model_below(make_config, world, tmp_path, resized):
    """Unless the adapter was trained after the embedding was resized, so that it has rows of its own."""
    words, below = AutoTokenizer.from_pretrained(world / "a"), AutoModelForCausalLM.from_pretrained(world / "a")
    if resized == "the adapter":
        for part in (below, words):
            part.save_pretrained(tmp_path / "below")
    words.add_tokens(["<mark>"])
    words.chat_template = "{% for m in messages %}<mark>{{ m['content'] }}{% endfor %}"
    below.resize_token_embeddings(len(words))
    settings = {"target_modules": ["q_proj"]}
    if resized == "the adapter":
        settings |= {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    tuned = train(tmp_path / "made", below, **settings)
    if resized == "the model":
        (tmp_path / "made" / "base").rename(tmp_path / "below")
        words.save_pretrained(tmp_path / "below")
    else:
        words.save_pretrained(tmp_path / "made" / "lora")
    for part in (tuned.merge_and_unload(), words):
        part.save_pretrained(tmp_path / "merged")
    experts, found = (
        {"plus": f"{tmp_path / 'below'}+{tmp_path / 'made' / 'lora'}", "whole": str(tmp_path / "merged")},
        {},
    )
    for kind, expert in experts.items():
        changes = {"model.chat_template": "expert x", "experts": {"x": expert, "y": str(world / "b")}}
        file = configured(make_config, world, tmp_path / kind, ("base", "a", "b"), **changes)
        folder = toys.run_here(file, tmp_path / kind)
        found[kind] = sorted((r["stage"], r["number"], r["score"]) for r in toys.all_rows(folder, "finished"))
        found[kind].append([(folder / "best" / n).read_text() for n in ("chat_template.jinja", "tokenizer.json")])
    assert found["plus"] == found["whole"]
    if resized == "the adapter":  # the files of a base are those of the model below, which lack the token
        file = configured(make_config, world, tmp_path / "base", ("base", "a", "b"), **{"model.base": experts["plus"]})
        ended = toys.evolver("validate", file)
        assert "was trained with other tokens than" in toys.refusal(ended.code, ended.err)
    assert "<mark>" in AutoTokenizer.from_pretrained(tmp_path / "plus" / "toy" / "best").get_vocab()
