"""Failures are not for ever: those that are not the candidate's own are tried again at once, all others when asked."""

import contextlib
import re

import pytest
import requests
import torch
import toys
from test_pool import candidates, drive, fine

from evolver.config.reading import config_at
from evolver.dashboard.overview import Overview
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.ledger import Ledger, read_table
from evolver.records import Candidate, Result
from evolver.runs.history import read_history
from evolver.storage import storage_at
from evolver.workers import worker as working
from evolver.workers.failures import BrokenDevice, is_broken_device, is_out_of_memory, is_transient, told_reason
from evolver.workers.pools.local import LocalPool
from evolver.workers.retrying import IN_A_ROW, RetryingPool
from evolver.workers.shared import SharedPool
from evolver.workers.worker import Worker


class Failing:
    """A pool of one worker in which candidates fail as often as a script says, by their numbers."""

    def __init__(self, script, transient=True):
        self.script, self.transient, self.waiting, self.tried = dict(script), transient, [], []

    def free(self):
        return 1 - len(self.waiting)

    def submit(self, candidate):
        self.waiting.append(candidate)

    def wait(self):
        candidate = self.waiting.pop()
        self.tried.append(candidate.number)
        self.script[candidate.number] = self.script.get(candidate.number, 0) - 1
        if self.script[candidate.number] >= 0:
            return [Result.failed(candidate, "experts/maths: it cannot be read.", transient=self.transient)]
        return [fine(candidate)]

    def close(self):
        pass


def test_a_failure_that_is_not_the_candidates_own_is_tried_again_before_anybody_is_told():
    pool = Failing({1: 2, 3: 1})
    landed = drive(RetryingPool(pool, retries=2), candidates(5))
    assert [r.status for r in landed] == ["ok"] * 5
    assert pool.tried == [0, 1, 1, 1, 2, 3, 3, 4]


def test_no_more_often_than_the_pool_allows():
    pool = Failing({1: 9})
    landed = drive(RetryingPool(pool, retries=2), candidates(3))
    assert [r.status for r in landed] == ["ok", "failed", "ok"]
    assert pool.tried == [0, 1, 1, 1, 2]


def test_a_failure_of_its_own_is_told_at_once():
    pool = Failing({1: 9}, transient=False)
    landed = drive(RetryingPool(pool, retries=2), candidates(3))
    assert [r.status for r in landed] == ["ok", "failed", "ok"]
    assert pool.tried == [0, 1, 2]


def test_the_run_stops_where_every_candidate_fails_for_want_of_something_else():
    pool = Failing(dict.fromkeys(range(2, 9), 9))
    toys.refused(
        lambda: drive(RetryingPool(pool, retries=1), candidates(9)),
        "experts/maths: it cannot be read",
        "--retry-failed",
    )
    assert set(pool.tried) == set(range(2 + IN_A_ROW))
    scattered = Failing({k: 9 for k in range(9) if k % IN_A_ROW})
    assert len(drive(RetryingPool(scattered, retries=1), candidates(9))) == 9


def test_what_landed_with_the_failure_that_stops_a_run_is_kept():
    class Wide(Failing):
        """Everything that waits lands at once, in the order of the numbers."""

        def free(self):
            return 9 - len(self.waiting)

        def wait(self):
            return [result for _ in list(self.waiting) for result in super(Wide, self).wait()]

    pool = RetryingPool(Wide(dict.fromkeys(range(1, 1 + IN_A_ROW), 9)), retries=0)
    for candidate in reversed(candidates(2 + IN_A_ROW)):
        pool.submit(candidate)
    landed = pool.wait()
    assert [(r.number, r.status) for r in landed] == [
        (0, "ok"), *((n, "failed") for n in range(1, IN_A_ROW)), (1 + IN_A_ROW, "ok")
    ]  # fmt: skip
    toys.refused(pool.wait, "experts/maths: it cannot be read", "--retry-failed")


def _caused(error, cause):
    error.__cause__ = cause
    return error


MISSING = FileNotFoundError(2, "No such file or directory", "experts/maths/model.safetensors")


@pytest.mark.parametrize(
    ("error", "transient", "memory", "said"),
    [
        (MISSING, True, False, "experts/maths/model.safetensors: it cannot be read"),
        (
            _caused(BadInput("a: cannot be mapped; call again."), OSError(5, "I/O")),
            True,
            False,
            "a: cannot be mapped; c",
        ),
        (requests.ConnectionError("no route"), True, False, "no route"),
        (MemoryError(), False, True, "lower evaluation.batch_size"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to"), False, True, "Tried to"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), False, True, "pool.cache_gb"),
        (ValueError("11 tensors of the model are missing"), False, False, "ValueError: 11 tensors"),
    ],
)
def test_what_an_exception_says_of_its_candidate(error, transient, memory, said):
    assert (is_transient(error), is_out_of_memory(error)) == (transient, memory)
    assert said in told_reason(error)
    assert "FileNotFoundError" not in told_reason(error)
    assert not is_broken_device(error)


@pytest.fixture
def worker(make_config, tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(working.time, "sleep", pauses.append)
    ready = prepare(config_at(make_config(tmp_path)))
    made = Worker(ready.plan, "dev", tasks=ready.tasks)
    return made, Candidate(0, ready.experts[0], "test"), pauses


def _once(monkeypatch, worker, *errors):
    """Have the next evaluations fail with these errors."""
    score, left = worker.scorer.score_at, list(errors)

    def fails(places):
        if left:
            raise left.pop(0)
        return score(places)

    monkeypatch.setattr(worker.scorer, "score_at", fails)


def test_a_worker_that_is_short_of_memory_tries_once_more_with_an_empty_cache(worker, monkeypatch):
    made, candidate, pauses = worker
    _once(monkeypatch, made, MemoryError())
    made.materialiser._resident["a model"] = {}
    assert made.evaluate(candidate).status == "ok"
    assert not made.materialiser._resident
    _once(monkeypatch, made, MemoryError(), MemoryError())
    failed = made.evaluate(candidate)
    assert (failed.status, failed.transient, pauses) == ("failed", False, [])


def test_a_worker_waits_longer_after_each_failure_for_want_of_a_file(worker, monkeypatch):
    made, candidate, pauses = worker
    _once(monkeypatch, made, MISSING, MISSING)
    results = [made.evaluate(candidate) for _ in range(3)]
    assert [(r.status, r.transient) for r in results] == [("failed", True), ("failed", True), ("ok", False)]
    assert pauses == [working.FIRST_PAUSE_SECONDS, 2 * working.FIRST_PAUSE_SECONDS]


def test_an_accelerator_that_has_failed_is_no_candidates_fault(worker, monkeypatch):
    made, candidate, _ = worker
    error = torch.AcceleratorError.__new__(torch.AcceleratorError, "device-side assert triggered")
    _once(monkeypatch, made, error)
    with pytest.raises(BrokenDevice, match="device-side assert"):
        made.evaluate(candidate)


@pytest.mark.whole
def test_pieces_of_a_failed_candidate_are_over_before_it_is_tried_again(make_config, tmp_path):
    """Else pieces of the first try would be taken for those of the second."""
    ready = prepare(config_at(make_config(tmp_path)))
    alone = LocalPool(ready.plan, "dev", ready.tasks)
    candidate = Candidate(0, ready.experts[0], "test")
    (expected,) = drive(alone, [candidate])

    class Two(LocalPool):
        tries = 0

        def free(self):
            return 2 - len(self._waiting)

        def wait(self):
            self.tries += 1
            if self.tries == 1:
                return [Result.failed(self._waiting.pop(0), "a server was not there", transient=True)]
            return super().wait()

    from cluster.job import Evaluation

    scale, block = ready.tasks.scale("dev"), ready.plan.block("dev", 1)
    pool = RetryingPool(
        SharedPool(Two(ready.plan, "dev", ready.tasks), 2, lambda c: Evaluation(c, scale, block, None)), retries=1
    )
    (found,) = drive(pool, [candidate])
    assert (found.items, found.score) == (expected.items, expected.score)


SEARCHES = {
    "evolver": {"algorithm": "evolver"},
    "tpe": {"algorithm": "tpe", "method": "task_arithmetic"},
    "cmaes": {"algorithm": "cmaes", "method": "task_arithmetic"},
    "halving": {"algorithm": "halving", "of": {"algorithm": "tpe", "method": "task_arithmetic"}, "first": 6},
}


def failing_at(places, scored):
    """A pool in which evaluations fail: (stage, how many of the stage were before it). ``scored`` collects all."""

    class Pool(LocalPool):
        def wait(self):
            candidate = self._waiting[0]
            place = candidate.stage, sum(c.stage == candidate.stage for c in scored)
            scored.append(candidate)
            if place in places:
                return [Result.failed(self._waiting.pop(0), "the disk was gone", transient=True)]
            return super().wait()

    return Pool


@pytest.mark.whole
@pytest.mark.parametrize("name", SEARCHES)
@pytest.mark.parametrize("at", [("baseline", 2), ("search", 1), ("report", 1)], ids=lambda at: at[0])
def test_a_search_that_tries_its_failures_again_is_one_in_which_nothing_failed(
    make_config, tmp_path, monkeypatch, name, at
):
    monkeypatch.setattr("evolver.ledger.ledger.JOIN_FROM", 7)
    config = make_config(tmp_path, {**toys.SHORT, "search": SEARCHES[name], "budget.candidates": 8})
    clean = toys.run_here(config, tmp_path / "clean", failing_at((), alone := []))
    with contextlib.suppress(BadInput, RuntimeError):  # a finalist that failed ends some runs
        toys.run_here(config, tmp_path / "results", failing_at({at, ("search", 3)}, []))
    found, lines = tmp_path / "results" / clean.name, toys.Silent()
    before = toys.all_rows(found, "finished")
    assert [r for r in before if r["status"] == "failed" and r["stage"] == at[0]]
    toys.run_here(config, tmp_path / "results", failing_at((), second := []), lines, retry_failed=True)
    assert toys.essence(found) == toys.essence(clean)
    assert toys.winner(found) == toys.winner(clean)
    assert any("failed before: the search continues" in line for line in lines.lines)
    # What was scored and is asked for alike is not scored again.
    asked = [(c.stage, c.recipe.id, c.question.bar, c.question.limit, len(c.question.known)) for c in alone]
    kept = {(r["stage"], r["recipe_id"], r["bar"], r["limit"], r["given"]) for r in before if r["status"] == "ok"}
    assert len(second) == sum(question not in kept for question in asked)


@pytest.mark.whole
def test_results_that_the_search_no_longer_asks_for_are_counted(make_config, tmp_path):
    config = make_config(tmp_path, {**toys.SHORT, "search": SEARCHES["cmaes"], "budget.candidates": 24})
    results = tmp_path / "results"
    run = storage_at(toys.run_here(config, results, failing_at({("search", 1)}, [])))
    overview = Overview(run)
    assert overview.rows("search").texts("status").count("failed") == 1
    assert "--retry-failed" in run.read("report.md").decode()
    toys.run_here(config, results, failing_at((), []), retry_failed=True)
    history = read_history(run)
    lost = history.lost
    assert 0 < len(lost) < len(history.orphaned)
    asked = {c.recipe.id for c, _ in history.stages["search"]}
    assert not asked & {r.recipe_id for r in lost if r.stage == "search"}
    assert re.search(rf"no longer asks for +\| +{len(lost)} +\|", run.read("report.md").decode())
    overview.refresh()
    for seen in (overview, Overview(run)):
        assert seen.rows("search").numbers("number").tolist() == [c.number for c, _ in history.stages["search"]]
        assert seen.rows("search").texts("recipe_id") == [r.recipe_id for _, r in history.stages["search"]]
        assert (seen.flying, seen.guessed) == (0, 0)
    # Nothing is left to be tried again, and nothing is evaluated.
    lines = toys.Silent()
    toys.run_here(config, results, toys.no_work, lines, retry_failed=True)
    assert "no candidate has failed in an earlier call, so none is tried again" in lines.lines


def test_a_failed_model_is_tried_again_where_it_is_proposed_again(tmp_path):
    """If it was not to blame; a failure of its own is known to come again."""
    for transient in (True, False):
        with contextlib.closing(Ledger(storage_at(tmp_path / str(transient)), "owner")) as ledger:
            first, second = (Candidate(k, candidates(1)[0].recipe, "test") for k in range(2))
            ledger.write_result(first, Result.failed(first, "why", transient=transient))
            ledger.write_guess(second, Result.failed(second, "why", transient=True))
            assert ledger.answer(first).status == "failed"
            assert (ledger.answer(second) is None) == transient


def test_a_ledger_with_retries_is_read_whole_after_its_parts_were_joined(tmp_path, monkeypatch):
    monkeypatch.setattr("evolver.ledger.ledger.JOIN_FROM", 3)
    storage = storage_at(tmp_path)
    with contextlib.closing(Ledger(storage, "owner")) as ledger:
        for k, candidate in enumerate(candidates(6)):
            failed = k in (2, 4)
            ledger.write_result(candidate, Result.failed(candidate, "why") if failed else fine(candidate))
        assert ledger.retry_failed() == 2
        answered = [ledger.answer(c) for c in candidates(6)]
        assert [a is None for a in answered] == [False, False, True, False, True, False]
        for candidate, answer in zip(candidates(6), answered, strict=True):
            ledger.write_result(candidate, answer or fine(candidate))
    with contextlib.closing(Ledger(storage, "owner")) as again:
        assert [r.number for r in again.results("search")] == list(range(6))
        assert again.retry_failed() == 0
    assert read_table(storage)["event"].to_pylist().count("finished") == 6


@pytest.mark.whole
def test_the_commands_try_failures_again(make_config, tmp_path):
    config = make_config(tmp_path, toys.SHORT)
    folder = toys.run_here(config, tmp_path / "results", failing_at({("baseline", 4)}, []))
    assert {r["status"] for r in toys.all_rows(folder, "finished")} == {"ok", "failed"}
    said = toys.evolver("run", config, "--results", tmp_path / "results", "--retry-failed")
    assert said.code == 0, said.err
    assert {r["status"] for r in toys.all_rows(folder, "finished")} == {"ok"}
    said = toys.evolver("resume", folder, "--retry-failed")
    assert said.code == 0, said.err
