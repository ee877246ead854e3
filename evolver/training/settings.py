"""The configuration of a pool of experts, which ``evolver experts`` trains."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from evolver.config import Budget, Config
from evolver.config.evaluation import EvaluationSettings
from evolver.config.model import ModelSettings
from evolver.config.reading import check_section, config_at
from evolver.config.section import NAME, Section


class Training(Section):
    """How an expert is trained: with AdamW, a linear warm-up of the learning rate, and then a cosine down to zero."""

    method: Literal["full", "lora"] = Field(
        "full", description="full: train all weights; lora: train an adapter of all linear layers"
    )
    steps: int = Field(ge=1, description="number of training steps")
    batch: int = Field(16, ge=1, description="number of items in each step")
    peak_rate: float = Field(5e-5, gt=0, description="learning rate at the end of the warm-up")
    warmup: int = Field(10, ge=0, description="number of warm-up steps")
    max_tokens: int = Field(128, ge=4, description="most tokens of an item; longer ones are cut or left out")
    freeze: list[str] = Field(
        default_factory=list, description="parameters with one of these in their name are not trained"
    )
    rank: int = Field(8, ge=1, description="rank of the LoRA adapter")
    alpha: int = Field(16, ge=1, description="scaling factor alpha of LoRA")
    save_every: int = Field(50, ge=1, description="number of steps between two checkpoints")


class ExpertEntry(Section):
    """One expert: its training data, and the training settings in which it differs from the pool."""

    data: str | list[str] = Field(
        min_length=1, description="a JSONL, CSV, TSV or Parquet file, or a list of such files"
    )
    text: str = Field("text", description="key of the text")
    text_pair: str | None = Field(None, description="key of the second text of a pair")
    label: str = Field("label", description="key of the label")
    seed: int | None = Field(None, ge=0)
    train: dict[str, Any] = Field(default_factory=dict, description="training settings that replace those of the pool")

    @property
    def files(self) -> list[str]:
        return [self.data] if isinstance(self.data, str) else self.data


class PoolConfig(Section):
    """A pool of experts: its base, its experts, and the tasks that they are scored on."""

    pool: str = Field(pattern=NAME, description="name of the pool and of its folder under $EVOLVER_CACHE/experts")
    seed: int = Field(0, ge=0)
    base: str = Field(description="Hugging Face folder of the base, or a hub id")
    kind: Literal["classifier", "causal-lm", "seq2seq"]
    labels: list[str] | None = Field(
        None,
        description="classifier: the labels that all experts share, with the same initial head; default: each expert "
        "has a head for its own labels",
    )
    template: str = Field("{text}", description="seq2seq: the prompt, in which {text} stands for the text")
    train: dict[str, Any] = Field(description="training settings of all experts")
    experts: dict[str, ExpertEntry] = Field(min_length=1)
    evaluation: EvaluationSettings

    @field_validator("template")
    @classmethod
    def _has_a_place(cls, template: str) -> str:
        if "{text}" not in template:
            raise ValueError("write {text} where the text belongs")
        return template

    @property
    def own_heads(self) -> bool:
        """Whether every expert is a classifier with a head for labels of its own."""
        return self.kind == "classifier" and self.labels is None

    def training(self, name: str) -> Training:
        """The settings of one expert's training."""
        return Training.model_validate({**self.train, **self.experts[name].train})

    def run(self, folders: Mapping[str, str], file: str) -> Config:
        """The configuration of a run over the pool, for its evaluation.

        Args:
            folders: of the base, and of every expert by name.
            file: of the pool, for messages.

        Raises BadInput where no run can have these experts and tasks.
        """
        model = ModelSettings(base=folders["base"], kind=self.kind, heads="apart" if self.own_heads else "merged")
        raw = {
            "run": self.pool, "seed": self.seed, "model": model, "experts": {n: folders[n] for n in self.experts},
            "search": {"algorithm": "none"}, "budget": Budget(candidates=1), "evaluation": self.evaluation,
        }  # fmt: skip
        return check_section(Config, raw, file)


def load_pool(path: str | Path) -> PoolConfig:
    """Read the configuration of a pool.

    Raises BadInput for an unreadable file, an unknown key or a wrong type.
    """
    raw = config_at(path).mapping(PoolConfig.model_fields)
    config = check_section(PoolConfig, raw, str(path))
    for name, entry in config.experts.items():
        check_section(Training, {**config.train, **entry.train}, str(path), f"experts.{name}.train.")
    config.run({n: n for n in ("base", *config.experts)}, str(path))
    return config
