"""What can be refused of a configuration before torch is imported, which takes longer than all of this together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evolver.checkpoints.places import refuse_missing_parts
from evolver.config import Config
from evolver.config.reading import ConfigText, check_section
from evolver.errors import BadInput, nearest
from evolver.loggers import check_loggers
from evolver.search import SEARCHES
from evolver.search.programs.layers import LayersSettings


def refuse_early(given: ConfigText) -> None:
    """Check the keys of a configuration, its search and its loggers, and whether its models can be where it says.

    ``prepare`` checks the same again, with everything that has to be opened for it.

    Raises BadInput, one sentence with file, key and remedy.
    """
    config, file = given.parsed(), given.origin
    chosen_search(config, file)
    check_loggers(config, file)
    try:
        for key, location in {"model.base": config.model.base, **_keyed(config.experts)}.items():
            refuse_missing_parts(location, key)
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error


def chosen_search(config: Config, file: str) -> tuple[str, Any]:
    """The name of the search and its settings, with those of the searches inside of it filled in.

    Raises BadInput for an unknown search and for settings that it does not have.
    """
    return _filled(config.search, file, "search.")


def _filled(section: Mapping[str, Any], file: str, prefix: str) -> tuple[str, Any]:
    name, settings = named_search(section, file, prefix)
    if key := SEARCHES[name].inside:
        _, inside = _filled(getattr(settings, key), file, f"{prefix}{key}.")
        settings = settings.model_copy(update={key: inside.model_dump()})
    return name, settings


def named_search(section: Mapping[str, Any], file: str, prefix: str) -> tuple[str, Any]:
    """The name and the settings of the search that a section names.

    Raises BadInput that names the file and the key, which begins with ``prefix``.
    """
    name = section.get("algorithm")
    if not isinstance(name, str) or name not in SEARCHES:
        raise BadInput(f"{file}: {prefix}algorithm: unknown search {name!r}; {nearest(name, SEARCHES)}")
    return name, check_section(SEARCHES[name].settings, section, file, prefix)


def innermost(name: str, settings: Any, file: str) -> tuple[str, Any]:
    """The name and the settings of the search whose candidates are merges: the search itself, or one inside of it. A
    search of layer programs is no merge, whatever chooses its values.
    """
    prefix = "search."
    while (key := SEARCHES[name].inside) and not isinstance(settings, LayersSettings):
        prefix = f"{prefix}{key}."
        name, settings = named_search(getattr(settings, key), file, prefix)
    return name, settings


def _keyed(experts: Mapping[str, str]) -> dict[str, str]:
    return {f"experts.{name}": location for name, location in experts.items()}
