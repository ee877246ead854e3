"""The section ``evaluation`` of a configuration."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PlainValidator, model_validator

from evolver.config.section import FUNCTION, Section
from evolver.records import Split


def _amount(value: Any) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if (whole and value >= 1) or (isinstance(value, float) and 0 < value < 1):
        return value
    raise ValueError(
        f"{value!r} is not usable; write a number greater than or equal to 1, or a share of the task's documents above "
        "0 and below 1"
    )


def _amount_or_none(value: Any) -> Any:
    """An amount of items that may be 0, or left open (None)."""
    none = value is None or (value == 0 and isinstance(value, int) and not isinstance(value, bool))
    return value if none else _amount(value)


# A number of items, or a share of a task's documents.
Amount = Annotated[int | float, PlainValidator(_amount)]


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
    """One task. The search sees its dev items only. When the search has ended, its best candidates are scored on the
    select items, on which the winner is chosen, and the winner is scored on the report items once.
    """

    task: str = Field(
        min_length=1,
        description="name of an lm-eval task or group; if you give data or function, any name that you choose",
    )
    metric: str = Field(
        "acc",
        description="metric: of an lm-eval task as lm-eval spells it, with a filter after a comma if there are "
        "several; of a classifier: acc, macro_f1, mcc or pearson; of a token classifier: acc (of words) or f1 (of "
        "spans); of reranking: mrr",
    )
    weight: float = Field(
        1.0,
        ge=1e-6,
        le=1e6,
        description="weight of this task's metric in the score, which is the weighted mean of all tasks",
    )
    dev: Amount = Field(
        description="number of dev items, which the search sees; below 1: their share of the task's documents"
    )
    report: Amount = Field(
        description="number of report items, which are scored once at the end; below 1: their share of the documents"
    )
    select: Annotated[int | float | None, PlainValidator(_amount_or_none)] = Field(
        None,
        description="number of select items, on which the winner is chosen among the best candidates of the search; "
        "below 1: their share of the documents; 0: none, the winner is the best on the dev items. Default: as many as "
        "dev items, but at most half of the documents that are neither dev nor report items",
    )
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
    select_data: str | DataSet | None = Field(
        None, description="like data, for the select items; default: they are taken from data"
    )
    function: str | None = Field(
        None,
        pattern=FUNCTION,
        description="FILE.py:NAME of a function `score(model, items)` that returns one number for each item, higher "
        "being better. With metric acc the numbers lie between 0 and 1, with metric mean they may be any",
    )
    judge: str | None = Field(
        None,
        description="kind of evaluation; default: function if function is given, else the one that fits model.kind. "
        "reranking is for classifiers with one output",
    )
    text: str = Field(
        "text",
        description="column of the data that holds the text; token classifiers: the list of words, or a text with "
        "spaces between them",
    )
    image: str = Field("image", description="image classifiers: column that holds the image or the path of its file")
    text_pair: str | None = Field(
        None,
        description="classifiers of pairs of texts: column that holds the second text; reranking: the list of "
        "documents",
    )
    label: str = Field(
        "label",
        description="classifiers: column that holds the label (an integer or a label of the model), the set of labels, "
        "or the number to predict; token classifiers: the list of tags, one for each word; reranking: the list of "
        "marks, 1 for each right document and 0 for each other one",
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


class EstimateSettings(Section):
    """How a candidate's score of all dev items is estimated from a part of them."""

    items: int = Field(
        ge=1,
        le=10**9,
        description="dev items that a candidate is scored on, rounded up to a multiple of evaluation.block_items",
    )
    kind: Literal["mean", "difference", "p-irt", "gp-irt", "mp-irt"] = Field(
        "difference",
        description="mean: the score of these items. difference: an estimate of the score of all items without bias, "
        "from the answers of the baselines to all items, corrected by the candidate's own answers. p-irt, gp-irt: "
        "item-response estimates from the same answers, which have a bias. mp-irt: p-irt with a merge's ability "
        "predicted from those of the experts (MERGE³)",
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
    fitness: Literal["score", "probability", "both"] = Field(
        "score",
        description="what the search sees of an answer to a dev item. score: the item's score by the task's metric; "
        "probability: how probable the model finds the right answer; both: the mean of the two. On the "
        "classifiers that we measured, the score chose better models; on few items of a language model's "
        "multiple-choice tasks, both did. Select and report items always count by the metrics, so finalists are then "
        "ranked on the select items alone",
    )
    estimate: EstimateSettings | None = Field(
        None,
        description="score the candidates of a search on a part of the dev items and let the search see an estimate of "
        "their scores; at its end, the best finalists.count of them are scored on all dev items. Default: candidates "
        "are scored on all items, or until it is decided that they are not accepted",
    )
    early_stopping: bool = Field(
        True,
        description="stop scoring a candidate when the remaining items can no longer change whether it is accepted",
    )
    subset: Literal["fixed", "rotate"] | None = Field(
        None,
        description="which items a candidate meets first if its evaluation may end before the last one (halving, "
        "racing, estimate). fixed: the same for all; rotate: others for each batch of halving, for each race, and with "
        "estimate for each generation. Default: rotate for racing and for estimates of the kind difference, else fixed",
    )
    racing: float | None = Field(
        None,
        gt=0,
        lt=0.5,
        description="error rate at which a sequential test may reject a candidate early; default: no such test",
    )
    quantise: Literal["q4_0", "q8_0", "int8"] | None = Field(
        None,
        description="score models as they are after this quantisation, which you are going to deploy: q4_0 and q8_0 "
        "are those of llama.cpp, int8 has one scale for each row. Matrices are rounded through the format and computed "
        "with in model.compute; exported models are not quantised. Default: models are scored as they are",
    )
    quantise_search: bool = Field(
        True,
        description="with quantise, score the candidates of the search in this way, too; false: the finalists only, "
        "on the select and the report items",
    )
    report_draw: int = Field(
        0,
        ge=0,
        le=10_000,
        description="0: the first set of report items; 1: the second one, which shares no item with the first, and so "
        "on. `evolver retarget --fresh-report` sets this key to the first set that no run of the family has used",
    )
    threads: int = Field(
        1, ge=1, le=1024, description="CPU threads of one worker; their number influences how sums are rounded"
    )

    def rounding(self, split: Split) -> str | None:
        """The quantisation through which models are rounded before they are scored on a split; None: none."""
        return self.quantise if split != "dev" or self.quantise_search else None

    @model_validator(mode="after")
    def _quantise_said(self) -> EvaluationSettings:
        if not self.quantise_search and self.quantise is None:
            raise ValueError("quantise_search does nothing without quantise; leave it out, or name a quantisation")
        if self.quantise is not None and self.backend != "resident":
            raise ValueError(
                f"quantise: the backend {self.backend} is given whole models; leave quantise out and let the backend "
                "quantise them (model_args), or write backend: resident"
            )
        return self

    @model_validator(mode="after")
    def _data_of_both(self) -> EvaluationSettings:
        for number, task in enumerate(self.tasks):
            for key in ("select_data", "report_data"):
                if getattr(task, key) is not None and task.data is None:
                    raise ValueError(f"task {number} has {key} but no data; give data for its dev items, too")
        return self

    @model_validator(mode="after")
    def _distinct_tasks(self) -> EvaluationSettings:
        names = [t.task for t in self.tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"task {name!r} is listed twice; list it once, with all its items and one weight")
        return self
