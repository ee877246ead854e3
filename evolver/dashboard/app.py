"""The dashboard's server: the pages, their data, and the actions. It listens on the loopback and asks for a token."""

from __future__ import annotations

import json
import re
import time
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from threading import Lock
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from evolver.config.section import NAME
from evolver.dashboard import views
from evolver.dashboard.actions import Jobs, candidate_number, export_candidate, resume_run, start_run, stop_run
from evolver.dashboard.guard import Guard
from evolver.dashboard.overview import Overview
from evolver.dashboard.status import Status, status_of
from evolver.errors import BadInput
from evolver.report.compare import compare_runs
from evolver.runs.about import runs_in
from evolver.runs.files import holds_a_run
from evolver.storage import Storage

HERE = Path(str(files("evolver.dashboard"))) / "static"
NAME_LENGTH = 255  # no file system has longer names
BODY_BYTES = 2**14  # that the request of an action may have
READERS = 2  # that read runs for the list, so that a large run does not delay small ones
COMPARED = 8  # runs that one page compares
LOOK_SECONDS = 1.0  # that the list waits for runs to be read before it answers


class Runs:
    """The runs of a results folder. What was read of them is kept, and only what is new is read later."""

    def __init__(self, root: Storage) -> None:
        self.root = root
        self._kept: dict[str, Overview] = {}
        self._locks: defaultdict[str, Lock] = defaultdict(Lock)
        self._readers = ThreadPoolExecutor(READERS)
        self._rows: dict[str, tuple[float, dict[str, Any]]] = {}  # of the list, with the time when each was read

    def folder(self, name: str) -> Storage:
        """Raises BadInput if there is no run of that name."""
        possible = len(name) <= NAME_LENGTH and re.fullmatch(NAME, name)
        if not possible or not holds_a_run(self.root.folder(name)):
            raise BadInput(f"{self.root.location}: there is no run {name[:NAME_LENGTH]}.")
        return self.root.folder(name)

    @contextmanager
    def look(self, name: str) -> Iterator[Overview]:
        """A run as it is now. No other thread updates it meanwhile; several threads answer requests."""
        folder = self.folder(name)
        with self._locks[name]:
            if name in self._kept:
                self._kept[name].refresh()
            else:
                self._kept[name] = Overview(folder)
            yield self._kept[name]

    def rows(self) -> list[dict[str, Any]]:
        """The list of runs. For ``LOOK_SECONDS``, runs are read again, beginning with those that were read
        longest ago. The others are listed as they were, or as ``reading`` if they were never read. Threads go on
        reading after the answer.
        """
        names, until = runs_in(self.root), time.monotonic() + LOOK_SECONDS
        self._rows = {name: self._rows[name] for name in names if name in self._rows}
        for name in sorted(names, key=lambda name: self._rows.get(name, (0.0,))[0]):
            left = until - time.monotonic()
            if left <= 0:
                break
            if not self._locks[name].locked():  # else another thread is reading it now
                for reading in wait([self._readers.submit(self._read_row, name)], timeout=left).done:
                    reading.result()  # a bug of ours must be seen
        unread = {name: {**asdict(Status(name, "reading")), "line": []} for name in names}
        return [self._rows[name][1] if name in self._rows else unread[name] for name in names]

    def _read_row(self, name: str) -> None:
        row = self._row(name)
        self._rows[name] = time.monotonic(), row

    def _row(self, name: str) -> dict[str, Any]:
        try:
            with self.look(name) as run:
                status = status_of(run, name)
                return {**asdict(status), "verdict": views.verdict_line(status), "line": views.sparkline(run)}
        except BadInput as error:
            return {**asdict(Status(name, "unreadable", verdict=str(error))), "line": []}


def build_app(
    root: Storage, token: str, jobs: Jobs, hosts: frozenset[str] = frozenset({"127.0.0.1", "localhost"})
) -> Starlette:  # fmt: skip
    """The application over a folder of runs."""
    runs = Runs(root)

    def page(request: Request) -> Response:
        return HTMLResponse((HERE / "index.html").read_text())

    def plotly(request: Request) -> Response:
        return FileResponse(str(files("plotly") / "package_data" / "plotly.min.js"), media_type="text/javascript")

    def all_runs(request: Request) -> Response:
        return JSONResponse(runs.rows())

    def one_run(request: Request) -> Response:
        name = request.path_params["name"]
        with runs.look(name) as run:
            return JSONResponse(views.details(run, status_of(run, name)))

    def compared(request: Request) -> Response:
        return JSONResponse(_compared(runs, list(dict.fromkeys(request.query_params.getlist("run")))))

    def one_candidate(request: Request) -> Response:
        with runs.look(request.path_params["name"]) as run:
            candidate, result = run.candidate(candidate_number(request.path_params["number"]))
            shown = {"settings": views.settings(candidate.recipe), "lineage": views.lineage(run, candidate.recipe)}
        return JSONResponse({**shown, "tasks": dict(result.tasks), "reason": result.reason})

    def acting(act: Callable[[Storage, dict[str, Any]], str]) -> Callable[[Request], Awaitable[Response]]:
        """An action on a run. It runs in a thread, so that slow storage or clusters do not block the other requests."""

        async def answer(request: Request) -> Response:
            given = await _body(request)
            said = await run_in_threadpool(lambda: act(runs.folder(request.path_params["name"]), given))
            return JSONResponse({"said": said})

        return answer

    async def export(request: Request) -> Response:
        given, name = await _body(request), request.path_params["name"]
        return JSONResponse({"said": await run_in_threadpool(_export, runs, name, given.get("candidate"))})

    async def start(request: Request) -> Response:
        given = await _body(request)
        return JSONResponse({"said": await run_in_threadpool(start_run, root, given.get("config"))})

    routes = [
        Route("/", page), Route("/run/{name}", page), Route("/compare", page), Route("/plotly.js", plotly),
        Route("/api/runs", all_runs), Route("/api/compare", compared),
        Route("/api/start", start, methods=["POST"]),
        Route("/api/runs/{name}", one_run), Route("/api/runs/{name}/candidates/{number:int}", one_candidate),
        Route("/api/runs/{name}/stop", acting(lambda run, given: stop_run(run, jobs)), methods=["POST"]),
        Route("/api/runs/{name}/resume", acting(lambda run, given: resume_run(run, jobs, given.get("candidates"))),
              methods=["POST"]),
        Route("/api/runs/{name}/export", export, methods=["POST"]),
        Mount("/static", StaticFiles(directory=HERE)),
    ]  # fmt: skip
    guard = Middleware(Guard, token=token, hosts=hosts)
    return Starlette(routes=routes, middleware=[guard], exception_handlers={BadInput: _refused})


def _compared(runs: Runs, names: Sequence[str]) -> dict[str, Any]:
    """Raises BadInput for runs that cannot be compared, and for too many of them."""
    if len(names) > COMPARED:
        raise BadInput(f"{len(names)} runs are too many for one page; choose at most {COMPARED} of them.")
    return compare_runs([runs.folder(name) for name in names]).form()


def _export(runs: Runs, name: str, candidate: object) -> str:
    """Export a candidate, or the best one. Raises BadInput if the run has no such candidate."""
    number = None if candidate is None else candidate_number(candidate)
    if number is not None:
        with runs.look(name) as run:
            run.candidate(number)
    return export_candidate(runs.folder(name), number)


async def _body(request: Request) -> dict[str, Any]:
    """The JSON object in the request of an action.

    Raises BadInput if it is not a JSON object, or too long.
    """
    sent = b""
    async for piece in request.stream():  # one that is too long is not read to its end
        sent += piece
        if len(sent) > BODY_BYTES:
            raise BadInput(f"the request is longer than {BODY_BYTES} bytes, which no action needs.")
    try:
        given = json.loads(sent or b"{}")
    except (ValueError, RecursionError):
        given = None
    if not isinstance(given, dict):
        raise BadInput("the request is not a JSON object.")
    return given


def _refused(request: Request, error: Exception) -> Response:
    return JSONResponse({"error": str(error)}, 400)
