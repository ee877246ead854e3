"""Configurations and mergekit files near valid ones: one key holds something that somebody might write there."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from typing import Any

# What stands where something else is wanted.
ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 7, 10**6, 10**30, -(10**30), 0.0, 0.5, 1.0, 1.5, -0.5, 1e-300, 1e308, float("inf"),
    float("nan"), "", " ", "x", "auto", "none", "../up", "/nowhere/at/all", "a\x00b", "x" * 5000, "😀", [], [1, 2],
    ["a"], [None], [[]], {}, {"a": 1}, {"a": {"b": []}}, {1: 2}, [{"task": "toy"}],
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place of nested lists and mappings, but for the top."""
    if path:
        yield path
    if isinstance(value, dict):
        for key in value:
            yield from places(value[key], (*path, key))
    elif isinstance(value, list):
        for at in range(len(value)):
            yield from places(value[at], (*path, at))


def dotted(path: tuple[Any, ...]) -> str:
    """A place as messages name it."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path).lstrip(".")


def mutated(valid: dict[str, Any], seed: int, optional: dict[str, Any] | None = None) -> tuple[dict[str, Any], str]:
    """A copy in which one place holds an odd value, has gone, stands under a misspelt key, or is one of ``optional``
    (dotted key → a valid value) with an odd value; and the place.
    """
    draw, out = random.Random(seed), copy.deepcopy(valid)
    if optional and draw.random() < 0.5:
        key = draw.choice(sorted(optional))
        *path, last = key.split(".")
        section: Any = out
        for part in path:
            section = section.setdefault(part, {})
        section[last] = draw.choice((*ODD, optional[key]))
        return out, key
    path = draw.choice(list(places(out)))
    section = out
    for part in path[:-1]:
        section = section[part]
    match draw.randrange(4):
        case 0:
            del section[path[-1]]
        case 1 if isinstance(section, dict):
            section[f"{path[-1]}x"] = section.pop(path[-1])
        case _:
            section[path[-1]] = draw.choice(ODD)
    return out, dotted(path)


# Keys of a configuration that the toy does not set, with a value that is valid.
OPTIONAL = {
    "order": "arrival", "model.kind": "causal-lm", "model.dtype": "float32", "model.compute": "float32",
    "model.heads": "merged", "search.mode": "generational", "search.population": 4, "search.F": 0.5, "search.Cr": 0.5,
    "search.strategy": "current_to_best", "search.merger": {"method": "ties"}, "budget.items": 500,
    "evaluation.num_fewshot": 1, "evaluation.apply_chat_template": False, "evaluation.system_instruction": "be brief",
    "evaluation.gen_kwargs": {"max_gen_toks": 4}, "evaluation.backend": "resident", "evaluation.batch_tokens": 512,
    "evaluation.batch_size": 4, "evaluation.early_stopping": False, "evaluation.racing": 0.05, "evaluation.threads": 1,
    "evaluation.model_args": {}, "evaluation.serve": "true", "pool.kind": "local", "pool.num_workers": 1,
    "pool.cache_gb": 0.1, "pool.timeout_s": 100.0, "pool.share": 1, "pool.retries": 0, "pool.ahead": False,
    "pool.price_per_hour": 1.0, "pool.watts": 10.0, "pool.num_cpus": 1, "pool.num_gpus": 0, "loggers.tensorboard": {},
    "statistics.items": 10, "seed": 3,
}  # fmt: skip
