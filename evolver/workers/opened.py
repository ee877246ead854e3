"""Opens the base and the experts of a configuration."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from evolver.checkpoints.adapted import model_below
from evolver.checkpoints.adapter import Adapter
from evolver.checkpoints.agreement import Agreement
from evolver.checkpoints.chat import EXPERT, Wanted, resolve, template_of
from evolver.checkpoints.doubts import left_out, refuse_strangers, strange_bases
from evolver.checkpoints.heads import Head, Relabelled, all_labels, head_digest, head_of, labels_in_order, own_labels
from evolver.checkpoints.sources import Named, models_below, open_base, open_experts
from evolver.checkpoints.weights import Checkpoint, Source, digests, vocabulary_in
from evolver.config import Config
from evolver.config.evaluation import EvaluationSettings
from evolver.config.model import LANGUAGE_KINDS
from evolver.errors import BadInput
from evolver.evaluation.blueprint import HF, Blueprint, ModelFolder, check_architecture, without_weights
from evolver.evaluation.live import free_memory, kinds_of, model_class
from evolver.merging.alignment.realigned import Realigned
from evolver.merging.companions import CommonTokens, Companions
from evolver.merging.mergekit.vocabulary import with_tokens
from evolver.storage.references import parts_of
from evolver.workers.compute import refuse_compute, stored_dtype
from evolver.workers.plan import AS_IT_IS, CHAT, TOKENS
from evolver.workers.vocabulary import OF_BASE, Models, tokens_of, with_common_tokens

GIB = 1 << 30
STRICT = "model.strict"
# Values of evaluation.backend with which Transformers loads candidates.
TRANSFORMERS = ("resident", *HF)
# Further values, of classes that read the tokenizer in a candidate's folder, which is that of the base.
READ_TOKENIZER = ("vllm", "sglang", "openvino", "ipex", "habana", "neuronx")


@dataclass(frozen=True)
class OwnModel:
    """A model as it is, where the merged models of its run have other tokens or other labels.

    With tokens of its own, this form takes the model's place wherever it is scored. With labels of its own, it is a
    model beside the form that is merged, which knows the labels of all.

    Attributes:
        source: its weights.
        base: the checkpoint that is loaded before the weights are written into it: the model itself, or the base of an
            adapter.
        companions: the files beside the weights.
        labels: the labels of its head, where they are not those of ``base``.
    """

    source: Source
    base: Checkpoint
    companions: Companions
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Opened:
    """The base and the experts, opened.

    Attributes:
        base: the checkpoint of the base.
        experts: the experts by name.
        heads: with ``model.heads: apart``, each expert's classification head by the expert's name.
        companions: the files beside the weights that candidates have.
        labels: with ``model.heads: union``, the labels of all experts, in the order of the merged head.
        warnings: what the user should know about them.
        own: the models whose tokens or labels are not those of merged models, as they are, by name (``base`` is the
            base).
    """

    base: Checkpoint
    experts: dict[str, Source]
    companions: Companions
    heads: dict[str, Head] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    own: Mapping[str, OwnModel] = field(default_factory=dict)

    @property
    def placed_heads(self) -> dict[str, tuple[Path, Head]]:
        """The heads that are kept apart, each with the folder of its expert, by the expert's name."""
        return {name: (model_below(self.experts[name]).path, head) for name, head in self.heads.items()}

    def aligned(self) -> list[str]:
        """What became of the units of every expert that is seen in the base's order, a sentence each."""
        return [expert.said() for expert in self.experts.values() if isinstance(expert, Realigned)]

    def digests(self) -> dict[str, str]:
        own = {f"head of {name}": head_digest(head) for name, head in self.heads.items()}
        own |= {f"{AS_IT_IS}{name}": model.source.digest() for name, model in self.own.items() if model.labels}
        if self.companions.chat is not None:
            own[CHAT] = self.companions.chat.digest
        if self.companions.tokens is not None:
            own[TOKENS] = self.companions.tokens.target.digest
        return {**digests({"base": self.base, **self.experts}), **own}


def open_models(config: Config) -> Opened:
    """Open the base and every expert. Only headers are read, no weights.

    Raises BadInput where one is no usable checkpoint, and where an expert does not fit the base.
    """
    origin = Named(*parts_of(config.model.base), "model.base")
    names = open_named(config, origin.model, origin.key, headless=config.model.heads != "merged")
    wanted = {n: Named(*parts_of(p), f"experts.{n}") for n, p in config.experts.items()}
    base, experts = open_experts(wanted, origin, names, same_tokens=config.model.kind == "image-classifier")
    if config.model.strict:
        refuse_strangers(base, experts.values(), STRICT, weights=False)
    opened = _aligned(config, _joined(config, base, experts))
    models = [base, *experts.values()]
    said = (*left_out([*models, *models_below(models)]), *strange_bases(models))
    return replace(opened, warnings=(*said, *opened.warnings))


def _aligned(config: Config, opened: Opened) -> Opened:
    """The experts with their units in the base's order, where the configuration asks for it. Units that are mixed make
    another model of an expert, which is scored as it is.
    """
    if (settings := config.model.alignment) is None:
        return opened
    seen: dict[str, Source] = {n: Realigned(e, opened.base, settings, "model.align") for n, e in opened.experts.items()}
    mixed = {} if settings.regularisation == 0 else opened.experts
    own = {n: _own_model(e, opened.base, opened.companions) for n, e in mixed.items() if n not in opened.own}
    return replace(opened, experts=seen, own={**opened.own, **own})


def _joined(config: Config, base: Checkpoint, experts: dict[str, Source]) -> Opened:
    """The models, with what the configuration says of their tokens and heads."""
    if config.model.kind in LANGUAGE_KINDS:
        return _with_words(config, base, experts)
    models = Models(base, experts)
    if config.model.kind != "image-classifier":
        models = with_common_tokens(config.model.tokens, base, experts)
    if config.model.heads == "union":
        opened = _with_all_labels(models, base, experts)
    else:
        heads = {n: head_of(s, base) for n, s in experts.items()} if config.model.heads == "apart" else {}
        own = {}
        if models.tokens is not None:
            sources = {OF_BASE: base, **experts}
            own = {n: _own_model(s, base, Companions(with_tokens(s).path)) for n, s in sources.items()}
        opened = Opened(models.base, models.experts, Companions(base.path), heads, own=own)
    said = _moved_labels(base, experts) if config.model.heads == "merged" else []
    if models.tokens is None:
        return replace(opened, warnings=tuple(said))
    said.append(_other_tokens(config, models.tokens, base.vocabulary or {}))
    return replace(opened, companions=Companions(base.path, tokens=models.tokens), warnings=tuple(said))


def _own_model(source: Source, base: Checkpoint, files: Companions) -> OwnModel:
    """A model with its own tokens; an adapter, and a text model of a base that also reads images, is put on the model
    that it needs with as many rows as it has.
    """
    below = source.base if isinstance(source, Adapter) else source
    under = below if isinstance(source, Adapter) and isinstance(below, Checkpoint) else base
    if (isinstance(source, Adapter) and source.has_own_tokens) or (isinstance(source, Checkpoint) and source.lent):
        loaded, tokens = tokens_of(source, under)
        return OwnModel(source, loaded, replace(files, folder=under.path, tokens=tokens))
    return OwnModel(source, below if isinstance(below, Checkpoint) else base, files)


def _moved_labels(base: Checkpoint, experts: Mapping[str, Source]) -> list[str]:
    """Experts with the base's labels in another order, a sentence each: their heads' rows are of different labels."""
    theirs, said = labels_in_order(base.config), []
    for source in experts.values():
        below = model_below(source)
        ours = labels_in_order(below.config) if isinstance(below, Checkpoint) else theirs
        if ours != theirs and sorted(ours) == sorted(theirs):
            moved = next(label for label, other in zip(ours, theirs, strict=True) if label != other)
            said.append(
                f"{source.key} ({source.path}) has the labels of the base ({base.path}) in another order: {moved!r} is "
                f"number {ours.index(moved)} there and number {theirs.index(moved)} in the base, so rows of different "
                "labels are merged; write model.heads: union, which matches them by name"
            )
    return said


def open_alone(config: Config, location: str, key: str) -> Checkpoint:
    """A model that is scored as it is: a base, or ``MODEL+ADAPTER``.

    Raises BadInput that names ``key``.
    """
    origin = Named(*parts_of(location), key)
    return open_experts({}, origin, open_named(config, origin.model, key))[0]


def open_named(config: Config, location: str, key: str, headless: bool = False) -> Agreement:
    """A base, with the names that it has in the class by which it is evaluated; other classes find their own.

    Raises BadInput that names ``key``.
    """
    loader = model_class(config.model.kind) if config.evaluation.backend in TRANSFORMERS else None
    base = open_base(location, key, headless)
    check_kind(config, base)  # an expert would be said to differ from a base that is wrong itself
    apart = config.model.heads != "merged"
    names = Agreement(base, lambda model: without_weights(model.path, model.config, loader), apart)
    if loader is not None:
        names.ask_class()
    return names


def _with_words(config: Config, base: Checkpoint, experts: dict[str, Source]) -> Opened:
    """The models, with the tokens and the chat template that the configuration asks for."""
    models = with_common_tokens(config.model.tokens, base, experts)
    folders = {name: chat_folder(source, base) for name, source in experts.items()}
    origin = base.path if models.tokens is None else models.tokens.folder
    tokens = models.tokens
    chat, said = resolve(
        _wanted(config, origin, folders, lambda: base.vocabulary if tokens is None else tokens.target.ids)
    )
    own = {}
    if models.tokens is not None:
        said += [_other_tokens(config, models.tokens, base.vocabulary or {})]
        for name, source in {OF_BASE: base, **experts}.items():
            files = companions_of(config, {OF_BASE: base.path, **folders}, with_tokens(source).path, own_template=False)
            own[name] = _own_model(source, base, files)
    companions = Companions(base.path, chat, models.tokens)
    return Opened(models.base, models.experts, companions, warnings=tuple(said), own=own)


def chat_folder(source: Source, base: Checkpoint) -> Path:
    """The folder with the chat template of an expert; an adapter may have left it with a model that is not the base."""
    below = model_below(source)
    if below is source or below.path == base.path or template_of(source.path) is not None:
        return source.path
    found: Path = below.path
    return found


def _other_tokens(config: Config, tokens: CommonTokens, own: Mapping[str, int]) -> str:
    """What the user is told where models have different tokens."""
    return (
        f"the models have different tokens: merged models get {len(tokens.target.ids)} and the base has {len(own)} "
        f"(model.tokenizer: {config.model.tokens.source}); base and experts are scored with their own"
    )


def companions_of(config: Config, models: Mapping[str, Path], folder: Path, own_template: bool) -> Companions:
    """The files beside the weights of a model that is scored with its own tokens: its own files, but for a chat
    template that the configuration names, or that the model lacks.

    Args:
        models: the folders of the base (``base``) and of the experts by name.
        folder: of the model.
        own_template: where the configuration names no template, the model's own goes before that of the run's base.
    """
    if config.model.kind not in LANGUAGE_KINDS:
        return Companions(folder)
    wanted = _wanted(config, folder, models, lambda: vocabulary_in(folder, "model.base"))
    own, of_base = template_of(folder), template_of(models[OF_BASE])
    keeps = own is not None and (own_template or own == of_base)
    if wanted.setting == "auto" and of_base is not None and not keeps:
        wanted = replace(wanted, setting=f"{EXPERT}{OF_BASE}")
    return Companions(folder, resolve(wanted)[0])


def _wanted(
    config: Config, base: Path, models: Mapping[str, Path], read_ids: Callable[[], Mapping[str, int] | None]
) -> Wanted:  # fmt: skip
    return Wanted(config.model.chat_template, base, models, config.evaluation.apply_chat_template, read_ids)


def check_kind(config: Config, base: Checkpoint) -> None:
    """Raises BadInput where Transformers has no model of the base's architecture for what it is to be evaluated as."""
    architecture, kind = base.config.get("model_type"), config.model.kind
    if config.evaluation.backend != "resident":
        return
    check_architecture(base.config, base.path)
    able = kinds_of(str(architecture))
    if kind not in able:
        raise BadInput(
            f"model.kind: {base.path} is a {architecture} model, which Transformers cannot load as a {kind}; "
            + (f"write {' or '.join(able)}." if able else "give a base of another architecture.")
        )


def draw_up(config: Config, opened: Opened) -> ModelFolder | None:
    """The base, as far as candidates are like it, without its weights: as Transformers will build it, or its folder
    where another class loads candidates and reads the folder's tokenizer, or None.

    Raises BadInput for a config.json that describes no model, or another one than that of the weights.
    """
    own, backend, path = config.evaluation.model_args, config.evaluation.backend, opened.base.path
    if "tokenizer" in own or backend not in (*TRANSFORMERS, *READ_TOKENIZER):
        return None
    with opened.companions.shown() as beside:
        if "max_length" in own or backend not in TRANSFORMERS:
            return ModelFolder(path, beside)
        shapes = {name: info.shape for name, info in opened.base.headers.items()}
        heads = {name for head in opened.heads.values() for name in head}
        return Blueprint(config.model, path, shapes, heads, opened.labels, beside)


def check_device(config: Config, opened: Opened, device: str) -> None:
    """Check that a device can hold one model and compute in the dtype that the user named.

    Raises BadInput where it cannot.
    """
    check_memory(config, opened, device)
    if config.model.compute != "auto":
        refuse_compute(config.model.compute, device)


def check_backend_device(settings: EvaluationSettings) -> None:
    """Check that the machine on which candidates are scored has the device that the backend computes on.

    Raises BadInput where it has none.
    """
    device = str(settings.model_args.get("device", "cuda"))
    if settings.backend in HF and device.startswith("cuda") and not torch.cuda.is_available():
        raise BadInput(
            f"evaluation.model_args.device: {settings.backend} computes on {device}, and torch finds no GPU on this "
            "machine; write device: cpu."
        )


def check_memory(config: Config, opened: Opened, device: str) -> None:
    """Check that one model, in the dtype of its forward passes, fits into the free memory of a device.

    Raises BadInput where it does not fit.
    """
    base, compute = opened.base, config.model.compute
    dtype = stored_dtype(config.model, base.headers) if compute == "auto" else compute
    needed, free = base.scalars * getattr(torch, dtype).itemsize, free_memory(device)
    if needed > free:
        raise BadInput(
            f"{base.key}: a model of {base.path} takes {needed / GIB:.1f} GiB in {dtype}, and {free / GIB:.1f} GiB are "
            f"free on this machine ({device}); free memory, choose a smaller model.dtype or model.compute, or use a "
            "machine with more memory."
        )


def _with_all_labels(models: Models, base: Checkpoint, experts: Mapping[str, Source]) -> Opened:
    heads = {n: head_of(s, base) for n, s in experts.items()}
    labels = {n: own_labels(s, heads[n]) for n, s in experts.items()}
    for name, source in experts.items():
        if not labels.get(name):
            raise BadInput(
                f"{source.key}: config.json of {model_below(source).path} names no labels (id2label) for the head of "
                f"{source.path}; give a classifier that names its labels."
            )
    target = all_labels(labels)
    known = labels_in_order(base.config)
    with contextlib.suppress(BadInput):  # most bases have no head, and need none
        if set(known) & set(target):
            heads["base"], labels["base"] = head_of(base, base), known
    merged = {OF_BASE: models.base, **models.experts}
    seen = {n: Relabelled(s, n, heads, labels, target, models.base) for n, s in merged.items()}
    own = {}
    for name, source in experts.items():
        if labels[name] != target or models.tokens is not None:  # it could say a label that it does not know
            head, only = {name: heads[name]}, {name: labels[name]}
            plain = OwnModel(source, base, Companions(base.path))
            if models.tokens is not None:
                plain = _own_model(source, base, Companions(with_tokens(source).path))
            ours, theirs = (Relabelled(s, name, head, only, labels[name], plain.base) for s in (source, plain.base))
            own[name] = OwnModel(ours, theirs, plain.companions, tuple(labels[name]))
    if models.tokens is not None:
        whole = Relabelled(base, OF_BASE, heads, labels, target, base)
        own[OF_BASE] = OwnModel(whole, whole, Companions(base.path), tuple(target))
    return Opened(seen[OF_BASE], {n: seen[n] for n in experts}, Companions(base.path), labels=tuple(target), own=own)
