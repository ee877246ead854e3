"""The configuration of a run: reads YAML, checks it strictly, and returns typed settings.

Every error is one sentence that names the file, the key and the remedy. This module knows the sections of a
configuration but not the search algorithms. It passes the section ``search`` on unchecked; the algorithm that the
section names then checks it against its own settings with ``check_section``.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from evolver.errors import BadInput, cause_of, nearest, refuse_special

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
# Kinds of models that are scored on texts which they go on with.
LANGUAGE_KINDS = ("causal-lm", "seq2seq")
# The words of model.chat_template that name a format of conversations.
CHAT_FORMATS = ("chatml", "llama3", "mistral", "alpaca")
FUNCTION = r"^.+\.py:[A-Za-z_]\w*$"


class Section(BaseModel):
    """A part of the configuration. It cannot be changed, refuses unknown keys, and never converts types silently."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


SectionType = TypeVar("SectionType", bound=Section)


class TokenEntry(Section):
    """Which row a token has in models that lack it; with ``force``, in all."""

    source: Any = Field(
        None,
        description="a model, or a mapping as in a mergekit file: {kind: zero}, or {kind: model_token, model, token or "
        "token_id}; default: the base, else the mean of the models that have the token",
    )
    force: bool = Field(False, description="give all models this row, also those that have one of their own")


class TokenizerSettings(Section):
    """Where the tokens come from."""

    source: str = Field(
        "union", description="union: the tokens of all models. base: those of the base. expert NAME: those of an expert"
    )
    tokens: dict[str, TokenEntry] = Field(
        default_factory=dict, description="mapping from tokens to which row of the embedding they get"
    )
    pad_to_multiple_of: int | None = Field(
        None, ge=1, description="the number of rows of the embedding is made a multiple of this by rows of zeros"
    )


class ModelSettings(Section):
    """The base model, from which all experts were fine-tuned, and how models are evaluated and stored."""

    base: str = Field(description="the base: its Hugging Face folder, a GGUF file, or a hub id")
    kind: Literal["causal-lm", "seq2seq", "classifier", "image-classifier"] = Field(
        "causal-lm", description="the kind of model that base and experts are evaluated as"
    )
    heads: Literal["merged", "apart", "union"] = Field(
        "merged",
        description="classification heads. merged: heads are merged like any other tensors. apart: "
        "heads are not merged, and each task is scored with the head of one expert. union: heads are merged row by "
        "row, matched by label, so that the model knows the labels of all experts",
    )
    tokenizer: str | TokenizerSettings = Field(
        "union",
        description="tokens of merged models, where the experts' tokens differ from the base's: union, base or expert "
        "NAME, or a mapping with source, tokens and pad_to_multiple_of. union: the tokens of all models. Rows of the "
        "embedding are matched by token; base and experts are scored with their own tokens",
    )
    chat_template: str = Field(
        "auto",
        min_length=1,
        description="chat template of merged models, with its stop tokens and settings of generation. auto: the "
        "base's or, if it has none, the only one that the experts have. base: the base's, if it has one. expert NAME: "
        f"that expert's. A file with a Jinja template, or one of {', '.join(CHAT_FORMATS)}: this template, with the "
        "base's settings",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="dtype that merged weights are rounded to and stored in; auto: the dtype of the base"
    )
    compute: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="dtype of forward passes; auto: the dtype of the weights or float32. Evolver times both where the "
        "workers run, when a run starts, and uses the faster one for the whole run",
    )

    @property
    def tokens(self) -> TokenizerSettings:
        """``tokenizer`` in its long form."""
        return TokenizerSettings(source=self.tokenizer) if isinstance(self.tokenizer, str) else self.tokenizer


class DataSet(Section):
    """A data set of the ``datasets`` library, from a hub or from a local folder."""

    path: str = Field(description="hub id or folder of the data set")
    name: str | None = Field(None, description="configuration of the data set, where it has several")
    split: str = Field(description="split of the data set, such as test")

    @property
    def spelled(self) -> str:
        """Path, name and split in one string, for messages and item names."""
        return "/".join(p for p in (self.path, self.name, self.split) if p)


class TaskEntry(Section):
    """One task. The search sees its dev items only; its report items are scored once, at the end of the run."""

    task: str = Field(
        min_length=1,
        description="name of an lm-eval task or group; if you give data or function, any name that you choose",
    )
    metric: str = Field(
        "acc",
        description="metric: of an lm-eval task as lm-eval spells it, with a filter after a comma if there are "
        "several; of a classifier: acc, macro_f1, mcc or pearson",
    )
    weight: float = Field(
        1.0,
        ge=1e-6,
        le=1e6,
        description="weight of this task's metric in the score, which is the weighted mean of all tasks",
    )
    dev: int = Field(ge=1, description="number of dev items, which the search sees")
    report: int = Field(ge=1, description="number of report items, which are scored once at the end")
    report_task: str | None = Field(
        None,
        min_length=1,
        description="lm-eval task that the report items are taken from; default: the same task as the dev items",
    )
    num_fewshot: int | None = Field(None, ge=0, description="like evaluation.num_fewshot, for this task only")
    gen_kwargs: dict[str, Any] | None = Field(None, description="like evaluation.gen_kwargs, for this task only")
    data: str | DataSet | None = Field(
        None,
        description="your own data: a JSONL, JSON, CSV, TSV or Parquet file, or a mapping with path, name and split of "
        "a data set of the `datasets` library. Classifiers and functions are scored on its rows. For a language model, "
        "also a text file; the perplexity of its passages is measured",
    )
    report_data: str | DataSet | None = Field(
        None, description="like data, for the report items; default: they are taken from data"
    )
    function: str | None = Field(
        None,
        pattern=FUNCTION,
        description="FILE.py:NAME of a function `score(model, items)` that returns one number for each item, higher "
        "being better. With metric acc the numbers lie between 0 and 1, with metric mean they may be any",
    )
    judge: str | None = Field(
        None,
        description="kind of evaluation; default: function if function is given, else the one that fits model.kind",
    )
    text: str = Field("text", description="column of the data that holds the text")
    image: str = Field("image", description="image classifiers: column that holds the image or the path of its file")
    text_pair: str | None = Field(None, description="classifiers of pairs of texts: column that holds the second text")
    label: str = Field(
        "label",
        description="classifiers: column that holds the label (an integer or a label of the model), the set of labels, "
        "or the number to predict",
    )
    head: str | None = Field(
        None,
        description="with model.heads: apart, the expert whose head scores this task; default: the expert that has the "
        "name of the task",
    )
    threshold: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="classifiers with sets of labels: the model names the labels whose sigmoid is above this threshold",
    )


class EvaluationSettings(Section):
    """How candidates are scored. These settings cannot change within a run, since they influence its scores."""

    tasks: list[TaskEntry] = Field(min_length=1, description="list of tasks, at least one")
    include_path: str | None = Field(None, description="folder with lm-eval task files of your own")
    num_fewshot: int | None = Field(
        None, ge=0, description="number of few-shot examples in a prompt; default: what the task says"
    )
    apply_chat_template: bool = Field(False, description="put prompts into the chat template (see model.chat_template)")
    fewshot_as_multiturn: bool = Field(
        True, description="with a chat template, each few-shot example becomes a separate turn"
    )
    system_instruction: str | None = Field(None, description="system prompt for all tasks")
    gen_kwargs: dict[str, Any] | None = Field(
        None,
        description="generation settings that replace those of the tasks, such as max_gen_toks, until, temperature",
    )
    confirm_run_unsafe_code: bool = Field(
        False, description="allow tasks that execute code which the model has written"
    )
    backend: str = Field(
        "resident",
        description="resident: one Hugging Face model stays loaded and its weights are overwritten. Otherwise the name "
        "of a model type of lm-eval, such as vllm, which is started on each candidate",
    )
    model_args: dict[str, Any] = Field(
        default_factory=dict,
        description="further arguments for the backend; {port} and {model} are replaced by the server's port and the "
        "candidate's folder",
    )
    serve: str | None = Field(
        None,
        description="command that starts a server on a candidate for the backend, such as "
        "`vllm serve {model} --port {port}`",
    )
    batch_tokens: int = Field(
        2048,
        ge=16,
        le=10**9,
        description="largest number of tokens in one forward pass, with padding; only the backend resident reads it",
    )
    batch_size: int | None = Field(
        None, ge=1, le=10**9, description="largest number of rows in one forward pass; default: no limit"
    )
    block_items: int = Field(
        64,
        ge=1,
        le=10**9,
        description="items that are scored at a time by searches that may stop early; after each block they look "
        "whether to stop",
    )
    early_stopping: bool = Field(
        True,
        description="stop scoring a candidate when the remaining items can no longer change whether it is accepted",
    )
    racing: float | None = Field(
        None,
        gt=0,
        lt=0.5,
        description="error rate at which a sequential test may reject a candidate early; default: no such test",
    )
    threads: int = Field(
        1, ge=1, le=1024, description="CPU threads of one worker; their number influences how sums are rounded"
    )

    @model_validator(mode="after")
    def _data_of_both(self) -> EvaluationSettings:
        for number, task in enumerate(self.tasks):
            if task.report_data is not None and task.data is None:
                raise ValueError(f"task {number} has report_data but no data; give data for its dev items, too")
        return self

    @model_validator(mode="after")
    def _distinct_tasks(self) -> EvaluationSettings:
        names = [t.task for t in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"task {name!r} is listed twice; list it once, with all its items and one weight")
        return self


class Budget(Section):
    """When the search ends: after a number of candidates, or of scored items. You may raise it later."""

    candidates: int | None = Field(
        None, ge=1, le=10**12, description="number of candidates that the search may propose"
    )
    items: int | None = Field(
        None, ge=1, le=10**12, description="number of items that the search may score; known results cost nothing"
    )

    @model_validator(mode="after")
    def _one_of(self) -> Budget:
        if self.candidates is None and self.items is None:
            raise ValueError("the budget has no limit; give candidates or items")
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


class StatisticsSettings(Section):
    """What merge methods that ask for statistics of the experts, such as regmean, get them from: dev items only."""

    items: int = Field(
        1000, ge=1, le=10**9, description="dev items that the statistics of one expert are collected on, at most"
    )
    tasks: dict[str, list[str]] = Field(
        default_factory=dict,
        description="expert → the tasks whose dev items its statistics are collected on; default: the task of the "
        "expert's name, or all tasks where there is none",
    )


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
        description="mapping from a name for each expert to its folder (a fine-tune or a LoRA adapter), GGUF file or "
        "hub id"
    )
    search: dict[str, Any] = Field(description="mapping with algorithm and the settings of this algorithm")
    budget: Budget = Field(description="number of candidates or of scored items")
    evaluation: EvaluationSettings = Field(description="tasks and how candidates are scored on them")
    baselines: Baselines = Baselines()
    statistics: StatisticsSettings = StatisticsSettings()
    pool: PoolSettings = PoolSettings()
    loggers: dict[str, dict[str, Any] | None] = Field(
        default_factory=dict,
        description="trackers that get every result: mapping from the name of a tracker to its settings (see Loggers "
        "below)",
    )

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
        if self.model.heads != "merged" and self.model.kind not in ("classifier", "image-classifier"):
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
            raise ValueError("the search is not named; add the key 'algorithm'")
        return search


# Parts of pydantic's messages, and what a user of YAML calls the same.
WORDING = {
    "a valid integer": "an integer",
    "a valid string": "text (in quotes, if it looks like a number or a date)",
    "a valid boolean": "true or false",
    "a valid list": "a list",
    "a valid ": "a ",
    "String should have": "text of",
    "List should have": "a list of",
    " after validation, not 0": "",
}
# What texts have to look like, by their regular expression.
TEXT_FORMS = {
    NAME: "letters, digits, '.', '_' and '-', with a letter or digit first",
    FUNCTION: "the file and the name of a function as FILE.py:NAME",
}

# Keys that may change between two calls of a run. A change of any other key is refused.
FREE_KEYS = ("run", "pool", "budget", "loggers")


@dataclass(frozen=True)
class ConfigText:
    """The text of a configuration, not parsed yet.

    Attributes:
        text: YAML.
        origin: the file that error messages name: the user's own, or the copy in a run's folder.
    """

    text: str
    origin: str

    def parsed(self) -> Config:
        """The checked configuration.

        Raises BadInput for text that is not YAML, an unknown key (naming the nearest known one) or a wrong type.
        """
        return check_section(Config, self.mapping(Config.model_fields), self.origin)

    def mapping(self, keys: Iterable[str]) -> dict[str, Any]:
        """The top-level mapping of the text, unchecked.

        Args:
            keys: the keys that it may have; only the error message uses them.

        Raises BadInput for text that is not YAML or has no mapping at its top level.
        """
        with valid_yaml(self.origin):
            raw = yaml.load(self.text, Loader=Loader)
        if not isinstance(raw, dict):
            raise BadInput(f"{self.origin}: the configuration must be a mapping with the keys {', '.join(keys)}.")
        return raw


@contextlib.contextmanager
def valid_yaml(origin: str) -> Iterator[None]:
    """While YAML is parsed: raises BadInput that names ``origin`` for what is no YAML, or is nested too deeply."""
    try:
        yield
    except RecursionError:
        raise BadInput(f"{origin}: its lists and mappings are nested too deeply; correct the file.") from None
    except (yaml.YAMLError, ValueError, TypeError) as error:  # a date of month 13 is a ValueError, {[]: 1} a TypeError
        reason = " ".join(str(error).split())[:300]
        raise BadInput(f"{origin}: the file is not valid YAML ({reason}); correct it there.") from error


def config_at(path: str | Path) -> ConfigText:
    """Read a configuration file without parsing it.

    Raises BadInput for a file that cannot be read.
    """
    try:
        refuse_special(path)
        return ConfigText(Path(path).read_text(), str(path))
    except (OSError, ValueError) as error:  # a path with a zero in it is a ValueError
        raise BadInput(
            f"{str(path)[:200]}: the configuration cannot be read ({cause_of(error)}); give the path of a YAML file."
        ) from error


def load(path: str | Path) -> Config:
    """Read and check a configuration file.

    Raises BadInput for a file that cannot be read, an unknown key (naming the nearest known one) or a wrong type.
    """
    return config_at(path).parsed()


def renamed(config: Config, run: str) -> Config:
    """A copy of the configuration with another run name.

    Raises BadInput for a name that a run's folder cannot have.
    """
    if not re.match(NAME, run):
        raise BadInput(f"--run: {run!r} cannot be the name of a run; write {TEXT_FORMS[NAME]}.")
    return config.model_copy(update={"run": run})


def computing(config: Config, compute: str) -> Config:
    """A copy of the configuration with ``model.compute`` set to this dtype."""
    return config.model_copy(update={"model": config.model.model_copy(update={"compute": compute})})


def keeping_base_chat(config: Config) -> Config:
    """A copy of the configuration whose models keep the base's chat template, or its lack of one."""
    return config.model_copy(update={"model": config.model.model_copy(update={"chat_template": "base"})})


def check_section(kind: type[SectionType], raw: Mapping[str, Any], file: str, prefix: str = "") -> SectionType:
    """Check the mapping ``raw`` and return it as a typed section.

    Args:
        kind: the class of the section.
        file: name of the file, for error messages.
        prefix: dotted key of the section in the file, such as ``search.``, for error messages.

    Raises BadInput for the first error found, naming file, key and remedy.
    """
    try:
        return kind.model_validate(dict(raw))
    except ValidationError as error:
        # A misspelt key causes two errors, as the right key is missing: the unknown key comes first. Where a value may
        # have one of several types, pydantic reports an error for each; the one deepest inside the value says most.
        first = min(error.errors(), key=lambda e: (e["type"] != "extra_forbidden", -len(e["loc"])))
        raise BadInput(f"{file}: {_sentence(kind, first, prefix)}") from None


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Compare two nested mappings.

    Yields, for every key in which they differ, the dotted key and both values; a missing value is None.
    """
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
    """Pairs of the members of two lists, if both lists hold mappings only and equally many; else an empty list."""
    if not (isinstance(a, list) and isinstance(b, list) and len(a) == len(b)):
        return []
    return list(zip(a, b, strict=True)) if all(isinstance(one, Mapping) for one in (*a, *b)) else []


def default_at(kind: type[BaseModel], key: str) -> Any:
    """The default of a dotted key of a section; None if the key has no default or does not exist."""
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
    """A YAML loader that refuses a mapping with the same key twice. PyYAML itself would silently keep the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(k, deep=True) for k, _ in node.value if not k.tag.endswith(":merge")]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", node.start_mark)
        return super().construct_mapping(node, deep)


def _sentence(kind: type[BaseModel], error: ErrorDetails, prefix: str) -> str:
    """One of pydantic's errors as a sentence that names the key, what is wrong, and what to write."""
    *path, last = error["loc"] or ("",)
    within = _at(kind, path)
    keys, here = within.keys + _at(within.type, [last]).keys, _at(kind, error["loc"]).type
    place = prefix + "".join(f"[{k}]" if isinstance(k, int) else f".{k}" for k in keys).lstrip(".")
    place = place.replace("..", ".") or "the configuration"
    if error["type"] == "extra_forbidden":
        return f"{place}: unknown key; {nearest(str(last), _fields(within.type))}"
    if error["type"] == "missing":
        description = _fields(within.type)[str(last)].description
        return f"{place}: this key is missing; add it{f' ({description})' if description else ''}."
    if error["type"] == "value_error":
        said = error["msg"].removeprefix("Value error, ")
        return f"{place}: {said}." if keys or prefix else f"{said}."  # what concerns several sections names them itself
    return f"{place}: {error['input']!r} is not usable; write {_wanted(error, here)}."


def _wanted(error: ErrorDetails, here: Any) -> str:
    """What to write instead of a value of a wrong type or outside its range."""
    if error["type"] in ("model_type", "dict_type"):
        keys = ", ".join(_fields(here))
        return f"a mapping with the keys {keys}" if keys else "a mapping"
    if error["type"] == "string_pattern_mismatch":
        return TEXT_FORMS[error["ctx"]["pattern"]]
    wanted = error["msg"].removeprefix("Input should be ")
    for pydantic, plain in WORDING.items():
        wanted = wanted.replace(pydantic, plain)
    return f"a number {wanted}" if wanted.startswith(("greater", "less")) else wanted


@dataclass(frozen=True)
class _Spot:
    """A place in a configuration: the keys that lead to it as a user writes them, and the type of its value."""

    keys: list[int | str]
    type: Any


def _at(kind: Any, loc: Sequence[int | str]) -> _Spot:
    """Follow the location of one of pydantic's errors.

    Where a value may have one of several types, pydantic puts the name of the type that it tried into the location
    (``data.DataSet.path``). No configuration has such a key, so it is left out.
    """
    keys: list[int | str] = []
    for part in loc:
        choices = [c for c in get_args(kind) if c is not type(None)] if get_origin(kind) in (Union, UnionType) else []
        tried = next((c for c in choices if getattr(c, "__name__", "") == part), None)
        if tried is not None:
            kind = tried
            continue
        kind = choices[0] if len(choices) == 1 else kind
        keys.append(part)
        inside = get_args(kind)
        kind = _fields(kind)[part].annotation if part in _fields(kind) else inside[-1] if inside else None
    return _Spot(keys, kind)


def _fields(kind: Any) -> Mapping[Any, FieldInfo]:
    """The fields of a section by key; none for any other type."""
    return kind.model_fields if isinstance(kind, type) and issubclass(kind, BaseModel) else {}


def _inner(kind: type[BaseModel], field: str) -> Any:
    """The type of a field, or of the members of a list."""
    annotation = kind.model_fields[field].annotation
    return getattr(annotation, "__args__", (annotation,))[0]


# YAML 1.2 reads 1e-9 as a number; PyYAML wants a dot in it.
Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+[eE][-+]?\d+\Z"), list("-+0123456789"))
