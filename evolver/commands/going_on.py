"""The commands ``evolver retarget`` and ``evolver fork``: a finished search, used again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

GO_ON_RESULTS = "folder for the new run's folder, or its URI; default: the one that holds the earlier run"
GO_ON_NAME = "name of the new run; default: the name in the configuration"
FreshReport = Annotated[
    bool, typer.Option("--fresh-report", help="draw report items that no run going back to the same search has used")
]


def retarget(
    folder: Annotated[str, typer.Argument(help="the folder of a run, or its URI")],
    config: Annotated[Path, typer.Argument(help="the YAML file of the new run")],
    candidates: Annotated[int | None, typer.Option(min=1, help="also search on, for so many candidates")] = None,
    results: Annotated[str | None, typer.Option(help=GO_ON_RESULTS)] = None,
    name: Annotated[str | None, typer.Option("--run", help=GO_ON_NAME)] = None,
    fresh_report: FreshReport = False,
    score_new_tasks: Annotated[
        bool, typer.Option("--score-new-tasks", help="score all candidates on tasks that the run did not have")
    ] = False,
) -> None:
    """Judge the candidates of a run by another goal, such as other weights of its tasks, without scoring them again.

    The new configuration has the same models, seed and items. A model that comes to the finals newly is scored there.
    """
    raise typer.Exit(_go_on(folder, config, results, name, ("retarget", candidates, fresh_report, score_new_tasks)))


def fork(
    folder: Annotated[str, typer.Argument(help="the folder of a run, or its URI")],
    config: Annotated[Path, typer.Argument(help="the YAML file of the new run, with other settings of the search")],
    candidates: Annotated[
        int | None, typer.Option(min=1, help="number of new candidates; default: the budget of the configuration")
    ] = None,
    results: Annotated[str | None, typer.Option(help=GO_ON_RESULTS)] = None,
    name: Annotated[str | None, typer.Option("--run", help=GO_ON_NAME)] = None,
    fresh_report: FreshReport = False,
) -> None:
    """Search on from the candidates of a run with other settings of the search, in a run of its own."""
    raise typer.Exit(_go_on(folder, config, results, name, ("fork", candidates, fresh_report, False)))


def _go_on(
    folder: str, config: Path, results: str | None, name: str | None, wish: tuple[str, int | None, bool, bool]
) -> int:
    """Make a run that goes on from an earlier one, carry it out, and return the exit status; ``wish`` holds the values
    of a ``Wish``.
    """
    from evolver.config.reading import config_at
    from evolver.driver.early import refuse_early
    from evolver.storage import storage_at

    given = config_at(config)
    refuse_early(given)
    from cluster.job import device_of, drive  # it brings torch
    from evolver.driver.again import Wish, go_on

    place = results or folder.rstrip("/").rpartition("/")[0] or "."
    device, name = device_of(given.parsed(), given.origin), name or given.parsed().run
    made = go_on(storage_at(folder), given, storage_at(place), name, Wish(*wish), device)
    return drive(made, place, name)
