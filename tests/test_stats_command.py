"""``evolver stats``, statistics of offspring and of random tokens."""

from __future__ import annotations

import json
import re

import pytest
import torch
import toys
from test_classification import classify  # noqa: F401  # a fixture
from test_gradients import Items
from test_statistics import cache, configured, own_grams, ready_of, worker_of  # noqa: F401  # fixtures

from evolver.commands.collecting import collect_statistics
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.evaluation.collectors import COLLECTORS
from evolver.evaluation.collectors.gradients import fisher_information
from evolver.evaluation.collectors.inputs import LayerSums
from evolver.evaluation.random_tokens import RANDOM_LENGTH, RandomTokens
from evolver.merging.methods import Of
from evolver.records import Candidate
from evolver.records.recipe import Cross, Merge
from evolver.workers import sampled
from evolver.workers.compute import ComputeChoice
from evolver.workers.pools.local import LocalPool
from evolver.workers.sampled import Advance
from evolver.workers.worker import Worker

MERGER = {"algorithm": "evolver", "generations": 1, "merger": {"method": "regmean", "a": 0.5}}


def choice(_):
    return ComputeChoice("float32", "")


def collected(file, *kinds, pool=LocalPool):
    return list(collect_statistics(config_at(file), kinds, "cpu", pool, choice))


def test_what_the_search_needs_is_collected_once_and_listed(configured, capfd):  # noqa: F811
    file = configured(search=MERGER)
    first = collected(file)
    assert [(k.node.collected, k.node.of.name, k.fresh) for k in first] == [("gram", "a", True), ("gram", "b", True)]
    assert capfd.readouterr().err.count("collected on 20 dev items") == 2
    again = collected(file, pool=lambda *_: pytest.fail("a pool was made"))
    assert [k.file for k in again] == [k.file for k in first]
    assert not any(k.fresh for k in again)
    assert again[0].line.startswith(f"gram of a on dev items ({again[0].node.items[:8]}): kept, ")
    worker = worker_of(ready_of(file))  # a run asks for the same
    assert [worker._statistics.kept(k.node) for k in first] == [k.file for k in first]


def test_after_a_kill_only_the_missing_ones_are_collected(configured, monkeypatch):  # noqa: F811
    file, worked = configured(search=MERGER), Worker.evaluate

    class Killed(BaseException):
        pass

    def killed(self, candidate):
        if candidate.number == 1:
            raise Killed
        return worked(self, candidate)

    monkeypatch.setattr(Worker, "evaluate", killed)
    with pytest.raises(Killed):
        collected(file)
    monkeypatch.setattr(Worker, "evaluate", worked)
    assert [(k.node.of.name, k.fresh) for k in collected(file)] == [("a", False), ("b", True)]


def test_a_garbled_file_is_collected_anew_and_said_so(configured, capfd):  # noqa: F811
    file = configured(search=MERGER)
    first = collected(file)
    whole = first[1].file.read_bytes()
    first[1].file.write_bytes(whole[:-9] + b"x" + whole[-8:])
    capfd.readouterr()
    assert [(k.node.of.name, k.fresh) for k in collected(file)] == [("a", False), ("b", True)]
    said = capfd.readouterr().err
    assert f"{first[1].file} is damaged" in said
    assert "; gram of b is collected again" in said
    assert first[1].file.read_bytes() == whole


def test_what_cannot_be_collected_is_one_sentence_and_exit_2(configured, monkeypatch):  # noqa: F811
    """As for a method without statistics, for tasks without items of an expert, and for weights without gradients."""
    plain = configured(search={"algorithm": "tpe"})
    said = toys.refusal(*_stats(plain))
    assert "no merge method of this search needs statistics; name a kind with --kind" in said
    nowhere = configured(search=MERGER, statistics={"tasks": {"a": []}})
    assert "statistics.tasks.a: names no task" in toys.refusal(*_stats(nowhere))
    written, whole = Worker.evaluate, torch.nn.Parameter

    def quantised(self, candidate):
        layer = self.live.module.classifier
        layer.weight = whole(layer.weight.data.to(torch.int8), requires_grad=False)
        return written(self, candidate)

    monkeypatch.setattr(Worker, "evaluate", quantised)
    said = toys.refusal(*_stats(configured(search={"algorithm": "tpe", "method": "fisher"})))
    assert "fisher of a on dev items" in said
    assert "classifier.weight" in said
    assert "so it has no gradient; choose a merge method without statistics of gradients" in said


def _stats(file):
    ended = toys.evolver("stats", file)
    return ended.code, ended.err


def test_kinds_are_named_and_some_are_of_the_base(configured):  # noqa: F811
    file = configured(search=MERGER)
    found = [(k.node.collected, k.node.of.name) for k in collected(file, "activation", "importance")]
    assert found == [("activation", "base"), ("activation", "base"), *[("importance", n) for n in ("a", "b")],
                     ("importance", "base"), ("importance", "base")]  # fmt: skip
    with pytest.raises(BadInput, match=r"there is no kind of statistic 'fischer'; did you mean 'fisher'"):
        collected(file, "fischer")
    with pytest.raises(BadInput, match=r"search: no merge method of this search needs statistics; name a kind"):
        collected(configured(search={"algorithm": "tpe"}))


def test_activations_are_the_mean_sizes_of_what_a_layer_gets(configured):  # noqa: F811
    """As Σ x² is the diagonal of the Gram, Σ |x| is checked by the same loop with the roots of the squares."""
    ready = ready_of(configured(search={"algorithm": "tpe", "method": "aim"}))
    worker = worker_of(ready)
    recipe = ready.search.space.decode({k.name: k.low for k in ready.search.space.knobs})
    assert [(s.collected, s.of.name) for s in recipe.statistics] == [("activation", "base")] * 2
    result = worker.evaluate(Candidate(0, recipe, "test"))
    assert result.status == "ok", result.reason
    worker.live.write(worker.materialiser.stream(ready.base), whole=True)
    owners = ready.tasks.scale("dev").tasks
    with LayerSums(worker.live, worker.live.linear_layers(), lambda rows: torch.stack([rows.abs().mean(0) * len(rows),
                   rows.new_full(rows.shape[1:], len(rows))])) as sums:  # fmt: skip
        worker.scorer.score_at({p for p, t in enumerate(owners) if t == "a"})
    for name, (total, count) in sums.totals.items():
        found = worker.materialiser._statistics[recipe.statistics[0].id].get(name)
        assert torch.allclose(found, total / count, rtol=1e-4, atol=1e-6), name


def test_an_offspring_may_have_statistics_of_its_own(configured):  # noqa: F811
    ready = ready_of(configured(search=MERGER, statistics={"offspring": "own"}))
    a, b = ready.experts
    child = Cross(b, (a, b), "evolver", 0.5, 0.5, 1)
    merger = ready.maker.merger({"method": "regmean"})
    mine, own = merger([a, child]), ready_of(configured(search=MERGER)).maker.merger({"method": "regmean"})([a, child])
    assert [s.of for s in mine.statistics] == [a, child]
    assert [s.of for s in own.statistics] == [a, b]
    assert mine.statistics[1].items == own.statistics[1].items
    worker = worker_of(ready)
    counted = worker.evaluate(Candidate(0, mine, "test"))
    assert counted.status == "ok", counted.reason
    again = worker.evaluate(Candidate(1, mine, "test"))  # it is kept, by the recipe
    assert again.items == counted.items
    on_b = worker.scorer.score_at({p for p, t in enumerate(ready.tasks.scale("dev").tasks) if t == "b"}).tokens
    assert counted.counts["tokens"] - again.counts["tokens"] == on_b
    opened = worker.materialiser._statistics
    gram = opened[mine.statistics[1].id].get("classifier.weight")
    assert not torch.allclose(gram, own_grams(ready, "b")["classifier.weight"].float(), rtol=1e-2)


def test_how_far_it_is_and_how_long_it_will_take_is_said_now_and_then():
    lines, now = [], [0.0]
    advance = Advance("fisher of a", 100, lines.append, lambda: now[0])
    for done in range(1, 101):
        now[0] = 3.0 * done
        advance(done)
    assert lines[0] == "fisher of a: item 4 of 100, about 4 min 50 s left"
    assert lines[1] == "fisher of a: item 8 of 100, about 4 min 40 s left"
    assert lines[-1] == "fisher of a: item 96 of 100, about 12 s left"
    assert len(lines) == 24  # one every 10 seconds or later, and none of the last item


@pytest.mark.parametrize("kind", ["gram", "fisher"])
@pytest.mark.parametrize(("source", "steps"), [("tasks", [8, 16]), ("random", [1, 4, 8, 16])])
def test_a_large_model_says_how_far_it_is(configured, monkeypatch, capfd, kind, source, steps):  # noqa: F811
    monkeypatch.setattr(sampled, "ADVANCE_SECONDS", 0.0)
    monkeypatch.setattr(sampled, "SCALARS_AT_A_TIME", 1)
    monkeypatch.setattr(sampled, "LEAST_AT_A_TIME", 8)
    collected(configured(search=MERGER, statistics={"items": 20, "source": source}), kind)
    said = capfd.readouterr().err
    lines = [line for line in said.splitlines() if line.startswith(f"statistics: {kind} of a: item ")]
    assert all(re.fullmatch(r".*: item \d+ of 20, about \d+ s left", line) for line in lines)
    found = [int(line.split(": item ")[1].split()[0]) for line in lines]
    assert found == sorted(found)
    assert set(found) >= ({16} if (kind, source) == ("gram", "random") else {*steps})
    assert max(found) < 20


def test_items_in_parts_give_what_they_give_at_once(configured, monkeypatch):  # noqa: F811
    found = []
    for least in (3, 20):
        monkeypatch.setattr(sampled, "SCALARS_AT_A_TIME", 1)
        monkeypatch.setattr(sampled, "LEAST_AT_A_TIME", least)
        monkeypatch.setattr(sampled, "EXAMPLES_AT_A_TIME", least)
        ready = ready_of(configured(search=MERGER))
        worker = worker_of(ready)
        node = ready.maker.wanted_of_experts(Of("gram"))[0]
        worker.live.write(worker.materialiser.stream(node.of), whole=True)
        items = worker._statistics._items(node, worker.live, range(20))
        assert (items._most, least) in ((3, 3), (20, 20))
        found.append([dict(COLLECTORS[kind].collect(worker.live, items)) for kind in ("gram", "fisher")])
    for one, other in zip(*found, strict=True):
        assert all(torch.allclose(one[n], t, rtol=1e-5, atol=1e-6 * float(t.max())) for n, t in other.items())


def test_random_tokens_need_no_data(configured):  # noqa: F811
    ready = ready_of(configured(search=MERGER, statistics={"source": "random", "items": 5}))
    worker = worker_of(ready)
    merged = Merge("fisher", ready.experts, ready.base, (), ready.maker.wanted_of_experts(Of("fisher")))
    result = worker.evaluate(Candidate(0, merged, "test"))
    assert result.status == "ok", result.reason
    assert len({s.items for s in merged.statistics}) == 1
    texts = RandomTokens(worker.live, 5, 0)
    ids = [e.inputs["input_ids"] for e in texts.examples()]
    assert {i.shape for i in ids} == {(1, min(RANDOM_LENGTH, worker.live.tokenizer.model_max_length))}
    assert all(torch.equal(x, e.inputs["input_ids"]) for x, e in zip(ids, texts.examples(), strict=True))
    assert not set(torch.cat(ids).flatten().tolist()) & set(worker.live.tokenizer.all_special_ids)
    worker.live.write(worker.materialiser.stream(ready.experts[0]), whole=True)
    wanted = dict(fisher_information(worker.live, Items(list(texts.examples()))))
    kept = worker.materialiser._statistics[merged.statistics[0].id]
    assert all(torch.equal(kept.get(name), tensor) for name, tensor in wanted.items())
    with LayerSums(worker.live, worker.live.linear_layers(), lambda rows: torch.tensor(len(rows))) as counted:
        texts.score()
    assert int(counted.totals["bert.pooler.dense.weight"]) == 5
    assert int(counted.totals["bert.encoder.layer.0.output.dense.weight"]) == texts.tokens


def test_random_tokens_have_no_right_answers(configured):  # noqa: F811
    search = {"algorithm": "tpe", "method": "led"}
    with pytest.raises(BadInput, match=r"statistics\.source: importance needs items with right answers"):
        prepare(config_at(configured(search=search, statistics={"source": "random"})), weights=False)


@pytest.mark.whole
@pytest.mark.parametrize("method", ["fisher", "regmean"])
@pytest.mark.parametrize("offspring", ["initial", "own"])
def test_evolver_with_a_merger_that_needs_statistics(configured, tmp_path, cache, method, offspring):  # noqa: F811
    search = {"algorithm": "evolver", "generations": 2, "merger": {"method": method}}
    file = configured(search=search, statistics={"items": 6, "offspring": offspring}, budget={"candidates": 6})
    folder = toys.run_here(file, tmp_path / "results")
    assert json.loads((folder / "best.json").read_text()) == {"items": 40, "equal": 40}
    toys.run_here(file, tmp_path / "results", toys.no_work)
    kept = len(list(cache.iterdir()))
    assert kept == 2 if offspring == "initial" else kept > 2  # those of the experts, and of offspring in their places
