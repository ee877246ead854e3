"""The configuration: YAML in, strict typed settings out, every complaint one sentence with file, key and remedy.

Ground floor: it knows the sections of a configuration, not the algorithms. The section ``search`` is handed on as it
stands; the algorithm that it names checks it against its own settings with ``check_section``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from evolver.errors import BadInput, nearest

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class Section(BaseModel):
    """A part of the configuration: frozen, no unknown keys, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


SectionType = TypeVar("SectionType", bound=Section)


class ModelSettings(Section):
    """The common ancestor of the experts and the kind of model that it is."""

    base: str = Field(description="Hugging Face folder of the base, a GGUF file, or a hub id")
    kind: Literal["causal-lm", "seq2seq", "classifier", "image-classifier"] = Field(
        "causal-lm", description="what the model is evaluated as"
    )
    heads: Literal["merged", "apart", "union"] = Field(
        "merged",
        description="classification heads: merged as they stand; kept apart, each task scored with one expert's; or "
        "merged over the union of the experts' labels",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype that merged weights are rounded to and stored in; auto: that of the base"
    )
    compute: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="dtype of forward passes; auto: that of the weights or float32, whichever is faster where the "
        "first worker is, for the whole run",
    )


class DataSet(Section):
    """A data set of the ``datasets`` library: of a hub, or of a local folder."""

    path: str
    name: str | None = None
    split: str

    @property
    def spelled(self) -> str:
        return "/".join(p for p in (self.path, self.name, self.split) if p)


class TaskEntry(Section):
    """One task: which items the search may see (dev), and which are scored once, at the end (report)."""

    task: str = Field(
        min_length=1,
        description="name of an lm-eval task or group; a name of your own where data or function is given",
    )
    metric: str = Field("acc", description="metric, in lm-eval's spelling; classifier: acc, macro_f1, mcc or pearson")
    weight: float = Field(1.0, gt=0, description="weight of the task's metric in the score")
    dev: int = Field(ge=1, description="number of dev items")
    report: int = Field(ge=1, description="number of report items")
    report_task: str | None = Field(None, description="take report items from this task instead of splitting one")
    num_fewshot: int | None = Field(None, ge=0, description="as evaluation.num_fewshot, for this task")
    gen_kwargs: dict[str, Any] | None = Field(None, description="as evaluation.gen_kwargs, for this task")
    data: str | DataSet | None = Field(
        None,
        description="a JSONL, CSV, TSV or Parquet file, or path, name and split of a `datasets` set: what a classifier "
        "or a function is scored on; language model: a file of these or a text, for its perplexity",
    )
    report_data: str | DataSet | None = Field(None, description="the same for the report items")
    function: str | None = Field(
        None,
        pattern=r"^.+\.py:[A-Za-z_]\w*$",
        description="FILE.py:NAME of a function `score(model, items)` that returns one number an item; "
        "metric acc: between 0 and 1, mean: any, more being better",
    )
    judge: str | None = Field(
        None, description="kind of evaluation; default: function where one is given, else what model.kind stands for"
    )
    text: str = Field("text", description="key of the text")
    image: str = Field("image", description="image classifier: key of the image, or of its file's path")
    text_pair: str | None = Field(None, description="classifier: key of the second text of a pair")
    label: str = Field(
        "label",
        description="classifier: key of the label (an integer or a label of the model), set of labels, or number",
    )
    head: str | None = Field(
        None, description="heads apart: the expert whose head scores this task; default: the one of the task's name"
    )
    threshold: float | None = Field(
        None, gt=0, lt=1, description="classifier: several labels an item: those whose sigmoid is above it"
    )


class EvaluationSettings(Section):
    """How candidates are scored. Everything here is part of the run's identity."""

    tasks: list[TaskEntry] = Field(min_length=1)
    include_path: str | None = Field(None, description="folder of further lm-eval task files")
    num_fewshot: int | None = Field(None, ge=0, description="examples in the prompt; default: the task's own")
    apply_chat_template: bool = Field(False, description="wrap prompts in the model's chat template")
    fewshot_as_multiturn: bool = Field(True, description="with a chat template: each example is a turn of its own")
    system_instruction: str | None = Field(None, description="system prompt")
    gen_kwargs: dict[str, Any] | None = Field(
        None, description="settings of generation over those of the tasks, such as max_gen_toks, until, temperature"
    )
    confirm_run_unsafe_code: bool = Field(False, description="allow tasks that run code which the model wrote")
    backend: str = Field(
        "resident", description="resident: one live Hugging Face model; else a model type of lm-eval, such as vllm"
    )
    model_args: dict[str, Any] = Field(
        default_factory=dict,
        description="arguments of the backend's class beside the candidate's folder; {port} and {model} are filled in",
    )
    serve: str | None = Field(
        None, description="command that serves a candidate for the backend, such as `vllm serve {model} --port {port}`"
    )
    batch_tokens: int = Field(2048, ge=16, description="tokens, padding included, in one forward pass")
    batch_size: int | None = Field(None, ge=1, description="most rows in one forward pass")
    block_items: int = Field(
        64, ge=1, description="items between two looks at whether to stop, in searches that may stop early"
    )
    early_stopping: bool = Field(True, description="stop once the remaining items cannot change the decision")
    racing: float | None = Field(
        None, gt=0, lt=0.5, description="error rate at which a race may reject a candidate early; default: none"
    )
    threads: int = Field(1, ge=1, description="CPU threads of one worker; results in bfloat16 depend on it")

    @model_validator(mode="after")
    def _distinct_tasks(self) -> EvaluationSettings:
        names = [t.task for t in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"task {name!r} stands twice; give its items once, with one weight")
        return self


class Budget(Section):
    """When the search ends: after so many candidates, or so many scored items. It may be raised later."""

    candidates: int | None = Field(None, ge=1, description="candidates that the search may propose")
    items: int | None = Field(None, ge=1, description="items that the search may score")

    @model_validator(mode="after")
    def _one_of(self) -> Budget:
        if self.candidates is None and self.items is None:
            raise ValueError("give candidates or items")
        return self


class Baselines(Section):
    """The plain merges that every winner is held against."""

    masses: list[float] = Field(
        default=[0.25, 0.5, 1.0, 1.5, 2.0],
        description="total masses tried on the dev set for tuned task arithmetic with equal weights",
    )

    @field_validator("masses")
    @classmethod
    def _positive(cls, masses: list[float]) -> list[float]:
        if not masses or min(masses) <= 0:
            raise ValueError("give at least one mass, all above 0")
        return masses


class StatisticsSettings(Section):
    """What merge methods that ask for statistics of the experts, such as regmean, get them from: dev items only."""

    items: int = Field(1000, ge=1, description="dev items that the statistics of one expert are collected on, at most")
    tasks: dict[str, list[str]] = Field(
        default_factory=dict,
        description="expert → the tasks whose dev items its statistics are collected on; default: the task of the "
        "expert's name, or all tasks where there is none",
    )


class PoolSettings(Section):
    """Where candidates are evaluated. Nothing here changes a result, so it may differ from call to call."""

    kind: str = Field(
        "auto", description="local: this machine; ray: Ray actors; auto: ray inside a Ray job, else local"
    )
    num_workers: int = Field(
        1,
        ge=1,
        description="workers: Ray actors, of which those that find no place yet join when the cluster has one, or "
        "processes on this machine",
    )
    num_cpus: float | None = Field(None, gt=0, description="CPUs of one actor; default: evaluation.threads")
    num_gpus: float | None = Field(
        None, ge=0, description="GPUs of one actor, or a share of one; default: 1 where the cluster has any, else 0"
    )
    resources: dict[str, float] = Field(
        default_factory=dict, description="custom resources of one actor, as {a100: 1} of nodes started with them"
    )
    cache_gb: float = Field(2.0, ge=0, description="memory of one worker for already built models (GiB)")
    timeout_s: float | None = Field(
        None, gt=0, description="seconds that one evaluation may take; a local worker then has a process of its own"
    )
    price_per_hour: float | None = Field(None, ge=0, description="what an hour of one worker costs, for the report")
    watts: float | None = Field(None, ge=0, description="power of one worker, for the report")
    share: int = Field(
        1, ge=1, description="Ray actors that share the items of one candidate, block by block; the result is the same"
    )
    retries: int = Field(1, ge=0, description="further tries of a candidate whose worker died")
    ahead: bool = Field(
        True,
        description="idle workers score what a search is guessed to ask for next; wrong guesses are thrown away, and "
        "are not counted in the budget",
    )


class Config(Section):
    """The whole configuration of one run."""

    run: str = Field(pattern=NAME, description="name of the run and of its folder under results/")
    seed: int = Field(0, ge=0, description="seed of everything that is drawn")
    order: Literal["exact", "arrival"] = Field(
        "exact",
        description="exact: results are learnt in the order of their candidates, and any number of workers makes the "
        "same run; arrival: as they come, so that no worker waits for a slow one, and timing makes the run. Resuming "
        "goes on exactly either way",
    )
    model: ModelSettings
    experts: dict[str, str] = Field(
        description="name → folder of a fine-tune or of a LoRA adapter, a GGUF file, or a hub id"
    )
    search: dict[str, Any] = Field(description="algorithm and its settings")
    budget: Budget
    evaluation: EvaluationSettings
    baselines: Baselines = Baselines()
    statistics: StatisticsSettings = StatisticsSettings()
    pool: PoolSettings = PoolSettings()
    loggers: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict, description="trackers that are told of every result: name → settings, of those below"
    )

    @field_validator("experts")
    @classmethod
    def _some_experts(cls, experts: dict[str, str]) -> dict[str, str]:
        if len(experts) < 2:
            raise ValueError("give at least two experts")
        for name in experts:
            if not re.match(NAME, name) or name in {"base", "average", "task_arithmetic", "winner"}:
                raise ValueError(f"{name!r} cannot be the name of an expert; use letters, digits, '.', '_' and '-'")
        return experts

    @model_validator(mode="after")
    def _heads_of_classifiers(self) -> Config:
        if self.model.heads != "merged" and self.model.kind not in ("classifier", "image-classifier"):
            raise ValueError(f"model.heads: a {self.model.kind} has no classification heads; write merged")
        for number, entry in enumerate(self.evaluation.tasks if self.model.heads == "apart" else ()):
            if (entry.head or entry.task) not in self.experts:
                raise ValueError(
                    f"evaluation.tasks[{number}].head: {entry.head or entry.task!r} is no expert; "
                    f"{nearest(entry.head or entry.task, self.experts)}"
                )
        return self

    @model_validator(mode="after")
    def _statistics_of_experts(self) -> Config:
        known = [t.task for t in self.evaluation.tasks]
        for expert, tasks in self.statistics.tasks.items():
            if expert not in self.experts:
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
            raise ValueError("name the search with the key 'algorithm'")
        return search


# Pydantic's words, and ours.
WORDING = {
    "a valid integer": "an integer",
    "a valid ": "a ",
    "String should match pattern": "text matching",
    "String should have": "text of",
    "List should have": "a list of",
    " after validation, not 0": "",
}

# What a run may change between two calls without becoming another run.
FREE_KEYS = ("run", "pool", "budget", "loggers")


@dataclass(frozen=True)
class ConfigText:
    """A configuration as its author wrote it.

    Attributes:
        text: YAML.
        origin: the place that messages name: a file of the user's, or the copy in a run's folder.
    """

    text: str
    origin: str

    def parsed(self) -> Config:
        """The configuration.

        Raises BadInput for what is no YAML, an unknown key (naming the nearest known one) or a wrong type.
        """
        return check_section(Config, self.mapping(Config.model_fields), self.origin)

    def mapping(self, keys: Iterable[str]) -> dict[str, Any]:
        """The mapping that the text holds; ``keys`` are those that it may have, for the message.

        Raises BadInput for text that holds no mapping.
        """
        try:
            raw = yaml.load(self.text, Loader=Loader)
        except yaml.YAMLError as error:
            raise BadInput(f"{self.origin}: not valid YAML: {' '.join(str(error).split())}; mend the file.") from error
        if not isinstance(raw, dict):
            raise BadInput(f"{self.origin}: the configuration must be a mapping with the keys {', '.join(keys)}.")
        return raw


def config_at(path: str | Path) -> ConfigText:
    """The configuration in a file, as it stands there.

    Raises BadInput for an unreadable file.
    """
    try:
        return ConfigText(Path(path).read_text(), str(path))
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: the configuration cannot be read ({error}); give the path of a YAML file.") from error


def load(path: str | Path) -> Config:
    """The configuration in a file.

    Raises BadInput for an unreadable file, an unknown key (naming the nearest known one) or a wrong type.
    """
    return config_at(path).parsed()


def renamed(config: Config, run: str) -> Config:
    """The configuration under another run name.

    Raises BadInput for what cannot be the name of a folder.
    """
    if not re.match(NAME, run):
        raise BadInput(f"--run: {run!r} cannot be a run's name; use letters, digits, dots, dashes and underscores.")
    return config.model_copy(update={"run": run})


def computing(config: Config, compute: str) -> Config:
    """The configuration with forward passes in this dtype."""
    return config.model_copy(update={"model": config.model.model_copy(update={"compute": compute})})


def check_section(kind: type[SectionType], raw: Mapping[str, Any], file: str, prefix: str = "") -> SectionType:
    """``raw`` as a typed section; ``prefix`` is where it stands in the file, for the message.

    Raises BadInput that names file, key and remedy of the first complaint.
    """
    try:
        return kind.model_validate(dict(raw))
    except ValidationError as error:
        # A misspelt key is missing under its right name, too: its hint says more.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        raise BadInput(f"{file}: {_sentence(kind, first, prefix)}") from None


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The keys, dotted, in which two nested mappings differ, with both values; None for a value that is not there."""
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(b, Mapping) and (isinstance(a, Mapping) or key not in old):
            yield from differences(a or {}, b, f"{prefix}{key}.")
        elif a != b and (pairs := _sections(a, b)):
            for n, (one, other) in enumerate(pairs):
                yield from differences(one, other, f"{prefix}{key}[{n}].")
        elif a != b:
            yield f"{prefix}{key}", a, b


def _sections(a: Any, b: Any) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """The pairs that two lists make which hold equally many mappings."""
    if not (isinstance(a, list) and isinstance(b, list) and len(a) == len(b)):
        return []
    return list(zip(a, b, strict=True)) if all(isinstance(one, Mapping) for one in (*a, *b)) else []


def default_at(kind: type[BaseModel], key: str) -> Any:
    """The default of a key, dotted, of a section; None where it has none, or where there is no such key."""
    first, _, rest = key.partition(".")
    name = first.partition("[")[0]
    if name not in kind.model_fields:
        return None
    if rest:
        inner = _inner(kind, name)
        return default_at(inner, rest) if isinstance(inner, type) and issubclass(inner, BaseModel) else None
    field = kind.model_fields[name]
    return None if field.is_required() else field.get_default(call_default_factory=True)


class Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error instead of a silent loss."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value if not k.tag.endswith(":merge")]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _sentence(kind: type[BaseModel], error: ErrorDetails, prefix: str) -> str:
    place = prefix + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in error["loc"]).lstrip(".")
    place = place.replace("..", ".") or "the configuration"
    if error["type"] == "extra_forbidden":
        known = _fields_at(kind, error["loc"][:-1])
        return f"{place}: unknown key; {nearest(str(error['loc'][-1]), known)}"
    if error["type"] == "missing":
        return f"{place}: missing; {_description(kind, error['loc']) or 'give a value'}."
    said = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "value_error":
        return f"{place}: {said}."
    wanted = said
    for pydantic, plain in WORDING.items():
        wanted = wanted.replace(pydantic, plain)
    return f"{place}: {error['input']!r} is not usable; write {wanted}."


def _fields_at(kind: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    for part in loc:
        if isinstance(part, int):
            continue
        inner = _inner(kind, part)
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        kind = inner
    return list(kind.model_fields)


def _inner(kind: type[BaseModel], field: str) -> Any:
    """The type of a field, or of the members of a list."""
    annotation = kind.model_fields[field].annotation
    return getattr(annotation, "__args__", (annotation,))[0]


def _description(kind: type[BaseModel], loc: tuple[int | str, ...]) -> str:
    *path, last = loc
    for part in path:
        if not isinstance(part, int):
            kind = _inner(kind, part)
    field = kind.model_fields.get(str(last))
    return f"it is the {field.description}" if field and field.description else ""


# YAML 1.2 reads 1e-9 as a number; PyYAML wants a dot in it.
Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+\Z"), list("-+0123456789"))
