"""LoRA adapters, read as deltas on their base."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from evolver.checkpoints.adapter import CONFIG, Adapter, name_in_class
from evolver.checkpoints.adapter_settings import check_rank, check_settings, check_targets, is_nonlinear, pattern_value
from evolver.checkpoints.formats import model_format
from evolver.checkpoints.peft_layers import LayerAdapter
from evolver.checkpoints.weights import Checkpoint, read_json
from evolver.errors import BadInput

OF_LAYER = ".lora_A."


@dataclass(frozen=True)
class LowRank:
    """A delta B A: the keys of its matrices, its rank, and whether the base holds the transpose."""

    a: str
    b: str
    rank: int
    transposed: bool


class LoraAdapter(Adapter):
    """A PEFT folder, read as base + scale · B A (Hu et al. 2022, equation 3), with rank-stabilised scaling.

    Raises BadInput for adapters that are more than that, naming the reason.
    """

    part = re.compile(r"(.+)(\.lora_[AB]\.weight|\.lora_embedding_[AB])")

    def __init__(self, path: Path, key: str, base: Checkpoint) -> None:
        config = read_json(path / CONFIG, key)
        check_settings(config, path / CONFIG, key)
        self._pairs: Mapping[str, LowRank]
        super().__init__(path, key, base, config)
        self._check_pairs()

    def _read_changes(self) -> None:
        self._pairs = self._find_pairs()

    def _changed_tensors(self) -> Mapping[str, LowRank]:
        return self._pairs

    def _changed(self, name: str, start: Tensor) -> Tensor:
        pair = self._pairs[name]
        a, b = (self._handle.get_tensor(k).float() for k in (pair.a, pair.b))
        delta: Tensor = self._scale(name, pair.rank) * (b @ a)
        return start + (delta.T if pair.transposed else delta)

    def _add_changes(self, sha: Any) -> None:
        for name, pair in sorted(self._pairs.items()):
            sha.update(f"{name} {self._scale(name, pair.rank)!r} {pair.transposed}\n".encode())
            self._add(pair.a, sha)
            self._add(pair.b, sha)

    def _check_pairs(self) -> None:
        """Check the matrices against the adapter's configuration."""
        modules = {self._layer(name): pair.rank for name, pair in self._pairs.items()}
        for module, rank in modules.items():
            check_rank(self.config, module, rank, self.path / CONFIG, self.key)
        check_targets(self.config, modules, self.path / CONFIG, self.key)

    def _find_pairs(self) -> dict[str, LowRank]:
        """The low-rank deltas by the name of the tensor that they change."""
        found: dict[str, tuple[str, str]] = {}
        for key in self._shapes:
            match = self.part.fullmatch(key)
            if match and not self._is_tied_twin(f"{match[1]}.weight"):
                pair = (match[1] + match[2].replace("B", "A"), match[1] + match[2].replace("A", "B"))
                if not set(pair) <= self._shapes.keys():
                    raise BadInput(
                        f"{self.key}: the adapter {self.path} holds {key} without the other matrix of its pair; copy "
                        "the adapter again."
                    )
                found[self._name(f"{match[1]}.weight")] = pair
        if not found:
            raise BadInput(f"{self.key}: the adapter {self.path} holds no LoRA matrices.")
        ways = {n: self._orientations(n, a, b) for n, (a, b) in found.items()}
        # PEFT writes down the orientation of the layer that it met last, so one that shows by its shape says more.
        square = bool(self.config.get("fan_in_fan_out")) or any(
            w == {True} and OF_LAYER in found[n][0] for n, w in ways.items()
        )
        return {
            n: LowRank(a, b, self._shapes[a][0], square if len(ways[n]) == 2 else True in ways[n])
            for n, (a, b) in found.items()
        }

    def _orientations(self, name: str, a: str, b: str) -> set[bool]:
        """Which of B A (False) and its transpose (True) has the shape of the base's tensor."""
        first, second = self._shapes[a], self._shapes[b]
        delta = (*second[:1], *first[1:])
        if name not in self.base.headers or second[1:] != first[:1]:
            raise self._misfit(name, delta)
        possible = (False, True) if OF_LAYER in a else (True,)  # the matrices of embeddings are always transposed
        ways = {way for way in possible if self.base.headers[name].shape == (delta[::-1] if way else delta)}
        if not ways:
            raise self._misfit(name, delta)
        return ways

    def _layer(self, name: str) -> str:
        """The layer of a tensor as the model's class calls it, and so the adapter's settings."""
        return name_in_class(self.part.sub(r"\1", self._pairs[name].a))

    def _scale(self, name: str, rank: int) -> float:
        alpha = pattern_value(self.config.get("alpha_pattern"), self._layer(name), self.config.get("lora_alpha", 8))
        return float(alpha) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


@model_format("lora", lambda path: (path / CONFIG).exists(), delta=True)
def open_adapter(path: Path, key: str, base: Checkpoint, headless: bool) -> Adapter:
    """The adapter in a folder; the base says whether there are heads.

    Raises BadInput, see ``LoraAdapter`` and ``LayerAdapter``.
    """
    nonlinear = is_nonlinear(read_json(path / CONFIG, key))
    return (LayerAdapter if nonlinear else LoraAdapter)(path, key, base)
