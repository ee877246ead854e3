"""Trackers are told of every candidate once, whatever happens to the run or to them."""

from __future__ import annotations

import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate

import pytest
import toys
import tracked as shown
from toys import Silent, run_here

from evolver import loggers
from evolver.config.reading import load
from evolver.errors import BadInput
from evolver.loggers import trackers
from evolver.loggers.base import RunPlace, Tracked, flat, installed
from evolver.loggers.mlflow import MlflowLogger, MlflowSettings
from evolver.loggers.trackers import Trackers, tracked
from evolver.records import Candidate, Result
from evolver.records.recipe import Expert
from evolver.storage import storage_at

pytestmark = pytest.mark.whole

HANGING = """
import sys, time
sys.path.insert(0, {tests!r})
from toys import Path, Silent, run_here

class Hangs(Silent):
    def result(self, candidate, result, left):
        while candidate.stage == "search" and candidate.number == 4:
            time.sleep(1)

run_here(Path("run.yaml"), Path("results"), display=Hangs())
"""


@pytest.fixture(scope="module", autouse=True)
def _at_home(tmp_path_factory):
    """No library of a tracker shall write into anybody's home, or into this folder."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("DATA", "CACHE", "CONFIG"):
            patch.setenv(f"WANDB_{name}_DIR", str(home / name))
        for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
            patch.delenv(name, raising=False)
        patch.chdir(home)
        yield


@pytest.fixture(scope="module")
def followed(make_config, tmp_path_factory):
    """A run that three trackers followed: killed in its search, called again with a larger budget, and again."""
    home = tmp_path_factory.mktemp("followed")
    changes = {
        "loggers": {
            "tensorboard": None,
            "mlflow": {"uri": f"sqlite:///{home}/mlflow.db", "experiment": "merges"},
            "wandb": {"mode": "offline", "folder": str(home)},
        }
    }
    make_config(home, changes)
    environment = {**os.environ, "PYTHONPATH": str(toys.ROOT)}
    environment.pop("WANDB_SERVICE", None)  # W&B's process of this one would take the killed run for one that goes on
    code = HANGING.format(tests=str(toys.ROOT / "tests"))
    child = subprocess.Popen([sys.executable, "-c", code], cwd=home, env=environment)
    try:
        until(lambda: steps_in(home / "mlflow.db") >= 2)
    finally:
        child.kill()
        child.wait()
    assert len(list(home.glob("wandb/offline-run-*"))) == len(list(home.glob("results/toy/tensorboard/*"))) == 1
    display = Silent()
    more = make_config(home, changes | {"budget.candidates": 12})
    folder = run_here(more, home / "results", display=display)
    run_here(more, home / "results", toys.no_work, display)
    assert not [line for line in display.lines if "warning" in line]
    return folder


def until(true, seconds=600.0):
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds
        time.sleep(0.1)


def steps_in(database):
    try:
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as opened:
            return opened.execute("select count(*) from metrics where key = 'search/items'").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


def expected(folder):
    """The steps of a run by its ledger: candidate, score, best score and items so far."""
    searched = [r for r in toys.all_rows(folder, "finished") if r["stage"] == "search"]
    costs = [0 if r["reused"] else len(r["items"]) - r["given"] for r in searched]
    best = accumulate((-1.0 if r["score"] is None else r["score"] for r in searched), max)
    columns = ([r["number"] for r in searched], [r["score"] for r in searched], best, accumulate(costs))
    return list(zip(*columns, strict=True))


def test_tensorboard_shows_every_candidate_once(followed):
    assert len(list((followed / "tensorboard").iterdir())) == 1
    events = shown.tensorboard_events(followed / "tensorboard")

    def points(tag):
        return [(e.step, e.value) for e in events.Scalars(tag)]

    wanted = expected(followed)
    assert len(wanted) == 12
    assert points("search/candidate") == [(step, number) for step, (number, *_) in enumerate(wanted)]
    scores = [(step, pytest.approx(score)) for step, (_, score, *_) in enumerate(wanted) if score is not None]
    assert points("search/score") == scores
    assert points("search/best_by_items") == [(items, pytest.approx(best)) for *_, best, items in wanted]
    summary = json.loads((followed / "summary.json").read_text())
    assert points("report/winner") == [(0, pytest.approx(summary["report"]["winner"]))]
    assert {"baseline/a", "baseline/average", "task/toy", "seconds/forward"} <= set(events.Tags()["scalars"])
    (verdict,) = events.Tensors("verdict/text_summary")
    assert verdict.tensor_proto.string_val[0].decode() == summary["verdict"]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_mlflow_shows_every_candidate_once(followed):
    client, run = shown.mlflow_run(f"sqlite:///{followed.parent.parent}/mlflow.db", "merges")
    assert (run.info.run_name, run.info.status) == ("toy", "FINISHED")

    def points(key):
        return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))

    wanted = expected(followed)
    assert points("search/candidate") == [(step, number) for step, (number, *_) in enumerate(wanted)]
    assert points("search/best") == [(step, best) for step, (*_, best, _) in enumerate(wanted)]
    assert points("search/items") == [(step, items) for step, (*_, items) in enumerate(wanted)]
    baselines = {r["label"]: r["score"] for r in toys.all_rows(followed, "finished") if r["stage"] == "baseline"}
    assert points("baseline/a") == [(0, baselines["a"])]
    assert run.data.metrics["baseline/task_arithmetic_0.5"] == baselines["task_arithmetic@0.5"]
    assert run.data.params["search.Cr"] == "0.5"
    assert run.data.params["evaluation.tasks[0].task".replace("[", "_").replace("]", "_")] == "toy"
    assert run.data.tags["budget.candidates"] == "12"
    assert not [k for k in {**run.data.params, **run.data.tags} if k.startswith("loggers")]  # an address may be secret
    summary = json.loads((followed / "summary.json").read_text())
    assert run.data.tags["mlflow.note.content"] == summary["verdict"]
    assert run.data.metrics["report/winner"] == summary["report"]["winner"]
    kept = {f.path for f in client.list_artifacts(run.info.run_id)}
    assert kept == {"report.md", "report.html", "curve.png", "recipe.json", "summary.json"}


def test_mlflow_says_that_a_run_was_stopped(tmp_path):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    settings = MlflowSettings(uri=f"sqlite:///{tmp_path}/mlflow.db")

    def call(steps):
        logger = MlflowLogger(settings, RunPlace("toy", None))
        logger.begin(Tracked("id", "toy", {"seed": 1}, {"budget": {"candidates": steps}}, {}))
        (run,) = client.search_runs([client.get_experiment_by_name("evolver").experiment_id])
        assert run.info.status == "RUNNING"
        logger.results([(step, {"search/items": step}) for step in range(steps)])
        return logger

    call(2).close()
    logger = call(3)
    (run,) = client.search_runs(["1"])
    assert [m.step for m in client.get_metric_history(run.info.run_id, "search/items")] == [0, 1, 2]
    logger.close()
    assert client.get_run(run.info.run_id).info.status == "KILLED"


def test_mlflow_gets_as_much_in_one_call_as_it_accepts(tmp_path, monkeypatch):
    """Its limits are 1000 metrics, 100 parameters and 100 tags. It refuses more, and fewer would need more calls."""
    from mlflow import MlflowClient

    sizes, log_batch = [], MlflowClient.log_batch

    def counted(self, run_id, metrics=(), params=(), tags=()):
        sizes.append((len(metrics), len(params), len(tags)))
        return log_batch(self, run_id, metrics, params, tags)

    monkeypatch.setattr(MlflowClient, "log_batch", counted)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    logger = MlflowLogger(MlflowSettings(uri=uri), RunPlace("toy", None))
    many = {f"key{n}": n for n in range(250)}
    logger.begin(Tracked("id", "toy", many, {}, {key: str(value) for key, value in many.items()}))
    assert sizes == [(0, 100, 100), (0, 100, 100), (0, 50, 50)]
    sizes.clear()
    logger.results([(step, {"search/items": step, "search/score": 0.5}) for step in range(1250)])
    assert sizes == [(1000, 0, 0), (1000, 0, 0), (500, 0, 0)]
    logger.close()
    (run,) = MlflowClient(uri).search_runs(["1"])
    assert run.data.params == {key: str(value) for key, value in many.items()}
    assert {key: run.data.tags[key] for key in many} == run.data.params


def test_wandb_has_every_candidate_once(followed):
    (file,) = followed.parent.parent.glob("wandb/offline-run-*/run-*.wandb")
    records = list(shown.wandb_records(file))

    def values(kind, of):
        for record in records:
            if record.WhichOneof("record_type") == kind:
                yield {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in of(record)}

    history = list(values("history", lambda r: r.history.item))
    found = [tuple(row.get(f"search/{k}") for k in ("candidate", "score", "best", "items")) for row in history]
    assert found == expected(followed)
    assert [row["_step"] for row in history] == list(range(12))
    summary = {k: v for row in values("summary", lambda r: r.summary.update) for k, v in row.items()}
    said = json.loads((followed / "summary.json").read_text())
    assert (summary["verdict"], summary["report/winner"]) == (said["verdict"], said["report"]["winner"])
    assert "baseline/average" in summary
    config = {k: v for row in values("config", lambda r: r.config.update) for k, v in row.items()}
    assert config["budget"]["candidates"] == 12
    (artifact,) = (r.artifact for r in records if r.WhichOneof("record_type") == "artifact")
    assert "report.md" in [c.path for c in artifact.manifest.contents]


class WandbServer(ThreadingHTTPServer):
    """As much of W&B's server as a run needs that is resumed: it keeps the lines of one run's history."""

    def __init__(self):
        self.history, self.sent, self.known = {}, [], False
        super().__init__(("127.0.0.1", 0), WandbAnswers)
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def answer(self, name, given):
        run = {
            "id": "r", "name": "r", "displayName": "toy", "project": {"name": "p", "entity": {"name": "e"}},
            "historyLineCount": len(self.history), "eventsLineCount": 0, "logLineCount": 0, "tags": [],
            "historyTail": json.dumps(list(self.history.values())[-1:]), "eventsTail": "[]", "summaryMetrics": "{}",
            "config": "{}", "wandbConfig": '{"t": 1}',
        }  # fmt: skip
        if name == "RunResumeStatus":
            return {"model": {"id": "m", "name": "p", "entity": {"name": "e"}, "bucket": run if self.known else None}}
        if name == "UpsertBucket":
            inserted, self.known = not self.known, True
            return {"upsertBucket": {"bucket": run, "inserted": inserted}}
        if name == "CreateRunFiles":
            there = f"http://127.0.0.1:{self.server_port}/file"
            files = [{"name": n, "uploadUrl": there} for n in given["files"]]
            return {"createRunFiles": {"runID": "r", "uploadHeaders": [], "files": files}}
        return {"viewer": {"id": "v", "entity": "e", "username": "e", "flags": "{}", "teams": {"edges": []}}}


class WandbAnswers(BaseHTTPRequestHandler):
    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        given = json.loads(raw) if raw.startswith(b"{") else {}
        out = {}
        if self.path == "/graphql":
            name = re.search(r"(?:query|mutation)\s+(\w+)", given["query"])[1]
            out = {"data": self.server.answer(name, given.get("variables") or {})}
        elif part := (given.get("files") or {}).get("wandb-history.jsonl"):
            self.server.sent.append(len(part["content"]))
            self.server.history |= dict(enumerate(part["content"], part["offset"]))
        data = json.dumps(out).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_PUT = do_POST  # noqa: N815  # http.server's names

    def log_message(self, *arguments): ...


ONLINE = """
import sys
from evolver.loggers.base import RunPlace, Tracked
from evolver.loggers.wandb import WandbLogger, WandbSettings

logger = WandbLogger(WandbSettings(mode="online", folder=sys.argv[1]), RunPlace("toy", None))
logger.begin(Tracked("id", "toy", {}, {}, {}))
logger.results([(step, {"search/items": 10 * step, "search/candidate": step}) for step in range(int(sys.argv[2]))])
logger.close()
"""


def test_wandb_goes_on_where_its_server_is(tmp_path):
    server = WandbServer()
    address = f"http://127.0.0.1:{server.server_port}"
    environment = {**os.environ, "PYTHONPATH": str(toys.ROOT), "WANDB_BASE_URL": address, "WANDB_API_KEY": "a" * 40}
    environment.pop("WANDB_SERVICE", None)  # W&B's process of this one, which knows another address
    for steps in ("4", "9"):
        subprocess.run([sys.executable, "-c", ONLINE, str(tmp_path), steps], env=environment, check=True)
    server.shutdown()
    server.server_close()
    assert [json.loads(line)["search/candidate"] for line in server.history.values()] == list(range(9))
    assert sum(server.sent) == 9


def test_without_trackers_the_run_ends_and_a_later_call_fills_the_gap(make_config, tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    (tmp_path / "file").write_text("no folder")
    gone = {"mlflow": {"uri": "http://somebody:secret@127.0.0.1:9"}, "tensorboard": {"folder": str(tmp_path / "file")}}
    display = Silent()
    changes = {"budget.candidates": 3}
    folder = run_here(make_config(tmp_path, {**changes, "loggers": gone}), tmp_path / "results", display=display)
    warnings = [line for line in display.lines if "warning" in line]
    assert len(warnings) == 2
    for name in gone:
        assert any(line.startswith(f"warning: loggers.{name}: off") for line in warnings)
    assert "secret" not in "".join(warnings)
    assert (folder / "report.md").exists()
    there = {"mlflow": {"uri": f"sqlite:///{tmp_path}/mlflow.db"}}
    run_here(make_config(tmp_path, {**changes, "loggers": there}), tmp_path / "results", toys.no_work)
    assert steps_in(tmp_path / "mlflow.db") == 3


def test_a_folder_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb_of_a_run").mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    assert not installed("wandb_of_a_run")
    assert installed("yaml")


def test_tensorboard_wants_a_folder_where_the_run_has_none_here(make_config, tmp_path):
    far = storage_at("memory://runs/toy")
    with pytest.raises(BadInput, match=r"loggers\.tensorboard\.folder: this key is missing; .* give a folder"):
        loggers.build_loggers(load(make_config(tmp_path, {"loggers": {"tensorboard": {}}})), "run.yaml", far)
    near = load(make_config(tmp_path, {"loggers": {"tensorboard": {"folder": str(tmp_path / "events")}}}))
    assert loggers.build_loggers(near, "run.yaml", far)["tensorboard"].folder == tmp_path / "events" / "toy"


def test_every_folder_is_a_run_of_its_own(make_config, tmp_path):
    config = load(make_config(tmp_path))

    def identity(config, place):
        return tracked(config, {}, storage_at(tmp_path / place), {}).id

    first = identity(config, "one")
    assert identity(config, "one") == first
    assert len({first, identity(config, "two"), identity(config.model_copy(update={"run": "copy"}), "one")}) == 3


class Heard:
    """A logger that keeps what it is told."""

    def __init__(self):
        self.steps, self.summaries, self.verdict, self.closed = [], {}, None, False

    def begin(self, run): ...

    def results(self, rows):
        self.steps += rows

    def summary(self, values):
        self.summaries |= values

    def finish(self, verdict, files):
        self.verdict = verdict

    def close(self):
        self.closed = True


def tell(followers, numbers):
    """Results of these candidates, each under its rank."""
    for rank, number in numbers:
        score = None if number == 1 else number / 10
        result = Result(number, f"r{number}", "ok", score, items=(1.0,) * 10, tasks={"toy": number / 10}, rank=rank)
        followers.result(Candidate(number, Expert("a", str(number)), "test"), result)


def test_steps_go_by_rank_and_never_back():
    heard = Heard()
    followers = Trackers({"heard": heard}, print)
    tell(followers, [(0, 2), (3, 0), (1, 3), (2, 1)])
    followers.close()
    assert [step for step, _ in heard.steps] == [0, 1, 2, 3]
    column = {
        k: [values.get(f"search/{k}") for _, values in heard.steps] for k in ("candidate", "items", "best", "score")
    }
    assert column["candidate"] == [2, 3, 1, 0]
    assert column["items"] == [10, 20, 30, 40]
    assert column["best"] == [0.2, 0.3, 0.3, 0.3]
    assert column["score"] == [0.2, 0.3, None, 0.0]
    assert "task/toy" not in heard.steps[2][1]  # of a part of the items
    assert heard.closed


def test_a_stop_leaves_no_gap_that_would_pass_for_logged():
    heard = Heard()
    followers = Trackers({"heard": heard}, print)
    tell(followers, [(0, 0), (2, 2)])
    followers.close()
    assert [step for step, _ in heard.steps] == [0]


def test_after_a_lowered_budget_all_that_was_asked_for_is_told(tmp_path):
    heard = Heard()
    followers = Trackers({"heard": heard}, print)
    tell(followers, [(0, 0), (2, 2)])
    run = storage_at(tmp_path)
    for name in trackers.ARTIFACTS:
        run.write(name, json.dumps({"verdict": "better", "report": {"a": 0.5}, "budget": {"items": 3}}).encode())
    followers.finish(run)
    followers.close()
    assert [step for step, _ in heard.steps] == [0, 2]
    assert (heard.verdict, heard.summaries) == ("better", {"report/a": 0.5})


@pytest.mark.parametrize("method", ["begin", "results", "close"])
def test_one_warning_for_a_tracker_that_fails(method):
    class Fails(Heard):
        pass

    def fail(self, *arguments):
        raise OSError(28, "No space left on device")

    setattr(Fails, method, fail)
    failing, heard, said = Fails(), Heard(), []
    followers = Trackers({"failing": failing, "heard": heard}, said.append)
    followers.begin(Tracked("id", "toy", {}, {}, {}))
    tell(followers, [(n, n) for n in range(20)])
    followers.close()
    assert len(said) == 1
    assert said[0].startswith("warning: loggers.failing: off")
    assert "No space left on device" in said[0]
    assert len(heard.steps) == 20


def test_nested_settings_get_dotted_keys():
    nested = {"a": {"b": 1, "none": None}, "tasks": [{"task": "x"}, {"task": "y"}], "masses": [0.5, 1.0], "on": True}
    assert flat(nested) == {"a.b": 1, "tasks[0].task": "x", "tasks[1].task": "y", "masses": "[0.5, 1.0]", "on": True}
