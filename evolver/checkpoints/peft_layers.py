"""Adapters whose change is more than a low-rank delta (DoRA, LoHa, LoKr, IA³), computed by PEFT itself.

PEFT gets one layer of the base at a time, so that memory stays small, and so that no class of a model is needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import threading
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evolver.checkpoints.adapter import CONFIG, Adapter, name_in_class
from evolver.checkpoints.adapter_settings import check_settings, check_targets
from evolver.checkpoints.lora_out import is_transposed
from evolver.checkpoints.made_once import MadeTensors, made_once
from evolver.checkpoints.weights import HEAD, Checkpoint, read_json
from evolver.errors import BadInput

# The class of PEFT for each kind's configuration, and the settings of it that decide what a layer becomes.
PATTERNS = ("rank_pattern", "alpha_pattern")
KINDS_OF_PEFT: dict[str, tuple[str, tuple[str, ...]]] = {
    "LORA": ("LoraConfig", ("r", "lora_alpha", "use_rslora", "fan_in_fan_out", "use_dora", *PATTERNS)),
    "LOHA": ("LoHaConfig", ("r", "alpha", "use_effective_conv2d", *PATTERNS)),
    "LOKR": ("LoKrConfig", ("r", "alpha", "use_effective_conv2d", "decompose_both", "decompose_factor", *PATTERNS)),
    "IA3": ("IA3Config", ("fan_in_fan_out",)),
}
OF_AN_ADAPTER = re.compile(r"\.(lora|hada|lokr|ia3)_")
# PEFT draws first values for a layer, although the adapter's own take their place, so the state of torch's random
# numbers is put back. And while it makes a layer without values, every module that is made anywhere in the process gets
# none: a layer that another thread is merging would have no memory. So one thread makes and merges layers at a time.
ONE_AT_A_TIME = threading.RLock()


@dataclass(frozen=True)
class WrappedLayer:
    """A layer that an adapter changes.

    Attributes:
        path: its name in the model's class.
        keys: of the adapter's tensors for it.
        weight: the base's name of its weight.
        bias: the base's name of its bias; None: it has none.
    """

    path: str
    keys: tuple[str, ...]
    weight: str
    bias: str | None


class LayerAdapter(Adapter):
    """A PEFT folder, read as what ``merge_and_unload`` makes of it, in float32 and rounded once.

    Raises BadInput where PEFT is missing, and where it cannot put the adapter onto the base's layers.
    """

    part = re.compile(r"(.+)\.((?:lora|hada|lokr|ia3)_\w+(?:\.\w+)?)")

    def __init__(self, path: Path, key: str, base: Checkpoint) -> None:
        config = read_json(path / CONFIG, key)
        check_settings(config, path / CONFIG, key)
        self.kind = str(config.get("peft_type", "LORA"))
        if importlib.util.find_spec("peft") is None:
            raise BadInput(f"{key}: PEFT reads the adapter {path} ({self.kind}); run pip install 'evolver[experts]'.")
        self._layers: dict[str, WrappedLayer]
        self._asked = set[str]()
        super().__init__(path, key, base, config)
        check_targets(config, [layer.path for layer in self._layers.values()], path / CONFIG, key)
        self._check_fit()

    def tensor(self, name: str) -> Tensor:
        if name in self._asked and (made := self._made.get(name)) is not None:
            return made
        if name in self._layers:
            self._asked.add(name)
        return super().tensor(name)

    @cached_property
    def _made(self) -> MadeTensors:
        """What PEFT makes of all layers. A search asks for a tensor with every candidate, and PEFT is slow."""
        names = sorted(self._layers)
        identity = json.dumps([self.digest(), names, importlib.metadata.version("peft")])
        infos = {name: self.base.headers[name] for name in names}
        return made_once(identity, infos, ((name, super(LayerAdapter, self).tensor(name)) for name in names))

    def _read_changes(self) -> None:
        keys: dict[str, list[str]] = defaultdict(list)
        for key in self._shapes:
            match = self.part.fullmatch(key)
            if match and not self._is_tied_twin(f"{match[1]}.weight"):
                keys[name_in_class(match[1])].append(key)
        if not keys:
            raise BadInput(f"{self.key}: the adapter {self.path} holds no tensors of the kind {self.kind}.")
        layers = [self._layer(path, tuple(of_layer)) for path, of_layer in keys.items()]
        self._layers = {layer.weight: layer for layer in layers}
        if self.kind == "IA3":  # it scales what a layer puts out, its bias as well
            self._layers |= {layer.bias: layer for layer in layers if layer.bias is not None}

    def _layer(self, path: str, keys: tuple[str, ...]) -> WrappedLayer:
        weight, bias = (self._name(f"{path}.{part}") for part in ("weight", "bias"))
        if weight not in self.base.headers:
            raise self._misfit(weight, self._shapes[keys[0]])
        return WrappedLayer(path, keys, weight, bias if bias in self.base.headers else None)

    def _changed_tensors(self) -> Mapping[str, WrappedLayer]:
        return self._layers

    def _changed(self, name: str, start: Tensor) -> Tensor:
        layer = self._layers[name]
        others = {n: self.base.tensor(n) for n in (layer.weight, layer.bias) if n is not None and n != name}
        # PEFT changes tensors in place, and these may be the file itself, mapped into memory.
        own = {n: t.to(torch.float32, copy=True) for n, t in {**others, name: start}.items()}
        state = {key: self._handle.get_tensor(key).float() for key in layer.keys}
        with ONE_AT_A_TIME:
            merged = self._wrapped([layer], own, state).merge_and_unload().get_submodule(layer.path)
        found: Tensor = (merged.weight if name == layer.weight else merged.bias).detach()
        return found

    def _add_changes(self, sha: Any) -> None:
        settings = {k: self.config.get(k) for k in KINDS_OF_PEFT[self.kind][1]}
        sha.update(f"{self.kind} {json.dumps(settings, sort_keys=True)}\n".encode())
        for name, layer in sorted(self._layers.items()):
            for key in layer.keys:
                sha.update(f"{name} {key.rpartition(layer.path)[2]}\n".encode())
                self._add(key, sha)

    def _check_fit(self) -> None:
        """Let PEFT put the adapter onto layers without values."""
        layers = set(self._layers.values())
        with torch.device("meta"):
            own = {n: torch.empty(self.base.headers[n].shape) for la in layers for n in (la.weight, la.bias) if n}
            state = {key: torch.empty(self._shapes[key]) for layer in layers for key in layer.keys}
        self._wrapped(sorted(layers, key=lambda layer: layer.path), own, state)

    def _wrapped(self, layers: Sequence[WrappedLayer], own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Any:
        """PEFT's model of a few layers with the adapter.

        Args:
            own: weights and biases of the layers by the base's name.
            state: tensors of the adapter.

        Raises BadInput where the adapter does not fit.
        """
        import peft

        parts = {f"base_model.model.{name_in_class(key)}": tensor for key, tensor in state.items()}
        try:
            with ONE_AT_A_TIME, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of models that PEFT takes for incomplete
                plain = {layer.path: self._plain_layer(layer, own) for layer in layers}
                model = peft.get_peft_model(_tree(plain), self._settings(layers), low_cpu_mem_usage=True)
                found: Any = peft.set_peft_model_state_dict(model, parts, low_cpu_mem_usage=True)
        except (RuntimeError, ValueError, TypeError, LookupError) as error:
            raise self._unfit(" ".join(str(error).split())[:200]) from error
        if strange := [*found.unexpected_keys, *(k for k in found.missing_keys if OF_AN_ADAPTER.search(k))]:
            raise self._unfit(f"only one of the two has {strange[0]}")
        return model

    def _unfit(self, reason: str) -> BadInput:
        return BadInput(
            f"{self.key}: PEFT cannot put the adapter {self.path} onto the base {self.base.path} ({reason}); give the "
            "base that it was trained on."
        )

    def _settings(self, layers: Sequence[WrappedLayer]) -> Any:
        """PEFT's configuration with the settings that count, for layers by their full names."""
        import peft

        kind, names = KINDS_OF_PEFT[self.kind]
        given = {n: self.config[n] for n in names if self.config.get(n) is not None}
        if self.kind == "IA3":  # a row scales what comes into a layer, a column what goes out
            given["feedforward_modules"] = [la.path for la in layers if self._shapes[la.keys[0]][0] == 1]
        return getattr(peft, kind)(target_modules=[layer.path for layer in layers], **given)

    def _plain_layer(self, layer: WrappedLayer, own: Mapping[str, Tensor]) -> nn.Module:
        """The layer as PEFT expects it in a model, by the shape of its weight."""
        from transformers.pytorch_utils import Conv1D

        weight, bias = own[layer.weight], None if layer.bias is None else own[layer.bias]
        rows, columns, *kernel = weight.shape
        with torch.device("meta"):
            if any("lora_embedding_" in key for key in layer.keys):
                made: nn.Module = nn.Embedding(rows, columns)
            elif kernel:
                kinds: tuple[Any, ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
                made = kinds[len(kernel) - 1](columns, rows, tuple(kernel), bias=bias is not None)
            elif is_transposed(self.base.config) and not layer.weight.endswith(HEAD):
                made = Conv1D(columns, rows)
            else:
                made = nn.Linear(columns, rows, bias=bias is not None)
        made.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            made.bias = nn.Parameter(bias, requires_grad=False)
        return made


def _tree(layers: Mapping[str, nn.Module]) -> nn.Module:
    """A module with layers at these places."""
    root = nn.Module()
    for path, layer in layers.items():
        *above, last = path.split(".")
        at = root
        for step in above:
            if step not in at._modules:
                at.add_module(step, nn.Module())
            at = at.get_submodule(step)
        at.add_module(last, layer)
    return root
