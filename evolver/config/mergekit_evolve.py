"""Files of mergekit-evolve, read as configurations: CMA-ES over the genome that they describe, scored on their tasks.

The genome has, for each group of layers, each model and each filter, one number of every parameter of the method. Here
these numbers are the free values of a mergekit file, which becomes the key ``search.recipe``.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError

from evolver.config.recipes import RecipeText, local_path, reference
from evolver.config.section import Section
from evolver.config.sentences import sentence
from evolver.errors import BadInput

# What tells these files from others, and the parameters that the genome has of each method.
KNOWN_BY = ("genome", "tasks")
PARAMETERS = {
    "linear": ("weight",), "task_arithmetic": ("weight",), "ties": ("weight", "density"),
    "dare_ties": ("weight", "density"), "slerp": ("t",),
}  # fmt: skip
DIVIDED = ("ties", "dare_ties", "linear")
NEEDS_BASE = ("ties", "dare_ties", "task_arithmetic")
# mergekit-evolve stops after so many evaluations unless it is told otherwise, and begins with this step.
EVALUATIONS, STEP = 100, 1 / 6
# Weights have no limits there. A range of the length 1 keeps the step what it is there, in the same unit.
WEIGHT_RANGE, SIGNED_RANGE = (0.0, 1.0), (-1.0, 1.0)
DENSITY_RANGE = (0.05, 1.0)
# It takes all documents of a task, or the first ones. Here, some are kept for the choice of the winner and the report.
SHARES = {"dev": 0.5, "report": 0.25}
# The names that models give the number of their layers.
DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


class EvolveTask(Section):
    """A task of lm-eval and what it weighs."""

    name: str = Field(min_length=1)
    weight: float = 1.0
    metric: str = "acc,none"


class EvolveGenome(Section):
    """What is searched."""

    models: list[Any] = Field(min_length=1)
    merge_method: Literal["linear", "task_arithmetic", "ties", "dare_ties", "slerp"]
    base_model: Any = None
    tokenizer_source: str | None = None
    layer_granularity: int = 0
    normalize: bool | None = None
    allow_negative_weights: bool = False
    filters: list[str] | None = None
    smooth: bool = False


class EvolveFile(Section):
    """A whole file."""

    genome: EvolveGenome
    tasks: list[EvolveTask] = Field(min_length=1)
    limit: int | None = Field(None, ge=1)
    num_fewshot: int | None = Field(None, ge=0)
    shuffle: bool = False
    random_init: bool = False
    apply_chat_template: bool = True
    fewshot_as_multiturn: bool = True


@dataclass(frozen=True)
class Adopted:
    """A configuration in the place of such a file.

    Attributes:
        raw: the configuration.
        notes: what differs from mergekit-evolve, a sentence for each line of the file that it comes from.
    """

    raw: dict[str, Any]
    notes: tuple[str, ...]


def is_evolve_file(raw: Any) -> bool:
    """Whether the content of a file is that of a file of mergekit-evolve."""
    return isinstance(raw, Mapping) and "search" not in raw and all(key in raw for key in KNOWN_BY)


def adopted(text: RecipeText, ours: Mapping[str, Any]) -> Adopted:
    """The configuration that a file of mergekit-evolve stands for.

    Args:
        ours: what the file says under keys of Evolver's own, which mergekit-evolve ignores.

    Raises BadInput that names file and line for what is wrong in the file or cannot be done.
    """
    raw = {k: v for k, v in text.documents[0].items() if k not in ours}
    file = _checked(text, raw)
    genome = file.genome
    _refuse_genome(text, genome)
    groups, depth = _groups(text, genome)
    made = _Recipe(file, groups, depth, int(ours.get("seed", 0)) if isinstance(ours.get("seed", 0), int) else 0)
    wide = genome.allow_negative_weights and genome.merge_method != "slerp"
    search: dict[str, Any] = {"algorithm": "cmaes", "recipe": made.recipe()}
    search |= {"sigma": STEP / 2} if wide else {}
    alone = {} if genome.base_model is None else {"base": reference(genome.base_model)}
    config: dict[str, Any] = {
        "run": _name(text.origin), "model": alone, "search": search, "budget": {"candidates": EVALUATIONS},
        "evaluation": _evaluation(file),
    }  # fmt: skip
    for key, value in ours.items():
        both = isinstance(value, Mapping) and key in ("model", "evaluation")
        config[key] = {**config[key], **value} if both else value
    return Adopted(config, tuple(_notes(text, file)))


def _checked(text: RecipeText, raw: Mapping[str, Any]) -> EvolveFile:
    tasks = raw["tasks"]
    if isinstance(tasks, list):
        raw = {**raw, "tasks": [{"name": t} if isinstance(t, str) else t for t in tasks]}
    try:
        return EvolveFile.model_validate(raw)
    except ValidationError as error:
        first = min(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", -len(e["loc"])))
        raise BadInput(f"{text.at((0, *first['loc']))}: {sentence(EvolveFile, first, '')}") from None


def _refuse_genome(text: RecipeText, genome: EvolveGenome) -> None:
    """Raises BadInput for what no search can be made of."""
    said, method = None, genome.merge_method
    if len(set(map(reference, genome.models))) < len(genome.models):
        said = "models", "a model is listed twice; list each model once"
    elif len(genome.models) < 2:
        said = "models", "a merge needs several models; list two or more"
    elif method in NEEDS_BASE and genome.base_model is None:
        said = "merge_method", f"{method} merges differences to a base; add base_model to the genome"
    elif method == "slerp" and (genome.smooth or genome.filters):
        said = "smooth" if genome.smooth else "filters", "slerp has no such parameters here; leave this key out"
    elif method == "slerp" and len(genome.models) > 2:
        many = f"slerp merges two models, and mergekit-evolve takes another two of these {len(genome.models)} for each "
        said = "models", many + "group of layers, which Evolver does not do; list two, or write merge_method: linear"
    if said is not None:
        raise BadInput(f"{text.at((0, 'genome', said[0]))}: genome.{said[0]}: {said[1]}.")


def _groups(text: RecipeText, genome: EvolveGenome) -> tuple[int, int]:
    """The number of groups of layers, and the number of layers in one; 0 where it need not be known."""
    size = genome.layer_granularity
    if size < 1:
        return 1, 0
    path, model = (0, "genome", "layer_granularity"), reference(genome.models[0])
    where = f"{text.at(path)}: genome.layer_granularity"
    depth = _depth(model)
    if depth is None:
        raise BadInput(
            f"{where}: the number of layers of {model} is not known before it is on this machine; download it with "
            "`hf download`, or give a folder with a config.json."
        )
    if depth % size:
        raise BadInput(f"{where}: {depth} layers do not divide into groups of {size}; write a divisor of {depth}.")
    return depth // size, size


def _depth(model: str) -> int | None:
    """The number of layers that a model's config.json names; None where it is not on this machine."""
    place = model.partition("+")[0]
    file: Any = local_path(place) / "config.json"
    if not file.exists():
        from huggingface_hub import try_to_load_from_cache  # slow, and most models are folders

        name, _, revision = place.partition("@")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            return None
        file = try_to_load_from_cache(name, "config.json", revision=revision or None)
        if not isinstance(file, str):
            return None
    try:
        found = json.loads(Path(file).read_text())
        parts = [found, found.get("text_config") or {}]
    except (OSError, ValueError, AttributeError):
        return None
    return next((part[key] for part in parts for key in DEPTHS if isinstance(part.get(key), int)), None)


@dataclass(frozen=True)
class _Recipe:
    """The genome as a mergekit file with free values."""

    file: EvolveFile
    groups: int
    size: int
    seed: int

    def recipe(self) -> dict[str, Any]:
        genome, draw = self.file.genome, random.Random(f"{self.seed}:genome")
        out: dict[str, Any] = {"merge_method": genome.merge_method}
        if genome.merge_method == "slerp":
            out["base_model"] = genome.models[0]
        elif genome.base_model is not None and genome.merge_method in NEEDS_BASE:
            out["base_model"] = genome.base_model
        if self.groups > 1 and not genome.smooth:
            out["slices"] = [self._slice(group, draw) for group in range(self.groups)]
        else:
            out |= self._whole(draw)
        if genome.merge_method != "slerp":
            usual = genome.merge_method in DIVIDED
            out["parameters"] = {"normalize": usual if genome.normalize is None else genome.normalize}
        out["dtype"] = "bfloat16"
        return out | ({"tokenizer_source": genome.tokenizer_source} if genome.tokenizer_source else {})

    def _whole(self, draw: random.Random) -> dict[str, Any]:
        """All layers as one, in which a smooth genome has a gradient with an anchor for each group."""
        genome, anchors = self.file.genome, self.groups
        if genome.merge_method == "slerp":
            return {"models": [{"model": m} for m in genome.models], "parameters": {"t": self._number("t", draw)}}
        return {"models": [{"model": m, "parameters": self._parameters(draw, anchors)} for m in genome.models]}

    def _slice(self, group: int, draw: random.Random) -> dict[str, Any]:
        genome, span = self.file.genome, [group * self.size, (group + 1) * self.size]
        if genome.merge_method == "slerp":
            sources = [{"model": m, "layer_range": list(span)} for m in genome.models]
            return {"sources": sources, "parameters": {"t": self._number("t", draw)}}
        return {
            "sources": [
                {"model": m, "layer_range": list(span), "parameters": self._parameters(draw, 1)} for m in genome.models
            ]
        }

    def _parameters(self, draw: random.Random, anchors: int) -> dict[str, Any]:
        """Of one model: each parameter for each filter, and for all other tensors."""
        genome, out = self.file.genome, {}
        for key in PARAMETERS[genome.merge_method]:
            entries = [
                {"filter": part, "value": self._value(key, draw, anchors)} if part else
                {"value": self._value(key, draw, anchors)} for part in (*(genome.filters or ()), None)
            ]  # fmt: skip
            out[key] = entries if len(entries) > 1 else entries[0]["value"]
        return out

    def _value(self, key: str, draw: random.Random, anchors: int) -> Any:
        values = [self._number(key, draw) for _ in range(anchors)]
        return values if anchors > 1 else values[0]

    def _number(self, key: str, draw: random.Random) -> dict[str, Any]:
        genome, drawn = self.file.genome, draw.random()
        weights = SIGNED_RANGE if genome.allow_negative_weights else WEIGHT_RANGE
        low, high = {"weight": weights, "density": DENSITY_RANGE, "t": (0.0, 1.0)}[key]
        usual = {"weight": 1 / len(genome.models), "density": 1.0, "t": 0.5}[key]
        start = min(max(drawn if self.file.random_init else usual, low), high)
        return {"search": [low, high], "start": float(f"{start:.6g}")}


def _evaluation(file: EvolveFile) -> dict[str, Any]:
    sizes = SHARES if file.limit is None else {**SHARES, "dev": file.limit}
    tasks = [{"task": t.name, "metric": t.metric, "weight": t.weight, **sizes} for t in file.tasks]
    out: dict[str, Any] = {"tasks": tasks, "apply_chat_template": file.apply_chat_template}
    out |= {} if file.fewshot_as_multiturn else {"fewshot_as_multiturn": False}
    return out if file.num_fewshot is None else {**out, "num_fewshot": file.num_fewshot}


def _notes(text: RecipeText, file: EvolveFile) -> Iterator[str]:
    """What differs from mergekit-evolve, and what happens instead."""
    genome = file.genome
    if file.limit is None:
        yield (
            f"{text.at((0, 'tasks'))}: tasks: mergekit-evolve searches on all documents of a task; Evolver searches on "
            "half of them, and keeps the others to choose the winner and for the report"
        )
    else:
        drawn = "other ones for each candidate" if file.shuffle else "the first ones"
        yield (
            f"{text.at((0, 'shuffle' if file.shuffle else 'limit'))}: limit: mergekit-evolve takes {drawn}; Evolver "
            f"draws {file.limit} documents of each task by the seed, the same for all candidates, and others to choose "
            "the winner and for the report"
        )
    if genome.merge_method == "slerp":
        return
    ends = "-1 to 1" if genome.allow_negative_weights else "0 to 1"
    key = "allow_negative_weights" if genome.allow_negative_weights else "merge_method"
    density = f", densities from {DENSITY_RANGE[0]:g} to 1" if "density" in PARAMETERS[genome.merge_method] else ""
    yield (
        f"{text.at((0, 'genome', key))}: genome.{key}: weights are searched from {ends}{density}; in mergekit-evolve, "
        "weights have no limit"
    )


def _name(origin: str) -> str:
    """A run's name, made of the name of the file."""
    stem = Path(origin).name.partition(".")[0]
    return re.sub(r"[^A-Za-z0-9._-]+", "-", stem).lstrip("._-") or "evolve"
