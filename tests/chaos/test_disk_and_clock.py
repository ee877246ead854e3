"""A disk that is full in the middle of a run, and a clock that jumps: neither loses anything, nor changes anything."""

from __future__ import annotations

import os
import random
import subprocess
import time

import pytest
import toys
from toys import all_rows, essence, rows, run_here, run_process

pytestmark = pytest.mark.whole

CHANGES = {"search.generations": 8, "budget.candidates": 28}


@pytest.fixture(scope="module")
def undisturbed(make_config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    file = make_config(folder, CHANGES)
    return file, run_here(file, folder / "results")


@pytest.fixture
def small_disk(tmp_path):
    """``small_disk``: a file system of 400 KiB; called with a size it is another one."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(*options):
        return subprocess.run(["mount", *options, str(folder)], capture_output=True, check=False).returncode == 0

    if os.geteuid() != 0 or not mount("-t", "tmpfs", "-o", "size=400k", "tmpfs"):
        pytest.skip("file systems can only be mounted by root")
    yield folder, lambda size: mount("-o", f"remount,size={size}")
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up(undisturbed, small_disk):
    """It is said in one sentence; with room again, the run goes on where it stopped."""
    file, reference = undisturbed
    folder, resize = small_disk
    ended = run_process(file, folder)
    assert ended.code == 2
    assert len(ended.err.splitlines()) == 1
    assert "No space left on device" in ended.err
    assert "run the same command again" in ended.err
    before = essence(folder / "toy")
    assert 0 < len(before) < len(essence(reference))
    assert resize("64m")
    ended = run_process(file, folder)
    assert (ended.code, ended.err) == (0, "")
    assert "warning" not in ended.out
    assert before.items() <= essence(folder / "toy").items()
    assert essence(folder / "toy") == essence(reference)
    asked = [(row["stage"], row["number"]) for row in all_rows(folder / "toy", "asked")]
    assert len(asked) <= len([r for r in rows(folder / "toy").values() if not r["reused"]]) + 1


def test_a_clock_that_jumps(undisturbed, tmp_path, monkeypatch):
    """Backwards, too, by years, at every look at it."""
    file, reference = undisturbed
    draw, wall, wall_ns = random.Random(0), time.time, time.time_ns
    monkeypatch.setattr(time, "time", lambda: max(0.0, wall() + draw.uniform(-1e9, 1e9)))
    monkeypatch.setattr(time, "time_ns", lambda: max(0, wall_ns() + draw.randrange(-(10**18), 10**18)))
    folder = run_here(file, tmp_path / "results")
    assert essence(folder) == essence(reference)
    assert toys.winner(folder) == toys.winner(reference)
    times = [row["time"] for row in all_rows(folder, "finished")]
    assert times != sorted(times)
