"""lm-eval's requests of the items of a run, and lm-eval's way from answers to a number."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.task import Task

from evolver.config import EvaluationSettings
from evolver.errors import BadInput
from evolver.evaluation.base import ItemText
from evolver.evaluation.items import Item, item_hash
from evolver.evaluation.language.library import Meaning, filters, metric_name, quiet

# What lm-eval's filters make of an answer in which they find nothing.
INVALID = ("[invalid]", "", None)


@dataclass(frozen=True)
class Judgement:
    """What lm-eval says of the answers to an item; ``said`` is the answer in words."""

    answer: float
    invalid: bool
    said: str = ""


class PreparedRequests:
    """One item, ready to be scored: its requests, and how lm-eval turns their answers into a number."""

    def __init__(self, task: Task, metric: str, meaning: Meaning, requests: Sequence[Instance]) -> None:
        self.task, self.meaning, self.requests = task, meaning, list(requests)
        self.metric, chosen = metric_name(metric)
        self._ensembles = list(filters(task))
        self._filter = chosen or self._ensembles[0].name

    @property
    def kind(self) -> str:
        """lm-eval's name for what is asked of the model."""
        return str(self.requests[0].request_type)

    def judge(self, answers: Sequence[Any]) -> Judgement:
        """From the answers to the item's requests, in their order, to what is kept."""
        for request, answer in zip(self.requests, answers, strict=True):
            # A written answer comes with its repeats; greedy ones are all the same.
            said = answer if isinstance(answer, list) else [answer]
            repeats = (request.repeats or 1) // len(said)
            request.resps, request.filtered_resps = said * max(1, repeats), {}
        for ensemble in self._ensembles:
            ensemble.apply(self.requests)
        filtered = [r.filtered_resps[self._filter] for r in self.requests]
        outcome = self.task.process_results(self.requests[0].doc, filtered)
        first = filtered[0]
        invalid = self.kind == "generate_until" and not isinstance(first, list) and first in INVALID
        return Judgement(self.meaning.answer(outcome[self.metric]), invalid, self._in_words(answers, first))

    def _in_words(self, answers: Sequence[Any], filtered: Any) -> str:
        """The answer as people read it: the chosen option, the written text and what was taken of it, or how likely the
        given text is to the model.
        """
        if self.kind == "generate_until":
            written = str(answers[0][0] if isinstance(answers[0], list) else answers[0])
            taken = filtered if isinstance(filtered, str) else written
            if not written.strip():
                return "(an empty answer)"
            return written if taken.strip() in ("", written.strip()) else f"{written} → {taken}"
        if len(self.requests) > 1:
            return self._chosen([likelihood for likelihood, _ in answers])
        likelihood, greedy = answers[0] if isinstance(answers[0], tuple) else (answers[0], None)
        is_first = {True: ", and the model's first choice", False: ", and not the model's first choice", None: ""}
        return f"log-likelihood {float(likelihood):.2f}{is_first[greedy]}"

    def _chosen(self, likelihoods: Sequence[float]) -> str:
        """The option that the metric takes the model to have chosen."""
        options = options_of(self.task, self.requests[0].doc) or [str(r.args[1]).strip() for r in self.requests]
        scores = list(likelihoods[: len(options)])
        if self.metric == "acc_mutual_info":  # behind them stand those of the options without the question
            scores = [s - alone for s, alone in zip(scores, likelihoods[len(options) :], strict=True)]
        elif self.metric in ("acc_norm", "acc_bytes"):
            sizes = (len(o.encode() if self.metric == "acc_bytes" else o) for o in options)
            scores = [s / max(1, size) for s, size in zip(scores, sizes, strict=True)]
        return options[scores.index(max(scores))]


def right(task: Task, document: Any, metric: str, meaning: Meaning) -> float:
    """What an item's answer is held against; lm-eval says it along with an answer, so it is given any answers."""
    found = task.construct_requests(doc=document, ctx="", metadata=(task.task_name, 0, 1))
    requests = found if isinstance(found, list) else [found]
    any_answer: dict[str, Any] = {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0}
    answers = [any_answer.get(str(r.request_type), "") for r in requests]
    return meaning.right(task.process_results(document, answers)[metric_name(metric)[0]])


def options_of(task: Task, document: Any) -> list[str]:
    """The options of a document, where its task has some."""
    has_some = getattr(task.config, "doc_to_choice", None) is not None
    return [str(option) for option in task.doc_to_choice(document)] if has_some else []


def item_text(task: Task, document: Any) -> ItemText:
    """A document as people read it: its question, with the options that a model chooses from, and the right answer."""
    prompt, right, options = task.doc_to_text(document), task.doc_to_target(document), options_of(task, document)
    if getattr(task, "multiple_input", False):  # the options are beginnings then, and the target is what goes on
        prompt, right = f"… {right}", prompt
    if prompt == "":  # a text whose likelihood is asked for
        return ItemText(str(right))
    rights = right if isinstance(right, list) else [right]
    named = [options[r] if isinstance(r, int) and 0 <= r < len(options) else str(r) for r in rights]
    listed = options if task.OUTPUT_TYPE == "multiple_choice" else []
    return ItemText("".join([str(prompt), *(f"\n- {option.strip()}" for option in listed)]), " or ".join(named))


def build_requests(
    task: Task, items: Sequence[Item], scored: Collection[str], settings: EvaluationSettings, lm: Any, seed: int
) -> dict[Item, list[Instance]]:
    """The requests of a task's items.

    Args:
        scored: hashes of all items that are scored in this run, none of which may be an example in a prompt.
        lm: lm-eval's model, for its chat template.

    Raises BadInput where a chat template is asked for and missing, or where too few examples are left.
    """
    in_place, chat = sorted(items, key=lambda i: i.index), settings.apply_chat_template
    if chat and not lm.tokenizer.chat_template:
        raise BadInput("evaluation.apply_chat_template: the base's tokenizer has no chat template; write false.")
    _keep_apart(task, scored)
    _remember(task)
    task.set_fewshot_seed(seed)  # at every build: each draws on, and must not depend on the builds before it
    with quiet():
        task.build_all_requests(
            samples=[i.index for i in in_place],
            system_instruction=settings.system_instruction,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat and settings.fewshot_as_multiturn,
            chat_template=lm.apply_chat_template if chat else None,
            tokenizer_name=lm.tokenizer_name if chat else "",
        )
    grouped: dict[Item, list[Instance]] = {i: [] for i in in_place}
    for instance in task.instances:
        # lm-eval numbers the chosen documents by position among themselves, in the order of the data set.
        grouped[in_place[instance.doc_id or 0]].append(instance)
    return grouped


def _remember(task: Task) -> None:
    """Let a task render each document's texts once: lm-eval compiles their templates anew for every answer."""
    for name in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        method = getattr(task, name, None)
        if method is not None and not isinstance(method, _Remembered):
            setattr(task, name, _Remembered(method))


class _Remembered:
    """A method of a task that keeps what it said of a document."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        self._said: dict[int, tuple[Any, Any]] = {}  # with the document, so that no other one gets its id

    def __call__(self, document: Any, *template: Any) -> Any:
        if template:
            return self._method(document, *template)
        known = self._said.get(id(document))
        if known is None:
            known = self._said[id(document)] = (document, self._method(document))
        return list(known[1]) if isinstance(known[1], list) else known[1]


def _keep_apart(task: Task, scored: Collection[str]) -> None:
    """Take the items that are scored out of those that examples are drawn from: a prompt would give them away."""
    shots = task.get_config("num_fewshot") or 0
    sampler = getattr(task, "sampler", None)
    if not shots or sampler is None:
        return
    free = [d for d in sampler.fewshot_docs() if item_hash(d) not in scored]
    if len(free) <= shots:
        raise BadInput(
            f"evaluation.num_fewshot: {task.task_name} has {len(free)} examples beside the items that are scored and "
            f"{shots} are wanted in a prompt; ask for fewer of either, or write 0."
        )
    sampler.replace_df(free)
    task.__dict__.pop("_fewshot_docs", None)
