"""What trackers show of a run, read as they read it themselves."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Points = list[tuple[int, float]]


def tensorboard_events(folder: Path) -> Any:
    """All that TensorBoard finds in a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return events


def tensorboard_points(folder: Path, tag: str) -> Points:
    """Step and value of every point of a curve."""
    events = tensorboard_events(folder)
    return [(e.step, e.value) for e in events.Scalars(tag)] if tag in events.Tags()["scalars"] else []


def mlflow_run(uri: str, experiment: str) -> tuple[Any, Any]:
    """The client, and the one run of an experiment."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name(experiment).experiment_id])
    return client, run


def mlflow_points(uri: str, experiment: str, key: str) -> Points:
    """Step and value of every point of a curve."""
    client, run = mlflow_run(uri, experiment)
    return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, key))


def wandb_records(file: Path) -> Iterator[Any]:
    """What stands in an offline run of W&B: records, whole or in pieces, in the blocks of a LevelDB log."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, whole = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        if at + 7 + size > len(data):
            return  # it is being written
        whole += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):
            yield Record.FromString(whole)
            whole = b""


def wandb_history(file: Path) -> list[dict[str, Any]]:
    """The rows of an offline run's curves."""
    items = (r.history.item for r in wandb_records(file) if r.WhichOneof("record_type") == "history")
    return [{(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in row} for row in items]


def wandb_points(folder: Path, key: str) -> Points:
    """Step and value of every point of a curve, of the one offline run in a folder."""
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    until = time.monotonic() + 60
    while not any(r.WhichOneof("record_type") == "exit" for r in wandb_records(file)):
        assert time.monotonic() < until, "W&B's own process, which writes the file, has not ended the run"
        time.sleep(0.1)
    return [(row["_step"], row[key]) for row in wandb_history(file) if key in row]
