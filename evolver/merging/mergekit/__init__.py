"""mergekit's configuration files: read as recipes, and recipes written as such files."""

from evolver.merging.mergekit.reader import NAMES, Configuration, Tokenizer, parse, read
from evolver.merging.mergekit.writer import FILE, RANDOM, Inexpressible, dump

__all__ = ["FILE", "NAMES", "RANDOM", "Configuration", "Inexpressible", "Tokenizer", "dump", "parse", "read"]
