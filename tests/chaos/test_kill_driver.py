"""The driver is killed at random moments, again and again: the run ends as if nothing had happened.

``EVOLVER_KILLS=20 pytest tests/chaos`` is the long form.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time

import pytest
import toys
from toys import all_rows, command, essence, rows, run_here, run_process

from evolver.ledger import Ledger
from evolver.storage import storage_at

pytestmark = pytest.mark.whole

KILLS = int(os.environ.get("EVOLVER_KILLS", "2"))
# Enough work that a good part of the moments fall into it, and not all into the imports before it.
CHANGES = {
    "search.generations": 8,
    "budget.candidates": 24,
    "evaluation.tasks": [
        {"task": "toy", "dev": 40, "select": 20, "report": 30},
        {"task": "echo", "metric": "exact_match", "dev": 10, "select": 5, "report": 10},
    ],
}


@pytest.fixture(scope="module")
def undisturbed(make_config, tmp_path_factory):
    """A run that nobody disturbs: its configuration, its folder, and the seconds that it took."""
    folder = tmp_path_factory.mktemp("undisturbed")
    file = make_config(folder, CHANGES)
    began = time.monotonic()
    ended = run_process(file, folder / "results")
    assert (ended.code, ended.err) == (0, "")
    return file, folder / "results" / "toy", time.monotonic() - began


def start(file, results):
    pipe = subprocess.PIPE
    return subprocess.Popen(command(file, results), cwd=toys.ROOT, stdout=pipe, stderr=pipe, text=True)


def test_kill_9_again_and_again(undisturbed, tmp_path):
    file, reference, seconds = undisturbed
    draw, kills, run = random.Random(20), [0], tmp_path / "0"
    while sum(kills) < KILLS:
        process = start(file, run)
        try:
            out, err = process.communicate(timeout=draw.uniform(0, seconds))
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills[-1] += 1
        else:  # done before its moment came: the remaining kills hit another run
            assert_as_if_undisturbed(process.returncode, out, err, run / "toy", reference, kills[-1])
            run = tmp_path / str(len(kills))
            kills.append(0)
    ended = run_process(file, run)
    assert_as_if_undisturbed(ended.code, ended.out, ended.err, run / "toy", reference, kills[-1])
    print(f"survived: {{'driver': {sum(kills)}}}")


def assert_as_if_undisturbed(code, out, err, folder, reference, kills):
    assert (code, err) == (0, "")
    assert "warning" not in out
    assert toys.winner(folder) == toys.winner(reference)
    assert essence(folder) == essence(reference)  # one finished row for each candidate, the same recipe and scores
    finished = [key for key, row in rows(folder).items() if not row["reused"]]
    asked = [(row["stage"], row["number"]) for row in all_rows(folder, "asked")]
    assert set(asked) == set(finished)
    assert len(finished) <= len(asked) <= len(finished) + kills  # a kill costs the one evaluation that it hits


@pytest.mark.parametrize("which", ["newest", "middle"])
def test_a_torn_part_of_the_ledger_is_named_and_made_up_for(undisturbed, tmp_path, which):
    file, reference, _ = undisturbed
    shutil.copytree(reference, tmp_path / "results" / "toy")
    folder = tmp_path / "results" / "toy"
    parts = sorted((folder / "ledger").glob("part-*.parquet"))
    torn = parts[-1] if which == "newest" else parts[len(parts) // 2]
    torn.write_bytes(torn.read_bytes()[:-40])
    display = toys.Silent()
    run_here(file, tmp_path / "results", display=display)
    warnings = [line for line in display.lines if line.startswith("warning")]
    assert len(warnings) == 1
    assert str(torn) in warnings[0]
    assert "damaged" in warnings[0]
    assert (folder / "ledger" / "damaged" / torn.name).exists()
    assert toys.winner(folder) == toys.winner(reference)
    assert essence(folder) == essence(reference)


def test_asked_to_stop_it_says_so_and_goes_on_later(undisturbed, tmp_path):
    file, reference, _ = undisturbed
    process = start(file, tmp_path / "results")
    first = next(line for line in process.stdout if line.startswith("search"))
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate()
    assert (process.returncode, err) == (3, "")
    assert out.splitlines()[-1].startswith("stopped; everything that finished is kept")
    folder = tmp_path / "results" / "toy"
    stopped = essence(folder)
    assert first
    assert len(stopped) < len(essence(reference))
    run_here(file, tmp_path / "results")
    assert essence(folder) == essence(reference)
    assert stopped.items() <= essence(folder).items()
    assert toys.winner(folder) == toys.winner(reference)


def test_two_drivers_of_one_run_exclude_each_other(undisturbed, tmp_path):
    file, reference, _ = undisturbed
    shutil.copytree(reference, tmp_path / "results" / "toy")
    holder = Ledger(storage_at(tmp_path / "results" / "toy" / "ledger"), "owner")
    ended = run_process(file, tmp_path / "results")
    holder.close()
    assert ended.code == 2
    assert "the run is in use by" in ended.err
    assert str(os.getpid()) in ended.err
    assert len(ended.err.splitlines()) == 1
