"""mergekit's configuration files: read as recipes, and recipes written as such files."""

from evolver.merging.mergekit.free import free_values
from evolver.merging.mergekit.parameters import MERGEKIT_NAMES
from evolver.merging.mergekit.reader import Configuration, parse, read
from evolver.merging.mergekit.space import RecipeSpace, recipe_space
from evolver.merging.mergekit.writer import CONFIG_FILE, RANDOM, Inexpressible, dump

__all__ = [
    "CONFIG_FILE",
    "MERGEKIT_NAMES",
    "RANDOM",
    "Configuration",
    "Inexpressible",
    "RecipeSpace",
    "dump",
    "free_values",
    "parse",
    "read",
    "recipe_space",
]
