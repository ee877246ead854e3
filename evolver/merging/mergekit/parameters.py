"""Which parameters of a mergekit file count, which mergekit ignores, and which are misspelt."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from evolver.errors import BadInput, nearest
from evolver.merging.methods import METHODS, Method, Setting

# Methods of ours that mergekit has, whose weights it wants to be written.
WEIGHTED = {
    "linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear", "breadcrumbs",
    "breadcrumbs_ties", "nuslerp", "multislerp",
}  # fmt: skip
MERGEKIT_NAMES = WEIGHTED | {
    "slerp", "karcher", "model_stock", "sce", "ram", "ramplus_tl", "nearswap", "arcee_fusion", "passthrough",
}  # fmt: skip
# Settings of ours that mergekit's methods do not have: they must stand at what mergekit does.
OURS = ("elect", "sign", "trim_scope", "filter_wise", "mask_delta")
# They change mergekit's memory, not its result.
SILENT = {"int8_mask"}
# Parameters that no method of ours has as a setting: one that keeps mergekit's divisions away from zero, where ours are
# checked for zero; and one of mergekit's first versions.
OTHERS = {"eps", "embed_slerp"}
# Our method has this setting, mergekit's does not, so that its files do not mean it.
FOREIGN = {("karcher", "weight")}
# A constant of this size is not seen in a result of seven digits.
LARGEST_EPS = 1e-7


def settings_of(method: Method) -> dict[str, Setting]:
    """What a mergekit file can set of a method."""
    return {key: s for key, s in method.settings.items() if (method.name, key) not in FOREIGN}


def unused(method: Method, given: Mapping[str, Any], place: str) -> list[str]:
    """The parameters in ``given`` that are known and do nothing for a method; mergekit ignores them, too.

    Raises BadInput that names ``place`` for one that no method has, with the nearest that this method has.
    """
    mine = settings_of(method)
    found = []
    for key, value in given.items():
        if key in mine or key in SILENT:
            continue
        if (method.name, key) == ("multislerp", "eps"):
            _check_eps(value, place)
        elif method.name in MERGEKIT_NAMES and key in _known():
            found.append(key)
        else:
            raise BadInput(f"{place}: {method.name} has no {key!r}; {nearest(key, {*mine, *SILENT})}")
    return found


def refuse_unweighed(
    method: Method, base: str, own: Mapping[str, Mapping[str, Any]], shared: Mapping[str, Any], file: str
) -> None:  # fmt: skip
    """Raises BadInput where a base model is one more model to merge, and only the listed models have weights; mergekit
    ends with a missing weight, too.

    Args:
        own: the parameters of the listed models.
        shared: those of the whole merge.
    """
    weighed = any("weight" in given for given in own.values())
    if method.name in WEIGHTED and weighed and base not in own and "weight" not in shared:
        raise BadInput(
            f"{file}: base_model: to {method.name}, the base is one more model to merge, here as in mergekit, and "
            "it has no weight; leave base_model out, or list the base under models with a weight, which may be 0."
        )


def warnings_of(method: Method, keys: Iterable[str], file: str) -> tuple[str, ...]:
    """A sentence for each parameter that does nothing."""
    return tuple(
        f"{file}: {key}: the method {method.name} does not use this parameter, which is ignored here as in mergekit."
        for key in dict.fromkeys(keys)
    )


def _known() -> set[str]:
    """The parameters of all methods that mergekit has."""
    of_methods = {key for name in MERGEKIT_NAMES for key in METHODS[name].settings}
    return (of_methods - {*OURS, "seed", "task_vectors"}) | {"filter_wise"} | OTHERS


def _check_eps(value: Any, place: str) -> None:
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value <= LARGEST_EPS:
        raise BadInput(
            f"{place}: eps: {value!r} is not usable; Evolver computes multislerp in float64 without such a constant, "
            f"so leave it out, or write a number from 0 to {LARGEST_EPS:g}, which changes nothing."
        )
