"""The names of a model's tensors: how those of its files become those of its class, as ``from_pretrained`` maps them.

What compilers and parallel training leave in names, and tensors that are no weights, show by the names and shapes
alone. For all else the class is asked, which is built without weights: it knows the tensors that it has, its older
names and the tensors that it ties. Only where names of two models differ does that take the time.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

# Modules that torch.compile and parallel training put around a model, or around parts of it.
WRAPPERS = re.compile(r"(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
# DDP names the whole model so; inside of a model the word may be an architecture's own.
PARALLEL = "module."
# Names of weights that Transformers reads in any file, as TensorFlow's BERT had them.
LEGACY = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
# Tables that a model computes when it is made. Older releases saved them beside the weights.
TABLES = re.compile(r"(^|\.)(rotary_emb\.inv_freq|position_ids|attn\.masked_bias|attention\.masked_bias)$")
CAUSAL_MASK = re.compile(r"(^|\.)(attn|attention)\.bias$")


def plain_name(stored: str) -> str:
    """A name without wrappers, and without the words of the oldest files."""
    name = WRAPPERS.sub("", stored)
    old = next((o for o in LEGACY if name.endswith(o)), None)
    return name if old is None else name.removesuffix(old) + LEGACY[old]


def plain_names(stored: Iterable[str]) -> dict[str, str]:
    """The plain name of every stored one; where two would get the same name, both keep their own."""
    names = list(stored)
    parallel = bool(names) and all(n.startswith(PARALLEL) for n in names)
    found = {n: plain_name(n.removeprefix(PARALLEL) if parallel else n) for n in names}
    return found if len(set(found.values())) == len(names) else {n: n for n in names}


def is_computed(name: str, shape: Callable[[], tuple[int, ...]]) -> bool:
    """Whether a tensor is a table that models compute: positions, frequencies, a causal mask (1, 1, n, n)."""
    if TABLES.search(name):
        return True
    if not CAUSAL_MASK.search(name):
        return False
    sizes = shape()
    return len(sizes) == 4 and sizes[:2] == (1, 1) and sizes[2] == sizes[3]


def wrapper_patterns(stored: Iterable[str]) -> dict[str, str]:
    """The renamings, by patterns, with which Transformers loads names that have wrappers; none where there are none."""
    names = list(stored)
    left = {re.escape(m[0]): "" for n in names for m in WRAPPERS.finditer(n)}
    parallel = bool(names) and all(n.startswith(PARALLEL) for n in names)
    return {**({"^" + re.escape(PARALLEL): ""} if parallel else {}), **left}


@dataclass(frozen=True)
class Reading:
    """What a class makes of the tensors of a file.

    Attributes:
        loaded: the name of each tensor in the model. Parts of one that the class puts together keep names of their own.
        ignored: tensors that the class has no place for.
        tied: names in the model of tensors that the class ties to another, and the name of that one.
        bare: tensors whose names lack, or have, the prefix of the body where those of the class do not.
    """

    loaded: Mapping[str, str]
    ignored: tuple[str, ...]
    tied: Mapping[str, str]
    bare: frozenset[str]

    def within(self, own: str, outer: str) -> Reading:
        """The same of a text model that stands at ``outer`` in a larger model; ``own`` is the prefix of its body."""

        def moved(name: str) -> str:
            return f"{outer}.{name.removeprefix(own + '.')}" if name.startswith(f"{own}.") else name

        loaded = {name: moved(found) for name, found in self.loaded.items()}
        tied = {moved(twin): moved(source) for twin, source in self.tied.items()}
        return Reading(loaded, self.ignored, tied, frozenset(loaded))


class ClassNames:
    """The names that a class of Transformers gives to tensors.

    Args:
        module: a model of the class, whose tensors need no values.
    """

    def __init__(self, module: Any) -> None:
        self.module = module
        self.state = module.state_dict()
        self.prefix: str = module.base_model_prefix

    @cached_property
    def tied(self) -> dict[str, str]:
        """The name of the tensor that another one is, by the name of that one."""
        return dict(getattr(self.module, "all_tied_weights_keys", None) or {})

    @cached_property
    def language(self) -> str | None:
        """Where the part that reads text stands in a model that reads more than text; None: it reads nothing else."""
        text = self.module.config.get_text_config(decoder=True)
        if text is self.module.config:
            return None
        parts = (path for path, part in self.module.named_modules() if path and getattr(part, "config", None) is text)
        return next(parts, None)

    def read(self, names: Iterable[str]) -> Reading:
        """What ``from_pretrained`` makes of a file with these tensors."""
        from transformers.core_model_loading import dot_natural_key

        find, ordered = self._finder(), sorted(names, key=dot_natural_key)
        loaded: dict[str, str] = {}
        taken, bare = set[str](), set[str]()
        for name in ordered:
            renamed, found = find(name)
            if found is not None and found not in taken:  # of two tensors for one place it takes the first
                loaded[name] = found
                taken.add(found)
                if renamed == name != found:  # by no rule but that of the prefix
                    bare.add(name)
        return Reading(loaded, tuple(n for n in ordered if n not in loaded), self.tied, frozenset(bare))

    def _finder(self) -> Callable[[str], tuple[str, str | None]]:
        """What finds the name that a class's rules give to a name, and that of the tensor in the model, if any."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import (
            WeightConverter,
            WeightRenaming,
            apply_renamings,
            rename_source_key,
        )

        rules = get_model_conversion_mapping(self.module) or []
        renamings = [r for r in rules if isinstance(r, WeightRenaming)]
        converters = [r for r in rules if isinstance(r, WeightConverter)]

        def find(name: str) -> tuple[str, str | None]:
            own, whole = apply_renamings(name, renamings), f"{self.prefix}."
            target, part = rename_source_key(name, renamings, converters, self.prefix, self.state)
            if target not in self.state and name in self.state:
                return name, name
            if target not in self.state:
                return own, None
            if part is None:
                return own, target
            return own, whole + own if target.startswith(whole) and not own.startswith(whole) else own

        return find
