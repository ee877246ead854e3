"""What a report claims and shows: margins, the corrected dev score, tables of scores and settings, and the bundle."""

import json
import re
from dataclasses import replace

import numpy as np
import pytest

from evolver.config import Config
from evolver.evaluation.overlap import Overlap, overlaps
from evolver.evaluation.scores import metrics
from evolver.evaluation.scores.comparison import compare
from evolver.evaluation.scores.correction import corrected_best
from evolver.evaluation.scores.metrics import CLASS, JUDGED, TAGS, Metric
from evolver.evaluation.scores.power import STANDARD_ERRORS
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Candidate, Result
from evolver.records.recipe import Cross, Expert, Layers, Merge, Place, Rule
from evolver.report.claims import claims_of as statistics_of
from evolver.report.claims import claims_section, comparisons_of, overlap_warnings
from evolver.report.margin import margin_lines
from evolver.report.report import write_report
from evolver.report.scores import formula, is_own, score_rows, scores_section
from evolver.report.settings import merged_rows, setting_rows, settings_section
from evolver.report.text import score_text
from evolver.runs.about import About
from evolver.runs.finals import Contender, Finals
from evolver.runs.outcome import Finalist, Outcome
from evolver.storage import storage_at

BASE, A, B = Expert("base", "00"), Expert("a", "aa"), Expert("b", "bb")
AVERAGE = Merge("simple", (A, B), BASE)
TUNED = Merge("task_arithmetic", (A, B), BASE, (Rule.of({"weight": (0.5, 0.5), "lambda": 0.5, "normalize": False}),))
TASKS = ("a", "b")


def scale(count, metric=JUDGED, weights=None):
    """Two tasks in turn."""
    return Scale((TASKS * count)[:count], weights or {"a": 1.0, "b": 1.0}, {"a": metric, "b": metric})


def result(items, of=None, recipe=A, number=0):
    of = of or scale(len(items))
    return Result(number, recipe.id, "ok", of.score(items), of.score(items), True, tuple(items), of.of_tasks(items))


def drawn(rng, count, *shares):
    """Right and wrong answers, a share right on each of the tasks in turn."""
    share = np.resize(shares, count)
    return list((rng.random(count) < share).astype(float))


def outcome(dev=80, report=120, candidates=12, **changes):
    """A finished run: expert a is good at task a, b at task b, and the merges are middling at both."""
    rng = np.random.default_rng(0)
    tasks = [{"task": t, "dev": dev // 2, "report": report // 2} for t in TASKS]
    config = Config.model_validate(
        {
            "run": "try", "model": {"base": "base"}, "experts": {"a": "folder/a", "b": "folder/b"},
            "search": {"algorithm": "evolver"}, "budget": {"candidates": candidates}, "evaluation": {"tasks": tasks},
            **changes,
        }
    )  # fmt: skip
    kinds = {
        "base": (0.2, 0.2),
        "a": (0.9, 0.3),
        "b": (0.3, 0.9),
        "average": (0.6, 0.6),
        "task_arithmetic@0.5": (0.6, 0.6),
    }
    recipes = {"base": BASE, "a": A, "b": B, "average": AVERAGE, "task_arithmetic@0.5": TUNED}
    found = {n: (result(drawn(rng, dev, *s)), result(drawn(rng, report, *s))) for n, s in kinds.items()}
    searched = []
    for number in range(candidates):
        recipe = Cross(A, (B,), "evolver", 0.5, 0.5, number)
        searched.append(
            (Candidate(number, recipe, "evolver"), result(drawn(rng, dev, 0.6, 0.6), recipe=recipe, number=number))
        )
    candidate, best = max(searched, key=lambda pair: pair[1].score)
    contenders = {n: Contender(n, Candidate(0, r, "plain", label=n), found[n][0]) for n, r in recipes.items()}
    scales = {"dev": scale(dev), "report": scale(report)}
    finals = Finals(
        (Contender(f"candidate {candidate.number}", candidate, best),), (contenders["a"], contenders["b"]),
        (contenders["average"], contenders["task_arithmetic@0.5"]), scales,
    )  # fmt: skip
    finalists = [Finalist(n, r, *found[n]) for n, r in recipes.items()]
    winner = Finalist("winner", candidate.recipe, best, result(drawn(rng, report, 0.6, 0.6)))
    return Outcome(About(config, scales, {"torch": "2"}), (*finalists, winner), finals, tuple(searched))


def claims_of(done):
    return statistics_of(done, comparisons_of(done))


def said(done):
    return claims_section(claims_of(done), done)


def test_the_best_dev_score_stands_beside_the_corrected_one():
    done = outcome()
    found = claims_of(done)
    expected = corrected_best([r.items for _, r in done.searched], scale(80), 0)
    assert found.corrected == expected < found.best[1].score
    text = said(done)
    assert (
        f"The highest dev score, the winner's, is {100 * found.best[1].score:.1f}. The highest of 12 scores is partly"
        in text
    )
    assert f"becomes **{100 * expected:.1f}**" in text
    assert "The correction is a partial one." in text
    assert "proposed most of them after it had seen scores on the same items" in text


def test_candidates_without_a_full_score_and_repeated_models_do_not_count():
    done = outcome()
    (_, first), *_ = done.searched
    again = (Candidate(12, done.searched[0][0].recipe, "evolver"), replace(first, number=12, reused=True))
    part = Candidate(13, Cross(B, (A,), "evolver", 0.5, 0.5, 99), "evolver")
    stopped = (part, replace(first, number=13, recipe_id=part.recipe.id, complete=False, score=None))
    assert claims_of(replace(done, searched=(*done.searched, again, stopped))).form() == claims_of(done).form()


def test_a_winner_that_is_not_the_best_on_dev_is_told_apart():
    done = outcome()
    other = next(c for c, _ in done.searched if c.recipe.id != done.winner.recipe.id)
    last = replace(done.winner, recipe=other.recipe)
    best = done.finals.winner.candidate.number
    assert f"that of candidate {best}, is" in said(replace(done, finalists=(*done.finalists[:-1], last)))


def test_why_there_is_no_correction_is_said():
    assert "only one candidate has a score of all dev items" in said(outcome(candidates=1))
    median = Metric("median", metrics.median_item, None)
    done = outcome()
    scales = {"dev": scale(80, median), "report": scale(120)}
    text = said(replace(done, about=replace(done.about, scales=scales)))
    assert "the metric of a, b is a median, which the correction does not know." in text


def with_metric(done, metric):
    """The same outcome with other answers, for a metric of all items."""
    rng = np.random.default_rng(7)

    def answers(count):
        if metric.counts:
            return [(0.0, *map(float, rng.integers(1, 5, metric.counts))) for _ in range(count)]
        return list(map(float, rng.integers(0, 2, count) if metric.compares else -rng.random(count)))

    scales = {}
    for split, of in done.scales.items():
        right = tuple(map(float, rng.integers(0, 2, len(of.tasks))))
        scales[split] = replace(of, metrics=dict.fromkeys(TASKS, metric), right=right)

    def again(r, split):
        items = answers(len(scales[split].tasks))
        return replace(result(items, scales[split], number=r.number), recipe_id=r.recipe_id)

    finalists = tuple(replace(f, dev=again(f.dev, "dev"), report=again(f.report, "report")) for f in done.finalists)
    searched = tuple((c, again(r, "dev")) for c, r in done.searched)
    return replace(done, about=replace(done.about, scales=scales), finalists=finalists, searched=searched)


@pytest.mark.parametrize(
    "metric",
    [CLASS["macro_f1"], CLASS["mcc"], TAGS["f1"], Metric("perplexity", metrics.perplexity, -1.0, negative=True)],
    ids=lambda m: m.name,
)
def test_metrics_of_all_items_have_every_figure(metric, tmp_path):
    done = with_metric(outcome(), metric)
    found = claims_of(done)
    raw = max(r.score for _, r in done.searched)
    assert found.corrected < raw == found.best[1].score
    text = said(done)
    assert re.search(r"The 120 report items can show a difference of [\d.]+ points", text)
    assert f"becomes **{score_text(found.corrected, done.scales['dev'])}**" in text
    assert "drawn with replacement 250 times" in text
    assert found.undecided.keys() == set(TASKS)  # the answers are random ones
    write_report(storage_at(tmp_path), done, {"items": 4, "equal": 4})
    assert text in (tmp_path / "report.md").read_text()


def test_the_shares_of_resamples_are_those_of_the_paired_comparison():
    done = outcome()
    found = claims_of(done)
    for rival in done.finalists:
        if rival.label in found.ahead:
            c = compare(done.winner.report.items, rival.report.items, scale(120), 0)
            assert found.ahead[rival.label] == c.ahead
    assert done.best_expert.label in found.ahead
    assert {"average", done.best_plain.label} <= found.ahead.keys()
    text = said(done)
    assert f"{100 * found.ahead['average']:.1f} %" in text
    assert "the best expert" in text


def test_a_rival_that_is_two_things_is_named_once():
    done = outcome()
    (line,) = [p for p in said(done).split("\n\n") if p.startswith("**How sure")]
    if done.best_plain.label == "average":
        assert "average (the average and the best plain merge)" in line
    assert line.count("%") == len(claims_of(done).ahead)


def test_tasks_that_cannot_tell_the_experts_apart_are_named():
    done = outcome()
    assert "The dev items of every task tell the experts apart" in said(done)
    same = replace(done.finalists[2], dev=done.finalists[1].dev)
    text = said(replace(done, finalists=(*done.finalists[:2], same, *done.finalists[3:])))
    assert "On the dev items of a (p = 1) and b (p = 1) the experts differ by no more than chance" in text
    assert "at 5 %" in text


def test_the_margin_rests_on_the_experts_and_not_on_the_winner():
    done = outcome()
    a, b = (np.asarray(f.dev.items) for f in done.finalists[1:3])
    variance = np.mean([(a - b)[k::2] @ (a - b)[k::2] / 40 for k in (0, 1)])
    smallest = STANDARD_ERRORS * np.sqrt(2 * 0.25 * variance / 60)
    text = said(done)
    assert f"On {100 * np.mean(a != b):.1f} % of the dev items, two experts score differently" in text
    assert f"The 120 report items can show a difference of {100 * smallest:.1f} points" in text
    needed = re.search(r"would take ([\d,]+) items", text)
    assert int(needed[1].replace(",", "")) == pytest.approx(120 * (smallest / 0.01) ** 2, rel=0.01)
    worse = replace(done.winner, report=result([0.0] * 120), dev=result([0.0] * 80))
    assert margins_of(replace(done, finalists=(*done.finalists[:-1], worse))) == margins_of(done)


def margins_of(done):
    return [line for line in said(done).splitlines() if line.startswith("- ")]


def test_worthwhile_is_in_points_and_changes_nothing_else():
    one, half = outcome(), outcome(worthwhile=0.5)
    assert "for 0.5 points (`worthwhile`) it would take" in said(half)
    counts = [int(re.search(r"would take ([\d,]+) items", said(d))[1].replace(",", "")) for d in (one, half)]
    assert counts[1] == pytest.approx(4 * counts[0], abs=4)
    assert claims_of(one).form() == claims_of(half).form()


def sentence(of, experts=(), worthwhile=1.0):
    return margin_lines(experts, {"dev": of, "report": of}, worthwhile, 0)[-1]


def test_before_anything_is_scored_three_discordances_are_shown():
    """Worked out by hand: 2.8016 · √(p / 900) = 2.95, 4.18, 5.11 points; 7.849 · p / 0.01² items."""
    text = sentence(Scale(("t",) * 900, {"t": 1.0}, {"t": JUDGED}))
    assert "The 900 report items can show a difference of 3.0, 4.2 or 5.1 points" in text
    assert "between models that score differently on 10, 20 or 30 % of them" in text
    assert "would take 7,849, 15,698 or 23,547 items (on 10, 20 or 30 %)" in text


def test_too_few_items_show_nothing():
    assert "The 8 report items can show no difference between models" in sentence(scale(8))
    assert "can show a difference of 19.8 or 24.3 points between models that score" in sentence(scale(40))


def test_documents_are_mentioned():
    of = replace(scale(40), clusters=tuple(n // 2 for n in range(40)))
    assert "They come from 20 documents; items of the same document count as related." in sentence(of)


def test_metrics_of_all_items_wait_for_the_experts():
    of = Scale(("t",) * 40, {"t": 1.0}, {"t": CLASS["mcc"]}, (0.0, 1.0) * 20)
    assert "is not known before the experts are scored, since the metric of t is no mean" in sentence(of)
    rng = np.random.default_rng(0)
    experts = [result(drawn(rng, 40, 0.5), of) for _ in range(2)]
    assert "The 40 report items can show a difference of" in sentence(of, experts)


def test_scores_that_are_no_shares_have_points_of_their_own():
    of = Scale(("t",) * 40, {"t": 1.0}, {"t": metrics.ENDLESS})
    rng = np.random.default_rng(0)
    experts = [result(list(rng.normal(size=40)), of) for _ in range(2)]
    text = sentence(of, experts, 0.5)
    smallest = float(re.search(r"can show a difference of ([\d.]+) points", text)[1])
    each = np.subtract(experts[0].items, experts[1].items)
    assert smallest == pytest.approx(STANDARD_ERRORS * np.sqrt(np.mean(each**2) / 40), rel=0.001)
    assert f"would take {int(np.ceil(40 * (smallest / 0.5) ** 2))}" in text


def test_the_summary_has_the_figures(tmp_path):
    done = outcome()
    write_report(storage_at(tmp_path), done, {"items": 4, "equal": 4})
    found, claims = json.loads((tmp_path / "summary.json").read_text()), claims_of(done)
    assert found["corrected_dev"] == claims.corrected
    assert found["ahead"] == claims.ahead
    assert found["undecided_tasks"] == {}


@pytest.mark.parametrize(
    ("overlap", "text"),
    [
        ({}, "Of a and b it is not known, as no `training.json`"),
        (
            {"a": Overlap({"dev": 0, "report": 0}, {"dev": 80, "report": 120})},
            "None of the run's items is among the training texts of a. Of b it is not known",
        ),
        (
            {n: Overlap({"dev": 2, "report": 7}, {"dev": 80, "report": 120}) for n in TASKS},
            "Expert b was trained on the texts of 2 of 80 dev items and 7 of 120 report items, so its scores on them",
        ),
    ],
)
def test_what_the_experts_were_trained_on_is_said(overlap, text):
    done = outcome()
    assert text in said(replace(done, about=replace(done.about, overlap=overlap)))


def test_the_overlap_is_counted_where_a_folder_allows_it(tmp_path):
    for name, record in {"a": {"texts": ["1", "2", "9"]}, "b": {"texts": []}, "c": {"items": 3}, "d": [1]}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "training.json").write_text(json.dumps(record))
    texts = {"dev": ["1", "2", "3", None], "report": ["4", "5"]}
    folders = {name: tmp_path / name for name in ("a", "b", "c", "d", "missing")}
    found = overlaps(texts.__getitem__, folders, ("dev", "report"))
    assert found == {
        "a": Overlap({"dev": 2, "report": 0}, {"dev": 4, "report": 2}),
        "b": Overlap({"dev": 0, "report": 0}, {"dev": 4, "report": 2}),
    }
    assert Overlap.from_form(json.loads(json.dumps(found["a"].form()))) == found["a"]
    (warning,) = overlap_warnings(found)
    assert warning.startswith("expert a was trained on the texts of 2 of 4 dev items, so its scores on them")


def test_texts_are_not_asked_for_where_no_folder_says_anything(tmp_path):
    assert overlaps(None, {"a": tmp_path}, ("dev",)) == {}


# Tables


def test_the_formula_is_that_of_the_score():
    done = outcome()

    def said_of(of):
        return formula(replace(done, about=replace(done.about, scales={"report": of})))

    of = Scale(("a", "c"), {"a": 1.0, "c": 3.0}, {"a": JUDGED, "c": metrics.ERRORS})
    assert said_of(of).startswith("The score of a model is (a (acc) − 3 × c (mean)) / 4. A metric of which lower")
    assert said_of(Scale(("a",), {"a": 2.0}, {"a": JUDGED})) == "The score of a model is a (acc)."


def test_normalised_scores_are_shares_of_the_task_s_own_expert():
    done = outcome()
    rows = {(r["model"], r["split"], r["task"]): r for r in score_rows(done)}
    for split in ("dev", "report"):
        for task in TASKS:
            own = rows[task, split, task]
            assert (own["normalised"], own["own"], own["reference"]) == (1.0, True, task)
            base = rows["base", split, task]
            assert base["normalised"] == pytest.approx(base["value"] / own["value"])
            assert not base["own"]
    assert rows["winner", "report", ""]["value"] == done.winner.report.score
    text = scores_section(done)
    mean = np.mean([rows["winner", "report", t]["normalised"] for t in TASKS])
    assert f"| winner | {100 * mean:.1f} |" in text
    assert "Reference experts are a for a and b for b." in text
    a = rows["a", "report", "a"]["value"]
    assert f"| a | a | {100 * a:.1f} |" in text


def test_without_an_expert_of_its_name_the_best_on_dev_items_is_the_reference():
    done = outcome()
    renamed = {s: replace(v, tasks=tuple({"a": "x", "b": "b"}[t] for t in v.tasks), weights={"x": 1.0, "b": 1.0},
                          metrics={"x": JUDGED, "b": JUDGED}) for s, v in done.scales.items()}  # fmt: skip

    def again(r, of):
        return replace(r, tasks=of.of_tasks(r.items))

    finalists = tuple(
        replace(f, dev=again(f.dev, renamed["dev"]), report=again(f.report, renamed["report"])) for f in done.finalists
    )
    found = replace(done, about=replace(done.about, scales=renamed), finalists=finalists)
    text = scores_section(found)
    assert "no expert has the name of x, so the expert that is best there on the dev items was taken" in text
    assert {r["reference"] for r in score_rows(found) if r.get("task") == "x"} == {"a"}
    assert not any(r["own"] for r in score_rows(found) if r.get("task") == "x")


def test_metrics_without_a_share_are_not_normalised():
    done = outcome()
    of = scale(120, metrics.ERRORS)
    scales = {"dev": scale(80, metrics.ERRORS), "report": of}
    text = scores_section(replace(done, about=replace(done.about, scales=scales)))
    assert "Normalised" not in text
    rows = list(score_rows(replace(done, about=replace(done.about, scales=scales))))
    assert {r.get("normalised") for r in rows} == {None}
    assert all(r["value"] <= 0 for r in rows if r["task"])  # errors are written with the field's sign


def test_a_model_without_report_scores_has_empty_cells():
    done = outcome()
    failed = Result(0, A.id, "failed", reason="boom", stage="report")
    lost = replace(done, finalists=(done.finalists[0], replace(done.finalists[1], report=failed), *done.finalists[2:]))
    rows = [r for r in score_rows(lost) if r["split"] == "report" and r["task"] == "a"]
    assert {r["normalised"] for r in rows} == {None}  # its reference has no score
    assert "| a | – | – |" in scores_section(lost)


@pytest.mark.parametrize(
    ("expert", "task", "own"), [("a", "a", True), ("tec", "emotion_tec", True), ("a", "ba", False), ("c", "a", False)]
)
def test_whose_task_it_is_shows_by_the_name(expert, task, own):
    assert is_own(expert, task) is own


def test_settings_stand_in_a_table_and_as_rows():
    done = outcome()
    rows = list(setting_rows(done))
    tuned = {(r["setting"], r["input"]): r["value"] for r in rows if r["model"] == "task_arithmetic@0.5"}
    assert tuned == {("weight", "a"): 0.5, ("weight", "b"): 0.5, ("lambda", ""): 0.5, ("normalize", ""): False}
    crossed = {r["setting"]: r["value"] for r in rows if r["model"] == "winner"}
    numbers = {"F": 0.5, "Cr": 0.5, "mask": "scalar", "seed": done.winner.recipe.seed}
    assert crossed == {"strategy": "evolver", **numbers}
    assert [r["value"] for r in rows if r["model"] == "average"] == ["no settings"]
    text = settings_section(done)
    assert "| task_arithmetic@0.5 | `" in text
    assert "| a 0.5, b 0.5 |" in text


def test_a_winner_that_is_an_expert_has_no_settings():
    done = outcome()
    rows = list(setting_rows(replace(done, finalists=(*done.finalists[:-1], replace(done.winner, recipe=A)))))
    assert [(r["method"], r["value"]) for r in rows if r["model"] == "winner"] == [("none", "the expert a as it is")]


def test_the_place_of_a_setting_is_said():
    places = [Place(layers=(0, 4)), Place(layers=(3, 4)), Place(outside=True), Place(contains="attn"), Place()]
    merge = Merge("ties", (A, B), BASE, tuple(Rule.of({"density": 0.5}, p) for p in places))
    done = outcome()
    layered = Layers((A, merge), ((0, 0), (1, 1)), (0, 1))
    finalists = (*done.finalists[:-1], replace(done.winner, recipe=layered))
    found = [r for r in merged_rows(replace(done, finalists=finalists)) if r["model"] == "winner"]
    words = [r["tensors"] for r in found]
    assert words == ["layers 0 to 3", "layer 3", "outside the layers", "names with attn", "all", "all"]
    assert found[-1]["value"] == f"a:0 {merge.label}:1"


def test_a_long_table_of_settings_is_cut():
    rules = tuple(Rule.of({"density": n / 100}, Place(layers=(n, n + 1))) for n in range(60))
    done = outcome()
    deep = replace(done.winner, recipe=Merge("ties", (A, B), BASE, rules))
    text = settings_section(replace(done, finalists=(*done.finalists[:-1], deep)))
    assert "The first 40 of 64 rows are shown; `evolver report` writes all to `settings.csv`." in text
    assert text.count("\n| ") == 42
