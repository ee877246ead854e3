"""Reading the files of a run's folder. If a file is damaged, the error is one sentence that names it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evolver.errors import BadInput, cause_of, refuse_special
from evolver.records.recipe import Recipe, load_recipe
from evolver.storage import Storage

# The files by which a folder is known as that of a run.
RUN_FILE, ABOUT_FILE, IDENTITY_FILE = "config.yaml", "about.json", "identity.json"
SUMMARY_FILE, AGREEMENT_FILE, RECIPE_FILE = "summary.json", "best.json", "recipe.json"
ENDED_FILE, CLOCK_FILE = "ended.json", "clock.json"
CONFIG_REMEDY = "copy the configuration that you ran to this place, or run that configuration again"


def text_of(folder: Storage, name: str, remedy: str) -> str:
    """A text file of a folder; ``remedy`` is what to do where it cannot be read, as the end of a sentence.

    Raises FileNotFoundError or NotADirectoryError where there is none, and BadInput where it cannot be read.
    """
    try:
        return folder.read(name).decode()
    except (FileNotFoundError, NotADirectoryError):
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(folder, name, error, remedy) from error


def mapping_of(folder: Storage, name: str, remedy: str) -> dict[str, Any]:
    """A JSON file of a folder that holds a mapping.

    Raises FileNotFoundError or NotADirectoryError where there is none, and BadInput where it cannot be read or holds
    something else.
    """
    try:
        found = json.loads(text_of(folder, name, remedy))
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{folder.location}/{name}: it is not valid JSON ({cause_of(error)}); {remedy}.") from error
    if not isinstance(found, dict):
        raise BadInput(f"{folder.location}/{name}: it is not a mapping of names to values; {remedy}.")
    return found


def unreadable(folder: Storage, name: str, error: Exception, remedy: str) -> BadInput:
    """The error for a file that cannot be read."""
    return BadInput(f"{folder.location}/{name}: it cannot be read ({cause_of(error)}); {remedy}.")


def read_recipe(file: Path, remedy: str) -> Recipe:
    """The model that a recipe.json describes; ``remedy`` is what to do where it cannot be read.

    Raises BadInput where it cannot be read.
    """
    try:
        refuse_special(file)
        return load_recipe(file.read_text())
    except (OSError, ValueError) as error:
        raise BadInput(f"{file} cannot be read as a recipe ({cause_of(error)}); {remedy}.") from error


def holds_a_run(folder: Storage) -> bool:
    """Whether a folder is that of a run, readable or not."""
    try:
        return not {ABOUT_FILE, IDENTITY_FILE}.isdisjoint(folder.names())
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:  # the folder may not be read, so it may be that of a run
        return True


def no_run(folder: Storage) -> BadInput:
    """The error for a folder in which there is no run."""
    return BadInput(
        f"{folder.location}: there is no run in this folder; give the folder of a run, such as results/demo."
    )


def summary_of(folder: Storage) -> tuple[dict[str, Any], str]:
    """What a run's report says for programs, and its verdict; where it cannot be read, why."""
    try:
        found = mapping_of(folder, SUMMARY_FILE, "evolver report writes it again")
    except (FileNotFoundError, NotADirectoryError):
        return {}, ""
    except BadInput as error:
        return {}, str(error)
    return found, str(found.get("verdict", ""))


def agreement_of(folder: Storage) -> dict[str, int] | None:
    """The check of the exported winner: of ``items`` answers, ``equal`` were as in the ledger. None before the check.

    Raises BadInput where that cannot be read.
    """
    remedy = "run the configuration again, which checks the best model again"
    try:
        found = mapping_of(folder, AGREEMENT_FILE, remedy)
    except (FileNotFoundError, NotADirectoryError):
        return None
    if not all(isinstance(found.get(key), int) for key in ("items", "equal")):
        raise BadInput(f"{folder.location}/{AGREEMENT_FILE}: a number of items is missing; {remedy}.")
    return {key: found[key] for key in ("items", "equal")}
