"""The section ``constraints`` of a configuration: what a merge must keep, whatever its score."""

from __future__ import annotations

from pydantic import Field, model_validator

from evolver.config.section import Section

THE_BASE, BEST_EXPERT = "base", "best expert"
# Which keys go with which kind of constraint, in the order in which a message names them.
_KEYS = {"task": {"drop", "confidence", "against"}, "kl": {"at_most"}, "norm": set[str]()}


class Constraint(Section):
    """One constraint: a task whose metric must not drop, a distance from the base's predictions, or one of weights."""

    task: str | None = Field(None, description="task whose metric must not fall by more than drop")
    drop: float = Field(
        0.0,
        ge=0,
        le=1e6,
        description="points of the task's metric that a merge may lose, as reports show the metric: 2 is 2 % of the "
        "items where the metric is a percentage",
    )
    confidence: float = Field(
        0.9,
        ge=0.5,
        lt=1,
        description="how sure it has to be that no more is lost: this one-sided lower bound of the difference on the "
        "dev items must not be below -drop",
    )
    against: str = Field(
        THE_BASE,
        description="model that a merge is compared with, item by item: base, the name of an expert, or best expert, "
        "which is the expert with the highest dev metric of this task",
    )
    kl: str | list[str] | None = Field(
        None,
        description="path of a text file, or a list of texts, on which the mean Kullback-Leibler divergence of the "
        "merge's next-token probabilities from the base's is measured, in nats per token; the first 512 tokens are "
        "read. Language models (causal-lm) only",
    )
    at_most: float | None = Field(None, ge=0, le=1e6, description="largest divergence that a merge may have, with kl")
    norm: float | None = Field(
        None,
        gt=0,
        le=1e6,
        description="largest norm of the difference between merge and base, as a multiple of the experts' mean norm",
    )

    @property
    def kind(self) -> str:
        """task, kl or norm."""
        return next(kind for kind in _KEYS if getattr(self, kind) is not None)

    @property
    def said(self) -> str:
        """The constraint in words, such as a table shows."""
        if self.task is not None:
            whom = "the best expert" if self.against == BEST_EXPERT else "the base" * (self.against == THE_BASE)
            return f"{self.task}: at most {self.drop:g} points below {whom or self.against}"
        if self.kl is not None:
            return f"divergence from the base at most {self.at_most:g} nats per token"
        return f"distance from the base at most {self.norm:g} times that of the experts"

    @model_validator(mode="after")
    def _one_kind(self) -> Constraint:
        given = [kind for kind in _KEYS if getattr(self, kind) is not None]
        if len(given) != 1:
            found = " and ".join(given)
            raise ValueError(f"a constraint is about one thing, and this one is about {found or 'none'}; give task, kl "
                             "or norm")  # fmt: skip
        others = self.model_fields_set - _KEYS[given[0]] - {given[0]}
        if others := {key for key in others if getattr(self, key) is not None}:
            raise ValueError(f"{min(others)} does nothing in a constraint on {given[0]}; leave it out")
        if self.kl is not None and self.at_most is None:
            raise ValueError("a constraint on kl needs a limit; add at_most, such as 0.05")
        if self.kl is not None and not self.kl:
            raise ValueError("kl: there is no text; give the path of a text file, or a list of texts")
        return self
