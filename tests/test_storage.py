"""Where runs are kept, here and on an object store: whole files, one writer, nothing lost."""

import multiprocessing
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import toys
from starlette.testclient import TestClient

from evolver.checkpoints.sources import open_base
from evolver.config.reading import config_at
from evolver.dashboard.app import build_app
from evolver.driver.run import run
from evolver.errors import BadInput
from evolver.ledger import Ledger, answer_table, read_table
from evolver.storage import lease as lease_module
from evolver.storage import remote, storage_at
from evolver.storage.lease import LEASE_FILE
from evolver.workers.pools.local import LocalPool

pytestmark = pytest.mark.whole


# An object store that fails now and then.


@pytest.fixture
def flaky(s3, monkeypatch):
    """``flaky(errors)``: a folder whose next calls raise; what is None gets through, but its answer is lost."""
    storage = storage_at(f"{s3}/{uuid.uuid4().hex}")
    storage.write("there", b"")
    monkeypatch.setattr(remote.time, "sleep", lambda seconds: None)

    def failing(*errors):
        left, pipe = list(errors), storage._fs.pipe_file

        def pipe_file(*given, **named):
            if not left:
                return pipe(*given, **named)
            error = left.pop(0)
            if error is None:
                pipe(*given, **named)
            raise error or ConnectionResetError("reset")

        monkeypatch.setattr(storage._fs, "pipe_file", pipe_file)
        return storage

    return failing


def test_a_call_that_fails_is_tried_again(flaky):
    storage = flaky(ConnectionResetError("reset"), ValueError("what the client's library raises"))
    storage.write("a", b"1")
    assert storage.read("a") == b"1"


def test_a_created_file_whose_answer_was_lost_is_ours(flaky):
    storage = flaky(None)
    storage.create("part", b"mine")
    with pytest.raises(FileExistsError):
        storage.create("part", b"another")


def test_a_store_that_is_gone_is_an_os_error_after_a_while(flaky):
    storage = flaky(*[ConnectionResetError("reset")] * (len(remote.PAUSES) + 1))
    with pytest.raises(OSError, match="ConnectionResetError: reset"):
        storage.write("a", b"1")


def test_an_address_that_never_answers_is_said_at_once(monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    began = time.monotonic()
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9"):
        storage_at("s3://bucket/runs").names()
    assert time.monotonic() - began < 600  # its own patience would be an hour


def test_an_unknown_kind_of_address_is_one_sentence():
    with pytest.raises(BadInput, match=r"nowhere://x: this kind of address cannot be used here"):
        storage_at("nowhere://x")


# One writer.


def hold(location, ready):
    Ledger(storage_at(location), "me")
    ready.set()
    time.sleep(600)


def test_a_killed_process_of_this_machine_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 10_000.0)  # were it waited for, this would not end
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    holder = context.Process(target=hold, args=(str(tmp_path), ready))
    holder.start()
    assert ready.wait(600)
    with pytest.raises(BadInput, match=f"in use by process {holder.pid} on"):
        Ledger(storage_at(tmp_path), "me")
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    Ledger(storage_at(tmp_path), "me").close()


# Whole runs.


def run_at(file, location):
    """``python evolve.py FILE --results LOCATION``, in a process of its own."""
    command = [sys.executable, str(toys.ROOT / "evolve.py"), str(file), "--results", location]
    return subprocess.Popen(command, cwd=toys.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(storage):
    keys = ("stage", "number", "recipe_id", "status", "score", "items")
    return sorted(
        tuple(str(row[k]) for k in keys)
        for row in read_table(storage.folder("toy").folder("ledger")).to_pylist()
        if row["event"] == "finished"
    )


@pytest.fixture(scope="module")
def config(make_config, tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("config"), {"budget.candidates": 8, "search.generations": 4})


def test_a_run_on_an_object_store_is_the_same_run_and_goes_on_after_a_kill(config, s3, tmp_path, monkeypatch):
    here = storage_at(tmp_path / "here")
    toys.run_here(config, Path(here.location))
    there = storage_at(f"{s3}/{uuid.uuid4().hex}")
    process = run_at(config, there.location)
    ledger = there.folder("toy").folder("ledger")
    while sum(n.startswith("part-") for n in ledger.names()) < 12:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert LEASE_FILE in ledger.names()
    before = finished(there)
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 1.0)
    run(config_at(config), there, LocalPool, toys.Silent(), "cpu")
    assert finished(there) == finished(here)
    assert set(before) <= set(finished(there))
    made = there.folder("toy")
    assert made.read("recipe.json") == here.folder("toy").read("recipe.json")
    assert made.read("report.md").startswith(b"# toy")
    assert {"config.json", "model.safetensors", "README.md"} <= set(made.folder("best").names())
    assert answer_table(made).num_rows == answer_table(here.folder("toy")).num_rows
    assert LEASE_FILE not in ledger.names()
    assert_seen(there)


def assert_seen(results):
    """The dashboard shows a finished run of an object store, and says how its model is taken."""
    with TestClient(build_app(results, "secret", None), base_url="http://127.0.0.1") as browser:
        browser.get("/?token=secret")
        for _ in range(50):  # a list answers after a second, with the runs that it has read by then
            (row,) = browser.get("/api/runs").json()
            if row["state"] != "reading":
                break
        assert (row["name"], row["state"]) == ("toy", "done")
        page = browser.get("/api/runs/toy").json()
        assert page["curve"]["best"][-1] == row["best"]
        assert page["heat"]["models"]
        assert browser.get(f"/api/runs/toy/candidates/{page['best']}").json()["settings"]["recipe"]
        said = browser.post("/api/runs/toy/export", headers={"x-evolver": "1"}).json()["error"]
        assert (
            said == f"to write the model to a folder of your choice, run: evolver export {results.location}/toy FOLDER"
        )


def test_experts_of_an_object_store_are_brought_here_once(make_config, models, s3, tmp_path, monkeypatch):
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path / "cache"))
    experts = {}
    for name in ("base", "a", "b", "c"):
        storage = storage_at(f"{s3}/models")
        with storage.whole_folder(name) as folder:
            for file in (models / name).iterdir():
                (folder / file.name).write_bytes(file.read_bytes())
        experts[name] = f"{s3}/models/{name}"
    gets, kind = [], type(remote.file_system(s3)[0])
    get_file = kind.get_file
    monkeypatch.setattr(kind, "get_file", lambda self, path, *rest: gets.append(path) or get_file(self, path, *rest))
    base = experts.pop("base")
    file = make_config(tmp_path, {"model.base": base, "experts": experts, "budget.candidates": 2})
    for k in range(2):
        toys.run_here(file, tmp_path / f"results-{k}")
    assert len(gets) == len(set(gets)) == sum(len(list((models / n).iterdir())) for n in ("base", "a", "b", "c"))
    assert (tmp_path / "results-1" / "toy" / "report.md").exists()


def test_models_that_are_not_there_are_one_sentence(s3, tmp_path, monkeypatch):
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path / "cache"))
    with pytest.raises(BadInput, match=rf"model.base: there is nothing at {s3}/nothing; give the folder of a model"):
        open_base(f"{s3}/nothing", "model.base")
