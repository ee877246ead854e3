"""The file ``about.json`` of a run: what readers need to know about the run without its models and data."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from evolver.config import Config
from evolver.config.changes import computing
from evolver.errors import BadInput, cause_of
from evolver.evaluation.overlap import Overlap
from evolver.evaluation.scores.scoring import Scale
from evolver.records import SPLITS, Split
from evolver.records.canonical import content_hash
from evolver.records.objective import Objective
from evolver.runs.ended import Ended, read_ended
from evolver.runs.files import ABOUT_FILE, CONFIG_REMEDY, IDENTITY_FILE, RUN_FILE, holds_a_run, mapping_of, no_run
from evolver.runs.folder import config_of_run
from evolver.storage import Storage
from evolver.storage.paths import last_part

ABOUT_REMEDY = "run the configuration again, which writes this file again"


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
    """All facts about a run that are not in its ledger.

    Attributes:
        config: the one with which the run was started last, with the dtype of forward passes that was chosen.
        scales: how items make up scores, of each split; a run without select items has none for them.
        versions: of the packages that were used.
        warnings: the warnings that were printed before the run began.
        job: the Ray job that drove it last; None: a process drove it.
        owner: the name of the run's identity.
        overlap: how many items each expert was trained on, for the experts of which that is known.
        objectives: those of the run; none where it has the score alone.
        ended: why the search has ended within the configuration's budget, where that is recorded.
    """

    config: Config
    scales: Mapping[Split, Scale]
    versions: Mapping[str, str]
    warnings: tuple[str, ...] = ()
    job: Job | None = None
    owner: str | None = None
    overlap: Mapping[str, Overlap] = field(default_factory=dict)
    ended: Ended | None = None
    objectives: tuple[Objective, ...] = ()


def write_about(folder: Storage, about: About) -> None:
    """Write it into a run's folder; the configuration is there already."""
    form = {
        "compute": about.config.model.compute,
        "versions": dict(about.versions),
        "warnings": list(about.warnings),
        "scales": {split: scale.form() for split, scale in about.scales.items()},
        "job": asdict(about.job) if about.job else None,
        "owner": about.owner,
        "overlap": {name: found.form() for name, found in about.overlap.items()},
        "objectives": {objective.name: dict(objective.shares) for objective in about.objectives},
    }
    folder.write(ABOUT_FILE, json.dumps(form).encode())


def read_about(folder: Storage) -> About:
    """The inverse of ``write_about``.

    Raises BadInput if the folder is not that of a run, or if one of its files cannot be read.
    """
    config = config_of_run(folder).parsed()
    try:
        form = mapping_of(folder, ABOUT_FILE, ABOUT_REMEDY)
    except (FileNotFoundError, NotADirectoryError):
        raise no_run(folder) from None
    try:
        found = form["scales"]
        scales: dict[Split, Scale] = {s: Scale.from_form(found[s]) for s in SPLITS if s != "select" or s in found}
        job = Job(**form["job"]) if form.get("job") else None
        overlap = {name: Overlap.from_form(found) for name, found in form.get("overlap", {}).items()}
        objectives = tuple(Objective(n, dict(s)) for n, s in (form.get("objectives") or {}).items())
        versions, warnings, compute = dict(form["versions"]), tuple(form["warnings"]), str(form["compute"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BadInput(
            f"{folder.location}/{ABOUT_FILE}: a value in it is missing or not readable ({error!r}); {ABOUT_REMEDY}."
        ) from error
    _refuse_files_of_another_run(folder, config, form)
    name = last_part(folder.location)  # a run may have been called by another name than its file's
    config = config.model_copy(update={"run": name})
    ended = read_ended(folder, config.budget)
    return About(
        computing(config, compute), scales, versions, warnings, job, form.get("owner"), overlap, ended, objectives
    )


def runs_in(root: Storage) -> list[str]:
    """Names of the runs in a folder of all runs."""
    try:
        names = root.names()
    except OSError as error:
        raise BadInput(
            f"{root.location[:200]}: the folder cannot be read ({cause_of(error)}); give a folder that holds runs, "
            "such as results."
        ) from error
    return [name for name in names if holds_a_run(root.folder(name))]


def _refuse_files_of_another_run(folder: Storage, config: Config, form: Mapping[str, Any]) -> None:
    """Raises BadInput if a file was copied from the folder of another run. If the identity is missing or cannot be
    read, nothing is refused here; continuing the run reports that.
    """
    try:
        identity = mapping_of(folder, IDENTITY_FILE, "")
    except (OSError, BadInput):
        return
    if form.get("owner") not in (None, content_hash(identity)):
        raise BadInput(
            f"{folder.location}/{ABOUT_FILE}: it does not belong to the same run as {IDENTITY_FILE} in the same "
            f"folder; {ABOUT_REMEDY}."
        )
    facts = {"seed": config.seed, "experts": set(config.experts), "search": config.search["algorithm"]}
    experts, search = identity.get("experts"), identity.get("search")
    found = {
        "seed": identity.get("seed"),
        "experts": set(experts) if isinstance(experts, dict) else None,
        "search": search.get("algorithm") if isinstance(search, dict) else None,
    }
    for key, value in facts.items():
        if found[key] not in (None, value):
            raise BadInput(
                f"{folder.location}/{RUN_FILE}: its {key} differs from the one in {IDENTITY_FILE} in the same folder, "
                f"so the file is from another run; {CONFIG_REMEDY}."
            )
