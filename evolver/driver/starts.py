"""The merges that need no search, and the models that a search begins with (the key ``start``)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from evolver.checkpoints.grams import TensorGrams
from evolver.config import Config
from evolver.config.starts import PRIORS, RATED, PriorWord, StartFile, start_proposer
from evolver.driver.priors import PriorMaker, prior_count
from evolver.errors import BadInput
from evolver.merging import mergekit
from evolver.merging.corrected import Corrected
from evolver.merging.settings.genome import Genome
from evolver.merging.settings.spelling import refuse_unknown
from evolver.records import UNKNOWN, Candidate, Standing
from evolver.records.leaders import Rated
from evolver.records.recipe import Expert, Merge, Recipe, Rule, ancestors, layer_of
from evolver.runs.files import RECIPE_FILE, read_recipe
from evolver.runs.finals import TUNED
from evolver.search.continued import NO_SEQUEL, Sequel
from evolver.storage.paths import expand


@dataclass(frozen=True)
class Starts:
    """What a search begins with: models that are known now, and those that depend on the scores of these."""

    listed: Sequence[Candidate] = ()
    sequel: Sequel = NO_SEQUEL

    @property
    def count(self) -> int:
        """The number of models."""
        return len(self.listed) + self.sequel.count


def plain_merges(config: Config, experts: tuple[Expert, ...], base: Expert) -> list[tuple[str, Recipe]]:
    """The merges without a search, by label: the average, and task arithmetic with equal weights at every mass."""
    tuned = [(f"{TUNED}{mass:g}", recipe) for mass, recipe in _by_mass(config, experts, base).items()]
    return [("average", _average(experts, base)), *tuned]


def _average(experts: tuple[Expert, ...], base: Expert) -> Recipe:
    """The simple average."""
    return Merge("simple", experts, base)


def _by_mass(config: Config, experts: tuple[Expert, ...], base: Expert) -> dict[float, Recipe]:
    """Task arithmetic with equal weights, by total mass."""
    equal = (1.0 / len(experts),) * len(experts)
    return {
        mass: Merge("task_arithmetic", experts, base, (Rule.of({"weight": equal, "lambda": mass, "normalize": False}),))
        for mass in config.baselines.masses
    }


def refuse_depth(config: Config, names: Sequence[str]) -> None:
    """Raises BadInput for a depth profile of a model without layers."""
    if "depth" in config.start and all(layer_of(name) is None for name in names):
        raise BadInput(
            f"start[{config.start.index('depth')}]: the names of the base's tensors tell of no layers, so no mass can "
            "grow with them; leave depth out."
        )


def starts_of(
    config: Config, experts: tuple[Expert, ...], base: Expert, names: Sequence[str], space: Genome | Corrected | None,
    grams: Callable[[], TensorGrams],
) -> Starts:  # fmt: skip
    """The models that the search begins with, each once, as its first candidates.

    Args:
        names: of the base's tensors.
        space: of the search, if it tunes weights.
        grams: reads the inner products of the experts' task vectors; it is asked when the search needs them.

    Raises BadInput for a file that cannot be read, for settings that a method does not have, and for a model of other
    experts.
    """
    found: dict[str, Candidate] = {}
    for name, recipe in _known(config, experts, base, names):
        found.setdefault(recipe.id, _candidate(len(found), name, recipe))
    listed = tuple(found.values())
    if not (words := _prior_words(config)):
        return Starts(listed)
    maker = PriorMaker(experts, base, names, space, grams)

    def candidates(first: int, scored: Sequence[Rated]) -> list[Candidate]:
        standing = {candidate.recipe.id: result.standing for candidate, result in scored}
        mass = _best_mass(config, experts, base, standing)
        own = [standing.get(expert.id, UNKNOWN) for expert in experts]
        made = [(word, recipe) for word in words for recipe in maker.recipes(word, mass, own)]
        return [_candidate(first + k, word, recipe) for k, (word, recipe) in enumerate(made)]

    return Starts(listed, Sequel(sum(prior_count(word, len(experts)) for word in words), candidates))


def _candidate(number: int, name: str, recipe: Recipe) -> Candidate:
    return Candidate(number, recipe, start_proposer(name), tuple(i.id for i in recipe.inputs))


def _prior_words(config: Config) -> list[PriorWord]:
    return [word for word in PRIORS if word in config.start]


def _known(
    config: Config, experts: tuple[Expert, ...], base: Expert, names: Sequence[str]
) -> Iterator[tuple[str, Recipe]]:  # fmt: skip
    """What needs no results, each with what it is called in the section ``start``."""
    if not {*RATED}.isdisjoint(_prior_words(config)) and "experts" not in config.start:  # by their scores
        yield from (("experts", expert) for expert in experts)
    for number, entry in enumerate(config.start):
        if isinstance(entry, StartFile):
            yield entry.place[0], _from_file(entry, f"start[{number}]", config, experts, base, names)
        elif entry == "experts":
            yield from (("experts", expert) for expert in experts)
        elif entry == "average":
            yield "average", _average(experts, base)
        elif entry == "masses":
            yield from (("masses", recipe) for recipe in _by_mass(config, experts, base).values())


def _best_mass(
    config: Config, experts: tuple[Expert, ...], base: Expert, standing: Mapping[str, Standing]
) -> float:  # fmt: skip
    """The mass of the best of the masses that are scored, the first of equals; 1 where none is."""
    found = {m: standing[r.id] for m, r in _by_mass(config, experts, base).items() if r.id in standing}
    return max(found, key=lambda mass: found[mass], default=1.0)


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
            recipe = read_recipe(file, "give a recipe.json, or the folder of a finished run")
        except BadInput as error:
            raise BadInput(f"{key}.{kind}: {error}") from error
        refuse_unknown(recipe, f"{key}.{kind}: {file}")
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
