"""Adapters whose change is more than a low-rank delta (DoRA, LoHa, LoKr, IA³, AdaLoRA, OFT, BOFT, VeRA, biases of
LoRA), computed by PEFT itself.

PEFT gets one layer of the base at a time, so that memory stays small, and so that no class of a model is needed.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import math
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
    "LORA": ("LoraConfig", ("r", "lora_alpha", "use_rslora", "fan_in_fan_out", "use_dora", *PATTERNS, "lora_bias")),
    "LOHA": ("LoHaConfig", ("r", "alpha", "use_effective_conv2d", *PATTERNS)),
    "LOKR": ("LoKrConfig", ("r", "alpha", "use_effective_conv2d", "decompose_both", "decompose_factor", *PATTERNS)),
    "IA3": ("IA3Config", ("fan_in_fan_out",)),
    "ADALORA": ("AdaLoraConfig", ("init_r", "lora_alpha", "fan_in_fan_out", "rank_pattern")),
    "OFT": ("OFTConfig", ("r", "oft_block_size", "fan_in_fan_out", "coft", "eps", "block_share", "use_cayley_neumann",
                          "num_cayley_neumann_terms")),
    "BOFT": ("BOFTConfig", ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor", "fan_in_fan_out")),
    "VERA": ("VeraConfig", ("r", "projection_prng_key", "save_projection", "fan_in_fan_out")),
}  # fmt: skip
# Settings that are younger than digests of adapters without them.
YOUNGER = ("lora_bias",)
OF_AN_ADAPTER = re.compile(r"\.(lora|hada|lokr|ia3|vera_lambda|oft|boft)_")
# Kinds of which PEFT looks at values as it makes layers.
NEED_VALUES = ("ADALORA", "VERA")
# The two matrices that all layers of VeRA share, as a file calls them.
PROJECTIONS = ("base_model.vera_A", "base_model.vera_B")
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

    part = re.compile(r"(.+)\.((?:lora|hada|lokr|ia3|vera|oft|boft)_\w+(?:\.\w+)?)")

    def __init__(self, path: Path, key: str, base: Checkpoint) -> None:
        config = read_json(path / CONFIG, key)
        check_settings(config, path / CONFIG, key)
        self.kind = str(config.get("peft_type", "LORA"))
        if importlib.util.find_spec("peft") is None:
            raise BadInput(f"{key}: PEFT reads the adapter {path} ({self.kind}); run pip install 'evolver[experts]'.")
        self._layers: dict[str, WrappedLayer]
        self._asked = set[str]()
        self._projections = dict[str, Tensor]()
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
            match = self.part.fullmatch(key) if key not in PROJECTIONS else None
            if match and not self._is_tied_twin(f"{match[1]}.weight"):
                keys[name_in_class(match[1])].append(key)
        if not keys:
            raise BadInput(f"{self.key}: the adapter {self.path} holds no tensors of the kind {self.kind}.")
        layers = [self._layer(path, tuple(of_layer)) for path, of_layer in keys.items()]
        self._layers = {layer.weight: layer for layer in layers}
        if self.config.get("lora_bias"):
            self._check_biases(layers)
        if self.kind == "IA3" or self.config.get("lora_bias"):  # it scales what a layer puts out, its bias as well
            self._layers |= {layer.bias: layer for layer in layers if layer.bias is not None}

    def _check_biases(self, layers: Sequence[WrappedLayer]) -> None:
        """Raises BadInput for a bias that the merged layer has no place for."""
        for layer in layers:
            if layer.bias is None:
                raise BadInput(
                    f"{self.key}: the adapter {self.path} trains a bias for {layer.path} (lora_bias), where the model "
                    f"{self.base.path} has none, so that no merged model can hold it; train it again with lora_bias: "
                    "false."
                )

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
        state = {key: self._handle.get_tensor(key).float() for key in layer.keys} | self._of_projections(layer)
        with ONE_AT_A_TIME:
            merged = self._wrapped([layer], own, state).merge_and_unload().get_submodule(layer.path)
        found: Tensor = (merged.weight if name == layer.weight else merged.bias).detach()
        return found

    def _of_projections(self, layer: WrappedLayer) -> dict[str, Tensor]:
        """The parts of the shared matrices that one layer uses."""
        if not self._projections:
            return {}
        a, b = (self._projections[name] for name in PROJECTIONS)
        rows = next(self._shapes[key][0] for key in layer.keys if key.endswith("lambda_b"))
        columns = math.prod(self.base.headers[layer.weight].shape) // rows
        return dict(zip(PROJECTIONS, (a[:, :columns].contiguous(), b[:rows].contiguous()), strict=True))

    def _add_changes(self, sha: Any) -> None:
        known = KINDS_OF_PEFT[self.kind][1]
        settings = {k: self.config.get(k) for k in known if k not in YOUNGER or self.config.get(k)}
        sha.update(f"{self.kind} {json.dumps(settings, sort_keys=True)}\n".encode())
        for name, layer in sorted(self._layers.items()):
            for key in layer.keys:
                sha.update(f"{name} {key.rpartition(layer.path)[2]}\n".encode())
                self._add(key, sha)
        for key in PROJECTIONS if self.kind == "VERA" and self.config.get("save_projection", True) else ():
            self._add(key, sha)

    def _check_fit(self) -> None:
        """Let PEFT put the adapter onto layers without values, or of one value where it asks for some."""
        layers, shared = set(self._layers.values()), PROJECTIONS if self.config.get("save_projection", True) else ()
        keys = [key for layer in layers for key in layer.keys]
        if self.kind == "VERA":
            if lacking := [key for key in shared if key not in self._shapes]:
                raise self._unfit(f"only one of the two has {lacking[0]}")
            keys += shared
        names = [n for layer in layers for n in (layer.weight, layer.bias) if n]
        with torch.device("cpu" if self.kind in NEED_VALUES else "meta"):
            own = {n: torch.zeros(1).expand(self.base.headers[n].shape) for n in names}
            state = {key: torch.zeros(self._shapes[key]) for key in keys}
        model = self._wrapped(sorted(layers, key=lambda layer: layer.path), own, state)
        if self.kind == "VERA":
            self._projections = self._read_projections(model)

    def _read_projections(self, model: Any) -> dict[str, Tensor]:
        """The shared matrices of VeRA: those of the file, or those that PEFT draws for the sizes of all layers."""
        if self.config.get("save_projection", True):
            return {key: self._handle.get_tensor(key).float() for key in PROJECTIONS}
        return {key: getattr(model.base_model, key.rpartition(".")[2])["default"].float() for key in PROJECTIONS}

    def _wrapped(self, layers: Sequence[WrappedLayer], own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> Any:
        """PEFT's model of a few layers with the adapter.

        Args:
            own: weights and biases of the layers by the base's name.
            state: tensors of the adapter.

        Raises BadInput where the adapter does not fit.
        """
        import peft

        parts = {k if k in PROJECTIONS else f"base_model.model.{name_in_class(k)}": t for k, t in state.items()}
        lazy = self.kind != "ADALORA"  # which cuts its matrices off as they are loaded
        try:
            with ONE_AT_A_TIME, torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of models that PEFT takes for incomplete
                plain = {layer.path: self._plain_layer(layer, own) for layer in layers}
                model = peft.get_peft_model(_tree(plain), self._settings(layers), low_cpu_mem_usage=lazy)
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
        if self.kind == "ADALORA":  # without a schedule, as of training
            paths = {layer.path for layer in layers}
            masks = {n: m for n, m in (given.get("rank_pattern") or {}).items() if n.partition(".lora_E")[0] in paths}
            given |= {"rank_pattern": masks or None, "inference_mode": True, "total_step": 1}
        if self._projections:
            given["save_projection"] = True
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
