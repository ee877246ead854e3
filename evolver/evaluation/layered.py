"""A live model with other layers: fewer, more, repeated, without loading anything again.

Transformers builds the modules of the other depth on the device ``meta``, which takes no memory and gives every layer
its number, its kind of attention and its masks as in a model that is loaded from a folder. Its parameters are then
those of the live model. A layer that stands in several places is several modules that hold the same parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from evolver.evaluation.depth import changed_settings
from evolver.records.depth import LayerOrigin
from evolver.records.recipe import at_layer, layer_of


class LayerMemory:
    """The parameters of a model's layers, and modules of any depth that hold them.

    Layers are alike, so each one that has other weights than those before it takes the parameters of the next layer of
    the loaded model. Where a model has more of such layers than the loaded one, parameters are added, and kept.

    Args:
        module: the loaded model. It stays the same object whatever layers it has.
    """

    def __init__(self, module: Any) -> None:
        self._module = module
        self._loaded: dict[str, Any] = module.__dict__
        self._own = dict(module.named_modules())
        self._tensors = {**_named(self._own, "_parameters"), **_named(self._own, "_buffers")}
        self._kept = set(module.state_dict())
        self._shape: tuple[Any, ...] = ()
        self.slots: tuple[int, ...] = ()

    def take(self, origins: Sequence[LayerOrigin]) -> None:
        """Give the module the layers of a model. ``slots`` says then which parameters each layer has.

        Raises ValueError where Transformers builds such a model of other tensors.
        """
        number = {origin: k for k, origin in enumerate(dict.fromkeys((o.model, o.layer) for o in origins))}
        slots = tuple(number[origin.model, origin.layer] for origin in origins)
        layers = tuple(origin.base for origin in origins)
        if (layers, slots) != self._shape:
            self._module.__dict__ = self._built(layers, slots).__dict__
            self._shape, self.slots = (layers, slots), slots

    def give_back(self) -> None:
        """Give the module the layers that were loaded."""
        self._module.__dict__ = self._loaded
        self._shape, self.slots = (), ()

    def place(self, path: str, slot: int) -> Tensor:
        """The parameter or buffer of a layer's slot; ``path`` is its name in any layer of the loaded model."""
        wanted = at_layer(path, slot)
        if wanted not in self._tensors:
            old = self._tensors[at_layer(path, 0)]
            new = torch.empty_like(old)
            self._tensors[wanted] = nn.Parameter(new, requires_grad=False) if isinstance(old, nn.Parameter) else new
        return self._tensors[wanted]

    def _built(self, layers: Sequence[int], slots: Sequence[int]) -> Any:
        """A module with these layers, on the parameters of the loaded one."""
        loaded = self._loaded
        config = copy.deepcopy(loaded["config"])
        for key, value in changed_settings(config.to_dict(), layers).items():
            setattr(config, key, value)
        with torch.device("meta"):
            made = type(self._module)._from_config(
                config, dtype=self._module.dtype, attn_implementation=loaded["config"]._attn_implementation
            )
        for path, module in made.named_modules():
            self._fill(module, path, layers, slots)
        for name in loaded.keys() - made.__dict__.keys() | {"tie_weights", "generation_config"} & loaded.keys():
            made.__dict__[name] = loaded[name]
        return made.eval()

    def _fill(self, module: nn.Module, path: str, layers: Sequence[int], slots: Sequence[int]) -> None:
        """Put the loaded model's tensors in the place of those without memory."""
        layer = layer_of(f"{path}.")
        kinds: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for tensors in kinds:
            for leaf, empty in tensors.items():
                name = f"{path}.{leaf}" if path else leaf
                if empty is None:
                    continue
                if layer is None:
                    found = self._tensors.get(name)
                elif at_layer(name, 0) in self._kept or tensors is kinds[0]:
                    found = self.place(name, slots[layer]) if at_layer(name, 0) in self._tensors else None
                else:  # made by the class and by the kind of the layer, such as a mask
                    found = self._tensors.get(at_layer(name, layers[layer]))
                if found is None or (layer is not None and found.shape != empty.shape):
                    raise ValueError(f"Transformers builds a model of {len(layers)} layers with another tensor {name}")
                tensors[leaf] = found
        twin = self._own.get(path if layer is None else at_layer(f"{path}.", layers[layer])[:-1])
        for name, value in list(module.__dict__.items()):
            if isinstance(value, Tensor) and value.is_meta and twin is not None:
                module.__dict__[name] = twin.__dict__[name]


def _named(modules: Mapping[str, nn.Module], kind: str) -> dict[str, Tensor]:
    """The parameters or the buffers by all of their names."""
    found: Iterable[tuple[str, str, Tensor | None]] = (
        (path, leaf, tensor) for path, module in modules.items() for leaf, tensor in getattr(module, kind).items()
    )
    return {f"{path}.{leaf}" if path else leaf: tensor for path, leaf, tensor in found if tensor is not None}
