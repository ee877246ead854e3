"""The laws of loggers, which every registered one is held to: each result once, and no trouble for the run."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import toys
import tracked as shown

from evolver import loggers
from evolver.config.reading import load
from evolver.loggers import LOGGERS, Trackers, trackers
from evolver.records import Candidate, Result
from evolver.records.recipe import Expert
from evolver.storage import storage_at

pytestmark = pytest.mark.whole

WITH_PACKAGE = pytest.mark.parametrize("name", [n for n, kind in LOGGERS.items() if kind.package])
RESULTS, CURVE = 10, "search/candidate"


@dataclass(frozen=True)
class Toy:
    """How a logger is tried.

    Args:
        settings: under which it works, keeping all that it writes in a folder; the run's folder is ``run`` in it.
        spoilt: settings under which it cannot work; of a password in them nothing may be said. Some of the places may
            be below ``file`` in the folder, which is no folder.
        points: step and value of every point that the tracker shows of a curve.
    """

    settings: Callable[[Path], dict[str, Any]]
    spoilt: Callable[[Path], dict[str, Any]]
    points: Callable[[Path, str], shown.Points]


TOYS = {
    "tensorboard": Toy(
        lambda folder: {},
        lambda folder: {"folder": str(folder / "file")},
        lambda folder, curve: shown.tensorboard_points(folder / "run" / "tensorboard", curve),
    ),
    "mlflow": Toy(
        lambda folder: {"uri": f"sqlite:///{folder}/mlflow.db"},
        lambda folder: {"uri": "http://somebody:secret@127.0.0.1:9"},
        lambda folder, curve: shown.mlflow_points(f"sqlite:///{folder}/mlflow.db", "evolver", curve),
    ),
    "wandb": Toy(
        lambda folder: {"mode": "offline", "folder": str(folder)},
        lambda folder: {"mode": "offline", "folder": str(folder / "file")},
        shown.wandb_points,
    ),
}
EVERY = pytest.mark.parametrize("name", [n for n in LOGGERS if n in TOYS])


def test_every_logger_has_a_toy():
    for name in LOGGERS:
        assert name in TOYS, (
            f"the logger {name!r} is held to no law; add to TOYS in tests/test_logger_laws.py settings under which it "
            "works, settings under which it cannot, and how the points that it shows are read"
        )
    assert set(TOYS) == set(LOGGERS)


@pytest.fixture(autouse=True)
def _at_home(tmp_path, monkeypatch):
    """No library of a tracker shall write into anybody's home, or ask the network for long."""
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "home" / name))
    for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name in ("STOP_SECONDS", "END_SECONDS"):
        monkeypatch.setattr(trackers, name, 600.0)  # how long is a matter of the machine; each test says what of it
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def call(make_config, tmp_path, monkeypatch):
    """``call(name, settings)`` is one call of a run, whose logger may be changed before it begins."""
    for patience in ("STOP_SECONDS", "END_SECONDS"):  # a busy machine is no fault of a logger
        monkeypatch.setattr(trackers, patience, 600.0)
    (tmp_path / "file").write_text("no folder")
    run = storage_at(tmp_path / "run")
    for name in trackers.ARTIFACTS:
        run.write(name, json.dumps({"verdict": "better", "report": {"winner": 0.5}}).encode())

    def build(name: str, settings: dict[str, Any]) -> OneCall:
        config = load(make_config(tmp_path, {"loggers": {name: settings}}))
        (logger,) = loggers.build_loggers(config, "run.yaml", run).values()
        return OneCall(name, logger, run, trackers.tracked(config, {}, run, {}))

    return build


@dataclass
class OneCall:
    """One call of a run with a logger, and one beside it that keeps what it is told."""

    name: str
    logger: Any
    run: Any
    about: loggers.Tracked

    def __post_init__(self) -> None:
        self.said: list[str] = []
        self.beside = Heard()

    def __call__(self, results: int, finish: bool = False) -> None:
        self.trackers = Trackers({self.name: self.logger, "beside": self.beside}, self.said.append)
        self.trackers.begin(self.about)
        for number in range(results):
            result = Result(number, f"r{number}", "ok", number / 10, items=(1.0,) * 10, tasks={"toy": 0.5}, rank=number)
            self.trackers.result(Candidate(number, Expert("a", str(number)), "test"), result)
        if finish:
            self.trackers.finish(self.run)
        self.trackers.close()


class Heard:
    """A logger that keeps the steps that it is told of."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def begin(self, run): ...

    def results(self, rows):
        self.steps += [step for step, _ in rows]

    def summary(self, values): ...

    def finish(self, verdict, files): ...

    def close(self): ...


@EVERY
def test_every_result_is_shown_once_whatever_was_stopped_and_repeated(call, name, tmp_path):
    settings = TOYS[name].settings(tmp_path)
    for results, finish in ((0, False), (RESULTS - 4, False), (RESULTS, True), (RESULTS, True)):
        one = call(name, settings)
        one(results, finish)
        assert one.said == []
        assert one.beside.steps == [*range(results)]
        if results:
            expected = [(step, float(step)) for step in range(results)]
            assert TOYS[name].points(tmp_path, CURVE) == expected
    assert [value for _, value in TOYS[name].points(tmp_path, "search/best")] == pytest.approx(
        [step / 10 for step in range(RESULTS)]
    )


@EVERY
def test_one_that_fails_is_warned_of_once_and_a_later_call_fills_the_gap(call, name, tmp_path):
    failing = call(name, TOYS[name].spoilt(tmp_path))
    failing(RESULTS, finish=True)
    assert len(failing.said) == 1
    assert failing.said[0].startswith(f"warning: loggers.{name}: off for the rest of this run")
    assert "\n" not in failing.said[0]
    assert "secret" not in failing.said[0]
    assert failing.beside.steps == [*range(RESULTS)]
    mended = call(name, TOYS[name].settings(tmp_path))
    mended(RESULTS, finish=True)
    assert mended.said == []
    assert [step for step, _ in TOYS[name].points(tmp_path, CURVE)] == [*range(RESULTS)]


@EVERY
def test_one_that_is_stuck_slows_nothing(call, name, tmp_path, monkeypatch):
    monkeypatch.setattr(trackers, "STOP_SECONDS", 2.0)
    stuck, let_go = call(name, TOYS[name].settings(tmp_path)), threading.Event()
    monkeypatch.setattr(stuck.logger, "begin", lambda run: let_go.wait())
    try:
        began = time.monotonic()
        stuck(RESULTS)  # were it waited for, this would not end
        assert time.monotonic() - began < 60
    finally:
        let_go.set()
    assert stuck.beside.steps == [*range(RESULTS)]
    assert len(stuck.said) == 1
    assert f"loggers.{name}: off" in stuck.said[0]
    assert "the tracker was still busy 2 s after the run" in stuck.said[0]


@EVERY
def test_a_key_that_it_does_not_know_is_refused(make_config, name, tmp_path):
    file = make_config(tmp_path, {"loggers": {name: {"no_such_key": 1}}})
    said = f"run.yaml: loggers.{name}.no_such_key: unknown key"
    toys.refused(lambda: toys.run_here(file, tmp_path / "results"), said)
    assert not (tmp_path / "results").exists()


@WITH_PACKAGE
def test_a_missing_package_is_said_before_anything_is_written(make_config, name, tmp_path, monkeypatch):
    monkeypatch.setattr(loggers, "installed", lambda package: package != LOGGERS[name].package)
    file = make_config(tmp_path, {"loggers": {name: {}}})
    extra = f"pip install 'evolver[{name}]'"
    toys.refused(lambda: toys.run_here(file, tmp_path / "results"), f"run.yaml: loggers.{name}: its package", extra)
    assert not (tmp_path / "results").exists()
    extras = tomllib.loads((toys.ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert name in extras, f"pyproject.toml has no extra {name!r}, which installs the package of this logger"


@WITH_PACKAGE
def test_a_broken_package_is_said_before_anything_is_written(make_config, name, tmp_path, monkeypatch):
    def broken():
        raise ImportError("cannot import name 'x'")

    monkeypatch.setitem(LOGGERS, name, replace(LOGGERS[name], load=broken))
    file = make_config(tmp_path, {"loggers": {name: {}}})
    said = f"loggers.{name}: its package cannot be imported (cannot import name 'x')", "leave the logger out"
    toys.refused(lambda: toys.run_here(file, tmp_path / "results"), *said)
    assert not (tmp_path / "results").exists()


@WITH_PACKAGE
def test_its_package_is_there_before_it_has_a_thread_and_not_before_it_is_asked_for(make_config, name, tmp_path):
    code = (
        "import sys; from evolver import loggers, storage; from evolver.config import reading; "
        "before = sys.argv[2] in sys.modules; "
        "loggers.build_loggers(reading.load(sys.argv[1]), 'x', storage.storage_at(sys.argv[3])); "
        "print(before, sys.argv[2] in sys.modules)"
    )
    file = make_config(tmp_path, {"loggers": {name: {}}})
    command = [sys.executable, "-c", code, str(file), str(LOGGERS[name].package), str(tmp_path)]
    done = subprocess.run(command, cwd=toys.ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "True"], done.stderr
