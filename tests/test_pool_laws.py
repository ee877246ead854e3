"""The laws of pools, which every registered one is held to: whoever evaluates them, candidates score the same."""

from __future__ import annotations

import pytest

from cluster.job import make_pool
from cluster.pools import pool_names
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.records import Candidate
from evolver.records.recipe import Merge, Rule
from evolver.workers.worker import Worker

pytestmark = pytest.mark.whole

# A pool under each name; of this machine's one with processes, too, and one whose workers share a candidate.
POOLS = {
    **{name: {"kind": name} for name in pool_names()},
    "local, in processes": {"kind": "local", "num_workers": 2},
    "local, shared": {"kind": "local", "num_workers": 2, "share": 2},
}


def marked(name):
    return pytest.param(POOLS[name], id=name, marks=[pytest.mark.ray] if POOLS[name]["kind"] == "ray" else [])


@pytest.fixture(scope="module")
def alone(make_config, tmp_path_factory):
    """Candidates, one of which cannot be built, and what a worker alone says of them."""
    ready = prepare(config_at(make_config(tmp_path_factory.mktemp("alone"))))
    rules = [Rule.of({"weight": (1 / 3,) * 3, "lambda": mass, "normalize": False}) for mass in (0.5, 1.0, 2.0)]
    recipes = [*ready.experts, *(Merge("task_arithmetic", ready.experts, ready.base, (r,)) for r in rules)]
    recipes.append(Merge("no such method", ready.experts, ready.base))
    candidates = [Candidate(n, recipe, "law") for n, recipe in enumerate(recipes)]
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    return candidates, [worker.evaluate(c) for c in candidates]


@pytest.fixture(params=[marked(name) for name in POOLS])
def pool(request, make_config, tmp_path):
    ready = prepare(config_at(make_config(tmp_path, {"pool": request.param})))
    pool = make_pool(ready.plan, "dev", ready.tasks)
    yield pool
    pool.close()


def test_every_candidate_has_one_result_which_is_that_of_a_worker_alone(pool, alone):
    candidates, expected = alone
    waiting, landed, outstanding = list(candidates), {}, 0
    while waiting or outstanding:
        while waiting and pool.free() > 0:
            before = pool.free()
            pool.submit(waiting.pop(0))
            outstanding += 1
            assert pool.free() <= before
        results = pool.wait()
        assert results
        for result in results:
            assert result.number not in landed
            landed[result.number] = result
            outstanding -= 1
    for result in expected:
        got = landed[result.number]
        assert (got.recipe_id, got.status, got.items, got.score) == (
            result.recipe_id, result.status, result.items, result.score,
        )  # fmt: skip
    assert landed[len(candidates) - 1].status == "failed"
    assert "no such method" in landed[len(candidates) - 1].reason


def test_a_pool_in_which_nothing_was_evaluated_can_be_closed_and_so_can_a_closed_one(pool):
    assert pool.free() > 0
    pool.close()
    pool.close()
