"""The laws of storages, which every kind of them is held to: whole files, one writer, nothing lost."""

from __future__ import annotations

import errno
import importlib
import inspect
import json
import os
import pkgutil
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

import evolver.storage
from evolver.errors import BadInput
from evolver.ledger import Ledger, read_table
from evolver.records import Candidate, Result
from evolver.records.recipe import Expert
from evolver.storage import Storage, read_all, storage_at
from evolver.storage import lease as lease_module
from evolver.storage.lease import LEASE_FILE, Lease

pytestmark = pytest.mark.whole


def local(request):
    return storage_at(request.getfixturevalue("tmp_path") / "folder")


def without_links(request):
    """A folder of a file system that knows no hard links."""

    def refuse(*_):
        raise OSError(errno.EPERM, "no links here")

    request.getfixturevalue("monkeypatch").setattr(os, "link", refuse)
    return local(request)


def s3(request):
    return storage_at(f"{request.getfixturevalue('s3')}/{uuid.uuid4().hex}")


def memory(request):
    return storage_at(f"memory://{uuid.uuid4().hex}")


# What makes an empty folder of each kind.
PLACES = {"local": local, "without links": without_links, "s3": s3, "memory": memory}
# The memory of one process is no place where several drivers meet, and fsspec's has no lock between its threads.
SHARED = [name for name in PLACES if name != "memory"]


@pytest.fixture(params=PLACES)
def storage(request):
    return PLACES[request.param](request)


def shared(test):
    return pytest.mark.parametrize("storage", SHARED, indirect=True)(test)


def again(storage):
    """The same folder, as another process opens it."""
    return storage_at(storage.location)


def test_every_kind_of_storage_has_a_place(request):
    wanted = {name for name, _ in inspect.getmembers(Storage, inspect.isfunction) if name[0] != "_"}
    modules = (m.name for m in pkgutil.iter_modules(evolver.storage.__path__, "evolver.storage."))
    classes = (c for m in modules for _, c in inspect.getmembers(importlib.import_module(m), inspect.isclass))
    kinds = {c for c in classes if wanted <= set(dir(c)) and c is not Storage}
    held = {type(make(request)) for make in PLACES.values()}
    for kind in kinds:
        assert kind in held, (
            f"{kind.__name__} is held to no law; add to PLACES in tests/test_storage_laws.py what makes an empty "
            "folder of this kind"
        )
    assert len(kinds) > 1


# Files.


def test_a_file_is_what_was_written_last(storage):
    assert storage.names() == []
    assert not storage.exists("a.txt")
    storage.write("a.txt", b"one")
    storage.write("a.txt", b"two")
    storage.folder("inner").write("b.txt", b"three")
    assert storage.read("a.txt") == b"two"
    assert storage.names() == ["a.txt", "inner"]
    assert storage.exists("a.txt")
    assert storage.exists("inner")
    assert again(storage).folder("inner").read("b.txt") == b"three"
    storage.move("a.txt", "inner")
    assert storage.names() == ["inner"]
    assert storage.folder("inner").names() == ["a.txt", "b.txt"]
    assert storage.folder("inner").read("a.txt") == b"two"
    storage.folder("inner").remove("b.txt")
    assert storage.folder("inner").names() == ["a.txt"]


@pytest.mark.parametrize("data", [b"", b"\0\r\n\xff", bytes(range(256)) * 40_000])
def test_every_byte_is_kept(storage, data):
    storage.create("created", data)
    storage.write("written", data)
    assert again(storage).read("created") == again(storage).read("written") == data


def test_what_is_not_there_is_a_file_not_found(storage):
    with pytest.raises(FileNotFoundError):
        storage.read("gone")
    with pytest.raises(FileNotFoundError):
        storage.folder("no").folder("folder").read("gone")
    storage.write("there", b"there")
    found, missing = read_all(storage, ["there", "gone"])
    assert found == b"there"
    assert isinstance(missing, FileNotFoundError)
    assert storage.folder("no").names() == []
    assert not storage.folder("no").exists("gone")


def test_a_listing_is_complete_and_sorted_and_without_hidden_files(storage):
    names = [f"part-{n:05d}" for n in range(60)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: storage.write(name, b""), names[::-1]))
    storage.write(".hidden", b"")
    assert storage.names() == names
    assert again(storage).names() == names


def test_no_reader_sees_half_a_file(storage):
    whole = {letter * 500_000 for letter in (b"a", b"b")}
    storage.write("file", min(whole))
    ended, seen = threading.Event(), set[bytes]()

    def read():
        while not ended.is_set():
            seen.add(again(storage).read("file"))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        for turn in range(20):
            storage.write("file", sorted(whole)[turn % 2])
    finally:
        ended.set()
        reader.join()
    assert seen
    assert seen <= whole
    assert storage.names() == ["file"]


def test_nothing_gives_way_to_what_is_created(storage):
    storage.create("part", b"first")
    with pytest.raises(FileExistsError):
        again(storage).create("part", b"second")
    assert storage.read("part") == b"first"
    assert storage.names() == ["part"]


@shared
def test_of_many_that_create_one_succeeds(storage):
    def attempt(k):
        try:
            again(storage).create("part", b"%d" % k)
        except FileExistsError:
            return None
        return k

    with ThreadPoolExecutor(8) as pool:
        made = [k for k in pool.map(attempt, range(16)) if k is not None]
    assert len(made) == 1
    assert storage.read("part") == b"%d" % made[0]
    assert storage.names() == ["part"]


@shared
def test_parts_under_running_numbers_are_all_there_whoever_writes_them(storage):
    """Who comes second to a number takes the next one."""

    def write(writer):
        own, number = again(storage), 0
        for turn in range(5):
            while True:
                try:
                    own.create(f"part-{number:03d}", f"{writer} {turn}".encode())
                except FileExistsError:
                    number += 1
                else:
                    break

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, range(4)))
    assert storage.names() == [f"part-{n:03d}" for n in range(20)]
    written = [storage.read(name).decode() for name in storage.names()]
    assert sorted(written) == [f"{writer} {turn}" for writer in range(4) for turn in range(5)]
    for writer in range(4):
        assert [w for w in written if w.startswith(f"{writer} ")] == [f"{writer} {turn}" for turn in range(5)]


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
    assert storage.names() == ["best"]


# One writer.


def test_a_lock_shuts_out_until_it_is_let_go(storage):
    unlock = storage.lock()
    if unlock is None:
        assert again(storage).lock() is None  # then it is the lease alone that tells who writes
        return
    with pytest.raises(BlockingIOError):
        again(storage).lock()
    unlock()
    let_in = again(storage).lock()
    assert let_in is not None
    let_in()


@pytest.fixture
def quick(monkeypatch):
    """Leases that last a second."""
    monkeypatch.setattr(lease_module, "BEAT_SECONDS", 0.2)
    monkeypatch.setattr(lease_module, "LEASE_SECONDS", 1.5)


@pytest.mark.usefixtures("quick")
def test_a_second_holder_is_told_who_the_first_is(storage):
    first = Lease(storage)
    with pytest.raises(BadInput, match=rf"in use by process {os.getpid()} on \S+; wait for it, or stop it first"):
        Lease(again(storage))
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
    assert "in use by process 12 on spot-7; this process continues it in" in said[0]
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
