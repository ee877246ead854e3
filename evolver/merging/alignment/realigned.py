"""A model that is seen with its hidden units in the order of another one's. To all that merges it is a plain model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from evolver.checkpoints.adapted import seen_through
from evolver.checkpoints.weights import Checkpoint, Source, TensorInfo, digest_of_tensors
from evolver.config.model import AlignmentSettings
from evolver.errors import BadInput
from evolver.merging.alignment.layouts import unit_layers
from evolver.merging.alignment.orders import DIFFERENT_BELOW, FoundOrders, all_axes, brought, found_once
from evolver.merging.alignment.semantics import token_head


class Realigned(Checkpoint):
    """A model with its hidden units in the order in which they are most like the base's.

    Weights are read when the first tensor or the digest is asked for, not before.

    Args:
        inner: the model.
        base: whose order it gets.
        settings: what is aligned, and how.
        place: the key of the configuration that asks for it.

    Raises BadInput, from headers alone, for a family whose units are not known, and for units that have no partner
    because the two models have different numbers of them.
    """

    def __init__(self, inner: Source, base: Checkpoint, settings: AlignmentSettings, place: str) -> None:
        self.path, self.key = inner.path, inner.key
        self.inner, self.base, self.settings, self.place = inner, base, settings, place
        said = f"{place}: {base.path}"
        self._layers = unit_layers(base.headers, base.config, said)
        self._axes = all_axes(self._layers, base.headers, settings.parts == "all", said)
        self._refuse_other_widths()
        if settings.method == "semantic":
            token_head(base.headers, f"{place}.method")

    @property
    def headers(self) -> dict[str, TensorInfo]:  # the same tensors, read from files there
        return self.base.headers

    @property
    def config(self) -> dict[str, Any]:
        return self.base.config

    @cached_property
    def found(self) -> FoundOrders:
        """The orders, and what was measured."""
        return found_once(self.base, self.inner, self.base.headers, self._layers, self._axes, self.settings)

    def files(self) -> list[Path]:
        return [*self.inner.files(), *self.base.files()]

    def tensor(self, name: str) -> Tensor:
        return brought(name, self.inner.tensor(name), self._axes, self.found.orders)

    def digest(self) -> str:
        """Of the model as it is where no unit moves. Orders count as they are, so that another machine that finds other
        ones has another model; of mixtures, whose last bits depend on the machine, what they were made of counts.
        """
        orders = self.found.orders
        if not orders:
            return self.inner.digest()
        whole = {tag: order for tag, order in orders.items() if order.dim() == 1}
        parts = [self.inner.digest(), digest_of_tensors(sorted(whole.items()))]
        if len(whole) < len(orders):
            parts += [self.base.digest(), self.settings.model_dump_json()]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:20]

    def said(self) -> str:
        """What was measured and done, a sentence for people."""
        figures, which = self.found.figures, f"{self.key} ({self.path})"
        measured = f"the rows of its MLPs have a mean cosine of {figures.cosine:.3f} with the base's"
        if self.settings.when == "different" and figures.cosine >= DIFFERENT_BELOW:
            return f"{which}: {measured}, so it is taken as a fine-tune of the base and its units stay where they are"
        if not self.found.orders:
            return f"{which}: {measured}, and its units match best where they are, so none is moved"
        done = ["its stream is turned"] if self.settings.method == "semantic" else []
        if self.settings.parts != "heads":
            how = "are mixed from others" if self.settings.regularisation > 0 else "are moved"
            done.append(f"{100 * figures.moved:.3g} % of its hidden units {how}")
        if self.settings.parts != "mlp":
            done.append(f"{100 * figures.heads:.3g} % of its attention heads are moved")
        return f"{which}: {measured}; {' and '.join(done)}, and then it is {figures.after:.3f}"

    def _refuse_other_widths(self) -> None:
        theirs: Mapping[str, TensorInfo] = getattr(self.inner, "headers", self.base.headers)
        for name in self._axes:
            if name not in theirs or theirs[name].shape != self.base.headers[name].shape:
                what = f"shape {theirs[name].shape}" if name in theirs else "no such tensor"
                raise BadInput(
                    f"{self.inner.key}: units are matched one to one, and {name} has shape "
                    f"{self.base.headers[name].shape} in {self.base.path} and {what} in "
                    f"{seen_through(self.inner).path}; only models of the same widths are aligned."
                )
