"""The configuration of an adapter (``adapter_config.json``), checked by itself and against its tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from evolver.errors import BadInput

# PEFT's words for all linear layers.
ALL_LINEAR = "all-linear"
# The kinds of adapters that are read. All of them change one layer at a time, by its own tensors.
KINDS = ("LORA", "LOHA", "LOKR", "IA3", "ADALORA", "OFT", "BOFT", "VERA")
# The release of PEFT from which on rotations are computed as they are now, with this approximation of them.
NEUMANN_SINCE = (0, 18)
# Options of LoRA with which a layer's change is not made of its own tensors, or not made of the base's.
NOT_OF_A_LAYER = (
    "use_qalora", "use_bdlora", "kasa_config", "monteclora_config", "arrow_config",
    "alora_invocation_tokens", "layer_replication", "target_parameters", "trainable_token_indices",
)  # fmt: skip
# Beginnings of training that change the base itself.
MOVES_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def check_settings(config: Mapping[str, Any], file: Path, key: str) -> None:
    """Check the settings that decide what an adapter adds to its base.

    Raises BadInput that names ``key``, the file and the setting for a kind of adapter that is not read, and for a value
    of a wrong type or outside its range.
    """
    _check_kind(config, file, key)
    wanted = {
        "r": (_is_rank, "an integer from 1"), "lora_alpha": (_is_number, "a number"), "alpha": (_is_number, "a number"),
        "use_dora": (_is_switch, "true or false"),
        "use_rslora": (_is_switch, "true or false"), "fan_in_fan_out": (_is_switch, "true or false"),
        "ensure_weight_tying": (_is_switch, "true or false"),
        "rank_pattern": (lambda v: _is_pattern(v, _is_rank), "a mapping from names of modules to integers from 1"),
        "lora_bias": (_is_switch, "true or false"), "save_projection": (_is_switch, "true or false"),
        "init_r": (_is_rank, "an integer from 1"),
        "alpha_pattern": (lambda v: _is_pattern(v, _is_number), "a mapping from names of modules to numbers"),
        "target_modules": (_is_names, "a text or a list of names of modules"),
        "modules_to_save": (_is_names, "a list of names of modules"),
    }  # fmt: skip
    if config.get("peft_type") == "ADALORA":
        wanted["rank_pattern"] = (lambda v: _is_pattern(v, _is_mask), "a mapping from names to lists of true and false")
    if config.get("peft_type") == "OFT":
        wanted["r"] = (lambda v: v == 0 or _is_rank(v), "an integer from 0")
    for name, (usable, words) in wanted.items():
        value = config.get(name)
        if value is not None and not usable(value):
            raise BadInput(f"{key}: {file}: {name}: {_short(value)} is not usable; it has to be {words}.")
    for name in ("rank_pattern", "alpha_pattern", "target_modules"):
        for pattern in [config[name]] if isinstance(config.get(name), str) else config.get(name) or ():
            _check_pattern(pattern, f"{key}: {file}: {name}")


def is_nonlinear(config: Mapping[str, Any]) -> bool:
    """Whether an adapter changes a layer otherwise than by adding B A, so that PEFT has to compute the change."""
    return config.get("peft_type", "LORA") != "LORA" or bool(config.get("use_dora") or config.get("lora_bias"))


def _check_kind(config: Mapping[str, Any], file: Path, key: str) -> None:
    kind = config.get("peft_type", "LORA")
    if kind not in KINDS:
        raise BadInput(
            f"{key}: {file} is of an adapter of the kind {_short(kind)} (peft_type), and only {', '.join(KINDS)} are "
            "read; merge it into its base with PEFT (merge_and_unload) and give that folder."
        )
    if kind == "OFT" and (reason := _old_rotations(config)):
        raise BadInput(
            f"{key}: the adapter {file.parent} was trained with a release of PEFT before {reason}, which computed "
            "rotations in another way; merge it into its base with that release (merge_and_unload) and give that "
            "folder."
        )
    used = [o for o in NOT_OF_A_LAYER if config.get(o)]
    start = str(config.get("init_lora_weights"))
    if used or start.lower().startswith(MOVES_THE_BASE):
        raise BadInput(
            f"{key}: the adapter {file.parent} uses {[*used, start][0]}, which changes more than single layers of the "
            "base; merge it into its base with PEFT (merge_and_unload) and give that folder."
        )


def _old_rotations(config: Mapping[str, Any]) -> str:
    """The release of PEFT before which an adapter of rotations was trained, if it cannot be read as it was meant."""
    if "oft_block_size" not in config:
        return "0.14"
    release = tuple(int(n) for n in re.findall(r"\d+", str(config.get("peft_version") or "0.0"))[:2])
    return "0.18" if config.get("use_cayley_neumann") and release < NEUMANN_SINCE else ""


def check_rank(config: Mapping[str, Any], module: str, rank: int, file: Path, key: str) -> None:
    """Raises BadInput where the matrices of a module have another rank than the configuration says.

    The scale of a delta is alpha / r. PEFT refuses to load such an adapter, since its matrices do not fit.
    """
    said = pattern_value(config.get("rank_pattern"), module, config.get("r"))
    if said is not None and said != rank:
        raise BadInput(
            f"{key}: {file} says r = {said} for {module}, and its matrices there have the rank {rank}; copy the file "
            "from the training that wrote the weights."
        )


def check_targets(config: Mapping[str, Any], modules: Iterable[str], file: Path, key: str) -> None:
    """Raises BadInput for matrices of a module that the configuration does not name as a target.

    PEFT makes no place for them, so that it would leave them out; here they would count, which is another model. Names
    of targets for which there are no matrices are allowed: PEFT leaves these modules as they are in the base.
    """
    targets = config.get("target_modules")
    if targets is None or targets == ALL_LINEAR:
        return
    for module in modules:
        if not _is_target(module, targets):
            raise BadInput(
                f"{key}: the adapter holds matrices for {module}, which target_modules in {file} does not name; copy "
                "the file from the training that wrote the weights."
            )


def pattern_value(patterns: Mapping[str, Any] | None, module: str, default: Any) -> Any:
    """PEFT's rule: a pattern is for every module whose dotted name ends in it."""
    for pattern, value in (patterns or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            return value
    return default


def _is_target(module: str, targets: str | list[str]) -> bool:
    if isinstance(targets, str):
        return re.fullmatch(targets, module) is not None
    return any(module == target or module.endswith(f".{target}") for target in targets)


def _check_pattern(pattern: str, place: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise BadInput(f"{place}: {_short(pattern)} is no regular expression ({error}); correct it.") from error


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_mask(value: Any) -> bool:
    return isinstance(value, list) and all(map(_is_switch, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300  # NaN is not below


def _is_switch(value: Any) -> bool:
    return isinstance(value, bool)


def _is_names(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(v, str) for v in value))


def _is_pattern(value: Any, usable: Any) -> bool:
    return isinstance(value, dict) and all(map(usable, value.values()))


def _short(value: Any) -> str:
    said = repr(value)
    return said if len(said) <= 60 else f"{said[:60]}…"
