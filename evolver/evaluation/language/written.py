"""The settings with which answers are generated (``gen_kwargs``), checked before any answer is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from evolver.errors import BadInput, nearest

# What lm-eval calls the most tokens of an answer, in its order of precedence.
ANSWER_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SWITCH_SETTINGS = ("do_sample", "use_cache", "renormalize_logits", "remove_invalid_values", "early_stopping")
COUNT_SETTINGS = ("num_beams", "top_k", "min_length", "min_new_tokens", "no_repeat_ngram_size")
# Numbers, with the range (above, up to) that they lie in.
NUMBER_SETTINGS = {
    "temperature": (-1e-300, math.inf), "top_p": (0.0, 1.0), "min_p": (-1e-300, 1.0), "typical_p": (0.0, 1.0),
    "repetition_penalty": (0.0, math.inf), "length_penalty": (-math.inf, math.inf), "max_time": (0.0, math.inf),
}  # fmt: skip
# What Transformers reads from the same place and what is Evolver's to say, as it changes what an answer is.
NOT_TO_BE_SET = ("max_length", "num_return_sequences", "return_dict_in_generate", "output_scores", "output_logits")


def check_generation(given: Mapping[str, Any], key: str, resident: bool) -> None:
    """Check settings of generation.

    Args:
        given: the settings.
        key: where the user wrote them, such as ``evaluation.gen_kwargs``.
        resident: Transformers generates, so that all keys are known.

    Raises BadInput for an unknown key, and for a value of a wrong type or outside its range.
    """
    for name, value in given.items():
        if resident:
            _check_known(name, key)
        if value is None and name != "until":
            continue
        wanted = _wanted(name, value)
        if wanted:
            raise BadInput(f"{key}.{name}: {value!r} is not usable; write {wanted}.")
    if given.get("do_sample") is True and not given.get("temperature"):
        raise BadInput(f"{key}.do_sample: sampling needs a temperature above 0; write one as temperature.")


def _check_known(name: str, key: str) -> None:
    from transformers import GenerationConfig  # slow

    known = {*vars(GenerationConfig()), "until", *ANSWER_LIMITS} - {*NOT_TO_BE_SET, "transformers_version"}
    known = {k for k in known if not k.startswith("_")}
    if name not in known:
        raise BadInput(f"{key}.{name}: this is no setting of generation that can be used here; {nearest(name, known)}")


def _wanted(name: str, value: Any) -> str:
    """What to write instead of a value; empty where it is usable."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    if name in ANSWER_LIMITS:
        return "" if whole and value >= 1 else "an integer from 1 (tokens)"
    if name == "until":
        texts = [value] if isinstance(value, str) else value
        usable = isinstance(texts, list) and all(isinstance(t, str) for t in texts)
        return "" if usable else "a text or a list of texts at which an answer ends"
    if name in SWITCH_SETTINGS:
        return "" if isinstance(value, bool) else "true or false"
    if name in COUNT_SETTINGS:
        least = 1 if name == "num_beams" else 0
        return "" if whole and value >= least else f"an integer from {least}"
    if name in NUMBER_SETTINGS:
        above, most = NUMBER_SETTINGS[name]
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if number and math.isfinite(value) and above < value <= most:
            return ""
        return _range(above, most)
    return "" if _is_plain(value) else "a number, a text, true or false, or a list of them"


def _range(above: float, most: float) -> str:
    if math.isinf(above):
        return "a number"
    start = "from 0" if above < 0 else f"above {above:g}"
    return f"a number {start}" + ("" if math.isinf(most) else f" and up to {most:g}")


def _is_plain(value: Any) -> bool:
    """Whether a value can be written as JSON, in which form settings are compared."""
    if isinstance(value, list):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return value is None or isinstance(value, bool | str | int) or (isinstance(value, float) and math.isfinite(value))
