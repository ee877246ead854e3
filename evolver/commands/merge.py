"""``evolver merge``: merges models as a mergekit file says, as mergekit's command ``mergekit-yaml`` does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from evolver.checkpoints import chat
from evolver.checkpoints.agreement import Agreement
from evolver.checkpoints.doubts import left_out, refuse_strangers, strange_bases, suspicions
from evolver.checkpoints.shards import SHARD_BYTES
from evolver.checkpoints.sources import Named, models_below, open_base, open_experts
from evolver.checkpoints.weights import Checkpoint, Source, digests
from evolver.commands.measured import measured
from evolver.config.model import AlignmentSettings, AlignmentWord, TokenizerSettings, alignment_of
from evolver.errors import BadInput
from evolver.kernels.compiled import Kernels
from evolver.merging import mergekit
from evolver.merging.alignment.realigned import Realigned
from evolver.merging.companions import TOKENIZER, Companions
from evolver.merging.export import beside_of, export
from evolver.merging.materialise import Materialiser
from evolver.merging.mergekit.vocabulary import (
    Aligned,
    Vocabulary,
    check_named_tokens,
    extend_tokenizer,
    known_tokens,
    token_rows,
    vocabulary,
    with_tokens,
)
from evolver.merging.sentence import SentenceModules, plan_modules
from evolver.records.recipe import Expert, Recipe
from evolver.storage import check_target, new_folder
from evolver.workers.vocabulary import has_known_rows

CARD = """---
tags: [merge, evolver]
---

# {name}

A merge made by Evolver from this configuration:

```yaml
{text}```
"""
# Compiling a kernel for the GPU takes some ten seconds, once on each machine. If all models together have fewer scalars
# than this, plain torch code is faster. The second number is for methods that draw at random: plain code draws slowly.
GPU_COMPILE_FROM, COMPILE_DRAWS_FROM = 10**10, 3 * 10**8


@dataclass(frozen=True)
class OpenedFile:
    """A mergekit file and its opened models.

    Attributes:
        configuration: the content of the file.
        base: the base model.
        sources: all models by their names in the file.
        vocabulary: the common vocabulary, where the file names a tokenizer; the models then appear to have it.
        left_out: sentences about tensors that are not merged, and about adapters of other bases.
    """

    configuration: mergekit.Configuration
    base: Checkpoint
    sources: dict[str, Source]
    vocabulary: Vocabulary | None = None
    left_out: tuple[str, ...] = ()


def open_merge(path: str | Path, start: bool = False, measured: bool = False) -> OpenedFile:
    """Read a mergekit file and open its models. Of their weights, only headers are read.

    Args:
        start: whether the file may leave values free, which then are those that a search begins with.
        measured: whether methods are allowed that need statistics.

    Raises BadInput, naming file and key, where the file is wrong or a model cannot be opened.
    """
    configuration = mergekit.read(path, start, measured)
    location = configuration.origin.partition("+")[0]
    base = open_base(location, f"{path}: base_model")
    names, same = Agreement(base, without_weights_of), configuration.tokenizer is None
    references, key = configuration.references, f"{path}: models"
    wanted = {r: Named(*r.partition("+")[::2], key) for r in references if r != location}
    found = {location: base, **open_experts(wanted, Named(location, "", key), names, same)[1]}
    said = (*left_out([*found.values(), *models_below(found.values())]), *strange_bases(found.values()))
    opened = OpenedFile(configuration, base, {r: found[r] for r in references}, left_out=said)
    return opened if configuration.tokenizer is None else _aligned(opened, configuration.tokenizer, str(path))


def without_weights_of(model: Checkpoint) -> Any:
    """A model of the class that a checkpoint's configuration names, without weights; None where there is none."""
    from evolver.evaluation.blueprint import without_weights  # slow, and most models have one set of names

    return without_weights(model.path, model.config)


def _aligned(opened: OpenedFile, tokenizer: TokenizerSettings, file: str) -> OpenedFile:
    models, base = opened.sources, opened.configuration.origin
    key = "tokenizer_source" if opened.configuration.raw.tokenizer is None else "tokenizer"
    if not has_known_rows(opened.base):
        _refuse_other_tokens(models, opened.base, f"{file}: {key}")
        if not token_rows(opened.base):
            return opened  # the rows that all models have stay where they are
    known = {r: known_tokens(s) for r, s in models.items()}
    target = vocabulary(tokenizer, known, base, f"{file}: {key}")
    check_named_tokens(opened.base.config, target, f"{file}: {key}")
    seen = {r: Aligned(s, r, target, models, opened.base) for r, s in models.items()}
    # Of a base with an adapter, the files beside the weights are those of the model that the adapter is of.
    shown = seen[base] if models[base] is opened.base else Aligned(opened.base, base, target, models, opened.base)
    return OpenedFile(opened.configuration, shown, dict(seen), target, opened.left_out)


def _refuse_other_tokens(models: Mapping[str, Source], base: Checkpoint, place: str) -> None:
    """Raises BadInput that names ``place`` where a model has other tokens than a base whose rows cannot be matched."""
    for model in models.values():
        if isinstance(model, Checkpoint) and model.vocabulary != base.vocabulary:
            raise BadInput(
                f"{place}: {model.path} has other tokens than {base.path}, a {base.config.get('model_type')} model, "
                "and it is not known which of its tensors have a number for each token; give a fine-tune that kept "
                "the base's tokenizer."
            )


def merge_file(
    path: str | Path, target: Path, *, device: str = "cpu", seed: int = 0, shard_bytes: int = SHARD_BYTES,
    tokenizer: bool = True, card: bool = True, strict: bool = False,
    align: AlignmentWord = "none", statistics: str | Path | None = None, warn: Callable[[str], None] = lambda _: None,
) -> None:  # fmt: skip
    """Merge as the file says, and write a Hugging Face folder. A merge that is interrupted leaves no such folder.

    Args:
        path: the mergekit file.
        target: folder to write, new or empty.
        device: where to compute: ``cpu`` or ``cuda``.
        seed: seed of the methods that draw at random.
        shard_bytes: the largest size of a file of weights in bytes.
        tokenizer: whether to write a tokenizer.
        card: whether to write a README and the file itself beside the model.
        align: which hidden units of the models are brought into the order of the base's; auto: all of them, for models
            of another ancestry.
        statistics: the configuration of a run, on whose items statistics are collected where methods need them.
        strict: refuse adapters that name another base, and models whose weights have nothing to do with the base's.
        warn: is called with each warning about the models.

    Raises BadInput, before anything is written, where the file is wrong or the models cannot be merged.
    """
    check_target(target)
    opened = open_merge(path, measured=statistics is not None)
    for sentence in opened.configuration.warnings:
        warn(sentence)
    chat_template = _chat_template(opened, str(path))
    modules = _modules(opened, seed)
    opened = _realigned(opened, alignment_of(align, stream=not modules.names), bool(modules.names))
    known = digests(opened.sources)
    for doubt in _doubts(opened, strict):
        warn(doubt)
    nodes = {r: Expert(r, d) for r, d in known.items()}
    recipe = opened.configuration.recipe(nodes, opened.base.names(), seed)
    given = None if statistics is None else measured(statistics)
    recipe = given.recipe(recipe) if given else recipe
    dtype = opened.configuration.dtype
    materialiser = Materialiser(
        opened.base, {known[r]: s for r, s in opened.sources.items()}, getattr(torch, dtype) if dtype else None,
        device=device, kernels=None if device == "cpu" else _kernels(opened), statistics=given,
    )  # fmt: skip
    beside = beside_of(opened.base, modules.names)
    for sentence in (*modules.warnings, *beside.warnings):
        warn(sentence)
    texts = _texts(Path(path), target.name, align, statistics) if card else {}

    with new_folder(target) as folder:
        try:
            export(recipe, materialiser, folder, texts, shard_bytes, Companions(_tokenizer_folder(opened)))
            modules.write(folder)
        except BadInput as error:
            raise BadInput(f"{path}: {error}") from error
        beside.copy_to(folder)
        if tokenizer:
            _complete_tokenizer(folder, opened, chat_template)
        else:
            for name in TOKENIZER:
                (folder / name).unlink(missing_ok=True)


def _complete_tokenizer(folder: Path, opened: OpenedFile, chat_template: str | None) -> None:
    """Add what the file asks for beside the tokenizer of one model: the tokens of others, and a chat template."""
    if opened.vocabulary is not None:
        extend_tokenizer(folder, opened.vocabulary, {r: with_tokens(s).path for r, s in opened.sources.items()})
    if chat_template is not None:
        (folder / chat.CHAT_FILE).write_text(chat_template)


def _texts(path: Path, name: str, align: AlignmentWord, statistics: str | Path | None) -> dict[str, str]:
    """The README and the file itself, with the options that it was merged with, by the names of files."""
    options = ("" if align == "none" else f" --align {align}") + (f" --statistics {statistics}" if statistics else "")
    text = (f"# evolver merge{options}\n" if options else "") + path.read_text()
    return {"README.md": CARD.format(name=name, text=text), mergekit.CONFIG_FILE: text}


def _realigned(opened: OpenedFile, settings: AlignmentSettings | None, modules: bool) -> OpenedFile:
    """The models but for the base with their units in the base's order, where that is asked for.

    Raises BadInput where modules beside the models read the stream.
    """
    if settings is None:
        return opened
    if modules and settings.parts == "all":
        raise BadInput(
            f"--align: the modules of {opened.base.path} read the stream, which therefore keeps its order; write both."
        )
    of_base = opened.sources.get(opened.configuration.origin)
    seen = {
        r: s if s is of_base or s is opened.base else Realigned(s, opened.base, settings, "--align")
        for r, s in opened.sources.items()
    }
    return replace(opened, sources=seen)


def _doubts(opened: OpenedFile, strict: bool) -> list[str]:
    """What is odd about the models. Raises BadInput, if ``strict``, for those that do not belong to the base."""
    others = [s for s in opened.sources.values() if s is not opened.base]
    if strict:
        refuse_strangers(opened.base, others, "--strict", weights=True)
    # With a common vocabulary, models show rows that they were not trained with.
    compared = suspicions(opened.base, others) if opened.vocabulary is None else []
    aligned = [s.said() for s in opened.sources.values() if isinstance(s, Realigned)]
    return [*opened.left_out, *aligned, *compared]


def _modules(opened: OpenedFile, seed: int) -> SentenceModules:
    """The modules of folders of sentence-transformers, merged as the file says."""
    configuration = opened.configuration
    dtype = getattr(torch, configuration.dtype) if configuration.dtype else None

    def make(nodes: Mapping[str, Expert], names: list[str]) -> Recipe:
        return configuration.recipe(nodes, names, seed)

    return plan_modules(opened.base.path, opened.sources, None if configuration.sliced else make, dtype)


def _kernels(opened: OpenedFile) -> Kernels:
    draws = "seed" in opened.configuration.method.settings
    scalars = len(opened.sources) * opened.base.scalars
    return Kernels(build=scalars >= (COMPILE_DRAWS_FROM if draws else GPU_COMPILE_FROM))


def _tokenizer_folder(opened: OpenedFile) -> Path:
    """The folder of the model whose tokenizer the merged model gets, possibly with further tokens."""
    chosen = opened.configuration.tokenizer
    source = opened.sources[chosen.source] if chosen and chosen.source in opened.sources else opened.base
    return with_tokens(source).path


def _chat_template(opened: OpenedFile, path: str) -> str | None:
    wanted = opened.configuration.raw.chat_template
    if wanted is None:
        return None
    own = {s.path: with_tokens(s).path for s in opened.sources.values()}  # an adapter's folder may have no template
    folders = [f if chat.template_of(f) is not None else below for f, below in own.items()]
    return chat.template(wanted, folders, f"{path}: chat_template")
