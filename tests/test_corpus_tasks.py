"""Tasks with corpus metrics, repeats and results of their own have the values that ``simple_evaluate`` gives."""

from __future__ import annotations

import re
from collections import defaultdict

import pytest
import torch
import toys
import yaml
from lm_eval import simple_evaluate
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from evolver.config.reading import config_at
from evolver.dashboard import views
from evolver.dashboard.overview import Overview
from evolver.driver.prepare import prepare
from evolver.evaluation.items import item_hash
from evolver.records import Candidate
from evolver.report.report import write_again
from evolver.storage import storage_at
from evolver.workers.worker import Worker

pytestmark = pytest.mark.whole

OWN = """
def references(doc):
    return [doc["question"] + " boat boat red red", "is is is " + doc["question"]]


def results(doc, answers):
    said = answers[0]
    wanted = set(doc["question"].split())
    return {
        "bleu": (references(doc), [said]),
        "shared": len(wanted & set(said.split())) / len(wanted),
        "length": len(said),
    }


def several(doc, answers):
    texts = answers[0]
    right = doc["said"].strip()
    return {"best": max(float(t.strip() == right) for t in texts), "kept": float(len(texts))}


def mean(values):
    return max(values)
"""
SAMPLED = {"until": ["\n"], "max_gen_toks": 1, "do_sample": True, "temperature": 1.5}
LETTER = {"function": "regex", "regex_pattern": "([a-z])"}
# Task → its metric in lm-eval's notation, and what ours is times when lm-eval writes it.
GREEDY = {
    "bleu": ("bleu", 100), "chrf": ("chrf", 100), "chrfpp": ("chrf++", 100), "ter": ("ter", -100),
    "own_bleu": ("bleu", 100), "own_shared": ("shared", 1), "own_length": ("length", -1),
    "brier": ("brier_score", -1), "f1": ("f1", 1),
}  # fmt: skip
DRAWN = {
    "vote": "exact_match,maj@5", "first": "exact_match,first", "single": "exact_match,maj@1", "several": "best,three",
    "kept": "kept,three",
}  # fmt: skip
DEV = 24


def listed(*metrics):
    better = {"ter": False, "length": False, "brier_score": False}
    own = {"shared": "mean", "length": "mean", "best": "mean", "kept": "mean", "exact_match": "mean"}
    return [{"metric": m, "aggregation": own.get(m, m), "higher_is_better": better.get(m, True)} for m in metrics]


@pytest.fixture(scope="module")
def own_tasks(tasks, tmp_path_factory):
    """A folder of tasks in YAML, and functions that they name."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own.py").write_text(OWN)
    written = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{question}} boat red red is is",
    }
    words = {"suppress_tokens": list(range(259))}  # of the toys' tokens, the first are special ones and bytes
    greedy = written | {"generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, **words}}
    word = written | {"doc_to_target": "s", "generation_kwargs": SAMPLED | words}
    choose = yaml.safe_load((tasks / "yesno.yaml").read_text())
    translated = greedy | {"metric_list": listed("bleu", "chrf", "chrf++", "ter")}
    measured = greedy | {"process_results": "!function own.results", "metric_list": listed("bleu", "shared", "length")}
    voted = {"name": "maj@5", "filter": [LETTER, {"function": "majority_vote"}, {"function": "take_first"}]}
    first = {"name": "first", "filter": [LETTER, {"function": "take_first"}]}
    three = {"name": "three", "filter": [{"function": "take_first_k", "k": 3}]}
    sampled = word | {"repeats": 5, "metric_list": listed("exact_match"), "filter_list": [voted, first]}
    single = sampled | {"repeats": 1, "filter_list": [voted | {"name": "maj@1"}]}
    many = word | {
        "repeats": 4, "filter_list": [three], "process_results": "!function own.several",
        "metric_list": listed("best", "kept"),
    }  # fmt: skip
    kinds = {
        **dict.fromkeys(("bleu", "chrf", "chrfpp", "ter"), translated),
        **dict.fromkeys(("own_bleu", "own_shared", "own_length"), measured),
        "brier": choose | {"metric_list": listed("brier_score")},
        "f1": choose | {"metric_list": listed("f1")},
        "vote": sampled, "first": sampled, "single": single, "several": many, "kept": many,
    }  # fmt: skip
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(tasks / "echo.jsonl")}, "test_split": "train"}
    for name, kind in kinds.items():
        text = yaml.safe_dump({**data, **kind, "task": name}, sort_keys=False)
        (folder / f"{name}.yaml").write_text(re.sub(r"'(!function [\w.]+)'", r"\1", text))
    return folder


def config_of(make_config, own_tasks, folder, metrics, **changes):
    entries = [{"task": t, "metric": m, "dev": DEV, "report": 12} for t, m in metrics.items()]
    return make_config(folder, {"evaluation.include_path": str(own_tasks), "evaluation.tasks": entries, **changes})


@pytest.fixture(scope="module")
def greedy(make_config, own_tasks, tmp_path_factory):
    metrics = {t: m for t, (m, _) in GREEDY.items()}
    folder = tmp_path_factory.mktemp("greedy")
    ready = prepare(config_at(config_of(make_config, own_tasks, folder, metrics, **{"model.compute": "float32"})))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    return ready, worker.evaluate(Candidate(0, ready.experts[0], "test"))


def by_lm_eval(lm, ready, own_tasks, names, **options):
    manager = TaskManager(include_path=str(own_tasks), include_defaults=False)
    items = ready.tasks.items.dev
    indices = {t: sorted(i.index for i in items if i.task == t) for t in names}
    return simple_evaluate(lm, tasks=list(names), task_manager=manager, samples=indices, bootstrap_iters=0, **options)


@pytest.fixture(scope="module")
def judged(greedy, own_tasks, models):
    module = AutoModelForCausalLM.from_pretrained(models / "a", dtype=torch.float32)
    lm = HFLM(pretrained=module, tokenizer=AutoTokenizer.from_pretrained(models / "a"), batch_size=1)
    return by_lm_eval(lm, greedy[0], own_tasks, GREEDY)


@pytest.mark.parametrize("task", GREEDY)
def test_values_are_those_of_lm_eval(greedy, judged, task):
    (metric, times), (_, result) = GREEDY[task], greedy
    assert result.status == "ok", result.reason
    theirs = judged["results"][task][f"{metric},none"]
    assert times * result.tasks[task] == pytest.approx(theirs, rel=1e-6)
    assert theirs != 0


@pytest.mark.parametrize("task", GREEDY)
def test_so_are_those_of_the_first_items(greedy, judged, task):
    """From what the ledger keeps: lm-eval's aggregation over its own outcomes for the same items."""
    (metric, times), (ready, result) = GREEDY[task], greedy
    scale, items = ready.tasks.scale("dev"), ready.tasks.items.dev
    outcomes = {item_hash(s["doc"]): s[metric] for s in judged["samples"][task]}
    aggregate = ready.tasks.judges[task].library.tasks[task].aggregation()[metric]
    for count in (40, 100, len(items)):
        inside = [outcomes[i.hash] for i in items[:count] if i.task == task]
        found = scale.of_tasks(result.items[:count])[task]
        assert times * found == pytest.approx(aggregate(inside), rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("parts", [2, 3])
def test_workers_that_share_the_items_have_the_same_values(greedy, parts):
    """A value of all answers is made of what every item adds to it, whoever has scored the item."""
    ready, alone = greedy
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    result = toys.shared_result(worker, Candidate(0, ready.experts[0], "test"), parts)
    same = ("status", "score", "bound", "complete", "items", "tasks")
    assert [getattr(result, n) for n in same] == [getattr(alone, n) for n in same]
    assert any(isinstance(value, tuple) for value in result.items)
    assert result.tasks.keys() == GREEDY.keys()


class Replay(LM):
    """Says what the live model said, to whatever repeat of a prompt."""

    def __init__(self, said):
        super().__init__()
        self._said = {prompt: list(texts) for prompt, texts in said.items()}

    def generate_until(self, requests, disable_tqdm=False):
        count = defaultdict(int)
        out = []
        for request in requests:
            prompt = request.args[0]
            out.append(self._said[prompt][count[prompt] % len(self._said[prompt])])
            count[prompt] += 1
        return out

    def loglikelihood(self, requests):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests):
        raise NotImplementedError


@pytest.mark.parametrize("task", DRAWN)
def test_repeats_and_filters_are_those_of_lm_eval(make_config, own_tasks, tmp_path, task):
    """A task that is sampled beside one that wants more repeats is judged by its own number of them."""
    metrics = {task: DRAWN[task]} | ({"vote": DRAWN["vote"]} if task == "single" else {})
    ready = prepare(config_at(config_of(make_config, own_tasks, tmp_path, metrics)))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    (part, _), *_ = worker.scorer.parts
    heard, write = {}, part._written

    def listen(prompts):
        found = write(prompts)
        heard.update(found.texts)
        return found

    part._written = listen
    result = worker.evaluate(Candidate(0, ready.experts[0], "test"))
    assert result.status == "ok", result.reason
    shared = toys.shared_result(Worker(ready.plan, "dev", tasks=ready.tasks), Candidate(0, ready.experts[0], "test"), 3)
    assert (shared.items, shared.tasks) == (result.items, result.tasks)
    said = {
        part.prepared[p].requests[0].args[0]: texts
        for p, texts in heard.items()
        if part.prepared[p].task.task_name == task
    }
    assert any(len(set(texts)) > 1 for texts in said.values())  # they are samples
    out = by_lm_eval(Replay(said), ready, own_tasks, [task])
    assert result.tasks[task] == pytest.approx(out["results"][task][DRAWN[task]])
    if task == "kept":
        assert result.tasks[task] == 3.0
    else:
        assert 0 < result.tasks[task] < 1


def test_an_aggregation_of_a_tasks_own_is_not_taken_for_lm_evals(make_config, own_tasks, tmp_path):
    """Its function has the name ``mean`` and takes the largest value."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name in ("own.py", "own_length.yaml"):
        text = (own_tasks / name).read_text()
        (folder / name).write_text(text.replace("aggregation: mean", "aggregation: !function own.mean"))
    file = config_of(make_config, folder, tmp_path, {"own_length": "length"})
    toys.refused(
        lambda: prepare(config_at(file)), "evaluation.tasks[0].metric: how length is computed over all items is not",
        "usable here: bleu",
    )  # fmt: skip


def test_a_run_on_corpus_metrics(make_config, own_tasks, tmp_path):
    changes = {"budget.candidates": 6, "baselines.masses": [1.0]}
    file = config_of(make_config, own_tasks, tmp_path, {"bleu": "bleu", "ter": "ter"}, **changes)
    said = toys.evolver("validate", file)
    assert said.code == 0, said.err
    assert "warning: early stopping is off for bleu, ter: the metric is computed from the answers to all" in said.err
    folder = toys.run_here(file, tmp_path / "results")
    report = (folder / "report.md").read_text()
    assert "early stopping is off for bleu, ter" in report
    assert "ter (ter, lower is better)" in report
    searched = [r for (stage, _), r in toys.rows(folder).items() if stage == "search"]
    assert all(r["complete"] for r in searched)
    assert all(len(r["item_counts"]) == 2 * DEV for r in searched)
    heat = views.heat(Overview(storage_at(folder)))
    assert len(heat["items"][0]) == 2 * DEV
    write_again(storage_at(folder), storage_at(tmp_path / "again"))
    assert (tmp_path / "again" / "report.md").read_text() == report
    again = toys.run_here(file, tmp_path / "results", toys.no_work)  # everything is known from the ledger
    assert (again / "report.md").read_text() == report


def test_halving_compares_the_values_of_first_items(make_config, own_tasks, tmp_path):
    search = {"algorithm": "halving", "of": {"algorithm": "tpe"}, "first": 8}
    changes = {"search": search, "budget.candidates": 9, "baselines.masses": [1.0]}
    file = config_of(make_config, own_tasks, tmp_path, {"chrf": "chrf"}, **changes)
    folder = toys.run_here(file, tmp_path / "results")
    sizes = {len(r["items"]) for (stage, _), r in toys.rows(folder).items() if stage == "search"}
    assert len(sizes) > 1
    search["estimate"] = "p-irt"
    file = config_of(make_config, own_tasks, tmp_path, {"chrf": "chrf"}, **changes)
    toys.refused(lambda: prepare(config_at(file)), "p-irt needs items with scores of their own from 0 to 1, and chrf")


def test_racing_is_refused(make_config, own_tasks, tmp_path):
    file = config_of(make_config, own_tasks, tmp_path, {"bleu": "bleu"}, **{"evaluation.racing": 0.05})
    toys.refused(lambda: prepare(config_at(file)), "evaluation.racing: racing needs a score from 0 to 1 for each item")
