"""Defense-aware merging: disturbances and gradients against plain float64 loops, what each step asks, and a run."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import toys
from test_classification import classify  # noqa: F401  # a fixture
from test_descent import asked_of, configured, ready_of, slopes  # noqa: F401  # a fixture
from test_search import build, simulate
from toys import run_here
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, AutoTokenizer

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.evaluation import losses
from evolver.evaluation.adversary import Attack
from evolver.evaluation.losses import Descending
from evolver.records import Candidate
from evolver.records.loss import Adversary, UnlabelledLoss
from evolver.records.order import item_order
from evolver.runs.history import read_history
from evolver.storage import storage_at
from evolver.workers.messages import pack_candidate, unpack_candidate
from evolver.workers.worker import Worker

DEFENDED = {"algorithm": "defense_aware", "steps": 3, "after": 2, "items": 12, "lr": 0.1, "inner": 0.1}
NUMBERS = [(0.3, 0.1), (0.5, 0.2), (0.1, 0.7)]
AGAINST = UnlabelledLoss("entropy", adversary=Adversary(0.7, 3, 0.5))


def plain_adam(slope, count, rate, shape):
    """p after so many steps of Adam up ``slope(p)``, from 0."""
    p, m, v = (torch.zeros(shape, dtype=torch.float64) for _ in range(3))
    for step in range(1, count + 1):
        g = slope(p)
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        p = p + rate * (m / (1 - 0.9**step)) / ((v / (1 - 0.999**step)).sqrt() + 1e-8)
    return p


def plain_loss(ready, numbers, asked):
    """The loss in float64, text by text; a disturbance is added to embeddings that are looked up here."""
    folders = {"base": ready.opened.base.path, **{n: e.path for n, e in ready.opened.experts.items()}}
    base, a, b = (
        AutoModelForSequenceClassification.from_pretrained(folders[n]).double().eval() for n in ("base", "a", "b")
    )
    words, weights, against = AutoTokenizer.from_pretrained(folders["base"]), {}, asked.question.loss.adversary
    for name, origin in base.state_dict().items():
        row = 1 + int(name.split("layer.")[1].split(".")[0]) if "layer." in name else 0
        deltas = [m.state_dict()[name] - origin for m in (a, b)]
        weights[name] = origin + sum(c * d for c, d in zip(numbers[row], deltas, strict=True))
    table = weights[next(n for n in weights if n.endswith("word_embeddings.weight"))]
    items = ready.tasks._asked("dev")
    chosen = item_order(asked.question.order, len(items))[: asked.question.limit]

    def logits(item, p=0.0):
        ids = words(ready.tasks.judges[item.entry.task].row(item)["text"], return_tensors="pt")["input_ids"]
        given = {"inputs_embeds": table[ids] + p}
        return torch.func.functional_call(base, weights, kwargs=given).logits[0]

    def entropy(found):
        return -(found.softmax(-1) * found.log_softmax(-1)).sum()

    total, unit = 0.0, table.detach().square().mean().sqrt()
    for task in ("a", "b"):
        own = [items[place] for place in chosen if items[place].entry.task == task]
        said = [int(logits(item).argmax()) for item in own]

        def slope(q, own=own, said=said):
            q = q.clone().requires_grad_(True)
            contrary = sum(
                -logits(item, q * unit).log_softmax(-1)[right] for item, right in zip(own, said, strict=True)
            )
            return torch.autograd.grad(contrary / len(own), q)[0]

        p = plain_adam(slope, against.steps, against.rate, table.shape[1:]) * unit
        each = [entropy(logits(item)) + against.weight * entropy(logits(item, p)) for item in own]
        total = total + sum(each) / len(own) / 2
    return total


def test_a_gradient_is_that_of_a_plain_loop_in_float64(configured):  # noqa: F811
    ready = ready_of(configured())
    asked = asked_of(ready, NUMBERS, AGAINST)
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    result, without = worker.evaluate(asked), worker.evaluate(asked_of(ready, NUMBERS, UnlabelledLoss("entropy")))
    numbers = torch.tensor(NUMBERS, dtype=torch.float64, requires_grad=True)
    wanted = plain_loss(ready, numbers, asked)
    (slope,) = torch.autograd.grad(wanted, numbers)
    assert result.status == "ok", result.reason
    assert result.loss == pytest.approx(wanted.item(), rel=1e-4)
    assert result.gradient == pytest.approx(slope.flatten().tolist(), rel=3e-3, abs=3e-6)
    assert result.gradient != pytest.approx([1.7 * g for g in without.gradient], rel=0.05)  # p is not nothing
    assert (result.items, result.cost) == (without.items, 12)


def test_a_disturbance_changes_no_score_after_it(configured):  # noqa: F811
    ready = ready_of(configured())
    worker, asked = Worker(ready.plan, "dev", tasks=ready.tasks), asked_of(ready, NUMBERS, AGAINST)
    plain = replace(asked, question=Candidate(0, asked.recipe, "x").question)
    before, first, after, second = (worker.evaluate(c) for c in (plain, asked, plain, asked))
    assert before.complete
    assert before.probabilities == after.probabilities
    assert (first.loss, first.gradient) == (second.loss, second.gradient)


def test_a_batch_that_is_divided_gives_the_same_gradient(configured, monkeypatch):  # noqa: F811
    ready = ready_of(configured())
    asked = asked_of(ready, NUMBERS, AGAINST)
    whole = Worker(ready.plan, "dev", tasks=ready.tasks).evaluate(asked)
    failed = []

    def short(through, most):
        def call(self, module, positions, inputs):
            if len(inputs["input_ids"]) > most:
                failed.append(type(self))
                raise torch.OutOfMemoryError("not enough memory")
            return through(self, module, positions, inputs)

        return call

    monkeypatch.setattr(losses.Descending, "__call__", short(Descending.__call__, 4))
    monkeypatch.setattr(Attack, "__call__", short(Attack.__call__, 2))
    divided = Worker(ready.plan, "dev", tasks=ready.tasks).evaluate(asked)
    assert {Attack, Descending} == set(failed)
    assert divided.gradient == pytest.approx(whole.gradient, rel=1e-3, abs=1e-6)


def test_one_image_disturbs_all_images(tmp_path):
    """In two batches, against a loop in float64 over all images at once."""
    toys.make_image_classifiers(tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "a").eval()
    pixels = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    attack = Attack(6, labels=False, rate=0.05)
    for _ in range(4):
        for batch in (pixels[:4], pixels[4:]):
            attack(model, None, {"pixel_values": batch})
        attack.step()
    plain, exact = model.double(), pixels.double()
    said = plain(exact).logits.argmax(-1)

    def contrary(p):
        return -plain(exact + p).logits.log_softmax(-1)[torch.arange(6), said].mean()

    def slope(p):
        p = p.clone().requires_grad_(True)
        return torch.autograd.grad(contrary(p), p)[0]

    wanted = plain_adam(slope, 4, 0.05, (3, 16, 16))
    assert attack.by.double() == pytest.approx(wanted, abs=2e-3)
    assert contrary(attack.by.double()) > 1.2 * contrary(torch.zeros(1))


class Said:
    """What a module says, of which nothing but the logits is asked."""

    def __init__(self, logits):
        self.logits = logits


class Linear(torch.nn.Module):
    """Its logits are the embedding of each token: (rows, places, 2), or of the first one: (rows, 2)."""

    def __init__(self, each):
        super().__init__()
        self.each, self.table = each, torch.nn.Embedding.from_pretrained(torch.tensor([[3.0, 1.0], [-1.0, -2.0]]))

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids):
        found = self.table(input_ids)
        return Said(found if self.each else found[:, 0])


@pytest.mark.parametrize(("each", "labels"), [(False, False), (False, True), (True, False), (True, True)])
def test_the_first_step_goes_against_what_is_said(each, labels):
    """Adam's first step is the rate times the sign of the slope, in units of the root mean square √15/2 of the table.

    Token 0 says label 0, or both; token 1 says label 0, or none. Padding is told apart where every place is predicted.
    """
    attack, ids = Attack(2, labels, rate=0.1), torch.tensor([[0, 1], [1, 1]])
    attack(Linear(each), torch.tensor([[True, False], [True, False]]), {"input_ids": ids})
    gradient, unit = attack._free.grad, math.sqrt(15) / 2
    rows = torch.tensor([[3.0, 1.0], [-1.0, -2.0]])
    # ∂CE/∂logits is what is predicted, less what was said.
    each_slope = rows.sigmoid() - (rows > 0).float() if labels else rows.softmax(-1) - torch.tensor([1.0, 0.0])
    wanted = each_slope.mean(0) * unit
    assert gradient.tolist() == pytest.approx(wanted.tolist(), rel=1e-5)
    attack.step()
    assert attack.by.tolist() == pytest.approx([0.1 * unit * math.copysign(1, w) for w in wanted.tolist()], rel=1e-4)


def test_the_adversary_comes_in_the_steps_of_the_mask_alone():
    """λ, mask, λ, mask, λ, mask, two steps of λ in the end, and the model that was learnt."""
    search = build(
        {**DEFENDED, "items": 4, "adversary": 0.2, "attacks": 7, "attack_lr": 0.3}, experts=2, candidates=400
    )
    found = simulate(search, reply=slopes(lambda numbers: [0.01 * (1 + i % 3) for i in range(len(numbers))]))
    asked = [c.question.loss for c in found]
    plain, disturbed = UnlabelledLoss("entropy"), UnlabelledLoss("entropy", adversary=Adversary(0.2, 7, 0.3))
    assert asked == [plain, disturbed] * 3 + [plain, plain, None]
    assert all(unpack_candidate(pack_candidate(c)) == c for c in found)


def test_it_moves_as_concrete_does_where_the_gradients_are_the_same():
    """All that differs is what is asked, and which masks are drawn."""
    reply = slopes(lambda numbers: [0.02 * math.sin(i) for i in range(len(numbers))])
    settings = {**DEFENDED, "items": 4}
    ours = build(settings, experts=2, candidates=400)
    theirs = build({**settings, "algorithm": "concrete", "learn": True}, experts=2, candidates=400)
    theirs.name = "defense_aware"  # the draws are named after the search
    one, other = ([c.recipe.id for c in simulate(search, reply=reply)] for search in (ours, theirs))
    assert one == other
    assert len(set(one)) > 5


@pytest.mark.parametrize(
    "changes", [{"adversary": 0}, {"attacks": 0}, {"attack_lr": 0}, {"loss": "distillation"}, {"learn": True}]
)
def test_bad_settings_are_refused(configured, changes):  # noqa: F811
    toys.refused(lambda: prepare(config_at(configured({**DEFENDED, **changes}))), f"search.{next(iter(changes))}")


def test_language_models_are_refused(make_config, tmp_path):
    file = make_config(tmp_path, {"search": DEFENDED})
    toys.refused(lambda: prepare(config_at(file)), "defense_aware makes the entropy of predicted labels small")


def test_a_model_without_embeddings_is_named():
    attack = Attack(1, labels=False, rate=0.1)
    module = SimpleNamespace(get_input_embeddings=lambda: None)
    with pytest.raises(ValueError, match="no embeddings of tokens"):
        attack(module, None, {"input_ids": torch.tensor([[0]])})


@pytest.mark.whole
def test_a_run_leaves_a_recipe_of_fixed_numbers(configured, tmp_path):  # noqa: F811
    folder = run_here(configured(DEFENDED, budget={"candidates": 30}), tmp_path / "results")
    *steps, (chosen, result) = read_history(storage_at(folder)).stages["search"]
    assert len(steps) == 8
    assert all(r.status == "ok" and r.loss is not None for _, r in steps)
    assert result.complete
    assert chosen.recipe.method == "task_arithmetic"
    again = run_here(configured(DEFENDED, budget={"candidates": 30}), tmp_path / "again")
    assert read_history(storage_at(again)).stages["search"][-1][0].recipe.id == chosen.recipe.id
