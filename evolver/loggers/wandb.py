"""Weights & Biases: a run in a project, online or in a local folder."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from evolver.config.section import Section
from evolver.loggers.base import LoggedRow, RunPlace, Tracked, logger
from evolver.storage.paths import expand

# W&B would report its failures and its use home, and write into the run's own output.
WANDB_ENVIRONMENT = {"WANDB_ERROR_REPORTING": "false", "WANDB_SILENT": "true"}
INIT_SECONDS = 30.0
FINISH_SECONDS = 20.0  # W&B waits so long for uploads at its end; less than a run waits for its loggers


class WandbSettings(Section):
    """Which project. The key comes from ``wandb login`` or the environment."""

    project: str = Field("evolver", min_length=1)
    entity: str | None = Field(None, description="user or team; default: your own")
    mode: Literal["online", "offline"] | None = Field(
        None, description="offline: written to the folder, for `wandb sync`; default: WANDB_MODE, else online"
    )
    folder: str | None = Field(None, description="of W&B's local files; default: WANDB_DIR, else the working folder")


@logger("wandb", WandbSettings, package="wandb")
class WandbLogger:
    """A run of W&B under an id of ours, resumed where the server knows it.

    Offline nothing can be resumed: every call writes the whole run anew, and `wandb sync` puts it in the place of what
    the server has of it.
    """

    def __init__(self, settings: WandbSettings, place: RunPlace) -> None:
        self.settings = settings
        self._run: Any = None
        self._next, self._code = 0, 1

    @staticmethod
    def load() -> None:
        for name, value in WANDB_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import wandb  # noqa: F401

    def begin(self, run: Tracked) -> None:
        import wandb

        online = (self.settings.mode or os.environ.get("WANDB_MODE", "online")) == "online"
        if online and not wandb.login(prompt=False):  # a question would wait behind the run's own output
            raise RuntimeError("there is no API key; run `wandb login`, or set WANDB_API_KEY")
        folder = self.settings.folder and Path(expand(self.settings.folder))
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
        quiet = wandb.Settings(
            console="off", save_code=False, init_timeout=INIT_SECONDS, finish_timeout=FINISH_SECONDS,
            finish_timeout_raises=True,
        )  # fmt: skip
        self._run = wandb.init(
            project=self.settings.project, entity=self.settings.entity, id=run.id, name=run.name,
            mode=self.settings.mode, resume="allow" if online else None, reinit="create_new",
            dir=folder, settings=quiet,
        )  # fmt: skip
        if not online:
            own = Path(self._run.settings.sync_dir)
            # A call in the same second as another one has a number behind the id.
            for old in own.parent.glob(f"offline-run-*-{run.id}*"):
                if old != own:
                    shutil.rmtree(old)
        self._next = self._run.starting_step  # what the server has
        self._run.config.update({**run.settings, **run.changing, "facts": dict(run.facts)}, allow_val_change=True)
        self._run.define_metric("*", step_metric="search/items")

    def results(self, rows: Sequence[LoggedRow]) -> None:
        for step, values in rows:
            if step >= self._next:
                self._run.log(dict(values), step=step)

    def summary(self, values: Mapping[str, float]) -> None:
        self._run.summary.update(dict(values))

    def finish(self, verdict: str, files: Mapping[str, bytes]) -> None:
        import wandb

        self._run.summary.update({"verdict": verdict})
        report = wandb.Artifact(f"report-{self._run.id}", type="report", description=verdict)
        for name, data in files.items():
            with report.new_file(name, mode="wb") as file:
                file.write(data)
        self._run.log_artifact(report)
        self._code = 0

    def close(self) -> None:
        self._run.finish(exit_code=self._code)
