"""Settings in a model's ``config.json`` that change what the same weights compute, compared with the base's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

# Attention, activations, norms and scales; no tensor's shape tells that one of these differs. A key that one of two
# files lacks is not compared, as it then has a default that only the model's code knows.
COMPUTING = (
    "num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads", "head_dim", "hidden_act",
    "hidden_activation", "activation_function", "feed_forward_proj", "activation", "rms_norm_eps", "layer_norm_eps",
    "layer_norm_epsilon", "norm_eps", "position_embedding_type", "alibi", "parallel_attn", "partial_rotary_factor",
    "rotary_pct", "sliding_window", "layer_types", "scale_attn_weights", "query_pre_attn_scalar",
    "attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "attention_multiplier", "residual_multiplier",
    "embedding_multiplier", "num_experts_per_tok", "norm_topk_prob",
)  # fmt: skip
ROTARY_KEYS = ("rope_theta", "rope_scaling")


def differing_settings(expert: Mapping[str, Any], base: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Yields each setting in which two configurations compute differently: its key, and both values."""
    for key in COMPUTING:
        if key in expert and key in base and not _equal(expert[key], base[key]):
            yield key, expert[key], base[key]
    ours, theirs = _rope(expert), _rope(base)
    for key in ROTARY_KEYS:
        if key in ours and key in theirs and not _equal(ours[key], theirs[key]):
            yield key, ours[key], theirs[key]


def _equal(one: Any, other: Any) -> bool:
    """Whether two values are the same; numbers may differ by a rounding to float32, as GGUF files hold them."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(value, other[key]) for key, value in one.items())
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=1e-6)
    return bool(one == other)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary positions in one form: Transformers 5 writes as ``rope_parameters`` what were two keys before."""
    found = {key: config[key] for key in ROTARY_KEYS if key in config}
    parameters = config.get("rope_parameters")
    if isinstance(parameters, dict):
        rest = {k: v for k, v in parameters.items() if k != "rope_theta"}
        found["rope_scaling"] = rest
        if "rope_theta" in parameters:
            found["rope_theta"] = parameters["rope_theta"]
    if "rope_scaling" in found:
        found["rope_scaling"] = _scaling(found["rope_scaling"])
    return found


def _scaling(value: Any) -> Any:
    """A scaling of rotary positions, with its kind under its newer name; None where nothing is scaled."""
    if not isinstance(value, dict):
        return value
    named = {("rope_type" if k == "type" else k): v for k, v in value.items()}
    return None if named.get("rope_type", "default") == "default" else named
