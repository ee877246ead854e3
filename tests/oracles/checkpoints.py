"""Random Llama checkpoints that mergekit and we both read: the same bytes from the same seeds, everywhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import save_file

HIDDEN, INNER, LAYERS, VOCABULARY = 64, 96, 4, 160
EXPERTS = ("e1", "e2", "e3", "e4", "e5")
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": VOCABULARY,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "dtype": "float32",
}  # fmt: skip


def shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of a tiny Llama's tensors."""
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        out |= {f"{at}self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qo"}
        out |= {f"{at}self_attn.{p}_proj.weight": (HIDDEN // 2, HIDDEN) for p in "kv"}
        out |= {f"{at}mlp.{p}_proj.weight": (INNER, HIDDEN) for p in ("gate", "up")}
        out |= {f"{at}mlp.down_proj.weight": (HIDDEN, INNER)}
        out |= {f"{at}{p}_layernorm.weight": (HIDDEN,) for p in ("input", "post_attention")}
    return out | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCABULARY, HIDDEN)}


def make(folder: Path) -> dict[str, Path]:
    """Write the base and five fine-tunes of it; their folders by name."""
    base = {n: _normal("base", n, s, 0.05) + (1.0 if len(s) == 1 else 0.0) for n, s in shapes().items()}
    out = {"base": _write(folder / "base", base)}
    for e in EXPERTS:
        out[e] = _write(folder / e, {n: t + _normal(e, n, tuple(t.shape), 0.01) for n, t in base.items()})
    return out


def _normal(model: str, tensor: str, shape: tuple[int, ...], std: float) -> torch.Tensor:
    seed = int.from_bytes(hashlib.sha256(f"{model} {tensor}".encode()).digest()[:4], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std


def _write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder
