"""Scores the resident model on tasks of lm-eval. The requests are built once and used for every candidate."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from evolver.config.evaluation import EvaluationSettings
from evolver.errors import BadInput
from evolver.evaluation.base import Scored
from evolver.evaluation.blueprint import Blueprint
from evolver.evaluation.examples import Example
from evolver.evaluation.language.decoder import DecoderOnly
from evolver.evaluation.language.encoder_decoder import EncoderDecoder, check_start, no_start
from evolver.evaluation.language.generation import Generations
from evolver.evaluation.language.library import quiet
from evolver.evaluation.language.loglikelihood import Forward, Likelihoods, LogLikelihoods
from evolver.evaluation.language.requests import PreparedRequests
from evolver.evaluation.language.tokens import Tokens
from evolver.evaluation.live import LiveModel

# A model that reads fewer tokens cannot hold a question and the first token of its answer.
SHORTEST = 2


def resident(
    model: LiveModel, prepare: Callable[[Any], list[PreparedRequests]], settings: EvaluationSettings, seed: int
) -> LanguageScorer:  # fmt: skip
    """A scorer of the resident model.

    Args:
        model: the live model.
        prepare: builds the requests, given lm-eval's wrapper of the model.
        settings: the section ``evaluation`` of the configuration.
        seed: seed of the run, for tasks that sample.
    """
    with quiet():
        lm = Tokens(pretrained=model.module, tokenizer=model.tokenizer, batch_size=1)
    return LanguageScorer(model, lm, prepare(lm), settings, seed)


def check_requests(model: Blueprint, prepare: Callable[[Any], list[PreparedRequests]]) -> list[str]:
    """Turn some requests into tokens as ``resident`` does, for a model without weights.

    Args:
        model: the base, as far as it is known without weights.
        prepare: builds the requests, given lm-eval's wrapper of the model.

    Returns the names of the tasks of which prompts have to be cut, so that their answers find room.

    Raises BadInput where the base's tokenizer, its chat template, its length or the token with which an
    encoder–decoder begins its answers do not allow it.
    """
    with quiet():
        lm = Tokens(pretrained=model.module, tokenizer=model.tokenizer, batch_size=1)
    if lm.max_length < SHORTEST:
        raise BadInput(
            f"model.base: by its config.json, {model.folder} reads {lm.max_length} tokens; copy the file from the "
            "model that the weights belong to."
        )
    if lm.tokenizer.eos_token_id is None and lm.tokenizer.bos_token_id is None:
        raise BadInput(
            f"model.base: the tokenizer of {model.folder} names neither a first nor a last token of texts; copy "
            "tokenizer_config.json from the model that the weights belong to."
        )
    cut, prepared = [], prepare(lm)
    if model.module.config.is_encoder_decoder:
        if any(item.kind != "generate_until" for item in prepared):
            check_start(model)
        elif not model.begins_answers:
            raise no_start(model)
    for item in prepared:
        if item.kind == "generate_until":
            cut += [item.task.task_name] if lm.prompt(item.requests[0]).truncated else []
        else:
            lm.group(item.kind, item.requests)
    return list(dict.fromkeys(cut))


def prompts_in_words(
    model: Blueprint, prepare: Callable[[Any], list[PreparedRequests]], count: int
) -> list[str]:  # fmt: skip
    """The first prompts as a model reads them, with its special tokens, and what is asked of it then.

    Args:
        model: the base, as far as it is known without weights.
        prepare: builds the requests, given lm-eval's wrapper of the model.
        count: how many items are shown.
    """
    with quiet():
        lm = Tokens(pretrained=model.module, tokenizer=model.tokenizer, batch_size=1)
    return [_in_words(lm, item) for item in prepare(lm)[:count]]


def _in_words(lm: Tokens, item: PreparedRequests) -> str:
    if item.kind == "generate_until":
        prompt = lm.prompt(item.requests[0])
        ends = ", ".join(repr(text) for text in prompt.manner.until)
        return (
            f"{len(prompt.ids)} tokens:\n{lm.spelled(prompt.ids)}\n"
            f"→ an answer of at most {prompt.manner.most} tokens, which {ends} ends"
        )
    contexts: dict[tuple[int, ...], list[str]] = {}
    for context, continuation in lm.group(item.kind, item.requests).pairs:
        room = lm.max_length + 1 - len(continuation) if lm.backend == "causal" else len(context)
        contexts.setdefault(tuple(context[-room:]), []).append(f"→ {lm.spelled(continuation)!r}")
    return "\n".join(
        f"{len(context)} tokens:\n{lm.spelled(context)}\n" + "\n".join(asked) for context, asked in contexts.items()
    )


class LanguageScorer:
    """Scores the live model on items whose requests are built already."""

    def __init__(
        self,
        model: LiveModel,
        lm: Tokens,
        prepared: Sequence[PreparedRequests],
        settings: EvaluationSettings,
        seed: int,
    ) -> None:
        self.prepared, self.lm = prepared, lm
        kind = EncoderDecoder if model.module.config.is_encoder_decoder else DecoderOnly
        forward: Forward[Any] = kind(model, lm.max_length)
        self._likely = LogLikelihoods(forward, settings.batch_tokens, settings.batch_size)
        self._written = Generations(model, lm, settings, seed)
        asked = list(enumerate(prepared))
        self._prompts = {p: lm.prompt(i.requests[0]) for p, i in asked if i.kind == "generate_until"}
        self.groups = {p: lm.group(i.kind, i.requests) for p, i in asked if p not in self._prompts}
        if self.groups and isinstance(forward, EncoderDecoder):
            forward.check()

    def score(self, places: Sequence[int]) -> Scored:
        out = Scored()
        likely = self._likely({p: self.groups[p] for p in places if p in self.groups})
        written = self._written({p: self._prompts[p] for p in places if p in self._prompts})
        for place in places:
            answers: list[Any] = self._answers(place, likely) if place in self.groups else [written.texts[place]]
            self.prepared[place].judge(answers).enter(out, place)
        out.tokens = likely.tokens + written.tokens
        out.truncated = len(likely.truncated) + len(written.truncated)
        return out

    def examples(self, places: Sequence[int]) -> Iterator[Example]:
        """See ``GivesExamples``: of an item with options the first right one, of a text each of its windows.

        An item without a right option gives none.
        """
        for place in places:
            group, item = self.groups[place], self.prepared[place]
            chosen = range(len(group.pairs)) if group.rolling else item.right_requests()
            yield from self._likely.examples(group.pairs[n] for n in chosen)

    def _answers(self, place: int, likely: Likelihoods) -> list[Any]:
        """The answers to the requests of an item, as lm-eval's own model class would return them."""
        answers = likely.answers[place]
        if self.groups[place].rolling:
            return [sum(likelihood for likelihood, _ in answers)]
        return list(answers)
