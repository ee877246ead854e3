"""What a cluster costs and what it is worth: ``make benchmark-cluster`` writes results/benchmarks/cluster.md.

Workers are simulated in virtual time under the pool, the loop and the ledger of real runs (a discrete-event
simulation), are real Ray actors that sleep, or real ones that score; every figure says which.
"""

from __future__ import annotations

import argparse
import ast
import collections
import logging
import math
import os
import platform
import random
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import psutil  # noqa: E402
import ray  # noqa: E402
import torch  # noqa: E402
import toys  # noqa: E402
import yaml  # noqa: E402
from simulation import SimulatedCrew, lognormal  # noqa: E402
from test_search import BASE, build  # noqa: E402

from cluster.job import make_pool  # noqa: E402
from cluster.pools import ray as crew  # noqa: E402
from evolver.config import PoolSettings  # noqa: E402
from evolver.ledger import Ledger, read_table  # noqa: E402
from evolver.loop import evolve  # noqa: E402
from evolver.merging.methods import METHODS  # noqa: E402
from evolver.merging.settings.genome import genome  # noqa: E402
from evolver.records import Candidate, Question, Result  # noqa: E402
from evolver.records.recipe import Cross, Expert, Merge, Recipe  # noqa: E402
from evolver.report.text import markdown_table  # noqa: E402
from evolver.search.ahead import Guessable, ahead  # noqa: E402
from evolver.storage import storage_at  # noqa: E402
from evolver.workers.crew_pool import CrewPool  # noqa: E402
from evolver.workers.messages import pack_candidate, pack_result  # noqa: E402
from evolver.workers.telling import Inbox  # noqa: E402

PAGE = ROOT / "results" / "benchmarks" / "cluster.md"
ITEMS = 200
Row = list[str]


def scored(candidate: Candidate, accepted: float = 0.1) -> Result:
    """What a worker says: a share of the challengers is better than the incumbent, and the recipe decides which."""
    draw = random.Random(candidate.recipe.id)
    better = candidate.question.bar is None or draw.random() < accepted
    score = draw.random() if candidate.question.bar is None else candidate.question.bar + 0.01 * draw.random()
    if not better:
        items = tuple(float(draw.random() < 0.5) for _ in range(ITEMS // 2))
        return Result(
            candidate.number, candidate.recipe.id, "ok", None, candidate.question.bar, False, items, {"t": 0.5}
        )
    items = tuple(float(draw.random() < 0.5) for _ in range(ITEMS))
    return Result(candidate.number, candidate.recipe.id, "ok", score, score, True, items, {"t": score}, {"total": 1.0})


class Timed:
    """A crew that says how long it was busy itself, which the driver is not to blame for."""

    def __init__(self, crew: SimulatedCrew) -> None:
        self._crew, self.seconds = crew, 0.0

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._crew, name)
        if not callable(method):
            return method

        def call(*given: Any) -> Any:
            began = time.perf_counter()
            try:
                return method(*given)
            finally:
                self.seconds += time.perf_counter() - began

        return call


@contextmanager
def ledger_in(parent: Path) -> Iterator[tuple[Ledger, Path]]:
    """A ledger of its own; what it weighs can be seen until the end."""
    with tempfile.TemporaryDirectory(dir=parent) as folder:
        ledger = Ledger(storage_at(folder), "benchmark")
        try:
            yield ledger, Path(folder)
        finally:
            ledger.close()


def simulate(
    settings: dict[str, Any], workers: int, candidates: int, seconds: Callable[[Candidate], float], ledgers: Path,
    guessing: bool = False, arrival: bool = False, accepted: float = 0.1,
) -> dict[str, float]:  # fmt: skip
    """A search on simulated workers: utilisation, virtual time, and what it cost the driver for each candidate."""
    crew = Timed(SimulatedCrew(partial(scored, accepted=accepted), seconds))
    search = build(settings, arrival=arrival, candidates=candidates)
    with ledger_in(ledgers) as (ledger, folder):
        pool = CrewPool(crew, PoolSettings(num_workers=workers))
        before, began = crew.seconds, time.perf_counter()
        evolve(
            search,
            pool,
            ledger,
            lambda c, r: None,
            partial(ahead, search) if guessing and isinstance(search, Guessable) else None,
        )
        wall = time.perf_counter() - began - (crew.seconds - before)
        size = sum(f.stat().st_size for f in folder.rglob("part-*"))
        rows = read_table(ledger.storage).to_pylist()
        asked, guessed = (
            {(r["number"], r["recipe_id"]) for r in rows if r["event"] == e} for e in ("finished", "guessed")
        )
        wasted = len(guessed - asked)
    told = candidates + wasted
    return {
        "utilisation": crew.busy / (workers * crew.time), "time": crew.time, "wasted": wasted, "driver": wall / told,
        "bytes": size / told,
    }  # fmt: skip


def utilisation(ledgers: Path) -> Iterator[Row]:
    """Log-normal evaluation times, σ = 0.5, measured from the first candidate to the last; nothing is accepted, so that
    lineages stay short and fifty thousand candidates pass in minutes.
    """
    run = partial(simulate, seconds=lognormal(0.5), ledgers=ledgers, accepted=0.0)
    for workers, each, wanted in ((256, 200, "97 %"), (1000, 60, "report")):
        found = run(steady(workers), workers, workers * each, arrival=True)
        what = f"steady state, results by arrival, {workers} workers, {each} candidates each with the tail at the end"
        yield [what, f"{found['utilisation']:.1%}", wanted]
    found = run(steady(256), 256, 256 * 40)
    yield ["steady state, results in order, 256 workers, as many in flight", f"{found['utilisation']:.1%}", "report"]
    found = run(steady(8 * 256), 256, 256 * 40)
    yield ["… eight times as many in flight", f"{found['utilisation']:.1%}", "report"]
    found = run({"algorithm": "cmaes", "population": 256}, 256, 256 * 12 + 1)
    yield ["generational (CMA-ES, 256 of a generation), 256 workers", f"{found['utilisation']:.1%}", "report"]


def steady(in_flight: int) -> dict[str, Any]:
    """Settings of the steady form of Evolver, without an end of its own."""
    return {"algorithm": "evolver", "mode": "steady", "in_flight": in_flight, "generations": 10**6}


def driver(ledgers: Path) -> Iterator[Row]:
    """Ask, submit, record on disk, tell."""
    for name, settings in {
        "Evolver": steady(64),
        "TPE": {"algorithm": "tpe", "in_flight": 64},
        "CMA-ES": {"algorithm": "cmaes", "population": 64},
    }.items():
        found = simulate(settings, 64, 1000, lognormal(0.5), ledgers, arrival=name != "CMA-ES")
        yield [f"driver, {name}, 64 workers, 1,000 candidates", f"{found['driver'] * 1e3:.1f} ms", "10 ms"]
        if name == "Evolver":
            size = f"{found['bytes'] / 1024:.1f} KiB"
            yield [f"ledger on disk, {ITEMS} items a candidate, small parts joined", size, "report"]


def speculation(ledgers: Path) -> Iterator[Row]:
    """The released, sequential Evolver, a tenth of 400 candidates accepted."""
    for name, more in {"alone": {}, "with a merger": {"merger": {"method": "simple"}}}.items():
        settings = {"algorithm": "evolver", "generations": 100} | more
        one, eight = (
            simulate(settings, workers, 400, lambda c: 1.0, ledgers, guessing=True) for workers in (1, 8)
        )  # fmt: skip
        speedup = f"{one['time'] / eight['time']:.2f} ({eight['wasted']:.0f} guesses wasted)"
        yield [f"sequential Evolver {name}, 8 workers ÷ 1", speedup, "4"]


def messages() -> Iterator[Row]:
    """The largest messages of the main job, for a small model and, by the names of its tensors, a large one."""
    for name, layers in {"135M (30 layers)": 30, "70B (80 layers)": 80}.items():
        names = [f"model.layers.{k}.mlp.up_proj.weight" for k in range(layers)]
        experts = tuple(Expert(f"expert{i}", f"{i:020x}") for i in range(5))
        space = genome(METHODS["ties"], experts, BASE, names, layers // 10, None, {}, "search")
        draw = random.Random(0)
        rules = space.decode({k.name: draw.uniform(k.low, k.high) for k in space.knobs}).rules
        population: list[Recipe] = list(experts)
        for step in range(75):  # every challenge of a released run accepted: the longest lineage that it can have
            population[step % 5] = Cross(
                population[step % 5], (population[(step + 1) % 5],), "evolver", 0.5, 0.5, draw.getrandbits(32)
            )
        recipe = Merge("ties", tuple(population), BASE, rules)
        rival = tuple(float(draw.random() < 0.5) for _ in range(1000))
        candidate = Candidate(75, recipe, "evolver+merger", question=Question(bar=0.5, rival=rival, known=rival[:500]))
        result = Result(75, recipe.id, "ok", 0.5, 0.5, True, rival, {"task": 0.5}, {"total": 1.0})
        sent, received = len(pack_candidate(candidate)), len(pack_result(result))
        yield [f"bytes through Ray, {name}, 1,000 items: to a worker, back", f"{sent:,}, {received:,}", "10,240"]


# Real Ray.


def sleeping(seconds: float) -> Any:
    """An actor class that computes nothing. Local, so that it travels by value."""

    @ray.remote
    class Sleeping:
        def __init__(self, plan: Any, split: str, name: str) -> None:
            self.name, self.inbox = name, Inbox()

        def ready(self) -> dict[str, Any]:
            return {"pid": os.getpid(), "node": ray.get_runtime_context().get_node_id()}

        def evaluate(self, message: bytes) -> bytes:
            return self.inbox.answer(message, self.score)

        def score(self, candidate: Candidate) -> Result:
            draw = random.Random(candidate.recipe.id)
            time.sleep(seconds * draw.lognormvariate(0, 0.5))
            items = tuple(float(draw.random() < 0.5) for _ in range(ITEMS))
            score = sum(items) / ITEMS
            return Result(candidate.number, candidate.recipe.id, "ok", score, score, True, items, {"t": score})

    return Sleeping


def real_pool(workers: int, seconds: float, resources: dict[str, Any]) -> CrewPool:
    """A pool of sleeping actors."""
    crew.PopulationWorker = sleeping(seconds)
    return CrewPool(crew.RayCrew(None, "dev", resources), PoolSettings(num_workers=workers, retries=9))  # type: ignore[arg-type]


def real_actors(ledgers: Path, workers: int) -> Iterator[Row]:
    """As many real actors as this machine carries, under the real pool, loop and ledger."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        pool = real_pool(workers, 4.0, {"num_cpus": 0.001})
        while pool.free() < workers:
            pool._hear(pool._events())
        candidates = workers * 12
        search = build(steady(workers), arrival=True, candidates=candidates)
        busy: list[float] = []
        with ledger_in(ledgers) as (ledger, _):
            before, began = time.process_time(), time.perf_counter()
            evolve(search, pool, ledger, lambda c, r: busy.append(random.Random(c.recipe.id).lognormvariate(0, 0.5)))
            wall, cpu = time.perf_counter() - began, time.process_time() - before
        pool.close()
        yield [f"{workers} real Ray actors that sleep 4 s (median): utilisation, with the tail at the end",
               f"{4.0 * math.fsum(busy) / (workers * wall):.1%}", "report"]  # fmt: skip
        yield [
            f"… CPU time of the driver for each of {candidates} candidates",
            f"{cpu / candidates * 1e3:.1f} ms",
            "10 ms",
        ]
    finally:
        ray.shutdown()


class Watching(crew.RayCrew):
    """A crew that notes when a candidate was sent."""

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.sent: list[tuple[float, str, int]] = []
        self.inboxes: dict[int, Inbox] = {}

    def send(self, worker: int, message: bytes) -> None:
        candidate = self.inboxes.setdefault(worker, Inbox()).candidate(message)
        self.sent.append((time.monotonic(), candidate.recipe.id, worker))
        super().send(worker, message)


def node_loss() -> Iterator[Row]:
    """Three Ray nodes on this machine, one of which is killed while its workers are busy."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
    nodes = [cluster.add_node(num_cpus=2) for _ in range(2)]
    ray.init(cluster.address, log_to_driver=False, logging_level=logging.ERROR)
    try:
        crew.PopulationWorker = sleeping(6.0)
        watched = Watching(None, "dev", {"num_cpus": 1})
        pool = CrewPool(watched, PoolSettings(num_workers=6, retries=0))
        while pool.free() < 6:
            pool._hear(pool._events())
        for k in range(12):
            pool.submit(Candidate(k, Expert(f"e{k}", f"{k:x}"), "benchmark"))
        time.sleep(1.0)
        victim = nodes[0].node_id
        hit = {watched_id for w, f in pool._busy.items() if watched._where[w]["node"] == victim
               for watched_id in [f.candidate.recipe.id]}  # fmt: skip
        killed = time.monotonic()
        cluster.remove_node(nodes[0], allow_graceful=False)
        landed: list[Result] = []
        while len(landed) < 12:
            landed += pool.wait()
        again = [when - killed for when, recipe, _ in watched.sent if recipe in hit and when > killed]
        assert len(again) == len(hit) == 2
        assert {r.status for r in landed} == {"ok"}
        yield ["from the kill of a node to its candidates running elsewhere", f"{max(again):.1f} s", "30 s"]
        pool.close()
    finally:
        ray.shutdown()
        cluster.shutdown()


def same_winner(folder: Path) -> Iterator[Row]:
    """Real models (tiny ones) and real workers: one, two and eight of them."""
    toys.make_models(folder / "models")
    toys.make_tasks(folder / "tasks", folder / "models")
    found = []
    for workers in (1, 2, 8):
        changes = {"search.generations": 8, "budget.candidates": 24,
                   "pool": {"kind": "ray", "num_workers": workers, "num_cpus": 0.1}}  # fmt: skip
        file = folder / f"{workers}.yaml"
        file.write_text(yaml.safe_dump(toys.settings(folder / "models", folder / "tasks", changes)))
        run = toys.run_here(file, folder / str(workers), make_pool)
        found.append((toys.winner(run), toys.essence(run)))
        ray.shutdown()
    equal = all(one == found[0] for one in found)
    yield [
        "winner, candidates and scores with 1, 2 and 8 workers, exact mode",
        "identical" if equal else "DIFFER",
        "identical",
    ]


READER = """
import sys
from pathlib import Path
from evolver.records import Candidate, Question
from evolver.records.recipe import Cross
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.workers.worker import Worker
ready = prepare(config_at(sys.argv[1]))
a, b = ready.experts[:2]
result = Worker(ready.plan, "dev").evaluate(Candidate(0, Cross(a, (b,), "evolver", 0.5, 0.5, 1), "benchmark"))
assert result.status == "ok", result.reason
print(next(l.split()[1] for l in Path("/proc/self/io").read_text().splitlines() if l.startswith("read_bytes")))
"""


def reads(folder: Path) -> Iterator[Row]:
    """What the first and the second worker of a node read from its disk, of models that no memory holds yet."""
    from transformers import LlamaConfig, LlamaForCausalLM

    words = toys.tokenizer()
    config = LlamaConfig(
        hidden_size=512, intermediate_size=1408, num_hidden_layers=8, num_attention_heads=8, vocab_size=len(words),
        max_position_embeddings=toys.LENGTH, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    models = folder / "large"
    for seed, name in enumerate(("base", "a", "b", "c")):
        torch.manual_seed(seed)
        LlamaForCausalLM(config).save_pretrained(models / name)
        words.save_pretrained(models / name)
    file = folder / "large.yaml"
    file.write_text(yaml.safe_dump(toys.settings(models, folder / "tasks", {})))
    run_reader(file)  # digests are kept from here on, as on any node after the first run
    size = 0
    os.sync()
    for weights in models.rglob("*.safetensors"):
        size += weights.stat().st_size
        with weights.open("rb") as handle:
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    first, second = run_reader(file), run_reader(file)
    said = f"{first / 2**20:.0f} MiB, {second / 2**20:.0f} MiB"
    yield [
        f"read from disk by the first and the second worker of a node (models of {size / 2**20:.0f} MiB)",
        said,
        "once",
    ]


def run_reader(file: Path) -> int:
    """Bytes that one worker's process reads from disk."""
    done = subprocess.run(
        [sys.executable, "-c", READER, str(file)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


def kills(count: int) -> Iterator[Row]:
    """The chaos suite in its long form: what fell, and whether every outcome was the undisturbed one."""
    chaos = [f"tests/chaos/test_kill_{what}.py" for what in ("driver", "cluster")]
    command = [sys.executable, "-m", "pytest", "-s", "-q", *chaos]
    environment = {**os.environ, "EVOLVER_KILLS": str(count)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    fallen: collections.Counter[str] = collections.Counter()
    for line in re.findall(r"survived: (\{.*?\})", done.stdout):
        fallen.update(ast.literal_eval(line))
    said = ", ".join(f"{n} of {what}s" for what, n in fallen.items())
    outcome = f"{fallen.total()} of {fallen.total()}" if done.returncode == 0 else "FAILED"
    yield [f"random kills survived with an identical outcome ({said})", outcome, "100 of 100"]


def main() -> None:
    """Measure, print, write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=40, help="kills of each kind in the chaos suite; 0: leave it out")
    parser.add_argument("--actors", type=int, default=64, help="real Ray actors")
    given = parser.parse_args()
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        disk = Path(folder) / "ledgers"
        disk.mkdir()
        memory = Path("/dev/shm") if Path("/dev/shm").is_dir() else disk
        parts = [
            partial(messages), partial(driver, disk), partial(speculation, memory), partial(same_winner, Path(folder)),
            partial(reads, Path(folder)), partial(node_loss), partial(real_actors, disk, given.actors),
            partial(utilisation, memory),
        ]  # fmt: skip
        for part in [*parts, *([partial(kills, given.kills)] if given.kills else [])]:
            for row in part():
                print(" | ".join(row), flush=True)
                rows.append(row)
    text = HEAD.format(cores=psutil.cpu_count(), machine=platform.machine(), ray=ray.__version__)
    PAGE.write_text(f"{text}\n{markdown_table(['figure', 'measured', 'must reach'], rows)}\n\n{TAIL}")


HEAD = """# On a cluster

{cores} cores, {machine}, Ray {ray}. Made by `make benchmark-cluster`. Simulated workers are those of a discrete-event
simulation in virtual time under the real pool, loop and ledger; evaluation times are log-normal with σ = 0.5.
"""
TAIL = """Driver time is wall time of ask, pack, submit, unpack, both synced writes of the ledger and tell, without what
the simulation itself takes; that by which TPE's is above Evolver's is Optuna's own sampling. In order, a candidate
waits until all but the last `in_flight` before it are learnt, so that a slow one holds up the others: `order: arrival`
is for many uneven workers, `order: exact` for one run at any number of them. The actors that sleep share two cores with
their driver. A recipe takes 12 bytes a crossover: after some 800 acceptances it outgrows 10 KiB.
"""

if __name__ == "__main__":
    main()
