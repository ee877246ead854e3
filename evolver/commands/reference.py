"""Writes the reference page from the code: ``python -m evolver.commands.reference > docs/reference.md``."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from evolver.commands.cli import app
from evolver.commands.words import default_of, first_paragraph, kind_of, remarks_of, searched_of, type_name
from evolver.config import Config
from evolver.config.section import Section
from evolver.loggers import LOGGERS
from evolver.merging.methods import METHODS
from evolver.report.text import markdown_table
from evolver.search import SEARCHES

METHODS_INTRODUCTION = (
    "`searched` is the range that a search may tune. A setting with one number per expert also takes a single number "
    "for all experts. In the descriptions, τ is an expert's task vector (expert − base), w its weight, and λ the "
    "setting `lambda`."
)


def reference_page() -> str:
    """The whole page as Markdown."""
    parts = [
        "# Reference",
        "This page is generated from the code by `make docs`.",
        "## Commands",
        *_commands(),
        "## Configuration",
    ]
    parts += [_section("", Config)]
    parts += [_section(name, kind) for name, kind in _subsections("", Config)]
    parts += ["## Searches", "`search.algorithm` names the search; the other keys of `search` are its settings."]
    for name, algorithm in sorted(SEARCHES.items()):
        parts += [f"### {name}", first_paragraph(algorithm.build), _keys(algorithm.settings)]
    parts += [
        "## Loggers",
        "Write each tracker under its name in `loggers`. `pip install 'evolver[NAME]'` installs what it needs.",
    ]
    for name, logger in sorted(LOGGERS.items()):
        parts += [f"### {name}", first_paragraph(logger.build), _keys(logger.settings)]
    parts += ["## Merge methods", METHODS_INTRODUCTION]
    for name, method in sorted(METHODS.items()):
        rows = [[f"`{s.name}`", kind_of(s), f"`{default_of(s)}`", searched_of(s)] for s in method.settings.values()]
        parts += [f"### {name}", f"{first_paragraph(method.function)} ({method.paper})", *remarks_of(method)]
        parts += [markdown_table(["setting", "value", "default", "searched"], rows)] if rows else ["No settings."]
    return "\n\n".join(parts) + "\n"


def _commands() -> Iterator[str]:
    """Every command with the help of its arguments and options."""
    group: Any = typer.main.get_command(app)
    yield "`evolver COMMAND --help` shows the same. `evolver --install-completion` adds completion to your shell."
    for name, command in sorted(group.commands.items()):
        arguments = [_argument(p) for p in command.params if p.param_type_name == "argument"]
        yield f"### `{' '.join(['evolver', name, *arguments])}`"
        yield " ".join(command.help.split())
        rows = [[f"`{_flags(p)}`", _said(p)] for p in command.params if not getattr(p, "hidden", False)]
        yield markdown_table(["", ""], rows) if rows else "No options."


def _argument(parameter: Any) -> str:
    name = str(parameter.name).upper() + ("…" if parameter.nargs == -1 else "")
    return name if parameter.required else f"[{name}]"


def _flags(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return _argument(parameter)
    return ", ".join([*parameter.opts, *parameter.secondary_opts])


def _said(parameter: Any) -> str:
    """The help of a parameter, with the default appended where the help does not mention it."""
    said, default = str(parameter.help), parameter.default
    shown = default not in (None, False, 0) and "default:" not in said
    return f"{said}; default: {default}" if shown else said


def _section(name: str, kind: type[Section]) -> str:
    title = f"### `{name}`" if name else "### Top level"
    return "\n\n".join([title, first_paragraph(kind), _keys(kind)])


def _keys(kind: type[BaseModel]) -> str:
    rows = [[f"`{n}`", _type(f), _field_default(f), f.description or ""] for n, f in kind.model_fields.items()]
    return markdown_table(["key", "value", "default", "meaning"], rows)


def _subsections(prefix: str, kind: type[BaseModel]) -> Iterator[tuple[str, type[Section]]]:
    for name, field in kind.model_fields.items():
        arguments = typing.get_args(field.annotation)
        inner = arguments[0] if arguments else field.annotation
        if isinstance(inner, type) and issubclass(inner, Section):
            place = f"{prefix}{name}" + ("[]" if arguments else "")
            yield place, inner
            yield from _subsections(f"{place}.", inner)


def _type(field: FieldInfo) -> str:
    return type_name(field.annotation)


def _field_default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    return "" if default is None or isinstance(default, Section) else f"`{default}`"


if __name__ == "__main__":
    print(reference_page(), end="")  # noqa: T201  # this script prints the page
