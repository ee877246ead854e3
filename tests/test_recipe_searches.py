"""Searches inside a mergekit file: what is free in it, the recipes at its points, and the file with what was found."""

from __future__ import annotations

import random

import pytest
import toys
import yaml
from test_search import build
from toys import run_here

from evolver.config.reading import config_at
from evolver.config.recipes import parsed_recipe
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.merging.mergekit.reader import configuration_of
from evolver.merging.mergekit.space import recipe_space
from evolver.records import Choice, Result
from evolver.records.recipe import Expert
from evolver.search import SEARCHES
from evolver.search.coefficients.base import CoefficientSettings

LAYERS = 4
NAMES = [
    "model.embed_tokens.weight",
    *(f"model.layers.{i}.{part}.weight" for i in range(LAYERS) for part in ("self_attn.q_proj", "mlp.up_proj")),
    "model.norm.weight", "lm_head.weight",
]  # fmt: skip
NODES = {f"/m/{n}": Expert(n, f"{n}{n}") for n in ("base", "a", "b")}
TIES = """\
merge_method: ties
base_model: /m/base
slices:
  - sources:
      - {model: /m/base, layer_range: [0, 2]}
      - {model: /m/a, layer_range: [0, 2], parameters: {weight: ?, density: {search: [0.2, 0.9], start: 0.6}}}
      - model: /m/b
        layer_range: [0, 2]
        parameters:
          weight:
            - {filter: mlp, value: {search: [0, 1.5]}}
            - value: [0.1, ?, 1, {search: [0.1, 2], log: true}]
          density: 0.5
  - sources:
      - {model: /m/base, layer_range: [2, 4]}
      - {model: /m/a, layer_range: [2, 4], parameters: {weight: 0.3}}
      - {model: /m/b, layer_range: [2, 4], parameters: {weight: {search: default}}}
    parameters: {density: 0.3}
parameters:
  normalize: {choices: [true, false]}
  lambda: ?
  sign: ?
"""
KNOBS = {
    "normalize": (True, False),
    "lambda": (0.2, 3.0, True),
    "sign": ("mass", "count"),
    "slices[0].models.a.weight": (0.0, 1.0, False),
    "slices[0].models.a.density": (0.2, 0.9, False),
    "slices[0].models.b.weight[mlp]": (0.0, 1.5, False),
    "slices[0].models.b.weight[*][1]": (0.0, 1.0, False),
    "slices[0].models.b.weight[*][3]": (0.1, 2.0, True),
    "slices[1].models.b.weight": (0.0, 1.0, False),
}


def space(text, seed=0, names=NAMES):
    return recipe_space(parsed_recipe(text, "t.yaml"), names, NODES, "/m/base", "", seed)


def merge(method, own="weight: 1", shared="", method_line=None):
    """A file that merges two models; every part is text."""
    head = f"merge_method: {method_line or method}\nbase_model: /m/base\nmodels:\n"
    models = "".join(f"  - model: /m/{name}\n    parameters: {{{own}}}\n" for name in "ab")
    return head + models + (f"parameters: {{{shared}}}\n" if shared else "")


def points(found, count, seed=0):
    draw = random.Random(seed)
    for _ in range(count):
        yield {k.name: draw.choice(k.options) if isinstance(k, Choice) else k.at(draw.random()) for k in found.knobs}


def test_what_is_free_is_called_by_its_place():
    found = {k.name: k.options if isinstance(k, Choice) else (k.low, k.high, k.log) for k in space(TIES).knobs}
    assert found == KNOBS


def test_a_search_begins_where_the_file_says():
    start = space(TIES).start
    assert start["slices[0].models.a.density"] == 0.6
    assert start["slices[0].models.a.weight"] == 0.5  # of two models beside the base
    assert start["slices[0].models.b.weight[mlp]"] == 0.75
    assert start["slices[0].models.b.weight[*][3]"] == pytest.approx(0.2**0.5)
    assert start["normalize"] is True


def test_a_point_is_the_merge_of_the_file_with_its_numbers():
    """Against the reader of mergekit's files, on a text in which the numbers were written by hand."""
    values = {
        "normalize": False, "lambda": 0.8, "sign": "count", "slices[0].models.a.weight": 0.25,
        "slices[0].models.a.density": 0.4, "slices[0].models.b.weight[mlp]": 1.25,
        "slices[0].models.b.weight[*][1]": 0.5, "slices[0].models.b.weight[*][3]": 1.5,
        "slices[1].models.b.weight": 0.75,
    }  # fmt: skip
    by_hand = TIES
    for old, new in (
        ("weight: ?, density: {search: [0.2, 0.9], start: 0.6}", "weight: 0.25, density: 0.4"),
        ("{search: [0, 1.5]}", "1.25"), ("?, 1, {search: [0.1, 2], log: true}", "0.5, 1, 1.5"),
        ("{search: default}", "0.75"), ("{choices: [true, false]}", "false"), ("lambda: ?", "lambda: 0.8"),
        ("sign: ?", "sign: count"),
    ):  # fmt: skip
        assert old in by_hand
        by_hand = by_hand.replace(old, new)
    wanted = configuration_of(parsed_recipe(by_hand, "t.yaml")).recipe(NODES, NAMES)
    found = space(TIES)
    assert found.decode(values).id == wanted.id
    again = configuration_of(parsed_recipe(found.written(values), "t.yaml")).recipe(NODES, NAMES)
    assert again.id == wanted.id


@pytest.mark.parametrize(
    "text",
    [
        TIES,
        merge("dare_ties", "weight: ?, density: ?", "lambda: ?"),
        merge("karcher", "weight: 1", "max_iter: {search: [3, 30]}"),
        merge("ties", "weight: [{search: [-1, 1]}, ?, 0.5], density: ?"),
        merge("ties", "weight: ?, density: 0.5", method_line="{choices: [ties, dare_ties, task_arithmetic]}"),
        merge("breadcrumbs", "weight: ?, density: ?, gamma: ?", "rescale: ?"),
        merge("linear", "weight: ?", "normalize: false").replace("base_model: /m/base\n", ""),
        "merge_method: slerp\nbase_model: /m/a\nmodels: [{model: /m/a}, {model: /m/b}]\nparameters: {t: [?, 0.5, ?]}\n",
        "merge_method: linear\nname: one\n" + merge("linear", "weight: ?").partition("base_model: /m/base\n")[2]
        + "---\nmerge_method: slerp\nbase_model: one\nmodels: [{model: one}, {model: /m/b}]\nparameters: {t: ?}\n",
    ],
)  # fmt: skip
def test_the_numbers_of_a_model_are_found_again(text):
    """A point, its recipe, the point of the recipe, and the written file: all give one model."""
    found = space(text, seed=5)
    for values in points(found, 4):
        recipe = found.decode(values)
        back = found.encode(recipe)
        assert back is not None
        assert found.decode(back).id == recipe.id
        written = parsed_recipe(found.written(back), "t.yaml")
        assert configuration_of(written).recipe(NODES, NAMES, 5).id == recipe.id


def test_a_model_of_another_file_has_no_point():
    found = space(merge("ties", "weight: ?, density: 0.5"))
    other = space(merge("ties", "weight: ?, density: 0.6"))
    assert found.encode(other.decode(other.start)) is None
    assert found.encode(NODES["/m/a"]) is None
    assert found.encode(space(TIES).decode(space(TIES).start)) is None


def test_weights_that_cancel_are_moved_apart():
    """A grid has such points; mergekit would divide by 0."""
    found = space(merge("ties", "weight: {search: [-1, 1]}, density: 1"))
    names = [k.name for k in found.knobs]
    for pair in ((0.0, 0.0), (-1.0, 1.0), (1.0, -1.0)):
        assert found.decode(dict(zip(names, pair, strict=True))).operations == ("merge", "ties")


REFUSED = {
    "no range": (merge("karcher", "weight: 1", "tol: ?"), r"t.yaml:8: tol: tol has no range of its own; write one"),
    "words": (
        merge("ties", "weight: 1", "normalize: {search: [0, 1]}"),
        r"t.yaml:8: normalize: normalize is no number; write {choices: \[false, true\]}",
    ),
    "reversed": (
        merge("ties", "weight: {search: [1, 0]}"),
        r"t.yaml:5: models.a.weight: search: the range begins at 1 and ends at 0",
    ),
    "one end": (merge("ties", "weight: {search: [1]}"), r"t.yaml:5: models.a.weight: search: \[1\] is not usable"),
    "text": (merge("ties", "weight: {search: [low, 1]}"), r"search: 'low' is not usable; write a number"),
    "endless": (merge("ties", "weight: {search: [0, .inf]}"), r"search: inf is not usable"),
    "outside": (
        merge("ties", "weight: 1, density: {search: [0, 1]}"),
        r"models.a.density: search: 0 is not usable; write a number above 0 and up to 1",
    ),
    "log": (merge("ties", "weight: {search: [0, 1], log: true}"), r"log: a log scale begins above 0"),
    "log word": (merge("ties", "weight: {search: [1, 2], log: yes please}"), r"log: 'yes please' is not usable"),
    "key": (merge("ties", "weight: {serach: [0, 1]}"), r"models.a.weight: unknown key 'serach'; did you mean 'search'"),
    "both": (merge("ties", "weight: {search: [0, 1], choices: [1, 2]}"), r"write either"),
    "start": (merge("ties", "weight: {search: [0, 1], start: 2}"), r"start: 2 is outside the range"),
    "choice": (
        merge("ties", "weight: 1", "sign: {choices: [mass, weight]}"),
        r"t.yaml:8: sign: choices: 'weight' is none of mass, count",
    ),
    "one choice": (merge("ties", "weight: 1", "sign: {choices: [mass]}"), r"choices: \['mass'\] is not usable"),
    "unused": (
        merge("task_arithmetic", "weight: 1, density: ?"),
        r"t.yaml:5: models.a.density: density cannot be searched, because task_arithmetic does not use it",
    ),
    "silent": (
        merge("ties", "weight: 1", "int8_mask: {choices: [true, false]}"),
        r"int8_mask cannot be searched, because it changes how much memory",
    ),
    "unknown": (
        merge("ties", "weight: 1, desnity: ?"),
        r"models.a.desnity: ties has no parameter 'desnity'; did you mean 'density'",
    ),
    "nothing": (merge("ties"), r"t.yaml: the file leaves no value free"),
    "elsewhere": (
        merge("ties", "weight: ?").replace("/m/base", "?", 1),
        r"t.yaml:2: base_model: only parameters and merge_method can be searched",
    ),
    "layers": (
        TIES.replace("[0, 2]", "[0, ?]", 1),
        r"t.yaml:5: slices\[0\].sources\[0\].layer_range\[1\]: only parameters",
    ),
    "method": (
        merge("ties", "weight: ?", method_line="?"),
        r"t.yaml:1: merge_method: a method is no number; write {choices",
    ),
    "methods": (
        merge("ties", "weight: ?", method_line="{choices: [ties, tise]}"),
        r"merge_method: unknown merge method 'tise'",
    ),
    "model": (
        merge("ties", "weight: ?").replace("/m/b\n", "/m/other\n"),
        r"it merges /m/other, which is neither the base nor an expert",
    ),
    "distance": (merge("della", "weight: 1, density: ?, epsilon: ?"), r"epsilon: 0.3 is too large for density 0.05"),
    "twice": (
        merge("ties", "weight: [{filter: mlp, value: ?}, {filter: mlp, value: ?}, {value: 1}]"),
        r"weight\[mlp\]: this value is there twice",
    ),
    "no yaml": ("weight: [", r"t.yaml: the file is not valid YAML"),
}


@pytest.mark.parametrize(("text", "said"), REFUSED.values(), ids=REFUSED.keys())
def test_what_cannot_be_searched_is_refused_by_line(text, said):
    with pytest.raises(BadInput, match=said):
        space(text)


def test_a_question_mark_is_a_value_wherever_it_stands_alone():
    text = "a: ?\nb: {c: ?, d: [?, 1]}  # why?\ne:\n  - ?\n  - f: ?  # free\n? g\n: h?\n"
    (found,) = parsed_recipe(text, "t.yaml").documents
    assert found == {"a": "?", "b": {"c": "?", "d": ["?", 1]}, "e": ["?", {"f": "?"}], "g": "h?"}


# Searches

INLINE = {
    "merge_method": "ties", "base_model": "base",
    "models": [
        {"model": n, "parameters": {"weight": "?", "density": {"search": [0.2, 0.9]}}} for n in ("a", "b", "c", "d")
    ],
}  # fmt: skip
SAMPLERS = [n for n, a in SEARCHES.items() if issubclass(a.settings, CoefficientSettings)]


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_searches_in_a_file(name):
    own = {"startup": 3} if name == "tpe" else {"levels": 2} if name == "grid" else {}
    one, two = (build({"algorithm": name, "recipe": INLINE, **own}, candidates=9) for _ in range(2))
    told = []
    while asked := one.ask(1):
        told.append(asked[0])
        one.tell(result_of(asked[0]))
    assert len({c.recipe.id for c in told}) > 5
    assert all(one.space.encode(c.recipe) is not None for c in told)
    for candidate in told:
        assert two.ask(1)[0].recipe.id == candidate.recipe.id
        two.tell(result_of(candidate))


def result_of(candidate):
    score = int(candidate.recipe.id[:6], 16) / 16**6
    tasks = {"one": score, "other": 1 - score}
    return Result(candidate.number, candidate.recipe.id, "ok", score, score, True, (score,) * 10, tasks)


def test_cmaes_draws_around_the_start():
    def spread(start):
        models = [
            {"model": n, "parameters": {"weight": {"search": [0, 1], "start": start}}} for n in ("a", "b", "c", "d")
        ]
        recipe = {"merge_method": "task_arithmetic", "base_model": "base", "models": models}
        search = build({"algorithm": "cmaes", "recipe": recipe, "sigma": 0.02}, candidates=9)
        first = search.ask(1)
        search.tell(result_of(first[0]))
        return [v for c in search.ask(8) for v in search.space.encode(c.recipe).values()]

    low, high = spread(0.2), spread(0.8)
    assert max(low) < 0.4
    assert min(high) > 0.6


def test_cmaes_refuses_choices():
    recipe = {**INLINE, "parameters": {"normalize": "?"}}
    with pytest.raises(BadInput, match=r"search.recipe: cmaes can only tune numbers, and normalize is a choice"):
        build({"algorithm": "cmaes", "recipe": recipe})


def test_the_file_alone_says_what_is_searched():
    with pytest.raises(BadInput, match=r"search.tune: what is searched stands in the file"):
        build({"algorithm": "tpe", "recipe": INLINE, "tune": ["lambda"]})


def test_levels_of_a_grid_are_called_by_the_parameter():
    search = build({"algorithm": "grid", "recipe": INLINE, "levels": 1, "levels_of": {"density": 2}})
    assert search.points == 2**4
    with pytest.raises(BadInput, match=r"search.levels_of: nothing called 'lambda' is tuned"):
        build({"algorithm": "grid", "recipe": INLINE, "levels_of": {"lambda": 2}})


def test_a_program_of_layers_takes_layers_from_the_merge_in_a_file():
    search = build({"algorithm": "layers", "by": {"algorithm": "tpe", "recipe": INLINE}}, candidates=3)
    assert {"models.a.weight", "models.d.density"} <= {k.name for k in search.space.knobs}


# Configurations and runs


def in_file(models, weight="?"):
    return {
        "merge_method": "ties", "base_model": str(models / "base"), "parameters": {"density": 0.5},
        "slices": [
            {"sources": [
                {"model": str(models / n), "layer_range": span, "parameters": {"weight": weight}} for n in "ab"
            ]} for span in ([0, 1], [1, 2])
        ],
    }  # fmt: skip


def derived(make_config, tmp_path, recipe, changes=None):
    """A configuration that leaves base and experts to the file."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    search = {"algorithm": "cmaes", "recipe": str(tmp_path / "recipe.yaml")}
    return make_config(tmp_path, {"experts": toys.DROP, "model": toys.DROP, "search": search, **(changes or {})})


def test_experts_and_base_follow_from_the_file(make_config, tmp_path, models):
    recipe = {**in_file(models), "dtype": "bfloat16", "tokenizer_source": "base"}
    config = config_at(derived(make_config, tmp_path, recipe)).parsed()
    assert config.experts == {n: str(models / n) for n in "ab"}
    assert (config.model.base, config.model.dtype) == (str(models / "base"), "bfloat16")
    assert config.model.tokens.source == "base"


def test_a_merge_without_a_base_is_of_all_its_models(make_config, tmp_path, models):
    listed = [{"model": str(models / n), "parameters": {"weight": "?"}} for n in "ab"]
    file = derived(make_config, tmp_path, {"merge_method": "linear", "models": listed})
    prepared = prepare(config_at(file))
    assert prepared.config.experts == {n: str(models / n) for n in "ab"}
    assert prepared.config.model.base == str(models / "a")


def test_the_files_must_not_contradict_each_other(make_config, tmp_path, models):
    recipe = {**in_file(models), "dtype": "bfloat16"}
    file = derived(make_config, tmp_path, recipe, {"model": {"dtype": "float32"}})
    with pytest.raises(BadInput, match=r"run.yaml: model.dtype: 'float32' is not what .*recipe.yaml says, 'bfloat16'"):
        config_at(file).parsed()


def test_a_file_that_is_not_there(make_config, tmp_path):
    file = make_config(tmp_path, {"search": {"algorithm": "cmaes", "recipe": "nowhere.yaml"}})
    with pytest.raises(BadInput, match=r"run.yaml: search.recipe: nowhere.yaml cannot be read"):
        config_at(file).parsed()


def test_commands_on_a_file_with_free_values(tmp_path, models):
    (tmp_path / "free.yaml").write_text(yaml.safe_dump(in_file(models)))
    ended = toys.evolver("merge", tmp_path / "free.yaml", tmp_path / "out")
    said = toys.refusal(ended.code, ended.err)
    assert "the file leaves 4 values free; write numbers, or search for them" in said
    ended = toys.evolver("run", tmp_path / "free.yaml")
    said = toys.refusal(ended.code, ended.err)
    assert "this is a mergekit file, which says what is merged, but not on which tasks" in said
    shown = toys.evolver("explain", tmp_path / "free.yaml")
    assert shown.code == 0
    assert "searched: slices[1].models.b.weight: 0 to 1" in shown.out
    assert "weight=[0.5, 0.5]" in shown.out


@pytest.mark.whole
def test_the_winners_file_makes_the_winner(make_config, tmp_path, models):
    """Also after the file has changed: the run has kept what was in it."""
    changes = {"run": "found", "budget.candidates": 7, "baselines.masses": [1.0]}
    file = derived(make_config, tmp_path, in_file(models), changes)
    folder = run_here(file, tmp_path / "results")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(in_file(models, {"search": [0.4, 0.5]})))
    with pytest.raises(BadInput, match=r"another configuration \(search.recipe.slices"):
        run_here(file, tmp_path / "results")
    out = toys.evolver("export", folder, tmp_path / "best", "--candidate", "3")
    assert out.code == 0, out.err
    out = toys.evolver("merge", tmp_path / "best" / "recipe.yaml", tmp_path / "again")
    assert out.code == 0, out.err
    one, two = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("best", "again"))
    assert one == two
    assert "`evolver merge recipe.yaml OUT` makes these weights" in (tmp_path / "best" / "README.md").read_text()
