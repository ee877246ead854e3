"""Tiny random models of every architecture family, in each of the layouts in which people find such models on disk."""

from __future__ import annotations

import functools
import json
import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import toys
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

transformers.utils.logging.set_verbosity_error()  # what files hold beside the weights is wanted here
transformers.utils.logging.disable_progress_bar()

Tensors = Mapping[str, Tensor]
WEIGHTS = "model.safetensors"
IMAGE = 16  # pixels of a side
SPECIAL = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
DECODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": toys.LENGTH, "initializer_range": 0.2, **SPECIAL,
}  # fmt: skip
ROPE3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip  # noqa: E501
WIDE = {"num_attention_heads": 2, "num_key_value_heads": 1}  # heads that have the frequencies of published ones
UNTIED = {"tie_word_embeddings": False}
MIXTURE = {**DECODER, **UNTIED, "num_experts_per_tok": 2}
LATENT = {
    "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "n_group": 2,
    "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "num_key_value_heads": 4,
    "n_routed_experts": 4, "moe_intermediate_size": 16,
}  # fmt: skip
LABELS = {"id2label": dict(enumerate(toys.MOODS)), "label2id": {n: i for i, n in enumerate(toys.MOODS)}}
ENCODER = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": toys.LENGTH, "initializer_range": 0.3, **SPECIAL, **LABELS,
}  # fmt: skip
SHIFTED = {**ENCODER, "max_position_embeddings": toys.LENGTH + 4}  # positions begin behind that of the padding
BART = {
    "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48,
    "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 192, "init_std": 0.3,
    "decoder_start_token_id": 1, "forced_eos_token_id": 1, **SPECIAL,
}  # fmt: skip
T5 = {
    "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2,
    "feed_forward_proj": "gated-gelu", "initializer_factor": 4.0, "n_positions": toys.LENGTH,
    "decoder_start_token_id": 2, **SPECIAL,
}  # fmt: skip
VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": IMAGE,
    "patch_size": 8,
}  # fmt: skip
TEXT = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "max_position_embeddings": toys.LENGTH, **SPECIAL,
}  # fmt: skip
DIGITS = {"id2label": {n: str(n) for n in range(10)}, "label2id": {str(n): n for n in range(10)}}


@dataclass(frozen=True)
class Family:
    """An architecture.

    Attributes:
        name: as people call it.
        class_name: Transformers' class.
        settings: of its configuration, without the size of the vocabulary.
        kind: ``model.kind`` with which it is searched over.
        inner: the keys of settings that are configurations themselves and have a vocabulary.
        text: for a model that also reads images, the class of text models that are merged into its language part.
    """

    name: str
    class_name: str
    settings: Mapping[str, Any]
    kind: str = "causal-lm"
    inner: tuple[str, ...] = ()
    text: str = ""

    def model(self, seed: int = 0, **changes: Any) -> Any:
        """A random model, drawn with ``seed``."""
        kind, size = getattr(transformers, self.class_name), len(toys.tokenizer())
        settings = {**self.settings, **changes}
        for key in self.inner:
            settings[key] = {**settings[key], "vocab_size": size}
        if not self.inner and "text_config" not in settings and self.kind != "image-classifier":
            settings["vocab_size"] = size
        torch.manual_seed(seed)
        return kind(kind.config_class(**settings)).float().eval()

    def beside(self) -> list[Any]:
        """What is saved beside the weights."""
        found: list[Any] = []
        if self.kind != "image-classifier" or self.inner:
            found.append(toys.tokenizer())
        if self.kind == "image-classifier" or self.inner:
            side = {"height": IMAGE, "width": IMAGE}
            found.append(transformers.ViTImageProcessorPil(size=side))
        return found


def _decoders() -> Iterator[Family]:
    yield Family("Llama 2", "LlamaForCausalLM", {**DECODER, **UNTIED, "num_key_value_heads": 4})
    yield Family("Llama 3", "LlamaForCausalLM", {**DECODER, **UNTIED, **WIDE, "rope_parameters": ROPE3})
    llama4 = {"num_local_experts": 4, "intermediate_size_mlp": 48, "head_dim": 8, "interleave_moe_layer_step": 1}
    yield Family("Llama 4, text", "Llama4ForCausalLM", {**DECODER, **UNTIED, **llama4, "num_experts_per_tok": 1})
    yield Family("SmolLM", "LlamaForCausalLM", {**DECODER, "tie_word_embeddings": True})
    yield Family("Mistral", "MistralForCausalLM", {**DECODER, **UNTIED})
    yield Family("Mixtral", "MixtralForCausalLM", {**MIXTURE, "num_local_experts": 4})
    yield Family("Qwen2, Qwen2.5", "Qwen2ForCausalLM", {**DECODER, "tie_word_embeddings": True})
    moe = {"num_experts": 4, "moe_intermediate_size": 16}
    yield Family("Qwen2-MoE", "Qwen2MoeForCausalLM", {**MIXTURE, **moe, "shared_expert_intermediate_size": 24})
    yield Family("Qwen3", "Qwen3ForCausalLM", {**DECODER, "head_dim": 128, "tie_word_embeddings": True})
    # More than ten experts: the names of the tenth and the second are not in the order of the alphabet.
    yield Family("Qwen3-MoE", "Qwen3MoeForCausalLM", {**MIXTURE, **moe, "num_experts": 12, "head_dim": 8})
    yield Family("Gemma 2", "Gemma2ForCausalLM", {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8})
    yield Family("Gemma 3, text", "Gemma3ForCausalLM", {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8})
    yield Family("Phi-3", "Phi3ForCausalLM", {**DECODER, **UNTIED})
    yield Family("OLMo", "OlmoForCausalLM", {**DECODER, **UNTIED})
    yield Family("OLMo 2", "Olmo2ForCausalLM", {**DECODER, **UNTIED})
    yield Family("OLMoE", "OlmoeForCausalLM", {**MIXTURE, "num_experts": 4})
    yield Family("DeepSeek V2", "DeepseekV2ForCausalLM", {**MIXTURE, **LATENT})
    yield Family("DeepSeek V3", "DeepseekV3ForCausalLM", {**MIXTURE, **LATENT})
    yield Family("Falcon", "FalconForCausalLM", {**DECODER, "new_decoder_architecture": True, "num_kv_heads": 2})
    gpt2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
    yield Family("GPT-2", "GPT2LMHeadModel", {**gpt2, **SPECIAL})
    yield Family("GPT-NeoX", "GPTNeoXForCausalLM", {**DECODER, **UNTIED})
    bloom = {"hidden_size": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.2}
    yield Family("BLOOM", "BloomForCausalLM", {**bloom, **SPECIAL})
    opt = {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.2}
    yield Family("OPT", "OPTForCausalLM", {**DECODER, **opt})
    mamba = {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 4, "time_step_rank": 4, "initializer_range": 0.2}
    yield Family("Mamba", "MambaForCausalLM", {**mamba, **SPECIAL})
    yield Family("gpt-oss", "GptOssForCausalLM", {**MIXTURE, "num_local_experts": 4, "head_dim": 8})


def _encoders() -> Iterator[Family]:
    kind = "classifier"
    yield Family("BERT", "BertForSequenceClassification", ENCODER, kind)
    yield Family("RoBERTa", "RobertaForSequenceClassification", SHIFTED, kind)
    yield Family("XLM-R", "XLMRobertaForSequenceClassification", SHIFTED, kind)
    deberta = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False}
    yield Family("DeBERTa", "DebertaForSequenceClassification", {**ENCODER, **deberta}, kind)
    yield Family("DeBERTa v2, v3", "DebertaV2ForSequenceClassification", {**ENCODER, **deberta}, kind)
    yield Family("ELECTRA", "ElectraForSequenceClassification", {**ENCODER, "embedding_size": 24}, kind)
    distil = {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2, "max_position_embeddings": toys.LENGTH}
    yield Family("DistilBERT", "DistilBertForSequenceClassification", {**distil, **LABELS, "pad_token_id": 2}, kind)
    yield Family("MPNet", "MPNetForSequenceClassification", SHIFTED, kind)
    words = {"cls_token_id": 0, "sep_token_id": 1}
    yield Family("ModernBERT", "ModernBertForSequenceClassification", {**ENCODER, **words}, kind)


def _others() -> Iterator[Family]:
    yield Family("T5", "T5ForConditionalGeneration", T5, "seq2seq")
    yield Family("BART", "BartForConditionalGeneration", BART, "seq2seq")
    yield Family("Marian", "MarianMTModel", {**BART, "decoder_start_token_id": 2}, "seq2seq")
    kind = "image-classifier"
    yield Family("ViT", "ViTForImageClassification", {**VISION, **DIGITS, "initializer_range": 0.3}, kind)
    towers = {"text_config": {**TEXT, "vocab_size": 99}, "vision_config": VISION, **DIGITS}
    yield Family("CLIP, image classifier", "CLIPForImageClassification", {**towers, "projection_dim": 16}, kind)
    yield Family("SigLIP, image classifier", "SiglipForImageClassification", towers, kind)
    inner = ("text_config",)
    pair = {"text_config": TEXT, "vision_config": VISION}
    yield Family("CLIP", "CLIPModel", {**pair, "projection_dim": 16}, kind, inner)
    yield Family("SigLIP", "SiglipModel", pair, kind, inner)


def _seeing() -> Iterator[Family]:
    """Models that read images and texts."""
    inner, kind, plain = ("text_config",), "causal-lm", {**DECODER, **UNTIED}
    clip, siglip = ({"model_type": f"{n}_vision_model", **VISION} for n in ("clip", "siglip"))
    llava = {"image_token_index": 5, "vision_feature_layer": -1, **UNTIED}
    llama = {"text_config": {"model_type": "llama", **plain}, "vision_config": clip, **llava}
    yield Family("LLaVA", "LlavaForConditionalGeneration", llama, kind, inner, "LlamaForCausalLM")
    grid = {"image_grid_pinpoints": [[IMAGE, IMAGE]]}
    yield Family("LLaVA-NeXT", "LlavaNextForConditionalGeneration", {**llama, **grid}, kind, inner, "LlamaForCausalLM")
    qwen = {"text_config": {"model_type": "qwen2", **plain}, "vision_config": siglip, **llava, **grid}
    vision = "LlavaOnevisionForConditionalGeneration"
    yield Family("LLaVA-OneVision", vision, {**qwen, "video_token_index": 6}, kind, inner, "Qwen2ForCausalLM")
    pixtral = {"model_type": "pixtral", **VISION, "head_dim": 16}
    mistral = {"text_config": {"model_type": "mistral", **plain, "head_dim": 8}, "vision_config": pixtral, **llava}
    yield Family("Mistral 3", "Mistral3ForConditionalGeneration", mistral, kind, inner, "MistralForCausalLM")
    tower = {"depth": 2, "hidden_size": 16, "out_hidden_size": 32, "num_heads": 2, "patch_size": 8, "intermediate_size": 24}  # fmt: skip  # noqa: E501
    turned = {**plain, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}
    second = {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 8, "mlp_ratio": 2}
    older = {"text_config": turned, "vision_config": second, **UNTIED}
    yield Family("Qwen2-VL", "Qwen2VLForConditionalGeneration", older, kind, inner, "Qwen2ForCausalLM")
    newer = {**older, "vision_config": {**tower, "fullatt_block_indexes": [1]}}
    yield Family("Qwen2.5-VL", "Qwen2_5_VLForConditionalGeneration", newer, kind, inner, "Qwen2ForCausalLM")
    deep = {**tower, "deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    third = {**older, "text_config": {**turned, "head_dim": 8}, "vision_config": deep}
    yield Family("Qwen3-VL", "Qwen3VLForConditionalGeneration", third, kind, inner, "Qwen3ForCausalLM")
    gemma = {"text_config": {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8}, "vision_config": VISION}
    places = {"mm_tokens_per_image": 4, "boi_token_index": 3, "eoi_token_index": 4, "image_token_index": 5}
    vision = "Gemma3ForConditionalGeneration"
    yield Family("Gemma 3", vision, {**gemma, **places}, kind, inner, "Gemma3ForCausalLM")


FAMILIES = {f.name: f for make in (_decoders, _encoders, _others, _seeing) for f in make()}


@functools.cache
def _plain(name: str) -> Any:
    """A model of a family, of which only the names of tensors count."""
    return FAMILIES[name].model()


def save_all(family: Family, folder: Path) -> None:
    """Save ``base``, and fine-tunes ``a`` and ``b`` of it, by the class itself, each with what belongs beside it.

    No two of their tensors are alike, not even those that are zeros or ones at first.
    """
    model = family.model()
    weights = _noisy(model.state_dict(), 9)
    for seed, name in enumerate(("base", "a", "b")):
        model.load_state_dict(_noisy(weights, seed) if seed else weights)
        model.tie_weights()
        for part in (model, *family.beside()):
            part.save_pretrained(folder / name)


def save_texts(family: Family, folder: Path) -> None:
    """Save text models ``text-a`` and ``text-b``, fine-tunes of the language part of ``base``."""
    kind, inside = getattr(transformers, family.text), "model.language_model."
    whole = getattr(transformers, family.class_name).from_pretrained(folder / "base", dtype=torch.float32)
    known = {k: v for k, v in whole.config.get_text_config().to_dict().items() if k not in ("model_type", "dtype")}
    part = {n.replace(inside, "model."): t for n, t in whole.state_dict().items()}
    for seed, name in enumerate(("text-a", "text-b"), 1):
        model = kind(kind.config_class(**known)).float()
        model.load_state_dict(_noisy({n: part[n] for n in model.state_dict()}, seed))
        model.tie_weights()
        model.save_pretrained(folder / name)
        toys.tokenizer().save_pretrained(folder / name)


def _noisy(tensors: Tensors, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    return {n: t + 0.1 * torch.randn_like(t) if t.is_floating_point() else t.clone() for n, t in tensors.items()}


Change = Callable[[dict[str, Tensor]], dict[str, Tensor]]


def changes(model: Any, share: float = 1.0, draw: random.Random | None = None) -> dict[str, Change]:
    """The ways in which older files differ from those that the class saves, by name.

    Args:
        share: of the tensors that are renamed, if ``draw`` says which.
    """
    prefix, drawn = f"{model.base_model_prefix}.", draw or random.Random(0)

    def some(rename: Callable[[str], str]) -> Change:
        return lambda tensors: {(rename(n) if drawn.random() < share else n): t for n, t in tensors.items()}

    def gamma(name: str) -> str:
        return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")

    def twins(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tied = model.all_tied_weights_keys or {}
        return tensors | {t: tensors[s].clone() for t, s in tied.items() if s in tensors and t not in tensors}

    def tables(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = torch.ones(1, 1, 12, 12).tril()
        return tensors | {
            "embeddings.position_ids": torch.arange(12)[None],
            "layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            "h.0.attn.bias": mask, "h.0.attn.masked_bias": torch.tensor(-1e4),
        }  # fmt: skip

    return {
        "twins": twins, "no prefix": some(lambda n: n.removeprefix(prefix)), "gamma": some(gamma), "tables": tables,
    }  # fmt: skip


def rewrite(folder: Path, target: Path, tensors: Tensors) -> Path:
    """A copy of a model's folder with other tensors in its file."""
    shutil.copytree(folder, target)
    kept = {n: t.contiguous().clone() for n, t in tensors.items()}
    save_file(kept, target / WEIGHTS, metadata={"format": "pt"})
    return target


def loaded(family: Family, folder: Path) -> dict[str, Tensor]:
    """The tensors that the class makes of a folder, of which it must miss none."""
    kind = getattr(transformers, family.class_name)
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    if wrong := [*info["missing_keys"], *info["mismatched_keys"]]:
        raise KeyError(f"{folder}: {wrong}")
    return {n: t.clone() for n, t in model.state_dict().items()}


def loads_alike(family: Family, folder: Path, right: Tensors) -> bool:
    """Whether the class makes the same tensors of a folder."""
    try:
        found = loaded(family, folder)
    except (KeyError, RuntimeError):
        return False
    return found.keys() == right.keys() and all(torch.equal(t, right[n]) for n, t in found.items())


def oldest(
    family: Family, folder: Path, target: Path, right: Tensors, share: float = 1.0, draw: random.Random | None = None
) -> list[str]:  # fmt: skip
    """Write a model in the oldest layout that Transformers still reads; returns what was changed.

    Every change is kept with which the class still loads the very same tensors, ``right``.
    """
    tensors, made = load_file(folder / WEIGHTS), list[str]()
    for name, change in changes(_plain(family.name), share, draw).items():
        if draw is not None and draw.random() < 0.5:
            continue
        new = change(dict(tensors))
        if new.keys() == tensors.keys():
            continue
        trial = rewrite(folder, target, new)
        if loads_alike(family, trial, right):
            tensors, made = new, [*made, name]
        shutil.rmtree(trial)
    rewrite(folder, target, tensors)
    return made


def sharded(family: Family, folder: Path, target: Path) -> None:
    """Save a model again, in shards of a few tensors."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(WEIGHTS))
    model = getattr(transformers, family.class_name).from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(target, max_shard_size="40KB")
    index = json.loads((target / f"{WEIGHTS}.index.json").read_text())
    if len(set(index["weight_map"].values())) < 2:
        raise ValueError(f"{target} is one shard")


def unconverted(family: Family, folder: Path, target: Path) -> None:
    """Save a model again, with the names and shapes that its tensors have in memory."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(WEIGHTS))
    model = getattr(transformers, family.class_name).from_pretrained(folder, dtype=torch.float32)
    model.save_pretrained(target, save_original_format=False)
