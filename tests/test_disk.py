"""A disk that takes nothing is one sentence from every command that writes, and leaves nothing half-written."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys

import pytest
import toys
import yaml
from safetensors import SafetensorError
from toys import SHORT, evolver, refusal

from evolver.checkpoints.shards import disk_errors
from evolver.errors import BadInput
from evolver.storage import new_file, new_folder

# Arguments behind the folder of a run, and the name of what is written.
WRITERS = {
    "export": ("export", "model"),
    "export as LoRA": ("export", "lora", "--lora", "2"),
    "export as delta": ("export", "delta", "--delta"),
    "export as GGUF": ("export", "model.gguf", "--gguf", "q8_0"),
    "study": ("study", "study.db"),
    "merge": ("merge", "merged"),
}


@pytest.fixture(scope="module")
def run(make_config, tmp_path_factory):
    changes = {**SHORT, "search": {"algorithm": "tpe"}}
    return toys.run_here(make_config(tmp_path_factory.mktemp("config"), changes), tmp_path_factory.mktemp("results"))


@pytest.fixture(scope="module")
def call(run, models, tmp_path_factory):
    """``call(name, folder)``: a command that writes into a folder, and the place where it writes."""
    file = tmp_path_factory.mktemp("merge") / "merge.yml"
    parts = [{"model": str(models / name), "parameters": {"weight": 0.5}} for name in "ab"]
    file.write_text(yaml.safe_dump({"merge_method": "linear", "models": parts}))

    def called(name, folder):
        command, target, *options = WRITERS[name]
        return evolver(command, file if command == "merge" else run, folder / target, *options), folder / target

    return called


@pytest.fixture
def disk(tmp_path):
    """``disk(options)``: a file system of its own, mounted with these options."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options):
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("file systems can only be mounted by root")
        return folder

    yield mount
    # Lazily, as a failed command may still have a file mapped.
    subprocess.run(["umount", "--lazy", folder], capture_output=True, check=False)


@contextlib.contextmanager
def largest_file(size):
    """No file grows beyond so many bytes, as with some quotas; this needs no rights."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.whole
@pytest.mark.parametrize(("options", "words"), [("ro", "Read-only file system"), ("size=16k", "free disk space")])
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_takes_nothing(call, disk, name, options, words):
    folder = disk(options)
    ended, target = call(name, folder)
    said = refusal(ended.code, ended.err)
    assert said.startswith(str(target))
    assert words in said
    assert list(folder.iterdir()) == []


@pytest.mark.whole
@pytest.mark.parametrize("name", WRITERS)
def test_a_file_that_may_not_grow(call, tmp_path, name):
    with largest_file(8000):
        ended, target = call(name, tmp_path)
    assert refusal(ended.code, ended.err).startswith(str(target))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.whole
def test_a_report_that_finds_no_room(run, disk):
    folder = disk("size=16k")
    ended = evolver("report", run, "--out", folder / "out")
    assert str(folder / "out") in refusal(ended.code, ended.err)
    assert [p for p in folder.rglob("*") if p.is_file()] == []


@pytest.mark.whole
def test_output_that_finds_no_room(run):
    """Not only files that a command writes: its own output may go to a file, too."""
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "evolver", "explain", run], stdout=full, stderr=subprocess.PIPE, text=True,
            cwd=toys.ROOT, check=False,
        )  # fmt: skip
    assert "No space left on device" in refusal(done.returncode, done.stderr)


def test_what_is_said_names_the_target_and_not_a_temporary_file(tmp_path):
    for new in (new_file, new_folder):
        target = tmp_path / "target"
        with pytest.raises(BadInput) as refused, new(target) as temporary:
            raise OSError(28, "No space left on device", str(temporary / "x"))
        assert str(refused.value).startswith(f"{target}: ")
        assert list(tmp_path.iterdir()) == []


def test_another_file_is_named_itself_and_a_network_is_no_disk(tmp_path):
    with pytest.raises(BadInput, match=r"^/base/config\.json: "), new_folder(tmp_path / "target"):
        raise PermissionError(13, "Permission denied", "/base/config.json")
    with pytest.raises(ConnectionError), new_folder(tmp_path / "target"):
        raise ConnectionError("the server has gone")


def test_what_safetensors_says_of_a_disk_is_an_error_of_the_disk():
    with pytest.raises(OSError, match="No space") as full, disk_errors():
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    assert full.value.errno == 28
    with pytest.raises(SafetensorError), disk_errors():
        raise SafetensorError("Error while deserializing header")
