"""``evolver explain``: shows the method and the settings of a merge for every tensor.

The merge is described by a mergekit file, by the configuration or the winner of a run, or by a model folder. Of a model
folder that does not say how it was made, the names of tensors are shown.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from evolver.checkpoints.agreement import Agreement
from evolver.checkpoints.sources import open_base
from evolver.commands.merge import open_merge, without_weights_of
from evolver.config.loader import Loader
from evolver.config.mergekit_evolve import is_evolve_file
from evolver.config.reading import config_at, load
from evolver.config.recipes import parsed_recipe
from evolver.driver.planned import planned_merge, planned_space
from evolver.driver.prepare import prepare
from evolver.errors import BadInput, cause_of, refuse_special
from evolver.evaluation.blueprint import Blueprint
from evolver.merging import mergekit, methods
from evolver.merging.alignment.layouts import unit_layers
from evolver.merging.alignment.orders import mean_cosine
from evolver.merging.corrected import AFTER
from evolver.merging.likeness import Likeness, likeness
from evolver.records.recipe import Expert, Layers, Merge, Recipe, layer_of
from evolver.report.mixture import mixture
from evolver.runs.files import RECIPE_FILE, RUN_FILE, read_recipe
from evolver.runs.folder import config_of_run
from evolver.storage import storage_at
from evolver.storage.paths import last_part
from evolver.storage.references import parts_of
from evolver.workers.opened import draw_up, open_models, open_named

# Items of each task whose prompts are shown.
SHOWN = 2
SettingRow = tuple[str, str, Mapping[str, Any]]


def explain(path: str | Path) -> list[SettingRow]:
    """The name, the method and the settings of every tensor of the model that a path describes.

    Args:
        path: a mergekit file, the YAML file of a run, the folder of a finished run (for its winner), or a model folder
            that contains a mergekit file.

    Raises BadInput, naming file and key, where the path describes no merge.
    """
    place = Path(path)
    try:
        there = place.is_dir()
    except (OSError, ValueError) as error:
        raise BadInput(
            f"{str(path)[:100]}: this cannot be a path ({cause_of(error)}); give a file or a folder."
        ) from error
    if there:
        if os.path.lexists(place / RECIPE_FILE):
            return _of_winner(place)
        if not (place / mergekit.CONFIG_FILE).exists():
            raise BadInput(
                f"{path}: the folder does not say how its model was made; give the folder of a finished run, a model "
                f"folder, or a folder with {mergekit.CONFIG_FILE}, which `evolver merge` and some exports write."
            )
        place = place / mergekit.CONFIG_FILE
    if _is_run(place):
        recipe, tuned, base = planned_merge(str(place))
        return _rows(recipe, base.names(), tuned)
    opened = open_merge(place, start=True)
    names = opened.base.names()
    nodes = {r: Expert(r, r) for r in opened.sources}
    return _rows(opened.configuration.recipe(nodes, names), names, ())


def searched(path: str | Path) -> list[str]:
    """A line for each value that is left free in a mergekit file, or in the one that a configuration searches in.

    Raises BadInput, naming file and line, for what cannot be searched.
    """
    if Path(path).is_dir():
        return []
    if _is_run(path):
        space = planned_space(str(path))
        free = space.free if space else ()
    else:
        free = mergekit.free_values(parsed_recipe(config_at(path).text, str(path)), last_part)
    begin = ["The settings below are those that the search begins with."] if free else []
    return [f"searched: {value.said}" for value in free] + begin


def preset_set(path: str | Path) -> list[str]:
    """What a preset has set in the configuration of a run, in lines for people; none for anything else.

    Raises BadInput for an unknown preset.
    """
    return config_at(path).preset_lines() if _is_run(Path(path)) else []


def is_model(path: str | Path) -> bool:
    """Whether a path is a model folder that does not say how the model was made."""
    place = Path(path)
    with contextlib.suppress(OSError, ValueError):
        made = os.path.lexists(place / RECIPE_FILE) or (place / mergekit.CONFIG_FILE).exists()
        return not made and (place / "config.json").is_file()
    return False


def names_table(folder: str | Path) -> str:
    """How the name of each tensor in a model's files is read, one on each line; tensors that are left out have no name.

    Raises BadInput where the folder holds no model that can be read.
    """
    model = open_base(str(folder), str(folder))
    Agreement(model, without_weights_of).ask_class()
    read = {stored: name for name, stored in model.stored.items()}
    read |= {scales: f"(scales of {read[codes]})" for scales, codes in model.scales.items() if codes in read}
    width = max(map(len, model.in_files()))
    rows = [(stored, read.get(stored, "(left out)")) for stored in model.in_files()]
    return "\n".join(f"{stored:{width}}  {name}" for stored, name in rows)


def _of_winner(run: Path) -> list[SettingRow]:
    """The rows of a run's winner."""
    file = run / RECIPE_FILE
    recipe = read_recipe(file, "run the configuration again, which writes the file again")
    config = load(run / RUN_FILE)
    base = open_named(config, parts_of(config.model.base)[0], f"{run / RUN_FILE}: model.base").base
    try:
        return _rows(recipe, base.names(), ())
    except BadInput as error:
        raise BadInput(f"{file}: {error}") from error


def experts_compared(
    path: str | Path, measured: Callable[[str], None]
) -> tuple[list[str], Likeness, dict[int | None, Likeness]]:
    """The names of the experts of a merge and what their task vectors have in common, of all and by layer.

    Args:
        path: a mergekit file or the YAML file of a run.
        measured: is told the name of each tensor that has been measured.

    Raises BadInput where the models cannot be opened, and where nothing is merged against a base.
    """
    if _is_run(path):
        opened = open_models(load(path))
        return [*opened.experts], *likeness(opened.base, [*opened.experts.values()], measured)
    file = open_merge(path, start=True)
    named = {last_part(name): source for name, source in file.sources.items() if source is not file.base}
    if not named:
        raise BadInput(f"{path}: no model is merged with its base_model; name models beside it.")
    return [*named], *likeness(file.base, [*named.values()], measured)


def row_cosines(path: str | Path) -> dict[str, float]:
    """The mean cosine of each expert's MLP rows with the base's, which says whether they are of one ancestry; none
    where it is not known which tensors are their MLPs.
    """
    if _is_run(path):
        opened = open_models(load(path))
        base, models = opened.base, opened.experts
    else:
        file = open_merge(path, start=True)
        base, models = file.base, {last_part(n): s for n, s in file.sources.items() if s is not file.base}
    try:
        layers = unit_layers(base.headers, base.config, "")
    except BadInput:
        return {}
    return {name: mean_cosine(base.tensor, model.tensor, layers) for name, model in models.items()}


def prompts(path: str | Path) -> str:
    """What a model reads of the first dev items of each task of a configuration, or of the run in a folder.

    Raises BadInput where the configuration cannot be used, and where none of its tasks has prompts that can be shown.
    """
    given = config_of_run(storage_at(str(path))) if Path(path).is_dir() else config_at(path)
    prepared = prepare(given, weights=False)
    try:
        model = draw_up(prepared.config, prepared.opened)
        if not isinstance(model, Blueprint):
            raise BadInput(
                f"evaluation.backend: {prepared.config.evaluation.backend} makes the tokens of prompts itself, so they "
                "cannot be shown; write resident to look at them."
            )
        texts = prepared.tasks.prompts(model, SHOWN)
    except BadInput as error:
        raise BadInput(f"{given.origin}: {error}") from error
    if not texts:
        raise BadInput(f"{given.origin}: --prompts: none of its tasks has prompts; leave the option out.")
    return "\n\n".join(texts)


def table(rows: Sequence[SettingRow]) -> str:
    """The rows of ``explain`` as text, with one tensor on each line. Weights of a mixture are shown as ratios, too."""
    width, lines = max(len(name) for name, _, _ in rows), []
    for name, method, settings in rows:
        said = [f"{key}={_short(value)}" for key, value in settings.items()]
        said += [f"mixture={ratio}" for ratio in filter(None, [mixture(settings)])]
        lines.append(f"{name:{width}}  {method}  {'  '.join(said)}")
    return "\n".join(lines)


def _is_run(path: str | Path) -> bool:
    try:
        refuse_special(path)
        raw = yaml.load(Path(path).read_text(), Loader=Loader)
    except (OSError, ValueError, TypeError, RecursionError, yaml.YAMLError):
        return False  # a file of several documents, or one that the reader of mergekit files refuses with a message
    return isinstance(raw, dict) and ("search" in raw or is_evolve_file(raw))


def _rows(recipe: Recipe, base: Sequence[str], tuned: Collection[str]) -> list[SettingRow]:
    return [(n, *_settings(recipe, n, tuned)) for n in recipe.names(base)]


def _settings(recipe: Recipe, name: str, tuned: Collection[str]) -> tuple[str, Mapping[str, Any]]:
    program = isinstance(recipe, Layers)
    while isinstance(recipe, Layers):
        recipe, name = recipe.source(name)
    if isinstance(recipe, Expert):
        if program:
            return "copy", {"from": recipe.name, "tensor": name}
        raise BadInput(f"{name}: this tensor is copied from one model, so no merge method has settings for it.")
    if not isinstance(recipe, Merge):
        return recipe.describe(), {}
    method = methods.get(recipe.method, "the recipe")
    layer = layer_of(name)
    given = [recipe.settings(name, layer, part) for part in recipe.parts(name, layer)]
    values, *others = (method.complete(one, len(recipe.inputs), recipe.method) for one in given)
    said = {k: v if all(other[k] == v for other in others) else f"{len(given)} parts differ" for k, v in values.items()}
    if len(recipe.inputs) == 1 and isinstance(recipe.inputs[0], Merge):  # a merge, corrected
        first, before = _settings(recipe.inputs[0], name, tuned)
        own = {f"{recipe.method}.{k}": v for k, v in said.items()}
        return f"{first}, {recipe.method}", {**before, **_marked(own, tuned, AFTER)}
    return recipe.method, _marked(said, tuned)


def _marked(said: Mapping[str, Any], tuned: Collection[str], prefix: str = "") -> dict[str, Any]:
    """The settings, with a word in the place of those whose names after ``prefix`` are tuned."""
    return {k: "tuned" if prefix + k in tuned else v for k, v in said.items()}


def _short(value: Any) -> str:
    if isinstance(value, tuple):
        return "[" + ", ".join(f"{v:g}" for v in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
