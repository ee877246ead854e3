"""A model as what it adds to its base: a LoRA adapter, or the differences themselves."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from evolver.checkpoints.shards import disk_errors
from evolver.errors import BadInput

Tensors = Iterable[tuple[str, Tensor]]
# Parts of the names of matrices that are looked up by rows, not multiplied with.
LOOKED_UP = ("embed", "wte.", "wpe.", "shared.", "relative_attention_bias")
# The embeddings that heads called lm_head are tied to.
TIED = ("embed_tokens.weight", "wte.weight", "transformer.word_embeddings.weight")
# Kinds of models whose layers are Transformers' Conv1D.
TRANSPOSED = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")


@dataclass(frozen=True)
class WrittenAdapter:
    """What was written: the largest rank, how many tensors came whole, and the share of the squared difference held."""

    rank: int
    whole: int
    share: float

    @property
    def said(self) -> str:
        """What was written, in words."""
        beside = f", {self.whole} tensors whole" if self.whole else ""
        return f"rank {self.rank}{beside}; holds {100 * self.share:.1f} % of the squared difference to the base"


def write_delta(base: Mapping[str, Tensor], model: Tensors, folder: Path, about: Mapping[str, str]) -> int:
    """Write ``delta.safetensors``: model − base, in float32, for every tensor that differs; how many these are."""
    deltas = {n: t.float() - base[n].float() for n, t in model if not torch.equal(t, base[n])}
    with disk_errors():
        save_file(deltas, folder / "delta.safetensors", metadata={"format": "pt", **about})
    return len(deltas)


def write_lora(
    base: Mapping[str, Tensor], model: Tensors, folder: Path, location: str, tied: bool,
    rank: int | None = None, energy: float | None = None, transposed: bool = False,
    head: Mapping[str, Tensor] = MappingProxyType({}),
) -> WrittenAdapter:  # fmt: skip
    """Write a PEFT adapter: each matrix's difference by its leading singular vectors.

    Norms, biases, embeddings and a head of its own come whole beside them, where they differ. By the theorem of Eckart
    and Young, no adapter of this rank is closer.

    Args:
        base: the base's tensors.
        location: of the base, for the adapter's configuration.
        tied: whether the base's head is its embedding.
        rank: of every matrix; or
        energy: the share of the squared difference that each matrix has to keep, in (0, 1].
        transposed: whether the base's layers hold the transposes of their matrices, see ``is_transposed``.
        head: tensors that the base has no place for, which come whole.

    Raises BadInput where no matrix differs.
    """
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    kept = total = 0.0
    for name, tensor in model:
        delta = tensor.float() - base[name].float()
        if not bool(delta.any()):
            continue
        total += (size := float(delta.square().sum()))
        if delta.ndim == 2 and name.endswith(".weight") and not _is_whole(name):
            pairs[name.removesuffix(".weight")] = a, b = _factors(delta.T if transposed else delta, rank, energy)
            kept += float((b @ a).square().sum())
        else:
            whole[name] = tensor.clone()
            kept += size
    if not pairs:
        raise BadInput("the model differs from its base in no matrix; a LoRA adapter cannot hold it.")
    embedding = next((n for n in whole if n.endswith(TIED)), None)
    if embedding and tied:
        whole["lm_head.weight"] = whole[embedding].clone()  # PEFT unties what it saves whole
    whole |= head
    _write_adapter(folder, pairs, whole, location, transposed)
    return WrittenAdapter(max(len(a) for a, _ in pairs.values()), len(whole), kept / total)


def is_tied(config: Mapping[str, Any]) -> bool:
    """Whether a base is a language model that uses its embedding as its head."""
    kinds = config.get("architectures") or ["LM"]
    return bool(config.get("tie_word_embeddings")) and any("LM" in kind for kind in kinds)


def is_transposed(config: Mapping[str, Any]) -> bool:
    """Whether the layers of a kind of models are Transformers' Conv1D, which hold the transposes of their matrices."""
    return config.get("model_type") in TRANSPOSED


def _is_whole(name: str) -> bool:
    return name == "lm_head.weight" or any(part in name for part in LOOKED_UP)


def _factors(delta: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) whose product is the closest of its rank to ``delta`` (out, in)."""
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    if energy is not None:
        shares = s.square().cumsum(0) / s.square().sum()
        rank = int((shares < energy - 1e-7).sum()) + 1
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def _write_adapter(
    folder: Path, pairs: Mapping[str, tuple[Tensor, Tensor]], whole: Mapping[str, Tensor], base: str, transposed: bool
) -> None:  # fmt: skip
    """An adapter as PEFT reads it; scale one, as alpha is the rank, matrix by matrix."""
    # PEFT puts a layer of its own around each one that it changes, and the layer's bias below that.
    biases = {f"{module}.bias": f"{module}.base_layer.bias" for module in pairs if f"{module}.bias" in whole}
    tensors = {f"base_model.model.{biases.get(name, name)}": t.contiguous() for name, t in whole.items()}
    for name, (a, b) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"], tensors[f"base_model.model.{name}.lora_B.weight"] = a, b
    ranks = {name: len(a) for name, (a, _) in pairs.items()}
    usual = max(ranks.values())
    other = {name: r for name, r in ranks.items() if r != usual}
    config: dict[str, Any] = {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": usual, "lora_alpha": usual, "lora_dropout": 0.0,
        "target_modules": sorted(pairs), "rank_pattern": other, "alpha_pattern": other,
        "bias": "all" if biases else "none",
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole if name not in biases}) or None,
        "fan_in_fan_out": transposed, "inference_mode": True, "task_type": None,
    }  # fmt: skip
    with disk_errors():
        save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
