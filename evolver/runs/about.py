"""What a run's folder says of the run itself, so that it can be read back without its models and data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

import yaml

from evolver.config import Config, Loader, check_section, computing
from evolver.errors import BadInput
from evolver.evaluation.scores.scoring import Scale
from evolver.records import Split
from evolver.runs.folder import file_of_run
from evolver.storage import Storage

ABOUT_FILE = "about.json"


@dataclass(frozen=True)
class Job:
    """The Ray job that drives a run.

    Attributes:
        id: its submission id.
        address: of the cluster, as the job's driver knows it.
        location: of the run's folder, as the job's driver knows it.
    """

    id: str
    address: str
    location: str = ""


@dataclass(frozen=True)
class About:
    """A run, but for its ledger.

    Attributes:
        config: as it was called last, with the dtype of forward passes that was chosen.
        scales: how items make up scores, of both splits.
        versions: of the packages that were used.
        warnings: what was said before the run began.
        job: the Ray job that called it last; None: it was called as a process.
    """

    config: Config
    scales: Mapping[Split, Scale]
    versions: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    job: Job | None = None


def write_about(folder: Storage, about: About) -> None:
    """Write it into a run's folder; the configuration is there already."""
    form = {
        "compute": about.config.model.compute,
        "versions": dict(about.versions),
        "warnings": list(about.warnings),
        "scales": {split: scale.form() for split, scale in about.scales.items()},
        "job": asdict(about.job) if about.job else None,
    }
    folder.write(ABOUT_FILE, json.dumps(form).encode())


def read_about(folder: Storage) -> About:
    """The inverse of ``write_about``.

    Raises BadInput where the folder is none of a run.
    """
    raw, text = yaml.load(file_of_run(folder, "config.yaml"), Loader=Loader), file_of_run(folder, ABOUT_FILE)
    try:
        form = json.loads(text)
        scales: dict[Split, Scale] = {split: Scale.from_form(scale) for split, scale in form["scales"].items()}
        job = Job(**form["job"]) if form.get("job") else None
        versions, warnings, compute = form["versions"], tuple(form["warnings"]), form["compute"]
    except (ValueError, KeyError, TypeError) as error:
        raise BadInput(f"{folder.location}/{ABOUT_FILE}: cannot be read ({error!r}); call the run again.") from error
    config = check_section(Config, raw, f"{folder.location}/config.yaml")
    name = folder.location.rstrip("/").rpartition("/")[2]  # a run may have been called by another name than its file's
    config = config.model_copy(update={"run": name})
    return About(computing(config, compute), scales, versions, warnings, job)


def runs_in(root: Storage) -> list[str]:
    """Names of the runs in a folder of all runs."""
    return [name for name in root.names() if root.folder(name).exists(ABOUT_FILE)]
