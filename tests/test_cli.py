"""``evolver merge``, ``explain`` and ``methods``, as a user calls them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "oracles"))

from checkpoints import make

from evolver.commands.cli import app
from evolver.merging.methods import METHODS


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {n: str(p) for n, p in make(tmp_path_factory.mktemp("models") / "m").items()}


def write(folder, config):
    path = folder / "config.yml"
    path.write_text(yaml.safe_dump(config))
    return str(path)


def ties(models, **more):
    entries = [{"model": models[e], "parameters": {"weight": 0.5}} for e in ("e1", "e2")]
    return {"merge_method": "ties", "base_model": models["base"], "models": entries, "dtype": "bfloat16", **more}


def run(*arguments):
    done = toys.evolver(*arguments)
    return subprocess.CompletedProcess(arguments, done.code, done.out, done.err)


def test_a_merge_loads_as_a_model(models, tmp_path):
    from transformers import AutoModelForCausalLM

    done = run("merge", write(tmp_path, ties(models)), str(tmp_path / "out"))
    assert (done.returncode, done.stderr) == (0, "")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == torch.bfloat16
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.isfinite().all()
    again = run("merge", str(tmp_path / "out" / "mergekit_config.yml"), str(tmp_path / "again"))
    assert again.returncode == 0
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("out", "again"))
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_a_stack_of_layers_is_as_deep_as_it_says(models, tmp_path):
    slices = [{"sources": [{"model": models["e1"], "layer_range": r}]} for r in ([0, 3], [1, 4])]
    config = write(tmp_path, {"merge_method": "passthrough", "slices": slices, "dtype": "float32"})
    done = run("merge", config, str(tmp_path / "out"), "--out-shard-size", "200K", "-q")
    assert (done.returncode, done.stdout) == (0, "")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 6
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert "model.layers.5.mlp.up_proj.weight" in index["weight_map"]


def test_explain_says_what_holds_for_every_tensor(models, tmp_path):
    density = [{"filter": "mlp", "value": 0.3}, {"value": [0.5, 0.8]}]
    result = CliRunner().invoke(app, ["explain", write(tmp_path, ties(models, parameters={"density": density}))])
    lines = {line.split()[0]: line for line in result.output.splitlines()}
    assert len(lines) == 39
    assert "density=[0.3, 0.3]" in lines["model.layers.3.mlp.up_proj.weight"]
    assert "density=[0.8, 0.8]" in lines["model.layers.3.self_attn.q_proj.weight"]
    assert "density=[0.5, 0.5]" in lines["lm_head.weight"]


def test_methods_come_from_the_registry():
    shown = CliRunner().invoke(app, ["methods"], env={"COLUMNS": "200"}).output
    assert all(name in shown for name in METHODS)
    assert "Yadav" in CliRunner().invoke(app, ["methods", "ties"]).output


BAD = {
    "unknown key": (lambda c, m: c | {"base_modell": 1}, "base_modell: unknown key; did you mean 'base_model'"),
    "unknown method": (lambda c, m: c | {"merge_method": "tise"}, "merge_method: unknown merge method 'tise'; did you mean 'ties'"),  # noqa: E501
    "unknown parameter": (lambda c, m: c | {"parameters": {"densty": 1}}, "ties has no 'densty'; did you mean 'density'"),  # noqa: E501
    "no base": (lambda c, m: {k: v for k, v in c.items() if k != "base_model"}, "base_model: missing"),
    "no weight": (lambda c, m: c | {"models": [{"model": m["e1"]}]}, "weight is missing"),
    "neither": (lambda c, m: {k: v for k, v in c.items() if k != "models"}, "models: write either models or slices"),
    "modules": (lambda c, m: c | {"modules": {}}, "modules: models of several modules"),
    "wrong density": (lambda c, m: c | {"parameters": {"density": 1.5}}, "density: 1.5 is not usable"),
    "text for a number": (lambda c, m: c | {"parameters": {"density": "much"}}, "density: 'much' is not usable"),
    "no such model": (lambda c, m: c | {"base_model": "/nowhere/at/all"}, "base_model: there is no folder"),
    "twice": (lambda c, m: c | {"models": [c["models"][0]] * 2}, "a model is listed twice"),
    "other tokens": (lambda c, m: c | {"tokenizer_source": "union"}, "has no tokenizer.json, so its rows"),
    "a condition misspelt": (lambda c, m: c | {"parameters": {"density": [{"filtre": "mlp", "value": 1}]}}, "density: unknown key 'filtre'; did you mean 'filter'"),  # noqa: E501
    "a list of lists": (lambda c, m: c | {"parameters": {"density": [[0.1], [0.2]]}}, "density: [[0.1], [0.2]] is not usable"),  # noqa: E501
    "a condition without value": (lambda c, m: c | {"parameters": {"density": {"filter": "mlp"}}}, "density: {'filter': 'mlp'} is not usable"),  # noqa: E501
    "shared, at a model": (lambda c, m: c | {"models": [s | {"parameters": {"weight": 1, "lambda": 2}} for s in c["models"]]}, "lambda: this setting has one value for all models"),  # noqa: E501
    "half a count": (lambda c, m: c | {"merge_method": "karcher", "models": [{"model": m["e1"]}, {"model": m["e2"]}], "parameters": {"max_iter": [1, 4, 2]}}, "max_iter: 3.33"),  # noqa: E501
    "bad dtype": (lambda c, m: c | {"dtype": "float8"}, "dtype: 'float8' is not usable"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence_and_nothing_is_written(name, models, tmp_path):
    change, says = BAD[name]
    done = run("merge", write(tmp_path, change(ties(models), models)), str(tmp_path / "out"))
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_flags_that_weaken_safety_are_refused(models, tmp_path):
    done = run("merge", write(tmp_path, ties(models)), str(tmp_path / "out"), "--trust-remote-code")
    assert done.returncode == 2
    assert "--trust-remote-code" in done.stderr
