"""Turns lm-eval's requests into tokens, with lm-eval's own code."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from evolver.errors import BadInput
from evolver.evaluation.language.library import quiet
from evolver.evaluation.language.loglikelihood import Group
from evolver.evaluation.language.loglikelihood import TokenIds as Ids


@dataclass(frozen=True)
class Manner:
    """The settings with which an answer is generated.

    Attributes:
        until: strings at which the answer ends.
        most: the most tokens of the answer.
        other: all other arguments of Transformers' ``generate``, as JSON.
    """

    until: tuple[str, ...]
    most: int
    other: str

    @property
    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.other)
        return found


@dataclass(frozen=True)
class Prompt:
    """A prompt whose answer is generated.

    Attributes:
        ids: the tokens of the prompt.
        manner: the settings of generation.
        truncated: whether the prompt had to be cut.
        repeats: the number of answers that the task wants.
    """

    ids: Ids
    manner: Manner
    truncated: bool
    repeats: int = 1


class Tokens(HFLM):  # type: ignore[misc]  # lm-eval ships no types
    """lm-eval's own wrapper of a model, used for the tokens of requests instead of their answers."""

    def group(self, kind: str, requests: Sequence[Instance]) -> Group:
        """The requests of an item whose answers are log-likelihoods, in tokens."""
        if kind == "loglikelihood_rolling":
            return Group(tuple(self._windows(requests[0].args[0])), rolling=True)
        with quiet():
            pairs = self.loglikelihood(list(requests), disable_tqdm=True)
        return Group(tuple(pairs))

    def prompt(self, request: Instance) -> Prompt:
        """The prompt of a request whose answer is generated.

        Raises BadInput where the model's length leaves no room for a prompt beside the answer.
        """
        context, given = request.args[:2]
        settings: Mapping[str, Any] = normalize_gen_kwargs(given, self.max_gen_toks)
        other = dict(settings)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until, most = handle_stop_sequences(other.pop("until", None), eos=eos), int(other.pop("max_gen_toks"))
        room = self.max_length - (most if self.backend == "causal" else 0)
        if room <= 0:
            raise BadInput(
                f"evaluation.gen_kwargs.max_gen_toks: answers of {most} tokens to {request.task_name} leave no room "
                f"for a prompt in the {self.max_length} tokens of the base; write fewer than {self.max_length}."
            )
        ids, _ = self.tok_batch_encode([context])
        whole = tuple(ids[0].tolist())
        manner = Manner(tuple(until), most, json.dumps(other, sort_keys=True))
        return Prompt(whole[-room:], manner, len(whole) > room, request.repeats or 1)

    def spelled(self, tokens: Sequence[int]) -> str:
        """Tokens as text, special ones included."""
        return str(self.tok_decode(list(tokens), skip_special_tokens=False))

    def text(self, tokens: Sequence[int], manner: Manner) -> str:
        """The generated tokens as text, without the string that ended the answer."""
        said: str = self.tok_decode(list(tokens))
        return str(postprocess_generated_text(said, stop=list(manner.until), think_end_token=None))

    def _windows(self, text: str) -> list[tuple[Ids, Ids]]:
        windows = utils.get_rolling_token_windows(
            token_list=self.tok_encode(text),
            prefix_token=self.prefix_token_id,
            max_seq_len=self.max_length,
            context_len=1,
        )
        return [(tuple(c), tuple(t)) for c, t in map(utils.make_disjoint_window, windows)]

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        return [(tuple(context), tuple(continuation)) for _, context, continuation in requests]
