"""Statistics of adapters: what is collected of a folder that PEFT wrote, and by what a kept file is found again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from test_lora import train
from test_statistics import cache  # noqa: F401  # a fixture
from test_stats_command import collected
from transformers import AutoModelForCausalLM

from evolver.checkpoints.kept import KeptTensors
from evolver.checkpoints.weights import open_tensors
from evolver.evaluation.collectors import COLLECTORS

pytestmark = pytest.mark.whole

SEARCH = {"algorithm": "tpe", "method": "regmean"}
KINDS = {"a": {"target_modules": ["q_proj", "up_proj"]}, "b": {"target_modules": ["v_proj"], "use_dora": True}}


@pytest.fixture(scope="module")
def adapters(models, tmp_path_factory):
    """A folder with the adapters ``a`` and ``b`` of the toys' base, and with the models that PEFT makes of them."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, (name, settings) in enumerate(KINDS.items()):
        made = folder / "made"
        tuned = train(made, AutoModelForCausalLM.from_pretrained(models / "base"), seed=seed + 1, **settings)
        file = made / "lora" / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(models / "base")}))
        (made / "lora").rename(folder / name)
        shutil.copytree(models / "base", folder / f"merged-{name}")
        tuned.merge_and_unload().save_pretrained(folder / f"merged-{name}")
    return folder


@pytest.fixture
def over(make_config, tmp_path):
    """``over(folders)`` writes a configuration of these experts, by name."""

    def make(folders):
        changes = {"experts": {n: str(f) for n, f in folders.items()}, "search": SEARCH, "statistics": {"items": 3},
                   "evaluation.tasks": [{"task": "toy", "dev": 6, "report": 4}]}  # fmt: skip
        return make_config(tmp_path, changes)

    return make


def opened(file):
    handle = open_tensors(file, "cache")
    return KeptTensors(handle), sorted(handle.keys())


def test_every_kind_is_that_of_the_model_that_peft_makes(adapters, over, cache):  # noqa: F811
    kinds = sorted(COLLECTORS)
    found, merged = (
        {(k.node.collected, k.node.of.label): k for k in collected(over({n: adapters / f for n, f in named}), *kinds)}
        for named in ([(n, n) for n in KINDS], [(n, f"merged-{n}") for n in KINDS])
    )
    assert found.keys() == merged.keys()
    assert {kind for kind, _ in found} == set(kinds)
    for of, one in found.items():
        assert merged[of].fresh is (of[1] != "base")
        (mine, names), (theirs, others) = opened(one.file), opened(merged[of].file)
        assert names == others
        for name in names:
            scale = float(theirs.get(name).abs().max())
            assert torch.allclose(mine.get(name), theirs.get(name), rtol=2e-3, atol=1e-4 * scale), (of, name)


def test_an_adapter_is_known_by_what_it_holds(adapters, over, cache, tmp_path):  # noqa: F811
    file = over({n: adapters / n for n in KINDS})
    assert [k.fresh for k in collected(file)] == [True, True]
    copies = {n: Path(shutil.copytree(adapters / n, tmp_path / "elsewhere" / n)) for n in KINDS}
    assert [k.fresh for k in collected(over(copies), pool=lambda *_: pytest.fail("a pool was made"))] == [False, False]
    weights = copies["b"] / "adapter_model.safetensors"
    changed = load_file(weights)
    next(t for n, t in sorted(changed.items()) if "lora_B" in n)[0] += 0.5
    save_file(changed, weights)
    again = collected(over(copies))
    assert {k.node.of.label: k.fresh for k in again} == {"a": False, "b": True}
    assert len(list(cache.iterdir())) == 3
    settings = copies["a"] / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"lora_alpha": 3}))
    assert {k.node.of.label: k.fresh for k in collected(over(copies))} == {"a": True, "b": False}


def test_a_search_over_adapters_uses_them(adapters, over, cache, tmp_path):  # noqa: F811
    import toys

    file = over({n: adapters / n for n in KINDS})
    raw = yaml.safe_load(file.read_text()) | {"budget": {"candidates": 2}}
    file.write_text(yaml.safe_dump(raw))
    kept = {k.file: k.file.read_bytes() for k in collected(file)}
    folder = toys.run_here(file, tmp_path / "results")
    assert json.loads((folder / "best.json").read_text()) == {"items": 6, "equal": 6}
    assert {f: f.read_bytes() for f in cache.iterdir()} == kept
