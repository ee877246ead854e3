"""What can be found out about a model while it is scored on items: the registry of collectors.

A collector is one function. It gets the live model, which holds the weights in question, and ``score``, which lets the
judges score it on the items; it yields tensors by the name of the tensor in the checkpoint that they belong to. Batches
come in a fixed order, so that sums over them are the same whoever collects.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator

from torch import Tensor

from evolver.errors import BadInput, nearest
from evolver.evaluation.live import LiveModel

Collect = Callable[[LiveModel, Callable[[], None]], Iterator[tuple[str, Tensor]]]
COLLECTORS: dict[str, Collect] = {}


def collector(name: str) -> Callable[[Collect], Collect]:
    """Register a collector: merge methods ask for what it collects by this name, with ``Of(name)``."""

    def register(function: Collect) -> Collect:
        COLLECTORS[name] = function
        return function

    return register


def collector_named(name: str) -> Collect:
    """The collector of that name.

    Raises BadInput, naming the nearest known ones, where there is none.
    """
    if name not in COLLECTORS:
        raise BadInput(f"statistics: there is no collector {name!r}; {nearest(name, COLLECTORS)}")
    return COLLECTORS[name]


for _found in pkgutil.iter_modules(__path__):  # they register themselves in COLLECTORS
    importlib.import_module(f"{__name__}.{_found.name}")
