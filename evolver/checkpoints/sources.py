"""Base and experts by the places that a user names: folders and files of every format, hub ids, object stores."""

from __future__ import annotations

import filecmp
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from evolver import checkpoints
from evolver.checkpoints.adapted import Adapted, model_below
from evolver.checkpoints.adapter import Adapter
from evolver.checkpoints.agreement import Agreement, is_text_of
from evolver.checkpoints.formats import FORMATS, ModelFormat
from evolver.checkpoints.places import refuse_missing
from evolver.checkpoints.weights import TOKENIZER_FILE, Checkpoint, Source, resized
from evolver.errors import BadInput, cause_of, refuse_special
from evolver.storage import is_remote
from evolver.storage.fetch import fetched
from evolver.storage.paths import expand

for _found in pkgutil.walk_packages(checkpoints.__path__, f"{checkpoints.__name__}."):
    importlib.import_module(_found.name)  # formats register themselves in FORMATS


def open_base(location: str, key: str = "model.base", headless: bool = False) -> Checkpoint:
    """The base at ``location``: a folder, a file of a format that holds whole models, such as GGUF, or a hub id.

    Args:
        headless: it and its experts are seen without their classification heads.

    Raises BadInput that names ``key``.
    """
    path = _locate(location, key)
    known = _format_of(path)
    if known is not None and known.delta:
        raise BadInput(
            f"{key}: {location} is an adapter, which is no model without its base; write MODEL+{location}, or give "
            "the model that it was trained on."
        )
    base: Checkpoint = Checkpoint(path, key, headless) if known is None else known.open(path, key, None, headless)
    base.location = location
    return base


def open_expert(
    location: str, base: Checkpoint, key: str, same_tokens: bool = True, names: Agreement | None = None
) -> Source:
    """The expert at ``location``, checked against the base: a folder of weights, what any other format holds, such as a
    LoRA adapter or a GGUF file, or a hub id.

    Args:
        names: the base's names, which the expert's tensors get; default: those on which these two agree.

    Raises BadInput for another architecture, another vocabulary, or tensors that do not match.
    """
    path = _locate(location, key)
    known = _format_of(path)
    expert: Source = known.open(path, key, base, base.headless) if known else Checkpoint(path, key, base.headless)
    if isinstance(expert, Checkpoint):
        expert.location = location
        common = names or Agreement(base)
        _check_same_family(expert, base, key, same_tokens, common)
        if names is None:
            common.settle([expert])
    elif same_tokens:
        check_same_vocabulary(expert, base, key)
    return expert


@dataclass(frozen=True)
class Named:
    """An expert as a user names it.

    Attributes:
        model: its place.
        adapter: the place of an adapter that is on it; empty where there is none.
        key: under which the user named it.
    """

    model: str
    adapter: str
    key: str


def open_experts(
    wanted: Mapping[str, Named], base: Named, names: Agreement, same_tokens: bool = True
) -> tuple[Checkpoint, dict[str, Source]]:
    """The base, with its adapter where it has one, and the experts. An adapter that stands alone is on the model of the
    base. All get the names of that model, on whose tensors they agree.

    Args:
        base: the base as it is named; its model is that of ``names``.

    Raises BadInput, see ``open_expert``, and where a part of a name is of the wrong kind.
    """
    models: dict[str, Checkpoint] = {}
    # An adapter changes tensors of the base by name, so the base has to have its names by then.
    last = {n for n, w in wanted.items() if w.adapter or is_delta(w.model, w.key)}
    found: dict[str, Source] = {}
    for name in sorted(wanted, key=last.__contains__):
        one = wanted[name]
        if not one.adapter:
            found[name] = open_expert(one.model, names.base, one.key, same_tokens, names)
            continue
        if one.model not in models:
            models[one.model] = _carrier(one, base, names, same_tokens)
        found[name] = _adapter_on(models[one.model], one, same_tokens)
    own = _adapter_on(names.base, base, same_tokens) if base.adapter else None
    names.settle([*found.values(), *models.values()])
    return Adapted(own) if own is not None else names.base, {name: found[name] for name in wanted}


def models_below(sources: Iterable[Source]) -> list[Checkpoint]:
    """The checkpoints that adapters are on, each once."""
    return list({id(m): m for s in sources if isinstance(m := model_below(s), Checkpoint) and m is not s}.values())


def _carrier(one: Named, base: Named, names: Agreement, same_tokens: bool) -> Checkpoint:
    """The model before a plus sign."""
    if expand(one.model) == expand(base.model):
        return names.base
    found = open_expert(one.model, names.base, one.key, same_tokens, names)
    if not isinstance(found, Checkpoint):
        raise BadInput(
            f"{one.key}: {one.model} is an adapter itself; give the model that {one.adapter} was trained on."
        )
    return found


def _adapter_on(model: Checkpoint, one: Named, same_tokens: bool) -> Source:
    if not is_delta(one.adapter, one.key):
        raise BadInput(
            f"{one.key}: {one.adapter} is no adapter (it has no adapter_config.json); write an adapter behind the plus "
            "sign, or give a model alone."
        )
    return open_expert(one.adapter, model, one.key, same_tokens)


def is_delta(location: str, key: str) -> bool:
    """Whether what lies at ``location`` holds only what a model changes in its base, such as a LoRA adapter."""
    known = _format_of(_locate(location, key))
    return known is not None and known.delta


def _format_of(path: Path) -> ModelFormat | None:
    """The format of what lies at a path; None: a plain Hugging Face folder."""
    return next((f for f in FORMATS.values() if f.recognises(path)), None)


def check_same_vocabulary(expert: Source, base: Checkpoint, key: str) -> None:
    """Check that an expert has the base's tokens, and as many rows for them. Most adapters have what their base has.

    Raises BadInput that names ``key``.
    """
    seen = model_below(expert) if isinstance(expert, Adapter) and not expert.has_own_tokens else expert
    if seen is model_below(base) or not isinstance(seen, Checkpoint | Adapter):
        return
    _check_same_tokens(seen, base, key)
    _check_same_shapes(seen, base, key, same_tokens=True)


def _check_same_family(
    expert: Checkpoint, base: Checkpoint, key: str, same_tokens: bool, names: Agreement
) -> None:  # fmt: skip
    kinds = [c.config.get("model_type") for c in (expert, base)]
    if is_text_of(base.config, expert.config):
        raise BadInput(
            f"{key}: {expert.path} is a {kinds[0]} model, which reads more than text, and the base {base.path} a "
            f"{kinds[1]} model, which reads text only; give the {kinds[0]} model as the base, whose language part text "
            "models are merged into."
        )
    if kinds[0] != kinds[1] and not is_text_of(expert.config, base.config):
        raise BadInput(
            f"{key}: {expert.path} is a {kinds[0]} model and the base {base.path} a {kinds[1]} model; "
            "only fine-tunes of the base can be merged."
        )
    if same_tokens:
        _check_same_tokens(expert, base, key)
    names.bring(expert)
    _check_same_shapes(expert, base, key, same_tokens)


def _check_same_tokens(expert: Checkpoint | Adapter, base: Checkpoint, key: str) -> None:
    ours_at, theirs_at = (c.path / TOKENIZER_FILE for c in (expert, base))
    if not (ours_at.exists() and theirs_at.exists()):
        return
    if filecmp.cmp(ours_at, theirs_at, shallow=False):  # far sooner than parsing both
        return
    ours, theirs = expert.vocabulary, base.vocabulary
    if ours is not None and theirs is not None and ours != theirs:
        raise BadInput(
            f"{key}: the vocabulary of {expert.path} ({len(ours)} tokens) differs from that of the base "
            f"({len(theirs)} tokens); give a fine-tune that kept the base's tokenizer, or say tokenizer_source in a "
            "mergekit file."
        )


def _check_same_shapes(expert: Checkpoint | Adapter, base: Checkpoint, key: str, same_tokens: bool) -> None:
    for name, info in base.headers.items():
        ours, theirs = expert.headers[name].shape, info.shape
        if ours != theirs and (same_tokens or resized(name, ours, 0) != resized(name, theirs, 0)):
            _check_same_tokens(expert, base, key)  # other tokens explain more than another shape
            raise BadInput(
                f"{key}: {name} has shape {ours} in {expert.path} and {theirs} in the base; "
                "only fine-tunes of the base merge."
            )


def _refuse_special(path: Path, key: str) -> None:
    """Raises BadInput for a model of which a file is a pipe or a device: the libraries that open it would wait."""
    for file in path.iterdir() if path.is_dir() else [path]:
        try:
            refuse_special(file)
        except FileNotFoundError:  # a link to nothing, which is missing only if it is needed
            continue
        except OSError as error:
            raise BadInput(f"{key}: {file} cannot be read ({cause_of(error)}); copy the model again.") from None


def _locate(location: str, key: str) -> Path:
    if is_remote(location := expand(location)):
        return fetched(location, key)
    refuse_missing(location, key)
    path = Path(location.removeprefix("file://"))
    if path.is_dir() or (path.exists() and _format_of(path)):
        _refuse_special(path, key)
        return path
    if path.exists():
        raise BadInput(f"{key}: {location} is a file; give the folder that holds the model, or a GGUF file.")
    name, _, revision = location.partition("@")
    try:
        from huggingface_hub import snapshot_download  # slow, and models are folders mostly

        return Path(snapshot_download(name, revision=revision or None, allow_patterns=["*.safetensors*", "*.json", "*.txt", "*.model", "*.jinja", "*.spm", "LICENSE*", "NOTICE*"]))  # fmt: skip  # noqa: E501
    except Exception as error:  # the hub's client raises a dozen kinds, from three libraries
        raise BadInput(
            f"{key}: there is no folder {location}, and the hub did not give it "
            f"({type(error).__name__}); give the folder of a model, or check the name and the network."
        ) from error
