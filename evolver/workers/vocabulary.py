"""One vocabulary for the merged models of a run whose base and experts have different tokens."""

from __future__ import annotations

import filecmp
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from evolver.checkpoints.adapter import Adapter
from evolver.checkpoints.chat import EXPERT
from evolver.checkpoints.sources import check_same_vocabulary
from evolver.checkpoints.weights import TOKEN_MATRICES, TOKENIZER_FILE, Checkpoint, Source, token_axis
from evolver.config.model import TokenizerSettings
from evolver.errors import BadInput
from evolver.evaluation.live import HEADS
from evolver.merging.companions import CommonTokens
from evolver.merging.mergekit.vocabulary import (
    Aligned,
    Ids,
    Vocabulary,
    check_named_tokens,
    known_tokens,
    token_rows,
    vocabulary,
    with_tokens,
)
from evolver.records.recipe import layer_of

OF_BASE, TOKENS_FROM = "base", "model.tokenizer"


@dataclass(frozen=True)
class Models:
    """Base and experts as merges see them.

    Attributes:
        base: the base.
        experts: the experts by name.
        tokens: their common tokens, where they have been brought to them; None: they have the same ones anyway.
    """

    base: Checkpoint
    experts: dict[str, Source]
    tokens: CommonTokens | None = None


def with_common_tokens(settings: TokenizerSettings, base: Checkpoint, experts: dict[str, Source]) -> Models:
    """Base and experts, brought to common tokens where theirs differ.

    Raises BadInput for experts that do not fit the base, and for tokens that cannot be brought together.
    """
    asked = bool(settings.tokens or settings.pad_to_multiple_of)
    if not has_known_rows(base) or not (asked or any(_differs(e, base) for e in experts.values())):
        for expert in experts.values():
            check_same_vocabulary(expert, base, expert.key)
        return Models(base, experts)
    sources = {OF_BASE: base, **experts}
    known = {name: known_tokens(source) for name, source in sources.items()}
    for name, expert in experts.items():
        _refuse_rowless(expert, known[name], base)
    chosen = settings.source.removeprefix(EXPERT).strip()
    if chosen == "union":
        _refuse_moved(known, sources)
    target = vocabulary(settings.model_copy(update={"source": chosen}), known, OF_BASE, TOKENS_FROM)
    check_named_tokens(base.config, target, TOKENS_FROM)
    seen = {name: Aligned(source, name, target, sources, base) for name, source in sources.items()}
    origin = sources[chosen] if chosen in experts else base
    folders = {name: with_tokens(source).path for name, source in sources.items()}
    return Models(
        seen[OF_BASE], {n: seen[n] for n in experts}, CommonTokens(target, _with_tokenizer(origin, base), folders)
    )


def tokens_of(model: Adapter | Checkpoint, base: Checkpoint) -> tuple[Checkpoint, CommonTokens]:
    """A model that is loaded into its base, and has tokens of its own: the base with as many rows, and its tokens.

    Raises BadInput where it has no fast tokenizer.
    """
    target = Vocabulary(known_tokens(model), max(token_rows(model)), {}, {})
    return Aligned(base, OF_BASE, target, {}, base), CommonTokens(target, model.path, {OF_BASE: model.path})


def _with_tokenizer(source: Source, base: Checkpoint) -> Path:
    """The folder that holds the tokenizer of a model; an adapter may have left it with its base."""
    found = with_tokens(source)
    return found.path if (found.path / TOKENIZER_FILE).exists() else base.path


def has_known_rows(base: Checkpoint) -> bool:
    """Whether it is known which tensors of a model have a place for each token: an embedding, and no other tensor
    outside the layers than those of ``token_axis``. Other models have to have the same tokens.
    """
    matrices = [name for name in base.headers if token_axis(name) is not None]
    rows = token_rows(base)
    others = [n for n, i in base.headers.items() if layer_of(n) is None and rows & set(i.shape) and n not in matrices]
    return any(name.endswith(TOKEN_MATRICES) and not name.endswith(HEADS) for name in matrices) and not others


def _differs(expert: Source, base: Checkpoint) -> bool:
    """Whether an expert has other tokens than the base, or another number of rows for them."""
    ours = with_tokens(expert)
    ours_at, theirs_at = (c.path / TOKENIZER_FILE for c in (ours, base))
    if ours is base or not (ours_at.exists() and theirs_at.exists()):
        return False
    if token_rows(ours) != token_rows(base):
        return True
    if filecmp.cmp(ours_at, theirs_at, shallow=False):  # far sooner than parsing both
        return False
    return ours.vocabulary != base.vocabulary


def _refuse_rowless(expert: Source, known: Ids, base: Checkpoint) -> None:
    """Raises BadInput where an expert has a token, unlike the base, for which its embedding has no row."""
    own = with_tokens(expert).vocabulary or {}
    rowless = own.keys() - known.keys() - (base.vocabulary or {}).keys()
    if rowless:
        token = min(rowless)
        raise BadInput(
            f"{expert.key}: the vocabulary of {expert.path} gives {token!r} the number {own[token]}, and its embedding "
            "has no row for it; give a fine-tune whose embedding was resized."
        )


def _refuse_moved(known: Mapping[str, Ids], sources: Mapping[str, Source]) -> None:
    """Raises BadInput where two models give one token different numbers."""
    first: dict[str, tuple[int, str]] = {}
    for name, ids in known.items():
        for token, number in ids.items():
            other, owner = first.setdefault(token, (number, name))
            if other != number:
                raise BadInput(
                    f"{sources[name].key}: the vocabulary of {sources[name].path} ({len(ids)} tokens) gives {token!r} "
                    f"the number {number}, and that of {sources[owner].path} the number {other}, so they have no "
                    f"union; write {TOKENS_FROM}: base, or expert {name}, or give a fine-tune that kept the base's "
                    "tokenizer."
                )
