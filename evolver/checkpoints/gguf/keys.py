"""How a model computes, as keys of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from evolver.errors import BadInput

OPTION = "--gguf"
INSTEAD = "leave --gguf out, and make a file of the Hugging Face folder with llama.cpp's own script."
# model_type → what its files are called. Transformers reads all of these back: that is how every file is checked.
ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gpt2": "gpt2"}
# What a file cannot say: llama.cpp computes it in this way only, or Transformers would not see it.
FIXED = {
    "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "activation_function": "gelu_new",
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False,
}  # fmt: skip
FACTORS = "rope_freqs.weight"
# The settings of each kind of rotary embedding that a file can hold.
ROPE = {
    "default": set[str](),
    "linear": {"factor"},
    "yarn": {"factor", "original_max_position_embeddings"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
}


def file_config(raw: Mapping[str, Any]) -> Any:
    """The configuration with its architecture's defaults filled in.

    Raises BadInput for what a file cannot say.
    """
    from transformers import AutoConfig

    if raw.get("model_type") not in ARCHITECTURES:
        raise BadInput(
            f"{OPTION}: a {raw.get('model_type')} model cannot be written, only {', '.join(ARCHITECTURES)}; {INSTEAD}"
        )
    config = AutoConfig.for_model(**raw)
    for key, value in FIXED.items():
        if getattr(config, key, value) != value:
            raise BadInput(f"{OPTION}: no file can say that the model's {key} is {getattr(config, key)!r}; {INSTEAD}")
    rope = scaling(config) or {"rope_type": "default"}
    more = {k for k, v in rope.items() if v is not None} - {"rope_type", "type", "rope_theta"}
    if not more <= ROPE.get(rope["rope_type"], set()):
        said = ", ".join(f"{k} {rope[k]}" for k in ("rope_type", *sorted(more)))
        raise BadInput(f"{OPTION}: no file can say that the model's rotary embedding has {said}; {INSTEAD}")
    return config


def scaling(config: Any) -> dict[str, Any] | None:
    """The settings of the rotary embedding, where there is one."""
    rope: dict[str, Any] | None = getattr(config, "rope_parameters", None)
    return rope


def context(config: Any) -> int:
    """How many tokens the model takes. No window slides when llama.cpp computes a model of these architectures, so it
    is what the window holds: up to there, both are the same.
    """
    return int(min(config.max_position_embeddings, getattr(config, "sliding_window", None) or math.inf))


def add_keys(writer: Any, config: Any) -> None:
    """Add the keys to a file."""
    writer.add_block_count(config.num_hidden_layers)
    writer.add_embedding_length(config.hidden_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_context_length(context(config))
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.hidden_size)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count_kv(config.num_key_value_heads)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(_head(config))
    _describe_rope(writer, config.rope_parameters)


def _describe_rope(writer: Any, rope: Mapping[str, Any]) -> None:
    from gguf import RopeScalingType

    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def rope_factors(config: Any) -> np.ndarray[Any, Any] | None:
    """By what Llama 3 divides the frequency of each pair of a head's values, float32 (head / 2); files hold it as a
    tensor.
    """
    rope = scaling(config)
    return _factors(rope, _head(config)) if rope and rope["rope_type"] == "llama3" else None


def scaling_in(keys: Mapping[str, Any], factors: np.ndarray[Any, Any] | None) -> dict[str, Any] | None:
    """The settings of the rotary embedding that Transformers leaves in a file, or None where nothing is scaled.

    Args:
        keys: of the file, without its architecture's name.
        factors: float32 (head / 2), as ``rope_factors`` gives them.

    Raises ValueError for factors that are not Llama 3's.
    """
    plain = {"rope_theta": float(keys.get("rope.freq_base", 10000.0))}
    kind = keys.get("rope.scaling.type")
    if kind in ("linear", "yarn"):
        old = keys.get("rope.scaling.original_context_length", keys["context_length"])
        more = {"original_max_position_embeddings": int(old)} if kind == "yarn" else {}
        return {"rope_type": kind, **plain, "factor": float(keys["rope.scaling.factor"]), **more}
    if factors is None or (factors == 1).all():
        return None
    return _llama_3(plain["rope_theta"], factors)


def _llama_3(theta: float, factors: np.ndarray[Any, Any]) -> dict[str, Any]:
    """The settings that give these factors; a file has no keys for them. The bounds 1 and 4 are all models' so far, and
    the old context follows from the waves between them.
    """
    low, high, factor, head = 1.0, 4.0, float(factors.max()), 2 * len(factors)
    kept = (1 / factors.astype(float) - 1 / factor) / (1 - 1 / factor)
    between = (kept > 1e-3) & (kept < 1 - 1e-3)
    olds = ((low + kept * (high - low)) * _waves(theta, head))[between]
    found = {
        "rope_type": "llama3", "rope_theta": theta, "factor": factor, "low_freq_factor": low, "high_freq_factor": high,
        "original_max_position_embeddings": round(float(olds.mean())) if len(olds) else 0,
    }  # fmt: skip
    if not np.allclose(_factors(found, head), factors, rtol=1e-4):
        raise ValueError("its rope_freqs are not those of Llama 3")
    return found


def _waves(theta: float, head: int) -> np.ndarray[Any, Any]:
    """In how many tokens each pair of a head's values turns once, (head / 2)."""
    return np.asarray(2 * math.pi * theta ** (np.arange(0, head, 2) / head))


def _factors(rope: Mapping[str, Any], head: int) -> np.ndarray[Any, Any]:
    """Waves that pass often through the old context stay, those that pass seldom are stretched; between is between."""
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    passes = rope["original_max_position_embeddings"] / _waves(rope["rope_theta"], head)
    kept = np.clip((passes - low) / (high - low), 0, 1)
    return np.asarray(1 / (kept + (1 - kept) / rope["factor"]), np.float32)


def _head(config: Any) -> int:
    """The width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
