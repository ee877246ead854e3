"""Reads configurations. Every error is one sentence that names the file, the key and the remedy."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from evolver.config import Config
from evolver.config.loader import Loader, valid_yaml
from evolver.config.mergekit_evolve import Adopted, adopted, is_evolve_file
from evolver.config.presets import blamed, expanded, preset_lines
from evolver.config.recipes import completed, parsed_recipe, recipe_of, with_content
from evolver.config.section import SectionType
from evolver.config.sentences import sentence
from evolver.errors import BadInput, cause_of, refuse_special

# The key by which a mergekit file is known.
MERGEKIT_KEY = "merge_method"


@dataclass(frozen=True)
class ConfigText:
    """The text of a configuration, not parsed yet.

    Attributes:
        text: YAML.
        origin: the file that error messages name: the user's own, or the copy in a run's folder.
    """

    text: str
    origin: str

    def parsed(self) -> Config:
        """The checked configuration.

        Raises BadInput for text that is not YAML, an unknown key (naming the nearest known one), a wrong type or an
        unknown preset.
        """
        return check_config(self.mapping(Config.model_fields), self.origin)

    def contained(self) -> ConfigText:
        """The same configuration with the content of a mergekit file in the place of its path, so that a run does not
        change with the file; of a file of mergekit-evolve, the configuration that it stands for.

        Raises BadInput for text that is not YAML, and for a file that cannot be read.
        """
        raw = self.mapping(Config.model_fields)
        if self._adopted is None and not isinstance(recipe_of(raw.get("search")), str):
            return self
        whole = {**raw, "search": with_content(raw["search"], self.origin)}
        return replace(self, text=yaml.safe_dump(whole, sort_keys=False, allow_unicode=True))

    def preset_lines(self) -> list[str]:
        """What a preset has set in the configuration, for people to read; none where it names no preset."""
        return preset_lines(self.mapping(Config.model_fields), self.origin)

    def sentence(self, error: BadInput) -> str:
        """An error of a key, with the file before it and, where the key is a preset's, a word on that behind it."""
        return f"{self.origin}: {blamed(str(error), self.mapping(Config.model_fields), self.origin)}"

    def mapping(self, keys: Iterable[str]) -> dict[str, Any]:
        """The top-level mapping of the text, unchecked.

        Args:
            keys: the keys that it may have; only the error message uses them.

        Raises BadInput for text that is not YAML or has no mapping at its top level.
        """
        if self._adopted is not None:
            return copy.deepcopy(self._adopted.raw)
        raw = copy.deepcopy(self._raw)
        if not isinstance(raw, dict):
            raise BadInput(f"{self.origin}: the configuration must be a mapping with the keys {', '.join(keys)}.")
        if MERGEKIT_KEY in raw and "search" not in raw:
            raise BadInput(
                f"{self.origin}: this is a mergekit file, which says what is merged, but not on which tasks; merge it "
                "with `evolver merge`, or write a configuration with the key search: {algorithm: cmaes, recipe: FILE}."
            )
        return raw

    @property
    def notes(self) -> tuple[str, ...]:
        """What the configuration of another program says that is done in another way here."""
        return () if self._adopted is None else self._adopted.notes

    @cached_property
    def _raw(self) -> Any:
        with valid_yaml(self.origin):
            return yaml.load(self.text, Loader=Loader)

    @cached_property
    def _adopted(self) -> Adopted | None:
        """The configuration that a file of mergekit-evolve stands for."""
        if not is_evolve_file(self._raw):
            return None
        ours = {k: v for k, v in self._raw.items() if k in Config.model_fields}
        return adopted(parsed_recipe(self.text, self.origin), ours)


def config_at(path: str | Path) -> ConfigText:
    """Read a configuration file without parsing it.

    Raises BadInput for a file that cannot be read.
    """
    try:
        refuse_special(path)
        return ConfigText(Path(path).read_text(), str(path))
    except (OSError, ValueError) as error:  # a path with a zero in it is a ValueError
        raise BadInput(
            f"{str(path)[:200]}: the configuration cannot be read ({cause_of(error)}); give the path of a YAML file."
        ) from error


def load(path: str | Path) -> Config:
    """Read and check a configuration file.

    Raises BadInput for a file that cannot be read, an unknown key (naming the nearest known one) or a wrong type.
    """
    return config_at(path).parsed()


def check_config(raw: Mapping[str, Any], file: str) -> Config:
    """Check the mapping of a whole configuration, with what its preset sets and what follows from the mergekit file of
    its search, and return it as a typed section.

    Raises BadInput as ``ConfigText.parsed`` does.
    """
    return check_section(Config, completed(expanded(raw, file), file), file)


def check_section(kind: type[SectionType], raw: Mapping[str, Any], file: str, prefix: str = "") -> SectionType:
    """Check the mapping ``raw`` and return it as a typed section.

    Args:
        kind: the class of the section.
        file: name of the file, for error messages.
        prefix: dotted key of the section in the file, such as ``search.``, for error messages.

    Raises BadInput for the first error found, naming file, key and remedy.
    """
    try:
        return kind.model_validate(dict(raw))
    except ValidationError as error:
        # A misspelt key causes two errors, as the right key is missing: the unknown key comes first. Where a value may
        # have one of several types, pydantic reports an error for each; the one deepest inside the value says most.
        first = min(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", -len(e["loc"])))
        raise BadInput(f"{file}: {sentence(kind, first, prefix)}") from None
