"""One set of names for a base and its experts.

A tensor has the name that it has in the base. What each file calls it, is found by the names that the models' class
gives to both. A tensor that one model ties to another and another model does not is read from both. A text model is an
expert of a base that also reads images: its tensors are those of the base's language part, and the base's own stand for
the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from evolver.checkpoints.fused import as_in_base
from evolver.checkpoints.names import ClassNames
from evolver.checkpoints.weights import HEAD, TOKEN_MATRICES, Checkpoint, Source, is_head
from evolver.errors import BadInput
from evolver.records.recipe import layer_of

# A model of the class of a checkpoint, which needs no weights; None where there is no such class.
Build = Callable[[Checkpoint], Any]
# So many rows are compared before two whole matrices are.
FIRST_ROWS = 64


class Agreement:
    """The names of a base, to which those of its experts are brought.

    Args:
        build: makes a model of the class. It is asked where names differ, as that takes a second; default: there is
            no class, and models are compared by their names as they stand.
        apart: heads are seen apart from bodies, and what an expert has outside of its layers and the base lacks, such
            as a pooler, belongs to its head.
    """

    def __init__(self, base: Checkpoint, build: Build = lambda _: None, apart: bool = False) -> None:
        self.base, self._build, self._apart = base, build, apart
        self._loaded: dict[str, str] | None = None  # the base's names by those of the class
        self._twins: dict[str, str] = {}
        self._brought: list[Checkpoint] = []
        self._language: str | None = None  # where the part that reads text stands in a base that reads more than text
        base.named = self.named

    def ask_class(self) -> bool:
        """See the base as its class does: without tensors that the class has no place for, and with the class's prefix
        where the names have none. False where there is no such class.
        """
        if self._loaded is None and (found := self._read(self.base, self._brought)) is not None:
            self._loaded = {loaded: name for name, loaded in found.items()}
        return self._loaded is not None

    def named(self, loaded: str) -> str:
        """The base's name of the tensor that its class calls so; the same name where there is none."""
        return (self._loaded or {}).get(loaded, loaded) if self.ask_class() else loaded

    def bring(self, expert: Checkpoint) -> None:
        """Give an expert's tensors the base's names.

        Raises BadInput where one of the two has tensors that the other one needs and lacks.
        """
        if expert.headers.keys() != self.base.headers.keys() or self._is_text_of(expert):
            self._rename(expert)
        self._brought.append(expert)
        expert.named = self.named

    def _rename(self, expert: Checkpoint) -> None:
        if self.ask_class() and (found := self._read(expert)) is not None:
            known = self._loaded or {}
            new = {n: known.get(loaded, loaded if loaded in self._twins else n) for n, loaded in found.items()}
            expert.read_as({new[n]: n for n in found})
            if self.base.headers.keys() - expert.headers.keys() and expert.headers.keys() - self.base.headers.keys():
                as_in_base(expert, self.base, self._build(self.base), known, {found[n]: new[n] for n in found})
        elif self._is_text_of(expert):
            raise BadInput(
                f"{expert.key}: {expert.path} is a {expert.config.get('model_type')} model, to be merged into the "
                f"language part of {self.base.path}, and Transformers has no class for one of the two; check "
                "architectures in their config.json."
            )
        else:
            self._twins |= {**_same_by_name(self.base), **_same_by_name(expert)}
        self._tie(expert, self.base.names())
        if self._is_text_of(expert):
            expert.lend(self.base, self._beside_language())
        extra = expert.headers.keys() - self.base.headers.keys() - self._twins.keys()
        missing = self.base.headers.keys() - expert.headers.keys()
        if self._apart and (parts := {n for n in extra if layer_of(n) is None}):
            expert.set_apart(parts)
            extra -= parts
        if missing:
            raise BadInput(
                f"{expert.key}: {expert.path} lacks the tensor {min(missing)}{_more(missing)}, which the base "
                f"{self.base.path} has; only fine-tunes of the base merge."
            )
        if extra:
            raise _extra(expert, self.base, extra)

    def settle(self, experts: Iterable[Source]) -> None:
        """Decide about tensors that one model ties and another one holds: a head of its own in one is one in all.

        Raises BadInput where a model has neither.
        """
        models = list({id(m): m for m in (self.base, *experts) if isinstance(m, Checkpoint)}.values())
        for twin, source in self._twins.items():
            having = [m for m in models if twin in m.headers and twin not in m.tied]
            if len(having) in (0, len(models)) and not any(twin in m.tied for m in models):
                continue  # none has it, or all have and each is merged by itself, as it stands
            if any(source not in m.headers for m in models):
                continue
            own = [m for m in having if not _is_copy(m, twin, source)]
            own = own or [m for m in having if m is self.base and not _ties(m, twin)]
            for model in models:
                if not own:
                    model.read_as({n: n for n in model.names() if n != twin})
                elif twin not in model.headers:
                    _check_tied(model, twin, own[0])
                    model.tie(twin, source)
            if own and twin.endswith(HEAD):
                _untie(self.base.config)

    def _read(self, model: Checkpoint, alike: Iterable[Checkpoint] = ()) -> dict[str, str] | None:
        """The names that the class gives to a model's tensors, of which those are left out that it has no place for.

        Args:
            alike: models with the same names, which stay so.
        """
        module = self._build(model)
        if module is None:
            return None
        classed = ClassNames(module)
        reading = classed.read(model.names())
        if model is self.base:
            self._language = classed.language
        elif self._is_text_of(model) and self._language:
            reading = reading.within(classed.prefix, self._language)
        if not reading.loaded:  # the files are of another model altogether, which is said of its tensors
            return None
        names = {}
        for name, loaded in reading.loaded.items():
            names[loaded if name in reading.bare else name] = name
        own = {reading.loaded[name]: new for new, name in names.items()}
        for twin, source in reading.tied.items():
            if twin in own and source not in own:  # stored under its other name only
                names[source] = names.pop(own[twin])
                own[source] = source
                del own[twin]
        model.ignored += reading.ignored
        if model is self.base and (reading.ignored or reading.bare):
            model.config["architectures"] = [type(module).__name__]
        for one in (model, *alike):
            one.read_as(names)
        self._twins |= {self._name(t, own): self._name(s, own) for t, s in reading.tied.items()}
        return {new: loaded for loaded, new in own.items()}

    def _name(self, loaded: str, own: Mapping[str, str]) -> str:
        return (self._loaded or own).get(loaded, loaded)

    def _is_text_of(self, expert: Checkpoint) -> bool:
        return is_text_of(expert.config, self.base.config)

    def _beside_language(self) -> set[str]:
        """The base's tensors outside of the part that reads text, and of the head that names tokens."""
        head = {t for pair in self._twins.items() for t in pair} | {n for n in self.base.headers if n.endswith(HEAD)}
        inside = {name for loaded, name in (self._loaded or {}).items() if loaded.startswith(f"{self._language}.")}
        return self.base.headers.keys() - inside - head

    def _tie(self, model: Checkpoint, names: Sequence[str]) -> None:
        for twin, source in self._twins.items():
            if twin in names and twin not in model.headers and source in model.headers and _ties(model, twin):
                model.tie(twin, source)


def is_text_of(text: Mapping[str, Any], whole: Mapping[str, Any]) -> bool:
    """Whether a configuration is that of a text model, and the other one that of a model which has such a part."""
    inner, own = whole.get("text_config"), str(text.get("model_type"))
    part = str(inner.get("model_type")) if isinstance(inner, dict) else ""
    return "text_config" not in text and (part == own or part.startswith(f"{own}_")) and own != whole.get("model_type")


def _same_by_name(model: Checkpoint) -> dict[str, str]:
    """The head of a language model that ties it, and its embedding, by their names and shapes."""
    if not _ties(model, HEAD):
        return {}
    outside = {n: i for n, i in model.headers.items() if layer_of(n) is None and n.endswith(TOKEN_MATRICES)}
    embeddings = [n for n in outside if not n.endswith((HEAD, "embed_out.weight"))]
    heads = [n for n in outside if n.endswith(HEAD)] or [HEAD]
    return {heads[0]: embeddings[0]} if len(embeddings) == 1 else {}


def _ties(model: Checkpoint, twin: str) -> bool:
    """Whether a model's configuration allows a tensor to be another one; it speaks of the head only."""
    return not twin.endswith(HEAD) or bool(model.config.get("tie_word_embeddings", True))


def _untie(config: dict[str, Any]) -> None:
    config["tie_word_embeddings"] = False
    if isinstance(inner := config.get("text_config"), dict) and "tie_word_embeddings" in inner:
        config["text_config"] = {**inner, "tie_word_embeddings": False}


def _is_copy(model: Checkpoint, twin: str, source: str) -> bool:
    one, other = model.tensor(twin), model.tensor(source)
    if one.shape != other.shape or not torch.equal(one[:FIRST_ROWS], other[:FIRST_ROWS]):
        return False
    return torch.equal(one, other)


def _check_tied(model: Checkpoint, twin: str, owner: Checkpoint) -> None:
    if not _ties(model, twin):
        raise BadInput(
            f"{model.key}: {model.path} lacks the tensor {twin}, which {owner.path} has, and by its config.json it "
            "does not use its embedding as the head; copy the model again."
        )


def _extra(expert: Checkpoint, base: Checkpoint, extra: set[str]) -> BadInput:
    if all(is_head(n) for n in extra):
        return BadInput(
            f"{expert.key}: {expert.path} has a classification head ({min(extra)}), and the base {base.path} has none "
            "to merge it with; write model.heads: apart or union, or give a base with a head."
        )
    return BadInput(
        f"{expert.key}: {expert.path} has, unlike the base, the tensor {min(extra)}{_more(extra)}, and the base is "
        f"{base.path}; only fine-tunes of the base merge."
    )


def _more(names: set[str]) -> str:
    return "" if len(names) == 1 else f" and {len(names) - 1} more"
