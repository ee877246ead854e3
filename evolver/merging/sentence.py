"""Folders of sentence-transformers: a text model, and modules such as pooling and dense layers in folders beside it.

The library lists the modules in ``modules.json``. The weights of one are merged as those of the text model are, if all
models have them. All else is the base's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evolver.checkpoints import shards
from evolver.checkpoints.beside import copy
from evolver.checkpoints.weights import (
    DTYPES,
    WEIGHTS,
    Checkpoint,
    Source,
    TensorInfo,
    check_finite,
    digest_of_tensors,
    open_tensors,
    read_json,
)  # fmt: skip
from evolver.errors import BadInput
from evolver.merging.export import usable
from evolver.merging.materialise import Materialiser
from evolver.records.recipe import Expert, Recipe

MODULES_FILE, SETTINGS_FILE, ADAPTER_FILE = "modules.json", "config_sentence_transformers.json", "adapter_config.json"
# Of the settings file: versions of libraries, which do not change what a model computes.
NO_SETTINGS = ("__version__", "model_type")
# Called with the models by name and the names of tensors.
MakeRecipe = Callable[[Mapping[str, Expert], list[str]], Recipe]


class ModuleWeights(Checkpoint):
    """The tensors of a module, under names that begin with the module's: ``2_Dense.linear.weight``."""

    def __init__(self, folder: Path, key: str) -> None:
        self.path, self.key = folder, key
        self._handle = open_tensors(folder / WEIGHTS, key)

    @cached_property
    def headers(self) -> dict[str, TensorInfo]:  # derived here, read from several files there
        return {f"{self.path.name}.{name}": self._info_of(name) for name in sorted(self._handle.keys())}

    def _info_of(self, name: str) -> TensorInfo:
        piece = self._handle.get_slice(name)
        if (dtype := piece.get_dtype()) not in DTYPES:
            raise BadInput(f"{self.key}: tensor {name} of {self.path} has dtype {dtype}; dequantise the model first.")
        return TensorInfo(tuple(piece.get_shape()), DTYPES[dtype])

    @property
    def config(self) -> dict[str, Any]:
        return {}

    def tensor(self, name: str) -> Tensor:
        tensor: Tensor = self._handle.get_tensor(self.own_name(name))
        return tensor

    def own_name(self, name: str) -> str:
        """The name in the module's file."""
        return name.removeprefix(f"{self.path.name}.")

    def files(self) -> list[Path]:
        return [self.path / WEIGHTS]

    def digest(self) -> str:
        return digest_of_tensors((name, self._finite(name)) for name in self.headers)[:20]

    def _finite(self, name: str) -> Tensor:
        tensor = self.tensor(name)
        check_finite(tensor, name, self.path, self.key)
        return tensor


@dataclass(frozen=True)
class SentenceModules:
    """The modules of the base's folder, and what is merged of them.

    Attributes:
        folder: of the base.
        names: of the modules' folders in it; empty where the base is no folder of sentence-transformers.
        merged: by module, the recipe of its weights and what makes them.
        warnings: what a user has to know about the modules, a sentence each.
    """

    folder: Path
    names: tuple[str, ...] = ()
    merged: Mapping[str, tuple[Recipe, Materialiser]] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    def write(self, target: Path) -> None:
        """Write the modules into the folder of the merged model."""
        for name in self.names:
            copy(self.folder, target, [str(f.relative_to(self.folder)) for f in self._files(name)])
        for name, (recipe, materialiser) in self.merged.items():
            base = materialiser.base
            assert isinstance(base, ModuleWeights)
            (target / name).mkdir(exist_ok=True)
            tensors = {base.own_name(n): t for n, t in usable(materialiser.stream(recipe))}
            shards.write_file(target / name / WEIGHTS, tensors)

    def _files(self, name: str) -> Iterator[Path]:
        """The files of a module that are copied."""
        has_safetensors = (self.folder / name / WEIGHTS).exists()
        for file in sorted((self.folder / name).rglob("*")):
            weights = file.parent == self.folder / name and file.suffix in (".safetensors", ".bin")
            if file.is_file() and not (weights and (name in self.merged or (has_safetensors and file.name != WEIGHTS))):
                yield file


def plan_modules(
    base: Path, sources: Mapping[str, Source], make: MakeRecipe | None, dtype: torch.dtype | None
) -> SentenceModules:
    """What becomes of the modules of a merge of folders of sentence-transformers.

    Args:
        base: the folder of the base.
        sources: all models by name, the base among them.
        make: makes the recipe of a module; None: the models are merged by layers, which modules do not have.
        dtype: of the merged weights; None: as in the base.

    Raises BadInput for a ``modules.json`` that cannot be used.
    """
    names, out = _modules(base, "base_model"), list[str]()
    if not names:
        return SentenceModules(base, warnings=tuple(_lost_modules(base, sources)))
    merged = {}
    for name in names:
        if not (base / name / WEIGHTS).exists():
            pickles = sorted((base / name).glob("*.bin"))
            out += [f"{file} is a pickle, which is copied from the base without being read." for file in pickles]
            continue
        try:
            merged[name] = _merge(base / name, {r: _place(s, base) / name for r, s in sources.items()}, make, dtype)
        except BadInput as error:
            out.append(f"{base / name}: the weights of this module are copied from the base, not merged: {error}")
    return SentenceModules(base, names, merged, (*out, *_other_settings(base, names, sources)))


def _merge(
    base: Path, folders: Mapping[str, Path], make: MakeRecipe | None, dtype: torch.dtype | None
) -> tuple[Recipe, Materialiser]:
    """Raises BadInput with the reason why a module's weights cannot be merged."""
    if make is None:
        raise BadInput("the file merges slices of layers, and a module has no layers.")
    for folder in folders.values():
        if not (folder / WEIGHTS).exists():
            raise BadInput(f"{folder} holds no {WEIGHTS}.")
    opened = {r: ModuleWeights(f, "modules") for r, f in folders.items()}
    origin = ModuleWeights(base, "modules")
    shapes = {n: i.shape for n, i in origin.headers.items()}
    for weights in opened.values():
        if {n: i.shape for n, i in weights.headers.items()} != shapes:
            raise BadInput(f"{weights.path} holds tensors of other names or shapes.")
    digests = {r: w.digest() for r, w in opened.items()}
    recipe = make({r: Expert(r, d) for r, d in digests.items()}, list(shapes))
    return recipe, Materialiser(origin, {digests[r]: w for r, w in opened.items()}, dtype)


def _place(source: Source, base: Path) -> Path:
    """The folder of a model's modules; an adapter has those of the base."""
    return base if (source.path / ADAPTER_FILE).exists() else source.path


def _modules(folder: Path, key: str) -> tuple[str, ...]:
    """The folders of the modules beside the text model; none in a folder of another kind.

    Raises BadInput for a list that cannot be read, or that names places outside of the folder.
    """
    file = folder / MODULES_FILE
    if not file.is_file():
        return ()
    try:
        paths = [entry["path"] for entry in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise BadInput(f"{key}: {file} is no list of modules with a path each; copy the model again.") from None
    for path in paths:
        if not isinstance(path, str) or (path and (Path(path).name != path or path == "..")):
            raise BadInput(f"{key}: {file} names {path!r}, which is no folder beside it; copy the model again.")
    return tuple(p for p in paths if p and (folder / p).is_dir())


def _lost_modules(base: Path, sources: Mapping[str, Source]) -> Iterator[str]:
    for source in sources.values():
        if (source.path / MODULES_FILE).is_file() and source.path != base:
            yield (
                f"{source.path} is a folder of sentence-transformers and the base ({base}) is not: its modules are not "
                "kept."
            )


def _other_settings(base: Path, names: tuple[str, ...], sources: Mapping[str, Source]) -> Iterator[str]:
    """A sentence for each file of settings in which a model differs from the base."""
    files = [MODULES_FILE, SETTINGS_FILE, *(f"{n}/config.json" for n in names)]
    for source in sources.values():
        if source.path == base or not (source.path / MODULES_FILE).is_file():
            continue
        if other := [f for f in files if _settings(source.path / f) != _settings(base / f)]:
            yield (
                f"{source.path} differs from the base ({base}) in {', '.join(other)}; the merged model has the base's "
                "settings."
            )


def _settings(file: Path) -> Any:
    if not file.is_file():
        return None
    if file.name == MODULES_FILE:
        return _modules(file.parent, "models")
    return {k: v for k, v in read_json(file, "models").items() if k not in NO_SETTINGS}
