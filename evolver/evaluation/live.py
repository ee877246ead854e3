"""The live model: it is loaded once, and every candidate's weights overwrite its parameters in place."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import psutil
import torch
from torch import Tensor

from evolver.config.model import ModelSettings
from evolver.errors import BadInput
from evolver.evaluation.depth import check_alike
from evolver.evaluation.fused import ParameterSlice, refuse_experts, slices_of
from evolver.evaluation.layered import LayerMemory
from evolver.evaluation.rounding import Rounding, refuse_stacks
from evolver.records.depth import LayerOrigin
from evolver.records.recipe import at_layer, layer_of

# The matrices that name tokens, by the ends of their names.
HEADS = ("lm_head.weight", "embed_out.weight")


class Listener(Protocol):
    """Hears of the passes of a live model: ``end`` comes only after those that ended well.

    ``at`` comes before every forward pass, with which positions of it are no padding, (rows, places) bool; None: all.
    Where layers read different places, as in a decoder that also reads what an encoder made, there are several.
    """

    def begin(self) -> None: ...
    def at(self, *positions: Tensor | None) -> None: ...
    def end(self) -> None: ...


class PassThrough(Protocol):
    """Passes a batch through the module in its own way, such as with gradients."""

    def __call__(self, module: Any, positions: Tensor | None, inputs: dict[str, Any]) -> Any: ...


class LiveModel:
    """A Transformers model whose tensors are addressed by their names in the checkpoint.

    Args:
        settings: the section ``model`` of the configuration; ``compute`` is the dtype of the parameters.
        folder: Hugging Face folder of the base, or of a model that is scored as it is.
        shapes: shapes of the tensors that ``write`` will overwrite, by name.
        device: device of the model, such as ``cpu`` or ``cuda``.
        heads: the experts' classification heads by expert, for ``use``.
        labels: the labels of a classifier's head, where they differ from those of the folder.
        beside: the folder whose tokenizer, settings of generation and config.json the model has; default: ``folder``.
            It may be gone once the model is made.
        wrappers: patterns in the names of the folder's files, and what takes their place, before the class reads them.
        quantise: the quantisation through which ``write`` rounds weights; None: it writes them as they are.
        stored: how the folder's weights are quantised, as its config.json says; None: they are plain numbers.
        plain: a folder with the same weights as plain numbers, where Transformers cannot read those in ``folder``. It
            may be gone once the model is made.

    Raises BadInput where a tensor of the checkpoint has no place in the model, where the checkpoint lacks a tensor that
    the model needs, and for tensors that cannot be quantised.
    """

    def __init__(
        self, settings: ModelSettings, folder: Path, shapes: Mapping[str, tuple[int, ...]], device: str,
        heads: Mapping[str, Mapping[str, Tensor]] | None = None, labels: Sequence[str] = (),
        beside: Path | None = None, wrappers: Mapping[str, str] | None = None, quantise: str | None = None,
        stored: Mapping[str, Any] | None = None, plain: Path | None = None,
    ) -> None:  # fmt: skip
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()  # missing tensors, which it would report, are checked below
        if quantise:
            refuse_stacks(shapes)
        self.device = torch.device(device)
        self.listener: Listener | None = None
        self.passing: PassThrough | None = None
        self.folder, self._heads = folder, heads or {}
        self._beside = beside or folder
        given, apart = labelled(labels), self._beside != folder or plain is not None
        if apart:  # its config.json may name another number of tokens, whose rows are written later
            config = transformers.AutoConfig.from_pretrained(self._beside, **labelled(labels, False))
            if config.is_encoder_decoder and hasattr(config, "vocab_size"):
                # Transformers stumbles over tied tensors that it leaves out, so it is to read them all.
                config.vocab_size = transformers.AutoConfig.from_pretrained(folder).vocab_size
            if plain is not None and hasattr(config, "quantization_config"):
                del config.quantization_config
            given = {"config": config, "ignore_mismatched_sizes": bool(shapes)}
        self.module, loaded = model_class(settings.kind).from_pretrained(
            plain or folder, dtype=settings.compute, use_safetensors=True, output_loading_info=True,
            key_mapping=dict(wrappers) if wrappers else None, **given, **({} if plain else dequantised(stored)),
        )  # fmt: skip
        written = {*shapes, *(n for head in self._heads.values() for n in head)}
        missing = set(loaded["missing_keys"]) - written
        if missing:  # Transformers would fill them with random numbers
            raise BadInput(
                f"model.base: {folder} lacks {min(missing)}, which {type(self.module).__name__} needs; "
                "give a base of the kind that model.kind names."
            )
        if apart:
            if self.module.can_generate() and (self._beside / "generation_config.json").exists():
                self.module.generation_config = transformers.GenerationConfig.from_pretrained(self._beside)
            _ = self.tokenizer
        self.module.to(self.device).eval()
        self._shapes = shapes
        self._memory: LayerMemory | None = None
        self._places = self._find(shapes, folder)
        self._rounding = Rounding(self.module, quantise) if quantise else None
        # lm-eval ties a model's weights when it wraps it, even where the checkpoint holds both tensors. This stops it.
        self.module.tie_weights = lambda *_, **__: None

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer."""
        return open_tokenizer(self._beside)

    def write(
        self, tensors: Iterable[tuple[str, Tensor]], whole: bool = False, layers: Sequence[LayerOrigin] = ()
    ) -> None:  # fmt: skip
        """Overwrite the parameters of the model with the tensors of a candidate.

        Args:
            tensors: of the candidate, by their names in the checkpoint.
            whole: write them as they are, even if the model's weights are scored after a quantisation.
            layers: where the candidate's layers come from; none: it has those of the checkpoint. The module gets as
                many layers, and layers of one origin share their memory.

        Raises ValueError where the tensors are not exactly those of the model: where one was missing, the tensor of the
        previous candidate would stay. After such an error, a complete set of tensors makes the model usable again.
        Raises BadInput, naming ``model.base``, for other layers than the checkpoint's where they are not alike.
        """
        places = self._take(layers)
        left, written = set(places), set[int]()
        with torch.no_grad():
            for name, tensor in tensors:
                if name not in left:
                    raise ValueError(
                        f"the model has no tensor {name}, or the recipe gives it twice; the recipe has another number "
                        "of layers"
                    )
                left.discard(name)
                place = places[name]
                if id(place) in written:  # a repeated layer
                    continue
                if self._rounding is not None and not whole:
                    tensor = self._rounding(name, self._owner(name), tensor.to(self.device))
                place.copy_(tensor)
                written.add(id(place))
        if left:
            raise ValueError(
                f"{len(left)} tensors of the model are missing, such as {min(left)}; the recipe has another number of "
                "layers"
            )

    def _take(self, layers: Sequence[LayerOrigin]) -> Mapping[str, Tensor]:
        """Give the module these layers; the memory of each tensor of a candidate that has them."""
        own = range(1 + max((layer_of(name) or 0 for name in self._shapes), default=0))
        if not layers or ([o.base for o in layers] == list(own) and len(set(layers)) == len(own)):
            if self._memory is not None:
                self._memory.give_back()
            return self._places
        if self._memory is None:
            check_alike(self._shapes, self.module.config.to_dict(), self.folder)
            self._memory = LayerMemory(self.module)
        memory = self._memory
        memory.take(layers)
        outside = {name: place for name, place in self._places.items() if layer_of(name) is None}
        kinds = [name for name in self._places if layer_of(name) == 0]
        slots = {(name, slot): self._slot(name, slot) for slot in dict.fromkeys(memory.slots) for name in kinds}
        inside = {at_layer(n, layer): slots[n, slot] for n in kinds for layer, slot in enumerate(memory.slots)}
        return outside | inside

    def _slot(self, name: str, slot: int) -> Tensor:
        """The memory of a tensor of a layer's slot, of which ``name`` is the name in layer 0."""
        if (found := self._places.get(at_layer(name, slot))) is not None:
            return found
        assert self._memory is not None
        part = self._slices.get(name)
        if part is None:
            return self._memory.place(self._owners[name], slot).data
        return part.within(self._memory.place(part.parameter, slot).data)

    def _owner(self, name: str) -> str:
        """The parameter that a tensor of a candidate belongs to; in layers that the checkpoint lacks, that of layer
        0.
        """
        return self._owners.get(name) or self._owners.get(at_layer(name, 0), name)

    def forward(self, positions: Tensor | None, **inputs: Any) -> Any:
        """What the module says of a batch.

        Args:
            positions: (rows, places) bool, which of them are no padding; None: all.
            inputs: of the module, by name.
        """
        with self.passes() as at:
            at(positions)
            return self.module(**inputs) if self.passing is None else self.passing(self.module, positions, inputs)

    @contextlib.contextmanager
    def passes(self) -> Iterator[Callable[..., None]]:
        """Forward passes of which a listener hears as of one: they count only if all of them end well.

        Yields what is to be called before each of them, with the positions that are no padding, see ``Listener``.
        """
        listener = self.listener
        if listener is None:
            yield lambda *_: None
            return
        listener.begin()
        yield listener.at
        listener.end()

    def parameters(self) -> dict[str, tuple[str, ParameterSlice | None]]:
        """The parameter of the module that each tensor of the checkpoint is, or is this slice of, by the tensor's
        name.
        """
        return {name: (owner, self._slices.get(name)) for name, owner in self._owners.items()}

    def linear_layers(self) -> dict[str, torch.nn.Linear]:
        """The linear layers by the name of their weight in the checkpoint, without the one that names tokens.

        Raises BadInput for a mixture of experts, most of whose layers are not among them.
        """
        refuse_experts(self.module, "search")
        names, last = {t.data_ptr(): n for n, t in self._places.items()}, self.module.get_output_embeddings()
        linear = (m for m in self.module.modules() if isinstance(m, torch.nn.Linear) and m is not last)
        return {names[m.weight.data_ptr()]: m for m in linear if m.weight.data_ptr() in names}

    def close(self) -> None:
        """Does nothing: no part of the model outlives the process."""

    def use(self, head: str) -> None:
        """Put an expert's own classification head on the model, whatever its number of labels."""
        for name, tensor in self._heads[head].items():
            self.module.get_parameter(name).data = tensor.to(self.device, self.module.dtype)

    def outputs(self, head: str | None) -> int:
        """The number of labels of an expert's head; None: of the model's own head."""
        if head is None:
            return int(self.module.config.num_labels)
        return int(list(self._heads[head].values())[-1].shape[0])

    def _find(self, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> dict[str, Tensor]:
        """The memory of each tensor: a whole parameter, or a slice of one."""
        slices = slices_of(self.module, shapes, folder)
        places = places_of(self.module, (n for n in shapes if n not in slices), folder)
        if self.module.config.is_encoder_decoder and self._beside != folder:
            self._resize({place: shapes[name] for name, place in places.items()})
        self._untie(places.values())
        state = self.module.state_dict(keep_vars=False)
        self._slices = slices
        self._owners = places | {name: part.parameter for name, part in slices.items()}
        whole = {name: state[found] for name, found in places.items()}
        return whole | {name: part.within(state[part.parameter]) for name, part in slices.items()}

    def _resize(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Make room for other numbers of tokens. Tensors that the model ties stay tied, and others do not get so, as
        ``resize_token_embeddings`` would have it.

        Args:
            shapes: of tensors, by their names in the model.
        """
        named = (self.module.named_parameters, self.module.named_buffers)
        tensors = {name: tensor for find in named for name, tensor in find(remove_duplicate=False)}
        for place, shape in shapes.items():
            old = tensors[place]
            if tuple(old.shape) == shape:
                continue
            made = old.new_zeros(shape)
            new = torch.nn.Parameter(made, requires_grad=False) if isinstance(old, torch.nn.Parameter) else made
            for name in (n for n, tensor in tensors.items() if tensor is old):
                owner, _, leaf = name.rpartition(".")
                setattr(self.module.get_submodule(owner), leaf, new)
            self.module.config.vocab_size = next(
                size for size, was in zip(shape, old.shape, strict=True) if size != was
            )

    def _untie(self, names: Iterable[str]) -> None:
        """Give each of these tensors memory of its own.

        Transformers ties a head to its embedding if the checkpoint holds both with equal values. In another expert, or
        in a merge, the two need not be equal. The head is moved, as an encoder-decoder uses its embedding in several
        places.
        """
        seen: set[int] = set()
        parameters = dict(self.module.named_parameters(remove_duplicate=False))
        for name in sorted((n for n in names if n in parameters), key=lambda n: n.endswith(HEADS)):
            if parameters[name].data_ptr() in seen:
                owner, _, leaf = name.rpartition(".")
                clone = torch.nn.Parameter(parameters[name].detach().clone(), requires_grad=False)
                setattr(self.module.get_submodule(owner), leaf, clone)
            seen.add(parameters[name].data_ptr())


# Architectures that read images and texts, and go on with a text alone as language models do.
SEEING = ("llava", "llava_next", "llava_onevision", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl")


class CausalModels:
    """Loads language models. Of those that also read images, the class for both is loaded, and given texts only."""

    @classmethod
    def from_pretrained(cls, folder: Path, **given: Any) -> Any:
        """A model with its weights; see Transformers for the arguments."""
        import transformers

        config = given.get("config") or transformers.AutoConfig.from_pretrained(folder)
        return cls._of(config).from_pretrained(folder, **given)

    @classmethod
    def from_config(cls, config: Any, **given: Any) -> Any:
        """A model with random weights; see Transformers for the arguments."""
        return cls._of(config).from_config(config, **given)

    @staticmethod
    def _of(config: Any) -> Any:
        import transformers

        if config.model_type in SEEING:
            return transformers.AutoModelForImageTextToText
        return transformers.AutoModelForCausalLM


def model_class(kind: str) -> Any:
    """The class of Transformers that loads models of this kind."""
    import transformers

    kinds: dict[str, Any] = {
        "causal-lm": CausalModels,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "classifier": transformers.AutoModelForSequenceClassification,
        "token-classifier": transformers.AutoModelForTokenClassification,
        "image-classifier": transformers.AutoModelForImageClassification,
    }
    return kinds[kind]


def open_tokenizer(folder: Path) -> Any:
    """The tokenizer in a model's folder.

    Raises BadInput where there is none that can be read.
    """
    import transformers

    try:
        found = transformers.AutoTokenizer.from_pretrained(folder)
        found("a", truncation=True)  # what cannot cut a text shows only now
        found.decode([found.eos_token_id or 0])
        return found
    except Exception as error:  # each kind of tokenizer reads its files in its own way
        said = " ".join(str(error).split())[:160]
        files = [n for n in ("tokenizer.json", "tokenizer_config.json") if not (folder / n).exists()]
        found_out = f"there is no {' and no '.join(files)}" if files else said
        raise BadInput(
            f"model.base: {folder} has no tokenizer that can be read ({found_out}); copy tokenizer.json and "
            "tokenizer_config.json there from the model that the weights belong to."
        ) from error


def places_of(module: Any, names: Iterable[str], folder: Path) -> dict[str, str]:
    """The names that tensors of a checkpoint have in a Transformers model.

    Raises BadInput for a tensor that has no place in the model.
    """
    state = module.state_dict(keep_vars=False)
    prefix, renamed = module.base_model_prefix + ".", _renaming(module, state)
    places = {}
    for name in names:
        found = next((n for n in (name, prefix + name, name.removeprefix(prefix)) if n in state), None)
        found = found or next((n for n in renamed(name) if n in state), None)
        if found is None:
            raise BadInput(
                f"model.base: {folder} holds {name}, which {type(module).__name__} has no place for; "
                "give a base that was saved with this class, or correct model.kind."
            )
        places[name] = found
    return places


def labelled(labels: Sequence[str], loads: bool = True) -> dict[str, Any]:
    """The arguments with which Transformers gives a classifier a head for these labels.

    Args:
        loads: whether it also loads weights, of which those of the head may have other shapes.
    """
    if not labels:
        return {}
    ids = dict(enumerate(labels))
    own = {"id2label": ids, "label2id": {v: k for k, v in ids.items()}}
    return {**own, "ignore_mismatched_sizes": True} if loads else own


def dequantised(stored: Mapping[str, Any] | None) -> dict[str, Any]:
    """The arguments with which Transformers loads weights of FP8 or MXFP4 as plain numbers, on a GPU as well.

    Args:
        stored: see ``LiveModel``.
    """
    from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

    kinds: dict[str, Any] = {"fp8": FineGrainedFP8Config, "mxfp4": Mxfp4Config}
    if stored is None or (kind := kinds.get(str(stored.get("quant_method")))) is None:
        return {}
    kept = stored.get("modules_to_not_convert")
    return {"quantization_config": kind(dequantize=True, modules_to_not_convert=kept)}


def _renaming(module: Any, state: Mapping[str, Tensor]) -> Callable[[str], tuple[str, str]]:
    """A function from names in the checkpoint to names in the model, without and with the class's prefix.

    They differ where Transformers renames an architecture's tensors as it loads them.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, apply_renamings, rename_source_key

    rules = [t for t in get_model_conversion_mapping(module) or [] if isinstance(t, WeightRenaming)]
    prefix, known = module.base_model_prefix, dict(state)
    return lambda name: (apply_renamings(name, rules), rename_source_key(name, rules, [], prefix, known)[0])


def default_device() -> str:
    """``cuda`` where this process can use a GPU, else ``cpu``."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def free_memory(device: str) -> int:
    """Bytes of memory that are free on a device. On a CPU, the limit of the container counts as well."""
    if device != "cpu":
        return int(torch.cuda.mem_get_info(device)[0])
    free = int(psutil.virtual_memory().available)
    with contextlib.suppress(OSError, ValueError):  # where there is no limit, the file holds the word "max"
        limit, used = (int(Path(f"/sys/fs/cgroup/memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, limit - used)
    return free


def kinds_of(architecture: str) -> list[str]:
    """As what Transformers can load models of an architecture, in the words of ``model.kind``."""
    from transformers.models.auto import modeling_auto as known  # slow

    kinds: dict[str, Mapping[str, Any]] = {
        "causal-lm": {**known.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, **dict.fromkeys(SEEING)},
        "seq2seq": known.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "classifier": known.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        "token-classifier": known.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
        "image-classifier": known.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    return [name for name, architectures in kinds.items() if architecture in architectures]
