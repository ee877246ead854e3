"""The dashboard's server: pages and actions, on the loopback, behind a token."""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import subprocess
import sys
from dataclasses import asdict
from importlib.resources import files
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from evolver.config import NAME
from evolver.dashboard import views
from evolver.errors import BadInput
from evolver.history import ABOUT, History, Kept, read_history, runs_in
from evolver.status import Status, holder_of, status_of
from evolver.storage import Storage

HERE = Path(str(files("evolver.dashboard"))) / "static"
COOKIE = "evolver"
POLICY = "default-src 'self'; style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; frame-ancestors 'none'"


class Guard(BaseHTTPMiddleware):
    """Lets in who has the token; actions only from our own pages.

    A browser that was misled to our port by another name is turned away by the name that it asks for.
    """

    def __init__(self, app: Any, token: str, hosts: frozenset[str]) -> None:
        super().__init__(app)
        self._token, self._hosts = token, hosts

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        host = request.headers.get("host", "")
        if host.partition(":")[0] not in self._hosts:
            return PlainTextResponse("this server is not known by that name", 403)
        given = request.query_params.get("token")
        if request.method == "GET" and given is not None and secrets.compare_digest(given, self._token):
            answer: Response = RedirectResponse(request.url.path, 303)
            answer.set_cookie(COOKIE, self._token, httponly=True, samesite="strict")
            return answer
        if not secrets.compare_digest(request.cookies.get(COOKIE, ""), self._token):
            return PlainTextResponse("open the address that `evolver dashboard` has printed, with its token", 401)
        if request.method != "GET":
            origin = request.headers.get("origin", f"http://{host}")
            if request.headers.get("x-evolver") != "1" or origin != f"http://{host}":
                return PlainTextResponse("actions are taken from the dashboard's own pages only", 403)
        answer = await call_next(request)
        answer.headers["Content-Security-Policy"] = POLICY
        answer.headers["X-Content-Type-Options"] = "nosniff"
        answer.headers["Referrer-Policy"] = "no-referrer"
        return answer


class Runs:
    """The runs of a results folder; what was read is kept until a ledger has changed."""

    def __init__(self, root: Storage) -> None:
        self.root = root
        self._parts: dict[str, Kept] = {}
        self._kept: dict[str, tuple[list[str], History]] = {}

    def names(self) -> list[str]:
        return runs_in(self.root)

    def folder(self, name: str) -> Storage:
        """Raises BadInput for a name that is no run's."""
        if not re.fullmatch(NAME, name) or not self.root.folder(name).exists(ABOUT):
            raise BadInput(f"{self.root.location}: there is no run {name}.")
        return self.root.folder(name)

    def history(self, name: str) -> History:
        folder = self.folder(name)
        parts = [n for n in folder.folder("ledger").names() if n.startswith("part-")]
        kept = self._kept.get(name)
        if kept is None or kept[0] != parts:
            self._kept[name] = kept = parts, read_history(folder, self._parts.setdefault(name, {}))
        return kept[1]

    def status(self, name: str) -> Status:
        try:
            history = self.history(name)
        except BadInput as error:
            return Status(name, "unreadable", verdict=str(error))
        return status_of(self.root.folder(name), name, history)


def build(root: Storage, token: str, hosts: frozenset[str] = frozenset({"127.0.0.1", "localhost"})) -> Starlette:
    """The application over a folder of runs."""
    runs = Runs(root)

    def page(request: Request) -> Response:
        return HTMLResponse((HERE / "index.html").read_text())

    def plotly(request: Request) -> Response:
        return FileResponse(str(files("plotly") / "package_data" / "plotly.min.js"), media_type="text/javascript")

    def all_runs(request: Request) -> Response:
        return JSONResponse([asdict(runs.status(name)) for name in runs.names()])

    def one_run(request: Request) -> Response:
        name = request.path_params["name"]
        return JSONResponse(views.details(runs.history(name), runs.status(name)))

    def one_candidate(request: Request) -> Response:
        history, number = runs.history(request.path_params["name"]), request.path_params["number"]
        found = next((c for c, _ in history.stages["search"] if c.number == number), None)
        if found is None:
            raise BadInput(f"there is no candidate {number}.")
        return JSONResponse({"recipe": found.recipe.id, "coefficients": views.coefficients(found.recipe),
                             "lineage": views.lineage(found.recipe)})  # fmt: skip

    def stop(request: Request) -> Response:
        folder = runs.folder(request.path_params["name"])
        return JSONResponse({"said": stop_run(folder)})

    async def resume(request: Request) -> Response:
        folder = runs.folder(request.path_params["name"])
        given = await request.json() if await request.body() else {}
        return JSONResponse({"said": resume_run(folder, given.get("candidates"))})

    async def export(request: Request) -> Response:
        folder = runs.folder(request.path_params["name"])
        given = await request.json() if await request.body() else {}
        return JSONResponse({"said": export_candidate(folder, given.get("candidate"))})

    def refused(request: Request, error: Exception) -> Response:
        return JSONResponse({"error": str(error)}, 400)

    routes = [
        Route("/", page), Route("/run/{name}", page), Route("/plotly.js", plotly), Route("/api/runs", all_runs),
        Route("/api/runs/{name}", one_run), Route("/api/runs/{name}/candidates/{number:int}", one_candidate),
        Route("/api/runs/{name}/stop", stop, methods=["POST"]),
        Route("/api/runs/{name}/resume", resume, methods=["POST"]),
        Route("/api/runs/{name}/export", export, methods=["POST"]),
        Mount("/static", StaticFiles(directory=HERE)),
    ]  # fmt: skip
    guard = Middleware(Guard, token=token, hosts=hosts)
    return Starlette(routes=routes, middleware=[guard], exception_handlers={BadInput: refused})


def stop_run(folder: Storage) -> str:
    """Ask the process behind a run to stop, where it runs on this machine.

    Raises BadInput where it does not.
    """
    held = holder_of(folder.folder("ledger"))
    if held is None:
        raise BadInput("nobody runs it.")
    if held["host"] != socket.gethostname():
        raise BadInput(f"it runs on {held['host']}; stop it there, or by `ray job stop`.")
    os.kill(int(held["pid"]), signal.SIGTERM)
    return "asked to stop; everything that is finished is kept"


def resume_run(folder: Storage, candidates: int | None) -> str:
    """Go on with a run in a process of its own, which lives on without the dashboard.

    Raises BadInput where somebody runs it already.
    """
    if (held := holder_of(folder.folder("ledger"))) is not None:
        raise BadInput(f"process {held['pid']} on {held['host']} runs it already.")
    if candidates is not None and (not isinstance(candidates, int) or candidates < 1):
        raise BadInput(f"a budget of {candidates!r} candidates is not usable; write a number above 0.")
    more = [] if candidates is None else ["--candidates", str(candidates)]
    _start(["resume", folder.location, *more])
    return "goes on"


def export_candidate(folder: Storage, candidate: int | None) -> str:
    """Write a candidate's model, in a process of its own, beside the run's folder."""
    if "://" in folder.location:
        raise BadInput(f"export it where you want it: evolver export {folder.location} FOLDER")
    which = "best" if candidate is None else str(int(candidate))
    target = Path(folder.location).parent / f"{Path(folder.location).name}-export-{which}"
    _start(["export", folder.location, str(target), *([] if candidate is None else ["--candidate", which])])
    return f"writes {target}"


def _start(arguments: list[str]) -> None:
    command = [sys.executable, "-c", "from evolver.cli import main; main()", *arguments]
    quiet = subprocess.DEVNULL
    subprocess.Popen(command, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)
