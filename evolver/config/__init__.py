"""The configuration of a run, as typed settings.

This package knows the sections of a configuration but not the search algorithms. It passes the section ``search`` on
unchecked; the algorithm that the section names then checks it against its own settings with ``check_section``.
"""

from __future__ import annotations

import re
from typing import Any, Literal, get_args

from pydantic import Field, field_validator, model_validator

from evolver.config.constraints import BEST_EXPERT, THE_BASE, Constraint
from evolver.config.evaluation import EvaluationSettings
from evolver.config.model import CLASSIFIER_KINDS, LANGUAGE_KINDS, AlignmentWord, ModelSettings
from evolver.config.section import NAME, Section
from evolver.config.sentences import TEXT_FORMS
from evolver.config.starts import FILES, WORDS, StartFile, Word
from evolver.errors import nearest


class Budget(Section):
    """When the search ends: as soon as the first of these limits is reached. You may raise them later."""

    candidates: int | None = Field(
        None, ge=1, le=10**12, description="number of candidates that the search may propose"
    )
    items: int | None = Field(
        None, ge=1, le=10**12, description="number of items that the search may score; known results cost nothing"
    )

    minutes: float | None = Field(
        None,
        gt=0,
        le=1e7,
        description="minutes that the search may take, in all calls of the run together; candidates that are in "
        "evaluation then are finished. Unlike the other limits it gives another run on a faster machine",
    )
    patience: int | None = Field(
        None,
        ge=1,
        le=10**12,
        description="number of candidates in a row without an improvement of the best dev score; stopped and failed "
        "candidates count",
    )
    target: float | None = Field(
        None, ge=-1e12, le=1e12, description="dev score to be reached, as the terminal prints scores, such as 0.85"
    )

    @property
    def limits(self) -> dict[str, float]:
        """The limits that are set, by key."""
        found: dict[str, float] = self.model_dump(exclude_none=True)
        return found

    @model_validator(mode="after")
    def _one_of(self) -> Budget:
        if not self.limits:
            raise ValueError("the budget has no limit; give candidates, items, minutes or patience")
        if list(self.limits) == ["target"]:
            raise ValueError(
                "the target may never be reached, and the budget has no other limit; also give candidates, items, "
                "minutes or patience"
            )
        return self


class Baselines(Section):
    """Merges that need no search. Every report compares the winner with them."""

    masses: list[float] = Field(
        default=[0.25, 0.5, 1.0, 1.5, 2.0],
        description="task arithmetic with equal weights is tried on the dev items with each of these total masses "
        "(sums of the weights), and the best one is the tuned baseline",
    )

    @field_validator("masses")
    @classmethod
    def _positive(cls, masses: list[float]) -> list[float]:
        if not masses or min(masses) <= 0:
            raise ValueError("the list needs at least one mass, all above 0")
        if len({f"{mass:g}" for mass in masses}) < len(masses):
            raise ValueError("a mass is listed twice (masses are compared by six digits); list each mass once")
        return masses


class FinalistSettings(Section):
    """Which candidates of the search are scored on the select items, and how they are ranked."""

    count: int = Field(
        6, ge=1, le=10_000, description="number of candidates, the best ones of the search on the dev items"
    )
    front: int = Field(
        12,
        ge=2,
        le=10_000,
        description="with several objectives, number of candidates that also come to the finals because they are on "
        "the front; of a larger front, those that add most to its hypervolume",
    )
    rank: Literal["both", "select"] = Field(
        "both",
        description="both: finalists are ranked by their score on dev and select items together; select: on the select "
        "items alone",
    )


class StatisticsSettings(Section):
    """What merge methods that ask for statistics of the experts, such as regmean, get them from: dev items only."""

    items: int = Field(
        1000, ge=1, le=10**9, description="dev items that the statistics of one expert are collected on, at most"
    )
    tasks: dict[str, list[str]] = Field(
        default_factory=dict,
        description="expert (or base) → the tasks whose dev items its statistics are collected on; default: the task "
        "of the expert's name, or all tasks where there is none",
    )
    source: Literal["tasks", "random"] = Field(
        "tasks", description="tasks: dev items; random: as many texts of random tokens, which need no data at all"
    )
    offspring: Literal["initial", "own"] = Field(
        "initial",
        description="what a merger of a population gets of an offspring: initial: the statistics of the expert in "
        "whose place it stands; own: its own, collected by the worker that scores it",
    )
    passes: int = Field(
        1, ge=1, le=1000, description="for regmean_plus_plus: how often Grams are collected on a merge, each time on "
        "the one that the Grams of the pass before give"
    )  # fmt: skip


class PoolSettings(Section):
    """Where candidates are evaluated. These settings change no result, so each call of a run may use other ones."""

    kind: str = Field(
        "auto", description="local: on this machine; ray: in Ray actors; auto: ray inside a Ray job, else local"
    )
    num_workers: int = Field(
        1,
        ge=1,
        le=100_000,
        description="number of workers, which are processes on this machine or Ray actors. Actors that do not fit on "
        "the cluster join when there is room",
    )
    num_cpus: float | None = Field(None, gt=0, le=1e6, description="CPUs of one Ray actor; default: evaluation.threads")
    num_gpus: float | None = Field(
        None,
        ge=0,
        le=10_000,
        description="GPUs of one Ray actor, also a share such as 0.5; default: 1 if the cluster has GPUs, else 0",
    )
    resources: dict[str, float] = Field(
        default_factory=dict,
        description="custom Ray resources of one actor, such as {a100: 1}; a node must have been started with them",
    )
    cache_gb: float = Field(
        2.0, ge=0, le=1e6, description="memory in GiB in which one worker keeps models that it has built"
    )
    timeout_s: float | None = Field(
        None,
        gt=0,
        le=1e8,
        description="seconds after which an evaluation is ended and counts as failed; default: no limit",
    )
    price_per_hour: float | None = Field(
        None, ge=0, le=1e9, description="price of one worker for an hour; the report then states costs"
    )
    watts: float | None = Field(
        None, ge=0, le=1e9, description="power of one worker in watts; the report then states energy"
    )
    share: int = Field(
        1,
        ge=1,
        le=1000,
        description="number of workers that share the items of one candidate; the result is the same as with one "
        "worker",
    )
    retries: int = Field(1, ge=0, le=1000, description="how often a candidate is tried again after its worker died")
    ahead: bool = Field(
        True,
        description="let idle workers score candidates that the search will probably ask for next. Wrong guesses do "
        "not change the search and do not count against the budget",
    )


class Config(Section):
    """The whole configuration of one run."""

    run: str = Field(pattern=NAME, description="name of the run and of its folder under results/")
    seed: int = Field(0, ge=0, lt=1 << 32, description="seed of all random draws")
    order: Literal["exact", "arrival"] = Field(
        "exact",
        description="exact: the search learns results in the order of their candidates, so any number of workers gives "
        "the same run. arrival: it learns results as they arrive, so no worker waits for a slow one, but timing "
        "influences the run. With either, a resumed run continues exactly",
    )
    model: ModelSettings = Field(description="the base model and its kind")
    experts: dict[str, str] = Field(
        description="mapping from a name for each expert to its folder (a fine-tune, or an adapter of the base), GGUF "
        "file or hub id; an adapter of another model is written MODEL+ADAPTER"
    )
    search: dict[str, Any] = Field(description="mapping with algorithm and the settings of this algorithm")
    budget: Budget = Field(description="when the search ends")
    evaluation: EvaluationSettings = Field(description="tasks and how candidates are scored on them")
    worthwhile: float = Field(
        1.0,
        gt=0,
        le=1e9,
        description="the smallest difference between two models that matters to you, in points of the score (percent "
        "where all metrics are shares); validate and the report say how many items it takes to see it. It changes no "
        "result",
    )
    constraints: list[Constraint] = Field(
        default_factory=list,
        description="what every merge must keep; the winner keeps all of it, or the report says that no candidate does",
    )
    start: list[Word | StartFile] = Field(
        default_factory=list,
        description="models that are scored before the search proposes its first candidate, and that it learns from. "
        "experts: each expert; average: their simple average; masses: task arithmetic with each of baselines.masses; "
        "these are scored as baselines anyhow and cost nothing. Also {recipe: FILE}, {run: FOLDER} (its winner) and "
        "{mergekit: FILE}. Merges that are guessed before the search, with the best total mass of masses if that is "
        "listed, else 1: nan: weights in inverse proportion to the norms of task vectors; relevance: in proportion to "
        "how well they agree with all; depth: a mass that grows with depth; clusters: equal weights for clusters of "
        "similar experts; mwa: weights in proportion to the experts' scores; cocktail: a softmax of these; greedy: the "
        "experts, and averages of the best two, three, …, up to all. All of them count among the candidates of the "
        "budget",
    )
    objectives: dict[str, list[str]] = Field(
        default_factory=dict,
        description="several objectives instead of the score alone: a list of tasks, or a mapping from a name to the "
        "tasks that make it up by their weights. nsga2 and nsga3 search for their Pareto front, by default that of all "
        "tasks; after any search the candidates on the front go to the finals and to the report",
    )
    baselines: Baselines = Baselines()
    finalists: FinalistSettings = FinalistSettings()
    statistics: StatisticsSettings = StatisticsSettings()
    pool: PoolSettings = PoolSettings()
    loggers: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict,
        description="trackers that get every result: mapping from the name of a tracker to its settings (see Loggers "
        "below)",
    )

    @field_validator("start", mode="before")
    @classmethod
    def _some_start(cls, start: Any) -> Any:
        for entry in start if isinstance(start, list) else ():
            one_of = isinstance(entry, dict) and len(entry) == 1 and set(entry) <= set(FILES)
            if not one_of and entry not in WORDS:
                raise ValueError(
                    f"{entry!r} is no model to start with; write {', '.join(WORDS)}, or a mapping with "
                    f"exactly one of the keys {', '.join(FILES)}"
                )
        return start

    @field_validator("experts")
    @classmethod
    def _some_experts(cls, experts: dict[str, str]) -> dict[str, str]:
        if len(experts) < 2:
            raise ValueError("a merge needs several models; give at least two experts")
        for name in experts:
            if not re.match(NAME, name) or name in {"base", "average", "task_arithmetic", "winner"}:
                raise ValueError(
                    f"{name!r} cannot be the name of an expert; use {TEXT_FORMS[NAME]}, and none of the names base, "
                    "average, task_arithmetic and winner"
                )
        return experts

    @model_validator(mode="after")
    def _heads_of_classifiers(self) -> Config:
        if self.model.heads != "merged" and self.model.kind not in CLASSIFIER_KINDS:
            raise ValueError(
                f"model.heads: a model of kind {self.model.kind} has no classification heads; write merged"
            )
        for number, entry in enumerate(self.evaluation.tasks if self.model.heads == "apart" else ()):
            if (entry.head or entry.task) not in self.experts:
                raise ValueError(
                    f"evaluation.tasks[{number}].head: there is no expert {entry.head or entry.task!r}; "
                    f"{nearest(entry.head or entry.task, self.experts)}"
                )
        return self

    @model_validator(mode="after")
    def _alignment_of_units(self) -> Config:
        words = get_args(AlignmentWord)
        if isinstance(self.model.align, str) and self.model.align not in words:
            raise ValueError(f"model.align: {self.model.align!r} is not usable; {nearest(self.model.align, words)}")
        found = self.model.alignment
        if found is not None and found.wrong:
            raise ValueError(f"model.align.{found.wrong}")
        if found is not None and found.parts == "all" and self.model.heads != "merged":
            raise ValueError(
                "model.align: with heads that are not merged, the stream that they read keeps its order; write both"
            )
        return self

    @model_validator(mode="after")
    def _words_of_experts(self) -> Config:
        wanted = self.model.chat_template
        if wanted not in ("auto", "base") and self.model.kind not in LANGUAGE_KINDS:
            raise ValueError(f"model.chat_template: a model of kind {self.model.kind} holds no chats; leave it out")
        for key, said in {"chat_template": wanted, "tokenizer": self.model.tokens.source}.items():
            name = said.removeprefix("expert").strip()
            if (said == "expert" or said.startswith("expert ")) and name not in self.experts:
                raise ValueError(f"model.{key}: there is no expert {name!r}; {nearest(name, self.experts)}")
            if key == "tokenizer" and said not in ("union", "base") and not said.startswith("expert"):
                words = ["union", "base", *(f"expert {n}" for n in self.experts)]
                raise ValueError(f"model.tokenizer: {said!r} is not usable; {nearest(said, words)}")
        return self

    @model_validator(mode="after")
    def _constraints_of_tasks(self) -> Config:
        known, models = [t.task for t in self.evaluation.tasks], [THE_BASE, BEST_EXPERT, *self.experts]
        for number, constraint in enumerate(self.constraints):
            if constraint.task is not None and constraint.task not in known:
                raise ValueError(
                    f"constraints[{number}].task: there is no task {constraint.task!r}; "
                    f"{nearest(constraint.task, known)}"
                )
            if constraint.against not in models:
                raise ValueError(
                    f"constraints[{number}].against: there is no model {constraint.against!r}; "
                    f"{nearest(constraint.against, models)}"
                )
            if constraint.kl is not None and self.model.kind != "causal-lm":
                raise ValueError(
                    f"constraints[{number}].kl: a model of kind {self.model.kind} does not predict the next token of "
                    "a text; leave this constraint out"
                )
            if constraint.kl is not None and self.evaluation.backend != "resident":
                raise ValueError(
                    f"constraints[{number}].kl: the backend {self.evaluation.backend} tells no probabilities of "
                    "tokens; leave this constraint out, or write backend: resident"
                )
        return self

    @field_validator("objectives", mode="before")
    @classmethod
    def _named(cls, objectives: Any) -> Any:
        """A list of tasks is short for a mapping in which each has its own name."""
        return {str(task): [task] for task in objectives} if isinstance(objectives, list) else objectives

    @model_validator(mode="after")
    def _objectives_of_tasks(self) -> Config:
        known = [t.task for t in self.evaluation.tasks]
        if len(self.objectives) == 1:
            raise ValueError(
                "objectives: a front needs at least two objectives, and there is one; add another one, or leave "
                "objectives out"
            )
        for name, tasks in self.objectives.items():
            if not tasks:
                raise ValueError(f"objectives.{name}: names no task; give one, or leave {name} out")
            if not name or set(name) & set(",="):
                raise ValueError(f"objectives: {name!r} cannot be the name of an objective; write one without , and =")
            if len(set(tasks)) < len(tasks):
                raise ValueError(f"objectives.{name}: a task is listed twice; list each task once")
            for task in tasks:
                if task not in known:
                    raise ValueError(f"objectives.{name}: there is no task {task!r}; {nearest(task, known)}")
        return self

    @model_validator(mode="after")
    def _statistics_of_experts(self) -> Config:
        known = [t.task for t in self.evaluation.tasks]
        for expert, tasks in self.statistics.tasks.items():
            if expert not in (*self.experts, "base"):
                raise ValueError(f"statistics.tasks: there is no expert {expert!r}; {nearest(expert, self.experts)}")
            for name in tasks:
                if name not in known:
                    raise ValueError(f"statistics.tasks.{expert}: there is no task {name!r}; {nearest(name, known)}")
            if not tasks:
                raise ValueError(f"statistics.tasks.{expert}: names no task; give one, or leave {expert} out")
        return self

    @field_validator("search")
    @classmethod
    def _names_algorithm(cls, search: dict[str, Any]) -> dict[str, Any]:
        if not isinstance(search.get("algorithm"), str):
            raise ValueError("the search is not named; add the key 'algorithm'")
        return search
