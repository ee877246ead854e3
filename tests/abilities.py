"""What Evolver does with a family of models: read, merge, search, evaluate, export, LoRA, GGUF.

Each ability is tried as a user would, by the commands, and held against what Transformers and PEFT make of the same
folders. An ability that a family does not have shows by the sentence that the user gets.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import toys
import transformers
import yaml
from families import WEIGHTS, Family, loaded, oldest, save_all, save_texts, sharded, unconverted
from safetensors.torch import load_file
from torch import Tensor
from toys import Ended, evolver

WEIGHT = {"a": 0.5, "b": 0.25}
TOLERANCE = 1e-6
DEV = 12


class Refused(Exception):
    """The sentence with which Evolver refused something."""


class Wrong(AssertionError):
    """An answer that is not the right one, or no answer."""


def answered(ended: Ended) -> str:
    """What a command printed.

    Raises Refused for the one sentence of a refusal, and Wrong for anything else that is no success.
    """
    if ended.code == 0:
        return ended.out
    if ended.code == 2:
        raise Refused(toys.refusal(ended.code, ended.err))
    raise Wrong(f"exit status {ended.code}: {ended.err[-600:]}")


class Trial:
    """One family's models in a folder of their own, and what is tried with them.

    Args:
        data: folder of the items on which searches score models; see ``write_data``.
        folder: empty; ``base``, ``a`` and ``b`` are saved there by the class itself, ``old-…`` in the oldest layout
            that Transformers reads, ``shards-…`` in shards, ``memory-…`` with the tensors that the class has in memory.
    """

    def __init__(self, family: Family, folder: Path, data: Path) -> None:
        self.family, self.folder, self.data = family, folder, data
        save_all(family, folder)
        self.saved = {n: loaded(family, folder / n) for n in ("base", "a")}
        self.changed = {n: oldest(family, folder / n, folder / f"old-{n}", t) for n, t in self.saved.items()}
        sharded(family, folder / "b", folder / "shards-b")
        for name in ("base", "a"):
            unconverted(family, folder / name, folder / f"memory-{name}")

    @cached_property
    def right(self) -> dict[str, dict[str, Tensor]]:
        """The tensors of base, a and b, as the class loads them from the layouts that are merged."""
        places = {"base": "old-base", "a": "a", "b": "shards-b"}
        return {name: loaded(self.family, self.folder / place) for name, place in places.items()}

    def read(self) -> None:
        """Every tensor that the class saves is read from every layout, and under one name."""
        for folder in ("base", "old-base", "shards-b"):
            answered(evolver("explain", self.folder / folder))
        self.agree("old-base", "a")
        self.agree("base", "memory-a")  # of layers in one tensor, the parts are those that the class saves, to the bit
        self.agree("base", "shards-b")

    def renamed(self, seed: int) -> None:
        """Renamings that Transformers undoes, drawn for each tensor, are undone: of a base, and of an expert."""
        draw = random.Random(seed)
        places = {name: self.folder / f"drawn-{name}-{seed}" for name in ("base", "a")}
        for name, place in places.items():
            oldest(self.family, self.folder / name, place, self.saved[name], draw.random(), draw)
        self.agree(places["base"].name, "a")
        self.agree("base", places["a"].name)

    def agree(self, base_place: str, expert_place: str) -> None:
        """A base and an expert are read under one set of names, with all tensors that the class itself saves.

        Raises Wrong where they are not, or where a tensor is not the one of that name in the file of the class.
        """
        from evolver.checkpoints.agreement import Agreement
        from evolver.checkpoints.sources import open_base, open_expert
        from evolver.errors import BadInput
        from evolver.evaluation.blueprint import without_weights

        try:
            base = open_base(str(self.folder / base_place))
            names = Agreement(base, lambda m: without_weights(m.path, m.config))
            expert = open_expert(str(self.folder / expert_place), base, expert_place, names=names)
        except BadInput as error:
            raise Refused(str(error)) from error
        names.settle([expert])
        model = next(m for m in ("a", "b") if f"-{m}" in f"-{expert_place}")
        of_base, of_expert = (places_by_value(self.folder / m) for m in ("base", model))
        pairs = {of_base[key_of(base.tensor(n))]: of_expert[key_of(expert.tensor(n))] for n in base.names()}
        if expert.names() != base.names() or pairs != {n: n for n in of_base.values()}:
            wrong = sorted(of_base.values() ^ pairs.keys()) or [pair for pair in pairs.items() if pair[0] != pair[1]]
            raise Wrong(f"{base_place} and {expert_place}: {wrong[:2]}")

    def merge(self) -> None:
        """The merge of three layouts is the one in float64 of what the class loads, and loads without a rest."""
        for base, a, b in (("old-base", "memory-a", "shards-b"), ("memory-base", "old-a", "b")):
            models = [
                {"model": str(self.folder / place), "parameters": {"weight": WEIGHT[name]}}
                for name, place in (("a", a), ("b", b))
            ]
            made = self._merged({"merge_method": "task_arithmetic", "models": models}, base, f"merged-{base}")
            compare(made, expected(self.right))

    def _merged(self, raw: Mapping[str, Any], base: str, name: str) -> dict[str, Tensor]:
        file, out = self.folder / f"{name}.yml", self.folder / name
        file.write_text(yaml.safe_dump({**raw, "base_model": str(self.folder / base), "dtype": "float32"}))
        answered(evolver("merge", file, out))
        return without_rest(self.family, out)

    @cached_property
    def run_file(self) -> Path:
        """The configuration of a short search over the models."""
        kind = self.family.kind
        entry: dict[str, Any] = {"dev": DEV, "report": 8}
        if kind in ("causal-lm", "seq2seq"):
            entry |= {"task": "toy", "metric": "acc"}
        else:
            entry |= {"task": "items", "data": str(self.data / f"{kind}.jsonl")}
        raw = {
            "run": "family", "seed": 1, "model": {"base": str(self.folder / "old-base"), "kind": kind},
            "experts": {"a": str(self.folder / "a"), "b": str(self.folder / "shards-b")},
            "search": {"algorithm": "evolver", "generations": 1}, "budget": {"candidates": 3},
            "evaluation": {"include_path": str(self.data / "tasks"), "tasks": [entry]}, "baselines": {"masses": [1.0]},
        }  # fmt: skip
        if "task" in entry and entry["task"] == "items":
            del raw["evaluation"]["include_path"]
        (self.folder / "run.yaml").write_text(yaml.safe_dump(raw))
        return self.folder / "run.yaml"

    @cached_property
    def _run(self) -> Path:
        answered(evolver("run", self.run_file, "--results", self.folder / "results"))
        return self.folder / "results" / "family"

    def search(self) -> None:
        """A search scores every candidate, and ``validate`` has said so."""
        try:
            answered(evolver("validate", self.run_file))
        except Refused:
            ended = evolver("run", self.run_file, "--results", self.folder / "results")
            if ended.code != 2 or (self.folder / "results").exists():
                raise Wrong(f"validate refuses it, and run ends with {ended.code}: {ended.err[-300:]}") from None
            raise
        found = list(toys.rows(self._run).values())
        failed = [r["reason"] for r in found if r["status"] != "ok"]
        if failed or not found:
            raise Wrong(f"candidates failed: {failed[:1]}")

    def evaluate(self) -> None:
        """A model has one score, in whatever layout it is, and base and expert have different answers."""
        places = ["base", "old-base", "a", "old-a"]
        said = answered(evolver("evaluate", self.run_file, *(self.folder / p for p in places)))
        scores = [line.split("|")[2].strip() for line in said.splitlines() if str(self.folder) in line]
        if len(scores) != 4 or scores[0] != scores[1] or scores[2] != scores[3]:
            raise Wrong(f"scores of {places}: {scores}")

    def export(self) -> None:
        """The winner loads without a rest, and scores what the ledger says."""
        out = self.folder / "exported"
        said = answered(evolver("export", self._run, out))
        if f"on {DEV} of {DEV} dev items" not in said:
            raise Wrong(said)
        without_rest(self.family, out)
        told = answered(evolver("evaluate", self.run_file, out, "--dev")).splitlines()[-1].split("|")[2].strip()
        best = max(r["score"] for r in toys.rows(self._run).values() if r["stage"] == "search")
        if abs(float(told) - 100 * best) > 0.05:
            raise Wrong(f"the export scores {told}, the ledger says {100 * best}")

    def lora(self) -> None:
        """An adapter of the base, merged with it, is what PEFT makes of the two."""
        import peft

        kind = getattr(transformers, self.family.class_name)
        model = kind.from_pretrained(self.folder / "base", dtype=torch.float32)
        settings = peft.LoraConfig(r=2, lora_alpha=4, target_modules=linear_names(model))
        wrapped = peft.get_peft_model(model, settings)
        torch.manual_seed(9)
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        wrapped.save_pretrained(self.folder / "lora")
        whole = peft.PeftModel.from_pretrained(
            kind.from_pretrained(self.folder / "base", dtype=torch.float32), self.folder / "lora"
        )
        right = {n: t.clone() for n, t in whole.merge_and_unload().state_dict().items()}
        models = [{"model": str(self.folder / "lora"), "parameters": {"weight": 1.0}}]
        for base in ("base", "old-base"):
            raw = {"merge_method": "task_arithmetic", "models": models}
            compare(self._merged(raw, base, f"lora-{base}"), right, 1e-5)

    def texts(self) -> None:
        """Text models are merged into the language part, and the rest is the base's, to the bit."""
        save_texts(self.family, self.folder)
        models = [{"model": str(self.folder / f"text-{n}"), "parameters": {"weight": w}} for n, w in WEIGHT.items()]
        raw = {"merge_method": "task_arithmetic", "models": models}
        base, inside = self.right["base"], "model.language_model."
        seen = {n: dict(base) for n in WEIGHT}
        for name, tensors in seen.items():
            text = load(self.family.text, self.folder / f"text-{name}")
            tensors |= {(n if n in base else n.replace("model.", inside, 1)): t for n, t in text.items()}
        right = expected({"base": base, **seen})
        for place in ("base", "old-base"):
            made = self._merged(raw, place, f"texts-{place}")
            compare(made, right)
            beside = [n for n in base if not n.startswith((inside, "lm_head"))]
            if not beside or any(not torch.equal(made[n], base[n]) for n in beside):
                raise Wrong("the part that reads images has changed")

    def gguf(self) -> None:
        """The winner as a GGUF file, which the command itself reads back and scores."""
        said = answered(evolver("export", self._run, self.folder / "winner.gguf", "--gguf", "f32"))
        if f"on {DEV} of {DEV} dev items" not in said:
            raise Wrong(said)


ABILITIES: dict[str, Callable[[Trial], None]] = {
    "read": Trial.read, "merge": Trial.merge, "search": Trial.search, "evaluate": Trial.evaluate,
    "export": Trial.export, "LoRA": Trial.lora, "GGUF": Trial.gguf,
}  # fmt: skip


TEXTS = "text experts"


def write_data(folder: Path, tasks: Path) -> None:
    """The items on which the families are scored: lm-eval's in a link to ``tasks``, texts, and images."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tasks").symlink_to(tasks)
    draw = random.Random(1)
    toys.write_rows(
        folder / "classifier.jsonl", [{"text": t, "label": draw.choice(toys.MOODS)} for t in toys.texts(40)]
    )
    rows = []
    for number, (image, label) in enumerate(toys.digits(40)):
        (folder / f"{number}.png").write_bytes(image)
        rows.append({"image": f"{number}.png", "label": label})
    toys.write_rows(folder / "image-classifier.jsonl", rows)


def expected(models: Mapping[str, Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Task arithmetic in float64."""
    base = models["base"]
    moved = {n: sum(w * (models[m][n].double() - t.double()) for m, w in WEIGHT.items()) for n, t in base.items()}
    return {n: t.double() + moved[n] for n, t in base.items()}


def key_of(tensor: Tensor) -> bytes:
    """The bytes of a tensor, of which no two in a model are alike."""
    return tensor.contiguous().numpy().tobytes()


def places_by_value(folder: Path) -> dict[bytes, str]:
    """The names of the tensors that the class saved, by their bytes."""
    return {key_of(t): n for n, t in load_file(folder / WEIGHTS).items()}


def compare(found: Mapping[str, Tensor], right: Mapping[str, Tensor], tolerance: float = TOLERANCE) -> None:
    """Raises Wrong where tensors differ."""
    if found.keys() != right.keys():
        raise Wrong(f"{min(found.keys() ^ right.keys())} is in one of the two only")
    for name, tensor in right.items():
        if not torch.allclose(found[name].double(), tensor.double(), atol=tolerance, rtol=tolerance):
            raise Wrong(f"{name} differs by {float((found[name].double() - tensor.double()).abs().max())}")


def without_rest(family: Family, folder: Path) -> dict[str, Tensor]:
    """The tensors that the class makes of a folder.

    Raises Wrong where the folder lacks one, or holds one that the class has no place for.
    """
    kind = getattr(transformers, family.class_name)
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    rest = {k: sorted(info[k]) for k in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[k]}
    if rest:
        raise Wrong(f"{folder.name}: {rest}")
    return {n: t.clone() for n, t in model.state_dict().items()}


def load(class_name: str, folder: Path) -> dict[str, Tensor]:
    """The tensors that a class makes of a folder."""
    model = getattr(transformers, class_name).from_pretrained(folder, dtype=torch.float32)
    return {n: t.clone() for n, t in model.state_dict().items()}


def linear_names(model: Any) -> str:
    """A pattern of the layers that an adapter changes: those of the blocks, without what PEFT does not wrap or, in
    mixtures of experts, changes as a whole parameter.
    """
    from transformers.pytorch_utils import Conv1D

    mixture = any(p.ndim == 3 and "expert" in n for n, p in model.named_parameters())
    left_out = ("mixer.out_proj", *(("mlp", "feed_forward", "block_sparse_moe") if mixture else ()))
    names = [n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)]
    blocks = [n for n in names if re.search(r"\.\d+\.", n) and not any(part in n for part in left_out)]
    return "|".join(n.replace(".", r"\.") for n in blocks)


def trials(
    trial: Trial, wanted: Sequence[str] = tuple(ABILITIES), strict: bool = True
) -> dict[str, str | None]:  # fmt: skip
    """What the abilities are worth: None for one that the family has, else the sentence that the user gets.

    Args:
        strict: raise Wrong, with all that is wrong in it, for wrong answers and tracebacks; else these are told in the
            place of a sentence.
    """
    found, wrong = dict[str, str | None](), []
    for name in [*wanted, *([TEXTS] if trial.family.text else [])]:
        try:
            (Trial.texts if name == TEXTS else ABILITIES[name])(trial)
            found[name] = None
        except Refused as error:
            found[name] = str(error).replace(str(trial.folder), "…")
        except Exception as error:
            found[name] = f"wrong: {type(error).__name__}: {str(error)[:700]}"
            wrong.append(f"{name}: {found[name]}")
    if wrong and strict:
        raise Wrong(f"{trial.family.name}: " + "\n".join(wrong))
    return found
