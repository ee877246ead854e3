"""The laws of judges, which every registered one is held to: what a score is, and on what it must not depend."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import toys
import yaml

from evolver.config.evaluation import TaskEntry
from evolver.config.reading import config_at, load
from evolver.driver.prepare import prepare
from evolver.evaluation.base import COMMON_KEYS
from evolver.evaluation.scores.metrics import Metric
from evolver.evaluation.scores.scoring import Scale
from evolver.evaluation.tasks import judge_named, judge_names, load_tasks
from evolver.workers.worker import Worker

pytestmark = pytest.mark.whole

# Of how many dev items a toy has at least.
ITEMS = 24
# A value of every key of a task that not every judge reads, none of them the default.
SOME = {
    "report_task": "other", "num_fewshot": 2, "gen_kwargs": {"max_gen_toks": 3}, "data": "other.jsonl",
    "report_data": "other.jsonl", "select_data": "other.jsonl", "function": "mine.py:score", "text": "sentence",
    "image": "picture", "text_pair": "second", "label": "class", "head": "a", "threshold": 0.4,
}  # fmt: skip
WEIGHTS = """
def right(model, items):
    first = next(model.module.parameters())
    return [float(first.flatten()[len(item["text"])] > 0) for item in items]

def size(model, items):
    first = next(model.module.parameters())
    return [float(first.abs().mean()) * len(item["text"]) for item in items]
"""


def language(folder: Path) -> dict[str, Any]:
    toys.make_models(folder / "models")
    toys.make_tasks(folder / "tasks", folder / "models")
    metrics = {"toy": "acc", "echo": "exact_match", "roll": "word_perplexity", "yesno": "mcc"}
    tasks = [{"task": name, "metric": metric, "dev": 8, "report": 4} for name, metric in metrics.items()]
    return toys.settings(folder / "models", folder / "tasks", {"evaluation.tasks": tasks})


def classifier(folder: Path) -> dict[str, Any]:
    toys.make_encoders(folder)
    rows = [{"text": text, "label": n % 3} for n, text in enumerate(toys.texts())]
    entry = {"data": toys.write_rows(folder / "moods.jsonl", rows), "dev": 20, "report": 4}
    return of(folder, "classifier", [{"task": "mood", **entry}, {"task": "other", "metric": "mcc", **entry}])


def token_classifier(folder: Path) -> dict[str, Any]:
    toys.make_taggers(folder)
    entry = {"data": toys.write_rows(folder / "tags.jsonl", toys.tagged()), "dev": 20, "report": 4}
    tasks = [{"task": "words", **entry}, {"task": "spans", "metric": "f1", **entry}]
    return of(folder, "token-classifier", tasks)


def reranking(folder: Path) -> dict[str, Any]:
    toys.make_rerankers(folder)
    data = toys.write_rows(folder / "ranked.jsonl", toys.ranked())
    columns = {"text": "query", "text_pair": "documents", "label": "marks"}
    tasks = [{"task": "ranks", "metric": "mrr", "data": data, "dev": 24, "report": 4, **columns}]
    return of(folder, "classifier", tasks)


def image_classifier(folder: Path) -> dict[str, Any]:
    toys.make_image_classifiers(folder)
    rows = []
    for number, (image, label) in enumerate(toys.digits()):
        (folder / f"{number}.png").write_bytes(image)
        rows.append({"image": f"{number}.png", "label": label})
    entry = {"data": toys.write_rows(folder / "digits.jsonl", rows), "dev": 20, "report": 4}
    return of(folder, "image-classifier", [{"task": "digit", **entry}, {"task": "f1", "metric": "macro_f1", **entry}])


def function(folder: Path) -> dict[str, Any]:
    toys.make_encoders(folder)
    (folder / "mine.py").write_text(WEIGHTS)
    entry = {"data": toys.write_rows(folder / "rows.jsonl", [{"text": t} for t in toys.texts()]), "report": 4}
    tasks = [
        {"task": "right", "function": f"{folder / 'mine.py'}:right", "dev": 20, **entry},
        {"task": "size", "function": f"{folder / 'mine.py'}:size", "metric": "mean", "dev": 12, **entry},
    ]
    return of(folder, "classifier", tasks)


def of(folder: Path, kind: str, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """A configuration of the models in a folder."""
    return {
        "run": "law", "model": {"base": str(folder / "base"), "kind": kind},
        "experts": {name: str(folder / name) for name in ("a", "b")},
        "search": {"algorithm": "evolver", "generations": 2}, "budget": {"candidates": 4},
        "evaluation": {"tasks": tasks},
    }  # fmt: skip


# What a judge is tried on: what writes models and data into a folder, and gives a configuration whose tasks are for it.
TOYS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "language": language, "classifier": classifier, "token-classifier": token_classifier,
    "reranking": reranking, "image-classifier": image_classifier, "function": function,
}  # fmt: skip
EVERY = pytest.mark.parametrize("name", judge_names())


def test_every_judge_has_a_toy():
    for name in judge_names():
        assert name in TOYS, (
            f"the judge {name!r} is held to no law; add to TOYS in tests/test_judge_laws.py a function that writes "
            f"models and at least {ITEMS} dev items into a folder, and returns a configuration with tasks for it"
        )
    assert set(TOYS) == set(judge_names())


@pytest.fixture(scope="module")
def configured(tmp_path_factory):
    """``configured(judge)``: a configuration whose tasks name this judge."""
    known: dict[str, dict[str, Any]] = {}

    def make(name: str) -> dict[str, Any]:
        if name not in TOYS:
            pytest.skip("test_every_judge_has_a_toy says what it lacks")
        if name not in known:
            known[name] = TOYS[name](tmp_path_factory.mktemp(name))
            for entry in known[name]["evaluation"]["tasks"]:
                entry["judge"] = name
        return known[name]

    return make


def opened(raw: dict[str, Any], folder: Path, **of_first_task: Any) -> Any:
    """A configuration, checked, with changes of its first task."""
    first, *others = raw["evaluation"]["tasks"]
    raw = {**raw, "evaluation": {**raw["evaluation"], "tasks": [{**first, **of_first_task}, *others]}}
    (folder / "run.yaml").write_text(yaml.safe_dump(raw, sort_keys=False))
    return prepare(config_at(folder / "run.yaml"))


class Judged:
    """A worker, and what a judge says of a model that is written into it."""

    def __init__(self, raw: dict[str, Any], folder: Path) -> None:
        self.ready = opened(raw, folder)
        self.items = len(self.ready.tasks.items.dev)
        assert self.items >= ITEMS
        self.worker = Worker(self.ready.plan, "dev", tasks=self.ready.tasks)
        self.scale = self.worker.scale

    def write(self, expert: int) -> None:
        self.worker.live.write(self.worker.materialiser.stream(self.ready.experts[expert]))

    def score(self, expert: int) -> list[float]:
        self.write(expert)
        return self.worker.scorer.score(0, self.items).items

    def metric(self, place: int) -> Metric:
        return self.scale.metrics[self.scale.tasks[place]]


@pytest.fixture(scope="module")
def judges(configured, tmp_path_factory):
    """``judges(name)``: a worker of this judge, which the laws share."""
    known: dict[str, Judged] = {}

    def make(name: str) -> Judged:
        if name not in known:
            known[name] = Judged(configured(name), tmp_path_factory.mktemp(name))
        return known[name]

    return make


def parts(answer):
    """The numbers of an answer: its own score, and the counts of its metric if there are any."""
    return answer if isinstance(answer, tuple) else (answer,)


@EVERY
def test_every_item_has_one_finite_answer_within_the_range_of_its_metric(judges, name):
    judged = judges(name)
    for expert in range(2):
        answers = judged.score(expert)
        assert len(answers) == judged.items
        for place, answer in enumerate(answers):
            metric = judged.metric(place)
            numbers = parts(answer)
            assert len(numbers) == 1 + metric.counts
            assert all(map(math.isfinite, numbers))
            if metric.judged and metric.best is not None:
                assert 0 <= answer <= metric.best
        for task, value in judged.scale.of_tasks(answers).items():
            metric = judged.scale.metrics[task]
            assert math.isfinite(value)
            assert metric.best is None or value <= metric.best
            assert not metric.share or value >= -1
        score = judged.scale.score(answers)
        for known in range(0, judged.items, 5):
            assert judged.scale.bound(answers[:known]) >= score


@EVERY
def test_answers_stand_at_the_places_of_their_items(judges, name):
    """Whatever the order in which they are asked for; and no others are given."""
    judged = judges(name)
    judged.write(0)
    for scorer, places in judged.worker.scorer.parts:
        own = range(len(places))
        whole = scorer.score(own).answers
        assert sorted(whole) == [*own]
        backwards = scorer.score([*reversed(own)]).answers
        some = [*own][2::3]
        assert sorted(scorer.score(some).answers) == some
        for place in own:
            assert parts(backwards[place]) == pytest.approx(parts(whole[place]), rel=1e-5)


@EVERY
def test_a_candidate_has_the_same_bits_whenever_it_is_scored(judges, name):
    judged = judges(name)
    first, other, again = judged.score(0), judged.score(1), judged.score(0)
    assert again == first == judged.score(0)
    assert other != first, "the toy of this judge must tell its experts apart"
    assert len(set(first)) > 1, "the toy of this judge must have right answers and wrong ones"


@EVERY
@pytest.mark.parametrize("block", [1, 7])
def test_blocks_of_items_have_the_answers_of_all(judges, name, block):
    """Judged answers are equal; numbers may differ by rounding, as other rows stand beside them in a forward pass."""
    judged = judges(name)
    whole, parts = judged.score(0), list[float]()
    for start in range(0, judged.items, block):
        parts += judged.worker.scorer.score(start, min(start + block, judged.items)).items
    assert len(parts) == len(whole)
    for place, (alone, among) in enumerate(zip(parts, whole, strict=True)):
        metric = judged.metric(place)
        exact = metric.judged and metric.best is not None
        assert alone == (among if exact else pytest.approx(among, rel=1e-5))


@EVERY
def test_a_worker_of_its_own_gives_the_same_bits(judges, configured, name, tmp_path):
    assert Judged(configured(name), tmp_path).score(1) == judges(name).score(1)


@EVERY
def test_a_key_that_it_does_not_read_is_refused(configured, name, tmp_path):
    raw = configured(name)
    for key in set(SOME) - judge_named(name, "here").keys:
        said = f"evaluation.tasks[0].{key}: ", f"the kind of evaluation {name} does not use"
        toys.refused(lambda key=key: opened(raw, tmp_path, **{key: SOME[key]}), *said)


def test_the_keys_that_are_tried_are_those_of_a_task():
    assert set(SOME) == set(TaskEntry.model_fields) - COMMON_KEYS
    for name in judge_names():
        assert judge_named(name, "here").keys <= set(SOME), f"the judge {name!r} reads a key that no task has"


@EVERY
def test_a_metric_that_it_does_not_have_is_refused(configured, name, tmp_path):
    said = "evaluation.tasks[0].metric", "'no such metric'", "known: "
    toys.refused(lambda: opened(configured(name), tmp_path, metric="no such metric"), *said)


@EVERY
def test_its_tasks_are_checked_without_any_weight(configured, name, tmp_path):
    """Items, metrics and right answers come from the data: the folders hold no weights here."""
    raw = configured(name)
    places = {"base": raw["model"]["base"], **raw["experts"]}
    for model, place in places.items():
        shutil.copytree(place, tmp_path / model, ignore=shutil.ignore_patterns("*.safetensors"))
    experts = {expert: str(tmp_path / expert) for expert in raw["experts"]}
    bare = {**raw, "model": {**raw["model"], "base": str(tmp_path / "base")}, "experts": experts}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(bare, sort_keys=False))
    tasks = load_tasks(load(tmp_path / "run.yaml"))
    assert len(tasks.items.dev) >= ITEMS
    for split in ("dev", "report"):
        assert len(tasks.scale(split).tasks) == len(tasks.items.of(split))


@EVERY
def test_what_a_run_keeps_of_its_scale_is_json_and_gives_the_same_scores(judges, name):
    judged = judges(name)
    answers, kept = judged.score(0), Scale.from_form(json.loads(json.dumps(judged.scale.form())))
    assert kept.tasks == judged.scale.tasks
    assert kept.of_tasks(answers) == judged.scale.of_tasks(answers)
    assert kept.score(answers) == judged.scale.score(answers)
