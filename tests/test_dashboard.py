"""The dashboard: who gets in, what it says, and a live run in a real browser: watched, stopped, resumed, taken."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest
import toys
from playwright.sync_api import sync_playwright
from starlette.testclient import TestClient

from evolver.dashboard.app import build_app
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
    assert {n["label"] for n in found["lineage"]["nodes"]} >= {"a", "b", "c", "task_arithmetic"}
    assert {n["made"] for n in found["lineage"]["nodes"]} >= {"given as a", "merge (task_arithmetic)"}
    assert found["pareto"]["front"]
    assert 0 < found["pareto"]["volume"] <= 1
    assert found["cost"]["workers"].keys() == {"local"}
    assert [what for what, _ in found["cost"]["bill"]] == ["price (estimated)"]


def test_the_front_is_of_those_that_nobody_beats(inside):
    pareto = inside.get("/api/runs/toy").json()["pareto"]
    everybody = [p["values"] for p in (*pareto["front"], *pareto["others"])]
    for values in everybody:
        beaten = any(all(o >= v for o, v in zip(other, values, strict=True)) and other != values for other in everybody)
        assert beaten == (
            values in [p["values"] for p in pareto["others"]] and values not in [p["values"] for p in pareto["front"]]
        )


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

    assert act("/api/runs/toy/stop") == {"error": "nobody runs it."}
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
        assert "and is gone" in stop(at=long_ago)["error"]
        assert "stop it there" in stop(at=time.time(), host="elsewhere")["error"]
        assert "stop it there" in stop(at=time.time(), machine="another")["error"]
        assert bystander.poll() is None
        assert "asked to stop" in stop(at=time.time())["said"]
        assert bystander.wait(10) == -signal.SIGTERM
        assert "and is gone" in stop(at=time.time())["error"]
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
