"""Layer programs: models of another depth, from the recipe over the live model to the folder that is exported."""

import json
import shutil
import subprocess
import sys

import families
import pytest
import torch
import toys
from toys import run_here

from evolver.checkpoints.weights import Checkpoint
from evolver.config.model import ModelSettings
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.evaluation.depth import check_alike, count_layers, with_layers
from evolver.evaluation.live import LiveModel
from evolver.merging.export import export
from evolver.merging.materialise import Materialiser
from evolver.records import Candidate
from evolver.records.depth import LayerOrigin, layer_origins, name_in_base
from evolver.records.recipe import Expert, Layers, Merge, Rule, at_layer, layer_of, load_recipe
from evolver.workers.worker import Worker

A, B = Expert("a", "aa"), Expert("b", "bb")
# Of the models 0 and 1 with two layers each: a repetition, a removal, and layers in another order.
PROGRAMS = (((0, 1), (1, 0), (0, 1), (1, 1), (1, 0)), ((1, 1),), ((0, 0), (0, 0), (1, 1)))
INPUTS = {
    "causal-lm": {"input_ids": torch.arange(3, 15).reshape(2, 6)},
    "classifier": {"input_ids": torch.arange(3, 15).reshape(2, 6)},
    "seq2seq": {"input_ids": torch.arange(3, 15)[None], "decoder_input_ids": torch.arange(4, 9)[None]},
    "image-classifier": {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 16 * 16).reshape(2, 3, 16, 16)},
}
# Among them are models with sliding windows in some layers, layers of experts, and two halves.
ARCHITECTURES = ("SmolLM", "GPT-2", "Gemma 3, text", "Qwen3-MoE", "BERT", "BART", "ViT")


def saved(name, folder):
    """A model of an architecture and another one with the same shapes, and their folders, opened."""
    family = families.FAMILIES[name]
    for number, part in enumerate(("base", "other")):
        for each in (family.model(number), *family.beside()):
            each.save_pretrained(folder / part)
    base, other = (Checkpoint(folder / part, f"experts.{part}") for part in ("base", "other"))
    experts = Expert("base", base.digest()), Expert("other", other.digest())
    return family, experts, Materialiser(base, {experts[0].digest: base, experts[1].digest: other})


def live_model(family, base):
    settings = ModelSettings(base=str(base.path), kind=family.kind, compute="float32")
    return LiveModel(settings, base.path, {n: i.shape for n, i in base.headers.items()}, "cpu")


def built_by_hand(family, program, live):
    """A model of the program's depth by Transformers, with layers copied from two models one by one."""
    whole = [family.model(number) for number in (0, 1)]
    config, depth = type(whole[0].config).from_dict(whole[0].config.to_dict()), len(program)
    for key in ("num_hidden_layers", "encoder_layers", "decoder_layers"):
        if hasattr(config, key):
            setattr(config, key, depth)
    if getattr(config, "layer_types", None):
        config.layer_types = [whole[0].config.layer_types[layer] for _, layer in program]
    model = type(whole[0])(config).eval()
    states = [m.state_dict() for m in whole]
    wanted = {}
    for name in model.state_dict():
        layer = layer_of(name)
        number, of = (0, 0) if layer is None else program[layer]
        wanted[name] = states[number][name if layer is None else at_layer(name, of)]
    model.load_state_dict(wanted)
    # Products of matrices may differ in their last bits with the place of a matrix in memory, so both use the same.
    found = dict(live.module.named_parameters(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        assert torch.equal(parameter, found[name]), name
        parameter.data = found[name].data
    return model


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_live_model_of_another_depth_is_one_built_by_hand(name, tmp_path):
    """Bit for bit; repeated layers share memory, and the layers that were loaded come back."""
    family, experts, materialiser = saved(name, tmp_path)
    live, inputs = live_model(family, materialiser.base), INPUTS[family.kind]
    module = live.module
    with torch.no_grad():
        before = live.forward(None, **inputs).logits
        for program in PROGRAMS:
            recipe = Layers(experts, program, (0, 0))
            live.write(materialiser.stream(recipe), layers=layer_origins(recipe, 2))
            found = live.forward(None, **inputs).logits
            assert torch.equal(found, built_by_hand(family, program, live)(**inputs).logits)
            assert not torch.equal(found, before)
            places = {}
            for path, parameter in live.module.named_parameters(remove_duplicate=False):
                if (layer := layer_of(path)) is not None:
                    places.setdefault((at_layer(path, 0), program[layer]), set()).add(parameter.data_ptr())
            assert all(len(pointers) == 1 for pointers in places.values())
            assert len(set.union(*places.values())) == len(places)
        live.write(materialiser.stream(experts[0]), layers=layer_origins(experts[0], 2))
        assert torch.equal(live.forward(None, **inputs).logits, before)
    assert live.module is module


@pytest.mark.whole
@pytest.mark.parametrize("name", [n for n in families.FAMILIES if n not in ARCHITECTURES])
def test_every_other_architecture_is_built_anew_or_refused(name, tmp_path):
    """In one sentence, before weights are read."""
    family, experts, materialiser = saved(name, tmp_path)
    base = materialiser.base
    shapes = {n: i.shape for n, i in base.headers.items()}
    try:
        check_alike(shapes, base.config, base.path)
    except BadInput as error:
        assert str(error).startswith(f"model.base: {base.path} ")  # noqa: PT017
        return
    live, inputs = live_model(family, base), INPUTS[family.kind]
    for program in PROGRAMS:
        recipe = Layers(experts, program, (0, 0))
        live.write(materialiser.stream(recipe), layers=layer_origins(recipe, 2))
        shutil.rmtree(tmp_path / "made", ignore_errors=True)
        export(recipe, materialiser, tmp_path / "made", {})
        again, said = type(live.module).from_pretrained(tmp_path / "made", output_loading_info=True)
        assert not said["missing_keys"]
        assert not said["unexpected_keys"]
        with torch.no_grad():
            found, wanted = live.forward(None, **inputs).logits, again.float().eval()(**inputs).logits
        assert torch.allclose(found, wanted, atol=1e-5)


def test_a_live_model_generates_with_its_new_layers(tmp_path):
    """The keys and values of each layer stand in a place of their own, also those of layers that share weights."""
    family, experts, materialiser = saved("SmolLM", tmp_path)
    live = live_model(family, materialiser.base)
    recipe = Layers(experts, PROGRAMS[0], (0, 0))
    live.write(materialiser.stream(recipe), layers=layer_origins(recipe, 2))
    ids = INPUTS["causal-lm"]["input_ids"]
    settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 2}
    found = [live.module.generate(ids, use_cache=cached, **settings).tolist() for cached in (True, False)]
    assert found[0] == found[1]
    assert found[0] == built_by_hand(family, PROGRAMS[0], live).generate(ids, **settings).tolist()


def test_a_repeated_layer_is_built_once(tmp_path):
    _, experts, materialiser = saved("SmolLM", tmp_path)
    read, source = [], materialiser.sources[experts[1].digest]

    class Counting:
        def tensor(self, name):
            read.append(name)
            return source.tensor(name)

    materialiser.sources = {**materialiser.sources, experts[1].digest: Counting()}
    merge = Merge("task_arithmetic", (experts[1],), experts[0], (Rule.of({"lambda": 0.5}),))
    once = [n for n in materialiser.base.names() if layer_of(n) == 1]
    for recipe in (
        Layers((experts[0], merge), ((1, 1), (0, 0), (1, 1), (1, 1)), (0, 0)),
        Layers((experts[0], Layers((merge,), ((0, 1), (0, 1)), (0, 0))), ((1, 0), (1, 1), (0, 0)), (0, 0)),
    ):
        read.clear()
        found = dict(materialiser.stream(recipe))
        assert sorted(read) == sorted(once)
        assert list(found) == materialiser.names(recipe)
        copies = [layer for layer, origin in enumerate(layer_origins(recipe, 2)) if origin.model == merge.id]
        for name in once:
            assert len({found[at_layer(name, layer)].data_ptr() for layer in copies}) == 1


def test_a_model_of_which_only_some_layers_were_used_is_not_taken_for_the_whole(tmp_path):
    """A cache holds whole models only."""
    _, experts, materialiser = saved("SmolLM", tmp_path)
    base = materialiser.base
    kept = Materialiser(base, materialiser.sources, cache_bytes=10 * base.size)
    merge = Merge("task_arithmetic", (experts[1],), experts[0], (Rule.of({"lambda": 0.5}),))
    for program in (((0, 1),), ((0, 0), (0, 1)), ((0, 0),)):
        recipe = Layers((merge,), program, (0, 0))
        found, wanted = dict(kept.stream(recipe)), dict(materialiser.stream(recipe))
        assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


def test_where_layers_come_from():
    merge = Merge("linear", (A, B), A)
    inner = Layers((merge, B), ((0, 3), (1, 2)), (0, 0))
    recipe = Layers((inner, A), ((0, 0), (1, 5), (0, 1), (0, 0)), (0, 0))
    found = layer_origins(recipe, 6)
    assert found == (
        LayerOrigin(merge.id, 3, 3), LayerOrigin(A.id, 5, 5), LayerOrigin(B.id, 2, 2), LayerOrigin(merge.id, 3, 3),
    )  # fmt: skip
    assert name_in_base("model.layers.1.mlp.weight", found) == "model.layers.5.mlp.weight"
    assert name_in_base("model.norm.weight", found) == "model.norm.weight"
    # A merge of cut models has layers of its own, which are of the kind of those that it merges.
    cuts = tuple(Layers((m,), ((0, 2), (0, 3)), (0, 0)) for m in (A, B))
    woven = Merge("linear", cuts, cuts[0])
    assert layer_origins(woven, 6) == (LayerOrigin(woven.id, 0, 2), LayerOrigin(woven.id, 1, 3))


def test_settings_with_an_entry_for_each_layer_follow_their_layers():
    """Also those that a file lacks, as Transformers would fill them in by the places of the layers."""
    types = ["sliding_attention", "full_attention"] * 2
    plain = {"model_type": "gemma2", "num_hidden_layers": 4, "hidden_size": 8}
    for config in (plain, {**plain, "layer_types": types}):
        found = with_layers(config, (0, 2, 2, 3, 1))
        assert found["layer_types"] == [types[0]] * 3 + [types[1]] * 2
        assert (found["num_hidden_layers"], found["hidden_size"]) == (5, 8)
    short = {"model_type": "gpt_neo", "num_layers": 4, "attention_types": [[["global", "local"], 2]]}
    from transformers import GPTNeoConfig

    assert GPTNeoConfig.from_dict(with_layers(short, (1, 3, 0))).attention_layers == ["local", "local", "global"]
    bart = {"model_type": "bart", "encoder_layers": 2, "decoder_layers": 2, "num_hidden_layers": 2}
    assert with_layers(bart, (1,)) == {**bart, "encoder_layers": 1, "decoder_layers": 1, "num_hidden_layers": 1}


LAYER_0_AND_1 = {"m.layers.0.w": (2, 2), "m.layers.1.w": (2, 2)}


@pytest.mark.parametrize(
    ("shapes", "config", "said"),
    [
        ({"m.w": (2,)}, {"num_hidden_layers": 0}, "the tensors of"),
        ({**LAYER_0_AND_1, "m.layers.1.b": (2,)}, {"num_hidden_layers": 2}, "differ in .b"),
        ({**LAYER_0_AND_1, "m.layers.1.w": (2, 3)}, {"num_hidden_layers": 2}, "differ in .w"),
        (
            {**LAYER_0_AND_1, "v.blocks.0.w": (2,)},
            {"num_hidden_layers": 2},
            "2 layers m.layers.N and 1 layers v.blocks.N",
        ),
        (LAYER_0_AND_1, {"depth": 2}, "num_hidden_layers"),
        (LAYER_0_AND_1, {"num_hidden_layers": 3}, "num_hidden_layers"),
        (LAYER_0_AND_1, {"num_hidden_layers": 2, "num_kv_shared_layers": 1}, "num_kv_shared_layers"),
    ],
)
def test_models_whose_layers_cannot_be_put_together_anew_are_refused(shapes, config, said, tmp_path):
    with pytest.raises(BadInput) as caught:
        check_alike(shapes, config, tmp_path)
    assert str(caught.value).startswith("model.base: ")
    assert said in str(caught.value)


def test_layers_are_counted():
    assert count_layers(LAYER_0_AND_1, "model") == 2


FLOW = {
    "algorithm": "layers",
    "genome": "dataflow",
    "protect": 0,
    "repeats": 2,
    "by": {"algorithm": "tpe", "startup": 4},
}


@pytest.mark.whole
@pytest.mark.parametrize("more", [{}, {"evaluation.quantise": "q8_0"}], ids=["", "quantised"])
def test_a_worker_scores_models_of_any_depth(make_config, tmp_path, more):
    """In any order, with the same scores as in a process that has met no other depth."""
    tasks = [{"task": "roll", "metric": "bits_per_byte", "dev": 6, "report": 4}]  # a number in which any weight shows
    bounds = [{"norm": 9.0}]
    ready = prepare(config_at(make_config(tmp_path, {"evaluation.tasks": tasks, "constraints": bounds, **more})))
    recipes = [Layers(ready.experts[:2], program, (0, 1)) for program in PROGRAMS]
    recipes = [recipes[0], ready.experts[0], recipes[1], recipes[2], recipes[0]]
    worker, found = Worker(ready.plan, "dev", tasks=ready.tasks), []
    for number, recipe in enumerate(recipes):
        found.append(worker.evaluate(Candidate(number, recipe, "test")))
        alone = Worker(ready.plan, "dev", tasks=ready.tasks).evaluate(Candidate(number, recipe, "test"))
        assert (alone.status, alone.reason) == ("ok", "")
        assert found[-1].items == alone.items
        assert found[-1].violations == alone.violations
        assert found[-1].violations["0"] > -9
    assert len({result.items for result in found}) == 4


RELOADED = """
import json, sys
from evolver.commands.evaluate import score_models
print(json.dumps([score_models(sys.argv[1], [sys.argv[2]], split)[0].score for split in ("dev", "report")]))
"""


@pytest.mark.whole
def test_a_run_that_is_killed_goes_on_and_its_model_loads_elsewhere(make_config, tmp_path):
    changes = {**toys.SHORT, "search": FLOW, "budget.candidates": 8}
    changes["evaluation.tasks"] = [
        {"task": "toy", "dev": 12, "report": 8}, {"task": "free", "metric": "exact_match", "dev": 8, "report": 8},
    ]  # fmt: skip
    file = make_config(tmp_path, changes)
    clean = run_here(file, tmp_path / "clean")
    process = subprocess.Popen(
        toys.command(file, tmp_path / "results"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    for line in process.stdout:
        if line.startswith("search "):
            process.kill()
            break
    process.wait()
    found = tmp_path / "results" / clean.name
    assert 0 < len(toys.rows(found)) < len(toys.rows(clean))
    run_here(file, tmp_path / "results")
    assert toys.essence(found) == toys.essence(clean)
    assert toys.winner(found) == toys.winner(clean)
    searched = {r["recipe_id"]: load_recipe(r["recipe"]) for r in toys.rows(found).values() if r["stage"] == "search"}
    depths = {len(layer_origins(recipe, 2)) for recipe in searched.values()}
    assert len(depths) > 2
    deepest = max(searched, key=lambda name: len(layer_origins(searched[name], 2)))
    out = tmp_path / "deep"
    ended = toys.evolver("export", found, out, "--candidate", deepest)
    assert ended.code == 0, ended.err
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == max(depths)
    said = subprocess.run(
        [sys.executable, "-c", RELOADED, file, out], capture_output=True, text=True, check=True
    ).stdout
    row = next(r for r in toys.rows(found).values() if r["recipe_id"] == deepest and r["stage"] == "search")
    assert json.loads(said.splitlines()[-1])[0] == row["score"]
    ended = toys.evolver("export", found, tmp_path / "adapter", "--candidate", deepest, "--delta")
    assert "other layers than the base" in toys.refusal(ended.code, ended.err)


@pytest.mark.whole
def test_a_model_of_another_depth_becomes_a_gguf_file(make_config, tmp_path):
    folder = run_here(make_config(tmp_path, {**toys.SHORT, "search": FLOW}), tmp_path / "results")
    rows = [r for r in toys.rows(folder).values() if r["stage"] == "search"]
    other = next(r for r in rows if len(layer_origins(load_recipe(r["recipe"]), 2)) != 2)
    ended = toys.evolver("export", folder, tmp_path / "m.gguf", "--gguf", "f32", "--candidate", other["recipe_id"])
    assert ended.code == 0, ended.err
    assert "on 12 of 12 dev items" in ended.out


@pytest.mark.parametrize(
    ("search", "said"),
    [
        ({"genome": "prune", "protect": 0, "remove": 2}, "search.remove: without 2 of 2 layers, a model has none"),
        ({"genome": "prune"}, "search.protect: all 2 layers are protected"),
        ({"genome": "prune", "protect": 0, "remove": [2, 1]}, "search.remove: [2, 1] is no number of layers"),
        ({"genome": "prune", "protect": 0, "remove": []}, "search.remove: [] is no number of layers"),
        ({"genome": "dataflow"}, "search.protect: all 2 layers are protected"),
        ({"genome": "dataflow", "protect": 0, "most": 0}, "search.most: 0 is not usable"),
        ({"groups": 3}, "search.groups: 3 groups of 2 layers; write a number from 1 to 2"),
        ({"remove": 1}, "search.remove: the genome swap has no such setting"),
        ({"sources": ["a", "d"]}, "search.sources: there is no source 'd'"),
        ({"sources": ["a"]}, "search.sources: layers are swapped between sources, and there is one"),
        ({"sources": ["a", "b"], "ends": "c"}, "search.ends: c is none of the sources"),
        ({"by": {"algorithm": "evolver"}}, "search.by.algorithm: 'evolver' cannot choose"),
        ({"by": {"algorithm": "cmaes"}}, "search.by.algorithm: cmaes can only tune numbers"),
        ({"by": {"algorithm": "tpe", "tune": ["sign"]}}, "search.by.tune: task_arithmetic has nothing to tune"),
        ({"sources": ["a", "b"], "by": {"algorithm": "tpe", "method": "ties"}}, "search.by.method: no layer is taken"),
    ],
)
def test_programs_that_make_no_model_are_refused(make_config, tmp_path, monkeypatch, search, said):
    monkeypatch.setattr(Checkpoint, "tensor", None)  # no weight is read
    file = make_config(tmp_path, {"search": {"algorithm": "layers", **search}})
    with pytest.raises(BadInput) as caught:
        prepare(config_at(file), weights=False)
    assert said in str(caught.value)


@pytest.mark.whole
def test_experts_of_another_depth_are_refused(make_config, models, tmp_path):
    import transformers

    cut = transformers.AutoModelForCausalLM.from_pretrained(models / "a", num_hidden_layers=1)
    for part in (cut, transformers.AutoTokenizer.from_pretrained(models / "a")):
        part.save_pretrained(tmp_path / "cut")
    changes = {"search": {"algorithm": "layers"}, "experts.a": str(tmp_path / "cut")}
    ended = toys.evolver("validate", make_config(tmp_path, changes))
    assert "experts.a: " in toys.refusal(ended.code, ended.err)
    assert "only fine-tunes of the base merge" in ended.err
