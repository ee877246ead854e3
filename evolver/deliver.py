"""Any candidate of a run as files to take along: a Hugging Face folder, a LoRA adapter, or a delta against the base."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from evolver.errors import BadInput
from evolver.evaluation.live import default_device
from evolver.export import export
from evolver.history import History, read_history
from evolver.merging.materialise import Materialiser
from evolver.records import Candidate, Recipe, Result
from evolver.run import Prepared, prepare_run, score_again, texts
from evolver.storage import Storage, whole_folder
from evolver.worker import build_materialiser

Warn = Callable[[str], None]


def find(history: History, wanted: str | None) -> tuple[Candidate, Result]:
    """A candidate of the search by its number or the beginning of its recipe's id; default: the best one.

    Raises BadInput where there is none, or several.
    """
    if wanted is None:
        if history.best is None:
            raise BadInput("evolver export: the run has no candidate with a score yet; go on with it first.")
        return history.best
    searched = history.stages["search"]
    numbered = [(c, r) for c, r in searched if wanted == str(c.number)]
    found = numbered or [(c, r) for c, r in searched if c.recipe.id.startswith(wanted)]
    if len({c.recipe.id for c, _ in found}) != 1:
        many = "several candidates of this run go" if found else "no candidate of this run goes"
        raise BadInput(f"--candidate: {many} by {wanted!r}; give a number, or more of a recipe's id.")
    return max(found, key=lambda pair: len(pair[1].items))


def deliver(run: Storage, out: Path, wanted: str | None, say: Warn) -> None:
    """Write a candidate as a Hugging Face folder, and check it: loaded anew, it has to give the ledger's answers.

    Raises BadInput for a run whose models or data are not there any more.
    """
    history = read_history(run)
    candidate, result = find(history, wanted)
    prepared = prepare_run(run)
    outcome = history.outcome()
    best = history.best is not None and candidate.recipe.id == history.best[0].recipe.id
    more = texts(prepared, outcome) if outcome and best else {}
    export(candidate.recipe, build_materialiser(prepared.plan, prepared.opened), out, more)
    agreement = score_again(prepared, out, result.items, default_device())
    say(f"{out}: loaded anew, it gives the ledger's answers on {agreement['equal']} of {agreement['items']} dev items")


def deliver_delta(run: Storage, out: Path, wanted: str | None, say: Warn) -> None:
    """Write a candidate as its difference to the base, tensor by tensor in float32, in one safetensors file.

    Tensors without a difference are left out.
    """
    recipe, prepared = _chosen(run, wanted)
    base = {name: tensor.float() for name, tensor in _tensors(prepared, prepared.base)}
    deltas = {
        n: (t.float() - base[n]).to(t.dtype)
        for n, t in _tensors(prepared, recipe)
        if not torch.equal(t.float(), base[n])
    }
    with whole_folder(out) as folder:
        about = {"format": "pt", "base_model": prepared.config.model.base, "recipe": recipe.id}
        save_file(deltas, folder / "delta.safetensors", metadata=about)
    say(f"{out}: {len(deltas)} tensors that differ from those of {prepared.config.model.base}")


def deliver_lora(
    run: Storage, out: Path, wanted: str | None, rank: int | None, energy: float | None, say: Warn
) -> None:
    """Write a candidate as a LoRA adapter of the base: each matrix's difference by its leading singular vectors.

    Norms, biases, embeddings and a head of its own come whole beside them, where they differ. By the theorem of Eckart
    and Young, no adapter of this rank is closer.

    Args:
        rank: of every matrix; or
        energy: the share of the squared difference that each matrix has to keep, in (0, 1].

    Raises BadInput where both or none are given.
    """
    if (rank is None) == (energy is None):
        raise BadInput("--lora, --energy: give a rank, or the share of the difference to keep, not both.")
    recipe, prepared = _chosen(run, wanted)
    base = dict(_tensors(prepared, prepared.base))
    pairs: dict[str, tuple[Tensor, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    kept = total = 0.0
    for name, tensor in _tensors(prepared, recipe):
        delta = tensor.float() - base[name].float()
        if not bool(delta.any()):
            continue
        total += (size := float(delta.square().sum()))
        if delta.ndim == 2 and name.endswith(".weight") and "embed" not in name and name != "lm_head.weight":
            pairs[name.removesuffix(".weight")] = a, b = _factors(delta, rank, energy)
            kept += float((b @ a).square().sum())
        else:
            whole[name] = tensor
            kept += size
    embedding = next((n for n in whole if n.endswith("embed_tokens.weight")), None)
    if embedding and prepared.opened.base.config.get("tie_word_embeddings"):
        whole["lm_head.weight"] = whole[embedding].clone()  # PEFT unties what it saves whole
    if not pairs:
        raise BadInput(f"{run.location}: the model differs from its base in no matrix; a LoRA adapter cannot hold it.")
    with whole_folder(out) as folder:
        _write_adapter(folder, pairs, whole, prepared.config.model.base)
    largest, share = max(len(a) for a, _ in pairs.values()), 100 * kept / total
    beside = f", {len(whole)} tensors whole" if whole else ""
    say(f"{out}: rank {largest}{beside}; holds {share:.1f} % of the squared difference to the base")


def _factors(delta: Tensor, rank: int | None, energy: float | None) -> tuple[Tensor, Tensor]:
    """A (r, in) and B (out, r) whose product is the closest of its rank to ``delta`` (out, in)."""
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    if energy is not None:
        shares = s.square().cumsum(0) / s.square().sum()
        rank = int((shares < energy - 1e-7).sum()) + 1
    root = s[:rank].sqrt()
    return (root[:, None] * v[:rank]).contiguous(), (u[:, :rank] * root).contiguous()


def _write_adapter(
    folder: Path, pairs: dict[str, tuple[Tensor, Tensor]], whole: dict[str, Tensor], base: str
) -> None:  # fmt: skip
    """An adapter as PEFT reads it; scale one, as alpha is the rank, matrix by matrix."""
    tensors = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in whole.items()}
    for name, (a, b) in pairs.items():
        tensors[f"base_model.model.{name}.lora_A.weight"], tensors[f"base_model.model.{name}.lora_B.weight"] = a, b
    ranks = {name: len(a) for name, (a, _) in pairs.items()}
    usual = max(ranks.values())
    other = {name: r for name, r in ranks.items() if r != usual}
    config: dict[str, Any] = {
        "peft_type": "LORA", "base_model_name_or_path": base, "r": usual, "lora_alpha": usual, "lora_dropout": 0.0,
        "target_modules": sorted(pairs), "rank_pattern": other, "alpha_pattern": other, "bias": "none",
        "modules_to_save": sorted({name.rpartition(".")[0] for name in whole}) or None,
        "fan_in_fan_out": False, "inference_mode": True, "task_type": None,
    }  # fmt: skip
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))


def _chosen(run: Storage, wanted: str | None) -> tuple[Recipe, Prepared]:
    return find(read_history(run), wanted)[0].recipe, prepare_run(run)


def _tensors(prepared: Prepared, recipe: Recipe) -> Iterator[tuple[str, Tensor]]:
    materialiser: Materialiser = build_materialiser(prepared.plan, prepared.opened)
    for name, tensor in materialiser.stream(recipe):
        yield name, tensor.clone()
