"""What a configuration is going to make, as far as that is known before it runs."""

from __future__ import annotations

from evolver.checkpoints.weights import Checkpoint
from evolver.config.reading import load
from evolver.config.recipes import recipe_of
from evolver.driver.early import chosen_search, innermost
from evolver.driver.prepare import model_places, searched_file
from evolver.errors import BadInput
from evolver.merging.corrected import Corrected
from evolver.merging.maker import RecipeMaker
from evolver.merging.mergekit import RecipeSpace
from evolver.merging.settings.alternatives import Alternatives
from evolver.merging.settings.genome import Genome
from evolver.records.recipe import Recipe
from evolver.search.coefficients.base import CoefficientSettings, space_of
from evolver.search.programs.layers import LayersSettings
from evolver.workers.opened import open_models


def planned_merge(file: str) -> tuple[Recipe, tuple[str, ...], Checkpoint]:
    """The merge that a configuration's search makes (with example numbers), the settings that it tunes, and the base.

    Raises BadInput for a configuration that cannot be used, and for a search that uses no merge method.
    """
    config = load(file)
    name, settings = innermost(*chosen_search(config, file), file)
    if isinstance(settings, LayersSettings):
        raise BadInput(
            f"{file}: search: each candidate has a program of its own, so there are no settings to explain before the "
            "run; explain the folder of the finished run."
        )
    opened = open_models(config)
    maker = RecipeMaker(list(config.experts), opened.base.names(), places=model_places(config))
    if isinstance(settings, CoefficientSettings):
        space = space_of(maker, settings)
        assert isinstance(space, Genome | Alternatives | RecipeSpace | Corrected)
        return space.decode(space.encode_equal(1.0)), space.tune, opened.base
    merger = getattr(settings, "merger", None)
    if merger is None:
        raise BadInput(
            f"{file}: search: {name} has no merge method of its own, so there are no settings to explain before the "
            "run; explain the folder of the finished run."
        )
    merge = maker.merger(merger, adapt=getattr(settings, "adapt", False))
    return merge(maker.experts), tuple(merge.start), opened.base


def planned_space(file: str) -> RecipeSpace | None:
    """The search space of a configuration whose search is in a mergekit file; None for any other configuration.

    Raises BadInput for a configuration that cannot be used.
    """
    config = load(file)
    if recipe_of(config.search) is None:
        return None
    names = open_models(config).base.names()
    return searched_file(config, RecipeMaker(list(config.experts), names, places=model_places(config)))
