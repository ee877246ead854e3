"""A run as a bundle, its tables as CSV, and what is said of it before it starts: with toys, from end to end."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
from html.parser import HTMLParser

import pytest
import toys
import yaml
from toys import evolver, refusal

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.evaluation.items import item_hash
from evolver.runs.history import read_history
from evolver.storage import storage_at

pytestmark = pytest.mark.whole

TASKS = [
    {"task": "toy", "dev": 20, "select": 20, "report": 30},
    {"task": "pair", "dev": 15, "select": 15, "report": 20},
]


@pytest.fixture(scope="module")
def file(make_config, tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("config"), {"budget.candidates": 6, "evaluation.tasks": TASKS})


@pytest.fixture(scope="module")
def run(file, tmp_path_factory):
    """The folder of a finished run."""
    return toys.run_here(file, tmp_path_factory.mktemp("results"))


class Page(HTMLParser):
    """The links of a page, and what it loads."""

    def __init__(self, text):
        super().__init__()
        self.links, self.loaded = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.links += [found["href"]] if tag == "a" else []
        self.loaded += [value for key, value in found.items() if key == "src" or (tag == "link" and key == "href")]


def table(path):
    return list(csv.DictReader(io.StringIO(path.read_text())))


def test_a_bundle_opens_from_a_disk(run, tmp_path):
    done = evolver("bundle", run, "--out", tmp_path / "shared")
    assert (done.code, done.err) == (0, "")
    files = {p.name for p in (tmp_path / "shared").iterdir()}
    page = Page((tmp_path / "shared" / "index.html").read_text())
    assert set(page.links) == files - {"index.html"}
    assert page.loaded == []
    report = Page((tmp_path / "shared" / "report.html").read_text())
    assert all(source.startswith("data:") for source in report.loaded)
    assert report.loaded
    assert (tmp_path / "shared" / "recipe.json").read_text() == toys.winner(run)
    assert yaml.safe_load((tmp_path / "shared" / "config.yaml").read_text())["run"] == "toy"
    assert (tmp_path / "shared" / "report.md").read_text() == (run / "report.md").read_text()
    assert not [f for f in files if f.endswith(".safetensors") or f == "ledger"]
    assert sum(p.stat().st_size for p in (tmp_path / "shared").iterdir()) < 2_000_000


def test_a_bundle_is_called_after_its_run(run, tmp_path):
    done = evolver("bundle", run, cwd=tmp_path)
    assert done.code == 0
    assert done.out.splitlines()[-1] == "toy-bundle/index.html"
    assert (tmp_path / "toy-bundle" / "index.html").exists()


def test_what_cannot_be_bundled_is_refused_and_nothing_is_written(run, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    done = evolver("bundle", run, "--out", tmp_path / "full")
    assert "is there already and not empty" in refusal(done.code, done.err)
    assert [p.name for p in (tmp_path / "full").iterdir()] == ["mine.txt"]
    done = evolver("bundle", tmp_path / "full", "--out", tmp_path / "new" / "deep")
    assert "there is no run in this folder" in refusal(done.code, done.err)
    done = evolver("bundle", run, "--out", run / "bundle")
    assert "is the folder of a run" in refusal(done.code, done.err)
    shutil.copytree(run, tmp_path / "begun")
    (tmp_path / "begun" / "best.json").unlink()
    done = evolver("bundle", tmp_path / "begun", "--out", tmp_path / "new" / "deep")
    assert "the run is not finished" in refusal(done.code, done.err)
    assert not (tmp_path / "new").exists()


def test_the_tables_agree_with_the_ledger(run, tmp_path):
    assert evolver("report", run, "--out", tmp_path).code == 0
    outcome = read_history(storage_at(run)).outcome()
    scores = {(r["model"], r["split"], r["task"]): r for r in table(tmp_path / "scores.csv")}
    for finalist in outcome.finalists:
        for split, result in {"dev": finalist.dev, "select": finalist.select, "report": finalist.report}.items():
            if result is None:
                continue
            assert scores[finalist.label, split, ""]["value"] == str(result.score)
            for task, value in result.tasks.items():
                assert scores[finalist.label, split, task]["value"] == str(value)
    assert scores["winner", "report", "toy"]["items"] == "30"
    assert {r["split"] for r in scores.values()} == {"dev", "select", "report"}
    settings = table(tmp_path / "settings.csv")
    assert {r["model"] for r in settings} >= {"winner", "average"}
    tuned = next(m for m in (r["model"] for r in settings) if m.startswith("task_arithmetic@"))
    assert f"{float(tuned.partition('@')[2])}" in {r["value"] for r in settings if r["setting"] == "lambda"}


def test_the_report_has_the_sections(run):
    text = (run / "report.md").read_text()
    for head in ("What these scores can show", "The settings of the merges", "All scores"):
        assert f"\n## {head}\n" in text
    assert "The score of a model is (toy (acc) + pair (acc)) / 2." in text
    assert re.search(r"The 35 select items can show a difference of [\d.]+ points", text)
    assert re.search(r"The 50 report items can show a difference of [\d.]+ points", text)
    summary = json.loads((run / "summary.json").read_text())
    assert summary["corrected_dev"] is None or 0 <= summary["corrected_dev"] <= 1
    assert set(summary["ahead"]) >= {"average"}


def test_validate_says_what_the_items_can_show(file, run, tmp_path):
    done = evolver("validate", file, cwd=tmp_path)
    assert done.code == 0
    assert "The 35 select items can show a difference of" in done.out
    assert "between models that score differently on" in done.out
    assert list(tmp_path.iterdir()) == []


def test_validate_rests_on_experts_that_are_scored_already(file, run, tmp_path):
    shutil.copytree(run, tmp_path / "results" / "toy")
    done = evolver("validate", file, cwd=tmp_path)
    line = next(line for line in done.out.splitlines() if "The 50 report items" in line)
    assert "between models that differ as often" in line
    assert f"- {line}" in (run / "report.md").read_text()
    other = yaml.safe_load(file.read_text()) | {"seed": 5}  # other items, so the scores say nothing of them
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    assert "as often" not in evolver("validate", tmp_path / "other.yaml", cwd=tmp_path).out


def test_worthwhile_may_change_between_two_calls(file, run, tmp_path, make_config):
    shutil.copytree(run, tmp_path / "toy")
    changed = yaml.safe_load(file.read_text()) | {"worthwhile": 3}
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(changed))
    again = toys.run_here(tmp_path / "again.yaml", tmp_path, toys.no_work)
    assert toys.essence(again) == toys.essence(run)
    assert toys.winner(again) == toys.winner(run)
    assert "for 3 points (`worthwhile`) it would take" in (again / "report.md").read_text()
    for value in (0, -1, "much"):
        (tmp_path / "bad.yaml").write_text(yaml.safe_dump(changed | {"worthwhile": value}))
        done = evolver("validate", tmp_path / "bad.yaml")
        assert "worthwhile" in refusal(done.code, done.err)


def test_an_older_run_without_clusters_and_overlap_still_opens(run, tmp_path):
    shutil.copytree(run, tmp_path / "older" / "toy")
    about = json.loads((tmp_path / "older" / "toy" / "about.json").read_text())
    del about["overlap"]
    for scale in about["scales"].values():
        del scale["clusters"]
    (tmp_path / "older" / "toy" / "about.json").write_text(json.dumps(about))
    assert evolver("report", tmp_path / "older" / "toy", "--out", tmp_path / "out").code == 0
    assert (tmp_path / "out" / "report.md").read_text() == (run / "report.md").read_text()


# Source documents, and items among training texts


def test_tasks_over_the_same_documents_share_them(make_config, tmp_path):
    """yesno asks other questions of the documents of toy."""
    both = [{"task": "toy", "dev": 20, "report": 30}, {"task": "yesno", "metric": "f1", "dev": 20, "report": 30}]
    tasks = prepare(config_at(make_config(tmp_path, {"evaluation.tasks": both})), weights=False).tasks
    scale, items = tasks.scale("report"), tasks.items.report
    assert scale.clusters
    for one, item in zip(scale.clusters, items, strict=True):
        assert {i.hash for c, i in zip(scale.clusters, items, strict=True) if c == one} == {item.hash}
    alone = prepare(config_at(make_config(tmp_path, {"evaluation.tasks": both[:1]})), weights=False).tasks
    assert alone.scale("report").clusters == ()


def rows(count, label="good"):
    return [{"text": f"the {toys.COLOURS[n % 6]} {toys.THINGS[n // 6 % 6]} {n}", "label": label} for n in range(count)]


@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifiers")
    toys.make_encoders(folder)
    return folder


def classifier_config(models, tmp_path, lines):
    data = toys.write_rows(tmp_path / "rows.jsonl", lines)
    raw = {
        "run": "moods", "model": {"base": str(models / "base"), "kind": "classifier"},
        "experts": {n: str(models / n) for n in ("a", "b")}, "search": {"algorithm": "evolver"},
        "budget": {"candidates": 3},
        "evaluation": {"tasks": [{"task": "moods", "data": data, "dev": 20, "select": 5, "report": 20}]},
    }  # fmt: skip
    (tmp_path / "moods.yaml").write_text(yaml.safe_dump(raw))
    return tmp_path / "moods.yaml"


def test_rows_with_the_same_text_are_one_document(classifiers, tmp_path):
    file = classifier_config(classifiers, tmp_path, [*rows(40), *rows(40, "bad")])
    scale = prepare(config_at(file), weights=False).tasks.scale("report")
    assert 0 < max(scale.clusters) + 1 < 20
    own = classifier_config(classifiers, tmp_path, rows(60))
    assert prepare(config_at(own), weights=False).tasks.scale("report").clusters == ()


def test_items_that_an_expert_was_trained_on_are_named(classifiers, tmp_path):
    models = tmp_path / "models"
    shutil.copytree(classifiers, models)
    lines = rows(60)
    file = classifier_config(models, tmp_path, lines)
    done = evolver("validate", file, cwd=tmp_path)
    assert (done.code, done.err) == (0, "")
    (models / "a" / "training.json").write_text(json.dumps({"texts": [item_hash(r["text"]) for r in lines]}))
    (models / "b" / "training.json").write_text(json.dumps({"texts": [item_hash("another text")]}))
    done = evolver("validate", file, cwd=tmp_path)
    assert done.err.startswith(
        "warning: expert a was trained on the texts of 20 of 20 dev items, 5 of 5 select items and 20 of 20 report "
        "items, so its scores on them"
    )
    assert "None of the run's items is among the training texts of b." in done.out
    folder = toys.run_here(file, tmp_path / "results")
    text = (folder / "report.md").read_text()
    assert "> Warning: expert a was trained on the texts of" in text
    assert "Expert a was trained on the texts of 20 of 20 dev items" in text
    assert "None of the run's items is among the training texts of b." in text


def test_the_prompts_of_a_language_task_are_compared(make_config, models, tmp_path):
    """An expert that was trained on prompts, and one on whole texts of its own data."""
    changes = {
        "evaluation.tasks": [
            {"task": "toy", "dev": 5, "report": 8},
            {"task": "roll", "metric": "bits_per_byte", "dev": 2, "report": 3},
        ]
    }
    tasks = prepare(config_at(make_config(tmp_path, changes)), weights=False).tasks
    texts = tasks.texts("report")
    judge = tasks.judges["toy"]
    for item, found in zip(tasks.items.report, texts, strict=True):
        document = judge._documents[item.task][item.index]
        prompt = f"Question: {document['question']}\nAnswer:" if item.task == "toy" else document["question"]
        assert found == item_hash(prompt)
