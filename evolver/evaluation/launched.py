"""Candidates evaluated by any other model class of lm-eval: vLLM, SGLang, a server, …

The candidate is written to node-local memory as a Hugging Face folder; lm-eval's own class is then started on it.
"""

from __future__ import annotations

import atexit
import gc
import os
import shlex
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from evolver.config import Evaluation
from evolver.errors import BadInput, nearest
from evolver.evaluation.base import Scored
from evolver.evaluation.library import quiet
from evolver.evaluation.requests import Prepared

MEMORY = Path("/dev/shm")
# How long a server may take until it answers.
PATIENCE_SECONDS = 600.0
# Classes that talk to a server do not load the candidate themselves.
REMOTE = ("local-completions", "local-chat-completions", "sglang-generate", "gguf", "ggml")


class LaunchedModel:
    """A model class of lm-eval, started anew on every candidate.

    Attributes:
        folder: where the candidate is to be written before ``launch``.
        lm: lm-eval's model, while one is started.

    Raises BadInput for a backend that lm-eval does not know.
    """

    def __init__(self, settings: Evaluation) -> None:
        check_backend(settings.backend)
        self._settings = settings
        place = MEMORY if os.access(MEMORY, os.W_OK) else Path(tempfile.gettempdir())
        _sweep(place)
        self._scratch = Path(tempfile.mkdtemp(prefix=f"evolver-{os.getpid()}-", dir=place))
        self.folder = self._scratch / "candidate"
        self.lm: Any = None
        self._server: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)  # memory that is a file system outlives the process

    def launch(self, folder: Path) -> None:
        """Start the class, and the server where one is configured, on the model in a folder.

        Raises RuntimeError where the server ends or does not answer in time.
        """
        from lm_eval.api.registry import get_model

        self.stop()
        port = _free_port()
        names = {"model": str(folder), "port": str(port)}
        if self._settings.serve:
            self._serve([part.format(**names) for part in shlex.split(self._settings.serve)], port)
        given = {k: v.format(**names) if isinstance(v, str) else v for k, v in self._settings.model_args.items()}
        key = "model" if self._settings.backend in REMOTE else "pretrained"
        size = {"batch_size": self._settings.batch_size} if self._settings.batch_size else {}
        with quiet():
            self.lm = get_model(self._settings.backend)(**{key: str(folder), **size, **given})

    def stop(self) -> None:
        """Let go of the class, the server and what they hold."""
        self.lm = None
        gc.collect()
        if self._server is not None:
            self._server.terminate()
            try:
                self._server.wait(timeout=30)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
            self._server = None

    def close(self) -> None:
        """Stop, and remove the candidate."""
        self.stop()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _serve(self, command: Sequence[str], port: int) -> None:
        log = (self._scratch / "server.log").open("wb")
        self._server = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
        until = time.monotonic() + PATIENCE_SECONDS
        while time.monotonic() < until:
            if self._server.poll() is not None:
                said = (self._scratch / "server.log").read_text(errors="replace").strip().splitlines()
                raise RuntimeError(f"the server ended with status {self._server.returncode}: {' '.join(said[-1:])}")
            if _answers(port):
                return
            time.sleep(0.2)
        raise RuntimeError(f"the server did not answer on port {port} within {PATIENCE_SECONDS:.0f} s")


class LaunchedScorer:
    """Scores the launched model on items; prompts are built when the first one is there, by its tokenizer."""

    def __init__(self, model: LaunchedModel, prepare: Callable[[Any], Sequence[Prepared]]) -> None:
        self._model, self._prepare = model, prepare
        self._prepared: Sequence[Prepared] | None = None

    def score(self, places: Sequence[int]) -> Scored:
        with quiet():
            self._prepared = self._prepared or self._prepare(self._model.lm)
            chosen = {p: self._prepared[p] for p in places}
            out = Scored()
            for kind in dict.fromkeys(i.kind for i in chosen.values()):
                self._ask(kind, {p: i for p, i in chosen.items() if i.kind == kind}, out)
        return out

    def _ask(self, kind: str, items: dict[int, Prepared], out: Scored) -> None:
        requests = [r for i in items.values() for r in i.requests]
        answers = iter(getattr(self._model.lm, kind)(requests))
        for place, item in items.items():
            judgement = item.judge([next(answers) for _ in item.requests])
            out.answers[place] = judgement.answer
            out.invalid += judgement.invalid


def check_backend(name: str) -> None:
    """Raises BadInput for a model type that lm-eval does not know."""
    from lm_eval.models import MODEL_MAPPING

    if name not in MODEL_MAPPING:
        raise BadInput(f"evaluation.backend: unknown backend {name!r}; {nearest(name, ['resident', *MODEL_MAPPING])}")


def _sweep(place: Path) -> None:
    """Remove what processes left behind that were killed."""
    for folder in place.glob("evolver-*-*"):
        owner = folder.name.split("-")[1]
        if owner.isdigit() and not Path(f"/proc/{owner}").exists():
            shutil.rmtree(folder, ignore_errors=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=2) as reply:
            return bool(reply.status == 200)
    except OSError:
        return False
