"""The messages between driver and workers: candidates and results as compressed JSON.

A message has a few kilobytes, whatever the size of the model, because it holds scores and those nodes of a recipe that
its receiver does not know yet (see ``evolver.workers.telling``), but no weights.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

from evolver.records import Candidate, Question, Result, as_answers
from evolver.records.graph import NodeTable, text_id, texts_of
from evolver.records.loss import Adversary, UnlabelledLoss


def pack_candidate(candidate: Candidate, nodes: Iterable[str] | None = None) -> bytes:
    """A candidate as bytes.

    Args:
        nodes: the nodes of its recipe that the receiver does not know, as texts. None: all nodes; the receiver then
            lets those go that came before.
    """
    sent = list(texts_of(candidate.recipe).values() if nodes is None else nodes)
    recipe = {"id": candidate.recipe.id, "nodes": sent, "whole": nodes is None}
    return _pack({**vars(candidate), "recipe": recipe, "question": asdict(candidate.question)})


def unpack_candidate(data: bytes, nodes: NodeTable | None = None) -> Candidate:
    """The inverse of ``pack_candidate``.

    Args:
        nodes: those that came with earlier messages, to which those of this message are added.

    Raises UnknownNode where nodes of its recipe are missing.
    """
    fields, nodes = _unpack(data), NodeTable() if nodes is None else nodes
    asked: dict[str, Any] = {k: as_answers(v) if isinstance(v, list) else v for k, v in fields["question"].items()}
    if asked["loss"] is not None:
        against = asked["loss"]["adversary"]
        asked["loss"] = UnlabelledLoss(**{**asked["loss"], "adversary": against and Adversary(**against)})
    sent = fields["recipe"]
    if sent["whole"]:
        nodes.clear()
    nodes.add((text_id(text), text) for text in sent["nodes"])
    decoded = {"recipe": nodes.recipe(sent["id"]), "question": Question(**asked)}
    return Candidate(**{**fields, **decoded, "parents": tuple(fields["parents"])})


def pack_result(result: Result) -> bytes:
    """A result as bytes."""
    return _pack(asdict(result))


def unpack_result(data: bytes) -> Result:
    """The inverse of ``pack_result``."""
    result = Result(**_unpack(data))
    more: dict[str, Any] = {name: tuple(getattr(result, name)) for name in ("said", "probabilities", "gradient")}
    return replace(result, items=as_answers(result.items), **more)


def _pack(fields: dict[str, Any]) -> bytes:
    return zlib.compress(json.dumps(fields, separators=(",", ":")).encode())


def _unpack(data: bytes) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads(zlib.decompress(data))
    return fields
