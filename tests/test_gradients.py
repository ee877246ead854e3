"""Statistics of gradients: held against plain loops with Transformers, of every architecture."""

from __future__ import annotations

import copy
import json

import pytest
import torch
import toys
import yaml
from test_classification import classify  # noqa: F401  # a fixture
from test_encoder_decoder import save_all, t5
from test_statistics import cache, configured, ready_of, worker_of  # noqa: F401  # fixtures
from torch.nn.functional import cross_entropy, log_softmax
from toys import texts

from evolver.errors import BadInput
from evolver.evaluation.collectors.gradients import fisher_empirical, fisher_information, importance
from evolver.evaluation.examples import LabelSet, ManyLabels, OneLabel, OneNumber
from evolver.records import Candidate
from evolver.records.recipe import Merge, Rule


class Items:
    """Examples that are there already."""

    def __init__(self, examples):
        self._examples = examples

    def examples(self):
        return iter(self._examples)


def of_run(ready, worker, expert):
    """The examples of an expert's own dev items, with the expert's weights in the worker's model."""
    worker.live.write(worker.materialiser.stream(next(e for e in ready.experts if e.name == expert)), whole=True)
    owners = ready.tasks.scale("dev").tasks
    mine = {place for place, task in enumerate(owners) if task == expert} or set(range(len(owners)))
    return list(worker.scorer.examples_at(mine))


def squares_by_hand(module, scalars):
    """Σ weight · gradient² of scalars, by the name of the parameter, dense and one after another."""
    out = {}
    for weight, scalar in scalars:
        module.zero_grad(set_to_none=True)
        scalar.backward(retain_graph=True)
        for name, parameter in module.named_parameters():
            if parameter.grad is not None:
                out[name] = out.get(name, 0) + weight * parameter.grad.double().square()
    return out


def mean_of(parts):
    names = {name for part in parts for name in part}
    return {name: sum(part.get(name, 0) for part in parts) / len(parts) for name in names}


def alike(live, found, wanted):
    """Tensors by the checkpoint's names against those by the module's; returns how many were compared."""
    owners, found = live.parameters(), dict(found)
    largest = max(float(tensor.max()) for tensor in wanted.values())  # of some, all that there is is rounding
    for name, tensor in found.items():
        other = wanted.get(owners[name][0], torch.zeros(tensor.shape)).double()
        assert tensor.dtype == torch.float32
        assert torch.allclose(tensor.double(), other, rtol=2e-3, atol=1e-7 * largest), name
    return len(found)


def copy_of(live):
    """The model for a loop of its own, with gradients of everything."""
    module = copy.deepcopy(live.module)
    for parameter in module.parameters():
        parameter.requires_grad_(True)
    return module


def test_the_fisher_information_of_a_classifier_sums_over_all_labels(configured):  # noqa: F811
    ready = ready_of(configured())
    worker = worker_of(ready)
    examples = of_run(ready, worker, "a")
    assert len(examples) == 20
    module, parts, observed = copy_of(worker.live), [], []
    for example in examples:
        logs = log_softmax(module(**example.inputs).logits[0], -1)
        parts.append(squares_by_hand(module, [(p.exp().item(), p) for p in logs]))
        observed.append(squares_by_hand(module, [(1.0, logs[example.answer.label])]))
    live = worker.live
    assert alike(live, fisher_information(live, Items(examples)), mean_of(parts)) == len(
        worker.materialiser.base.names()
    )
    assert alike(live, fisher_empirical(live, Items(examples)), mean_of(observed)) > 10
    assert not any(p.grad is not None for p in live.module.parameters())


def test_importance_is_the_size_of_weight_times_gradient_example_by_example(configured):  # noqa: F811
    ready = ready_of(configured())
    worker = worker_of(ready)
    examples = of_run(ready, worker, "b")
    module, total = copy_of(worker.live), {}
    for example in examples:
        module.zero_grad()
        cross_entropy(module(**example.inputs).logits, torch.tensor([example.answer.label])).backward()
        for name, p in module.named_parameters():
            total[name] = total.get(name, 0) + (p * p.grad).abs().detach().double() / len(examples)
    assert alike(worker.live, importance(worker.live, Items(examples)), total) > 10


def test_squares_are_taken_of_each_example_and_not_of_a_batch(configured):  # noqa: F811
    ready = ready_of(configured())
    worker = worker_of(ready)
    examples = of_run(ready, worker, "a")[:3]
    alone = [dict(fisher_information(worker.live, Items([e]))) for e in examples]
    together = dict(fisher_information(worker.live, Items(examples)))
    for name, tensor in together.items():
        assert torch.allclose(tensor, sum(a[name] for a in alone) / 3, rtol=1e-4, atol=1e-12), name


def own_texts(make_config, tmp_path, model="causal-lm", **changes):
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts(40)))
    entry = {"task": "texts", "data": str(tmp_path / "texts.jsonl"), "metric": "bits_per_byte", "dev": 5, "report": 5}
    return make_config(tmp_path, {"evaluation.tasks": [entry], **changes})


@pytest.mark.parametrize("task", ["toy", "texts"])
def test_of_a_language_model_every_next_token_is_an_answer(make_config, tmp_path, task):
    entry = {"evaluation.tasks": [{"task": "toy", "dev": 5, "report": 5}]}
    file = make_config(tmp_path, entry) if task == "toy" else own_texts(make_config, tmp_path)
    ready = ready_of(file)
    worker = worker_of(ready)
    examples = of_run(ready, worker, ready.experts[0].name)
    module, observed = copy_of(worker.live), []
    for example in examples:
        ids = example.inputs["input_ids"]
        assert ids.shape == (1, len(example.answer.labels))
        assert ids[0, 1:].tolist() == list(example.answer.labels[:-1])
        logits = module(input_ids=ids).logits[0]
        loss = cross_entropy(logits, torch.tensor(example.answer.labels), reduction="sum")
        observed.append(squares_by_hand(module, [(1.0, loss)]))
    live = worker.live
    assert alike(live, fisher_empirical(live, Items(examples)), mean_of(observed)) > 10
    one, again = (dict(fisher_information(live, Items(examples))) for _ in range(2))
    assert all(torch.equal(one[name], again[name]) for name in one)


@pytest.mark.whole
def test_of_an_encoder_decoder_the_tokens_of_the_answer_count(tasks, tmp_path):
    save_all(t5, tmp_path)
    raw = toys.settings(
        tmp_path, tasks, {"evaluation.tasks": [{"task": "toy", "metric": "acc", "dev": 4, "report": 4}]}
    )
    raw["model"]["kind"], raw["experts"] = "seq2seq", {n: str(tmp_path / n) for n in ("a", "b")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    ready = ready_of(tmp_path / "run.yaml")
    worker = worker_of(ready)
    examples, module, observed = of_run(ready, worker, "a"), copy_of(worker.live), []
    assert len(examples) == 4
    for example in examples:
        said = torch.tensor([example.answer.labels])
        loss = module(input_ids=example.inputs["input_ids"], labels=said).loss * said.numel()
        observed.append(squares_by_hand(module, [(1.0, loss)]))
    assert alike(worker.live, fisher_empirical(worker.live, Items(examples)), mean_of(observed)) > 10


def test_drawn_labels_expect_the_sum_over_all_answers():
    """Two places with three labels each: the mean over 4000 seeds is the Fisher information of both together."""
    scores = torch.tensor([[[0.3, -0.5, 1.0], [2.0, 0.1, 0.0]]], dtype=torch.float64, requires_grad=True)
    answer = ManyLabels([0, 1], [0, 1])

    def square(term):
        return torch.autograd.grad(term, scores)[0].square()

    mean = sum(square(answer.expected(scores, seed)[0][1]) for seed in range(4000)) / 4000
    p = scores[0].softmax(-1).detach()
    wanted = p * (1 - p)  # of a logit itself: E (1[y = k] - p)²
    assert torch.allclose(mean[0], wanted, atol=4 * 0.25 / 4000**0.5)


def test_sets_and_numbers_have_the_information_of_their_distributions():
    scores = torch.tensor([[0.7, -1.2]], dtype=torch.float64, requires_grad=True)

    def information(answer):
        return sum(w * torch.autograd.grad(s, scores, retain_graph=True)[0].square()
                   for w, s in answer.expected(scores, 0))  # fmt: skip

    p = scores.detach().sigmoid()
    assert torch.allclose(information(LabelSet(frozenset())), p * (1 - p))
    q = scores.detach().softmax(-1)
    assert torch.allclose(information(OneLabel(0)), q * (1 - q), atol=1e-6)
    number = torch.tensor([[3.0]], requires_grad=True)
    ((weight, scalar),) = OneNumber(1.0).expected(number, 0)
    assert weight * torch.autograd.grad(scalar, number)[0].square() == 1
    assert torch.autograd.grad(OneNumber(1.0).loss(number), number)[0] == 2
    both = LabelSet(frozenset({0})).loss(scores)
    assert torch.allclose(both, -(p[0, 0].log() + (1 - p[0, 1]).log()).float())
    assert OneLabel(-1).empirical(scores) == OneLabel(2).empirical(scores) == []


def test_weights_that_are_no_floating_numbers_have_no_gradient(configured):  # noqa: F811
    ready = ready_of(configured())
    worker = worker_of(ready)
    examples, module = of_run(ready, worker, "a"), worker.live.module
    whole = module.classifier.weight.data
    module.classifier.weight = torch.nn.Parameter(whole.to(torch.int8), requires_grad=False)
    with pytest.raises(BadInput, match=r"model\.base: classifier\.weight .* is quantised .*; choose a merge method"):
        list(fisher_information(worker.live, Items(examples)))


def test_items_whose_answers_the_model_does_not_know_are_no_examples(configured):  # noqa: F811
    ready = ready_of(configured())
    worker = worker_of(ready)
    first, second, *_ = of_run(ready, worker, "a")
    unknown = type(first)(first.inputs, OneLabel(-1))
    both = dict(fisher_empirical(worker.live, Items([unknown, second])))
    one = dict(fisher_empirical(worker.live, Items([second])))
    assert all(torch.equal(both[name], one[name]) for name in one)
    with pytest.raises(BadInput, match="no item has an answer that the model knows"):
        list(importance(worker.live, Items([unknown])))


def test_a_worker_merges_by_the_formula(configured):  # noqa: F811
    """λ Σ w F τ / Σ w F, in float64, with statistics from a worker of its own."""
    ready = ready_of(configured(search={"algorithm": "tpe", "method": "fisher"}))
    worker = worker_of(ready)
    asked = ready.search.space.statistics
    assert [(s.collected, s.of.name) for s in asked] == [("fisher", "a"), ("fisher", "b")]
    settings = Rule.of({"weight": (0.3, 0.7), "lambda": 0.8, "floor": 1e-6, "power": 0.5})
    recipe = Merge("fisher", ready.experts, ready.base, (settings,), asked)
    assert worker.evaluate(Candidate(0, recipe, "test")).status == "ok"
    merged, base = dict(worker.materialiser.stream(recipe)), ready.opened.base
    information = [dict(fisher_information(worker.live, Items(of_run(ready, worker, e.name)))) for e in ready.experts]
    moved = 0
    for name, tensor in merged.items():
        origin = base.tensor(name).double()
        shares = [w * f[name].double().clamp(min=1e-6).sqrt() for w, f in zip((0.3, 0.7), information, strict=True)]
        deltas = [ready.opened.experts[e.name].tensor(name).double() - origin for e in ready.experts]
        wanted = origin + 0.8 * sum(s * d for s, d in zip(shares, deltas, strict=True)) / sum(shares)
        assert torch.allclose(tensor.double(), wanted, atol=1e-6), name
        moved += not torch.allclose(tensor.double(), origin + 0.4 * sum(deltas), atol=1e-4)
    assert moved > 10
