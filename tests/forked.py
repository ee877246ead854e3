"""Commands as a user calls them, each in a forked process: what takes seconds to import is imported once."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Longer than any refusal may take, and shorter than anybody waits for one.
PATIENCE = 60.0


@dataclass(frozen=True)
class Answer:
    """How a command ended.

    Attributes:
        code: the exit status; that of a signal is negative.
        seconds: from the fork to the end.
        processor: seconds of a processor that it took.
        hung: it was killed, as it did not end in time.
    """

    code: int
    out: str
    err: str
    seconds: float
    processor: float
    hung: bool = False

    @property
    def traceback(self) -> bool:
        """Whether the user sees a fault of ours."""
        return self.code not in (0, 2, 3) or "Traceback (most recent call last)" in self.err


def prepare() -> None:
    """Import what commands import. No thread may be started by it: a forked process would not have it."""
    import torch

    torch.set_num_threads(1)
    import datasets  # noqa: F401
    import lm_eval.tasks  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import optuna  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: F401

    import cluster.job  # noqa: F401
    import evolver.commands.cli
    import evolver.commands.evaluate
    import evolver.commands.explain
    import evolver.commands.merge
    import evolver.driver.deliver
    import evolver.report.report  # noqa: F401


def evolver(*arguments: Any, cwd: Path | None = None, patience: float = PATIENCE) -> Answer:
    """``evolver ARGUMENTS`` in a process of its own."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        began = time.perf_counter()
        child = os.fork()
        if not child:
            _child([str(a) for a in arguments], cwd, out.fileno(), err.fileno())
        code, used, hung = _wait(child, began + patience)
        seconds = time.perf_counter() - began
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode(errors="replace"))
    return Answer(code, texts[0], texts[1], seconds, used, hung)


def _child(arguments: list[str], cwd: Path | None, out: int, err: int) -> None:
    code: Any = 1
    try:
        os.setsid()
        faulthandler.enable()
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False, errors="backslashreplace")  # as Python opens it
        if cwd:
            os.chdir(cwd)
        sys.argv = ["evolver", *arguments]
        from evolver.commands.cli import main

        main()
        code = 0
    except SystemExit as ended:
        code = ended.code or 0
    except BaseException:  # all that Python would print
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


def _wait(child: int, until: float) -> tuple[int, float, bool]:
    hung = False
    while True:
        ended, status, used = os.wait4(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status), used.ru_utime + used.ru_stime, hung
        if time.perf_counter() > until and not hung:
            os.killpg(child, signal.SIGKILL)
            hung = True
        time.sleep(0.005)
