"""Searches: they propose recipes and learn from their scores. They never see tensors."""

import importlib
import pkgutil

from evolver.search.base import SEARCHES, Search

__all__ = ["SEARCHES", "Search"]

for _found in pkgutil.walk_packages(__path__, f"{__name__}."):  # each module registers its searches in SEARCHES
    importlib.import_module(_found.name)
