"""The report: comparisons that were worked out by hand, and a verdict that says no when there is nothing to say."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import yaml

from evolver.config import Config
from evolver.driver.card import licence_of, model_card
from evolver.evaluation.scores.comparison import compare, interval
from evolver.evaluation.scores.metrics import JUDGED, Metric, perplexity
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Candidate, Question, Result
from evolver.records.recipe import Cross, Expert
from evolver.report.curve import BEST, looks
from evolver.report.report import write_report
from evolver.report.text import markdown_table
from evolver.report.verdict import verdict
from evolver.runs.about import About
from evolver.runs.finals import Contender, Finals
from evolver.runs.outcome import Finalist, Outcome
from evolver.storage import storage_at

A, B = Expert("a", "aa"), Expert("b", "bb")
CHILD = Cross(A, (B,), "evolver", 0.5, 0.5, 1)
ONE = {"t": 1.0}
NOBODY = Finals((), (), (), {})


def scale(count):
    return Scale(("t",) * count, ONE, {"t": JUDGED})


def result(items, of=None, recipe=A):
    of = of or scale(len(items))
    return Result(
        0, recipe.id, "ok", of.score(items), of.score(items), True, tuple(items), of.of_tasks(items), {"total": 1.0}
    )


def against(ours, theirs, of=None):
    of = of or scale(len(ours))
    return compare(ours, theirs, of, 0)


def test_ten_pairs_all_one_way():
    """Of 2^10 ways to flip ten signs two are as far out: all plus and all minus. p = 2 / 1024. Ties add nothing."""
    for ties in (0, 30):
        c = against([1.0] * 10 + [0.0] * ties, [0.0] * 10 + [0.0] * ties)
        assert c.p == pytest.approx(2 / 1024)
        assert c.difference == pytest.approx(10 / (10 + ties))
    assert against([0.0] * 10, [1.0] * 10).p == pytest.approx(2 / 1024)


def test_five_against_one():
    """Six discordant pairs, five for us: (C(6,5) + C(6,6)) · 2 / 2^6 = 14 / 64. Difference (5 - 1) / 8 = 0.5."""
    c = against([1, 1, 1, 1, 1, 0, 1, 0], [0, 0, 0, 0, 0, 1, 1, 0])
    assert c.p == pytest.approx(14 / 64)
    assert c.difference == pytest.approx(0.5)


def test_one_each_is_no_evidence():
    c = against([1, 0, 1, 1], [0, 1, 1, 1])
    assert c.p == 1.0
    assert c.difference == 0.0
    assert c.low < 0 < c.high


def test_equal_answers():
    c = against([1.0, 0.0, 1.0], [1.0, 0.0, 1.0])
    assert (c.difference, c.low, c.high, c.p) == (0.0, 0.0, 0.0, 1.0)


def test_tasks_weigh_as_in_the_score():
    """Task a: weight 3, two items, of which we win one: 3/4 · 1/2 = 0.375. Task b: weight 1, one item lost: -0.25."""
    of = Scale(("a", "b", "a"), {"a": 3.0, "b": 1.0}, {"a": JUDGED, "b": JUDGED})
    c = against([1.0, 0.0, 1.0], [0.0, 1.0, 1.0], of)
    assert c.difference == pytest.approx(0.125)
    assert c.difference == pytest.approx(of.score([1.0, 0.0, 1.0]) - of.score([0.0, 1.0, 1.0]))


def test_the_test_is_the_exact_one_for_values_of_any_kind():
    """Five differences, 32 sign patterns, counted one by one."""
    ours, theirs = [0.9, 0.4, 0.8, 0.3, 0.7], [0.1, 0.5, 0.2, 0.1, 0.6]
    each = np.subtract(ours, theirs)
    sums = [abs(np.dot(signs, each)) for signs in itertools.product((1, -1), repeat=5)]
    assert against(ours, theirs).p == pytest.approx(np.mean([s >= abs(each.sum()) - 1e-12 for s in sums]))


def test_a_large_comparison_is_near_the_exact_answer():
    """40 discordant pairs, 28 for us: the exact two-sided p of a fair coin is 0.0166; 9,999 flips come near."""
    c = against([1] * 28 + [0] * 12, [0] * 28 + [1] * 12)
    assert 0.010 < c.p < 0.025


def test_intervals_contain_what_they_are_of():
    rng = np.random.default_rng(0)
    ours, theirs = (rng.integers(0, 2, 60).astype(float).tolist() for _ in "ab")
    c = against(ours, theirs)
    assert c.low <= c.difference <= c.high
    low, high = interval(ours, scale(60), 0)
    assert low < result(ours).score < high


def test_the_interval_of_a_share_is_that_of_the_textbook():
    """Share 0.5 of 100: standard error 0.05, so about 0.40 to 0.60."""
    low, high = interval([0.0, 1.0] * 50, scale(100), 0)
    assert low == pytest.approx(0.402, abs=0.02)
    assert high == pytest.approx(0.598, abs=0.02)
    assert interval([1.0] * 9, scale(9), 0) == (pytest.approx(1.0), pytest.approx(1.0))


def test_the_same_seed_gives_the_same_numbers():
    ours, theirs = [1.0, 0.0, 1.0, 1.0] * 9, [0.0, 0.0, 1.0, 0.0] * 9
    assert against(ours, theirs) == against(ours, theirs)


def outcome(winner, expert, weak=None):
    """A finished run with these answers on the report set."""
    config = Config.model_validate(
        {
            "run": "try", "model": {"base": "base"}, "experts": {"a": "folder/a", "b": "folder/b"},
            "search": {"algorithm": "evolver"}, "budget": {"candidates": 3},
            "evaluation": {"tasks": [{"task": "t", "dev": 4, "report": len(winner)}]},
        }
    )  # fmt: skip
    weak = weak or [0.0] * len(expert)
    dev = result([1.0, 0.0, 1.0, 0.0])
    finalists = (
        Finalist("base", Expert("base", "00"), dev, result(weak)),
        Finalist("a", A, dev, result(expert)),
        Finalist("b", B, dev, result(weak)),
        Finalist("average", CHILD, dev, result(weak)),
        Finalist("winner", CHILD, dev, result(winner, recipe=CHILD)),
    )
    failed = (Candidate(1, B, "evolver"), Result(1, B.id, "failed", reason="it broke"))
    searched = ((Candidate(0, CHILD, "evolver"), dev), failed)
    scales = {"dev": scale(4), "report": scale(len(winner))}
    return with_finalists(Outcome(About(config, scales, {"torch": "2"}), (), NOBODY, searched), finalists)


def with_finalists(done, finalists):
    """The same outcome with these finalists, who were in the finals with their dev and select results."""
    last = Candidate(0, finalists[-1].recipe, "evolver")
    named = {f.label: Contender(f.label, replace(last, recipe=f.recipe), f.dev, f.select) for f in finalists}
    experts = tuple(named.pop(label) for label in ("a", "b"))
    winner = replace(named.pop("winner"), label="candidate 0")
    del named["base"]
    return replace(done, finalists=finalists, finals=Finals((winner,), experts, tuple(named.values()), done.scales))


def test_a_clear_improvement():
    said = verdict(outcome([1.0] * 30, [1.0] * 20 + [0.0] * 10))
    assert said.startswith("Improvement: the winner beats the best expert, a (+33.3 points on 30 report items")
    assert "p = 0.00195" in said


def test_an_improvement_that_may_be_noise():
    said = verdict(outcome([1.0] * 30, [1.0] * 28 + [0.0] * 2))
    assert said.startswith("No clear improvement: the winner leads the best expert, a, within noise")
    assert "p = 0.5)" in said


@pytest.mark.parametrize("winner", [[1.0, 0.0] * 10, [0.0] * 20])
def test_no_improvement(winner):
    said = verdict(outcome(winner, [1.0, 0.0] * 10))
    assert said.startswith("No improvement: the winner does not beat the best expert, a (")


@pytest.mark.parametrize(
    ("winner", "plain", "says"),
    [
        ([1.0] * 20, [0.0] * 20, "It beats the best merge without a search, average (+100.0 points"),
        ([1.0] * 20, [1.0] * 19 + [0.0], "It is not clearly better than the best merge without a search, average"),
        ([0.0] * 20, [1.0] * 20, "It is worse than the best merge without a search, average (-100.0 points"),
    ],
)
def test_the_search_is_held_against_the_merges_that_need_none(winner, plain, says):
    assert says in verdict(outcome(winner, [0.0] * 20, weak=plain))


def with_dev(done, **answers):
    """The same outcome, but that the finalists of these labels gave other answers on the dev set."""
    changed = [replace(f, dev=result(answers[f.label])) if f.label in answers else f for f in done.finalists]
    return with_finalists(done, tuple(changed))


def test_the_best_expert_is_the_best_on_dev_whatever_it_scores_on_the_report_items():
    done = outcome([1.0] * 4, [0.0] * 4, weak=[1.0, 0.0, 0.0, 0.0])
    assert with_dev(done, a=[1.0] * 4).best_expert.label == "a"
    assert with_dev(done, b=[1.0] * 4).best_expert.label == "b"


def test_the_best_plain_merge_is_the_best_on_dev():
    done = outcome([1.0] * 4, [0.0] * 4, weak=[1.0, 0.0, 0.0, 0.0])
    tuned = Finalist("task_arithmetic", CHILD, result([1.0] * 4), result([0.0] * 4))
    done = with_finalists(done, (*done.finalists[:-1], tuned, done.winner))
    assert done.best_plain.label == "task_arithmetic"
    assert with_dev(done, average=[1.0] * 4, task_arithmetic=[0.0] * 4).best_plain.label == "average"


def test_an_expert_without_report_scores_is_not_the_one_to_beat():
    done = with_dev(outcome([1.0] * 4, [0.0] * 4), a=[1.0] * 4)
    failed = Result(0, A.id, "failed", reason="boom", stage="report")
    finalists = tuple(replace(f, report=failed) if f.label == "a" else f for f in done.finalists)
    assert replace(done, finalists=finalists).best_expert.label == "b"


def test_no_verdict_without_scores():
    done = outcome([1.0] * 4, [0.0] * 4)
    failed = Result(0, CHILD.id, "failed", reason="boom", stage="report")
    last = Finalist("winner", CHILD, done.winner.dev, failed)
    lost = Outcome(**{**vars(done), "finalists": (*done.finalists[:-1], last)})
    assert verdict(lost).startswith("No verdict")


def test_a_markdown_table():
    assert markdown_table(["a", "b"], [["1", "2"], ["3", "4"]]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 | 4 |"


def test_a_report_says_it_all(tmp_path):
    done = outcome([1.0] * 30, [1.0] * 20 + [0.0] * 10)
    write_report(storage_at(tmp_path), done, {"items": 4, "equal": 4})
    text = (tmp_path / "report.md").read_text()
    assert text.startswith(
        "# try\n\nIs there a merge of a and b, fine-tunes of `base`, that is better than the best of them on t (acc)? "
        "Searched by `evolver` within 3 candidates, on 4 dev items.\n\n**Improvement:"
    )
    assert "| **winner** | 50.0 | 100.0 |" in text
    assert "| a | 50.0 | 66.7 |" in text
    assert "| a | +33.3 |" in text
    assert "| 1 | it broke |" in text
    assert CHILD.id in text
    assert "4 of 4 items" in text
    assert "Run `evolver run config.yaml` with the configuration file beside this report; its seed is 0." in text
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["curve.png", "report.html", "report.md", "summary.json"]


def test_what_was_not_scored_stands_in_the_report(tmp_path):
    done = outcome([1.0] * 30, [1.0] * 20 + [0.0] * 10)
    stopped = replace(done.winner.dev, number=2, items=(1.0,), complete=False, score=None, counts={"tokens": 7.0})
    stopped = replace(stopped, recipe_id="second")
    raced = replace(stopped, number=3, items=(1.0, 0.0), raced=True, given=1, recipe_id="third")
    rung = replace(stopped, number=4, recipe_id="fourth", seconds={}, counts={})
    next_rung = replace(rung, number=5, items=(1.0, 0.0), given=1)
    limits = {4: 1, 5: 2}
    more = tuple(
        (Candidate(r.number, B, "evolver", question=Question(limit=limits.get(r.number))), r)
        for r in (stopped, raced, rung, next_rung)
    )
    pool = done.config.pool.model_copy(update={"price_per_hour": 36.0, "watts": 500.0})
    config = done.config.model_copy(update={"pool": pool})
    about = replace(done.about, config=config)
    write_report(
        storage_at(tmp_path), replace(done, about=about, searched=(*done.searched, *more)), {"items": 4, "equal": 4}
    )
    text = (tmp_path / "report.md").read_text()
    assert "| items scored | 8 |" in text
    assert "| tokens | 14 |" in text
    assert "| could no longer reach the score to beat | 1 | 3 |" in text
    assert "| lost a race, at an error rate of None | 1 | 2 |" in text
    assert "| did not go on to the next rung | 1 | 2 |" in text  # of two rungs, what the second has left
    assert "| price (estimated) | 0.0300 |" in text  # three evaluations of a second each
    assert "| energy (kWh, estimated) | 0.0004 |" in text


def test_flawed_answers_have_a_column(tmp_path):
    done = outcome([1.0] * 30, [1.0] * 20 + [0.0] * 10)
    write_report(storage_at(tmp_path), done, {"items": 4, "equal": 4})
    assert "No prompt or answer was truncated, no answer was invalid." in (tmp_path / "report.md").read_text()
    *others, winner = done.finalists
    flawed = replace(winner, report=replace(winner.report, counts={"invalid": 3.0}))
    write_report(storage_at(tmp_path), replace(done, finalists=(*others, flawed)), {"items": 4, "equal": 4})
    text = (tmp_path / "report.md").read_text()
    assert "| t | invalid |" in text
    assert "| 100.0 | 10.0 |" in text


def test_perplexities_are_shown_as_the_field_writes_them(tmp_path):
    metric = Metric("word_perplexity", perplexity, -1.0, negative=True)
    of = Scale(("t",) * 30, ONE, {"t": metric}, (0.0,) * 30)
    done = outcome([-2.0] * 30, [-3.0] * 30, [-4.0] * 30)
    again = [replace(f, report=result(list(f.report.items), of)) for f in done.finalists]
    scales = {"dev": scale(4), "report": of}
    about = replace(done.about, scales=scales)
    write_report(storage_at(tmp_path), replace(done, about=about, finalists=tuple(again)), {"items": 4, "equal": 4})
    text = (tmp_path / "report.md").read_text()
    assert "t (word_perplexity, lower is better)" in text
    assert "| **winner** | 50.0 | -7.389 | -7.389 – -7.389 | 7.389 |" in text
    assert "**Improvement: the winner beats the best expert, a (+12.7 points" in text


def test_warnings_stand_at_the_top(tmp_path):
    done = outcome([1.0] * 30, [1.0] * 30)
    done = replace(done, about=replace(done.about, warnings=("the dev items come from a test set",)))
    write_report(storage_at(tmp_path), done, {"items": 4, "equal": 4})
    assert "> Warning: the dev items come from a test set." in (tmp_path / "report.md").read_text()[:600]


def test_the_card_names_the_parents_and_the_verdict():
    done = outcome([1.0] * 30, [1.0] * 20 + [0.0] * 10)
    card = model_card(done, "mergekit cannot: why.", {})
    assert card.startswith("---\nbase_model:\n- base\n- folder/a\n- folder/b\n")
    assert verdict(done) in card


def test_the_card_says_to_the_hub_what_the_model_is():
    done = outcome([1.0] * 30, [1.0] * 20 + [0.0] * 10)
    same = dict.fromkeys(("base", "folder/a", "folder/b"), "apache-2.0")
    front = yaml.safe_load(model_card(done, "", same).split("---")[1])
    assert front["license"] == "apache-2.0"
    assert front["base_model_relation"] == "merge"
    assert {"merge", "evolver"} == set(front["tags"])
    (index,) = front["model-index"]
    (result,) = index["results"]
    assert result["metrics"] == [{"type": "mean", "value": 1.0}]
    assert "30 report items" in result["dataset"]["name"]
    mixed = model_card(done, "", same | {"folder/b": "mit"})
    assert "license" not in yaml.safe_load(mixed.split("---")[1])
    assert "- b: `folder/b`, mit" in mixed


@pytest.mark.parametrize(
    ("text", "licence"),
    [
        ("---\nlicense: mit\n---\n# A", "mit"),
        ("---\nlicense: [a, b]\n---\n", None),
        ("---\n: : :\n---\n", None),
        ("# No front matter", None),
        (None, None),
    ],
)
def test_a_licence_is_what_the_parent_s_own_card_says(tmp_path, text, licence):
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    assert licence_of(tmp_path) == licence


def test_no_two_lines_of_the_curve_look_alike():
    done = outcome([1.0] * 4, [0.0] * 4)
    names = [f"e{k}" for k in range(20)]
    config = done.config.model_copy(update={"experts": {n: n for n in names}})
    labels = ["base", *names, "average", "task_arithmetic@0.5", "winner"]
    many = tuple(replace(done.finalists[0], label=label) for label in labels)
    found = looks(replace(done, about=replace(done.about, config=config), finalists=many))
    assert found.keys() == set(labels[:-1])
    assert len({(look["color"], look["linestyle"]) for look in found.values()}) == len(found)
    assert BEST not in {look["color"] for look in found.values()}
    assert [label for label, look in found.items() if look["color"] == found["base"]["color"]] == ["base"]
