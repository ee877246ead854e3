"""Parameters that Transformers makes of many stored tensors, and the slice of one that each stored tensor is.

Published mixtures of experts hold one tensor for each expert. Transformers stacks those of a layer into one parameter
as it loads them, after it has put two projections of an expert into one. A stored tensor is then a slice of the
parameter, and can be written there without the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from evolver.errors import BadInput

TensorShape = tuple[int, ...]
# The operations of Transformers that are understood, in the order in which it does them.
STACK, JOIN = "MergeModulelist", "Concatenate"
UNDERSTOOD = ((STACK,), (JOIN,), (STACK, JOIN))


@dataclass(frozen=True)
class ParameterSlice:
    """The slice of a parameter that a stored tensor is.

    Attributes:
        parameter: its name in the model.
        joined: dimension, start and length, where the parameter is several tensors put behind each other; else None.
        stacked: dimension and index, where it is several tensors on top of each other; else None.
    """

    parameter: str
    joined: tuple[int, int, int] | None = None
    stacked: tuple[int, int] | None = None

    def within(self, parameter: Tensor) -> Tensor:
        """The slice, which shares the memory of the parameter."""
        found = parameter if self.joined is None else parameter.narrow(*self.joined)
        return found if self.stacked is None else found.select(*self.stacked)


def slices_of(module: Any, shapes: Mapping[str, TensorShape], folder: Path) -> dict[str, ParameterSlice]:
    """The slices that tensors of a checkpoint are of parameters of a Transformers model; tensors that Transformers only
    renames are left out.

    Args:
        shapes: of all tensors of the checkpoint, by name.
        folder: of the checkpoint, for messages.

    Raises BadInput where the tensors do not fill a parameter wholly, and for other conversions than the ones above.
    """
    state, slices = module.state_dict(keep_vars=False), dict[str, ParameterSlice]()
    for target, (converter, names) in _collected(module, shapes, state).items():
        kinds = tuple(type(operation).__name__ for operation in converter.operations)
        if kinds not in UNDERSTOOD or len(converter.target_patterns) > 1:
            some = min(name for group in names.values() for name in group)
            raise BadInput(
                f"model.base: Transformers converts {some} of {folder} as it loads it ({', '.join(kinds)}), which a "
                "search cannot do for each candidate; such models can only be merged with evolver merge."
            )
        groups = [names.get(pattern, []) for pattern in converter.source_patterns]
        dims = dict(zip(kinds, (operation.dim for operation in converter.operations), strict=True))
        slices.update(_placed(target, tuple(state[target].shape), groups, dims, shapes, folder))
    return slices


def refuse_experts(module: Any, where: str) -> None:
    """Raises BadInput for a model whose experts are no linear layers, whose inputs can therefore not be heard.

    Args:
        where: the key of the configuration that asks for inputs.
    """
    for path, owner in module.named_modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.ndim == 3 and "expert" in f"{path} {type(owner).__name__}".lower():
                raise BadInput(
                    f"{where}: {type(module).__name__} computes all experts of a layer in one step ({path}.{name}), "
                    "so the inputs of each cannot be collected; choose a merge method without statistics."
                )


def _collected(
    module: Any, names: Iterable[str], state: dict[str, Tensor]
) -> dict[str, tuple[Any, dict[str, list[str]]]]:
    """The converter of each parameter that is made by one, and the stored names by the converter's source patterns, in
    the order in which Transformers collects them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        dot_natural_key,
        rename_source_key,
    )

    known = get_model_conversion_mapping(module) or []
    renamings = [t for t in known if isinstance(t, WeightRenaming)]
    converters = [t for t in known if isinstance(t, WeightConverter)]
    owner = {pattern: c for c in converters for pattern in c.source_patterns}
    out: dict[str, tuple[Any, dict[str, list[str]]]] = {}
    if not converters:
        return out
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, module.base_model_prefix, state)
        if pattern is not None and target in state:
            _, found = out.setdefault(target, (owner[pattern], defaultdict(list)))
            found[pattern].append(name)
    return out


def _placed(
    target: str, whole: TensorShape, groups: Sequence[Sequence[str]], dims: Mapping[str, int],
    shapes: Mapping[str, TensorShape], folder: Path,
) -> dict[str, ParameterSlice]:  # fmt: skip
    """The slices of one parameter.

    Args:
        whole: the parameter's shape.
        groups: stored names, those of one source pattern together.
        dims: the dimension of each operation.
    """
    stack, join = dims.get(STACK), dims.get(JOIN)
    count = 1 if stack is None else whole[stack]
    if stack is None:  # tensors put behind each other are no stacks of one
        groups = [[name] for group in groups for name in group]
    again = f"model.base: {folder} holds {sum(map(len, groups))} tensors for {target}, "
    if any(len(group) != count for group in groups):
        raise BadInput(
            f"{again}and by its config.json there are {count * len(groups)}; copy the model again, with its own "
            "config.json."
        )
    out, start = dict[str, ParameterSlice](), 0
    for group in groups:
        length = 0 if join is None else sum(_stacked(shapes[group[0]], stack, count)[join : join + 1])
        joined = None if join is None else (join, start, length)
        expected = whole if join is None else (*whole[:join], length, *whole[join + 1 :])
        for index, name in enumerate(group):
            if _stacked(shapes[name], stack, count) != expected:
                raise BadInput(
                    f"model.base: {folder} holds {name} of shape {shapes[name]}, which is no part of {target}: by its "
                    f"config.json that has the shape {whole}; copy config.json from the model that the weights belong "
                    "to."
                )
            out[name] = ParameterSlice(target, joined, None if stack is None else (stack, index))
        start += length
    if join is not None and start != whole[join]:
        raise BadInput(
            f"{again}which do not fill the shape {whole} that its config.json says; copy the model again, with its own "
            "config.json."
        )
    return out


def _stacked(shape: TensorShape, dim: int | None, count: int) -> TensorShape:
    """The shape of so many tensors on top of each other; ``dim`` None: of the one tensor."""
    return shape if dim is None else (*shape[:dim], count, *shape[dim:])
