"""The choosing half: searches propose recipes and learn from their scores. No tensors here."""

from evolver.search import evolver, halving, optuna_samplers, plain
from evolver.search.base import SEARCHES, Search

__all__ = ["SEARCHES", "Search", "evolver", "halving", "optuna_samplers", "plain"]
