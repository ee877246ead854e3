"""Real Ray nodes in network namespaces of their own: while a search runs, one is cut off, one killed, one added."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toys
from network import NET, Network, able
from test_kill_cluster import JUDGE
from toys import essence, rows, run_here

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif("EVOLVER_KILLS" not in os.environ, reason="takes minutes: make prove"),
    pytest.mark.skipif(not able(), reason="networks can only be made by root"),
]

RAY = str(Path(sys.executable).with_name("ray"))
PORT, CANDIDATES = 6477, 60


class Nodes:
    """A head node on this machine, and nodes on others."""

    def __init__(self, folder):
        self.folder, self.network = folder, Network()
        self.environment = {**os.environ, "HOME": str(folder), "RAY_AUTH_MODE": "token"}
        subprocess.run([RAY, "get-auth-token", "--generate"], env=self.environment, check=True, capture_output=True)
        given = [f"--node-ip-address={NET}.1", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false"]
        self.start("head", [RAY, "start", "--head", *given])

    def start(self, name, command):
        path = self.folder / f"{name}.log"
        with path.open("w") as log:
            process = subprocess.Popen(
                [*command, "--block", "--disable-usage-stats"],
                env=self.environment, stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip
        while "Ray runtime started" not in path.read_text():
            assert process.poll() is None, path.read_text()
            time.sleep(0.1)

    def add(self, number):
        address = self.network.add(number)
        given = [f"--address={NET}.1:{PORT}", f"--node-ip-address={address}", "--num-cpus=1"]
        self.start(number, self.network.on(number, [RAY, "start", *given]))


@pytest.fixture
def nodes(tmp_path_factory):
    made = Nodes(tmp_path_factory.mktemp("nodes"))
    try:
        yield made
    finally:
        made.network.close()


def test_a_search_goes_on_while_nodes_come_and_go(nodes, make_config, tasks, tmp_path):
    changes = {
        "search.mode": "generational", "search.generations": 99, "budget.candidates": CANDIDATES,
        "evaluation.block_items": 40,
    }  # fmt: skip

    def judged(seconds, name, **more):
        (tmp_path / f"{name}.py").write_text(JUDGE.replace("sleep(0.3)", f"sleep({seconds})"))
        task = {"task": "mine", "function": f"{tmp_path / name}.py:score", "data": str(tasks / "toy.jsonl")}
        return make_config(
            tmp_path, {**changes, "evaluation.tasks": [{**task, "dev": 40, "report": 20}], **more}, f"{name}.yaml"
        )

    here = judged(0, "here")
    there = judged(1, "there", pool={"kind": "ray", "num_workers": 3, "num_cpus": 1})
    for number in (1, 2, 3):
        nodes.add(number)
    environment = {**nodes.environment, "RAY_ADDRESS": f"{NET}.1:{PORT}"}
    ledger = tmp_path / "there" / "toy" / "ledger"

    def until(parts, seconds=120):
        began = time.monotonic()
        while len(list(ledger.glob("part-*"))) < parts:
            assert driver.poll() is None, driver.communicate()
            assert time.monotonic() - began < seconds, f"{len(list(ledger.glob('part-*')))} of {parts} parts"
            time.sleep(0.1)
        return time.monotonic() - began

    driver = subprocess.Popen(
        toys.command(there, tmp_path / "there"), cwd=toys.ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    until(30)
    nodes.network.cut(1)
    stalled = until(50)
    nodes.network.kill(2)
    stalled = max(stalled, until(70))
    nodes.add(4)
    out, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, out
    reference = run_here(here, tmp_path / "here")
    assert essence(tmp_path / "there" / "toy") == essence(reference)
    assert toys.winner(tmp_path / "there" / "toy") == toys.winner(reference)
    workers = [row["worker"] for row in rows(tmp_path / "there" / "toy").values() if not row["reused"]]
    print(f"longest for ten candidates: {stalled:.1f} s; workers {sorted(set(workers))}")
