"""TensorBoard: event files in a folder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from evolver.config.section import Section
from evolver.errors import BadInput
from evolver.loggers.base import LoggedRow, RunPlace, Tracked, flat, logger
from evolver.storage import is_remote
from evolver.storage.paths import expand

# By it our files are known among those of others.
SUFFIX = ".evolver"
ITEMS_TAG, BEST = "search/items", "search/best"


class TensorBoardSettings(Section):
    """Where the event files go."""

    folder: str | None = Field(
        None, description="a folder with the run's name is made in it; default: `tensorboard/` in the run's folder"
    )


@logger("tensorboard", TensorBoardSettings, package="tensorboard")
class TensorBoardLogger:
    """Event files, written again each time the run is started, because an event file cannot be changed.

    The best score stands there twice, by steps and by scored items, as TensorBoard draws everything over steps.
    """

    def __init__(self, settings: TensorBoardSettings, place: RunPlace) -> None:
        if settings.folder is None and place.folder is None:
            raise BadInput(
                "folder: this key is missing; the run's folder is not on this machine, so give a folder that is."
            )
        if settings.folder is not None and is_remote(settings.folder):
            raise BadInput(f"folder: {settings.folder} is not on this machine; give a folder that is.")
        if settings.folder is not None:
            self.folder = Path(expand(settings.folder)) / place.name
        elif place.folder is not None:
            self.folder = place.folder / "tensorboard"
        self._writer: Any = None

    @staticmethod
    def load() -> None:
        import torch.utils.tensorboard  # noqa: F401

    def begin(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        for file in self.folder.glob(f"events.out.tfevents.*{SUFFIX}"):
            file.unlink()
        # With a step to purge from, a TensorBoard that is open on the folder forgets the old files, too.
        self._writer = SummaryWriter(str(self.folder), purge_step=0, filename_suffix=SUFFIX)
        settings = flat({**run.settings, **run.changing})
        for part in hparams(settings, {"search/best": None, "report/winner": None}):
            self._writer.file_writer.add_summary(part)
        rows = "\n".join(f"| {key} | {value} |" for key, value in (settings | dict(run.facts)).items())
        self._writer.add_text("run", f"| {run.name} | |\n| --- | --- |\n{rows}", 0)

    def results(self, rows: Sequence[LoggedRow]) -> None:
        for step, values in rows:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            if BEST in values:
                self._writer.add_scalar(f"{BEST}_by_items", values[BEST], int(values[ITEMS_TAG]))

    def summary(self, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, 0)

    def finish(self, verdict: str, files: Mapping[str, bytes]) -> None:
        self._writer.add_text("verdict", verdict, 0)

    def close(self) -> None:
        self._writer.close()
