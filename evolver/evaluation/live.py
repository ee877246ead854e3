"""The live model: loaded once, its parameters overwritten in place for every candidate."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from evolver.config import ModelSettings
from evolver.errors import BadInput


class Listener(Protocol):
    """Hears of the passes of a live model: ``end`` comes only after one that ended well."""

    def begin(self, positions: Tensor | None) -> None: ...
    def end(self) -> None: ...


class LiveModel:
    """A Transformers model whose tensors are addressed by their names in the checkpoint.

    Args:
        settings: of the model; ``compute`` is the dtype of its parameters.
        names: of the tensors that will be written.
        heads: classification heads by the expert that they are of, for ``use``.
        labels: of a classifier's head, where they are not those of the folder.

    Raises BadInput where a tensor of the checkpoint has no place in the model, or the model needs one more.
    """

    def __init__(
        self, settings: ModelSettings, folder: Path, names: Iterable[str], device: str,
        heads: Mapping[str, Mapping[str, Tensor]] | None = None, labels: Sequence[str] = (),
    ) -> None:  # fmt: skip
        import transformers

        kinds: dict[str, Any] = {
            "causal-lm": transformers.AutoModelForCausalLM,
            "seq2seq": transformers.AutoModelForSeq2SeqLM,
            "classifier": transformers.AutoModelForSequenceClassification,
            "image-classifier": transformers.AutoModelForImageClassification,
        }
        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()  # its report of the loading; what matters of it is below
        self.device = torch.device(device)
        self.listener: Listener | None = None
        self.folder, self._heads, names = folder, heads or {}, list(names)
        self.module, loaded = kinds[settings.kind].from_pretrained(
            folder, dtype=settings.compute, use_safetensors=True, output_loading_info=True, **_labelled(labels)
        )
        written = {*names, *(n for head in self._heads.values() for n in head)}
        missing = set(loaded["missing_keys"]) - written
        if missing:  # they would be filled with random numbers
            raise BadInput(
                f"model.base: {folder} lacks {min(missing)}, which {type(self.module).__name__} needs; "
                "give a base of the kind that model.kind says."
            )
        self.module.to(self.device).eval()
        self._places = self._find(names, folder)
        # lm-eval ties a model's weights when it wraps it, by the configuration, whatever the checkpoint says.
        self.module.tie_weights = lambda *_, **__: None

    @cached_property
    def tokenizer(self) -> Any:
        """The base's tokenizer."""
        import transformers

        return transformers.AutoTokenizer.from_pretrained(self.folder)

    def write(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Overwrite the parameters; nothing else of the model changes.

        Raises ValueError where they are not exactly the model's: the last candidate's would stay in place of what is
        missing. The next candidate overwrites whatever was written.
        """
        left = set(self._places)
        with torch.no_grad():
            for name, tensor in tensors:
                if name not in left:
                    raise ValueError(
                        f"the model has no tensor {name}, or it came twice; the recipe is of another depth"
                    )
                self._places[name].copy_(tensor)
                left.discard(name)
        if left:
            raise ValueError(
                f"{len(left)} tensors of the model are missing, such as {min(left)}; the recipe is of another depth"
            )

    def forward(self, positions: Tensor | None, **inputs: Any) -> Any:
        """What the module says of a batch.

        Args:
            positions: (rows, places) bool, which of them are no padding; None: all.
            inputs: of the module, by name.
        """
        if self.listener is not None:
            self.listener.begin(positions)
        outputs = self.module(**inputs)
        if self.listener is not None:
            self.listener.end()
        return outputs

    def linear_layers(self) -> dict[str, torch.nn.Linear]:
        """The linear layers by the name of their weight in the checkpoint, without the one that names tokens."""
        names, last = {t.data_ptr(): n for n, t in self._places.items()}, self.module.get_output_embeddings()
        linear = (m for m in self.module.modules() if isinstance(m, torch.nn.Linear) and m is not last)
        return {names[m.weight.data_ptr()]: m for m in linear if m.weight.data_ptr() in names}

    def close(self) -> None:
        """Nothing outlives the process."""

    def use(self, head: str) -> None:
        """Put an expert's own head on the model, whatever its number of labels."""
        for name, tensor in self._heads[head].items():
            self.module.get_parameter(name).data = tensor.to(self.device, self.module.dtype)

    def outputs(self, head: str | None) -> int:
        """How many labels a head names; None: the model's one."""
        if head is None:
            return int(self.module.config.num_labels)
        return int(list(self._heads[head].values())[-1].shape[0])

    def _find(self, names: Iterable[str], folder: Path) -> dict[str, Tensor]:
        state = self.module.state_dict(keep_vars=False)
        prefix, renamed = self.module.base_model_prefix + ".", _renaming(self.module)
        places = {}
        for name in names:
            possible = (name, prefix + name, name.removeprefix(prefix), renamed(name))
            found = next((n for n in possible if n in state), None)
            if found is None:
                raise BadInput(
                    f"model.base: {folder} holds {name}, which {type(self.module).__name__} has no place for; "
                    "save the base with the class that model.kind stands for."
                )
            places[name] = found
        self._untie(places.values())
        state = self.module.state_dict(keep_vars=False)
        return {name: state[found] for name, found in places.items()}

    def _untie(self, names: Iterable[str]) -> None:
        """Give each of these tensors a storage of its own.

        Transformers ties a head to its embedding where a checkpoint holds both with equal values; those of another
        expert, or of a merge, need not be equal.
        """
        seen: set[int] = set()
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        for name in (n for n in names if n in parameters):
            if parameters[name].data_ptr() in seen:
                owner, _, leaf = name.rpartition(".")
                clone = torch.nn.Parameter(parameters[name].detach().clone(), requires_grad=False)
                setattr(self.module.get_submodule(owner), leaf, clone)
            seen.add(parameters[name].data_ptr())


def _labelled(labels: Sequence[str]) -> dict[str, Any]:
    """What makes Transformers give a classifier a head for these labels."""
    if not labels:
        return {}
    ids = dict(enumerate(labels))
    return {"id2label": ids, "label2id": {v: k for k, v in ids.items()}, "ignore_mismatched_sizes": True}


def _renaming(module: Any) -> Callable[[str], str]:
    """From names in checkpoints to names in the model: Transformers renames some architectures' tensors as it loads."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings

    renamings = [t for t in get_model_conversion_mapping(module) or [] if isinstance(t, WeightRenaming)]
    return lambda name: apply_renamings(name, renamings)


def default_device() -> str:
    """The accelerator that this process was given, or the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_memory(device: str) -> int:
    """Bytes that a process here may still take on a device: all that is free, within what its container allows."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # "max" is no number: there is no limit
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free
