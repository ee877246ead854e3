"""Ray carries candidates and results, and changes neither, whatever happens to its workers."""

from __future__ import annotations

import os
import random
import signal
import time
from dataclasses import asdict
from functools import partial
from types import SimpleNamespace

import pytest
import ray
import toys
from tenacity import Retrying, stop_after_attempt, wait_fixed

from cluster.command import run_job
from cluster.pools import pool_named
from cluster.pools import ray as crew
from cluster.pools.ray import check_resources, on_ray, resources_of
from cluster.survey import choose_on_ray
from evolver.commands.collecting import collect_statistics
from evolver.config.reading import config_at, load
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.evaluation.scores.course import Evaluation
from evolver.ledger import Ledger
from evolver.loop import evolve
from evolver.records import Candidate, Question, Result
from evolver.records.recipe import Cross, Expert
from evolver.search.ahead import Guessable, ahead
from evolver.search.plain import Listed
from evolver.storage import storage_at
from evolver.workers.compute import ComputeChoice
from evolver.workers.messages import pack_candidate, pack_result, unpack_candidate, unpack_result
from evolver.workers.pools.local import LocalPool
from evolver.workers.shared import SharedPool
from evolver.workers.telling import Inbox

pytestmark = [pytest.mark.ray, pytest.mark.whole]

KILOBYTES_10 = 10_000
POOL = {"kind": "ray", "num_workers": 2, "num_cpus": 0.5}
SEARCHES = {
    "sequential": {"search.generations": 3, "budget.candidates": 12},
    "generational": {"search.mode": "generational", "search.generations": 3, "budget.candidates": 12},
    "tpe": {"search": {"algorithm": "tpe", "startup": 4, "in_flight": 2}, "budget.candidates": 8},
}


@pytest.fixture(scope="module", autouse=True)
def _cluster():
    # Ray gives its own processes a fixed time to start, which a busy machine may not keep.
    for attempt in Retrying(
        stop=stop_after_attempt(4), wait=wait_fixed(5), reraise=True, after=lambda _: ray.shutdown()
    ):
        with attempt:
            ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def ready(make_config, tmp_path_factory):
    """``ready(name)``: a search, prepared anew; they differ in nothing that a worker is built from."""
    folder = tmp_path_factory.mktemp("ray")

    def prepared(name):
        return prepare(config_at(make_config(folder, {**SEARCHES[name], "pool": POOL})))

    return prepared


@pytest.fixture(scope="module")
def actors(ready):
    """Two real workers, shared by the tests that leave them whole."""
    pool = on_ray(ready("generational").plan, "dev", None)
    yield pool
    pool.close()


class OneAtATime:
    """A pool of which only one worker is used."""

    def __init__(self, pool):
        self.pool, self.flying = pool, 0

    def free(self):
        return 1 - self.flying

    def submit(self, candidate):
        self.flying += 1
        self.pool.submit(candidate)

    def wait(self):
        landed = self.pool.wait()
        self.flying -= len(landed)
        return landed


def play(search, pool, folder, watch=lambda candidate, result: None):
    """Run a search; what matters of its results by number, and the number of the winner."""
    found = {}

    def keep(candidate, result):
        found[candidate.number] = (candidate.recipe.id, result.status, result.score, result.bound, result.items)
        watch(candidate, result)

    ledger = Ledger(storage_at(folder), "owner")
    evolve(search, pool, ledger, keep, partial(ahead, search) if isinstance(search, Guessable) else None)
    ledger.close()
    scored = {n: f[2] for n, f in found.items() if f[2] is not None}
    return found, max(scored, key=lambda n: (scored[n], -n))


@pytest.fixture(scope="module")
def undisturbed(ready, tmp_path_factory):
    """Every search in this process."""
    out = {}
    for name in SEARCHES:
        prepared = ready(name)
        pool = LocalPool(prepared.plan, "dev", prepared.tasks)
        out[name] = play(prepared.search, pool, tmp_path_factory.mktemp("local"))
    return out


def test_a_task_on_the_cluster_chooses_in_which_dtype_to_compute(ready):
    prepared = ready("generational")
    assert choose_on_ray(prepared.config) == ComputeChoice("float32", "the weights are float32")
    gone = prepared.config.model.model_copy(update={"base": "/nowhere"})
    with pytest.raises(BadInput, match="/nowhere"):
        choose_on_ray(prepared.config.model_copy(update={"model": gone}))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("name", SEARCHES)
def test_any_number_of_workers_gives_the_same_run(ready, actors, undisturbed, tmp_path, name, workers):
    pool = actors if workers == 2 else OneAtATime(actors)
    assert play(ready(name).search, pool, tmp_path) == undisturbed[name]


@pytest.mark.parametrize("name", ["sequential", "generational"])
def test_workers_that_share_candidates_give_the_same_run(ready, actors, undisturbed, tmp_path, name):
    prepared = ready(name)
    scale, block = prepared.tasks.scale("dev"), prepared.config.evaluation.block_items
    assert 2 * block < len(scale.tasks)
    shared = SharedPool(actors, 2, lambda candidate: Evaluation(candidate, scale, block, None))
    assert play(prepared.search, shared, tmp_path) == undisturbed[name]


def test_candidates_and_results_are_a_few_kilobytes(actors):
    assert actors.messages >= sum(s["budget.candidates"] for s in SEARCHES.values())
    assert 0 < actors.bytes_sent / actors.messages <= KILOBYTES_10
    assert 0 < actors.bytes_received / actors.messages <= KILOBYTES_10


def test_statistics_are_collected_by_workers_and_kept_for_all(make_config, tmp_path, monkeypatch):
    """On two workers the same bytes as in this process, in the cache that they share."""
    changes = {"search": {"algorithm": "tpe", "method": "fisher"}, "statistics": {"items": 7}, "pool": POOL}
    given = config_at(make_config(tmp_path, changes))
    found = [*collect_statistics(given, ["gram", "fisher"], "cpu", pool_named("ray"), choose_on_ray)]
    assert sorted((k.node.collected, k.node.of.label, k.fresh) for k in found) == [
        (kind, name, True) for kind in ("fisher", "gram") for name in "abc"
    ]
    again = [*collect_statistics(given, ["gram", "fisher"], "cpu", lambda *_: pytest.fail("a pool"), choose_on_ray)]
    assert {(k.file, k.fresh) for k in again} == {(k.file, False) for k in found}
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path / "cache"))
    here = [*collect_statistics(given, ["gram", "fisher"], "cpu", LocalPool, choose_on_ray)]
    assert all(k.fresh for k in here)
    assert {k.file.name: k.file.read_bytes() for k in here} == {k.file.name: k.file.read_bytes() for k in found}


def test_a_whole_run_is_the_same_run(make_config, tmp_path):
    changes = SEARCHES["generational"]
    here = toys.run_here(make_config(tmp_path, {**changes, "pool": {"kind": "local"}}), tmp_path / "here")

    def complete(*arguments):
        """The pool with all of its workers there, however long that takes on a busy machine."""
        pool = pool_named("ray")(*arguments)
        while pool._coming:
            pool._hear(pool._events())
        return pool

    there = toys.run_here(make_config(tmp_path, {**changes, "pool": POOL}), tmp_path / "there", complete)
    assert toys.essence(there) == toys.essence(here)
    assert toys.winner(there) == toys.winner(here)
    workers = {r["worker"] for r in toys.rows(there).values() if not r["reused"]}
    assert workers <= {"ray-0", "ray-1"}
    assert len(workers) == 2


def test_a_killed_worker_is_replaced(ready, undisturbed, tmp_path):
    prepared = ready("generational")
    pool = on_ray(prepared.plan, "dev", None)
    killed = []

    def watch(candidate, result):
        if candidate.number >= 4 and not killed:
            killed.append(next(iter([*pool._busy, *pool._idle])))  # one that is at work, if any is
            os.kill(pool._crew._where[killed[0]]["pid"], signal.SIGKILL)

    try:
        assert play(prepared.search, pool, tmp_path, watch) == undisturbed["generational"]
    finally:
        pool.close()
    assert killed
    assert pool._crew._hired == 3


# Workers that misbehave on purpose need no models.


def fragile():
    """An actor class whose candidates die, hang or answer, as their label says. Local, so that it travels by value."""

    @ray.remote
    class Fragile:
        def __init__(self, plan, split, name):
            self.name, self.inbox = name, Inbox()

        def ready(self):
            return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

        def evaluate(self, message):
            return self.inbox.answer(message, self.score)

        def score(self, candidate):
            if candidate.label.startswith("deadly"):
                os._exit(1)
            if candidate.label == "forgets":
                self.inbox = Inbox()
            if candidate.label == "hangs":
                time.sleep(10_000)  # were it waited for, the test would not end
            draw = random.Random(candidate.number)
            items = tuple(draw.random() for _ in range(300))
            tasks = {"toy": sum(items) / 300}
            return Result(
                candidate.number, candidate.recipe.id, "ok", tasks["toy"], tasks["toy"], True, items, tasks,
                {"total": 1.0}, worker=self.name, stage=candidate.stage,
            )  # fmt: skip

    return Fragile


@pytest.fixture
def fragile_pool(make_config, tmp_path, monkeypatch):
    """``fragile_pool(**pool settings)``: a pool of such actors."""
    monkeypatch.setattr(crew, "PopulationWorker", fragile())
    made = []

    def make(**settings):
        config = load(make_config(tmp_path, {"pool": {**POOL, **settings}}))
        made.append(on_ray(SimpleNamespace(config=config), "dev", None))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


def labelled(*labels):
    return Listed([(label, Expert(label, f"digest {n}")) for n, label in enumerate(labels)], "baseline")


def test_a_candidate_that_kills_its_worker_fails_and_the_run_goes_on(fragile_pool, tmp_path):
    search, pool = labelled("fine", "deadly", "good", "deadly too", "well"), fragile_pool(retries=1)
    ledger = Ledger(storage_at(tmp_path / "ledger"), "owner")
    evolve(search, pool, ledger, lambda candidate, result: None)
    ledger.close()
    assert [search.results[label].status for label in ("fine", "good", "well")] == ["ok"] * 3
    for label in ("deadly", "deadly too"):
        assert search.results[label].status == "failed"
        assert "its worker died" in search.results[label].reason
        assert "tried 2 times" in search.results[label].reason
    recorded = toys.rows(tmp_path)
    assert recorded["baseline", 1]["status"] == "failed"
    assert recorded["baseline", 1]["reason"] == search.results["deadly"].reason


def test_a_candidate_that_hangs_times_out(fragile_pool, tmp_path):
    search, pool = labelled("fine", "hangs", "good"), fragile_pool(num_workers=1, timeout_s=5.0)
    ledger = Ledger(storage_at(tmp_path / "ledger"), "owner")
    evolve(search, pool, ledger, lambda candidate, result: None)
    ledger.close()
    assert (search.results["fine"].status, search.results["good"].status) == ("ok", "ok")
    assert search.results["hangs"].status == "failed"
    assert "timed out after 5 s" in search.results["hangs"].reason


def lineage(nodes):
    """A child of a child of … a child, ``nodes`` crossovers deep, with partners drawn from all that came before."""
    draw = random.Random(0)
    members = [Expert(name, f"{draw.getrandbits(80):020x}") for name in "abcd"]
    for _ in range(nodes):
        members.append(Cross(members[-1], (draw.choice(members),), "evolver", 0.5, 0.5, draw.getrandbits(32)))
    return members[-1]


def test_a_long_lineage_and_many_items_still_are_a_few_kilobytes(fragile_pool):
    pool = fragile_pool(num_workers=1)
    candidate = Candidate(0, lineage(60), "evolver", ("parent",) * 2, Question(bar=0.5))
    pool.submit(candidate)
    (result,) = pool.wait()
    assert len(result.items) == 300
    assert (result.number, result.recipe_id) == (0, candidate.recipe.id)
    assert 0 < pool.bytes_sent <= KILOBYTES_10
    assert 1000 < pool.bytes_received <= KILOBYTES_10


def test_an_actor_that_has_lost_what_it_was_told_is_told_again(fragile_pool):
    pool, members = fragile_pool(num_workers=1), [Expert(name, name * 20) for name in "ab"]
    for number, label in enumerate(("", "", "forgets", "", "")):
        members.append(Cross(members[-1], (members[0],), "evolver", 0.5, 0.5, number))
        pool.submit(Candidate(number, members[-1], "evolver", label=label))
        (result,) = pool.wait()
        assert (result.status, result.recipe_id) == ("ok", members[-1].id)
        assert pool.messages == number + 1


def test_messages_are_undone_exactly():
    candidate = Candidate(7, lineage(5), "evolver", ("x", "y"), Question(bar=0.1 + 0.2), stage="search", label="l")
    again = unpack_candidate(pack_candidate(candidate))
    assert again == candidate
    result = Result(7, candidate.recipe.id, "ok", 1 / 3, 1 / 3, True, (0.1, 1.0), {"t": 1 / 3}, {"total": 2.5}, "", "w")
    assert asdict(unpack_result(pack_result(result))) == asdict(result)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"num_gpus": 4.0}, "pool.num_gpus: a worker needs 4 GPU, and the best of 1 nodes has 0"),
        ({"num_cpus": 3.0}, "pool.num_cpus: a worker needs 3 CPU, and the best of 1 nodes has 2"),
        ({"resources": {"tpu": 1.0}}, "pool.resources.tpu: a worker needs 1 tpu, and the best of 1 nodes has 0"),
    ],
)
def test_what_the_cluster_can_never_offer_is_refused(fragile_pool, settings, says):
    with pytest.raises(BadInput) as refused:
        fragile_pool(**settings)
    assert says in str(refused.value)
    assert "ask for less" in str(refused.value)


def test_the_refusal_is_one_sentence(make_config, tmp_path, capsys):
    file = make_config(tmp_path, {"pool": {**POOL, "num_gpus": 4.0}})
    before = signal.getsignal(signal.SIGTERM)
    code = run_job([str(file), "--results", str(tmp_path / "results")])
    signal.signal(signal.SIGTERM, before)
    err = capsys.readouterr().err
    assert code == 2
    assert len(err.splitlines()) == 1
    assert err.startswith(f"{file}: pool.num_gpus: a worker needs 4 GPU")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("asked", "nodes", "given"),
    [
        ({}, [{"CPU": 4}], 0),
        ({}, [{"CPU": 4}, {"CPU": 4, "GPU": 2}], 1),
        ({"num_gpus": 0.25}, [{"CPU": 4, "GPU": 2}], 0.25),
        ({"num_gpus": 0}, [{"CPU": 4, "GPU": 2}], 0),
    ],
)
def test_workers_take_a_gpu_where_there_are_some(make_config, tmp_path, asked, nodes, given):
    config = load(make_config(tmp_path, {"pool": {**POOL, **asked}}))
    assert resources_of(config, nodes) == {"num_cpus": 0.5, "num_gpus": given, "resources": {}}


def test_a_worker_has_to_fit_on_one_node():
    share = {"num_cpus": 0.1, "num_gpus": 0.25, "resources": {}}
    check_resources(share, [{"CPU": 0.1}, {"CPU": 0.1, "GPU": 0.25}])
    with pytest.raises(BadInput, match=r"pool\.num_gpus.*best of 2 nodes has 1; ask for less"):
        check_resources({**share, "num_gpus": 2}, [{"CPU": 8, "GPU": 1.0}] * 2)
    with pytest.raises(BadInput, match="best of 2 nodes has 8 and lacks the other resources"):
        check_resources({**share, "num_cpus": 8}, [{"CPU": 8}, {"CPU": 4, "GPU": 1}])


def test_a_worker_that_finds_other_weights_refuses_to_work(ready):
    plan = ready("generational").plan
    moved = type(plan)(plan.config, {**plan.digests, "a": "other"}, plan.items)
    with pytest.raises(BadInput, match="finds different weights than the driver"):
        on_ray(moved, "dev", None)
