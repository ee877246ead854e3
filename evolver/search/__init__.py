"""Searches: they propose recipes and learn from their scores. They never see tensors."""

import importlib
import pkgutil

from evolver.search.base import SEARCHES, Search

__all__ = ["SEARCHES", "Search"]

for _found in pkgutil.iter_modules(__path__):  # each module registers its searches in SEARCHES
    importlib.import_module(f"{__name__}.{_found.name}")
