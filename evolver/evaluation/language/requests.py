"""Builds lm-eval's requests for the items of a run, and turns the model's answers into a number as lm-eval does."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.samplers import FirstNSampler
from lm_eval.api.task import Task
from scipy.special import softmax

from evolver.config.evaluation import EvaluationSettings
from evolver.errors import BadInput, cause_of
from evolver.evaluation.base import ItemText, Scored
from evolver.evaluation.items import Item, item_hash
from evolver.evaluation.language.library import Meaning, filters, metric_name, quiet
from evolver.records import ItemAnswer

# What a chat template that is tried out has to repeat.
ASKED = "Which colour has the sky?"
# The values that lm-eval's filters return if they find no answer in a generated text.
INVALID = ("[invalid]", "", None)


@dataclass(frozen=True)
class Judgement:
    """The result of an item: its answer as it is kept and in words, whether the generated text held no answer, and the
    probability of the right answer (None: not known).
    """

    answer: ItemAnswer
    invalid: bool
    said: str = ""
    probability: float | None = None

    def enter(self, out: Scored, place: int) -> None:
        """Add this result to those of other items."""
        out.answers[place], out.said[place] = self.answer, self.said
        if self.probability is not None:
            out.probabilities[place] = self.probability
        out.invalid += self.invalid


class PreparedRequests:
    """One item that is ready to be scored: its requests, and how lm-eval turns their answers into a number.

    Args:
        task: lm-eval's task.
        metric: the metric in lm-eval's notation ``metric,filter``.
        meaning: how this metric is computed.
        requests: the requests of the item.
    """

    def __init__(self, task: Task, metric: str, meaning: Meaning, requests: Sequence[Instance]) -> None:
        self.task, self.meaning, self.requests = task, meaning, list(requests)
        self.metric, chosen = metric_name(metric)
        self._ensembles = list(filters(task))
        self._filter = chosen or self._ensembles[0].name

    @property
    def kind(self) -> str:
        """lm-eval's name for the kind of request, such as ``loglikelihood`` or ``generate_until``."""
        return str(self.requests[0].request_type)

    def right_requests(self) -> list[int]:
        """The number of the request whose answer is right, in a list; none where the task names no right one."""
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return [0]
        return right_options(self.task, self.requests[0].doc)[:1]

    def judge(self, answers: Sequence[Any]) -> Judgement:
        """Turn the model's answers to the item's requests, in their order, into the result of the item."""
        for request, answer in zip(self.requests, answers, strict=True):
            # A generated answer is a list of its repeats. Greedy decoding gives one text for all repeats, and where
            # tasks are sampled together, each gets as many answers as the one that wants most.
            said = answer if isinstance(answer, list) else [answer]
            repeats = request.repeats or 1
            request.resps, request.filtered_resps = (said * repeats if len(said) == 1 else said[:repeats]), {}
        for ensemble in self._ensembles:
            ensemble.apply(self.requests)
        filtered = [r.filtered_resps[self._filter] for r in self.requests]
        outcome = self.task.process_results(self.requests[0].doc, filtered)
        first = filtered[0]
        invalid = self.kind == "generate_until" and not isinstance(first, list) and first in INVALID
        words = self._in_words(answers, first)
        return Judgement(self.meaning.answer(outcome[self.metric]), invalid, words, self._probability(answers))

    def _probability(self, answers: Sequence[Any]) -> float | None:
        """How probable the model finds the right answer: the right ones among all options, as for lm-eval's Brier
        score; None where there are no options.
        """
        if self.task.OUTPUT_TYPE != "multiple_choice" or len(self.requests) < 2:
            return None
        rights = right_options(self.task, self.requests[0].doc)
        likelihoods = np.array([likelihood for likelihood, _ in answers], dtype=float)
        options = len(options_of(self.task, self.requests[0].doc)) or len(likelihoods)
        return float(softmax(likelihoods[:options])[rights].sum()) if rights else 0.0

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
    """The right answer to an item, or, for perplexities, its number of words or bytes.

    lm-eval reports it only together with an answer, so it is given a made-up one.
    """
    found = task.construct_requests(doc=document, ctx="", metadata=(task.task_name, 0, 1))
    requests = found if isinstance(found, list) else [found]
    any_answer: dict[str, Any] = {"loglikelihood": (-1.0, False), "loglikelihood_rolling": -1.0}
    answers = [any_answer.get(str(r.request_type), "") for r in requests]
    return meaning.right(task.process_results(document, answers)[metric_name(metric)[0]])


def options_of(task: Task, document: Any) -> list[str]:
    """The options of a document, where its task has some."""
    has_some = getattr(task.config, "doc_to_choice", None) is not None
    return [str(option) for option in task.doc_to_choice(document)] if has_some else []


def right_options(task: Task, document: Any) -> list[int]:
    """The numbers of the right options of a document; none where the task names none that it has."""
    if getattr(task, "multiple_input", False):  # the options are beginnings of one text
        found, count = task.doc_to_text(document), len(task.doc_to_choice(document))
    else:
        found, count = task.doc_to_target(document), len(options_of(task, document))
    options = options_of(task, document)
    numbers = [
        options.index(r) if isinstance(r, str) and r in options else r
        for r in (found if isinstance(found, list) else [found])
    ]
    return [n for n in numbers if isinstance(n, int) and 0 <= n < count]


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
    """Build the requests of a task's items.

    Args:
        task: lm-eval's task.
        items: the items.
        scored: hashes of all items that are scored in this run. None of them may be a few-shot example in a prompt.
        settings: the section ``evaluation`` of the configuration.
        lm: lm-eval's model, for its chat template.
        seed: seed of the few-shot examples.

    Raises BadInput where a chat template is asked for and missing or broken, and where too few few-shot examples are
    left.
    """
    in_place, chat = sorted(items, key=lambda i: i.index), settings.apply_chat_template
    if chat:
        check_chat_template(lm, settings.system_instruction)
    keep_apart(task, scored)
    _remember(task)
    task.set_fewshot_seed(seed)  # before every build, as a build continues the random draws of the one before it
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
        # doc_id is the document's position among the chosen documents, in the order of the data set.
        grouped[in_place[instance.doc_id or 0]].append(instance)
    return grouped


def check_chat_template(lm: Any, system: str | None) -> None:
    """Let a model's chat template write down a short conversation.

    Raises BadInput where there is no template, where it cannot be applied, and where it loses what is asked.
    """
    key = "evaluation.apply_chat_template"
    if not lm.tokenizer.chat_template:
        raise BadInput(
            f"{key}: the base's tokenizer has no chat template; write false, or name a template in model.chat_template."
        )
    history = [{"role": "user", "content": ASKED}]
    if system is not None:
        history.insert(0, {"role": "system", "content": system})
    try:
        with quiet():
            said = lm.apply_chat_template(history)
    except Exception as error:  # a template is a program, which may fail in any way
        raise BadInput(
            f"{key}: the chat template cannot be applied ({cause_of(error)}); mend it in chat_template.jinja or "
            "tokenizer_config.json, write false, or name another one in model.chat_template."
        ) from error
    if ASKED not in said:
        raise BadInput(
            f"{key}: the chat template leaves out what the user asks; mend it, or name another one in "
            "model.chat_template."
        )


def _remember(task: Task) -> None:
    """Let a task render the texts of each document once. lm-eval would compile the templates again for every answer."""
    for name in ("doc_to_text", "doc_to_target", "doc_to_choice"):
        method = getattr(task, name, None)
        if method is not None and not isinstance(method, _Remembered):
            setattr(task, name, _Remembered(method))


class _Remembered:
    """A method of a task that remembers its result for each document."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method
        # By id, with the document itself: as long as it is kept, no other object gets its id.
        self._said: dict[int, tuple[Any, Any]] = {}

    def __call__(self, document: Any, *template: Any) -> Any:
        if template:
            return self._method(document, *template)
        known = self._said.get(id(document))
        if known is None:
            known = self._said[id(document)] = (document, self._method(document))
        return list(known[1]) if isinstance(known[1], list) else known[1]


def keep_apart(task: Task, scored: Collection[str]) -> set[str]:
    """Remove the scored items from the documents that few-shot examples are drawn from, and return the hashes of what
    there was before.

    A prompt would otherwise show the model the answers to other items.

    Raises BadInput where too few examples are left.
    """
    shots = task.get_config("num_fewshot") or 0
    sampler = getattr(task, "sampler", None)
    if not shots or sampler is None:
        return set()
    pool = [(d, item_hash(d)) for d in sampler.fewshot_docs()]
    free = [d for d, content in pool if content not in scored]
    # Of the split that is scored, lm-eval's sampler draws one more, to leave out the item that the prompt is for.
    draws_one_more = task.fewshot_cfg.split == task.config.test_split and not isinstance(sampler, FirstNSampler)
    if len(free) < shots + draws_one_more:
        raise BadInput(
            f"evaluation.num_fewshot: {task.task_name} has {len(free)} examples that are not scored items, but "
            f"{shots} are wanted in a prompt; ask for fewer items or examples, or write 0."
        )
    sampler.replace_df(free)
    task.__dict__.pop("_fewshot_docs", None)
    return {content for _, content in pool}
