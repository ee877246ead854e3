"""Where runs are kept, here and on an object store: whole files, one writer, nothing lost."""

import errno
import json
import logging
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import toys
from moto.server import ThreadedMotoServer
from starlette.testclient import TestClient

from evolver.checkpoints.sources import open_base
from evolver.config import config_at
from evolver.dashboard.app import build_app
from evolver.driver.run import run
from evolver.errors import BadInput
from evolver.ledger import Ledger, answer_table, read_table
from evolver.records import Candidate, Expert, Result
from evolver.storage import lease as lease_module
from evolver.storage import read_all, remote, storage_at
from evolver.storage.lease import LEASE_FILE, Lease
from evolver.workers.pools.local import LocalPool

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def s3():
    """A bucket of an S3 server on the loopback, as a URI."""
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    given = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_ACCESS_KEY_ID": "id", "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        for name, value in given.items():
            patch.setenv(name, value)
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield "s3://bucket"
    server.stop()


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path):
    """An empty folder of either kind."""
    if request.param == "local":
        return storage_at(tmp_path / "folder")
    return storage_at(f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}")


def test_a_file_is_what_was_written_last(storage):
    assert storage.names() == []
    assert not storage.exists("a.txt")
    storage.write("a.txt", b"one")
    storage.write("a.txt", b"two")
    storage.folder("inner").write("b.txt", b"three")
    assert storage.read("a.txt") == b"two"
    assert storage.names() == ["a.txt", "inner"]
    assert storage.exists("inner")
    assert storage_at(storage.location).folder("inner").read("b.txt") == b"three"
    storage.move("a.txt", "inner")
    assert storage.names() == ["inner"]
    assert storage.folder("inner").names() == ["a.txt", "b.txt"]
    storage.folder("inner").remove("b.txt")
    assert storage.folder("inner").names() == ["a.txt"]


def test_what_is_not_there_is_a_file_not_found(storage):
    with pytest.raises(FileNotFoundError):
        storage.read("gone")
    found, missing = read_all(storage_at_with(storage, "there"), ["there", "gone"])
    assert found == b"there"
    assert isinstance(missing, FileNotFoundError)


def storage_at_with(storage, name):
    storage.write(name, name.encode())
    return storage


def test_nothing_gives_way_to_what_is_created(storage):
    storage.create("part", b"first")
    with pytest.raises(FileExistsError):
        storage.create("part", b"second")
    assert storage.read("part") == b"first"


def test_of_many_that_create_one_succeeds(storage):
    def attempt(k):
        try:
            storage_at(storage.location).create("part", b"%d" % k)
        except FileExistsError:
            return None
        return k

    with ThreadPoolExecutor(8) as pool:
        made = [k for k in pool.map(attempt, range(16)) if k is not None]
    assert len(made) == 1
    assert storage.read("part") == b"%d" % made[0]
    assert storage.names() == ["part"]


def test_a_whole_folder_takes_the_place_of_the_old_one(storage):
    for files in ({"a": "1", "b/c": "2"}, {"a": "3", "d": "4"}):
        with storage.whole_folder("best") as folder:
            for name, text in files.items():
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_text(text)
    best = storage.folder("best")
    assert best.names() == ["a", "d"]
    assert best.read("a") == b"3"
    with pytest.raises(ZeroDivisionError), storage.whole_folder("best") as folder:
        (folder / "a").write_text(str(1 / 0))
    assert best.read("a") == b"3"


def test_file_systems_without_links_create_as_well(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", refuse)
    storage = storage_at(tmp_path)
    storage.create("part", b"first")
    with pytest.raises(FileExistsError):
        storage.create("part", b"second")
    assert storage.read("part") == b"first"
    assert [p.name for p in tmp_path.iterdir()] == ["part"]


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


@pytest.fixture
def quick(monkeypatch):
    """Leases that last a second."""
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 1.5)


@pytest.mark.usefixtures("quick")
def test_a_second_holder_is_told_who_the_first_is(storage):
    first = Lease(storage)
    with pytest.raises(BadInput, match=rf"in use by process {os.getpid()} on \S+; wait for it, or stop it first"):
        Lease(storage_at(storage.location))
    first.close()
    assert LEASE_FILE not in storage.names()
    Lease(storage).close()


@pytest.mark.usefixtures("quick")
def test_a_holder_of_another_machine_is_waited_for_as_long_as_its_lease(storage):
    gone = {"host": "spot-7", "pid": 12, "machine": "another", "token": "t", "beat": 41}
    storage.write(LEASE_FILE, json.dumps(gone).encode())
    said, began = [], time.monotonic()
    lease = Lease(storage, said.append)
    assert time.monotonic() - began >= 1.5
    assert "in use by process 12 on spot-7; going on in" in said[0]
    lease.close()


@pytest.mark.usefixtures("quick")
def test_a_holder_of_another_machine_that_lives_keeps_it(storage):
    held = {"host": "node-2", "pid": 12, "machine": "another", "token": "t", "beat": 0}
    ended = threading.Event()

    def live():
        while not ended.wait(0.2):
            held["beat"] += 1
            storage.write(LEASE_FILE, json.dumps(held).encode())

    storage.write(LEASE_FILE, json.dumps(held).encode())
    holder = threading.Thread(target=live)
    holder.start()
    try:
        with pytest.raises(BadInput, match="in use by process 12 on node-2"):
            Lease(storage)
    finally:
        ended.set()
        holder.join()


def candidate(k):
    return Candidate(k, Expert(f"e{k}", f"{k:x}"), "test")


def result(k):
    return Result(k, candidate(k).recipe.id, "ok", 0.5, 0.5, True, (0.5,))


def taken_over(storage):
    """The lease of another driver, which took ours for ended."""
    other = {"host": "node-9", "pid": 3, "machine": "another", "token": "other", "beat": 1}
    storage.write(LEASE_FILE, json.dumps(other).encode())


@pytest.mark.usefixtures("quick")
def test_a_driver_that_was_taken_for_dead_writes_nothing_more(storage):
    """It finds out by its lease, within a beat."""
    ledger = Ledger(storage, "me")
    ledger.write_result(candidate(0), result(0))
    taken_over(storage)
    time.sleep(1.0)
    with pytest.raises(BadInput, match="in use by process 3 on node-9"):
        ledger.write_result(candidate(1), result(1))
    assert read_table(storage).num_rows == 1
    ledger.close()
    assert LEASE_FILE in storage.names()  # it is the other one's


def test_of_two_drivers_that_write_one_is_too_late(storage):
    """A frozen one has no beat to find out by: what the other one wrote under its number stops it."""
    frozen = Ledger(storage, "me")
    frozen.write_result(candidate(0), result(0))
    frozen._lease._end.set()
    taken_over(storage)
    storage.create("part-00000001.parquet", storage.read("part-00000000.parquet"))
    with pytest.raises(BadInput, match="in use by process 3 on node-9"):
        frozen.write_result(candidate(1), result(1))
    assert storage.names().count("part-00000001.parquet") == 1
    assert frozen.answer(candidate(1)) is None
    frozen.close()


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
        (row,) = browser.get("/api/runs").json()
        assert (row["name"], row["state"]) == ("toy", "done")
        page = browser.get("/api/runs/toy").json()
        assert page["curve"]["best"][-1] == row["best"]
        assert page["heat"]["models"]
        assert browser.get(f"/api/runs/toy/candidates/{page['best']}").json()["settings"]["recipe"]
        said = browser.post("/api/runs/toy/export", headers={"x-evolver": "1"}).json()["error"]
        assert said == f"export it to where you want it: evolver export {results.location}/toy FOLDER"


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
