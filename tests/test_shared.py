"""Several workers share a candidate: the result is the one that one worker would have given."""

import random
from dataclasses import replace

import pytest
from test_racing import even

from evolver.evaluation.scores.course import Evaluation
from evolver.records import Candidate, Question, Result
from evolver.records.order import reordered
from evolver.records.recipe import Expert
from evolver.workers.shared import SharedPool

COUNT, BLOCK = 60, 8
SCALE = even(COUNT)


def answers(candidate):
    """A model's answers to all items; the recipe decides how good it is."""
    draw = random.Random(candidate.recipe.id)
    quality = draw.uniform(0.2, 0.8)
    return [float(draw.random() < quality) for _ in range(COUNT)]


def course(candidate):
    return Evaluation(candidate, SCALE, BLOCK, 0.2)


def alone(candidate):
    """What one worker says."""
    way, items = course(candidate), list(candidate.question.known)
    every = reordered(answers(candidate), candidate.question.order)
    for start, stop in way.blocks():
        items += every[start:stop]
        if way.ended(items):
            break
    return way.result(items, {"total": 1.0}, {"tokens": 1.0}, "w")


class Workers:
    """Workers that answer in random order; ``broken`` pieces, by candidate and first item, fail."""

    def __init__(self, count, seed, broken=()):
        self.count, self.draw, self.broken, self.flying, self.pieces = count, random.Random(seed), broken, [], 0

    def free(self):
        return self.count - len(self.flying)

    def submit(self, candidate):
        self.flying.append(candidate)
        self.pieces += candidate.question.piece is not None

    def wait(self):
        candidate = self.flying.pop(self.draw.randrange(len(self.flying)))
        if candidate.question.piece is None:
            return [alone(candidate)]
        start, stop = candidate.question.piece
        names = (candidate.number, candidate.recipe.id)
        if (candidate.number, start) in self.broken:
            return [Result(*names, "failed", reason="broken", stage=candidate.stage)]
        items = reordered(answers(candidate), candidate.question.order)[start:stop]
        return [Result(*names, "ok", items=items, seconds={"total": 1.0}, counts={"tokens": 1.0}, worker="w",
                       stage=candidate.stage, given=start)]  # fmt: skip

    def close(self):
        pass


def candidates(seed, count=40):
    """Of all kinds: with a bar, in a race, with a limit, with known items."""
    draw = random.Random(seed)
    for k in range(count):
        plain = Candidate(k, Expert(f"e{k}", f"{seed}{k:04x}"), "test")
        if draw.random() < 0.7:
            rival = tuple(float(draw.random() < 0.65) for _ in range(COUNT))
            racing = draw.random() < 0.5
            plain = plain.asking(bar=sum(rival) / COUNT, rival=rival if racing else ())
        elif draw.random() < 0.5:
            plain = plain.asking(limit=draw.randrange(1, COUNT))
        plain = plain.asking(order="another" if k % 3 else "")
        if draw.random() < 0.4:
            known = reordered(answers(plain), plain.question.order)
            plain = plain.asking(known=known[: BLOCK * draw.randrange(4)])
        yield plain


def drive(pool, wanted):
    waiting, landed = list(wanted), {}
    while waiting or len(landed) < len(wanted):
        while waiting and pool.free() > 0:
            pool.submit(waiting.pop(0))
        for result in pool.wait():
            assert result.number not in landed
            landed[result.number] = result
    return landed


def essence(result):
    return replace(result, seconds={}, counts={}, worker="")


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_the_result_is_that_of_one_worker(parts, seed):
    wanted = list(candidates(seed))
    workers = Workers(6, seed)
    landed = drive(SharedPool(workers, parts, course), wanted)
    assert workers.pieces > len(wanted)
    for candidate in wanted:
        found = landed[candidate.number]
        assert essence(found) == essence(alone(candidate))
        own = answers(candidate) if found.complete else reordered(answers(candidate), candidate.question.order)
        assert found.items == tuple(own)[: len(found.items)]
        assert found.order == candidate.question.order
    stopped = [r for r in landed.values() if not r.complete]
    assert any(r.raced for r in stopped)
    assert any(not r.raced for r in stopped)


def test_what_the_pieces_took_is_added_up():
    (result,) = drive(SharedPool(Workers(3, 0), 3, course), [Candidate(0, Expert("e", "ab"), "test")]).values()
    assert (result.seconds, result.counts, result.worker) == ({"total": 3.0}, {"tokens": 3.0}, "w+w+w")


def test_a_piece_that_fails_fails_its_candidate_once():
    wanted = [Candidate(k, Expert(f"e{k}", f"{k:04x}"), "test") for k in range(10)]
    broken = {(3, 0), (3, 24), (7, 24)}
    landed = drive(SharedPool(Workers(4, 1, broken), 3, course), wanted)
    assert {n for n, r in landed.items() if r.status == "failed"} == {3, 7}
    assert {landed[n].reason for n in (3, 7)} == {"broken"}


def test_a_candidate_of_one_block_is_one_worker_s():
    workers = Workers(4, 0)
    drive(SharedPool(workers, 4, course), [Candidate(0, Expert("e", "ab"), "test", question=Question(limit=BLOCK))])
    assert workers.pieces == 0


def test_no_worker_is_kept_idle_by_an_odd_number():
    workers = Workers(5, 0)
    pool = SharedPool(workers, 2, course)
    assert pool.free() == 3
    for k in range(3):
        pool.submit(Candidate(k, Expert(f"e{k}", f"{k:04x}"), "test"))
    assert pool.free() == 0
    assert len(workers.flying) == 6
