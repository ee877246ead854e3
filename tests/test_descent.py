"""Searches that descend: gradients by coefficients against plain loops, their steps by formula, and whole runs."""

from __future__ import annotations

import hashlib
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toys
import yaml
from test_classification import classify  # noqa: F401  # a fixture
from test_search import EXPERTS, build, simulate
from toys import MOODS, run_here, texts
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from evolver.config.reading import config_at
from evolver.driver.prepare import in_compute, prepare
from evolver.evaluation import losses
from evolver.evaluation.losses import Descending, ModelOutputs, distillation, entropy, said_of
from evolver.records import Candidate, Result
from evolver.records.loss import UnlabelledLoss
from evolver.records.recipe import Merge, Place, Rule, dump_recipe
from evolver.runs.history import read_history
from evolver.search.descent.adam import Adam
from evolver.storage import storage_at
from evolver.workers.messages import pack_candidate, pack_result, unpack_candidate, unpack_result
from evolver.workers.worker import Worker

ADA = {"algorithm": "adamerging", "steps": 4, "lr": 0.05, "items": 12}
TAUGHT = {"algorithm": "expert_merging", "steps": 3, "items": 12, "hidden": 0.5, "temperature": 2.0}


@pytest.fixture
def configured(classify):  # noqa: F811
    """``configured(changes)`` writes a configuration of two experts with a task of its own each."""

    def make(search=ADA, **changes):
        file = classify([{"text": t, "label": MOODS[n % 3]} for n, t in enumerate(texts(90))])
        raw = yaml.safe_load(file.read_text())
        (task,) = raw["evaluation"]["tasks"]
        rows = Path(task["data"]).read_text().splitlines(keepends=True)
        raw["evaluation"]["tasks"] = []
        for name, part in (("a", rows[:45]), ("b", rows[45:])):
            (file.parent / f"{name}.jsonl").write_text("".join(part))
            more = {"task": name, "data": str(file.parent / f"{name}.jsonl"), "dev": 20, "report": 15, "select": 0}
            raw["evaluation"]["tasks"].append({**task, **more})
        for key, value in (raw | {"search": search, "budget": {"candidates": 9}} | changes).items():
            raw[key] = {**raw[key], **value} if key == "evaluation" else value
        file.write_text(yaml.safe_dump(raw))
        return file

    return make


def ready_of(file):
    return in_compute(prepare(config_at(file)), "float32")


def asked_of(ready, numbers, loss, limit=12):
    """A candidate with these coefficients, one pair for tensors outside of the layers and one for each layer."""
    places = [Place(outside=True), *(Place(layers=(n, n + 1)) for n in range(len(numbers) - 1))]
    rules = tuple(Rule.of({"weight": pair}, place) for pair, place in zip(numbers, places, strict=True))
    merged = Merge("task_arithmetic", ready.experts, ready.base, rules)
    return Candidate(0, merged, "test").asking(limit=limit, order="some", loss=loss)


def plain_loss(ready, numbers, asked):
    """The loss in float64, text by text without padding, as a function of coefficients (places, experts)."""
    folders = {"base": ready.opened.base.path, **{n: e.path for n, e in ready.opened.experts.items()}}
    models = {n: AutoModelForSequenceClassification.from_pretrained(f).double().eval() for n, f in folders.items()}
    words, (a, b), base = AutoTokenizer.from_pretrained(folders["base"]), (models["a"], models["b"]), models["base"]
    weights = {}
    for name, origin in base.state_dict().items():
        row = 1 + int(name.split("layer.")[1].split(".")[0]) if "layer." in name else 0
        deltas = [m.state_dict()[name] - origin for m in (a, b)]
        weights[name] = origin + sum(c * d for c, d in zip(numbers[row], deltas, strict=True))
    order = sorted(range(40), key=lambda p: _digest(f"some:{p}"))[:12]
    items, loss, total = ready.tasks._asked("dev"), asked.question.loss, 0.0
    for task in ("a", "b"):
        own = [items[p] for p in order if items[p].entry.task == task]
        for item in own:
            given = words(ready.tasks.judges[task].row(item)["text"], return_tensors="pt") | {
                "output_hidden_states": True
            }
            merged = torch.func.functional_call(base, weights, kwargs=dict(given))
            if loss.name == "entropy":
                p = merged.logits.softmax(-1)
                total = total - (p * p.log()).sum() / len(own) / 2
                continue
            with torch.no_grad():
                expert = models[task](**given)
            p, q = ((x.logits / loss.temperature).softmax(-1) for x in (expert, merged))
            total = total + loss.temperature**2 * (p * (p / q).log()).sum() / len(own) / 2
    return total


def _digest(text):
    return hashlib.sha256(text.encode()).digest()


@pytest.mark.parametrize("loss", [UnlabelledLoss("entropy"), UnlabelledLoss("distillation", 2.0, 0.0)])
def test_a_gradient_is_that_of_a_plain_loop_in_float64(configured, loss):
    ready = ready_of(configured())
    asked = asked_of(ready, [(0.3, 0.1), (0.5, 0.2), (0.1, 0.7)], loss)
    result = Worker(ready.plan, "dev", tasks=ready.tasks).evaluate(asked)
    numbers = torch.tensor([(0.3, 0.1), (0.5, 0.2), (0.1, 0.7)], dtype=torch.float64, requires_grad=True)
    wanted = plain_loss(ready, numbers, asked)
    (slope,) = torch.autograd.grad(wanted, numbers)
    assert result.loss == pytest.approx(wanted.item(), rel=1e-4)
    assert result.gradient == pytest.approx(slope.flatten().tolist(), rel=2e-3, abs=2e-6)
    assert max(map(abs, result.gradient)) > 1e-4
    assert (result.score, result.complete, len(result.items), result.cost) == (None, False, 12, 12)


def test_an_expert_has_nothing_to_learn_from_itself(configured):
    """The whole expert a is what it shows on its own items, so that part of the loss is 0."""
    ready = ready_of(configured())
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    loss = UnlabelledLoss("distillation")
    whole = worker.evaluate(asked_of(ready, [(1.0, 0.0)] * 3, loss))
    ready.config.statistics.tasks["b"] = ["a"]  # both experts show what they do on a's items
    only = Worker(ready.plan, "dev", tasks=ready.tasks).evaluate(asked_of(ready, [(1.0, 0.0)] * 3, loss))
    assert whole.loss > 1e-4
    assert only.loss > 1e-4
    ready.config.statistics.tasks["b"] = ["nobody"]
    alone = Worker(ready.plan, "dev", tasks=ready.tasks).evaluate(asked_of(ready, [(1.0, 0.0)] * 3, loss))
    assert alone.loss == pytest.approx(0.0, abs=1e-9)
    assert alone.gradient == pytest.approx([0.0] * 6, abs=1e-6)
    assert len(alone.items) == 12  # those of b are scored, too


def test_a_gradient_changes_no_score_after_it(configured):
    """Nor does it depend on what the live model held before."""
    ready = ready_of(configured())
    worker, loss = Worker(ready.plan, "dev", tasks=ready.tasks), UnlabelledLoss("distillation")
    asked = asked_of(ready, [(0.4, 0.2)] * 3, loss)
    plain = replace(asked, question=Candidate(0, asked.recipe, "x").question)
    before, first, after, second = (worker.evaluate(c) for c in (plain, asked, plain, asked))
    assert before.complete
    assert before.items == after.items
    assert before.probabilities == after.probabilities
    assert (first.loss, first.gradient) == (second.loss, second.gradient)
    assert not any(p.grad is not None for p in worker.live.module.parameters())


def test_a_batch_that_is_divided_gives_the_same_gradient(configured, monkeypatch):
    """A pass with gradients takes more memory than the one in which an expert showed what it does."""
    ready = ready_of(configured(TAUGHT))
    asked = asked_of(ready, [(0.4, 0.2)] * 3, UnlabelledLoss("distillation"))
    whole = Worker(ready.plan, "dev", tasks=ready.tasks).evaluate(asked)
    through, failed = Descending.__call__, []

    def short(self, module, positions, inputs):
        if len(inputs["input_ids"]) > 3:
            failed.append(1)
            raise torch.OutOfMemoryError("not enough memory")
        return through(self, module, positions, inputs)

    monkeypatch.setattr(losses.Descending, "__call__", short)
    divided = Worker(ready.plan, "dev", tasks=ready.tasks).evaluate(asked)
    assert failed
    assert divided.gradient == pytest.approx(whole.gradient, rel=1e-3, abs=1e-6)


def test_losses_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, math.log(3.0)]])
    outputs = type("Outputs", (), {"logits": logits, "hidden_states": (torch.zeros(2, 3, 4), torch.ones(2, 3, 4))})
    mean = entropy(4)("x", outputs, None, None)
    h = math.log(2), -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert float(mean) == pytest.approx(sum(h) / 4)
    assert float(entropy(2, labels=True)("x", outputs, None, None)) == pytest.approx((3 * h[0] + h[1]) / 2)
    positions = torch.tensor([[True, True, False], [True, False, False]])
    assert said_of(outputs, positions, True).layers[0].shape == (3, 4)
    tags = type("Outputs", (), {"logits": logits.view(1, 2, 2).repeat(2, 1, 1)})
    first_only = torch.tensor([[True, True], [True, False]])
    assert float(entropy(2)("x", tags, first_only, None)) == pytest.approx((sum(h) / 2 + h[0]) / 2)
    said = {"x": ModelOutputs(torch.zeros(2, 2), (torch.zeros(3, 4),))}
    kl = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert float(distillation(said, 1.0, 2.0)("x", outputs, positions, None)) == pytest.approx(kl / 2 + 2.0)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adam_is_that_of_torch(decay):
    own, adam = [0.3, -0.2, 1.0], Adam(3, 0.05, decay)
    theirs = torch.tensor(own, dtype=torch.float64, requires_grad=True)
    kind = torch.optim.AdamW([theirs], lr=0.05, weight_decay=decay)
    for step in range(20):
        gradient = [math.sin(step + x) for x in range(3)]
        theirs.grad = torch.tensor(gradient, dtype=torch.float64)
        kind.step()
        own = adam.moved(own, gradient)
    assert own == pytest.approx(theirs.tolist(), rel=1e-12)


def slopes(of):
    """A reply whose gradient is a function of the coefficients."""

    def reply(candidate, _=False):
        if candidate.question.loss is None:
            return Result(candidate.number, candidate.recipe.id, "ok", 0.5, 0.5, True, (0.5,) * 10)
        numbers = [c for rule in candidate.recipe.rules for c in dict(rule.values)["weight"]]
        count = candidate.question.limit
        return Result(
            candidate.number, candidate.recipe.id, "ok", items=(0.0,) * count, order=candidate.question.order,
            loss=1.0, gradient=tuple(of(numbers)),
        )  # fmt: skip

    return reply


def numbers_of(candidate):
    return [dict(rule.values)["weight"] for rule in candidate.recipe.rules]


def test_adamerging_finds_the_minimum_and_stays_between_0_and_1():
    """The loss Σ (c - t)²/2 with targets of which one is out of reach."""
    targets = [0.5, 0.1, -1.0]
    reply = slopes(lambda numbers: [c - targets[i % 3] for i, c in enumerate(numbers)])
    search = build({**ADA, "steps": 200, "lr": 0.02, "items": 4}, experts=3, candidates=300)
    found = simulate(search, reply=reply)
    assert len(found) == 201
    assert found[-1].question.limit is None
    for own in numbers_of(found[-1]):
        assert own == pytest.approx((0.5, 0.1, 0.0), abs=1e-3)
    assert len({c.question.order for c in found[:-1]}) == 200


def test_expert_merging_holds_to_its_beginning_and_leaves_out_what_is_outside_of_the_layers():
    settings = {**TAUGHT, "items": 4, "steps": 300, "lr": 0.1, "decay": 0.0}
    reply = slopes(lambda numbers: [c - 0.6 for c in numbers])
    free = simulate(build({**settings, "anchor": 0.0}, experts=2, candidates=400), reply=reply)
    outside, *layers = numbers_of(free[-1])
    assert outside == (0.1, 0.1)
    assert [c for own in layers for c in own] == pytest.approx([0.6] * 2 * len(layers), abs=1e-3)
    held = simulate(build({**settings, "anchor": 100.0}, experts=2, candidates=400), reply=reply)
    assert numbers_of(held[-1])[1] == pytest.approx((0.1, 0.1), abs=0.05)
    assert len({c.question.order for c in free[:-1]}) == 1  # the same items in every step


def test_fw_merging_goes_to_one_vertex_at_a_time():
    """By hand: steps 2/2, 2/3 and 2/4 towards the expert with the smallest slope, and to the base where none falls."""
    turns = iter([[-1.0, -2.0, 3.0], [-5.0, -2.0, -1.0], [0.1, 0.2, 0.3]])
    search = build({"algorithm": "fw_merging", "steps": 3, "per": "model", "items": 4, "scale": 0.5}, experts=3)
    found = simulate(search, reply=slopes(lambda _: next(turns)))
    assert numbers_of(found[0]) == [(0.0, 0.0, 0.0)]
    assert numbers_of(found[1]) == [(0.0, 0.5, 0.0)]
    assert numbers_of(found[2])[0] == pytest.approx((1 / 3, 1 / 3, 0.0))
    assert numbers_of(found[3])[0] == pytest.approx((0.25, 0.25, 0.0))


def test_a_step_that_fails_moves_nothing():
    reply = slopes(lambda numbers: [1.0] * len(numbers))
    bad = simulate(build(ADA, experts=2), reply=lambda c, w=False: (
        Result.failed(c, "not finite") if c.number == 1 else reply(c)
    ))  # fmt: skip
    assert numbers_of(bad[1]) == numbers_of(bad[2]) != numbers_of(bad[3])


def test_patience_is_refused(configured):
    toys.refused(lambda: prepare(config_at(configured(budget={"patience": 3}))), "budget.patience: the steps of this")


@pytest.mark.parametrize(("budget", "steps"), [({"items": 60}, 4), ({"candidates": 3}, 2), ({"candidates": 1}, 0)])
def test_a_budget_leaves_room_for_the_model_that_was_learnt(configured, budget, steps):
    """Of 12 items a step: after 48 of 60 items one more step would leave nothing."""
    ready = prepare(config_at(configured({**ADA, "steps": 50}, budget=budget)))
    assert any("no room for all 50 steps" in warning for warning in ready.warnings)
    found = simulate(ready.search, reply=slopes(lambda numbers: [1.0] * len(numbers)))
    assert [c.question.loss is None for c in found] == [False] * steps + [True]


@pytest.mark.parametrize(
    ("search", "changes", "said"),
    [
        ({**ADA, "lr": 0}, {}, "search.lr"),
        ({**ADA, "per": "head"}, {}, "search.per"),
        (ADA, {"evaluation": {"quantise": "int8"}}, "evaluation.quantise: adamerging takes gradients"),
        (
            {"algorithm": "halving", "first": 8, "of": ADA},
            {"evaluation": {"block_items": 8}},
            "search.of.algorithm: 'adamerging' cannot be the inner",
        ),
    ],
)
def test_what_has_no_gradient_is_refused(configured, search, changes, said):
    toys.refused(lambda: prepare(config_at(configured(search, **changes))), said)


def test_language_models_are_refused_by_entropy_and_where_texts_are_written(make_config, tmp_path):
    file = make_config(tmp_path, {"search": ADA})
    toys.refused(lambda: prepare(config_at(file)), "would only learn to repeat itself", "expert_merging")


def test_messages_keep_losses_and_gradients():
    asked = Candidate(3, EXPERTS[0], "x").asking(limit=4, loss=UnlabelledLoss("distillation", 2.0, 0.5))
    assert unpack_candidate(pack_candidate(asked)) == asked
    result = Result(3, EXPERTS[0].id, "ok", loss=0.5, gradient=(0.1, -0.2))
    assert unpack_result(pack_result(result)) == result
    assert result.answers(replace(asked, question=replace(asked.question, limit=0)))
    assert not replace(result, gradient=()).answers(replace(asked, question=replace(asked.question, limit=0)))


@pytest.mark.whole
def test_a_run_that_is_killed_learns_the_same_numbers(configured, tmp_path):
    file = configured()
    straight = Path(run_here(file, tmp_path / "straight"), "recipe.json").read_text()
    folder = run_here(configured(budget={"candidates": 9}), tmp_path / "killed")
    stages = read_history(storage_at(folder)).stages["search"]
    assert [r.loss is None for _, r in stages] == [False] * 4 + [True]
    toys.cut_short(folder)
    again = run_here(file, tmp_path / "killed")
    assert Path(again, "recipe.json").read_text() == straight
    twice = read_history(storage_at(again)).stages["search"]
    assert [r.gradient for _, r in twice] == [r.gradient for _, r in stages]
    assert dump_recipe(twice[-1][0].recipe) == dump_recipe(stages[-1][0].recipe)


@pytest.mark.whole
def test_language_models_learn_from_their_experts(make_config, tmp_path):
    """On a task that belongs to no expert, all of them are the example."""
    changes = {**toys.SHORT, "search": {**TAUGHT, "items": 8, "lr": 0.2, "anchor": 0.0}, "budget.candidates": 9}
    folder = run_here(make_config(tmp_path, changes), tmp_path / "results")
    searched = read_history(storage_at(folder)).stages["search"]
    assert [r.loss is None for _, r in searched] == [False] * 3 + [True]
    assert searched[2][1].loss < searched[0][1].loss
    assert searched[-1][1].complete
