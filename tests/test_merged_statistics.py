"""Statistics of merges: Grams on the inputs that layers have in the merged model, for RegMean++."""

from __future__ import annotations

import pytest
import torch
from test_classification import classify  # noqa: F401  # a fixture
from test_statistics import cache, configured, own_grams, ready_of, worker_of  # noqa: F401  # fixtures
from test_stats_command import collected
from transformers import AutoModelForSequenceClassification

from evolver.evaluation.collectors.inputs import LayerSums
from evolver.merging.maker import RecipeMaker
from evolver.records import Candidate
from evolver.records.recipe import Cross, Merge, Statistic
from evolver.workers.pools.local import LocalPool

SEARCH = {"algorithm": "tpe", "method": "regmean_plus_plus", "tune": ["a"], "startup": 2}
# The linear layers of the toy in the order in which a text passes them; those of one line get the same inputs.
PARTS = (
    *([f"attention.self.{part}" for part in ("query", "key", "value")], ["attention.output.dense"]),
    *(["intermediate.dense"], ["output.dense"]),
)
CHAIN = [
    *([f"bert.encoder.layer.{n}.{name}.weight" for name in names] for n in range(2) for names in PARTS),
    ["bert.pooler.dense.weight"],
    ["classifier.weight"],
]


def merge_of(ready, a=0.9):
    return ready.search.space.decode({"a": a})


def evaluated(worker, recipe, number=0):
    result = worker.evaluate(Candidate(number, recipe, "test"))
    assert result.status == "ok", result.reason
    return result


def test_the_grams_are_those_of_the_merge_on_the_items_of_each_expert(configured, tmp_path, monkeypatch):  # noqa: F811
    ready = ready_of(configured(search=SEARCH))
    worker, recipe = worker_of(ready), merge_of(ready, 0.5)
    evaluated(worker, recipe)
    experts = [Statistic("gram", s, items) for s, items in zip(ready.experts, _items(recipe), strict=True)]
    assert {s.of for s in recipe.statistics} == {Merge("regmean", ready.experts, ready.base, (), tuple(experts))}
    folder = ready.opened.experts["a"].path
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    model.load_state_dict(dict(worker.materialiser.stream(recipe.statistics[0].of)), strict=False)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda _: model.eval())
    for expert, node in zip("ab", recipe.statistics, strict=True):
        found = worker.materialiser._statistics[node.id]
        for name, gram in own_grams(ready, expert).items():
            assert torch.allclose(found.get(name).double(), gram, rtol=1e-4, atol=1e-4), name


def _items(recipe):
    return [s.items for s in recipe.statistics]


def test_each_pass_settles_one_more_layer_of_the_chain(configured):  # noqa: F811
    """The inputs of a layer depend on the layers before it only, so the Grams of pass k have their final values in the
    first k layers. In the end the merge is the one that its own Grams give: every layer on merged inputs.
    """
    final = None
    for passes in (len(CHAIN) + 1, len(CHAIN), 3, 1):
        ready = ready_of(configured(search=SEARCH, statistics={"items": 8, "passes": passes}))
        worker, recipe = worker_of(ready), merge_of(ready)
        evaluated(worker, recipe)
        grams = worker.materialiser._statistics[recipe.statistics[0].id]
        final = final or grams
        same = [all(_near(grams.get(n), final.get(n)) for n in names) for names in CHAIN]
        assert same == [True] * min(passes, len(CHAIN)) + [False] * (len(CHAIN) - passes)


def _near(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_it_is_another_merge_than_regmean(configured):  # noqa: F811
    plain = ready_of(configured(search=SEARCH | {"method": "regmean"}))
    ready = ready_of(configured(search=SEARCH))
    worker = worker_of(ready)
    one, other = (dict(worker.materialiser.stream(merge_of(r))) for r in (plain, ready))
    first, last = CHAIN[0][0], CHAIN[-2][0]
    assert not torch.allclose(one[last], other[last], atol=1e-4)
    assert not torch.allclose(one[first], other[first], atol=1e-6)  # the embeddings are merged already
    assert torch.equal(one["bert.embeddings.LayerNorm.weight"], other["bert.embeddings.LayerNorm.weight"])


def test_what_is_kept_is_neither_collected_nor_computed_again(configured, monkeypatch):  # noqa: F811
    """Neither the Grams, nor the merge that they are of, nor the experts' own."""
    ready = ready_of(configured(search=SEARCH))
    first = evaluated(worker_of(ready), merge_of(ready))
    worker = worker_of(ready)
    monkeypatch.setattr(LayerSums, "__enter__", lambda _: pytest.fail("collected again"))
    recipe = merge_of(ready)
    assert recipe.statistics[0].of not in worker.materialiser._opened(recipe)
    again = evaluated(worker, recipe)
    assert (again.items, again.counts["tokens"]) == (first.items, first.counts["tokens"])
    assert set(worker.materialiser._statistics) == {s.id for s in recipe.statistics}


@pytest.mark.parametrize("own", [False, True])
def test_of_a_population_the_merge_is_that_of_its_members_or_of_their_experts(own):
    maker = RecipeMaker(["a", "b"], ["w"], sampled=lambda _, expert: f"items of {expert}", own=own)
    a, b = maker.experts
    child = Cross(b, (a,), "evolver", 0.5, 0.5, 1)
    merged = maker.merger({"method": "regmean_plus_plus"})([a, child])
    members = (a, child if own else b)
    grams = tuple(Statistic("gram", m, f"items of {n}") for m, n in zip(members, "ab", strict=True))
    inner = Merge("regmean", members, maker.base, (), grams)
    assert merged.statistics == tuple(Statistic("gram", inner, f"items of {n}") for n in "ab")


def test_the_command_collects_what_others_are_made_from_first(configured, cache, capfd):  # noqa: F811
    file = configured(search=SEARCH, statistics={"items": 6, "passes": 2})
    labels = ["a", "b", "regmean", "regmean", "regmean", "regmean"]
    assert [(k.node.of.label, k.fresh) for k in collected(file)] == [(label, True) for label in labels]
    assert capfd.readouterr().err.count("collected on 6 dev items") == 6
    again = collected(file, pool=lambda *_: pytest.fail("a pool was made"))
    assert [(k.node.of.label, k.fresh) for k in again] == [(label, False) for label in labels]
    again[1].file.unlink()
    assert [k.node.of.label for k in collected(file) if k.fresh] == ["b"]


def test_nothing_waits_for_what_nobody_collects(configured):  # noqa: F811
    """A pool with room for all gets the Grams of merges only once those of the experts are there."""
    seen = []

    class Wide(LocalPool):
        def free(self):
            return 4 - len(self._waiting)

        def wait(self):
            seen.append([c.recipe.statistics[0].of.label for c in self._waiting])
            return super().wait()

    assert len(collected(configured(search=SEARCH, statistics={"items": 6}), pool=Wide)) == 4
    assert seen[0] == ["a", "b"]
    assert "regmean" not in [label for labels in seen[:2] for label in labels]
