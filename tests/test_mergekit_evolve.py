"""Files of mergekit-evolve: the configuration that they stand for, against merges written as its genotypes are."""

from __future__ import annotations

import json

import pytest
import toys
import yaml

from evolver.config.reading import ConfigText, config_at
from evolver.config.recipes import RecipeText, recipe_text
from evolver.errors import BadInput
from evolver.merging.mergekit.reader import configuration_of
from evolver.merging.mergekit.space import recipe_space
from evolver.records.recipe import Expert

LAYERS = 4
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("self_attn.q_proj", "mlp.up_proj")),
    "model.norm.weight",
]
KEYS = {"ties": ["weight", "density"], "dare_ties": ["weight", "density"]}


@pytest.fixture
def folders(tmp_path):
    """Folders of models that have nothing but a number of layers."""
    for name in ("base", "a", "b", "c"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"num_hidden_layers": LAYERS}))
    return tmp_path


def file(folders, method="ties", models="abc", **more):
    genome = {"models": [str(folders / m) for m in models], "merge_method": method, **more}
    if method not in ("linear", "slerp"):
        genome["base_model"] = str(folders / "base")
    return {"genome": genome, "tasks": [{"name": "toy", "weight": 2.0, "metric": "acc,none"}, "other"]}


def config(raw, name="evolve.yml"):
    return ConfigText(yaml.safe_dump(raw, sort_keys=False), name)


def space(folders, raw):
    found = config(raw).parsed()
    nodes = {str(folders / n): Expert(n, n) for n in ("base", "a", "b", "c")}
    return recipe_space(recipe_text(found.search["recipe"], "x"), NAMES, nodes, found.model.base, "x"), nodes


def genotype_merge(raw, numbers):
    """The merge that mergekit-evolve makes of numbers [group][model][filter][parameter], by its own rules."""
    genome = raw["genome"]
    keys, parts = KEYS.get(genome["merge_method"], ["weight"]), [*(genome.get("filters") or []), None]
    size = genome.get("layer_granularity") or LAYERS

    def given(m, values):  # of a parameter, by group and filter
        return {
            key: [{"filter": f, "value": values(m, s, k)} for s, f in enumerate(parts)] if len(parts) > 1
            else values(m, 0, k) for k, key in enumerate(keys)
        }  # fmt: skip

    def source(m, values, **more):
        return {"model": genome["models"][m], "parameters": given(m, values), **more}

    each = range(len(genome["models"]))
    if genome.get("smooth"):
        body = {"models": [source(m, lambda m, s, k: [g[m][s][k] for g in numbers]) for m in each]}
    else:
        body = {"slices": [
            {"sources": [
                source(m, lambda m, s, k, g=g: g[m][s][k], layer_range=[i * size, i * size + size]) for m in each
            ]} for i, g in enumerate(numbers)
        ]}  # fmt: skip
    usual = genome["merge_method"] in ("ties", "dare_ties", "linear")
    return {
        "merge_method": genome["merge_method"], "dtype": "bfloat16", **body,
        "parameters": {"normalize": genome.get("normalize", usual), "int8_mask": True},
        **({"base_model": genome["base_model"]} if "base_model" in genome else {}),
    }  # fmt: skip


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties", "dare_ties"])
@pytest.mark.parametrize(
    "more",
    [
        {}, {"layer_granularity": 2}, {"layer_granularity": 1, "filters": ["mlp", "self_attn"]},
        {"layer_granularity": 2, "smooth": True, "filters": ["mlp"]}, {"normalize": True, "filters": ["mlp"]},
    ],
    ids=["global", "groups", "filters", "smooth", "normalize"],
)  # fmt: skip
def test_a_genotype_is_the_same_model(folders, method, more):
    raw = file(folders, method, **more)
    found, nodes = space(folders, raw)
    groups = LAYERS // more["layer_granularity"] if "layer_granularity" in more else 1
    shape = (groups, 3, len(more.get("filters", [])) + 1, len(KEYS.get(method, ["weight"])))
    assert len(found.knobs) == shape[0] * shape[1] * shape[2] * shape[3]
    count = iter(range(1, 1000))
    numbers = [
        [[[round(next(count) / 1000 + 0.1, 6) for _ in range(shape[3])] for _ in range(shape[2])] for _ in range(3)]
        for _ in range(groups)
    ]
    merge = genotype_merge(raw, numbers)
    wanted = configuration_of(RecipeText((merge,), "x")).recipe(nodes, NAMES)
    point = {}
    for free in found.free:
        point[free.knob.name] = place(numbers, free)
    assert found.decode(point).id == wanted.id


def place(numbers, free):
    """The number that a genotype has for a free value, by the path of the value."""
    path = list(free.path[1:])
    group, model = (path[1], path[3]) if path[0] == "slices" else (0, path[1])
    rest = path[path.index("parameters") + 1 :]
    key, rest = ["weight", "density"].index(rest[0]), rest[1:]
    part = 0
    if "value" in rest:
        part, rest = rest[0], rest[2:]
    if rest:
        group = rest[0]
    return numbers[group][model][part][key]


def test_the_start_is_that_of_mergekit_evolve(folders):
    start = space(folders, file(folders))[0].start
    assert {round(v, 6) for n, v in start.items() if n.endswith("weight")} == {0.333333}
    assert {v for n, v in start.items() if n.endswith("density")} == {1.0}
    drawn = space(folders, file(folders) | {"random_init": True})[0].start
    assert len(set(drawn.values())) == 6
    assert drawn == space(folders, file(folders) | {"random_init": True})[0].start
    assert drawn != space(folders, file(folders) | {"random_init": True, "seed": 9})[0].start


def test_slerp_moves_between_its_two_models(folders):
    found, nodes = space(folders, file(folders, "slerp", "ab", layer_granularity=2))
    assert [k.name for k in found.knobs] == ["slices[0].t", "slices[1].t"]
    merge = {"merge_method": "slerp", "base_model": str(folders / "a"), "dtype": "bfloat16", "slices": [
        {"sources": [{"model": str(folders / m), "layer_range": span} for m in "ab"], "parameters": {"t": t}}
        for span, t in (([0, 2], 0.25), ([2, 4], 0.75))
    ]}  # fmt: skip
    wanted = configuration_of(RecipeText((merge,), "x")).recipe(nodes, NAMES)
    assert found.decode({"slices[0].t": 0.25, "slices[1].t": 0.75}).id == wanted.id


def test_what_the_configuration_says(folders):
    raw = file(folders) | {"limit": 30, "num_fewshot": 2, "apply_chat_template": False, "fewshot_as_multiturn": False}
    given = config(raw, "my genome.yml")
    found = given.parsed()
    assert found.run == "my-genome"
    assert (found.search["algorithm"], found.budget.candidates) == ("cmaes", 100)
    assert found.model.dtype == "bfloat16"
    assert found.model.base == str(folders / "base")
    assert list(found.experts) == ["a", "b", "c"]
    first, second = found.evaluation.tasks
    assert (first.task, first.weight, first.metric, first.dev, first.report) == ("toy", 2.0, "acc,none", 30, 0.25)
    assert (second.task, second.weight, second.metric) == ("other", 1.0, "acc,none")
    assert found.evaluation.num_fewshot == 2
    assert not found.evaluation.apply_chat_template
    assert not found.evaluation.fewshot_as_multiturn
    assert any(note.startswith("my genome.yml:13: limit: mergekit-evolve takes the first ones") for note in given.notes)
    assert config(file(folders)).parsed().evaluation.apply_chat_template
    assert [t.dev for t in config(file(folders)).parsed().evaluation.tasks] == [0.5, 0.5]


def test_keys_of_evolver_may_stand_beside(folders):
    raw = file(folders) | {"budget": {"items": 5000}, "evaluation": {"include_path": "tasks"}, "run": "mine"}
    found = config(raw).parsed()
    assert (found.run, found.budget.limits, found.evaluation.include_path) == ("mine", {"items": 5000}, "tasks")


def test_negative_weights_have_twice_the_range_and_the_same_step(folders):
    found = config(file(folders, allow_negative_weights=True)).parsed()
    (free, *_) = space(folders, file(folders, allow_negative_weights=True))[0].free
    assert (free.knob.low, free.knob.high) == (-1.0, 1.0)
    assert found.search["sigma"] * 2 == pytest.approx(1 / 6)


REFUSED = {
    "granularity": ({"layer_granularity": 3}, {}, r"evolve.yml:\d+: genome.layer_granularity: 4 layers do not divide"),
    "key": ({"layer_granularty": 2}, {}, r"yml:\d+: genome.layer_granularty: unknown key; did you mean 'layer_gran"),
    "method": ({"merge_method": "della"}, {}, r"genome.merge_method: 'della' is not usable"),
    "one": ({"models": ["a"]}, {}, r"genome.models: a merge needs several models"),
    "twice": ({"models": ["a", "a"]}, {}, r"genome.models: a model is listed twice"),
    "base": ({"base_model": None}, {}, r"genome.merge_method: ties merges differences to a base; add base_model"),
    "slerp": ({"merge_method": "slerp"}, {}, r"evolve.yml:\d+: genome.models: slerp merges two models"),
    "smooth": ({"merge_method": "slerp", "smooth": True}, {}, r"genome.smooth: slerp has no such parameters"),
    "hub": (
        {"models": ["org/one", "org/two"], "layer_granularity": 2},
        {},
        r"the number of layers of org/one is not known",
    ),
    "top": ({}, {"limits": 3}, r"evolve.yml:\d+: limits: unknown key; did you mean 'limit'"),
    "tasks": ({}, {"tasks": []}, r"tasks: \[\] is not usable"),
    "limit": ({}, {"limit": 0}, r"limit: 0 is not usable"),
}


@pytest.mark.parametrize(("genome", "top", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_done_is_said_by_line(folders, genome, top, said):
    raw = file(folders)
    raw["genome"] |= genome
    with pytest.raises(BadInput, match=said):
        config(raw | top).parsed()


# Commands


def toy_file(tmp_path, models, tasks):
    genome = {
        "models": [str(models / n) for n in "abc"], "base_model": str(models / "base"), "merge_method": "ties",
        "layer_granularity": 1,
    }  # fmt: skip
    raw = {"genome": genome, "tasks": ["toy"], "limit": 20, "apply_chat_template": False}
    (tmp_path / "evolve.yml").write_text(yaml.safe_dump(raw))
    return tmp_path / "evolve.yml"


def test_options_of_mergekit_evolve(tmp_path, models, tasks):
    options = (
        "--max-fevals 7 --timeout 90 --sigma0 0.2 --force-population-size 5 --random-seed 3 --batch-size 8 --wandb "
        "--strategy buffered --no-merge-cuda --in-memory --no-reshard --num-gpus 2 --wandb-entity us --load-in-8bit"
    )
    out = tmp_path / "config.yaml"
    ended = toys.evolver(
        "mergekit-evolve",
        toy_file(tmp_path, models, tasks),
        *options.split(),
        "--task-search-path",
        tasks,
        "--convert",
        out,
    )
    assert ended.code == 0, ended.err
    found = config_at(out).parsed()
    assert (found.seed, found.budget.limits) == (3, {"candidates": 7, "minutes": 1.5})
    assert found.search["sigma"] == pytest.approx(0.2)
    assert (found.search["population"], found.pool.num_workers) == (5, 2)
    assert (found.evaluation.batch_size, found.evaluation.quantise) == (8, "int8")
    assert found.evaluation.include_path == str(tasks)
    assert found.loggers == {"wandb": {"project": "mergekit-evolve", "entity": "us"}}
    assert "warning: " in ended.err
    said = toys.evolver("mergekit-evolve", tmp_path / "evolve.yml", "--trust-remote-code")
    assert "--trust-remote-code: Evolver runs no code that comes with a model" in toys.refusal(said.code, said.err)


@pytest.mark.whole
def test_a_file_of_mergekit_evolve_runs(tmp_path, models, tasks):
    file = toy_file(tmp_path, models, tasks)
    file.write_text(file.read_text() + f"evaluation: {{include_path: {tasks}}}\nbudget: {{candidates: 6}}\n")
    ended = toys.evolver("run", file, "--results", tmp_path / "results")
    assert ended.code == 0, ended.err
    assert "evolve.yml:" in ended.out + ended.err
    folder = tmp_path / "results" / "evolve"
    file.unlink()
    assert len([1 for stage, _ in toys.rows(folder) if stage == "search"]) == 6
    ended = toys.evolver("resume", folder, "--candidates", "8")
    assert ended.code == 0, ended.err
    assert len([1 for stage, _ in toys.rows(folder) if stage == "search"]) == 8
