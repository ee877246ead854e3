"""Real Ray nodes in network namespaces of their own: while a search runs, one is cut off, one killed, one added."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import toys
from test_kill_cluster import JUDGE
from toys import essence, rows, run_here

RAY = str(Path(sys.executable).with_name("ray"))
BRIDGE, NET, PORT = "evolver0", "10.177.0", 6477
CANDIDATES = 60


def ip(*words):
    return subprocess.run(["ip", *words], capture_output=True, text=True, check=False).returncode == 0


def able():
    """Whether this machine lets us make networks."""
    made = shutil.which("ip") is not None and os.geteuid() == 0 and ip("netns", "add", "evolver-try")
    return made and ip("netns", "del", "evolver-try")


pytestmark = [pytest.mark.ray, pytest.mark.skipif(not able(), reason="networks can only be made by root")]


class Nodes:
    """A bridge with the head node at its end, and nodes at others."""

    def __init__(self, folder):
        self.folder, self.nodes = folder, {}
        self.environment = {**os.environ, "HOME": str(folder), "RAY_AUTH_MODE": "token"}
        subprocess.run([RAY, "get-auth-token", "--generate"], env=self.environment, check=True, capture_output=True)
        assert ip("link", "add", BRIDGE, "type", "bridge")
        assert ip("addr", "add", f"{NET}.1/24", "dev", BRIDGE)
        assert ip("link", "set", BRIDGE, "up")
        given = [f"--node-ip-address={NET}.1", f"--port={PORT}", "--num-cpus=0", "--include-dashboard=false"]
        self.start("head", ["--head", *given])

    def start(self, name, given, prefix=()):
        path = self.folder / f"{name}.log"
        with path.open("w") as log:
            command = [*prefix, RAY, "start", "--block", "--disable-usage-stats", *given]
            process = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True)
        self.nodes[name] = process
        while "Ray runtime started" not in path.read_text():
            assert process.poll() is None, path.read_text()
            time.sleep(0.1)

    def add(self, number):
        space, inner, outer = f"evolver{number}", f"evin{number}", f"evout{number}"
        assert ip("netns", "add", space)
        assert ip("link", "add", outer, "type", "veth", "peer", "name", inner)
        assert ip("link", "set", inner, "netns", space)
        assert ip("link", "set", outer, "master", BRIDGE)
        assert ip("link", "set", outer, "up")
        inside = ["ip", "netns", "exec", space]
        for words in (["ip", "link", "set", "lo", "up"], ["ip", "link", "set", inner, "up"],
                      ["ip", "addr", "add", f"{NET}.{10 + number}/24", "dev", inner]):  # fmt: skip
            subprocess.run([*inside, *words], check=True)
        address = [f"--address={NET}.1:{PORT}", f"--node-ip-address={NET}.{10 + number}", "--num-cpus=1"]
        self.start(number, address, inside)

    def cut(self, number):
        assert ip("link", "set", f"evout{number}", "down")

    def kill(self, number):
        """All of a node at once, as when its machine is switched off."""
        for process in self.of(number):
            process.send_signal(signal.SIGKILL)

    def of(self, number):
        """The processes in a node's namespace."""
        listed = subprocess.run(
            ["ip", "netns", "pids", f"evolver{number}"], capture_output=True, text=True, check=False
        )
        return [psutil.Process(int(pid)) for pid in listed.stdout.split() if psutil.pid_exists(int(pid))]

    def close(self):
        for number, process in self.nodes.items():
            process.kill()
            if number != "head":
                self.kill(number)
                ip("netns", "del", f"evolver{number}")
        for child in psutil.process_iter(["cmdline"]):
            if f"{NET}." in " ".join(child.info["cmdline"] or ()):
                child.kill()
        ip("link", "del", BRIDGE)


@pytest.fixture
def nodes(tmp_path_factory):
    made = Nodes(tmp_path_factory.mktemp("nodes"))
    try:
        yield made
    finally:
        made.close()


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
    nodes.cut(1)
    stalled = until(50)
    nodes.kill(2)
    stalled = max(stalled, until(70))
    nodes.add(4)
    out, _ = driver.communicate(timeout=240)
    assert driver.returncode == 0, out
    reference = run_here(here, tmp_path / "here")
    assert essence(tmp_path / "there" / "toy") == essence(reference)
    assert toys.winner(tmp_path / "there" / "toy") == toys.winner(reference)
    workers = [row["worker"] for row in rows(tmp_path / "there" / "toy").values() if not row["reused"]]
    print(f"longest for ten candidates: {stalled:.1f} s; workers {sorted(set(workers))}")
