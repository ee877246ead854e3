"""The card of an exported model: where it comes from, what it scored, and under which licences its parents are."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from evolver.outcome import Outcome
from evolver.report import table_of, verdict


def model_card(outcome: Outcome, rebuild: str, licences: Mapping[str, str | None]) -> str:
    """The README of the exported model, with front matter as the hub reads it.

    Args:
        rebuild: how mergekit makes it, or why it does not.
        licences: of the base and the experts by their locations, as their own cards say; None where they do not.
    """
    config = outcome.config
    parents = [config.model.base, *config.experts.values()]
    front: dict[str, Any] = {"base_model": parents, "base_model_relation": "merge", "library_name": "transformers"}
    known = {licences.get(parent) for parent in parents}
    if len(known) == 1 and (one := known.pop()):
        front["license"] = one
    front |= {"tags": ["merge", "evolver"], "model-index": [{"name": config.run, "results": _results(outcome)}]}
    lines = [f"- {name}: `{location}`{_under(licences.get(location))}" for name, location in _parents(outcome)]
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}
---
# {config.run}

A merge of fine-tunes of one base, found by Evolver ({config.search["algorithm"]}) without training.

{verdict(outcome)}

{table_of(outcome)}

Merged models

{chr(10).join(lines)}

The licences of all parents apply. The exact recipe is in `recipe.json`; weights are rebuilt from it bit for bit.
{rebuild}
"""


def licence_of(folder: Path) -> str | None:
    """What the card in a model's folder says that its licence is."""
    try:
        text = (folder / "README.md").read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, UnicodeDecodeError, IndexError, yaml.YAMLError):
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None


def _results(outcome: Outcome) -> list[dict[str, Any]]:
    """The winner's metrics on the report items, in the hub's form."""
    scale, found = outcome.scales["report"], outcome.winner.report.tasks
    kind = {"causal-lm": "text-generation", "seq2seq": "text2text-generation"}.get(outcome.config.model.kind)
    if kind is None:
        kind = "image-classification" if outcome.config.model.kind == "image-classifier" else "text-classification"
    return [
        {
            "task": {"type": kind},
            "dataset": {"name": f"{task}, {scale.tasks.count(task)} report items", "type": task},
            "metrics": [{"type": scale.metrics[task].name, "value": -v if scale.metrics[task].negative else v}],
        }
        for task, v in found.items()
    ]


def _parents(outcome: Outcome) -> list[tuple[str, str]]:
    config = outcome.config
    return [("base", config.model.base), *config.experts.items()]


def _under(licence: str | None) -> str:
    return f", {licence}" if licence else ""
