"""Reads the rows of a data set from a local file or with the ``datasets`` library."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet

from evolver.config.evaluation import DataSet
from evolver.errors import BadInput, cause_of, refuse_special
from evolver.storage.paths import expand

Row = dict[str, Any]
# A passage of a text file ends with the paragraph in which it reaches this many characters.
PASSAGE = 1500


def read_rows(data: str | DataSet, key: str) -> list[Row]:
    """All rows of a data set, each a mapping from columns to values.

    Args:
        data: a JSON, JSONL, CSV, TSV, Parquet or text file, or a data set of the ``datasets`` library.
        key: the key of the configuration that errors name.

    Raises BadInput where the data cannot be read, or a row is no mapping.
    """
    if isinstance(data, DataSet):
        return _of_library(data, key)
    path = Path(expand(data))
    if path.suffix not in FORMATS:
        raise BadInput(f"{key}: {path} has no known extension; give a file of {', '.join(FORMATS)}, or path and split.")
    try:
        refuse_special(path)
        rows = FORMATS[path.suffix](path)
    except (OSError, ValueError, RecursionError, csv.Error, pyarrow.ArrowException) as error:
        raise BadInput(
            f"{key}: {path} cannot be read ({cause_of(error)}); give a {path.suffix[1:].upper()} file."
        ) from error
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise BadInput(f"{key}: row {number} of {path} is not a mapping; write one JSON object on each line.")
    return rows


def _of_library(data: DataSet, key: str) -> list[Row]:
    try:
        return list(_undecoded(_loaded(data)))
    except Exception as error:  # the library raises many classes, for folders, the hub and the network
        reason = " ".join(str(error).split())[:200]
        raise BadInput(
            f"{key}: the data set {data.path!r} cannot be loaded ({type(error).__name__}: {reason}); "
            "check path, name and split, and for a data set of the hub also the network."
        ) from error


def _loaded(data: DataSet) -> Any:
    import datasets  # takes seconds to import, and files do not need it

    path = Path(expand(data.path))
    if (path / "dataset_dict.json").exists():  # several splits, saved with save_to_disk
        return datasets.load_from_disk(str(path))[data.split]
    if (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    return datasets.load_dataset(expand(data.path), data.name, split=data.split)


def _undecoded(found: Any) -> Any:
    """The data set with images and sounds as encoded files, because the bytes of a file are the same on every machine
    and decoded ones need not be.
    """
    for name, feature in found.features.items():
        if getattr(feature, "decode", False):
            found = found.cast_column(name, replace(feature, decode=False))
    return found


def _jsonl(path: Path) -> list[Row]:
    return _lines(path.read_text(encoding="utf-8"))


def _json(path: Path) -> list[Row]:
    """The rows of a file that holds one array of all rows, or one row on each line."""
    text = path.read_text(encoding="utf-8")
    rows: list[Row] = json.loads(text) if text.lstrip().startswith("[") else _lines(text)
    return rows


def _lines(text: str) -> list[Row]:
    return [json.loads(line) for line in text.splitlines() if line.strip()]


def _separated(separator: str) -> Callable[[Path], list[Row]]:
    def read(path: Path) -> list[Row]:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file, delimiter=separator, strict=True))

    return read


def _parquet(path: Path) -> list[Row]:
    rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
    return rows


def _text(path: Path) -> list[Row]:
    """The passages of a text: whole paragraphs, together of at least PASSAGE characters, except for the last one."""
    found: list[list[str]] = [[]]
    size = 0
    for paragraph in re.split(r"\n\s*\n", path.read_text(encoding="utf-8")):
        if size >= PASSAGE:
            found.append([])
            size = 0
        if paragraph.strip():
            found[-1].append(paragraph.strip("\n"))
            size += len(paragraph)
    return [{"text": "\n\n".join(passage)} for passage in found if passage]


FORMATS: dict[str, Callable[[Path], list[Row]]] = {
    ".jsonl": _jsonl, ".json": _json, ".csv": _separated(","), ".tsv": _separated("\t"), ".parquet": _parquet,
    ".txt": _text,
}  # fmt: skip
