"""Statistics of experts: what is collected, on which items, where it is kept, and what a merge does with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import toys
import yaml
from safetensors import safe_open
from safetensors.torch import save
from test_classification import classify  # noqa: F401  # a fixture
from test_methods import by_formula
from toys import MOODS, texts
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from evolver.checkpoints.kept import Damaged, open_kept, write_kept
from evolver.commands.explain import explain
from evolver.commands.merge import merge_file
from evolver.config.reading import config_at
from evolver.driver.deliver import deliver
from evolver.driver.prepare import in_compute, materialiser_of, prepare
from evolver.errors import BadInput
from evolver.evaluation.collectors.inputs import LayerSums
from evolver.merging.maker import RecipeMaker
from evolver.records import Candidate
from evolver.records.recipe import Cross, Expert, Merge, Statistic, dump_recipe, load_recipe
from evolver.storage import storage_at
from evolver.workers import statistics
from evolver.workers.statistics import sample
from evolver.workers.worker import Worker

A, B, BASE = Expert("a", "aa"), Expert("b", "bb"), Expert("base", "cc")
SEARCH = {"algorithm": "tpe", "method": "regmean", "tune": ["a"], "startup": 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache without statistics, whose folder of them this is."""
    folder = tmp_path / "cache"
    monkeypatch.setattr(statistics, "expand", lambda path: path.replace("$EVOLVER_CACHE", str(folder)))
    return folder / "statistics"


@pytest.fixture
def configured(classify):  # noqa: F811
    """``configured(changes)`` writes a configuration of two experts with a task of its own each."""

    def make(**changes):
        file = classify([{"text": t, "label": MOODS[n % 3]} for n, t in enumerate(texts(90))])
        raw = yaml.safe_load(file.read_text())
        (task,) = raw["evaluation"]["tasks"]
        rows = Path(task["data"]).read_text().splitlines(keepends=True)
        raw["evaluation"]["tasks"] = []
        for name, part in (("a", rows[:45]), ("b", rows[45:])):
            (file.parent / f"{name}.jsonl").write_text("".join(part))
            more = {"task": name, "data": str(file.parent / f"{name}.jsonl"), "dev": 20, "report": 15}
            raw["evaluation"]["tasks"].append({**task, **more})
        file.write_text(yaml.safe_dump(raw | {"search": SEARCH, "budget": {"candidates": 3}} | changes))
        return file

    return make


def ready_of(file):
    return in_compute(prepare(config_at(file)), "float32")


def worker_of(ready, split="dev"):
    return Worker(ready.plan, split, tasks=ready.tasks)


def merge_of(ready, a=0.9):
    return ready.search.space.decode({"a": a})


def own_grams(ready, expert):
    """XᵀX of every linear layer, by a plain loop: one text of the expert's own task at a time, without padding."""
    folder = ready.opened.experts[expert].path
    model, words = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    out = {}

    def hook(name):
        def hear(_, given):
            rows = given[0].reshape(-1, given[0].shape[-1]).double()
            out[name] = out.get(name, 0) + rows.T @ rows

        return hear

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    judge = ready.tasks.judges[expert]
    for asked in ready.tasks._asked("dev"):
        if asked.entry.task == expert:
            with torch.no_grad():
                model(**words(judge.row(asked)["text"], return_tensors="pt", truncation=True))
    return out


def test_a_gram_is_that_of_a_plain_loop_without_padding(configured):
    ready = ready_of(configured())
    worker = worker_of(ready)
    result = worker.evaluate(Candidate(0, merge_of(ready), "test"))
    assert result.status == "ok", result.reason
    for node in merge_of(ready).statistics:
        found, wanted = worker.materialiser._statistics[node.id], own_grams(ready, node.of.name)
        assert len(wanted) == 2 * 6 + 2  # six in each layer, the pooler and the classifier
        for name, gram in wanted.items():
            assert torch.allclose(found.get(name).double(), gram, rtol=1e-4, atol=1e-4), name
        assert found.get("bert.embeddings.word_embeddings.weight") is None


def energy(total, one, other):
    """Σ |X (W - W')|² over the inputs X of which the Gram is ``total``."""
    moved = one.double() - other.double()
    return torch.trace(moved @ total @ moved.T)


def test_a_worker_merges_by_the_formula(configured):
    ready = ready_of(configured())
    worker, recipe = worker_of(ready), merge_of(ready, 0.7)
    merged = dict(worker.materialiser.stream(recipe))
    average = dict(worker.materialiser.stream(Merge("simple", ready.experts, ready.base)))
    grams, moved = [own_grams(ready, e.name) for e in ready.experts], 0
    for name, tensor in merged.items():
        if name in grams[0]:
            models = [ready.opened.experts[e.name].tensor(name) for e in ready.experts]
            wanted = by_formula(models, [g[name] for g in grams], 0.7)
            total = sum(g[name] for g in grams)
            off, way = (energy(total, other, wanted) for other in (tensor, average[name]))
            assert off < 1e-6 * way, name  # the ridge may show where next to no inputs go
            moved += not torch.allclose(tensor, average[name], atol=1e-3)
        else:
            assert torch.equal(tensor, average[name]), name
    assert moved > 10


@pytest.mark.parametrize("batch_tokens", [64, 2048])
@pytest.mark.parametrize("task", ["toy", "texts", "pair"])
def test_of_a_language_model_the_positions_are_counted_that_are_no_padding(make_config, tmp_path, task, batch_tokens):
    """Each layer sees as many as the judge says that went through the model, whatever stands beside them."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(40)))
    own = {"data": str(tmp_path / "texts.jsonl"), "metric": "bits_per_byte"} if task == "texts" else {}
    entry = {"task": task, "dev": 12, "report": 8, **own}
    changes = {"evaluation.tasks": [entry], "evaluation.batch_tokens": batch_tokens, "search": SEARCH}
    worker = worker_of(ready_of(make_config(tmp_path, changes)))
    layers = worker.live.linear_layers()
    assert len(layers) == sum("proj" in n for n in worker.materialiser.base.names())
    assert "lm_head.weight" not in layers
    with LayerSums(worker.live, layers, lambda rows: torch.tensor(len(rows))) as counted:
        scored = worker.scorer.score(0, 12)
    assert {int(count) for count in counted.totals.values()} == {scored.tokens}


def test_a_pass_that_does_not_end_adds_nothing(configured):
    ready = ready_of(configured())
    worker = worker_of(ready)
    layers = worker.live.linear_layers()
    with LayerSums(worker.live, layers, lambda rows: torch.tensor(len(rows))) as whole:
        worker.scorer.score(0, 40)
    once = []

    def no_room(*_):
        if not once:
            once.append(True)
            raise torch.OutOfMemoryError("not enough memory")

    worker = worker_of(ready)
    layers, broken = worker.live.linear_layers(), worker.live.module.classifier
    hook = broken.register_forward_pre_hook(no_room)
    with LayerSums(worker.live, layers, lambda rows: torch.tensor(len(rows))) as halved:
        worker.scorer.score(0, 40)
    hook.remove()
    assert once
    assert halved.totals == whole.totals


def test_what_is_collected_is_kept_and_not_collected_again(configured, cache, monkeypatch, capfd):
    ready = ready_of(configured())
    first = worker_of(ready).evaluate(Candidate(0, merge_of(ready), "test"))
    said = capfd.readouterr().err
    assert said.count("collected on 20 dev items in") == 2
    assert "gram of a" in said
    monkeypatch.setattr(LayerSums, "__enter__", lambda _: pytest.fail("collected again"))
    for split, number in (("dev", 0), ("dev", 1), ("report", 0)):
        again = worker_of(ready, split).evaluate(Candidate(number, merge_of(ready), "test"))
        assert again.status == "ok", again.reason
        assert again.items == first.items or split == "report"


def in_half(file):
    """The bytes of a file that claims to be this one, with numbers of another dtype."""
    with safe_open(file, "pt") as handle:
        return save({n: handle.get_tensor(n).half() for n in handle.keys()}, handle.metadata())  # noqa: SIM118


@pytest.mark.parametrize("damage", ["a changed byte", "the first half", "nothing", "another expert's", "another dtype"])
def test_a_damaged_file_is_collected_anew_and_said_so(configured, cache, capfd, damage):
    ready = ready_of(configured())
    first = worker_of(ready).evaluate(Candidate(0, merge_of(ready), "test"))
    file, other = sorted(cache.iterdir())
    whole = file.read_bytes()
    changed = bytearray(whole)
    changed[-5] ^= 1
    spoilt = {"a changed byte": bytes(changed), "the first half": whole[: len(whole) // 2], "nothing": b"",
              "another expert's": other.read_bytes(), "another dtype": in_half(file)}  # fmt: skip
    file.write_bytes(spoilt[damage])
    capfd.readouterr()
    again = worker_of(ready).evaluate(Candidate(0, merge_of(ready), "test"))
    said = capfd.readouterr().err
    assert again.items == first.items
    assert f"{file} is damaged" in said
    assert said.count("collected on") == 1
    assert file.read_bytes() == whole


def test_another_dtype_has_files_of_its_own(configured):
    keys = set()
    for compute in ("float32", "bfloat16"):
        file = configured()
        raw = yaml.safe_load(file.read_text())
        raw["model"]["compute"] = compute
        file.write_text(yaml.safe_dump(raw))
        ready = prepare(config_at(file))
        keys |= {worker_of(ready)._statistics._file(node)[1] for node in merge_of(ready).statistics}
    assert len(keys) == 4


def test_what_cannot_be_kept_is_used_all_the_same(configured, cache, capfd):
    ready = ready_of(configured())
    cache.parent.mkdir()
    cache.write_text("a file where the folder belongs")
    assert worker_of(ready).evaluate(Candidate(0, merge_of(ready), "test")).status == "ok"
    assert "cannot be written" in capfd.readouterr().err


def test_kept_tensors_are_sealed_for_their_key(tmp_path):
    file = tmp_path / "kept" / "x.safetensors"
    assert open_kept(file, "one") is None
    write_kept(file, "one", {"w": torch.eye(2)})
    found = open_kept(file, "one")
    assert torch.equal(found.get("w"), torch.eye(2))
    assert found.get("v") is None
    with pytest.raises(Damaged, match="other bytes"):
        open_kept(file, "another")
    assert [f.name for f in file.parent.iterdir()] == ["x.safetensors"]


COLLECT = """
import sys
from pathlib import Path
from evolver.config.reading import config_at
from evolver.driver.prepare import in_compute, prepare
from evolver.records import Candidate
from evolver.workers.worker import Worker

ready = in_compute(prepare(config_at(sys.argv[1])), "float32")
worker = Worker(ready.plan, sys.argv[2], tasks=ready.tasks)
result = worker.evaluate(Candidate(0, ready.search.space.decode({"a": 0.9}), "test"))
assert result.status == "ok", result.reason
"""


@pytest.mark.whole
def test_two_workers_collect_the_same_bytes(configured, tmp_path):
    """Each with a cache of its own, and one of them for the other split."""
    file, found = configured(), []
    for split in ("dev", "report"):
        own = tmp_path / split
        subprocess.run(
            [sys.executable, "-c", COLLECT, str(file), split], cwd=toys.ROOT, check=True,
            env={**os.environ, "EVOLVER_CACHE": str(own)},
        )  # fmt: skip
        found.append({f.name: f.read_bytes() for f in (own / "statistics").iterdir()})
    assert len(found[0]) == 2
    assert found[0] == found[1]


def test_the_items_are_dev_items_of_the_experts_task_and_as_many_as_are_asked_for(configured):
    owners = ready_of(configured()).tasks.scale("dev").tasks
    for settings, wanted in (
        ({}, {"a": ["a"] * 20, "b": ["b"] * 20}),
        ({"items": 7}, {"a": ["a"] * 7, "b": ["b"] * 7}),
        ({"tasks": {"a": ["b"]}}, {"a": ["b"] * 20, "b": ["b"] * 20}),
        ({"tasks": {"a": ["a", "b"]}}, {"a": list(owners), "b": ["b"] * 20}),
    ):
        ready = ready_of(configured(statistics=settings))
        for expert, tasks in wanted.items():
            assert [owners[p] for p in sample(ready.config, ready.tasks, expert)] == tasks
        assert len({s.items for s in merge_of(ready).statistics}) == 2 - (settings == {"tasks": {"a": ["b"]}})


def test_an_expert_without_a_task_is_seen_on_all(configured):
    file = configured()
    raw = yaml.safe_load(file.read_text())
    raw["experts"] = {"first": raw["experts"]["a"], "b": raw["experts"]["b"]}
    file.write_text(yaml.safe_dump(raw))
    ready = ready_of(file)
    assert len(sample(ready.config, ready.tasks, "first")) == 40
    assert len(sample(ready.config, ready.tasks, "b")) == 20


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"statistics": {"tasks": {"c": ["a"]}}}, "statistics.tasks: there is no expert 'c'; known: a, b"),
        ({"statistics": {"tasks": {"a": ["aa"]}}}, "statistics.tasks.a: there is no task 'aa'; did you mean 'a'"),
        ({"statistics": {"tasks": {"a": []}}}, "statistics.tasks.a: names no task"),
        ({"statistics": {"items": 0}}, "statistics.items: 0 is not usable"),
    ],
)
def test_mistakes_are_named(configured, changes, said):
    with pytest.raises(BadInput) as error:
        prepare(config_at(configured(**changes)))
    assert said in str(error.value)


@pytest.mark.parametrize("search", [SEARCH, {"algorithm": "evolver", "merger": {"method": "regmean"}}])
def test_a_task_that_does_not_tell_its_padding_is_refused(make_config, tmp_path, search):
    (tmp_path / "mine.py").write_text("def score(model, items):\n    return [1.0 for _ in items]\n")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(40)))
    mine = {"task": "mine", "function": f"{tmp_path}/mine.py:score", "data": str(tmp_path / "rows.jsonl")}
    toy = {"task": "toy", "dev": 10, "report": 10}
    changes = {"evaluation.tasks": [toy, {**mine, "dev": 10, "report": 10}], "search": search}
    with pytest.raises(BadInput, match=r"evaluation\.tasks\[1\]: mine is scored in a way that does not say which"):
        prepare(config_at(make_config(tmp_path, changes)), weights=False)
    others = {"statistics.tasks": {expert: ["toy"] for expert in "abc"}}
    assert prepare(config_at(make_config(tmp_path, changes | others)), weights=False)
    plain = {"search": {"algorithm": "tpe"}}
    assert prepare(config_at(make_config(tmp_path, changes | plain)), weights=False)


def test_written_answers_are_refused(make_config, tmp_path):
    changes = {"evaluation.tasks": [{"task": "echo", "metric": "exact_match", "dev": 4, "report": 4}], "search": SEARCH}
    with pytest.raises(BadInput, match=r"evaluation\.tasks\[0\]: echo is scored in a way"):
        prepare(config_at(make_config(tmp_path, changes)), weights=False)


def test_a_mergekit_file_is_refused_with_the_way_out(models, tmp_path):
    entry = {"merge_method": "regmean", "base_model": str(models / "base"),
             "models": [{"model": str(models / n)} for n in "ab"]}  # fmt: skip
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(entry))
    with pytest.raises(BadInput, match=r"merge_method: regmean needs statistics of the models on items.*evolver run"):
        merge_file(tmp_path / "merge.yml", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_statistic_of_other_items_is_refused(configured):
    ready = ready_of(configured())
    worker, (one, other) = worker_of(ready), merge_of(ready).statistics
    for bad, said in (
        (Statistic("gram", one.of, "another hash"), "on other items than those of this run"),
        (Statistic("gramm", one.of, one.items), "no collector 'gramm'; did you mean 'gram'"),
    ):
        recipe = Merge("regmean", ready.experts, ready.base, (), (bad, other))
        result = worker.evaluate(Candidate(0, recipe, "test"))
        assert result.status == "failed"
        assert said in result.reason


def test_the_id_of_a_merge_includes_its_statistics():
    def merged(*statistics):
        return Merge("regmean", (A, B), BASE, (), statistics)

    grams = [Statistic("gram", of, items) for of, items in ((A, "1"), (B, "1"), (A, "2"))]
    recipes = [merged(), merged(*grams[:2]), merged(grams[2], grams[1]), merged(Statistic("fisher", A, "1"), grams[1])]
    assert len({r.id for r in recipes}) == len(recipes)
    for recipe in recipes:
        again = load_recipe(dump_recipe(recipe))
        assert (again, again.statistics) == (recipe, recipe.statistics)
    entries = json.loads(dump_recipe(recipes[1]))
    entries[-1][-1] = [0, 1]  # experts in the place of statistics
    for bad in (entries, json.loads(dump_recipe(recipes[1]))[:-1]):
        with pytest.raises(ValueError, match="statistic"):
            load_recipe(json.dumps(bad))


def test_an_offspring_has_the_statistics_of_the_expert_in_whose_place_it_stands():
    maker = RecipeMaker(["a", "b"], ["w"], sampled=lambda _, expert: f"items of {expert}")
    a, b = maker.experts
    child = Cross(Cross(b, (a,), "evolver", 0.5, 0.5, 1), (a,), "evolver", 0.5, 0.5, 2)
    merged = maker.merger({"method": "regmean"})([a, child])
    assert merged.statistics == (Statistic("gram", a, "items of a"), Statistic("gram", b, "items of b"))
    assert maker.merger({"method": "simple"})([a, child]).statistics == ()
    with pytest.raises(BadInput, match=r"regmean needs statistics of experts, and a merge \(simple\) is not an expert"):
        maker.merger({"method": "regmean"})([a, Merge("simple", (a, b), maker.base)])


@pytest.mark.whole
@pytest.mark.parametrize("merged", [False, True])
def test_a_run_from_end_to_end(configured, tmp_path, cache, merged):
    """By itself and as the merger of a population: search, export, explanation, and a rebuilt model without a cache."""
    search = {"algorithm": "evolver", "generations": 1, "merger": {"method": "regmean", "a": 0.5}} if merged else SEARCH
    file = configured(search=search)
    folder = toys.run_here(file, tmp_path / "results")
    assert json.loads((folder / "best.json").read_text()) == {"items": 40, "equal": 40}
    toys.run_here(file, tmp_path / "results", toys.no_work)  # all of it is in the ledger
    recipe = load_recipe((folder / "recipe.json").read_text())
    assert [s.of.name for s in recipe.statistics] == ["a", "b"]
    assert not (folder / "best" / "mergekit_config.yml").exists()
    assert all(method == "regmean" for _, method, _ in explain(folder))
    assert explain(file)[0][2] == {"a": 0.5 if merged else "tuned", "ridge": 1e-6}
    assert f"gram of a on dev items ({recipe.statistics[0].items[:8]})" in (folder / "report.md").read_text()
    told: list[str] = []
    deliver(storage_at(folder), tmp_path / "out", None, told.append)
    assert "gives the answers in the ledger on 40 of 40 dev items" in told[0]
    best = (tmp_path / "out" / "model.safetensors").read_bytes()
    assert best == (folder / "best" / "model.safetensors").read_bytes()
    for kept in cache.iterdir():
        kept.unlink()
    rebuilt = dict(materialiser_of(ready_of(file)).stream(recipe))
    found = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in rebuilt.items())
    assert len(list(cache.iterdir())) == 2
