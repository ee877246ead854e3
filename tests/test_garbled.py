"""Whatever a file of a run's folder holds, every command answers in one sentence or mends it; nothing whole is lost."""

from __future__ import annotations

import json
import shutil

import garbling
import pytest
import toys
from garbling import FILES, TABLES, WAYS, edited, part_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from toys import SHORT, evolver, refusal

pytestmark = pytest.mark.whole

# Every file in every way: each of them takes a second and more, so two of three are left to ``make prove``.
PAIRS = [
    pytest.param(file, way, marks=[pytest.mark.slow] if (n + k) % 3 else [])
    for n, file in enumerate(FILES)
    for k, way in enumerate(WAYS)
]


@pytest.fixture(scope="module")
def config(make_config, tmp_path_factory):
    return make_config(tmp_path_factory.mktemp("garbled"), {**SHORT, "search": {"algorithm": "tpe"}})


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    return toys.run_here(config, tmp_path_factory.mktemp("finished"))


@pytest.fixture
def runs(finished, tmp_path):
    """A folder with two copies of a finished run: one to be garbled, and ``healthy``."""
    for name in (finished.name, "healthy"):
        shutil.copytree(finished, tmp_path / "runs" / name)
    return tmp_path / "runs"


def assert_one_sentence(ended, *said):
    sentence = refusal(ended.code, ended.err)
    assert not (wrong := [word for word in said if word not in sentence]), (wrong, sentence)


def winner_of(run):
    return json.loads((run / "summary.json").read_text())["winner"]


def commands(run, config):
    """Every command that reads a run, in an order in which none mends what the next one meets."""
    yield "status", evolver("status", run.parent)
    for name in ("report", "explain"):
        yield name, evolver(name, run)
    yield "export", evolver("export", run, run.parent.parent / "exported")
    yield "run", evolver("run", config, "--results", run.parent)


def assert_answered(run, config, finished, garbled):
    for name, ended in commands(run, config):
        if name == "status":
            assert ended.code == 0, ended
            assert "healthy" in ended.out
        elif ended.code:
            assert_one_sentence(ended, run.name)
            # An identity that was changed and is still one is that of another configuration.
            assert garbled in ended.err or (garbled == "identity.json" and "another configuration" in ended.err)
        elif name == "run":
            assert winner_of(run) == winner_of(finished)


@pytest.mark.parametrize(("file", "way"), PAIRS)
def test_a_garbled_file_is_named_or_mended(runs, finished, config, file, way):
    run = runs / finished.name
    WAYS[way](run / file)
    assert_answered(run, config, finished, run.name if way == "gone" else file)


@pytest.mark.parametrize("way", [*WAYS, *TABLES])
def test_a_garbled_part_is_set_aside_and_scored_again(runs, finished, config, way):
    run = runs / finished.name
    part = part_of(run)
    (WAYS | TABLES)[way](part)
    if way != "gone":
        for command in (("report", run), ("export", run, runs / "out")):
            assert_one_sentence(evolver(*command), part.name, "run the configuration again")
    ended = evolver("run", config, "--results", runs)
    assert ended.code == 0, ended
    assert way == "gone" or part.name in ended.out
    assert winner_of(run) == winner_of(finished)
    assert toys.essence(run) == toys.essence(finished)
    if way != "gone":
        assert (run / "ledger" / "damaged" / part.name).exists() or (run / "ledger" / "damaged").is_dir()
    assert evolver("report", run).code == 0


def test_a_row_that_is_damaged_takes_no_other_with_it(runs, finished, config):
    """Parts are joined: of a wide one only the rows are scored again that are lost."""
    run = runs / finished.name
    whole = toys.all_rows(run, "finished")
    garbling.join_parts(run)
    file = next((run / "ledger").glob("part-*.parquet"))
    garbling.spoil_result(file)
    ended = evolver("run", config, "--results", runs)
    assert ended.code == 0
    assert "1 of its" in ended.out
    again = toys.all_rows(run, "finished")
    assert toys.essence(run) == toys.essence(finished)
    kept = {(r["stage"], r["number"], r["time"]) for r in whole} & {(r["stage"], r["number"], r["time"]) for r in again}
    assert len(kept) == len(whole) - 1


def test_a_file_where_the_ledger_should_be(runs, finished, config):
    run = runs / finished.name
    shutil.rmtree(run / "ledger")
    (run / "ledger").write_text("x")
    assert_answered(run, config, finished, "ledger")


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_edit_of_any_file(finished, config, tmp_path_factory, data):
    runs = tmp_path_factory.mktemp("edited") / "runs"
    for name in (finished.name, "healthy"):
        shutil.copytree(finished, runs / name)
    run = runs / finished.name
    files = sorted(p.relative_to(run) for p in run.rglob("*") if p.is_file() and "best" not in p.parts)
    file = data.draw(st.sampled_from(files))
    edited(run / file, data.draw(st.integers(0, 1 << 30)))
    assert_answered(run, config, finished, file.name)
