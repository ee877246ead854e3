"""The loader of all YAML files that a user writes."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import yaml

from evolver.errors import BadInput

# A question mark and nothing else up to the end of the line, or of the value in a list or mapping in brackets.
LONE_MARK = re.compile(r"\?[ \t]*($|[\r\n\0,\]}]|[ \t]#)")
# So many characters after a question mark are looked at.
MARGIN = 80


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


class Loader(yaml.SafeLoader):
    """A YAML loader that refuses a mapping with the same key twice, where PyYAML would silently keep the last one.

    A question mark that stands alone is a text, as in ``weight: ?``. In YAML it would begin a key of several lines,
    which no file of ours has.
    """

    def fetch_key(self) -> None:
        if not LONE_MARK.match(self.prefix(MARGIN)):
            super().fetch_key()
            return
        self.save_possible_simple_key()
        self.allow_simple_key = False
        start = self.get_mark()
        self.forward()
        self.tokens.append(yaml.ScalarToken("?", True, start, self.get_mark()))

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value if not k.tag.endswith(":merge")]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


# YAML 1.2 reads 1e-9 as a number; PyYAML wants a dot in it.
Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+\Z"), list("-+0123456789"))
