"""What can be found out about a model while it is scored on items: the registry of collectors.

A collector is one function. It gets the live model, which holds the weights in question, and the items, on which it
can let the judges score the model (``items.score()``), or which it takes one by one as examples of which a gradient can
be taken (``items.examples()``). It yields tensors by the name of the tensor in the checkpoint that they belong to.
Items come in a fixed order, so that sums over them are the same whoever collects.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from evolver.errors import BadInput, nearest
from evolver.evaluation.examples import Example
from evolver.evaluation.live import LiveModel


class SampledItems(Protocol):
    """The items that something is collected on."""

    def score(self) -> None:
        """Let the judges score the live model on all of them."""
        ...

    def examples(self) -> Iterator[Example]:
        """All of them as examples."""
        ...


Collect = Callable[[LiveModel, SampledItems], Iterator[tuple[str, Tensor]]]


@dataclass(frozen=True)
class Collector:
    """A collector as the registry knows it.

    Attributes:
        gradients: it takes examples, of which gradients can be taken; else it lets the judges score.
        observed: it needs the right answers to the items.
    """

    name: str
    collect: Collect
    gradients: bool
    observed: bool


COLLECTORS: dict[str, Collector] = {}


def collector(name: str, gradients: bool = False, observed: bool = False) -> Callable[[Collect], Collect]:
    """Register a collector: merge methods ask for what it collects by this name, with ``Of(name)``.

    Args:
        gradients, observed: see ``Collector``.
    """

    def register(function: Collect) -> Collect:
        COLLECTORS[name] = Collector(name, function, gradients, observed)
        return function

    return register


def collector_named(name: str) -> Collector:
    """The collector of that name.

    Raises BadInput, naming the nearest known ones, where there is none.
    """
    if name not in COLLECTORS:
        raise BadInput(f"statistics: there is no collector {name!r}; {nearest(name, COLLECTORS)}")
    return COLLECTORS[name]


for _found in pkgutil.iter_modules(__path__):  # they register themselves in COLLECTORS
    importlib.import_module(f"{__name__}.{_found.name}")
