"""Files as people have them from mergekit: what runs unchanged, what is warned of, and what is refused and why."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent / "oracles"))

from checkpoints import make

from evolver.errors import BadInput
from evolver.merging import mergekit
from evolver.merging.engine.apply import apply
from evolver.merging.engine.pieces import InputTensors
from evolver.merging.methods import METHODS

TWO = [{"model": "one", "parameters": {"weight": 0.6}}, {"model": "two", "parameters": {"weight": 0.4}}]
# Methods without weights in mergekit, with what they need.
UNWEIGHED = {
    "slerp": ("one", {"t": 0.3}),
    "sce": ("base", {"select_topk": 0.5}),
    "ram": ("base", {}),
    "ramplus_tl": ("base", {"r": 0.05}),
    "model_stock": ("base", {}),
    "arcee_fusion": ("one", {}),
    "nearswap": ("one", {"t": 0.01}),
    "karcher": ("base", {"max_iter": 5}),
}


def file(method, base=None, models=TWO, **parameters):
    return {"merge_method": method, "models": models, "parameters": parameters} | ({"base_model": base} if base else {})


def refused(raw):
    with pytest.raises(BadInput) as said:
        mergekit.parse(raw, "merge.yml")
    assert str(said.value).startswith("merge.yml: ")
    return str(said.value)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {n: str(p) for n, p in make(tmp_path_factory.mktemp("models") / "m").items()}


def write(folder, config, name="merge.yml"):
    (folder / name).write_text(config if isinstance(config, str) else yaml.safe_dump(config))
    return folder / name


# Parameters


@pytest.mark.parametrize("method", UNWEIGHED)
def test_a_parameter_that_the_method_does_not_use_is_warned_of_once(method):
    base, parameters = UNWEIGHED[method]
    (warning,) = mergekit.parse(file(method, base, **parameters), "merge.yml").warnings
    assert warning.startswith(f"merge.yml: weight: the method {method} does not use")
    plain = [{"model": m["model"]} for m in TWO]
    assert mergekit.parse(file(method, base, plain, **parameters), "merge.yml").warnings == ()


@pytest.mark.parametrize("key", ["density", "lambda", "normalize_weights", "select_topk", "t", "eps", "filter_wise"])
def test_parameters_of_other_methods_are_warned_of(key):
    (warning,) = mergekit.parse(file("linear", **{key: 1}), "merge.yml").warnings
    assert f": {key}: " in warning


@pytest.mark.parametrize("place", ["parameters", "models", "sources", "slices"])
def test_a_misspelt_parameter_is_refused_in_every_place(place):
    raw, bad = file("ties", "base"), {"densty": 0.5}
    if place == "parameters":
        raw["parameters"] = bad
    elif place == "models":
        raw["models"] = [TWO[0], {"model": "two", "parameters": bad}]
    else:
        source = {"model": "one", "layer_range": [0, 2]}
        part = {"sources": [source | ({"parameters": bad} if place == "sources" else {})]}
        raw = {**raw, "slices": [part | ({"parameters": bad} if place == "slices" else {})]}
        del raw["models"]
    assert "ties has no 'densty'; did you mean 'density'?" in refused(raw)


def test_a_setting_of_ours_is_no_parameter_of_another_method():
    assert "linear has no 'elect'" in refused(file("linear", elect="raw"))


def test_the_memory_of_masks_is_nobody_s_business():
    assert mergekit.parse(file("sce", "base", [{"model": "one"}, {"model": "two"}], int8_mask=True), "f").warnings == ()


def test_eps_is_known_where_it_changes_nothing():
    assert mergekit.parse(file("multislerp", eps=1e-8), "merge.yml").warnings == ()
    assert "eps: 0.001 is not usable" in refused(file("multislerp", eps=1e-3))
    assert "eps: 'small' is not usable" in refused(file("multislerp", eps="small"))


def test_keys_without_a_value_are_as_good_as_none():
    raw = file("linear") | {"parameters": None, "models": [{"model": "one", "parameters": None}, TWO[1]]}
    assert mergekit.parse(raw, "merge.yml").raw.parameters == {}


def test_warnings_of_all_documents_are_gathered(tmp_path):
    first = {"name": "first", **file("slerp", "one", t=0.5)}
    last = file("linear", models=[{"model": "first", "parameters": {"weight": 1}}, TWO[0]], density=1)
    path = write(tmp_path, "---\n".join(yaml.safe_dump(d) for d in (first, last)))
    found = mergekit.read(path).warnings
    assert [w.split(": ")[2] for w in found] == ["weight", "density"]


# Numbers


def reference(t, one, two, dim, flatten):
    """NuSLERP as its documentation says it, in float64."""
    one, two = one.double(), two.double()
    shape = one.shape
    if flatten:
        one, two = one.reshape(-1), two.reshape(-1)
    one, two = one.movedim(dim, -1) if not flatten else one, two.movedim(dim, -1) if not flatten else two
    norms = one.norm(dim=-1, keepdim=True) * two.norm(dim=-1, keepdim=True)
    angle = ((one * two).sum(-1, keepdim=True) / norms).arccos()
    out = (((1 - t) * angle).sin() * one + (t * angle).sin() * two) / angle.sin()
    return out.reshape(shape) if flatten else out.movedim(-1, dim)


@pytest.mark.parametrize("flatten", [True, False])
@pytest.mark.parametrize("row_wise", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (6, 3, 4), (16, 3, 14, 14), (3, 2, 2, 2, 2)])
@pytest.mark.parametrize("piece", [None, 64])
def test_nuslerp_of_tensors_of_any_dimensions(flatten, row_wise, shape, piece):
    draw = torch.Generator().manual_seed(len(shape))
    one, two, base = (torch.randn(shape, generator=draw) for _ in range(3))
    method = METHODS["nuslerp"]
    given = {"weight": (0.6, 0.2), "nuslerp_flatten": flatten, "nuslerp_row_wise": row_wise}
    for deltas in (False, True):
        values = method.complete(given | {"task_vectors": deltas}, 2, "nuslerp")
        found = apply(method, values, InputTensors("conv.weight", [one, two], base, ["one", "two"]), piece=piece)
        origin = base if deltas else torch.zeros_like(base)
        wanted = origin + reference(0.25, one - origin, two - origin, 0 if row_wise else -1, flatten)
        torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("weight", [(-1.0, 1.0), (0.5, -0.5), (2e-7, 0.0)])
def test_nuslerp_takes_the_middle_where_the_weights_cancel(weight):
    one, two = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    method = METHODS["nuslerp"]
    values = method.complete({"weight": weight}, 2, "nuslerp")
    found = apply(method, values, InputTensors("norm.weight", [one, two], torch.zeros(2), ["one", "two"]))
    torch.testing.assert_close(found, torch.full((2,), math.sqrt(0.5)))


# Models


@pytest.mark.parametrize("model", ["one+two+three", "one@x@y", "one+two@x@y"])
def test_a_model_that_mergekit_cannot_read_either(model):
    assert f"models[0].model: '{model}' is not usable" in refused(file("linear", models=[{"model": model}]))


def test_a_model_written_as_a_mapping():
    model = {"model": {"path": "org/name", "revision": "main"}, "lora": "org/lora", "override_architecture": None}
    read = mergekit.parse(file("passthrough", models=[{"model": model}]), "merge.yml")
    assert read.references == ["org/name@main+org/lora"]
    wrong = [{"model": {"model": "one", "override_architecture": "LlamaForCausalLM"}}]
    assert "override_architecture" in refused(file("linear", models=wrong))
    assert "unknown key 'adapter'" in refused(file("linear", models=[{"model": {"model": "one", "adapter": "two"}}]))


def refused_merge(config, folder):
    out = folder / "out"
    ended = toys.evolver("merge", write(folder, config), out)
    assert not out.exists()
    return toys.refusal(ended.code, ended.err)


def test_a_folder_has_no_revisions(models, tmp_path):
    entries = [{"model": f"{models['e1']}@main", "parameters": {"weight": 1}}]
    said = refused_merge(file("linear", models=entries), tmp_path)
    assert f"{models['e1']} is on this machine, where a model has no revisions; leave @main out" in said


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth", "last.ckpt"])
def test_a_pickle_is_called_one(models, tmp_path, name):
    (tmp_path / name).write_bytes(b"\x80\x04.")
    entries = [{"model": models["e1"]}, {"model": str(tmp_path / name)}]
    said = refused_merge(file("linear", models=entries, weight=1), tmp_path)
    assert f"{tmp_path / name} is a pickle, which can run code" in said


def test_a_base_that_would_be_merged_without_a_weight_is_refused(models, tmp_path):
    """mergekit 0.1.5 adds the base to the models, and then misses its weight; here no weight is read before."""
    entries = [{"model": models[n], "parameters": {"weight": 0.5}} for n in ("e1", "e2")]
    said = refused_merge(file("linear", models["base"], entries), tmp_path)
    assert "base_model: to linear, the base is one more model to merge" in said
    assert "leave base_model out, or list the base under models with a weight" in said
    raw = {n: file("linear", models["base"], e, **w) for n, e, w in (
        ("shared", entries, {"weight": 1.0}),
        ("listed", [*entries, {"model": models["base"], "parameters": {"weight": 0.0}}], {}),
    )} | {"alone": file("linear", None, entries)}  # fmt: skip
    found = {}
    for name, given in raw.items():
        path = write(tmp_path, given, f"{name}.yml")
        assert toys.evolver("merge", path, tmp_path / name).code == 0
        found[name] = load_file(tmp_path / name / "model.safetensors")
    moved = 0
    for tensor, value in found["alone"].items():
        assert torch.equal(found["listed"][tensor], value), tensor
        moved += not torch.equal(found["shared"][tensor], value)
    assert moved


# Files of mergekit's other commands


@pytest.mark.parametrize(
    ("raw", "tool", "remedy"),
    [
        (
            {"base_model": "one", "gate_mode": "random", "experts": [{"source_model": "two"}]}, "mergekit-moe",
            "Evolver has no such command",
        ),
        (
            {"genome": {"models": ["one"], "merge_method": "ties"}, "tasks": [{"name": "toy"}]}, "mergekit-evolve",
            "call `evolver run`",
        ),
        (
            {"layer_slices": [{"model": "one", "start": 0, "end": 2}], "embedding_source": "one"}, "bakllama",
            "Evolver has no such command",
        ),
    ],
)  # fmt: skip
def test_files_of_other_commands_are_called_by_their_names(raw, tool, remedy, tmp_path):
    said = refused_merge(raw, tmp_path)
    assert f"this is a file of {tool}" in said
    assert remedy in said


# The command


def test_the_options_of_mergekit_yaml(models, tmp_path):
    entries = [{"model": models[n], "parameters": {"weight": 0.5}} for n in ("e1", "e2")]
    path = write(tmp_path, file("linear", models=entries))
    plain = toys.evolver("merge", path, tmp_path / "plain")
    assert plain.code == 0
    options = "--async-write --write-threads 2 --lazy-unpickle --clone-tensors --low-cpu-memory --no-read-to-gpu"
    more = "--no-multi-gpu --lora-merge-cache cache -v --safe-serialization --device cpu --no-write-model-card"
    ended = toys.evolver("merge", path, tmp_path / "out", *options.split(), *more.split())
    assert (ended.code, ended.err) == (0, "")
    names = {f.name for f in (tmp_path / "plain").iterdir()} - {f.name for f in (tmp_path / "out").iterdir()}
    assert names == {"README.md", "mergekit_config.yml"}
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "out"))
    assert all(torch.equal(one[n], two[n]) for n in one)


@pytest.mark.parametrize(
    "options",
    [
        ["--trust-remote-code"], ["--allow-crimes"], ["--no-safe-serialization"], ["--unsafe-truncate-embeddings"],
        ["--lora-merge-dtype", "float16"], ["--transformers-cache", "there"], ["--device", "tpu"],
    ],
)  # fmt: skip
def test_options_that_are_refused_on_purpose_say_why(options, tmp_path):
    ended = toys.evolver("merge", tmp_path / "merge.yml", tmp_path / "out", *options)
    assert toys.refusal(ended.code, ended.err).startswith(f"{options[0]}: ")


def test_warnings_are_printed_and_the_merge_goes_on(models, tmp_path):
    entries = [{"model": models[n], "parameters": {"weight": w}} for n, w in (("base", 0.6), ("e1", 0.4))]
    path = write(tmp_path, file("slerp", models["base"], entries, t=0.35))
    ended = toys.evolver("merge", path, tmp_path / "weighed")
    assert ended.code == 0
    assert "warning: " in ended.err
    assert "weight: the method slerp does not use this parameter" in ended.err
    without = write(
        tmp_path, file("slerp", models["base"], [{"model": e["model"]} for e in entries], t=0.35), "plain.yml"
    )
    assert toys.evolver("merge", without, tmp_path / "plain").err == ""
    one, two = (load_file(tmp_path / n / "model.safetensors") for n in ("weighed", "plain"))
    assert all(torch.equal(one[n], two[n]) for n in one)
