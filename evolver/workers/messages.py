"""The messages between driver and workers: candidates and results as compressed JSON.

A message has a few kilobytes, whatever the size of the model, because it holds a recipe and scores but no weights.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import asdict, replace
from typing import Any

from evolver.records import Candidate, Question, Result, as_answers
from evolver.records.recipe import dump_recipe, load_recipe


def pack_candidate(candidate: Candidate) -> bytes:
    """A candidate with its recipe as bytes."""
    fields = {**vars(candidate), "recipe": dump_recipe(candidate.recipe), "question": vars(candidate.question)}
    return _pack(fields)


def unpack_candidate(data: bytes) -> Candidate:
    """The inverse of ``pack_candidate``."""
    fields = _unpack(data)
    asked: dict[str, Any] = {k: as_answers(v) if isinstance(v, list) else v for k, v in fields["question"].items()}
    decoded = {"recipe": load_recipe(fields["recipe"]), "question": Question(**asked)}
    return Candidate(**{**fields, **decoded, "parents": tuple(fields["parents"])})


def pack_result(result: Result) -> bytes:
    """A result as bytes."""
    return _pack(asdict(result))


def unpack_result(data: bytes) -> Result:
    """The inverse of ``pack_result``."""
    result = Result(**_unpack(data))
    more: dict[str, Any] = {"said": tuple(result.said), "probabilities": tuple(result.probabilities)}
    return replace(result, items=as_answers(result.items), **more)


def _pack(fields: dict[str, Any]) -> bytes:
    return zlib.compress(json.dumps(fields, separators=(",", ":")).encode())


def _unpack(data: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(zlib.decompress(data))
    return fields
