"""The dashboard: who gets in, what it says, and a live run in a real browser: watched, stopped, resumed, taken."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import httpx
import psutil
import pytest
import toys
from playwright.sync_api import sync_playwright
from starlette.testclient import TestClient

from evolver.dashboard import actions
from evolver.dashboard.app import Runs, build_app
from evolver.dashboard.status import Status
from evolver.dashboard.views import verdict_line
from evolver.storage import storage_at
from evolver.storage.lease import this_machine

pytestmark = pytest.mark.whole


class NoJobs:
    """The jobs of no cluster."""

    def stop(self, job):
        raise AssertionError("no run here is a job")

    resume = stop


JOBS = NoJobs()
HERE = "http://127.0.0.1"
PRICED = {"price_per_hour": 2.5}
JUDGE = """
import random, time

def score(model, items):
    time.sleep(0.1)
    draw = random.Random(round(float(sum(p.double().sum() for p in model.module.parameters())), 6))
    return [float(draw.random() < 0.5) for _ in items]
"""


@pytest.fixture(scope="module")
def results(make_config, tmp_path_factory):
    """A folder with a finished run of two tasks."""
    folder = tmp_path_factory.mktemp("dashboard")
    tasks = [{"task": "toy", "dev": 20, "report": 10}, {"task": "pair", "dev": 20, "report": 10}]
    search = {"algorithm": "tpe", "startup": 4, "layer_groups": 2}
    changes = {"search": search, "budget.candidates": 10, "evaluation.tasks": tasks, "pool": PRICED}
    toys.run_here(make_config(folder, changes), folder / "results")
    return folder / "results"


def client(results, **given):
    return TestClient(build_app(storage_at(results), "secret", JOBS), base_url=HERE, follow_redirects=False, **given)


@pytest.fixture
def inside(results):
    """A browser that came by the address with the token."""
    browser = client(results)
    answer = browser.get("/?token=secret")
    assert (answer.status_code, answer.headers["location"]) == (303, "/")
    return browser


def test_nobody_gets_in_without_the_token(results):
    for path in ("/", "/api/runs", "/api/runs/toy", "/plotly.js", "/static/app.js"):
        assert client(results).get(path).status_code == 401
        assert client(results).get(f"{path}?token=guessed").status_code == 401
    assert client(results).post("/api/runs/toy/stop", headers={"x-evolver": "1"}).status_code == 401


def test_the_token_is_no_business_of_scripts_and_other_sites(results):
    cookie = client(results).get("/?token=secret").headers["set-cookie"].lower()
    assert "httponly" in cookie
    assert "samesite=strict" in cookie


def test_other_sites_cannot_act(inside):
    assert inside.post("/api/runs/toy/resume").status_code == 403
    evil = {"x-evolver": "1", "origin": "http://evil.example"}
    assert inside.post("/api/runs/toy/resume", headers=evil).status_code == 403


def test_another_name_for_this_machine_is_turned_away(results):
    answer = client(results).get("/?token=secret", headers={"host": "evil.example:8421"})
    assert answer.status_code == 403


def test_the_list_and_a_run(inside):
    (run,) = inside.get("/api/runs").json()
    assert (run["name"], run["state"], run["algorithm"], run["spent"][0]) == ("toy", "done", "tpe", 10)
    found = inside.get("/api/runs/toy").json()
    assert found["status"]["best"] == max(c["score"] for c in found["candidates"])
    assert found["curve"]["best"][-1] == found["status"]["best"]
    assert found["curve"]["spent"] == sorted(found["curve"]["spent"])
    assert found["tasks"]["tasks"] == ["toy", "pair"]
    assert set(found["plain"]) >= {"base", "a", "b", "c", "average"}
    assert len(found["heat"]["items"][0]) == 40
    assert {n["label"] for n in found["lineage"]["nodes"]} == {"base", "a", "b", "c", f"candidate {found['best']}"}
    assert found["lineage"]["nodes"][-1]["lines"] == ["merge", "task_arithmetic"]
    assert {n["made"] for n in found["lineage"]["nodes"]} >= {"given as a", "merge (task_arithmetic)"}
    assert found["pareto"]["front"]
    assert 0 < found["pareto"]["volume"] <= 1
    assert found["cost"]["workers"].keys() == {"local"}
    assert [what for what, _ in found["cost"]["bill"]] == ["price (estimated)"]


def test_the_list_shows_the_best_score_so_far_and_the_verdict(results, inside):
    (run,) = inside.get("/api/runs").json()
    whole = inside.get("/api/runs/toy").json()
    best = [v for v in whole["curve"]["best"] if v is not None]
    assert run["line"] == pytest.approx(best, abs=1e-6)
    assert run["line"] == sorted(run["line"])
    assert whole["status"]["verdict"].startswith(run["verdict"])
    assert run["verdict"].endswith(").")  # one sentence: the second begins with "It"
    assert " It " not in run["verdict"]


def test_a_run_that_goes_has_no_verdict_yet():
    said = "Improvement: it beats a.b (p = 0.01). It is not clearly better."
    assert verdict_line(Status("x", "done", verdict=said)) == "Improvement: it beats a.b (p = 0.01)."
    assert verdict_line(Status("x", "stopped", verdict=said)) == ""


def test_the_list_answers_before_it_has_read_everything(results, monkeypatch):
    """And goes on where it stopped, with those that nobody has looked at for longest."""
    for name in ("second", "third"):
        shutil.copytree(results / "toy", results / name)
    try:
        runs = Runs(storage_at(results))
        clock = iter(range(0, 2000, 20))  # of which each run that is read takes forty seconds
        monkeypatch.setattr("evolver.dashboard.app.time.monotonic", lambda: float(next(clock)))
        monkeypatch.setattr("evolver.dashboard.app.LOOK_SECONDS", 30)
        states = [[row["state"] for row in runs.rows()] for _ in range(4)]
        assert states == [
            ["done", "reading", "reading"], ["done", "done", "reading"], ["done"] * 3, ["done"] * 3,
        ]  # fmt: skip
    finally:
        for name in ("second", "third"):
            shutil.rmtree(results / name)


# Started from a configuration.


def start(browser, config):
    return browser.post("/api/start", headers={"x-evolver": "1"}, content=json.dumps({"config": config})).json()


def test_a_configuration_is_refused_as_validate_refuses_it(results, inside, make_config, tmp_path):
    file = make_config(tmp_path, {"run": "new", "search.algorithm": "evolvr"})
    said = start(inside, str(file))["error"]
    assert said == toys.evolver("validate", file).err.strip()
    assert "unknown search 'evolvr'" in said
    assert "\n" not in said
    assert not (results / "new").exists()


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, "missing"), ("", "missing"), (7, "missing"), ("a\0b", "missing"), ("x" * 2000, "2000 characters"),
        ("/dev/zero", "no such file"), ("/no/where.yaml", "no such file"), ("~nobody-here/x.yaml", "no such file"),
        ("y" * 900, "cannot be read"), ("--help", "no such file"), ("$HOME", "$HOME: there is no such file"),
    ],
)  # fmt: skip
def test_what_is_no_configuration_is_not_even_opened(inside, config, says, monkeypatch):
    monkeypatch.setattr(actions.subprocess, "run", lambda *_, **__: pytest.fail("it is checked"))
    assert says in start(inside, config)["error"]


def test_a_large_file_is_no_configuration(inside, tmp_path):
    (tmp_path / "large.yaml").write_bytes(b"#" * (2**20 + 1))
    assert "is too large for a configuration" in start(inside, str(tmp_path / "large.yaml"))["error"]


def test_a_run_is_started_once(results, inside, make_config, tmp_path):
    file = make_config(tmp_path, {"run": "started", "budget.candidates": 3, "search.generations": 1})
    try:
        assert start(inside, str(file))["said"].startswith("started is started")
        began = time.monotonic()
        while next(r["state"] for r in inside.get("/api/runs").json() if r["name"] == "started") != "done":
            assert time.monotonic() - began < 300
            time.sleep(0.2)
        assert "there is a run started already; resume it on its page" in start(inside, str(file))["error"]
        (results / "started" / "about.json").unlink()
        (results / "started" / "identity.json").unlink()  # what is left is no run, which the run itself finds out
        assert "the folder holds files, but they are not those of a run" in start(inside, str(file))["error"]
    finally:
        shutil.rmtree(results / "started")


def test_one_configuration_is_checked_at_a_time(inside, make_config, tmp_path):
    with actions._checking:
        assert "another configuration is being checked" in start(inside, str(make_config(tmp_path)))["error"]


def test_starting_needs_the_token_and_our_own_page(results, inside):
    ours = {"x-evolver": "1"}
    assert client(results).post("/api/start", headers=ours).status_code == 401
    assert inside.post("/api/start").status_code == 403
    assert inside.post("/api/start", headers={**ours, "origin": "http://evil.example"}).status_code == 403


@pytest.mark.parametrize("path", ["/api/start", "/api/runs/toy/resume"])
def test_long_requests_are_not_read_to_their_end(inside, path):
    sent = []

    def endless():
        while len(sent) < 1000:
            sent.append(1)
            yield b" " * 2**12

    answer = inside.post(path, headers={"x-evolver": "1"}, content=endless())
    assert (answer.status_code, "longer than" in answer.json()["error"]) == (400, True)
    deep = inside.post(path, headers={"x-evolver": "1"}, content=b"[" * 2**13)
    assert deep.json()["error"] == "the request is not a JSON object."


OURS = {"x-evolver": "1"}
ACTIONS = ["/api/start", "/api/runs/toy/stop", "/api/runs/toy/resume", "/api/runs/toy/export"]
LEVELS = 100_000


@pytest.mark.parametrize("path", ACTIONS)
@pytest.mark.parametrize(
    "body",
    [
        b"[" * 2**13, b'{"a":' * 2**11, b"[" * LEVELS, b'{"a":' * LEVELS, b"a" + b"[b]" * LEVELS + b"=1",
        b'{"candidates": ' + b"9" * 5000 + b"}", b"candidates=3", b"\xff", b'"text"', b"null",
    ],
    ids=lambda body: f"{body[:6]!r}…{len(body)}",
)  # fmt: skip
def test_a_body_that_is_no_object_is_refused_with_a_sentence(inside, path, body):
    for kind in ("application/json", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"):
        answer = inside.post(path, headers={**OURS, "content-type": kind}, content=body)
        assert answer.status_code == 400
        assert re.match(r"the request is (not a JSON object|longer than \d+ bytes)", answer.json()["error"])


@pytest.mark.parametrize("value", [-1, 10**6, 2**63, 10**400, True, 1.5, "3", [], {"a": 1}], ids=str)
def test_a_candidate_that_the_run_lacks_is_not_exported(inside, monkeypatch, value):
    monkeypatch.setattr(actions.subprocess, "Popen", lambda *_, **__: pytest.fail("it is exported"))
    answer = inside.post("/api/runs/toy/export", headers=OURS, content=json.dumps({"candidate": value}))
    assert answer.status_code == 400
    assert re.search("there is no candidate|is not the number of a candidate", answer.json()["error"])
    if value != 10**6:
        more = inside.post("/api/runs/toy/resume", headers=OURS, content=json.dumps({"candidates": value}))
        assert (more.status_code, "is not usable" in more.json()["error"]) == (400, True)


@pytest.mark.parametrize("action", ["stop", "resume", "export"])
@pytest.mark.parametrize("name", ["gone", "x" * 255, "x" * 3000, "%00", ".hidden", "%2e%2e", "a%0ab", "é"])
def test_an_action_on_a_run_that_is_not_there_is_refused(inside, action, name):
    answer = inside.post(f"/api/runs/{name}/{action}", headers=OURS, content=b"{}")
    assert 400 <= answer.status_code < 500
    if answer.status_code != 404:  # of ..: no page of ours
        assert "there is no run" in answer.json()["error"]


@pytest.mark.parametrize("action", ["delete", "start", "extend"])
def test_an_action_that_is_none_is_refused(inside, action):
    assert inside.post(f"/api/runs/toy/{action}", headers=OURS).status_code == 404
    assert inside.delete("/api/runs/toy", headers=OURS).status_code == 405


@pytest.mark.parametrize(
    ("path", "headers", "status"),
    [
        (f"/api/runs/{'x' * 5000}", {}, 414), (f"/?token={'x' * 5000}", {}, 414), (f"/{'[' * 5000}", {}, 414),
        (f"/api/runs/toy/candidates/{'9' * 5000}", {}, 414), (f"/api/runs/toy/candidates/{'9' * 4000}", {}, 400),
        (f"/api/runs/{'x' * 3000}", {}, 400), (f"/static/{'x' * 3000}", {}, 404), ("/static/a%00b", {}, 404),
        ("/api/runs", {"x-more": "x" * 2**15}, 431), ("/api/runs", {f"x-{n}": "y" * 90 for n in range(200)}, 431),
        ("/api/runs/toy/candidates/-1", {}, 404), ("/api/runs/toy/candidates/1e3", {}, 404),
    ],
    ids=lambda value: str(value)[:30],
)  # fmt: skip
def test_long_and_strange_requests_are_refused_with_a_sentence(inside, path, headers, status):
    answer = inside.get(path, headers=headers)
    assert answer.status_code == status
    assert answer.text


def test_the_way_in_leads_to_this_dashboard_only(results):
    """Whatever the address and the header look like that came with the token."""
    for path, headers in (("//evil.example/?token=secret", {}), ("/?token=secret", {"host": "127.0.0.1:["})):
        answer = client(results).get(f"{HERE}{path}", headers=headers)
        assert answer.status_code == 303
        assert re.match(r"/(?!/)", answer.headers["location"])


def test_the_server_itself_refuses_what_is_too_long(served, results):
    """No traceback is printed, and the next request is answered."""
    address = served(results)
    port = int(re.search(r":(\d+)/", address)[1])
    for request in (
        b"GET /" + b"x" * 2**20, b"GET / HTTP/1.1\r\nhost: a\r\nx: " + b"y" * 2**20,
        b"GET /" + b"x" * 5000 + b" HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n",
    ):  # fmt: skip
        with socket.create_connection(("127.0.0.1", port)) as sock, contextlib.suppress(OSError):
            sock.sendall(request)
            assert re.match(rb"HTTP/1.1 4\d\d ", sock.recv(2**12))
    assert httpx.get(address).status_code == 303


def test_the_front_is_of_those_that_nobody_beats(inside):
    pareto = inside.get("/api/runs/toy").json()["pareto"]
    everybody = [p["values"] for p in (*pareto["front"], *pareto["others"])]
    for values in everybody:
        beaten = any(all(o >= v for o, v in zip(other, values, strict=True)) and other != values for other in everybody)
        assert beaten == (
            values in [p["values"] for p in pareto["others"]] and values not in [p["values"] for p in pareto["front"]]
        )


@pytest.fixture
def twins(results, tmp_path):
    """A folder with the finished run under two names."""
    for name in ("one", "two"):
        shutil.copytree(results / "toy", tmp_path / "twins" / name)
    return tmp_path / "twins"


def test_runs_are_compared(twins):
    page = client(twins)
    assert page.get("/api/compare?run=one&run=two").status_code == 401
    page.get("/?token=secret")
    found = page.get("/api/compare?run=one&run=two").json()
    assert (found["runs"], found["alike"], found["items"]) == (["one", "two"], True, 20)
    assert [row[:2] for row in found["winners"]] == [["one", found["winners"][0][1]], ["two", found["winners"][0][1]]]
    assert found["tests"] == [["one", "two", "+0.0", "+0.0 – +0.0", "1", "1"]]
    assert found["keys"] == []
    for names, says in ((["one"], "at least two"), (["one", "../one"], "there is no run"), ("abcdefghi", "too many")):
        answer = page.get("/api/compare", params={"run": list(names)})
        assert answer.status_code == 400
        assert says in answer.json()["error"]


def test_runs_are_ticked_in_the_list_and_compared(twins, served, browser):
    page = browser.new_page(viewport={"width": 1000, "height": 800})
    wrong = watched(page)
    page.goto(served(twins))
    page.wait_for_selector("#tick-one")
    assert page.is_disabled("#compare")
    page.check("#tick-one")
    page.check("#tick-two")
    page.click("#compare")
    page.wait_for_selector("#curves .main-svg")
    assert page.url.endswith("/compare?run=one&run=two")
    assert page.inner_text("main").count("candidate") == 2
    assert wrong == []
    page.goto(page.url.replace("run=two", "run=three"))
    page.wait_for_selector("main .warning")
    assert "there is no run three" in page.inner_text("main")


def test_the_coefficients_of_a_candidate(inside):
    found = inside.get("/api/runs/toy/candidates/3").json()
    rules, lines = found["settings"]["rules"], {line["name"]: line["values"] for line in found["settings"]["lines"]}
    assert len({rule["place"] for rule in rules}) >= 2
    assert found["settings"]["depth"] == 2
    for rule in rules:
        first = re.match(r"layer (\d)", rule["place"])
        for name, value in zip("abc", rule["values"].get("weight", ()), strict=False):
            if first:
                assert lines[f"weight of {name}"][int(first[1])] == value
    assert inside.get("/api/runs/toy/candidates/99").status_code == 400


def test_what_cannot_be_done_is_said(inside):
    def act(path, body=None):
        return inside.post(path, headers={"x-evolver": "1"}, content=json.dumps(body or {})).json()

    assert act("/api/runs/toy/stop") == {"error": "no process is running it."}
    assert "no run gone" in act("/api/runs/gone/stop")["error"]
    assert "not usable" in act("/api/runs/toy/resume", {"candidates": -3})["error"]


def test_only_the_process_that_has_the_run_is_stopped(results, inside):
    """Another one may have its number by now, on this machine or elsewhere."""
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    lease = results / "toy" / "ledger" / "lease.json"
    here = {"host": socket.gethostname(), "machine": this_machine(), "pid": bystander.pid, "token": "x"}

    def stop(**holder):
        lease.write_text(json.dumps({**here, **holder}))
        return inside.post("/api/runs/toy/stop", headers={"x-evolver": "1"}).json()

    try:
        long_ago = psutil.Process(bystander.pid).create_time() - 1
        assert "and has ended" in stop(at=long_ago)["error"]
        assert "stop it there" in stop(at=time.time(), host="elsewhere")["error"]
        assert "stop it there" in stop(at=time.time(), machine="another")["error"]
        assert bystander.poll() is None
        assert "asked to stop" in stop(at=time.time())["said"]
        assert bystander.wait(10) == -signal.SIGTERM
        assert "and has ended" in stop(at=time.time())["error"]
    finally:
        bystander.kill()
        lease.unlink()


def test_a_folder_that_is_no_run_does_no_harm(results, inside):
    (results / "other").mkdir(exist_ok=True)
    (results / "other" / "about.json").write_text("{}")
    try:
        states = {run["name"]: run["state"] for run in inside.get("/api/runs").json()}
        assert states == {"other": "unreadable", "toy": "done"}
    finally:
        shutil.rmtree(results / "other")


# In a browser.


@pytest.fixture
def served(tmp_path):
    """``served(folder)``: the address of a dashboard in a process of its own."""
    processes = []

    def start(folder):
        command = [sys.executable, "-m", "evolver", "dashboard", str(folder), "--port", "0"]
        process = subprocess.Popen(command, cwd=toys.ROOT, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        return process.stdout.readline().strip()

    yield start
    for process in processes:
        process.terminate()
        process.wait(30)


@pytest.fixture
def browser():
    path = toys.chromium()
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield started
        started.close()


def watched(page):
    """What goes wrong in a page."""
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    return wrong


def test_a_live_run_is_seen_stopped_resumed_and_taken(make_config, tasks, tmp_path, served, browser):
    (tmp_path / "mine.py").write_text(JUDGE)
    task = {
        "task": "mine",
        "function": f"{tmp_path / 'mine.py'}:score",
        "data": str(tasks / "toy.jsonl"),
        "dev": 20,
        "report": 10,
    }
    file = make_config(tmp_path, {"search.generations": 99, "budget.candidates": 200, "evaluation.tasks": [task]})
    results = tmp_path / "results"
    run = subprocess.Popen(
        toys.command(file, results), cwd=toys.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not (results / "toy" / "about.json").exists():
            assert run.poll() is None
            time.sleep(0.1)
        page = browser.new_page()
        wrong = watched(page)
        page.goto(served(results))
        page.click("text=toy")
        page.wait_for_selector("#curve .main-svg")
        page.wait_for_selector("dd .running")

        def candidates():
            return int(re.search(r"candidates\s*(\d+) of", page.inner_text(".facts"))[1])

        before = candidates()
        page.wait_for_function(
            f"() => +/candidates\\s*(\\d+) of/.exec(document.querySelector('.facts').innerText)[1] > {before}"
        )
        page.click("#stop")
        page.wait_for_selector("dd .stopped", timeout=600_000)
        assert run.wait(30) == 3
        assert before < candidates() < 200
        page.click("#resume")
        page.wait_for_selector("dd .running", timeout=600_000)
        page.click("#stop")
        page.wait_for_selector("dd .stopped", timeout=600_000)
        stopped = candidates()
        assert before < stopped < 200
        page.fill("#budget", str(stopped + 5))
        page.click("#extend")
        page.wait_for_selector("dd .running", timeout=600_000)
        page.wait_for_selector("dd .done", timeout=600_000)
        assert candidates() == stopped + 5
        page.click("#export")
        written = results / "toy-export-best"
        began = time.monotonic()
        while not (written / "model.safetensors").exists():
            assert time.monotonic() - began < 600
            time.sleep(0.2)
        assert wrong == []
    finally:
        run.kill()
    assert written.is_dir()


def test_a_run_is_started_in_the_browser(tmp_path, make_config, served, browser):
    page = browser.new_page()
    wrong = watched(page)
    (tmp_path / "results").mkdir()
    page.goto(served(tmp_path / "results"))
    page.fill("#config", str(tmp_path / "gone.yaml"))
    page.click("#start")
    page.wait_for_selector("text=there is no such file")
    assert len(wrong) == 1  # the browser's own line about the refusal
    page.fill("#config", str(make_config(tmp_path, {"budget.candidates": 3, "search.generations": 1})))
    page.keyboard.press("Enter")
    page.wait_for_selector(".state.done", timeout=300_000)
    assert page.locator(".spark path").count() == 1
    assert page.inner_text(".sentence").endswith(").")
    assert len(wrong) == 1


def plots(page, script):
    """What a script makes of the traces and the layout of each plot of a page."""
    return page.evaluate(
        f"Object.fromEntries([...document.querySelectorAll('.js-plotly-plot')].map(p => [p.id, ({script})(p)]))"
    )


@pytest.fixture
def shown(results, served, browser):
    """A finished run's page."""
    page = browser.new_page()
    page.goto(served(results).replace("/?", "/run/toy?"))
    page.wait_for_selector("#heat .main-svg")
    return page


def test_a_tool_bar_covers_nothing_and_is_there_while_the_pointer_is(shown):
    page = shown
    page.mouse.move(1, 1)
    hidden = plots(page, "p => getComputedStyle(p.querySelector('.modebar-group')).opacity")
    assert set(hidden.values()) == {"0"}
    for name in hidden:
        page.hover(f"#{name}")
        page.wait_for_function(
            f"() => getComputedStyle(document.querySelector('#{name} .modebar-group')).opacity === '1'"
        )
    side = "getBoundingClientRect()"
    sides = f"p => [p.querySelector('.modebar').{side}.bottom, p.querySelector('.nsewdrag').{side}.top]"
    assert hidden.keys() >= {"curve", "tasks", "pareto", "heat", "busy"}
    for name, (bar, drawn) in plots(page, sides).items():
        assert bar <= drawn, name


def seen_by(rgb, kind):
    """A colour as people without one kind of cones see it (Machado, Oliveira and Fernandes 2009), in linear light."""
    matrices = {
        "all": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
        "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
        "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    }  # fmt: skip
    linear = [((c / 255 + 0.055) / 1.055) ** 2.4 if c > 10 else c / 255 / 12.92 for c in rgb]
    return [sum(m * v for m, v in zip(row, linear, strict=True)) for row in matrices[kind]]


def rgb_of(color):
    if color.startswith("#"):
        return [int(color[k : k + 2], 16) for k in (1, 3, 5)]
    return [int(c) for c in re.findall(r"\d+", color)[:3]]


def test_a_model_has_one_colour_in_all_plots_and_no_other_model_has_it(shown):
    page = shown
    legend = dict(page.locator(".legend >> nth=0 >> li[title]").evaluate_all(
        "found => found.map(l => [l.title, l.querySelector('line').getAttribute('stroke')])"
    ))  # fmt: skip
    assert legend.keys() >= {"best", "base", "a", "b", "c", "average"}
    drawn = plots(page, "p => Object.fromEntries(p.data.map(d => [d.name, d.line?.color ?? d.marker?.color]))")
    named = {"curve": {"best so far": "best"}}
    for plot in ("curve", "tasks", "pareto"):
        colors = {named.get(plot, {}).get(label, label): color for label, color in drawn[plot].items()}
        assert colors.keys() >= {"best", "base", "a", "b", "c"}
        assert {m: c for m, c in colors.items() if m in legend} == {m: legend[m] for m in legend.keys() & colors.keys()}
    boxes = page.locator("#lineage .box").evaluate_all(
        "found => found.map(b => [b.querySelector('.name').textContent, b.querySelector('rect').style.stroke])"
    )
    assert rgb_of(dict(boxes)["a"]) == rgb_of(legend["a"])
    for kind in ("all", "protan", "deutan"):
        for one, other in itertools.combinations(("best", "base", "a", "b", "c"), 2):
            far = math.dist(seen_by(rgb_of(legend[one]), kind), seen_by(rgb_of(legend[other]), kind))
            assert far > 0.1, (kind, one, other)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_narrow_screen_and_a_keyboard(results, served, browser, scheme):
    page = browser.new_page(viewport={"width": 400, "height": 800}, color_scheme=scheme)
    wrong = watched(page)
    page.goto(served(results))
    page.wait_for_selector("table")
    page.focus("header a")
    for _ in range(6):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.textContent") == "toy":
            break
    page.keyboard.press("Enter")
    page.wait_for_selector("#heat .main-svg")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    ground, text = page.evaluate(
        "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.body).color]"
    )
    light = [sum(map(int, re.findall(r"\d+", color)[:3])) for color in (ground, text)]
    assert (light[0] > light[1]) == (scheme == "light")
    page.click("a[href='#candidate'] >> nth=0")
    page.wait_for_selector("#candidate table")
    page.wait_for_selector("#layers .main-svg")
    assert wrong == []
    page.fill("#which", "99")
    page.click("#show")
    page.wait_for_selector("#shown .warning")
