"""What workers are told of a recipe: what they lack, and everything where they have lost what they were told."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from simulation import SimulatedCrew, lognormal

from evolver.config import PoolSettings
from evolver.records import Candidate, Result
from evolver.records.graph import UnknownNode
from evolver.records.recipe import Cross, Expert
from evolver.workers import telling
from evolver.workers.crew import Answered
from evolver.workers.crew_pool import CrewPool
from evolver.workers.messages import unpack_result
from evolver.workers.telling import LACKS, Inbox, LongRecipe, Told


def lineage(count, seed=0):
    """Candidates of a search that accepts every one of them."""
    draw = random.Random(seed)
    members = [Expert(f"expert {i}", f"{i:020x}") for i in range(4)]
    for number in range(count):
        i, j = draw.sample(range(4), 2)
        members[i] = Cross(members[i], (members[j],), "evolver", 0.5, 0.5, draw.getrandbits(32))
        yield Candidate(number, members[i], "evolver", (members[j].id,))


def scored(candidate):
    return Result(candidate.number, candidate.recipe.id, "ok", 0.5, 0.5, True, (0.5,))


def drive(pool, wanted):
    waiting, landed = list(wanted), {}
    while len(landed) < len(wanted):
        while waiting and pool.free() > 0:
            pool.submit(waiting.pop(0))
        landed |= {result.number: result for result in pool.wait()}
    return landed


def test_messages_do_not_grow_with_the_lineage():
    told, inbox = Told(), Inbox()
    sizes = []
    for candidate in lineage(2000):
        message = told.pack(0, candidate)
        sizes.append(len(message))
        assert inbox.candidate(message) == candidate
    assert max(sizes[-100:]) <= max(sizes[:100]) <= 700


def test_a_worker_that_lost_its_nodes_says_so_and_is_told_everything():
    told, inbox = Told(), Inbox()
    *before, last = lineage(50)
    for candidate in before:
        inbox.candidate(told.pack(0, candidate))
    fresh, asked = Inbox(), []
    assert fresh.answer(told.pack(0, last), asked.append) == LACKS
    assert not asked
    told.forget(0)
    assert unpack_result(fresh.answer(told.pack(0, last), scored)) == scored(last)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), workers=st.integers(1, 5), losses=st.floats(0, 0.5))
def test_whatever_workers_lose_every_candidate_is_scored_as_it_is(seed, workers, losses):
    draw, wanted = random.Random(seed), list(lineage(60, seed))
    deaths = [(draw.uniform(0, 30), draw.randrange(workers), draw.random() < 0.5) for _ in range(3)]
    crew = SimulatedCrew(scored, lognormal(0.5), deaths=deaths)
    send = crew.send

    def sending(worker, message):
        if draw.random() < losses:
            crew.inboxes.pop(worker, None)
        send(worker, message)

    crew.send = sending
    landed = drive(CrewPool(crew, PoolSettings(num_workers=workers, retries=20)), wanted)
    assert landed == {c.number: scored(c) for c in wanted}
    assert {c.number: c for c in crew.evaluated} == {c.number: c for c in wanted}


def test_a_worker_that_never_understands_is_replaced():
    crew = SimulatedCrew(scored)
    send = crew.send

    def sending(worker, message):
        if worker == 0:
            crew._at(crew.time, lambda: Answered(0, LACKS))
        else:
            send(worker, message)

    crew.send = sending
    landed = drive(CrewPool(crew, PoolSettings(num_workers=1, retries=1)), list(lineage(5)))
    assert {result.status for result in landed.values()} == {"ok"}
    assert crew.hired == 2


def test_a_worker_keeps_no_more_than_the_limit(monkeypatch):
    monkeypatch.setattr(telling, "MOST_NODES", 40)
    told, inbox = Told(), Inbox()
    for candidate in lineage(30):
        for _ in range(2):
            assert inbox.candidate(told.pack(0, candidate)) == candidate
            assert len(inbox._nodes) <= 40
    draw = random.Random(1)
    for number in range(200):  # children of one parent, of which none lives on
        child = Cross(candidate.recipe, (candidate.recipe.parent,), "evolver", 0.5, 0.5, draw.getrandbits(32))
        one = Candidate(number, child, "evolver")
        assert inbox.candidate(told.pack(0, one)) == one
        assert len(inbox._nodes) <= 40


def test_a_recipe_beyond_the_limit_is_refused_and_the_others_are_scored(monkeypatch):
    monkeypatch.setattr(telling, "MOST_NODES", 20)
    *_, long = lineage(60)
    with pytest.raises(LongRecipe, match=r"has \d\d nodes, and workers take recipes of at most 20"):
        Told().pack(0, long)
    short = [Candidate(k, c.recipe, "test") for k, c in enumerate(lineage(3))]
    landed = drive(CrewPool(SimulatedCrew(scored), PoolSettings(num_workers=2)), [*short, long])
    assert "workers take recipes of at most 20" in landed[long.number].reason
    assert [landed[k].status for k in range(3)] == ["ok"] * 3


def test_a_whole_message_replaces_what_came_before():
    told, inbox = Told(), Inbox()
    first, second = lineage(2)
    inbox.candidate(told.pack(0, first))
    inbox.candidate(Told().pack(0, Candidate(7, Expert("else", "ee"), "test")))
    with pytest.raises(UnknownNode):
        inbox.candidate(told.pack(0, second))
