"""Our per-item scores are lm-eval's, whatever way they are computed."""

from __future__ import annotations

import shutil

import pytest
import torch
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from evolver.evaluation import language
from evolver.evaluation.items import item_hash
from evolver.evaluation.loglikelihood import LogLikelihoods
from evolver.export import export
from evolver.records import Candidate, Cross, Merge, Rule
from evolver.run import prepare
from evolver.worker import Worker

METRICS = {"toy": "acc", "pair": "acc_norm", "echo": "exact_match", "last": "acc", "long": "acc"}
DEV = {"toy": 60, "pair": 40, "echo": 30, "last": 30, "long": 8}


def entries(names):
    return [{"task": n, "metric": METRICS[n], "dev": DEV[n], "report": 4} for n in names]


@pytest.fixture(scope="module")
def prepared(make_config, tmp_path_factory):
    return prepare(str(make_config(tmp_path_factory.mktemp("language"), {"evaluation.tasks": entries(METRICS)})))


@pytest.fixture(scope="module")
def worker(prepared):
    return Worker(prepared.plan, "dev", tasks=prepared.tasks)


@pytest.fixture(scope="module")
def recipe(prepared):
    """Task arithmetic of a crossover and two experts: near to the average, so that the toys are partly solved."""
    a, b, c = prepared.experts
    child = Cross(a, (b,), "evolver", 0.3, 0.5, seed=5)
    rule = Rule.of({"weight": (0.4, 0.3, 0.3), "lambda": 1.0, "normalize": False})
    return Merge("task_arithmetic", (child, b, c), prepared.base, (rule,))


@pytest.fixture(scope="module")
def exported(worker, recipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "model"
    export(recipe, worker.materialiser, folder, {})
    return folder


@pytest.fixture(scope="module")
def judged(exported, tasks):
    """What lm-eval says of every document of every task, by (task, index)."""
    module = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    lm = HFLM(pretrained=module, tokenizer=AutoTokenizer.from_pretrained(exported), batch_size=1)
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    out = simple_evaluate(lm, tasks=list(METRICS), task_manager=manager, log_samples=True, bootstrap_iters=0)
    return {(name, s["doc_id"]): s for name, samples in out["samples"].items() for s in samples}


@pytest.fixture(scope="module")
def written(worker, recipe):
    """The worker with the recipe's weights in its live model."""
    worker.live.write(worker.materialiser.stream(recipe))
    return worker


@pytest.fixture(scope="module")
def scores(prepared, written):
    items = prepared.tasks.items.dev
    return dict(zip(items, written.scorer.score(0, len(items)), strict=True))


@pytest.mark.parametrize("task", METRICS)
def test_scores_are_those_of_lm_eval(scores, judged, task):
    ours = {i.index: v for i, v in scores.items() if i.task == task}
    assert len(ours) == DEV[task]
    assert ours == {index: judged[task, index][METRICS[task]] for index in ours}
    assert 0 < sum(ours.values()) < len(ours)  # neither all right nor all wrong: the comparison says something


def test_items_are_aligned_by_their_content(scores, judged):
    assert all(item.hash == item_hash(judged[item.task, item.index]["doc"]) for item in scores)


@pytest.fixture(scope="module")
def groups(written):
    prepared = written.scorer.items
    chosen = {i: p.requests for i, p in enumerate(prepared) if p.requests[0].request_type == "loglikelihood"}
    return {i: written.scorer.lm.tokens(requests) for i, requests in chosen.items()}


def forward(worker, groups, batch_tokens=2048, packs=True):
    likelihoods = LogLikelihoods(worker.live, batch_tokens, worker.scorer.lm.max_length)
    assert likelihoods.packs
    likelihoods.packs = packs
    return likelihoods(groups)


def assert_same(some, others, tolerance):
    assert some.keys() == others.keys()
    for number, answers in some.items():
        for (value, greedy), (other, also) in zip(answers, others[number], strict=True):
            assert value == pytest.approx(other, abs=tolerance)
            assert greedy == also
        values, rest = ([v for v, _ in a] for a in (answers, others[number]))
        assert values.index(max(values)) == rest.index(max(rest))


def test_packed_rows_say_what_separate_rows_say(written, groups):
    assert_same(forward(written, groups), forward(written, groups, packs=False), 1e-4)


@pytest.mark.parametrize("packs", [True, False])
def test_batches_do_not_matter(written, groups, packs):
    one_by_one = forward(written, groups, batch_tokens=64, packs=packs)
    assert_same(one_by_one, forward(written, groups, batch_tokens=2048, packs=packs), 1e-4)


def test_over_long_prompts_are_cut_as_lm_eval_cuts_them(prepared, written, groups, judged):
    answers, compared = forward(written, groups), 0
    for number, item in enumerate(prepared.tasks.items.dev):
        if item.task == "long":
            compared += 1
            assert min(len(c) for c, _ in groups[number].pairs) > written.scorer.lm.max_length
            theirs = [float(r[0]) for r in judged["long", item.index]["filtered_resps"]]
            assert [v for v, _ in answers[number]] == pytest.approx(theirs, abs=1e-4)
    assert compared == DEV["long"]


def test_live_model_is_the_exported_model(written, exported):
    module = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    ids = torch.arange(3, 103)[None]
    with torch.inference_mode():
        assert torch.equal(written.live.module(ids).logits, module(ids).logits)


def test_parts_of_the_items_add_up(written, scores):
    count = len(scores)
    parts = [v for start in range(0, count, 7) for v in written.scorer.score(start, min(count, start + 7))]
    assert parts == list(scores.values())


def test_a_broken_model_fails_and_the_next_one_is_scored(make_config, models, tmp_path):
    shutil.copytree(models / "a", tmp_path / "broken")
    tensors = load_file(tmp_path / "broken" / "model.safetensors")
    tensors["model.norm.weight"].fill_(3e38)  # finite weights whose outputs are not
    save_file(tensors, tmp_path / "broken" / "model.safetensors", metadata={"format": "pt"})
    ready = prepare(str(make_config(tmp_path, {"experts.a": str(tmp_path / "broken")})))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    broken, sound, _ = ready.experts
    first = worker.evaluate(Candidate(0, sound, "test"))
    failed = worker.evaluate(Candidate(1, broken, "test"))
    again = worker.evaluate(Candidate(2, sound, "test"))
    assert (failed.status, failed.score, failed.items) == ("failed", None, ())
    assert "not finite" in failed.reason
    assert (again.status, again.items) == ("ok", first.items)


def test_examples_in_the_prompt_are_drawn_as_lm_eval_draws_them(make_config, tmp_path, tasks, models):
    ready = prepare(str(make_config(tmp_path, {"evaluation.num_fewshot": 2})))
    items = ready.tasks.items.dev
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    again = ready.tasks.scorer(worker.live, "dev")  # the second time in a process as the first time
    base = AutoModelForCausalLM.from_pretrained(models / "base", dtype=torch.float32)
    lm = HFLM(pretrained=base, tokenizer=AutoTokenizer.from_pretrained(models / "base"), batch_size=1)
    out = simple_evaluate(
        lm,
        tasks=["toy"],
        num_fewshot=2,
        fewshot_random_seed=1,
        samples={"toy": sorted(i.index for i in items)},
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
    )
    theirs = {item_hash(s["doc"]): s["arguments"][0][0] for s in out["samples"]["toy"]}
    expected = [theirs[i.hash] for i in items]
    assert expected[0].count("Question:") == 3
    assert [p.requests[0].args[0] for p in worker.scorer.items] == expected
    assert [p.requests[0].args[0] for p in again.items] == expected


def test_own_tasks_do_not_wait_for_the_index_of_lm_eval(make_config, tmp_path, monkeypatch):
    def only_own(include_path=None, include_defaults=True):
        assert not include_defaults
        return TaskManager(include_path=include_path, include_defaults=include_defaults)

    monkeypatch.setattr(language, "TaskManager", only_own)
    assert len(prepare(str(make_config(tmp_path))).tasks.items.dev) == 40
