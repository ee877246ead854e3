"""Evaluates candidates with another model class of lm-eval, such as those for vLLM, SGLang or a server.

A candidate is written to node-local memory as a Hugging Face folder. The class of lm-eval is then started on it.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import inspect
import os
import shlex
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evolver.config.evaluation import EvaluationSettings
from evolver.errors import BadInput, nearest
from evolver.evaluation.base import Scored
from evolver.evaluation.blueprint import HF
from evolver.evaluation.language.library import quiet
from evolver.evaluation.language.requests import PreparedRequests
from evolver.evaluation.language.scratch import Scratch

# Seconds that a server may take until it answers, and until it has ended.
START_SECONDS = 600.0
SHUTDOWN_SECONDS = 30.0
# REMOTE: classes that talk to a server, which has to load the candidate. ELSEWHERE: the beginnings of the names of
# classes that can only talk to models of other providers.
REMOTE = ("local-completions", "local-chat-completions", "sglang-generate", "gguf", "ggml")
ELSEWHERE = ("anthropic", "openai", "litellm", "textsynth", "watsonx", "dummy")
# The package that a class needs, and what the user has to install for it.
BACKEND_PACKAGES = {
    "vllm": ("vllm", "'lm-eval[vllm]'"),
    "vllm-vlm": ("vllm", "'lm-eval[vllm]'"),
    "mamba_ssm": ("mamba_ssm", "'lm-eval[mamba]'"),
    "nemo_lm": ("nemo", "nemo-toolkit"),
    "megatron_lm": ("megatron", "megatron-core"),
    "neuronx": ("optimum", "optimum-neuron"),
    "habana": ("optimum", "optimum-habana"),
    "ipex": ("optimum", "optimum-intel"),
    "winml": ("onnxruntime_genai", "onnxruntime-genai"),
    "sglang": ("sglang", "sglang"),
    "openvino": ("optimum", "'lm-eval[optimum]'"),
    "local-completions": ("tenacity", "'lm-eval[api]'"),
    "local-chat-completions": ("tenacity", "'lm-eval[api]'"),
    "sglang-generate": ("tenacity", "'lm-eval[api]'"),
}


# Arguments that lm-eval hands on to vLLM itself.
VLLM_KEYS = ("gpu_memory_utilization", "swap_space", "enforce_eager", "max_num_seqs", "cpu_offload_gb")


class LaunchedModel:
    """A model class of lm-eval that is started again for every candidate.

    Args:
        settings: the section ``evaluation`` of the configuration.
        room: size of a candidate in bytes.

    Attributes:
        folder: the folder into which the candidate has to be written before ``launch``.
        lm: lm-eval's model while one is started, else None.

    Raises BadInput where the backend's package or the server's program is missing on this machine.
    """

    def __init__(self, settings: EvaluationSettings, room: int) -> None:
        _check_installed(settings)
        self._settings = settings
        self._scratch = Scratch(room)
        self.folder = self._scratch.path / "candidate"
        self.lm: Any = None
        self._server: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def launch(self, folder: Path) -> None:
        """Start the server, if one is configured, and then the class on the model in a folder.

        Raises RuntimeError where the server ends or does not answer in time.
        """
        from lm_eval.api.registry import get_model

        self.stop()
        port = _free_port()
        names = {"model": str(folder), "port": str(port)}
        if self._settings.serve:
            self._serve([_filled(part, names) for part in _command(self._settings.serve)], port)
        given = {k: _filled(v, names) if isinstance(v, str) else v for k, v in self._settings.model_args.items()}
        key = "model" if self._settings.backend in REMOTE else "pretrained"
        size = {"batch_size": self._settings.batch_size} if self._settings.batch_size else {}
        with quiet():
            self.lm = get_model(self._settings.backend)(**{key: str(folder), **size, **given})

    def stop(self) -> None:
        """End the server and release the class, with the memory that they hold."""
        self.lm = None
        gc.collect()
        if self._server is not None:
            _end(self._server)
            self._scratch.watch(0)
        self._server = None

    def clear(self) -> None:
        """Stop, and remove the candidate's folder to make room for the next one."""
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Stop, and remove all files."""
        self.stop()
        self._scratch.close()
        atexit.unregister(self.close)

    def _serve(self, command: Sequence[str], port: int) -> None:
        log = self._scratch.path / "server.log"
        with log.open("wb") as file:
            # The server gets a process group of its own, so that the processes which it starts can be ended with it.
            server = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        self._server = server
        self._scratch.watch(server.pid)
        until = time.monotonic() + START_SECONDS
        while time.monotonic() < until:
            if server.poll() is not None:
                said = log.read_text(errors="replace").strip().splitlines()
                raise RuntimeError(f"the server ended with status {server.returncode}: {' '.join(said[-1:])}")
            if _answers(port):
                return
            time.sleep(0.2)
        raise RuntimeError(f"the server did not answer on port {port} within {START_SECONDS:.0f} s")


class LaunchedScorer:
    """Scores the launched model on items. The prompts are built once the first model has started, as they need its
    tokenizer.
    """

    def __init__(self, model: LaunchedModel, prepare: Callable[[Any], Sequence[PreparedRequests]]) -> None:
        self._model, self._prepare = model, prepare
        self._prepared: Sequence[PreparedRequests] | None = None

    def score(self, places: Sequence[int]) -> Scored:
        with quiet():
            self._prepared = self._prepared or self._prepare(self._model.lm)
            chosen = {p: self._prepared[p] for p in places}
            out = Scored()
            for kind in dict.fromkeys(i.kind for i in chosen.values()):
                self._ask(kind, {p: i for p, i in chosen.items() if i.kind == kind}, out)
        return out

    def _ask(self, kind: str, items: Mapping[int, PreparedRequests], out: Scored) -> None:
        asked = [[r] * _times(r) for i in items.values() for r in i.requests]
        said = iter(getattr(self._model.lm, kind)([r for repeats in asked for r in repeats]))
        for place, item in items.items():
            answers = [[next(said) for _ in range(_times(r))] for r in item.requests]
            item.judge([a if kind == "generate_until" else a[0] for a in answers]).enter(out, place)


def check_backend(settings: EvaluationSettings, kind: str) -> None:
    """Check the key ``evaluation.backend``.

    Args:
        settings: the section ``evaluation`` of the configuration.
        kind: ``model.kind`` of the configuration.

    Raises BadInput for a model type that lm-eval does not know, for one that would not score the candidate, for one
    whose package or arguments are missing, and for arguments that do nothing for it.
    """
    from lm_eval.models import MODEL_MAPPING

    name = settings.backend
    if name not in MODEL_MAPPING:
        raise BadInput(f"evaluation.backend: unknown backend {name!r}; {nearest(name, ['resident', *MODEL_MAPPING])}")
    if name.startswith(ELSEWHERE):
        raise BadInput(
            f"evaluation.backend: {name} cannot score candidates, only other models; write resident, hf or vllm."
        )
    if kind == "seq2seq" and name in HF:
        raise BadInput(
            f"evaluation.backend: {name} ties the heads of encoder-decoders to their embeddings, even where a "
            "checkpoint holds both; write resident."
        )
    if name in REMOTE and not settings.serve:
        raise BadInput(f"evaluation.serve: missing; {name} needs a server: give the command that serves a candidate.")
    if name in HF and settings.serve:
        raise BadInput(f"evaluation.serve: {name} talks to no server, so the command would do nothing; leave it out.")
    _check_installed(settings)
    _check_arguments(settings)


def _check_installed(settings: EvaluationSettings) -> None:
    package, install = BACKEND_PACKAGES.get(settings.backend, ("lm_eval", ""))
    if find_spec(package) is None:
        raise BadInput(f"evaluation.backend: {settings.backend} needs {package}; run `pip install {install}`.")
    program = _command(settings.serve or "true")[0]
    if "{" not in program and shutil.which(program) is None:
        raise BadInput(
            f"evaluation.serve: there is no program {program!r} on this machine; install it, or give its path."
        )


def _command(written: str) -> list[str]:
    """The words of a command.

    Raises BadInput where it has none, or a quotation is not closed.
    """
    try:
        words = shlex.split(written)
    except ValueError as error:
        raise BadInput(f"evaluation.serve: {written!r} is no command ({error}); correct it.") from error
    if not words:
        raise BadInput(f"evaluation.serve: {written!r} is no command (it is empty); correct it.")
    return words


def _check_arguments(settings: EvaluationSettings) -> None:
    """Raises BadInput for arguments that the backend lacks or does not read."""
    name, given = settings.backend, settings.model_args
    if name in REMOTE:
        return
    own = _parameters(name)
    handed = {"self", "model" if name in REMOTE else "pretrained"}
    for argument, parameter in own.items():
        free = parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        )
        if not free and argument not in handed | given.keys():
            raise BadInput(f"evaluation.model_args.{argument}: missing; {name} cannot start without it.")
    if name not in HF:
        return
    # What lm-eval does not know goes on to Transformers, which fails on it when the first candidate is loaded.
    for key in sorted(given.keys() - own.keys()):
        if key in VLLM_KEYS or key in _parameters("vllm"):
            raise BadInput(
                f"evaluation.model_args.{key}: {name} does not read this key, which belongs to vllm; leave it out, or "
                "write backend: vllm."
            )


def _parameters(backend: str) -> Mapping[str, inspect.Parameter]:
    """The arguments that a model class of lm-eval takes.

    Raises BadInput where a package that it needs is missing.
    """
    from lm_eval.api.registry import get_model

    try:
        with quiet():
            return inspect.signature(get_model(backend).__init__).parameters
    except Exception as error:  # a class may fail in any way where a package that it needs is missing or of another age
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"evaluation.backend: lm-eval's model type {backend} cannot be loaded ({reason}); install what it needs, "
            "or write another backend."
        ) from error


def _times(request: Any) -> int:
    """How many answers a task wants to a request. A task that samples may want several."""
    return int(request.repeats or 1) if request.request_type == "generate_until" else 1


def _filled(text: str, names: Mapping[str, str]) -> str:
    """The text with ``{model}`` and ``{port}`` replaced. Other braces stay, such as those of JSON."""
    for name, value in names.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def _end(server: subprocess.Popen[bytes]) -> None:
    """End a server and all processes that it started."""
    with contextlib.suppress(ProcessLookupError):  # no process of its group is left
        os.killpg(server.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=SHUTDOWN_SECONDS)
        os.killpg(server.pid, signal.SIGKILL)
    server.wait()


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
