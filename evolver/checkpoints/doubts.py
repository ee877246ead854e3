"""What is odd about experts: twins, copies of the base, strangers to it, heads or settings of their own."""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import torch

from evolver.checkpoints.adapted import seen_through
from evolver.checkpoints.adapter import Adapter
from evolver.checkpoints.agreement import is_text_of
from evolver.checkpoints.model_settings import differing_settings
from evolver.checkpoints.origins import NAMED_BASE, OtherBase, other_base
from evolver.checkpoints.weights import DIGEST_BYTES, Checkpoint, Source, cached, digests
from evolver.errors import BadInput
from evolver.kernels import execute, native
from evolver.kernels.encoded import FLOAT32, Code
from evolver.kernels.program import Program
from evolver.records.canonical import content_hash

# A distance to the base, in norms of the base, that no fine-tune has: at equal norms an angle of 41°. Fine-tunes are
# at 0.0001 to 0.1, training on with much new data may reach a few tenths, an unrelated model has a right angle: 1.4.
FAR = 0.7


def left_out(models: Iterable[Source]) -> list[str]:
    """Which tensors are not merged as the class of their model has no place for them, a sentence for each model."""
    said = {id(m): m for m in models if isinstance(m, Checkpoint) and m.ignored}
    return [
        f"{m.key} ({m.path}) holds {len(m.ignored)} tensor{'s' if len(m.ignored) > 1 else ''} that the model's class "
        f"has no place for, such as {min(m.ignored)}; Transformers passes over them when it loads the model, and so "
        "do merges."
        for m in said.values()
    ]


def strange_bases(models: Iterable[Source]) -> list[str]:
    """Which adapters name another base than the one that they are used on, as far as this is known without reading
    weights, a sentence each.
    """
    return [_doubt(m, found) for m in models if (found := other_base(m, weights=False))]


def refuse_strangers(base: Checkpoint, experts: Iterable[Source], key: str, weights: bool) -> None:
    """Check that experts are fine-tunes of their base: what is a warning otherwise, is refused here.

    Args:
        key: what asks for it, such as ``model.strict``.
        weights: whether weights may be read; without, only the bases that adapters name are looked at.

    Raises BadInput for an adapter that names another base, and for a model whose weights have nothing to do with it.
    """
    for source in (base, *experts):
        if found := other_base(source, weights):
            raise BadInput(f"{source.key}: {seen_through(source).path} {_says_other(found)} ({key} refuses it).")
        if weights and source is not base and (distance := _survey(source, base)) > FAR:
            raise BadInput(f"{source.key}: {source.path} {_says_far(distance, base)} ({key} refuses it).")


def suspicions(base: Checkpoint, experts: Iterable[Source]) -> list[str]:
    """What is odd about the experts, a sentence each; nothing of it keeps them from being merged.

    Raises BadInput for values that are not finite.
    """
    sources = {str(n): s for n, s in enumerate(experts)}
    known, first, out = digests(sources), dict[str, Source](), []
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        surveys = list(pool.map(lambda s: _survey(s, base), sources.values()))
    for (number, source), distance in zip(sources.items(), surveys, strict=True):
        which = f"{source.key} ({source.path})"
        twin = first.setdefault(known[number], source)
        if twin is not source:
            out.append(f"{which} is the same model as {twin.key} ({twin.path}), which therefore counts twice.")
        if distance == 0:
            out.append(f"{which} equals the base ({base.path}) in every floating tensor, so it adds nothing.")
        if distance > FAR:
            out.append(f"{which} {_says_far(distance, base)}.")
        if other := _other_settings(source, base):
            out.append(
                f"{which} has other settings in its config.json than the base ({base.path}), which change what the "
                f"same weights compute: {other}; merges and experts are computed with the base's."
            )
    strange = [(s, found) for s in (base, *sources.values()) if (found := other_base(s, weights=True))]
    # What names show is said before weights are read.
    return out + [_doubt(s, found) for s, found in strange if found.by_weights]


def _doubt(source: Source, found: OtherBase) -> str:
    return f"{source.key} ({seen_through(source).path}) {_says_other(found)}."


def _says_far(distance: float, base: Checkpoint) -> str:
    return (
        f"is {distance:.2f} norms of the base away from the base ({base.path}), where fine-tunes are at 0.1 or less "
        "and unrelated models at 1.4; check that it was trained from this base"
    )


def _says_other(found: OtherBase) -> str:
    return (
        f"was trained on {found.named} ({NAMED_BASE} in its adapter_config.json) and is used on {found.used}; check "
        "that this is the same model"
    )


def _other_settings(expert: Source, base: Checkpoint) -> str:
    """The settings in which an expert computes differently, with both values; empty where there are none."""
    expert = seen_through(expert)
    expert = expert.base if isinstance(expert, Adapter) else expert  # which has no such settings itself
    if not isinstance(expert, Checkpoint):
        return ""
    settings = base.config["text_config"] if is_text_of(expert.config, base.config) else base.config
    found = differing_settings(expert.config, settings)
    return ", ".join(f"{key} is {_short(ours)}, the base's {_short(theirs)}" for key, ours, theirs in found)


def _short(value: object) -> str:
    said = json.dumps(value)
    return said if len(said) <= 100 else f"{said[:100]}…"


def _survey(expert: Source, base: Checkpoint) -> float:
    """‖θ - θ₀‖ / ‖θ₀‖ over all floating tensors."""
    kind = f"distances/{content_hash([base.digest(), expert.digest()])}"  # one file may be seen in another order
    return float(cached(kind, [*base.files(), *expert.files()], lambda: repr(_distance(expert, base))))


def _distance(expert: Source, base: Checkpoint) -> float:
    loops, code = native.library(), _squares()
    difference = norm = 0.0
    for name in (n for n, i in base.headers.items() if i.dtype.is_floating_point):
        ours, theirs = (t.contiguous().reshape(-1) for t in (expert.tensor(name), base.tensor(name)))
        if loops is not None and all(_is_narrow(loops, t.dtype) for t in (ours, theirs)):
            found = execute.Run(code, ours.numel(), [ours, theirs], results=2).run(loops).sum(1)
            difference, norm = difference + float(found[0]), norm + float(found[1])
            continue
        for piece, origin in zip(ours.split(DIGEST_BYTES), theirs.split(DIGEST_BYTES), strict=True):
            difference += float((piece.double() - origin.double()).square_().sum())
            norm += float(origin.double().square_().sum())
    if not math.isfinite(difference):
        raise BadInput(
            f"{expert.key}: {expert.path} makes weights of its base that are not finite; it cannot be merged."
        )
    return math.sqrt(difference / norm) if norm else float(difference > 0)


def _is_narrow(loops: ctypes.CDLL, dtype: torch.dtype) -> bool:
    return dtype != torch.float64 and execute.handles(loops, dtype)


def _squares() -> Code:
    """Σ (θ - θ₀)² and Σ θ₀² for the loop in C."""
    program = Program(2)
    ours, theirs = (program.add("load", FLOAT32, (), n) for n in range(2))
    (ours.double() - theirs.double()).square().total()
    theirs.double().square().total()
    return program.code(program.results)
