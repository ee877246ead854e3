"""The choosing half: searches propose recipes and learn from their scores. No tensors here."""

import importlib
import pkgutil

from evolver.search.base import SEARCHES, Search

__all__ = ["SEARCHES", "Search"]

for _found in pkgutil.iter_modules(__path__):  # they register themselves in SEARCHES
    importlib.import_module(f"{__name__}.{_found.name}")
