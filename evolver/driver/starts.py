"""The merges that need no search, and the models that a search begins with (the key ``start``)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from evolver.config import Config
from evolver.config.starts import StartFile, Word
from evolver.errors import BadInput, cause_of, refuse_special
from evolver.merging import mergekit
from evolver.records import Candidate
from evolver.records.recipe import Expert, Merge, Recipe, Rule, ancestors, load_recipe
from evolver.runs.files import RECIPE_FILE
from evolver.runs.finals import TUNED
from evolver.storage.paths import expand


def plain_merges(config: Config, experts: tuple[Expert, ...], base: Expert) -> list[tuple[str, Recipe]]:
    """The merges without a search, by label: the average, and task arithmetic with equal weights at every mass."""
    out: list[tuple[str, Recipe]] = [("average", Merge("simple", experts, base))]
    for mass in config.baselines.masses:
        values = {"weight": (1.0 / len(experts),) * len(experts), "lambda": mass, "normalize": False}
        out.append((f"{TUNED}{mass:g}", Merge("task_arithmetic", experts, base, (Rule.of(values),))))
    return out


def starts_of(config: Config, experts: tuple[Expert, ...], base: Expert, names: Sequence[str]) -> list[Candidate]:
    """The models that the search begins with, each once, as its first candidates.

    Args:
        names: of the base's tensors.

    Raises BadInput for a file that cannot be read, and for a model of other experts.
    """
    found: dict[str, Recipe] = {}
    for number, entry in enumerate(config.start):
        key = f"start[{number}]"
        if isinstance(entry, StartFile):
            recipes = [_from_file(entry, key, config, experts, base, names)]
        else:
            recipes = list(_of_word(entry, config, experts, base))
        for recipe in recipes:
            found.setdefault(recipe.id, recipe)
    return [Candidate(k, r, "start", tuple(i.id for i in r.inputs)) for k, r in enumerate(found.values())]


def _of_word(word: Word, config: Config, experts: tuple[Expert, ...], base: Expert) -> Iterator[Recipe]:
    if word == "experts":
        yield from experts
    for label, recipe in plain_merges(config, experts, base):
        if (label == "average") == (word == "average") and word != "experts":
            yield recipe


def _from_file(
    entry: StartFile, key: str, config: Config, experts: tuple[Expert, ...], base: Expert, names: Sequence[str]
) -> Recipe:  # fmt: skip
    kind, place = entry.place
    path = Path(expand(place))
    if kind == "mergekit":
        recipe = _of_mergekit(path, f"{key}.mergekit", config, experts, base, names)
    else:
        file = path / RECIPE_FILE if kind == "run" else path
        try:
            refuse_special(file)
            recipe = load_recipe(file.read_text())
        except (OSError, ValueError) as error:
            raise BadInput(
                f"{key}.{kind}: {file} cannot be read as a recipe ({cause_of(error)}); give a recipe.json, or the "
                "folder of a finished run."
            ) from error
    known = {model.digest for model in (base, *experts)}
    strangers = [n for n in ancestors(recipe) if isinstance(n, Expert) and n.digest not in known]
    # Where weights were not read, the models go by their names.
    named = {model.name for model in (base, *experts)} if base.digest == base.name else set()
    if strange := next((n for n in strangers if n.name not in named), None):
        raise BadInput(
            f"{key}.{kind}: the model was made of other experts: {strange.name} is none of this configuration's; give "
            "a recipe over the same base and experts."
        )
    return recipe


def _of_mergekit(
    path: Path, key: str, config: Config, experts: tuple[Expert, ...], base: Expert, names: Sequence[str]
) -> Recipe:  # fmt: skip
    """The recipe of a mergekit file whose models are this configuration's, by their places."""
    file = mergekit.read(path)
    places = {config.model.base: base} | dict(zip(config.experts.values(), experts, strict=True))
    models = {_whole(place): model for place, model in places.items()}
    nodes = {}
    for reference in file.references:
        if _whole(reference) not in models:
            raise BadInput(
                f"{key}: {path} merges {reference}, which is neither the base nor an expert of this configuration; "
                "write the same places in both files."
            )
        nodes[reference] = models[_whole(reference)]
    return file.recipe(nodes, names, config.seed)


def _whole(place: str) -> str:
    """A model's place in one spelling: of a folder its absolute path."""
    path = Path(expand(place))
    return str(path.resolve()) if path.exists() else place
