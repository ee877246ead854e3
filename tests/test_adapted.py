"""``MODEL+ADAPTER`` in the configuration of a run: as its base, and as an expert."""

from __future__ import annotations

import json
import shutil

import pytest
import toys
import yaml
from safetensors.torch import load_file
from test_lora import train
from transformers import AutoModelForCausalLM

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
