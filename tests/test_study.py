"""Coefficient searches as Optuna studies: in SQLite and journal files, and in a PostgreSQL server of the test's own."""

import socket
import sys
import tempfile
from dataclasses import replace

import optuna
import pytest
import toys
from optuna.storages import JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from sqlalchemy.engine import make_url
from test_search import EXPERTS, ORDERED, answer, build, simulate

from evolver.errors import BadInput
from evolver.records import Candidate
from evolver.search.continued import continued
from evolver.search.study import write_study
from evolver.search.study_target import shown_with, study_target

pytestmark = pytest.mark.whole


@pytest.fixture(scope="module")
def server():
    """The URL of a PostgreSQL server that ends with the tests. Its socket lies in its folder, so the path is short."""
    import pgserver

    running = pgserver.get_server(tempfile.mkdtemp(prefix="evolver-postgresql-"), cleanup_mode="delete")
    yield running.get_uri()
    running.cleanup()


@pytest.fixture
def database(server):
    """The URL of a new database."""
    import psycopg

    with psycopg.connect(server, autocommit=True) as connection:
        connection.execute("DROP DATABASE IF EXISTS studies")
        connection.execute("CREATE DATABASE studies")
    return make_url(server).set(database="studies").render_as_string(hide_password=False)


def opened(target):
    if "://" in target:
        return RDBStorage(make_url(target).set(drivername="postgresql+psycopg").render_as_string(hide_password=False))
    if target.endswith(".journal"):
        return JournalStorage(JournalFileBackend(target))
    return RDBStorage(f"sqlite:///{target}")


def trials_in(target):
    """What is written, by the names of the studies."""
    storage, out = opened(target), {}
    for name in optuna.get_all_study_names(storage):
        trials = optuna.load_study(study_name=name, storage=storage).trials
        out[name] = [(t.number, t.state.name, t.values, t.params, t.user_attrs) for t in trials]
    if isinstance(storage, RDBStorage):
        storage.engine.dispose()
    return out


def written(name, target):
    """Write a search of which every candidate has a result, some of them failures; the candidates."""
    more = {"candidates": 9}
    asked = simulate(build(ORDERED[name], **more), failing=True)
    found = {c.number: answer(c, failing=True) for c in asked}
    count = write_study(build(ORDERED[name], **more), lambda c: found.get(c.number), "run", study_target(target))
    assert count == len(asked)
    return asked


@pytest.mark.parametrize("name", ["tpe methods", "cmaes methods", "grid"])
def test_every_kind_of_target_holds_the_same_trials(name, tmp_path, database):
    targets = [str(tmp_path / "study.db"), str(tmp_path / "study.journal"), database]
    asked, *_ = [written(name, target) for target in targets]
    file, journal, server = (trials_in(target) for target in targets)
    assert file == journal == server
    scores = {c.recipe.id: answer(c, failing=True).score for c in asked}
    by_task = {study for study in file if study.endswith(", by task")}
    assert len(file) == 2 * len(by_task)
    told = [t for study, trials in file.items() if study not in by_task for t in trials]
    assert len(told) == len(asked)
    assert all(attrs["recipe"] in scores for *_, attrs in told)
    assert {scores[attrs["recipe"]] for *_, attrs in told} == {None if v is None else v[0] for _, _, v, _, _ in told}
    assert {state for _, state, *_ in told} == {"COMPLETE", "FAIL"}


def test_methods_of_cmaes_have_studies_of_their_own(tmp_path):
    written("cmaes methods", str(tmp_path / "study.db"))
    names = {
        f"run, {method}{more}" for method in ("task_arithmetic", "ties", "dare_ties") for more in ("", ", by task")
    }
    assert set(trials_in(str(tmp_path / "study.db"))) == names


@pytest.mark.parametrize("name", ["tpe", "cmaes methods"])
def test_models_that_a_run_began_with_are_trials_where_they_lie_in_the_space(name, tmp_path):
    """Two candidates of the same space, and a plain expert, which no coefficients of its own give."""
    settings = ORDERED[name]
    inside = simulate(build(settings, seed=7, candidates=12))[-2:]
    listed = [replace(c, number=n) for n, c in enumerate([*inside, Candidate(9, EXPERTS[0], "expert")])]
    asked = simulate(continued(listed, build(settings, candidates=9)), failing=True)
    found = {c.number: answer(c, failing=True) for c in asked}
    target = str(tmp_path / "study.db")
    search = continued(listed, build(settings, candidates=9))
    count = write_study(search, lambda c: found.get(c.number), "run", study_target(target))
    told = [t for study, trials in trials_in(target).items() if "by task" not in study for t in trials]
    scores = {c.recipe.id: answer(c, failing=True).score for c in asked}
    assert count == len(told)
    assert all((None if v is None else v[0]) == scores[attrs["recipe"]] for _, _, v, _, attrs in told)
    received = [attrs["received"] for *_, attrs in told if "received" in attrs]
    able = [n for n in (0, 1) if found[n].score is not None]
    assert able
    # CMA-ES takes only the mean of its first generation from them.
    assert sorted(set(received)) == ([] if name == "cmaes methods" else able)
    own = {c.recipe.id for c in asked[len(listed) :]}
    assert {attrs["recipe"] for *_, attrs in told if "received" not in attrs} == own


def test_a_study_that_is_there_stays_as_it_is(database):
    written("grid", database)
    before = trials_in(database)
    with pytest.raises(BadInput, match=r"a study called 'run' already; write .* optuna delete-study"):
        written("tpe", database)
    assert trials_in(database) == before


def refused(*target):
    with pytest.raises(BadInput) as said:
        study_target(*target)
    return str(said.value)


def test_a_database_that_does_not_answer_is_a_sentence(tmp_path):
    """Nobody listens at the port; or somebody does, and says nothing."""
    url = f"postgresql://me:secret@127.0.0.1:{toys.free_port()}/studies"
    ended = toys.evolver("study", tmp_path, url)
    said = toys.refusal(ended.code, ended.err)
    assert "the database does not answer as it should" in said
    assert "secret" not in said
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"postgresql://me@127.0.0.1:{silent.getsockname()[1]}/studies?connect_timeout=2"
        assert "does not answer" in refused(url)


def test_a_database_that_is_not_there_is_a_sentence(server):
    url = make_url(server).set(database="elsewhere").render_as_string(hide_password=False)
    assert 'database "elsewhere" does not exist' in refused(url)


def test_targets_of_other_kinds_are_refused(tmp_path):
    assert "a name that ends with .journal makes a journal" in refused("mysql://me:secret@host/studies")
    assert "secret" not in refused("mysql://me:secret@host/studies")
    assert "this is no URL of a database" in refused("://x")
    (tmp_path / "study.journal").write_text("")
    assert "is there already; name another file" in refused(str(tmp_path / "study.journal"))


def test_without_its_driver_a_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "psycopg", None)
    assert "run pip install 'evolver[postgresql]'" in refused("postgresql://me@host/studies")


def test_passwords_are_not_shown():
    assert shown_with("postgresql://me:secret@host/studies") == "postgresql://me:***@host/studies"
    assert shown_with("a.journal") == "a.journal"
    assert shown_with("a.db") == "sqlite:///a.db"
