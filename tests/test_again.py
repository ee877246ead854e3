"""A finished search, used again: other goals and other settings over what was scored."""

from __future__ import annotations

import json
import shutil

import optuna
import pytest
import toys
from toys import DROP, all_rows, no_work, rows

from evolver.config.reading import config_at
from evolver.driver.again import Wish, go_on
from evolver.driver.run import run
from evolver.runs.history import read_history
from evolver.runs.origin import uses_of
from evolver.storage import storage_at
from evolver.workers.pools.local import LocalPool

pytestmark = pytest.mark.whole

TASKS = [{"task": "toy", "dev": 20, "report": 12, "select": 10}, {"task": "pair", "dev": 12, "report": 10, "select": 8}]
TPE = {"algorithm": "tpe", "startup": 3}
PLAIN = {"search": TPE, "budget.candidates": 8, "evaluation.tasks": TASKS, "finalists": {"count": 2}}


def weighing(toy, pair, **more):
    """The tasks with other weights."""
    return PLAIN | {"evaluation.tasks": [{**TASKS[0], "weight": toy}, {**TASKS[1], "weight": pair}]} | more


@pytest.fixture(scope="module")
def earlier(make_config, tmp_path_factory):
    """A finished run of two tasks, and its results folder. Tests work on a copy."""
    folder = tmp_path_factory.mktemp("earlier")
    toys.run_here(make_config(folder, PLAIN), folder / "results")
    return folder / "results"


@pytest.fixture
def results(earlier, tmp_path):
    shutil.copytree(earlier, tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def again(results, make_config, tmp_path):
    """``again(changes, name, kind, **wish)``: a run that goes on from the earlier one; returns its folder."""

    def call(changes, name="new", kind="retarget", make_pool=LocalPool, of="toy", **wish):
        file = make_config(tmp_path, changes, f"{name}.yaml")
        given = go_on(storage_at(results / of), config_at(file), storage_at(results), name, Wish(kind, **wish), "cpu")
        run(given, storage_at(results), make_pool, toys.Silent(), "cpu", name)
        return results / name

    return call


def scores(folder, stage="search"):
    return {n: r["score"] for (s, n), r in rows(folder).items() if s == stage}


def test_a_retarget_scores_nothing_and_ranks_by_the_new_weights(again, results, make_config, tmp_path):
    same = again(weighing(1, 1), "same", make_pool=no_work)
    assert scores(same) == scores(results / "toy")
    assert toys.winner(same) == toys.winner(results / "toy")
    old = {n: r["tasks"] for (s, n), r in rows(results / "toy").items() if s == "search"}
    new = again(weighing(3, 1))
    for number, row in rows(new).items():
        if number[0] == "search":
            assert row["reused"]
            tasks = dict(old[number[1]])
            assert row["score"] == pytest.approx((3 * tasks["toy"] + tasks["pair"]) / 4)
    assert json.loads((new / "summary.json").read_text())["items"] == 0
    assert read_history(storage_at(new)).outcome() is not None


def test_a_fresh_run_of_the_new_goal_over_the_same_candidates_says_the_same(again, make_config, tmp_path):
    """The scores by the new weights are those that workers give, bit for bit."""
    new = again(weighing(2, 1))
    file = make_config(tmp_path, weighing(2, 1), "fresh.yaml")
    fresh = toys.run_here(file, tmp_path / "fresh")
    found = {r["recipe_id"]: (r["score"], r["items"]) for r in rows(fresh).values() if r["stage"] == "baseline"}
    ours = {r["recipe_id"]: (r["score"], r["items"]) for r in rows(new).values() if r["stage"] == "baseline"}
    assert ours == found


def test_candidates_are_searched_on(again, results):
    new = again(weighing(1, 4), candidates=3)
    found = {n: r for (s, n), r in rows(new).items() if s == "search"}
    assert sorted(found) == list(range(11))
    assert all(found[n]["reused"] for n in range(8))
    assert any(not found[n]["reused"] for n in range(8, 11))
    assert {found[n]["proposer"] for n in found} == {"tpe"}


def test_a_run_that_goes_on_is_a_study_of_all_its_candidates(again, tmp_path):
    """Those of the earlier run with their scores by the new weights, said to be received, and those after them."""
    new = again(weighing(1, 4), candidates=3)
    ended = toys.evolver("study", new, tmp_path / "study.db")
    assert ended.code == 0, ended.err
    trials = optuna.load_study(study_name="new", storage=f"sqlite:///{tmp_path / 'study.db'}").trials
    found = {row["recipe_id"]: row["score"] for (stage, _), row in rows(new).items() if stage == "search"}
    assert {t.user_attrs["recipe"]: t.value for t in trials} == found
    assert sum("received" in t.user_attrs for t in trials) == 8 == len(trials) - 3


@pytest.mark.parametrize(
    "search",
    [
        {"algorithm": "evolver", "generations": 3},
        {"algorithm": "evolver", "generations": 3, "merger": {"method": "simple"}},
        {"algorithm": "cmaes", "population": 4},
        {"algorithm": "halving", "of": TPE, "first": 8, "eta": 2, "batch": 4},
    ],
    ids=["alone", "merged", "cmaes", "halving"],
)
def test_a_fork_goes_on_with_another_search(again, results, search):
    new = again(PLAIN | {"search": search, "budget": {"candidates": 6}}, kind="fork")
    found = {n: r for (s, n), r in rows(new).items() if s == "search"}
    assert len(found) == 14 if search["algorithm"] != "halving" else len(found) > 14  # its rungs are candidates, too
    assert [found[n]["recipe_id"] for n in range(8)] == [
        rows(results / "toy")["search", n]["recipe_id"] for n in range(8)
    ]
    before = set(toys.essence(new).items())
    again(PLAIN | {"search": search, "budget": {"candidates": 6}}, kind="fork", make_pool=no_work)  # nothing is left
    assert set(toys.essence(new).items()) == before


def test_a_task_may_be_left_out(again, results):
    new = again(PLAIN | {"evaluation.tasks": TASKS[1:]})
    for number, row in rows(new).items():
        if number[0] == "search":
            assert row["score"] == dict(rows(results / "toy")[number]["tasks"])["pair"]
            assert len(row["items"]) == 12


def test_a_run_of_a_run(again, results):
    again(weighing(3, 1), "second")
    third = again(weighing(1, 1), "third", of="second", make_pool=no_work)
    assert scores(third) == scores(results / "toy")
    assert toys.winner(third) == toys.winner(results / "toy")


def test_uses_of_report_items_are_counted(again, results):
    def verdict(folder):
        return json.loads((folder / "summary.json").read_text())["verdict"]

    assert not verdict(results / "toy").startswith("Exploratory")
    second, third = again(weighing(3, 1), "second"), again(weighing(1, 3), "third", of="second")
    assert verdict(second).startswith("Exploratory (use 2 of these report items): ")
    assert verdict(third).startswith("Exploratory (use 3 of these report items): ")
    again(weighing(3, 1), "second")
    assert [u.run for u in uses_of(storage_at(results / "toy"))] == ["toy", "second", "third"]
    assert "toy, second, third" in (third / "report.md").read_text()
    fresh = again(weighing(1, 2), "fresh", fresh_report=True)
    assert not verdict(fresh).startswith("Exploratory")
    fresh2 = again(weighing(1, 2), "fresh2", fresh_report=True)
    drawn = [report_items(results / n) for n in ("toy", "fresh", "fresh2")]
    assert len(set().union(*drawn)) == 3 * 22
    assert config_at(fresh2 / "config.yaml").parsed().evaluation.report_draw == 2
    assert verdict(again(weighing(1, 5), "fifth", of="fresh")).startswith("Exploratory (use 2 of these report items): ")


def report_items(folder):
    from evolver.ledger import items_of

    return {(i["task"], i["hash"]) for i in items_of(storage_at(folder)) if i["split"] == "report"}


def test_uses_survive_kills(again, results, make_config, tmp_path):
    class Dying(LocalPool):
        def wait(self):
            raise KeyboardInterrupt

    tasks = weighing(1, 9)
    with pytest.raises(KeyboardInterrupt):
        again(tasks, candidates=2, make_pool=Dying)
    shutil.rmtree(results / "new" / "uses")
    new = again(tasks, candidates=2)
    assert [u.run for u in uses_of(storage_at(new))] == ["toy", "new"]
    (results / "toy").rename(results / "gone")
    text = config_at(new / "config.yaml")
    run(text, storage_at(results), no_work, toys.Silent(), "cpu", "new")
    assert "Exploratory" in (new / "report.md").read_text()


REFUSED = {
    "seed": ({"seed": 2}, "seed: the scores of"),
    "expert": ({"experts.c": DROP}, "experts.c: the scores of"),
    "metric": ({"evaluation.tasks": [{**TASKS[0], "metric": "acc_norm"}, TASKS[1]]}, "evaluation.tasks[0].metric: "),
    "items": ({"evaluation.tasks": [{**TASKS[0], "dev": 21}, TASKS[1]]}, "evaluation.tasks[0].dev: "),
    "blocks": ({"evaluation.block_items": 9}, "evaluation.block_items: "),
    "task": ({"evaluation.tasks": [*TASKS, {"task": "last", "dev": 5, "report": 5}]}, "evaluation.tasks[2].task: "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_other_answers_is_refused(again, results, name):
    changes, said = REFUSED[name]
    toys.refused(lambda: again(PLAIN | changes), "new.yaml: ", said)
    assert not (results / "new").exists()
    assert not (results / "toy" / "uses").exists()


def test_a_new_task_is_scored_if_that_is_asked_for(again, results):
    tasks = [*TASKS, {"task": "last", "dev": 5, "report": 5, "select": 5}]
    toys.refused(lambda: again(PLAIN | {"evaluation.tasks": tasks}), "last was never scored", "--score-new-tasks")
    new = again(PLAIN | {"evaluation.tasks": tasks}, score_new_tasks=True)
    assert all(len(r["items"]) == 37 for (s, _), r in rows(new).items() if s == "search")
    assert sorted(n for s, n in rows(new) if s == "search") == list(range(8))


def test_another_run_is_not_written_over(again, results):
    toys.refused(lambda: again(PLAIN, "toy"), "is the run that evolver retarget goes on from")
    again(weighing(1, 2))
    toys.refused(lambda: again(weighing(1, 3)), "evaluation.tasks[1].weight")


def test_report_items_that_no_document_is_left_for(again):
    tasks = [{**TASKS[0], "report": 40}, TASKS[1]]
    toys.refused(lambda: again(PLAIN | {"evaluation.tasks": tasks}, fresh_report=True), "evaluation.tasks[0].report")


def test_the_command_line(results, make_config, tmp_path):
    file = make_config(tmp_path, weighing(5, 1) | {"run": "cli"}, "cli.yaml")
    ended = toys.evolver("retarget", results / "toy", file)
    assert (ended.code, ended.err) == (0, "")
    assert "Exploratory" in ended.out
    assert (results / "cli" / "report.html").exists()
    assert len(all_rows(results / "cli", "listed")) == 8
    ended = toys.evolver("fork", results / "toy", make_config(tmp_path, PLAIN | {"run": "toy"}, "f.yaml"))
    assert "goes on from" in toys.refusal(ended.code, ended.err)
    ended = toys.evolver("retarget", tmp_path / "nowhere", file)
    assert "there is no run" in toys.refusal(ended.code, ended.err)


def test_a_run_without_a_select_stage_gets_one(again, results, make_config, tmp_path):
    """As runs of earlier versions, which drew no select items."""
    bare = [{**t, "select": 0} for t in TASKS]
    toys.run_here(make_config(tmp_path, PLAIN | {"run": "bare", "evaluation.tasks": bare}, "bare.yaml"), results)
    assert "select" not in json.loads((results / "bare" / "identity.json").read_text())["items"]
    same = again(PLAIN | {"evaluation.tasks": bare}, "same", of="bare", make_pool=no_work)
    assert scores(same) == scores(results / "bare")
    new = again(weighing(2, 1), of="bare")
    assert len(scores(new, "select")) == 3 + 2 + 2  # experts, plain merges, candidates
    assert {r["stage"] for r in rows(new).values() if not r["reused"]} <= {"select", "report"}


def test_the_new_run_is_resumed_and_extended_as_any_other(again, results):
    new = again(weighing(1, 2))
    ended = toys.evolver("resume", new, "--candidates", 10)
    assert (ended.code, ended.err) == (0, "")
    assert sorted(scores(new)) == list(range(10))
    assert scores(again(weighing(1, 2), "both", candidates=2)) == scores(new)
    for command in (["status", results, "--json"], ["report", new], ["explain", new]):
        ended = toys.evolver(*command)
        assert (ended.code, ended.err) == (0, ""), command


def test_the_number_of_workers_changes_nothing(again):
    changes = weighing(1, 2) | {"search": {"algorithm": "evolver", "generations": 3}}
    one = again(changes, "one", "fork", candidates=4)
    several = again(changes | {"pool": {"num_workers": 3}}, "several", "fork", make_pool=Several, candidates=4)
    assert toys.essence(one) == toys.essence(several)
    assert toys.winner(one) == toys.winner(several)


class Several(LocalPool):
    """Takes several candidates at a time, guesses among them, and hands their results back last first."""

    def free(self):
        return 3 - len(self._waiting)

    def wait(self):
        self._waiting.insert(0, self._waiting.pop())
        return super().wait()


def test_a_crash_before_the_results_are_there_is_mended(again, results):
    new = again(weighing(1, 2))
    before = toys.essence(new)
    shutil.rmtree(new / "ledger")
    text = config_at(new / "config.yaml")
    toys.refused(
        lambda: run(text, storage_at(results), no_work, toys.Silent(), "cpu", "new"), "0 of 8 candidates are there"
    )
    assert toys.essence(again(weighing(1, 2))) == before


def test_the_earlier_run_may_be_extended_meanwhile(again, results):
    new = again(weighing(1, 2))
    before = toys.essence(new)
    assert toys.evolver("resume", results / "toy", "--candidates", 9).code == 0
    assert toys.essence(again(weighing(1, 2), make_pool=no_work)) == before
    assert sorted(scores(again(weighing(1, 2), "later"))) == list(range(9))


def test_examples_in_prompts_stay_the_same(again, results, make_config, tmp_path):
    """They come from the documents that are not scored, so other report items would change every prompt."""
    shown = {"evaluation.tasks": [{**TASKS[0], "num_fewshot": 2}, TASKS[1]]}
    toys.run_here(make_config(tmp_path, PLAIN | {"run": "shown"} | shown, "shown.yaml"), results)
    toys.refused(lambda: again(PLAIN | shown, of="shown", fresh_report=True), "leave --fresh-report out")
    assert scores(again(PLAIN | shown, of="shown", make_pool=no_work)) == scores(results / "shown")


def test_a_retarget_may_set_constraints_on_tasks(again, results):
    """They are judged from the answers that are there, and the finals take what keeps them."""
    guarded = {"constraints": [{"task": "pair", "drop": 60, "confidence": 0.6}]}
    new = again(PLAIN | guarded)
    history = read_history(storage_at(new))
    assert all(r.violations.keys() == {"0"} for _, r in history.stages["search"] if r.complete)
    outcome = history.outcome()
    feasible = [r for _, r in history.stages["search"] if r.complete and r.feasible]
    assert outcome.finals.winner.dev.feasible == bool(feasible)
    assert history.about.ended.reason == "candidates"


def test_a_constraint_that_was_not_measured_is_refused(again, results):
    toys.refused(
        lambda: again(PLAIN | {"constraints": [{"norm": 1.5}]}),
        "new.yaml: constraints[0]: the models of", "were not measured for it while they were scored",
    )  # fmt: skip
    assert not (results / "new").exists()
