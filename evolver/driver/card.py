"""The card of an exported model: where it comes from, what it scored, and under which licences its parents are."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from evolver.checkpoints.adapted import model_below, seen_through
from evolver.checkpoints.adapter import Adapter
from evolver.checkpoints.chat import EXPERT
from evolver.config import Config
from evolver.driver.prepare import Prepared
from evolver.merging import mergekit
from evolver.merging.alignment.realigned import Realigned
from evolver.records import Candidate, Result, Split
from evolver.records.recipe import Recipe
from evolver.report.report import table_of
from evolver.report.text import as_served, score_text
from evolver.report.verdict import verdict
from evolver.runs.about import About
from evolver.runs.outcome import Outcome
from evolver.storage.paths import expand
from evolver.storage.references import parts_of

# What the hub calls the tasks of our kinds of models.
HUB_TASKS = {
    "causal-lm": "text-generation", "seq2seq": "text2text-generation", "classifier": "text-classification",
    "token-classifier": "token-classification", "image-classifier": "image-classification",
}  # fmt: skip
# The mergekit file in which a run has searched, with the values that were found.
FOUND_FILE = "recipe.yaml"
Licences = Mapping[str, str | None]


def model_card(outcome: Outcome, rebuild: str, licences: Licences) -> str:
    """The README of the exported winner, with front matter as the hub reads it.

    Args:
        rebuild: how mergekit makes it, or why it does not.
        licences: of the base and the experts by their locations, as their own cards say; None where they do not.
    """
    results = _results(outcome.about, "report", outcome.recommended.report)
    return _card(outcome.config, results, f"{verdict(outcome)}\n\n{table_of(outcome)}", rebuild, licences)


def candidate_card(about: About, candidate: Candidate, result: Result, rebuild: str, licences: Licences) -> str:
    """The README of another candidate, which has dev results only; arguments as for ``model_card``."""
    scale = about.scales["dev"]
    said = (
        f"Candidate {candidate.number} of a run, scored on {len(result.items)} of {len(scale.tasks)} dev items, on "
        f"which the run selected: {score_text(result.score, scale)}. It was not scored on other items, so nothing "
        "is said here of whether it is better than its parents."
    )
    return _card(about.config, _results(about, "dev", result), said, rebuild, licences)


def _card(config: Config, results: list[dict[str, Any]], said: str, rebuild: str, licences: Licences) -> str:
    parents = _parents(config)
    front: dict[str, Any] = {"base_model": parents, "base_model_relation": "merge", "library_name": "transformers"}
    known = {licences.get(parent) for parent in parents}
    if len(known) == 1 and (one := known.pop()):
        front["license"] = one
    front |= {"tags": ["merge", "evolver"], "model-index": [{"name": config.run, "results": results}]}
    named = [("base", config.model.base), *config.experts.items()]
    served = as_served(config.evaluation)
    unlike = f"\n\n{served} The weights here are not quantised." if served else ""
    lines = [
        f"- {name}: `{location}`{''.join(_under(licences.get(part)) for part in parts_of(location) if part)}"
        for name, location in named
    ]
    return f"""---
{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}
---
# {config.run}

A merge of fine-tunes of one base, found by Evolver ({config.search["algorithm"]}) without training.

{said}{unlike}

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


def _results(about: About, split: Split, result: Result) -> list[dict[str, Any]]:
    """A result's metrics, in the hub's form."""
    scale, kind = about.scales[split].reordered(result.order), HUB_TASKS[about.config.model.kind]
    return [
        {
            "task": {"type": kind},
            "dataset": {"name": f"{task}, {scale.tasks[: len(result.items)].count(task)} {split} items", "type": task},
            "metrics": [{"type": scale.metrics[task].name, "value": -v if scale.metrics[task].negative else v}],
        }
        for task, v in result.tasks.items()
    ]


def _parents(config: Config) -> list[str]:
    """The models and adapters that a merge is made of, each once."""
    named = (config.model.base, *config.experts.values())
    return list(dict.fromkeys(part for location in named for part in parts_of(location) if part))


def _under(licence: str | None) -> str:
    return f", {licence}" if licence else ""


def companion_files(prepared: Prepared, outcome: Outcome) -> dict[str, str]:
    """The card of the best model and, where mergekit can make it, mergekit's configuration."""
    rebuild, files = _made_again(prepared, outcome.recommended.recipe)
    return {"README.md": model_card(outcome, rebuild, _licences(prepared)), **files}


def companion_files_of(prepared: Prepared, about: About, candidate: Candidate, result: Result) -> dict[str, str]:
    """The same of any candidate."""
    rebuild, files = _made_again(prepared, candidate.recipe)
    return {"README.md": candidate_card(about, candidate, result, rebuild, _licences(prepared)), **files}


def _made_again(prepared: Prepared, recipe: Recipe) -> tuple[str, dict[str, str]]:
    """How mergekit makes a model, in words, and the files that say how to make it: mergekit's configuration and, if the
    search was in a file of the user's, this file with the values that were found.
    """
    rebuild, files = _rebuilt(prepared, recipe)
    text = found_recipe(prepared, recipe)
    if text is None:
        return rebuild, files
    said = f"`{FOUND_FILE}` is the file of the search with the values that were found."
    if prepared.config.model.heads == "merged" and prepared.config.model.alignment is None:
        draws = f" --random-seed {prepared.config.seed}" if prepared.template and prepared.template.draws else ""
        said += f" `evolver merge {FOUND_FILE} OUT{draws}` makes these weights, bit for bit."
    return f"{rebuild} {said}", {**files, FOUND_FILE: text}


def found_recipe(prepared: Prepared, recipe: Recipe) -> str | None:
    """The file in which a run has searched, with the values that make a model at their places; None where the run has
    no such file, or the model is none that it makes.
    """
    template, config = prepared.template, prepared.config
    values = None if template is None else template.encode(recipe)
    if template is None or values is None:
        return None
    extra: dict[str, Any] = {} if config.model.dtype == "auto" else {"dtype": config.model.dtype}
    document = template.text.documents[-1]
    if not {"tokenizer", "tokenizer_source"} & document.keys():
        with contextlib.suppress(mergekit.Inexpressible):
            extra |= yaml.safe_load(_words(prepared, "")) or {}
    return template.written(values, {k: v for k, v in extra.items() if k != "dtype" or "out_dtype" not in document})


def _rebuilt(prepared: Prepared, recipe: Recipe) -> tuple[str, dict[str, str]]:
    """How mergekit makes a model, in words, and its configuration where it does."""
    config, digests = prepared.config, prepared.plan.digests
    locations = {digests[n]: _reference(prepared, n) for n in ("base", *config.experts)}
    dtype = None if config.model.dtype == "auto" else config.model.dtype
    try:
        if any(isinstance(e, Realigned) and e.found.orders for e in prepared.opened.experts.values()):
            raise mergekit.Inexpressible("hidden units of its experts are aligned with those of the base")
        text = mergekit.dump(recipe, locations, prepared.opened.base.names(), dtype)
        text += _words(prepared, text)
    except mergekit.Inexpressible as why:
        return f"mergekit cannot make this model: {why}.", {}
    return f"mergekit makes it, too: `mergekit-yaml {mergekit.CONFIG_FILE} OUT`.", {mergekit.CONFIG_FILE: text}


def _reference(prepared: Prepared, name: str) -> str:
    """A model of a run as a mergekit file names it: an adapter behind its base."""
    config = prepared.config
    location = config.model.base if name == "base" else config.experts[name]
    base, model, adapter = map(expand, (parts_of(config.model.base)[0], *parts_of(location)))
    if adapter:
        return f"{model}+{adapter}"
    alone = name != "base" and isinstance(seen_through(prepared.opened.experts[name]), Adapter)
    return f"{base}+{model}" if alone and "+" not in base + model else model


def _words(prepared: Prepared, text: str) -> str:
    """The lines of a mergekit file that say where tokens and chat template come from.

    Raises Inexpressible where it has no words for that.
    """
    config, companions = prepared.config, prepared.opened.companions
    lines: dict[str, Any] = {}
    if companions.tokens is not None:
        settings = config.model.tokens
        if settings.tokens or "---\n" in text:
            raise mergekit.Inexpressible("its tokens come from several models")
        name = settings.source.removeprefix(EXPERT).strip()
        source = _reference(prepared, name) if name in config.experts else name
        lines["tokenizer"] = {"source": source, "pad_to_multiple_of": settings.pad_to_multiple_of}
    if companions.chat is not None:
        lines["chat_template"] = companions.chat.template
    return yaml.safe_dump(lines, sort_keys=False) if lines else ""


def _licences(prepared: Prepared) -> dict[str, str | None]:
    config, opened = prepared.config, prepared.opened
    found: dict[str, str | None] = {}
    named = [(config.model.base, opened.base), *((where, opened.experts[n]) for n, where in config.experts.items())]
    for location, source in named:
        model, adapter = parts_of(location)
        found |= {model: licence_of(model_below(source).path)} if adapter else {model: licence_of(source.path)}
        found |= {adapter: licence_of(seen_through(source).path)} if adapter else {}
    return found
