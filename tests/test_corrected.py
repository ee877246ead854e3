"""Corrections: methods that every merge of a search goes through."""

from __future__ import annotations

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_classification import classify  # noqa: F401  # a fixture
from test_search import EVOLVER, answer, build, simulate
from test_statistics import cache, configured, ready_of, worker_of  # noqa: F401  # fixtures

from evolver.commands.collecting import _asked
from evolver.commands.explain import explain
from evolver.commands.merge import merge_file
from evolver.config.corrections import AfterSettings
from evolver.config.reading import config_at
from evolver.errors import BadInput
from evolver.merging.maker import RecipeMaker
from evolver.merging.methods import METHODS, Of
from evolver.merging.settings.spelling import refuse_unknown
from evolver.records import Candidate
from evolver.records.recipe import Cross, Merge, Rule, dump_recipe, load_recipe

NAMES = ["model.embed", *(f"model.layers.{i}.w" for i in range(3))]
INLINE = {
    "merge_method": "ties", "base_model": "base", "parameters": {"density": "?"},
    "models": [{"model": name, "parameters": {"weight": "?"}} for name in "ab"],
}  # fmt: skip


def space_of(*after, method="ties", groups=1, tune=None, settings=None):
    maker = RecipeMaker(["a", "b"], NAMES)
    return maker.space(method, groups, tune, settings or {}, after=[AfterSettings(**step) for step in after])


AIM, LINES = {"method": "aim", "settings": {"power": 2.0}}, {"method": "lines", "tune": ["alpha"]}


def test_a_correction_gets_the_merge_alone_and_is_searched_beside_it():
    space, plain = space_of(AIM, LINES, groups=3), space_of(groups=3)
    assert [k.name for k in space.knobs] == [*(k.name for k in plain.knobs), "after.aim.omega", "after.lines.alpha"]
    point = {**plain.encode_equal(0.7), "after.aim.omega": 0.3, "after.lines.alpha": 0.4}
    lines = space.decode(point)
    assert (lines.method, lines.inputs[0].method) == ("lines", "aim")
    assert lines.inputs[0].inputs == (plain.decode(plain.encode_equal(0.7)),)
    said = lines.inputs[0].settings("model.embed", None)
    assert said == {"omega": 0.3, "power": 2.0, "weight": (1.0,), "lambda": 1.0}
    assert lines.settings("model.embed", None)["alpha"] == 0.4


def test_the_identity_of_a_recipe_contains_its_corrections():
    point = space_of().encode_equal(1.0)
    made = [
        space_of().decode(point),
        *(space_of(AIM).decode({**point, "after.aim.omega": omega}) for omega in (0.2, 0.3)),
        space_of({**AIM, "settings": {"power": 1.0}}).decode({**point, "after.aim.omega": 0.2}),
        space_of(AIM, LINES).decode({**point, "after.aim.omega": 0.2, "after.lines.alpha": 0.4}),
        space_of(LINES, AIM).decode({**point, "after.aim.omega": 0.2, "after.lines.alpha": 0.4}),
    ]
    assert len({recipe.id for recipe in made}) == len(made)
    for recipe in made:
        refuse_unknown(recipe, "here")
        assert load_recipe(dump_recipe(recipe)).id == recipe.id


@pytest.mark.parametrize("method", ["ties", ["ties", "task_arithmetic"]])
def test_the_point_of_a_model_is_found_again(method):
    space = space_of(AIM, LINES, method=method)
    point = {**space.encode_equal(0.7), "after.aim.omega": 0.9}
    found = space.encode(space.decode(point))
    assert space.decode(found).id == space.decode(point).id
    assert set(found) <= {k.name for k in space.knobs}
    assert space.encode(space_of(method=method).decode(space_of(method=method).encode_equal(0.7))) is None
    assert space_of(AIM, method=method).encode(space.decode(point)) is None


def test_of_several_methods_each_has_the_same_correction():
    space = space_of(AIM, method=["ties", "task_arithmetic"])
    assert [k.name for k in space.knobs if k.name.startswith("after.")] == ["after.aim.omega"]
    for name, branch in space.branches.items():
        point = space.within(name, {**branch.encode_equal(1.0), "after.aim.omega": 0.8})
        recipe = space.decode(space.encode_equal(1.0) | point)
        assert (recipe.inputs[0].method, recipe.settings("model.embed", None)["omega"]) == (name, 0.8)


def test_a_mergekit_file_can_be_corrected():
    maker = RecipeMaker(["a", "b"], NAMES)
    space, plain = maker.space_in(INLINE, [AfterSettings(**AIM)]), maker.space_in(INLINE)
    recipe = space.decode({**space.encode_equal(1.0), "after.aim.omega": 0.1})
    assert recipe.inputs == (plain.decode(plain.encode_equal(1.0)),)
    assert space.encode(recipe)["after.aim.omega"] == 0.1


def test_a_grid_has_an_axis_for_each_setting_of_a_correction():
    asked = []
    axes = space_of(AIM, tune=["density"]).axes(lambda name: asked.append(name) or 2)
    assert asked == ["density", "after.aim.omega"]
    assert axes[1] == ({"after.aim.omega": 0.0}, {"after.aim.omega": 1.0})


def test_a_search_begins_with_the_defaults_of_corrections():
    start = space_of(AIM).encode_equal(1.0)
    assert start["after.aim.omega"] == METHODS["aim"].settings["omega"].default
    guessed = space_of(AIM).encode_weights(NAMES, lambda shares: ((0.8, 0.2), 1.0))
    recipe = space_of(AIM).decode(guessed)
    assert recipe.inputs[0].settings("model.embed", None)["weight"] == pytest.approx((0.8, 0.2), abs=0.01)


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ([{"method": "aimm"}], r"search\.after\[0\]\.method: .*'aimm'.*aim"),
        ([AIM, AIM], r"search\.after\[1\]\.method: aim corrects twice; list each method once"),
        ([{"method": "fisher"}], r"search\.after\[0\]\.method: fisher needs statistics of the model that it gets"),
        ([{"method": "slerp"}], r"search\.after\[0\].*slerp takes 2 models, not 1"),
        ([{"method": "aim", "tune": ["omegga"]}], r"search\.after\[0\]\.tune: .*'omegga'.*omega"),
        ([{"method": "aim", "settings": {"omega": 2}}], r"search\.after\[0\]\.settings.omega"),
    ],
)
def test_what_cannot_correct_is_refused(after, said):
    with pytest.raises(BadInput, match=said):
        space_of(*after)


FIXED = [
    {"method": "aim", "settings": {"omega": 0.3, "power": 2.0}}, {"method": "lines", "settings": {"alpha": 0.6}}
]  # fmt: skip


@pytest.mark.parametrize("adapt", [False, ["density"]])
def test_a_merger_corrects_every_merge_and_finds_its_members_again(adapt):
    maker = RecipeMaker(["a", "b"], NAMES)
    given = {"method": "ties", "density": 0.5}
    plain, merger = maker.merger(given, adapt=adapt), maker.merger({**given, "after": FIXED}, adapt=adapt)
    members = (Cross(maker.experts[0], maker.experts[1:], "best/1", 0.5, 0.5, 7), maker.experts[1])
    values = {"density": 0.25} if adapt else None
    lines, inner = merger(members, values), plain(members, values)
    assert (lines.method, lines.inputs[0].method, lines.inputs[0].inputs) == ("lines", "aim", (inner,))
    assert lines.inputs[0].settings(NAMES[0], None) == {"omega": 0.3, "power": 2.0, "weight": (1.0,), "lambda": 1.0}
    assert lines.settings(NAMES[0], None)["alpha"] == 0.6
    assert (merger.knobs, merger.start) == (plain.knobs, plain.start)
    assert merger.parts_of(lines) == (members, values or {})
    assert plain.parts_of(inner) == (members, values or {})
    assert [merger.parts_of(other) for other in (inner, lines.inputs[0], *members)] == [None] * 4
    assert plain.parts_of(lines) is None
    weaker = [{**FIXED[0], "settings": {"omega": 0.9}}, FIXED[1]]
    assert maker.merger({**given, "after": weaker}, adapt=adapt).parts_of(lines) is None


def test_a_population_is_merged_and_corrected_and_goes_on_from_another_run():
    settings = EVOLVER | {"mode": "generational", "merger": {"method": "ties", "density": 0.5, "after": FIXED}}
    asked = simulate(build(settings, candidates=17), 4, 1)
    assert {(c.recipe.method, c.recipe.inputs[0].inputs[0].method) for c in asked} == {("lines", "ties")}
    best = next(c for c in asked[5:] if answer(c).score is not None)
    more = build(settings, seed=1)
    more.inform([(best, answer(best))])
    assert more.propose(0).recipe.id == best.recipe.id
    assert tuple(more.population) == best.recipe.inputs[0].inputs[0].inputs
    assert build(settings, seed=2).receive(best, answer(best))


@pytest.mark.parametrize(
    ("after", "said"),
    [
        ({"method": "aim"}, r"search\.merger\.after: .* is no list of corrections; write one such as \[\{method: aim"),
        (
            [{"method": "aim", "tune": ["omega"]}],
            r"search\.merger\.after\[0\]\.tune: .*nothing is tuned; leave tune out",
        ),
        ([{"method": "aim", "omega": 1}], r"search\.merger\.after\[0\]: .*omega"),
        ([{"method": "lines"}, {"method": "aimm"}], r"search\.merger\.after\[1\]\.method: .*'aimm'.*aim"),
        ([*FIXED, FIXED[0]], r"search\.merger\.after\[2\]\.method: aim corrects twice"),
        ([{"method": "fisher"}], r"search\.merger\.after\[0\]\.method: fisher needs statistics of the model"),
        ([{"method": "aim", "settings": {"omega": 2}}], r"search\.merger\.after\[0\]\.settings.omega"),
    ],
)
def test_what_cannot_correct_a_merger_is_refused(after, said):
    with pytest.raises(BadInput, match=said):
        RecipeMaker(["a", "b"], NAMES).merger({"method": "ties", "after": after})


@pytest.mark.whole
def test_a_run_evolves_a_population_whose_merge_is_corrected(configured, tmp_path):  # noqa: F811
    search = {"algorithm": "evolver", "generations": 1, "merger": {"method": "ties", "after": [FIXED[0]]}}
    file = configured(search=search)
    assert _asked(config_at(file), ()) == [Of("activation", base=True)]
    _, method, settings = next(row for row in explain(file) if row[0].endswith("query.weight"))
    assert (method, settings["aim.omega"]) == ("ties, aim", 0.3)
    ready = ready_of(file)
    made = ready.search.ask(1)[0]
    assert (made.recipe.method, made.recipe.inputs[0].method) == ("aim", "ties")
    worker = worker_of(ready)
    assert worker.evaluate(made).status == "ok"
    before, after = (dict(worker.materialiser.stream(r)) for r in (made.recipe.inputs[0], made.recipe))
    assert any(not torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_worker_scales_columns_of_any_merge(configured):  # noqa: F811
    """Of the merged model, whose task vector is scaled by 1 - a (1 - omega); evolver stats knows what is asked for."""
    search = {"algorithm": "tpe", "method": "ties", "after": [{"method": "aim"}]}
    file = configured(search=search)
    assert _asked(config_at(file), ()) == [Of("activation", base=True)]
    ready = ready_of(file)
    worker, space = worker_of(ready), ready.search.space
    recipe = space.decode({**space.encode_equal(0.8), "after.aim.omega": 0.25})
    assert [(s.collected, s.of.name) for s in recipe.statistics] == [("activation", "base")] * 2
    assert len({s.items for s in recipe.statistics}) == 2
    result = worker.evaluate(Candidate(0, recipe, "test"))
    assert result.status == "ok", result.reason
    before, after = (dict(worker.materialiser.stream(r)) for r in (recipe.inputs[0], recipe))
    used = [worker.materialiser._statistics[s.id] for s in recipe.statistics]
    scaled = 0
    for name, tensor in after.items():
        base = ready.opened.base.tensor(name)
        moved = before[name].double() - base
        if used[0].get(name) is not None:
            a = sum(u.get(name).double() for u in used)
            moved = moved * (1 - a / a.max() * 0.75)
            scaled += not torch.equal(tensor, before[name])
        assert torch.allclose(tensor.double(), base + moved, rtol=1e-6, atol=1e-7), name
    assert scaled > 10
    name, method, settings = next(row for row in explain(file) if row[0].endswith("query.weight"))
    assert (method, settings["weight"], settings["aim.omega"]) == ("ties, aim", "tuned", "tuned")


def test_a_recipe_with_statistics_of_the_base_may_name_any_number_of_experts():
    recipe = space_of(AIM).decode(space_of(AIM).encode_equal(1.0))
    refuse_unknown(recipe, "here")
    with pytest.raises(BadInput, match=r"aim of 1 models needs 1 statistics, and the recipe names 0"):
        refuse_unknown(Merge("aim", recipe.inputs, recipe.base, recipe.rules), "here")


def merged_by_file(ready, folder, *documents, statistics=None):
    """The tensors that ``evolver merge`` makes of a mergekit file; models are called by their names in a run."""
    places = {"base": str(ready.opened.base.path), **{n: str(e.path) for n, e in ready.opened.experts.items()}}
    text = "---\n".join(yaml.safe_dump(d) for d in documents)
    for name, place in places.items():
        text = text.replace(f"${name}", place)
    (folder / "merge.yml").write_text(text)
    out = folder / f"out{len(list(folder.glob('out*')))}"
    merge_file(folder / "merge.yml", out, statistics=statistics)
    return load_file(out / "model.safetensors"), (out / "mergekit_config.yml").read_text()


TIES = {
    "name": "merged", "merge_method": "ties", "base_model": "$base", "parameters": {"density": 0.5},
    "models": [{"model": "$a", "parameters": {"weight": 0.7}}, {"model": "$b", "parameters": {"weight": 0.3}}],
}  # fmt: skip
THEN_AIM = {"merge_method": "aim", "base_model": "$base", "models": [{"model": "merged"}], "parameters": {"omega": 0.2}}


def test_evolver_merge_corrects_a_merge_with_statistics_of_a_run(configured, tmp_path, capfd):  # noqa: F811
    file = configured(search={"algorithm": "tpe", "method": "ties", "after": [{"method": "aim"}]})
    ready = ready_of(file)
    found, written = merged_by_file(ready, tmp_path, TIES, THEN_AIM, statistics=file)
    assert written.startswith(f"# evolver merge --statistics {file}\n")
    ties = Merge("ties", ready.experts, ready.base, (Rule.of({"weight": (0.7, 0.3), "density": (0.5, 0.5)}),))
    asked = tuple(ready.maker.wanted_of_experts(Of("activation", base=True)))
    aim = Merge("aim", (ties,), ready.base, (Rule.of({"omega": 0.2}),), asked)
    capfd.readouterr()
    wanted = dict(worker_of(ready).materialiser.stream(aim))  # a run's worker finds in the cache what was collected
    assert "collected" not in capfd.readouterr().err
    plain, _ = merged_by_file(ready, tmp_path, TIES)
    assert all(torch.allclose(found[name], tensor, atol=1e-6) for name, tensor in wanted.items())
    assert any(not torch.equal(found[name], tensor) for name, tensor in plain.items())
    experts = {"merge_method": "fisher", "base_model": "$base", "models": [{"model": "$b"}, {"model": "$a"}]}
    fisher, _ = merged_by_file(ready, tmp_path, experts, statistics=file)
    a, b = ready.experts
    wanted = dict(worker_of(ready).materialiser.stream(
        Merge("fisher", (b, a), ready.base, (), ready.maker.statistics_of(METHODS["fisher"], (b, a)))
    ))  # fmt: skip
    assert all(torch.allclose(fisher[name], tensor, atol=1e-6) for name, tensor in wanted.items())


def test_evolver_merge_refuses_statistics_of_other_models(configured, tmp_path):  # noqa: F811
    file = configured()
    ready = ready_of(file)
    with pytest.raises(BadInput, match=r"aim needs statistics of the models on items.*--statistics RUN.yaml"):
        merged_by_file(ready, tmp_path, TIES, THEN_AIM)
    with pytest.raises(BadInput, match=r"--statistics: .*its base is not that of the merge by aim; give one with"):
        merged_by_file(ready, tmp_path, {**THEN_AIM, "base_model": "$a", "models": [{"model": "$b"}]}, statistics=file)
    with pytest.raises(BadInput, match=r"fisher needs statistics of .*, which is none of its experts"):
        merged_by_file(ready, tmp_path, TIES, {**THEN_AIM, "merge_method": "fisher", "parameters": {}}, statistics=file)
    part = {"sources": [{"model": "$a", "layer_range": [0, 1]}]}
    sliced = {"merge_method": "aim", "base_model": "$base", "slices": [part, part]}
    with pytest.raises(BadInput, match=r"aim has statistics of whole models only; write models, not slices"):
        merged_by_file(ready, tmp_path, sliced, statistics=file)
    assert not list(tmp_path.glob("out*"))
