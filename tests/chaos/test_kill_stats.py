"""``evolver stats`` is killed at random moments, again and again: what it leaves is whole, and the rest follows."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toys

pytestmark = pytest.mark.whole

KILLS = int(os.environ.get("EVOLVER_KILLS", "2"))
CHANGES = {
    "search": {"algorithm": "tpe", "method": "fisher"},
    "evaluation.tasks": [{"task": "toy", "dev": 40, "report": 4}],
    "statistics": {"items": 40},
}


def start(file, own):
    """``evolver stats`` with a cache of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "evolver", "stats", str(file)], cwd=toys.ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, env={**os.environ, "EVOLVER_CACHE": str(own)},
    )  # fmt: skip


def whole(own: Path) -> dict[str, bytes]:
    return {f.name: f.read_bytes() for f in (own / "statistics").glob("*.safetensors")}


@pytest.fixture(scope="module")
def undisturbed(make_config, tmp_path_factory):
    """A call that nobody disturbs: its configuration, what it kept, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    file = make_config(folder, CHANGES)
    began = time.monotonic()
    process = start(file, folder / "cache")
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count(": collected, ") == 3
    return file, whole(folder / "cache"), time.monotonic() - began


def test_after_a_kill_behind_the_first_expert_the_same_command_goes_on(undisturbed, tmp_path):
    file, wanted, _ = undisturbed
    process = start(file, tmp_path)
    line = process.stdout.readline()
    process.kill()
    out, _ = process.communicate()
    assert line.startswith("fisher of a on dev items")
    before = whole(tmp_path)
    assert 1 <= len(before) < 3, out
    ended = start(file, tmp_path)
    out, err = ended.communicate()
    assert ended.returncode == 0, err
    assert (out.count(": kept, "), out.count(": collected, ")) == (len(before), 3 - len(before))
    assert whole(tmp_path) == wanted


def test_kill_9_again_and_again(undisturbed, tmp_path):
    file, wanted, seconds = undisturbed
    draw, kills = random.Random(24), 0
    while kills < KILLS:
        process, began = start(file, tmp_path), time.monotonic()
        try:
            out, err = process.communicate(timeout=draw.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
        else:  # done before its moment came: the remaining kills hit another cache
            assert process.returncode == 0, err
            assert whole(tmp_path) == wanted
            shutil.rmtree(tmp_path / "statistics")
            seconds = min(seconds, time.monotonic() - began)
        assert whole(tmp_path).items() <= wanted.items()
    process = start(file, tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert out.count("fisher of ") == 3
    assert whole(tmp_path) == wanted
