"""The walk-through of two machines in cluster/deploy/README.md, as typed, on two machines that are namespaces here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toys
from network import Network, able

pytestmark = [
    pytest.mark.ray,
    pytest.mark.skipif("EVOLVER_KILLS" not in os.environ, reason="takes minutes: make prove"),
    pytest.mark.skipif(not able(), reason="networks can only be made by root"),
]

TEXT = (toys.ROOT / "cluster" / "deploy" / "README.md").read_text()


def blocks():
    """The commands of the section, block by block."""
    section = TEXT.split("## Two machines, by hand")[1].split("\n## ")[0]
    return re.findall(r"```\n(.*?)```", section, re.DOTALL)


@pytest.fixture
def machines(tmp_path):
    """``machines(number, script)``: runs a script on one of two machines, each with a home of its own."""
    network = Network()
    addresses = {number: network.add(number) for number in (1, 2)}

    def on(number, script, check=True):
        home = tmp_path / f"home{number}"
        home.mkdir(exist_ok=True)
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        environment = {**os.environ, "HOME": str(home), "PATH": path, "RAY_AUTH_MODE": "token"}
        environment.pop("RAY_ADDRESS", None)
        with (tmp_path / "said").open("w+") as said:  # what stays behind keeps no pipe open
            done = subprocess.run(
                network.on(number, ["bash", "-ec", script]), cwd=toys.ROOT, env=environment, stdout=said, stderr=said,
                timeout=200, check=False,
            )  # fmt: skip
            said.seek(0)
            text = said.read()
        assert not check or done.returncode == 0, text
        return text

    try:
        yield on, addresses, tmp_path
    finally:
        network.close()


def test_two_machines_as_typed(machines, make_config):
    on, addresses, folder = machines
    pool = {"num_workers": 2, "num_cpus": 1}
    file = make_config(folder, {"search.generations": 100, "budget.candidates": 300, "pool": pool})
    head, worker, submit, forget = blocks()
    names = {"configs/demo.yaml": str(file), "/shared/results": str(folder / "results"), "FIRST": addresses[1]}
    for typed, here in names.items():
        worker, submit = worker.replace(typed, here), submit.replace(typed, here)
    # Both machines have two cores here, as they are one: a worker on each is what is wanted.
    on(1, head.replace("ray start", "ray start --num-cpus=1"))
    (folder / "home2" / ".ray").mkdir(parents=True)
    shutil.copy(folder / "home1" / ".ray" / "auth_token", folder / "home2" / ".ray" / "auth_token")
    on(2, worker.replace("ray start", "ray start --num-cpus=1"))
    on(1, submit.replace("--working-dir", "--no-wait --working-dir"))
    ledger, began = folder / "results" / "night" / "ledger", time.monotonic()
    while len(list(ledger.glob("part-*"))) < 60:
        assert time.monotonic() - began < 120, on(1, "ray job logs --address http://127.0.0.1:8265 night", check=False)
        time.sleep(0.1)
    on(1, "ray job stop --address http://127.0.0.1:8265 night")
    assert not (ledger.parent / "report.md").exists()
    time.sleep(3)
    on(1, forget)
    time.sleep(5)
    said = on(1, submit)
    assert "succeeded" in said
    assert (ledger.parent / "report.md").exists()
    workers = {row["worker"] for row in toys.rows(ledger.parent).values() if not row["reused"]}
    assert len(workers) == 2
