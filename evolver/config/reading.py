"""Reads configurations. Every error is one sentence that names the file, the key and the remedy."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from evolver.config import Config
from evolver.config.presets import blamed, expanded, preset_lines
from evolver.config.section import SectionType
from evolver.config.sentences import sentence
from evolver.errors import BadInput, cause_of, refuse_special


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
        with valid_yaml(self.origin):
            raw = yaml.load(self.text, Loader=Loader)
        if not isinstance(raw, dict):
            raise BadInput(f"{self.origin}: the configuration must be a mapping with the keys {', '.join(keys)}.")
        return raw


@contextlib.contextmanager
def valid_yaml(origin: str) -> Iterator[None]:
    """While YAML is parsed: raises BadInput that names ``origin`` for what is no YAML, or is nested too deeply."""
    try:
        yield
    except RecursionError:
        raise BadInput(f"{origin}: its lists and mappings are nested too deeply; correct the file.") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # a date of month 13 is a ValueError, {[]: 1} a TypeError
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"{origin}: the file is not valid YAML ({reason}); correct it there.") from error


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
    """Check the mapping of a whole configuration, with what its preset sets, and return it as a typed section.

    Raises BadInput as ``ConfigText.parsed`` does.
    """
    return check_section(Config, expanded(raw, file), file)


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


class Loader(yaml.SafeLoader):
    """A YAML loader that refuses a mapping with the same key twice. PyYAML itself would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value if not k.tag.endswith(":merge")]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.2 reads 1e-9 as a number; PyYAML wants a dot in it.
Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+\Z"), list("-+0123456789"))
