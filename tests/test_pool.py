"""The pool's decisions, in virtual time: who gets what, and what becomes of a candidate whose worker dies or hangs."""

import random

import pytest
from simulation import SimulatedCrew, lognormal

from evolver.config import PoolSettings as Settings
from evolver.errors import BadInput
from evolver.records import Candidate, Result
from evolver.records.recipe import Expert
from evolver.workers.crew_pool import LOSSES, PLACE_SECONDS, STILLBORN, CrewPool


def candidates(count):
    return [Candidate(k, Expert(f"e{k}", f"{k:04x}"), "test") for k in range(count)]


def fine(candidate):
    return Result(candidate.number, candidate.recipe.id, "ok", 0.5, 0.5, True, (0.5,))


def drive(pool, wanted):
    """Keep the pool full until all have landed, in the order of landing."""
    waiting, landed = list(wanted), []
    while len(landed) < len(wanted):
        while waiting and pool.free() > 0:
            pool.submit(waiting.pop(0))
        landed += pool.wait()
    return landed


def test_all_workers_are_busy_while_candidates_wait():
    crew = SimulatedCrew(fine, lognormal(0.5))
    landed = drive(CrewPool(crew, Settings(num_workers=64)), candidates(6400))
    assert sorted(r.number for r in landed) == list(range(6400))
    assert crew.busy / (64 * crew.time) > 0.95


def test_no_more_is_taken_than_there_are_workers():
    pool = CrewPool(SimulatedCrew(fine), Settings(num_workers=3))
    drive(pool, candidates(10))  # until all of them have come
    assert pool.free() == 3
    for k, candidate in enumerate(candidates(3)):
        assert pool.free() == 3 - k
        pool.submit(candidate)
    assert pool.free() == 0


def test_a_candidate_of_a_dead_worker_goes_to_another_one():
    crew = SimulatedCrew(fine, lambda c: 10.0, deaths=[(5.0, 0, False)])
    landed = drive(CrewPool(crew, Settings(num_workers=2)), candidates(6))
    assert {r.status for r in landed} == {"ok"}
    assert sorted(r.number for r in landed) == list(range(6))
    assert crew.hired == 3
    assert len(crew.evaluated) == 6


def test_a_candidate_that_kills_twice_fails_with_the_reason():
    """Whoever gets candidate 2 dies after a second."""
    deadly = SimulatedCrew(fine, lambda c: 10.0)
    send = deadly.send

    def sending(worker, message):
        send(worker, message)
        if pool._busy[worker].candidate.number == 2:
            deadly._at(deadly.time + 1, lambda: deadly._die(worker, False))

    pool = CrewPool(deadly, Settings(num_workers=2, retries=1))
    deadly.send = sending
    landed = drive(pool, candidates(5))
    assert {r.number: r.status for r in landed} == {0: "ok", 1: "ok", 2: "failed", 3: "ok", 4: "ok"}
    (failed,) = [r for r in landed if r.status == "failed"]
    assert failed.reason == "its worker died (killed); tried 2 times"


def test_a_node_that_is_lost_is_not_held_against_the_candidate():
    """Spot machines go as they like: every worker is lost after three seconds, for half a minute."""
    deaths = [(3.0 * k, k, True) for k in range(1, 10)]
    crew = SimulatedCrew(fine, lambda c: 4.0, start=0.5, deaths=deaths)
    landed = drive(CrewPool(crew, Settings(num_workers=1, retries=0)), candidates(3))
    assert [r.status for r in landed] == ["ok"] * 3


def test_what_hangs_is_ended_and_its_worker_replaced():
    crew = SimulatedCrew(fine, lambda c: 1e9 if c.number == 1 else 1.0)
    landed = drive(CrewPool(crew, Settings(num_workers=2, timeout_s=20)), candidates(8))
    assert {r.number for r in landed if r.status == "failed"} == {1}
    assert next(r for r in landed if r.status == "failed").reason == "timed out after 20 s"
    assert crew.time < 30
    assert crew.hired == 3


def test_workers_join_while_it_runs():
    """Room for two at first, for eight after ten seconds: what is left goes four times as fast."""
    crew = SimulatedCrew(fine, places=[(0.0, 2), (10.0, 8)])
    drive(CrewPool(crew, Settings(num_workers=8)), candidates(20 + 80))
    assert crew.time == pytest.approx(20, abs=1.5)


def test_workers_leave_while_it_runs():
    crew = SimulatedCrew(fine, places=[(0.0, 8), (9.5, 2)], deaths=[(10.2, w, True) for w in range(6)])
    landed = drive(CrewPool(crew, Settings(num_workers=8)), candidates(80 + 20))
    assert sorted(r.number for r in landed) == list(range(100))
    assert crew.time == pytest.approx(10 + 14, abs=3)


def test_nobody_ready_in_time_is_said():
    with pytest.raises(BadInput, match=f"no worker was ready within {PLACE_SECONDS:.0f} s"):
        CrewPool(SimulatedCrew(fine, places=[]), Settings(num_workers=2))


def test_all_workers_gone_for_good_is_said():
    crew = SimulatedCrew(fine, places=[(0.0, 2), (1.0, 0)], deaths=[(5.5, 0, True), (5.5, 1, True)])
    with pytest.raises(BadInput, match="no worker was ready"):
        drive(CrewPool(crew, Settings(num_workers=2)), candidates(40))


def test_workers_that_die_before_they_are_ready_end_the_run():
    crew = SimulatedCrew(fine, start=5.0, deaths=[(1.0 + k, k, False) for k in range(50)])
    with pytest.raises(BadInput, match="ended before they were ready"):
        CrewPool(crew, Settings(num_workers=1))
    assert crew.hired == STILLBORN


@pytest.mark.parametrize("seed", range(20))
def test_nothing_is_lost_whoever_dies(seed):
    """Random deaths all the time; every candidate lands once, and those that ran to their end did so once."""
    draw = random.Random(seed)
    deaths = [(draw.uniform(0, 60), draw.randrange(60), draw.random() < 0.5) for _ in range(40)]
    crew = SimulatedCrew(fine, lognormal(0.5), start=0.3, deaths=deaths)
    landed = drive(CrewPool(crew, Settings(num_workers=6, retries=50)), candidates(200))
    assert sorted(r.number for r in landed) == list(range(200))
    assert {r.status for r in landed} == {"ok"}
    assert len(crew.evaluated) == len({c.number for c in crew.evaluated}) == 200


def test_a_candidate_that_takes_nodes_down_fails_in_the_end():
    deaths = [(0.5 + k, k, True) for k in range(100)]
    crew = SimulatedCrew(fine, lambda c: 10.0, deaths=deaths)
    (landed,) = drive(CrewPool(crew, Settings(num_workers=1)), candidates(1))
    assert landed.reason == f"its node was lost (killed); tried on {LOSSES + 1} nodes"
