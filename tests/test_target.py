"""A command never writes over what is there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import toys
from toys import refused

from evolver.storage import check_target, exported_folder, new_file, new_folder


def tree(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder, as it is."""
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None for p in sorted(folder.rglob("*"))}


def taken(folder: Path) -> Path:
    """A user's folder, with a file deep in it."""
    target = folder / "taken"
    (target / "below").mkdir(parents=True)
    (target / "below" / "diary.txt").write_text("dear diary")
    return target


def write(target: Path, force: bool = False, text: str = "one") -> None:
    with exported_folder(target, force) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.txt").write_text(text)


@pytest.mark.parametrize("kind", ["folder", "file", "link", "link to nothing", "below a file", "run", "in a run"])
@pytest.mark.parametrize("what", ["folder", "file"])
def test_what_is_there_stays(tmp_path, kind, what):
    target = taken(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / "nowhere").symlink_to(tmp_path / "gone")
    (tmp_path / "run" / "ledger").mkdir(parents=True)
    place = {
        "folder": target, "file": tmp_path / "file", "link": tmp_path / "link", "link to nothing": tmp_path / "nowhere",
        "below a file": tmp_path / "file" / "x", "run": tmp_path / "run", "in a run": tmp_path / "run" / "best",
    }[kind]  # fmt: skip
    before = tree(tmp_path)
    refused(lambda: check_target(place, what), place)
    refused(lambda: check_target(place, what, lambda _: False), place)
    if kind != what:
        refused(lambda: check_target(place, what, lambda _: True), place)
    assert tree(tmp_path) == before


@pytest.mark.parametrize("force", [False, True])
def test_an_export_goes_to_a_new_or_an_empty_folder(tmp_path, force):
    write(tmp_path / "new" / "deep", force)
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", force)
    assert (tmp_path / "empty" / "sub" / "a.txt").read_text() == "one"
    assert (tmp_path / "new" / "deep" / "sub" / "a.txt").read_text() == "one"


def test_force_replaces_an_earlier_export_only_as_it_was_written(tmp_path):
    target = tmp_path / "out"
    write(target)
    refused(lambda: write(target), target, "not empty")
    write(target, force=True, text="two")
    assert (target / "sub" / "a.txt").read_text() == "two"
    for spoil in (
        lambda: (target / "sub" / "notes.txt").write_text("mine"),
        lambda: (target / "sub" / "a.txt").write_text("twO"),
        lambda: (target / "evolver-export.json").write_text("[]"),
        lambda: (target / "evolver-export.json").unlink(),
        lambda: (target / "home").symlink_to(tmp_path),
    ):
        spoil()
        before = tree(target)
        refused(lambda: write(target, force=True), target, "--force replaces only what an export wrote")
        assert tree(target) == before
        for path in (target / "sub" / "notes.txt", target / "home"):
            path.unlink(missing_ok=True)
        for path in sorted(target.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        write(target)


def test_what_comes_while_it_is_written_stays(tmp_path):
    target = tmp_path / "out"

    def interfere():
        with new_folder(target) as folder:
            (folder / "a.txt").write_text("ours")
            taken(tmp_path).rename(target)

    refused(interfere, target, "not empty")
    assert tree(tmp_path) == {"out": None, "out/below": None, "out/below/diary.txt": b"dear diary"}

    def interfere_with_file():
        with new_file(tmp_path / "b.txt") as file:
            file.write_text("ours")
            (tmp_path / "b.txt").write_text("theirs")

    refused(interfere_with_file, "b.txt", "is there already")
    assert (tmp_path / "b.txt").read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.txt", "out"]


@pytest.fixture(scope="module")
def run(make_config, tmp_path_factory):
    config = make_config(tmp_path_factory.mktemp("config"), {"budget.candidates": 4, "search.generations": 1})
    return toys.run_here(config, tmp_path_factory.mktemp("results"))


@pytest.mark.whole
@pytest.mark.parametrize("form", [[], ["--delta"], ["--lora", 2], ["--gguf", "f16"]])
@pytest.mark.parametrize("force", [[], ["--force"]])
def test_the_command_exports_over_nothing(run, tmp_path, form, force):
    target = taken(tmp_path)
    for place in (target, run, run / "best", run.parent):
        before = tree(run.parent), tree(tmp_path)
        done = toys.evolver("export", run, place, *form, *force)
        assert done.code == 2, done
        assert done.err.count("\n") == 1
        assert str(place) in done.err
        assert (tree(run.parent), tree(tmp_path)) == before


@pytest.mark.whole
def test_a_gguf_file_is_replaced_only_where_an_export_wrote_it(run, tmp_path):
    out = tmp_path / "merged.gguf"
    assert toys.evolver("export", run, out, "--gguf", "f16").code == 0
    assert toys.evolver("export", run, out, "--gguf", "f16").code == 2
    assert toys.evolver("export", run, out, "--gguf", "bf16", "--force").code == 0
    data = bytearray(out.read_bytes())
    data[-1] ^= 1
    out.write_bytes(data)
    done = toys.evolver("export", run, out, "--gguf", "bf16", "--force")
    assert (done.code, out.read_bytes()) == (2, bytes(data))
    out.write_text("mine")
    assert toys.evolver("export", run, out, "--gguf", "bf16", "--force").code == 2
    assert out.read_text() == "mine"


def test_a_merge_writes_over_nothing(models, tmp_path):
    file = tmp_path / "merge.yml"
    file.write_text(json.dumps({"merge_method": "linear", "dtype": "float32", "models": [
        {"model": str(models / n), "parameters": {"weight": 1.0}} for n in ("a", "b")]}))  # fmt: skip
    for place in (taken(tmp_path), file, file / "below"):
        before = tree(tmp_path)
        done = toys.evolver("merge", file, place)
        assert done.code == 2, done
        assert str(place) in done.err
        assert tree(tmp_path) == before
