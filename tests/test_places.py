"""Arguments that are no such thing: pipes, devices, loops, empty names, ports and hosts that nothing answers at."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import toys
from toys import evolver, refusal

from cluster.connection import check_dashboard, connect
from evolver.checkpoints.sources import open_base
from evolver.config.reading import config_at
from evolver.errors import BadInput
from evolver.evaluation.data import read_rows
from evolver.storage import check_target, storage_at


@pytest.fixture(autouse=True)
def _patience():
    """What waits for ever ends as a failure."""

    def late(*_):
        raise AssertionError("it waits")

    old = signal.signal(signal.SIGALRM, late)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, old)


@pytest.fixture
def pipe(tmp_path):
    """``pipe(path)``: a path in the test's folder at which there is a pipe that nobody writes to."""

    def make(path):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        os.mkfifo(tmp_path / path)
        return tmp_path / path

    return make


def said(call):
    with pytest.raises(BadInput) as refused:
        call()
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_pipe_is_never_read(pipe, tmp_path):
    config = pipe("run.yaml")
    assert said(lambda: config_at(config)).startswith(f"{config}: ")
    assert said(lambda: read_rows(str(pipe("rows.jsonl")), "evaluation.tasks")).startswith("evaluation.tasks: ")
    with pytest.raises(OSError, match="pipe"):
        storage_at(tmp_path).read(pipe("about.json").name)
    for file in ("config.json", "model.safetensors", "tokenizer.json"):
        place = pipe(f"model-{file}/{file}")
        assert str(place) in said(lambda folder=place.parent: open_base(str(folder)))
    assert "pipe" in said(lambda: open_base(str(pipe("model.gguf"))))


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/full", "/dev/null"])
def test_a_device_is_never_read(device):
    assert said(lambda: config_at(device)).startswith(device)


@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_no_place_to_write_to(tmp_path, what):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for target in (tmp_path / "loop" / "x", tmp_path / "a\0b", tmp_path / ("x" * 300), tmp_path / "s3:"):
        place = target if target.name != "s3:" else type(target)("s3://bucket/model")
        assert said(lambda place=place: check_target(place, what)).startswith(str(place)[:200])


@pytest.mark.parametrize("location", ["", "a\0b"])
def test_what_is_no_folder_at_all(location):
    assert "cannot be a path" in said(lambda: storage_at(location))


@pytest.mark.whole
@pytest.mark.parametrize("option", ["--results", "--run"])
def test_an_empty_option_is_not_the_default(make_config, tmp_path, option):
    """A shell writes it where a variable is not set."""
    ended = evolver("run", make_config(tmp_path), option, "", cwd=tmp_path)
    assert "''" in refusal(ended.code, ended.err)
    assert not (tmp_path / "results").exists()


def test_a_name_that_is_not_text(tmp_path):
    """Names of files are bytes: what cannot be encoded is shown, not raised."""
    name = os.fsdecode(b"a\xffb")
    process = subprocess.run(
        [sys.executable, "-m", "evolver", "status", tmp_path / name], capture_output=True, cwd=toys.ROOT,
        check=False,
    )  # fmt: skip
    assert (process.returncode, process.stderr) == (0, b"")


@pytest.fixture
def taken():
    """A port at which something listens that never answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        (["--port", "-1"], "0-65535"), (["--port", "70000"], "0-65535"), (["--host", ""], "empty"),
        (["--host", "10.9.9.9"], "10.9.9.9"), (["--host", "nosuch.invalid"], "nosuch.invalid"),
    ],
)  # fmt: skip
def test_a_dashboard_that_cannot_listen(tmp_path, options, word):
    ended = evolver("dashboard", tmp_path, *options)
    sentence = refusal(ended.code, ended.err)
    assert sentence.startswith("--host, --port: ")
    assert word in sentence


def test_a_dashboard_whose_port_is_taken(tmp_path, taken):
    ended = evolver("dashboard", tmp_path, "--port", taken)
    assert f"port {taken} (Address already in use)" in refusal(ended.code, ended.err)


def test_a_dashboard_of_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    ended = evolver("dashboard", tmp_path / "file", "--port", "0")
    assert str(tmp_path / "file") in refusal(ended.code, ended.err)


@pytest.fixture
def unused():
    """A port at which nothing listens."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.mark.parametrize("address", ["127.0.0.1:{taken}", "ray://127.0.0.1:{taken}", "127.0.0.1:{unused}", "rubbish"])
def test_a_cluster_that_does_not_answer(monkeypatch, taken, unused, address):
    pytest.importorskip("ray")
    address = address.format(taken=taken, unused=unused)
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setattr("cluster.connection.ANSWER_SECONDS", 0.5)
    began = time.monotonic()
    assert said(connect).startswith(f"RAY_ADDRESS: no Ray cluster answers at {address!r}")
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("known", [True, False])
def test_the_cluster_of_this_machine_that_has_ended(monkeypatch, tmp_path, unused, known):
    pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", set)  # other tests may have started some
    if known:  # Ray writes this file when a cluster is started, and leaves it there
        (tmp_path / "ray").mkdir()
        (tmp_path / "ray" / "ray_current_cluster").write_text(f"127.0.0.1:{unused}")
    began = time.monotonic()
    sentence = said(connect)
    assert sentence.startswith("RAY_ADDRESS: no Ray cluster answers at 'auto'")
    assert ("Connection refused" in sentence) == known
    assert time.monotonic() - began < 20


@pytest.mark.parametrize("address", ["http://127.0.0.1:{taken}", "http://127.0.0.1:{unused}", "127.0.0.1:8265", ""])
def test_a_dashboard_of_a_cluster_that_does_not_answer(monkeypatch, taken, unused, address):
    monkeypatch.setattr("cluster.connection.ANSWER_SECONDS", 0.5)
    address = address.format(taken=taken, unused=unused)
    assert said(lambda: check_dashboard(address)).startswith(f"--address: no Ray cluster answers at {address!r}")
