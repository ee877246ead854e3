"""Vocabularies that differ: rows of embeddings and heads are matched by token, not by place.

The merge has a target vocabulary. Every model is seen through it: rows of its own tokens move to their new places, and
tokens that it lacks get the row that mergekit gives them: as configured; else the base's; else that of the one model
that has the token; else the mean of those that have it.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor

from evolver.checkpoints.adapter import Adapter
from evolver.checkpoints.weights import (
    TOKENIZER_FILE,
    Checkpoint,
    Source,
    TensorInfo,
    read_json,
    resized,
    token_axis,
)
from evolver.config.model import TokenizerSettings
from evolver.config.recipes import reference
from evolver.errors import BadInput, nearest
from evolver.merging.alignment.realigned import Realigned
from evolver.merging.methods.operators import halved

Ids = Mapping[str, int]
# So many rows are summed at a time, which bounds the memory for their float64 copies.
MEAN_ROWS = 1024
# Ends of the keys of a configuration that name tokens by their numbers, and those keys for which the settings of the
# tokenizer and of generation hold as well, which come with the tokens.
TOKEN_NUMBERS = ("_token_id", "_token_index")
OF_TOKENIZER = {
    f"{kind}_token_id" for kind in ("bos", "eos", "pad", "unk", "sep", "cls", "mask", "forced_bos", "forced_eos")
}
TokenRow = tuple[str, int]  # a model, and the place in its matrices


@dataclass(frozen=True)
class Vocabulary:
    """The target.

    Args:
        ids: token → row.
        size: number of rows; those after the last token are the mean of the rows of tokens, as in mergekit.
        own: for every model the row that it has for each row of the target, int64 (size), -1 where it has none.
        others: for rows that a model lacks, the rows whose mean it gets; zero where there are none.
        moved: the new number of each token of the base that gets another one, by its old number.
        lost: the tokens of the base that the target lacks, by their numbers.
    """

    ids: Ids
    size: int
    own: Mapping[str, Tensor]
    others: Mapping[int, tuple[TokenRow, ...]]
    moved: Mapping[int, int] = field(default_factory=dict)
    lost: Mapping[int, str] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """Of everything that decides about a row, but the models themselves."""
        form = [sorted(self.ids.items()), self.size, [[k, v] for k, v in sorted(self.others.items())]]
        form += ["mean"] * (self.size > self.padded_from)
        return hashlib.sha256(json.dumps(form).encode()).hexdigest()

    @property
    def padded_from(self) -> int:
        """The first row after that of the last token."""
        return 1 + max(self.ids.values())


def vocabulary(settings: TokenizerSettings, models: Mapping[str, Ids], base: str, place: str) -> Vocabulary:
    """The target vocabulary.

    Args:
        settings: its source is ``union``, ``base`` or a model.
        models: every model's vocabulary.
        place: the key of the settings, for error messages.

    Raises BadInput that names ``place``.
    """
    source, tokens, multiple = settings.source, settings.tokens, settings.pad_to_multiple_of
    if source not in ("union", "base", *models):
        raise BadInput(f"{place}: {source} is not a model of this merge; {nearest(source, models)}")
    ids = dict(models[base if source in ("base", "union") else source])
    if source == "union":
        for other in models.values():
            for token in sorted(other.keys() - ids.keys(), key=other.__getitem__):
                ids[token] = 1 + max(ids.values())
    for token, entry in tokens.items():
        if token not in ids and entry.source is not None:
            ids[token] = 1 + max(ids.values())
    size = math.ceil((1 + max(ids.values())) / (multiple or 1)) * (multiple or 1)
    own = {m: torch.full((size,), -1) for m in models}
    for model, known in models.items():
        there = [t for t in ids if t in known]
        own[model][[ids[t] for t in there]] = torch.tensor([known[t] for t in there], dtype=torch.int64)
    others = {i: _usual(token, models, base) for token, i in ids.items()}
    for token, entry in tokens.items():
        if token not in ids:
            raise BadInput(
                f"{place}.tokens: {token!r} is not in the merged model's vocabulary; give it a source, which adds it, "
                "or leave it out."
            )
        if entry.source is not None:
            others[ids[token]] = _configured(entry.source, token, models, f"{place}.tokens.{token}.source")
        if entry.force:
            for rows in own.values():
                rows[ids[token]] = -1
    lacking = torch.stack(list(own.values())).min(0).values < 0
    moved = {i: ids[token] for token, i in models[base].items() if ids.get(token, i) != i}
    lost = {i: token for token, i in models[base].items() if token not in ids}
    return Vocabulary(ids, size, own, {i: rows for i, rows in others.items() if lacking[i]}, moved, lost)


def _usual(token: str, models: Mapping[str, Ids], base: str) -> tuple[TokenRow, ...]:
    if token in models[base]:
        return ((base, models[base][token]),)
    return tuple((m, known[token]) for m, known in models.items() if token in known)


def _configured(source: Any, token: str, models: Mapping[str, Ids], place: str) -> tuple[TokenRow, ...]:
    if isinstance(source, dict) and source.get("kind") == "zero":
        return ()
    form = source if isinstance(source, dict) and source.get("kind") == "model_token" else {"model": source}
    model = reference(form.get("model"))
    if model not in models:
        raise BadInput(f"{place}: {model} is not a model of this merge; {nearest(model, models)}")
    if "token_id" in form:
        return ((model, int(form["token_id"])),)
    wanted = form.get("token", token)
    if wanted not in models[model]:
        raise BadInput(f"{place}: {model} has no token {wanted!r}; name one that it has.")
    return ((model, models[model][wanted]),)


class Aligned(Checkpoint):
    """A model seen through the target vocabulary; only one tensor at a time is in memory.

    Args:
        inner: the model.
        name: as the vocabulary calls it.
        models: all models by name, of which rows may be taken.
        base: gives the names of tensors, and the configuration.
    """

    def __init__(
        self, inner: Source, name: str, target: Vocabulary, models: Mapping[str, Source], base: Checkpoint
    ) -> None:
        self.path, self.key = inner.path, inner.key
        self.inner, self.name, self.target, self.models, self.base = inner, name, target, models, base

    @property
    def headers(self) -> dict[str, TensorInfo]:  # derived here, read from files there
        size = self.target.size
        return {n: TensorInfo(resized(n, i.shape, size), i.dtype) for n, i in self.base.headers.items()}

    @property
    def config(self) -> dict[str, Any]:
        return with_vocabulary(self.base.config, self.target)

    def files(self) -> list[Path]:
        return self.inner.files()

    def tensor(self, name: str) -> Tensor:
        axis = token_axis(name)
        if axis is None:
            return self.inner.tensor(name)
        return self._rows(name, axis).movedim(0, axis).contiguous()

    def digest(self) -> str:
        parts = [self.inner.digest(), self.name, self.target.digest, *(s.digest() for s in self.models.values())]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:20]

    def _rows(self, name: str, axis: int) -> Tensor:
        """A tensor with the dimension of tokens, ``axis``, as its first one: a row for each of the target's."""
        own = self.inner.tensor(name).movedim(axis, 0)
        rows = self.target.own[self.name]
        has = rows >= 0
        out = own.new_zeros(self.target.size, *own.shape[1:])
        out[has] = own[rows[has]]
        missing = [i for i in self.target.others if not has[i]]
        out[missing] = self._means(name, axis, missing, own).to(out.dtype)
        if (first := self.target.padded_from) < self.target.size:
            out[first:] = _mean_row(out, torch.tensor(sorted(self.target.ids.values()))).to(out.dtype)
        return out

    def _means(self, name: str, axis: int, missing: list[int], like: Tensor) -> Tensor:
        """Rows for tokens that the model lacks, float32 (missing, ...)."""
        total = torch.zeros(len(missing), *like.shape[1:])
        for model, source in self.models.items():
            pairs = [(k, r) for k, i in enumerate(missing) for m, r in self.target.others[i] if m == model]
            if pairs:
                places, rows = (torch.tensor(x) for x in zip(*pairs, strict=True))
                total.index_add_(0, places, source.tensor(name).movedim(axis, 0)[rows].float())
        counts = torch.tensor([max(1, len(self.target.others[i])) for i in missing])
        return total / counts.view(-1, *[1] * (total.dim() - 1))


def with_vocabulary(config: Mapping[str, Any], target: Vocabulary) -> dict[str, Any]:
    """The base's configuration with another number of tokens, and with the new numbers of those that it names; of a
    model that reads more than text, its text part's too.
    """
    text, sized, own = config.get("text_config"), {"vocab_size": target.size}, _renumbered(config, target)
    if not isinstance(text, dict):
        return {**own, **sized}
    inner = {**_renumbered(text, target), **sized}
    return {**own, "text_config": inner, **(sized if "vocab_size" in config else {})}


def check_named_tokens(config: Mapping[str, Any], target: Vocabulary, place: str) -> None:
    """Raises BadInput that names ``place`` where the target lacks a token that the base cannot do without, such as the
    one that stands for an image.
    """
    parts = [config, *(p for p in [config.get("text_config")] if isinstance(p, dict))]
    for key, number in ((k, v) for part in parts for k, v in part.items() if k.endswith(TOKEN_NUMBERS)):
        if isinstance(number, int) and number in target.lost and key not in OF_TOKENIZER:
            raise BadInput(
                f"{place}: merged models would lack the token {target.lost[number]!r}, which config.json of the base "
                f"names as {key}; write union, or base."
            )


def _renumbered(config: Mapping[str, Any], target: Vocabulary) -> dict[str, Any]:
    def new(value: Any) -> Any:
        if isinstance(value, list):
            return [new(v) for v in value]
        return target.moved.get(value, value) if isinstance(value, int) else value

    return {k: new(v) if k.endswith(TOKEN_NUMBERS) else v for k, v in config.items()}


def _mean_row(matrix: Tensor, rows: Tensor) -> Tensor:
    """The mean of some rows of (rows, ...), float64 (...): the same bits on every processor."""
    sums = [halved(matrix[part].double()) for part in rows.split(MEAN_ROWS)]
    return halved(torch.stack(sums)) / len(rows)


def with_tokens(source: Any) -> Checkpoint | Adapter:
    """The model whose tokens a model has: those of most adapters are their base's."""
    if isinstance(source, Aligned | Realigned):
        return with_tokens(source.inner)
    own = isinstance(source, Checkpoint) or (isinstance(source, Adapter) and source.has_own_tokens)
    found: Checkpoint | Adapter = source if own else source.base
    return found


def known_tokens(source: Source) -> Ids:
    """A model's tokens that have a row.

    Raises BadInput where it has no fast tokenizer.
    """
    checkpoint = with_tokens(source)
    tokens = checkpoint.vocabulary
    if tokens is None:
        raise BadInput(
            f"{source.key}: {checkpoint.path} has no {TOKENIZER_FILE}, so its rows have no tokens; save a fast "
            "tokenizer."
        )
    rows = min(token_rows(checkpoint))
    return {t: i for t, i in tokens.items() if i < rows}


def token_rows(checkpoint: Checkpoint | Adapter) -> set[int]:
    """The numbers of places that a model's tensors have for tokens: one number, where all have as many."""
    found = ((i.shape, token_axis(n)) for n, i in checkpoint.headers.items())
    return {shape[axis] for shape, axis in found if axis is not None}


def extend_tokenizer(folder: Path, target: Vocabulary, donors: Mapping[str, Path]) -> None:
    """Add the target's tokens to the tokenizer in ``folder``, so that each has the number of its row.

    Raises BadInput where the tokenizer numbers them otherwise.
    """
    special = {t["content"] for d in donors.values() for t in _added(d / TOKENIZER_FILE) if t.get("special")}
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER_FILE))
    known = tokenizer.get_vocab()
    new = sorted(target.ids.keys() - known.keys(), key=target.ids.__getitem__)
    for token in new:
        tokenizer.add_tokens([AddedToken(token, special=token in special, normalized=False)])
        if tokenizer.token_to_id(token) != target.ids[token]:
            raise BadInput(
                f"tokenizer: it would give {token!r} the number {tokenizer.token_to_id(token)} and not "
                f"{target.ids[token]}, as its vocabulary has gaps; choose the base or one model as its source."
            )
    if new:
        tokenizer.save(str(folder / TOKENIZER_FILE))


def _added(file: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = read_json(file, "tokenizer_source").get("added_tokens", []) if file.exists() else []
    return found
