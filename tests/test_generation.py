"""Written answers under stress: too little memory, outputs that are no numbers, judges that raise."""

from __future__ import annotations

import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.records import Candidate
from evolver.workers.worker import Worker

FREE = [{"task": "free", "metric": "exact_match", "dev": 20, "report": 4}]


@pytest.fixture
def worker(make_config, tmp_path):
    def make(**changes):
        ready = prepare(config_at(make_config(tmp_path, {"evaluation.tasks": FREE, **changes})))
        return ready.experts, Worker(ready.plan, "dev", tasks=ready.tasks)

    return make


def test_memory_that_does_not_suffice_halves_the_batch(worker, monkeypatch):
    experts, made = worker()
    expected = made.evaluate(Candidate(0, experts[0], "test"))
    (part, _), *_ = made.scorer.parts
    inner, sizes = part.lm._model_generate, []

    def generate(context, **others):
        sizes.append(len(context))
        if len(context) > 3:
            raise torch.OutOfMemoryError("out of memory")
        return inner(context=context, **others)

    monkeypatch.setattr(part.lm, "_model_generate", generate)
    found = made.evaluate(Candidate(1, experts[0], "test"))
    assert (found.status, found.items) == ("ok", expected.items)
    tried = len(sizes)
    assert max(sizes) > 3
    made.evaluate(Candidate(2, experts[1], "test"))
    assert max(sizes[tried:]) <= 3  # it is remembered


def test_outputs_that_are_no_numbers_fail_and_the_next_one_is_scored(worker, models, tmp_path):
    shutil.copytree(models / "a", tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)  # finite weights whose outputs are not
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    (broken, sound, _), made = worker(**{"experts.a": str(tmp_path / "broken")})
    first = made.evaluate(Candidate(0, sound, "test"))
    failed = made.evaluate(Candidate(1, broken, "test"))
    assert (failed.status, failed.reason) == ("failed", "FloatingPointError: the model's outputs are not finite")
    again = made.evaluate(Candidate(2, sound, "test"))
    assert (again.status, again.items) == ("ok", first.items)


FORBID = [
    {"min_new_tokens": 3},
    {"no_repeat_ngram_size": 1},
    {"do_sample": True, "top_k": 2, "temperature": 1.0},
    {"num_beams": 2, "min_new_tokens": 3},
]


@pytest.mark.parametrize("forbid", FORBID)
def test_tokens_that_are_forbidden_are_no_fault_of_the_model(worker, forbid):
    experts, made = worker(**{"evaluation.gen_kwargs": forbid})
    result = made.evaluate(Candidate(0, experts[0], "test"))
    assert result.status == "ok", result.reason


def test_a_judge_that_raises_fails_and_the_next_one_is_scored(worker, monkeypatch):
    experts, made = worker()
    first = made.evaluate(Candidate(0, experts[0], "test"))
    (part, _), *_ = made.scorer.parts

    def raising(document, answers):
        raise KeyError("said")

    with monkeypatch.context() as patch:
        patch.setattr(part.prepared[11].task, "process_results", raising)
        failed = made.evaluate(Candidate(1, experts[1], "test"))
    assert (failed.status, failed.reason, failed.items) == ("failed", "KeyError: 'said'", ())
    again = made.evaluate(Candidate(2, experts[0], "test"))
    assert (again.status, again.items) == ("ok", first.items)
