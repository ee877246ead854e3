"""Items on which winner and best expert differ: which ones, and how a report shows what everybody said."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import toys
from test_report import outcome, result

from evolver.evaluation.base import ItemText, shortened
from evolver.evaluation.scores.metrics import JUDGED, Metric, mcc, opposite, pearson
from evolver.evaluation.scores.scoring import Scale
from evolver.report.examples import EXAMPLES_FILE, MOST, compared_items, examples_section, few, read_texts, write_texts
from evolver.report.html import html_page
from evolver.report.report import write_report
from evolver.report.text import escaped, fenced
from evolver.storage import storage_at

MARKUP = "| <script>alert('x')</script> ![p](../secret.png) **b** `c` _d_ ~~e~~ [f](http://g) \\ &amp; ```"


def finished(winner, expert, of=None, said=()):
    """A finished run with these answers on the report set; ``said``: the winner's and the expert's, in words."""
    done = outcome([1.0] * len(winner), [1.0] * len(winner))
    of = of or Scale(("t",) * len(winner), {"t": 1.0}, {"t": JUDGED})
    reports = {"winner": result(winner, of), "a": result(expert, of)}
    worst = replace(reports["a"], score=-99.0)
    for label, words in zip(reports, said, strict=False):
        reports[label] = replace(reports[label], said=words)
    finalists = tuple(replace(f, report=reports.get(f.label, worst)) for f in done.finalists)
    about = replace(done.about, scales={**done.scales, "report": of})
    return replace(done, about=about, finalists=finalists)


class Words(HTMLParser):
    """The texts of a page, and its tags."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_the_differences_of_judged_items():
    found = compared_items(finished([1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 1.0, 0.0]))
    assert (found.won, found.lost) == ({"t": [0]}, {"t": [1]})


@pytest.mark.parametrize(
    ("metric", "right", "winner", "expert", "won", "lost"),
    [
        # Classes: class 2 is no better than class 1 where class 0 is right.
        (Metric("mcc", mcc), (0.0, 1.0, 0.0), [0.0, 0.0, 2.0], [1.0, 1.0, 1.0], [0], [1]),
        # Numbers: whoever is nearer, the largest difference first.
        (Metric("pearson", pearson), (3.0, 3.0, 3.0), [2.9, 4.0, 0.0], [4.0, 0.0, 1.0], [1, 0], [2]),
        # Errors: less is better.
        (Metric("median", opposite, None, negative=True), (0.0, 0.0, 0.0), [1.0, 5.0, 2.0], [2.0, 4.0, 2.0], [0], [1]),
    ],
)
def test_better_is_what_the_metric_takes_for_it(metric, right, winner, expert, won, lost):
    of = Scale(("t",) * 3, {"t": 1.0}, {"t": metric}, right)
    done = finished(winner, expert, of)
    found = compared_items(done)
    assert (found.won["t"], found.lost["t"]) == (won, lost)


def test_the_examples_are_taken_from_the_tasks_in_turn():
    assert few({"a": [1, 2, 3, 4, 5, 6], "b": [7], "c": []}) == [1, 7, 2, 3]
    assert len(few({"a": list(range(99))})) == MOST
    assert few({}) == []


def test_a_report_shows_prompts_and_both_answers():
    words = ("yes", "no", "maybe"), ("no", "yes", "maybe")
    done = finished([1.0, 0.0, 1.0], [0.0, 1.0, 1.0], said=words)
    texts = {0: ItemText("Is it?\nSay.", "yes"), 1: ItemText("Was it?", "yes")}
    text = examples_section(done, texts)
    assert (
        "On 1 of 3 report items the winner answers better than a, on 1 worse, and on the other 1 equally well." in text
    )
    assert "| t | 1 | 1 | 1 |" in text
    assert "```text\nIs it?\nSay.\n```\n\n- right: yes\n- **winner**: yes\n- a: no" in text
    assert text.index("### Won: 1 of 1") < text.index("Is it?") < text.index("### Lost: 1 of 1") < text.index("Was it?")
    assert "maybe" not in text  # both say it


def test_no_report_scores_no_examples():
    done = finished([1.0], [0.0])
    *others, winner = done.finalists
    failed = replace(winner.report, status="failed", score=None, items=())
    assert examples_section(replace(done, finalists=(*others, replace(winner, report=failed))), {}) == ""


def test_what_is_missing_is_said():
    texts = {0: ItemText("one", ""), 1: ItemText("two", "")}
    old = examples_section(finished([1.0, 0.0], [0.0, 1.0]), {})
    assert "The run's folder does not hold the texts of the items of t." in old
    assert "An earlier version of Evolver made this run and kept scores only" in old
    assert "###" not in old  # an example would hold two numbers and nothing else
    own = examples_section(finished([1.0, 0.25], [0.5, 1.0], said=(("", ""), ("", ""))), texts)
    assert "The kind of evaluation of t gives scores but no answers in words, so the scores are shown." in own
    assert "- **winner**: score 0.25\n- a: score 1" in own
    assert "right:" not in own


def test_texts_are_shown_as_they_are(tmp_path):
    """Nothing in a prompt, an answer or a task's name is taken for Markdown or HTML."""
    of = Scale((MARKUP,) * 2, {MARKUP: 1.0}, {MARKUP: JUDGED})
    done = finished([1.0, 0.0], [0.0, 1.0], of, said=((MARKUP, MARKUP), ("b", "b")))
    text = examples_section(done, {0: ItemText(f"{MARKUP}\n{MARKUP}", MARKUP), 1: ItemText("x")})
    page = Words(html_page(text, "title", storage_at(tmp_path).read))
    assert not {"script", "img", "a", "s"} & set(page.tags)
    joined = "".join(page.texts)
    assert f"{MARKUP}\n{MARKUP}\n" in joined  # the prompt
    # The task in the table; of the first item task, prompt (twice), right answer, answer; of the second task, answer.
    assert joined.count(MARKUP) == 1 + (1 + 2 + 1 + 1) + (1 + 1)
    assert page.tags.count("td") == 4


@pytest.mark.parametrize("text", [MARKUP, "a_b _c_ __d__", "*", "a\\|b", "x\n# y"])
def test_escaped_text_comes_out_as_it_went_in(text, tmp_path):
    page = Words(html_page(f"| {escaped(text)} |\n| --- |", "title", storage_at(tmp_path).read))
    assert " ".join(text.split()) in "".join(page.texts)
    assert set(page.tags) & {"em", "strong", "img", "a", "h1", "code"} == set()


def test_a_fence_is_longer_than_any_in_the_text():
    assert fenced("a ```` b").splitlines()[0] == "`````text"
    assert fenced("a").splitlines() == ["```text", "a", "```"]


def test_shortened_texts_keep_both_ends():
    assert shortened("abc", 3) == "abc"
    short = shortened("a" * 50 + "b" * 50, 21)
    assert len(short) == 21
    assert re.fullmatch(r"a+ \[…\] b+", short)


def test_texts_are_read_as_they_were_written(tmp_path):
    folder = storage_at(tmp_path)
    texts = {7: ItemText("p" * 2000, "ü\n|"), 2: ItemText("")}
    write_texts(folder, texts)
    assert read_texts(folder) == {7: ItemText(shortened("p" * 2000, 600), "ü\n|"), 2: ItemText("")}


@pytest.mark.parametrize("broken", [None, b"", b"[1]", b'{"a": 1}', b'{"1": [1, 2, 3]}', b"\xff"])
def test_a_broken_file_of_texts_is_none(tmp_path, broken):
    if broken is not None:
        (tmp_path / EXAMPLES_FILE).write_bytes(broken)
    assert read_texts(storage_at(tmp_path)) == {}


def test_a_picture_that_a_reason_names_is_not_looked_for(tmp_path):
    done = finished([1.0], [0.0])
    failed = replace(done.searched[1][1], reason="![p](../secret.png) | <b>")
    write_report(
        storage_at(tmp_path),
        replace(done, searched=(done.searched[0], (done.searched[1][0], failed))),
        {"items": 1, "equal": 1},
    )
    page = (tmp_path / "report.html").read_text()
    assert "<td>![p](../secret.png) | &lt;b&gt;</td>" in page


# Whole runs.


def shown(folder):
    """Of the report's examples the prompt, and of both who said what."""
    text = (folder / "report.md").read_text()
    pattern = r"```text\n(.*?)\n```\n\n(?:- right: (.*?)\n)?- \*\*winner\*\*: (.*?)\n- \w+: (.*?)\n"
    return re.findall(pattern, text, re.DOTALL)


@pytest.mark.whole
def test_choices_and_written_answers(make_config, tasks, tmp_path):
    """Of a real run: who is said to have won gives the right answer, and the texts are those of the data."""
    both = [{"task": "toy", "dev": 10, "report": 60}, {"task": "echo", "metric": "exact_match", "dev": 5, "report": 25}]
    folder = toys.run_here(
        make_config(tmp_path, {"evaluation.tasks": both, "search.generations": 9, "budget.candidates": 12}), tmp_path
    )
    questions = {
        line["question"]: line
        for name in ("toy", "echo")
        for line in map(json.loads, (tasks / f"{name}.jsonl").read_text().splitlines())
    }
    text = (folder / "report.md").read_text()
    examples = shown(folder)
    assert examples
    kinds = set()
    for prompt, right, winner, expert in examples:
        won = text.index(prompt) < text.index("### Lost") if "### Lost" in text else True
        assert winner != expert
        assert (winner if won else expert) == right
        choices = "Answer:" in prompt
        kinds.add(choices)
        line = questions[prompt.removeprefix("Question: ").partition("\n")[0]]
        options = [escaped(o) for o in line["choices"]] if choices else None
        assert right == (options[line["answer"]] if choices else escaped(line["said"]))
        assert not choices or {winner, expert} <= set(options)
    assert kinds == {True, False}
    before = text, (folder / "report.html").read_text()
    toys.run_here(tmp_path / "run.yaml", tmp_path, toys.no_work)
    assert ((folder / "report.md").read_text(), (folder / "report.html").read_text()) == before
    toys.evolver("report", folder, "--out", tmp_path / "again")
    assert (tmp_path / "again" / "report.md").read_text() == before[0]


@pytest.mark.whole
def test_a_run_whose_texts_are_lost_has_a_report(make_config, tmp_path):
    folder = toys.run_here(make_config(tmp_path, {"search.generations": 9, "budget.candidates": 12}), tmp_path)
    with_texts = shown(folder)
    assert with_texts
    (folder / EXAMPLES_FILE).unlink()
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert toys.evolver("report", copy).code == 0
    assert "The run's folder does not hold the texts of the items of toy." in (copy / "report.md").read_text()
    assert shown(copy) == []


@pytest.mark.whole
def test_a_function_of_the_user_s_own(make_config, tasks, tmp_path):
    (tmp_path / "mine.py").write_text(
        "def score(model, items):\n"
        "    told = float(next(model.module.parameters()).double().sum())\n"
        "    return [(told * (7 + len(i['question']))) % 1.0 for i in items]\n"
    )
    task = {
        "task": "mine",
        "function": f"{tmp_path}/mine.py:score",
        "data": str(tasks / "toy.jsonl"),
        "dev": 9,
        "report": 9,
    }
    folder = toys.run_here(
        make_config(tmp_path, {"evaluation.tasks": [task], "search.generations": 9, "budget.candidates": 12}), tmp_path
    )
    text = (folder / "report.md").read_text()
    assert "The kind of evaluation of mine gives scores but no answers in words, so the scores are shown." in text
    examples = shown(folder)
    assert examples
    assert all(json.loads(prompt)["question"] for prompt, *_ in examples)
    assert all(re.fullmatch(r"score [\d.e-]+", said) for *_, winner, expert in examples for said in (winner, expert))
