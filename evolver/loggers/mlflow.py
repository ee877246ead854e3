"""MLflow: a run in an experiment of a tracking server or of a local store."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from evolver.config.section import Section
from evolver.loggers.base import LoggedRow, RunPlace, Tracked, flat, logger
from evolver.storage.paths import expand

# The tag by which a run is found again.
ID = "evolver.id"
# Logged at every step: those where it is are done.
MARK = "search/items"
# MLflow would send its usage statistics, print into the run's output, and wait minutes for a server that is gone.
MLFLOW_ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
}
# How many metrics MLflow accepts in one call, and how many parameters and how many tags.
METRICS_AT_ONCE, SETTINGS_AT_ONCE = 1000, 100


class MlflowSettings(Section):
    """Which MLflow. Credentials come from the environment, as MLflow has it."""

    uri: str | None = Field(
        None, description="tracking server, or a store such as sqlite:///mlflow.db; default: MLflow's own"
    )
    experiment: str = Field("evolver", min_length=1, description="it is made if there is none")


@logger("mlflow", MlflowSettings, package="mlflow")
class MlflowLogger:
    """A run of MLflow, found again by a tag; what a later call may change of the configuration stands in tags."""

    def __init__(self, settings: MlflowSettings, place: RunPlace) -> None:
        self.settings = settings
        self._client: Any = None
        self._run, self._status = "", "KILLED"
        self._steps: set[int] = set()
        self._known: dict[str, float] = {}

    @staticmethod
    def load() -> None:
        for name, value in MLFLOW_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        import mlflow  # noqa: F401

    def begin(self, run: Tracked) -> None:
        from mlflow import MlflowClient

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # how a local store is set up is no news of the run
        self._client = MlflowClient(self.settings.uri and expand(self.settings.uri))
        experiment = self._experiment()
        found = self._client.search_runs([experiment], f"tags.`{ID}` = '{run.id}'", max_results=1)
        told = found[0] if found else self._client.create_run(experiment, tags={ID: run.id}, run_name=run.name)
        self._run, self._known = told.info.run_id, told.data.metrics
        self._client.update_run(self._run, status="RUNNING")
        self._steps = {m.step for m in self._client.get_metric_history(self._run, MARK)} if found else set()
        self._describe(run, told.data.params)

    def results(self, rows: Sequence[LoggedRow]) -> None:
        self._log([(step, values) for step, values in rows if step not in self._steps])

    def summary(self, values: Mapping[str, float]) -> None:
        self._log([(0, {name: value for name, value in values.items() if self._known.get(_name(name)) != value})])

    def finish(self, verdict: str, files: Mapping[str, bytes]) -> None:
        self._client.set_tag(self._run, "mlflow.note.content", verdict)
        with tempfile.TemporaryDirectory() as folder:
            for name, data in files.items():
                (Path(folder) / name).write_bytes(data)
            self._client.log_artifacts(self._run, folder)
        self._status = "FINISHED"

    def close(self) -> None:
        self._client.set_terminated(self._run, self._status)

    def _experiment(self) -> str:
        name = self.settings.experiment
        found = self._client.get_experiment_by_name(name)
        if found is None:
            from mlflow.exceptions import MlflowException

            try:
                return str(self._client.create_experiment(name))
            except MlflowException:  # another run may have been quicker
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _describe(self, run: Tracked, logged: Mapping[str, str]) -> None:
        """Parameters, which MLflow never changes, and as tags what may change from call to call."""
        from mlflow.entities import Param, RunTag

        settings = {_name(key): str(value) for key, value in flat(run.settings).items()}
        params = [Param(key, value) for key, value in settings.items() if key not in logged]
        tags = [RunTag(_name(k), str(v)) for k, v in {**flat(run.changing), **run.facts}.items()]
        for first in range(0, max(len(params), len(tags)), SETTINGS_AT_ONCE):
            part = slice(first, first + SETTINGS_AT_ONCE)
            self._client.log_batch(self._run, params=params[part], tags=tags[part])

    def _log(self, rows: Sequence[LoggedRow]) -> None:
        """A row is never cut in two, so that a step is there as a whole or not at all."""
        from mlflow.entities import Metric

        now, waiting = int(time.time() * 1000), list[Any]()
        for step, values in rows:
            metrics = [Metric(_name(name), value, now, step) for name, value in values.items()]
            if waiting and len(waiting) + len(metrics) > METRICS_AT_ONCE:
                self._client.log_batch(self._run, waiting)
                waiting = []
            waiting += metrics
        if waiting:
            self._client.log_batch(self._run, waiting)


def _name(key: str) -> str:
    """A name with what MLflow allows in one."""
    return re.sub(r"[^A-Za-z0-9_\-. :/]", "_", key)
