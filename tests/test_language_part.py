"""Text experts of a model that also reads images: its language part is merged, the rest stays as it is."""

from __future__ import annotations

import shutil

import pytest
import torch
import toys
import transformers
import yaml
from families import DECODER, FAMILIES, UNTIED, loaded
from safetensors.torch import load_file
from toys import evolver, refusal, rows

from evolver.checkpoints.agreement import is_text_of

pytestmark = pytest.mark.whole

LLAVA = FAMILIES["LLaVA"]
INSIDE = "model.language_model."


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny LLaVA ``base``, and Llamas ``a`` and ``b`` that were trained from its language part."""
    folder = tmp_path_factory.mktemp("llava")
    base = LLAVA.model()
    for part in (base, *LLAVA.beside()):
        part.save_pretrained(folder / "base")
    (folder / "base" / "processor_config.json").write_text('{"image_token": "<image>"}')
    for seed, name in enumerate(("a", "b"), 1):
        save_text(base, folder / name, seed)
    return folder


def save_text(base, folder, seed, **changes):
    words = toys.tokenizer()
    text = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**DECODER, **UNTIED, "vocab_size": len(words), **changes})
    )
    own = {n.replace(INSIDE, "model."): t for n, t in base.state_dict().items()}
    torch.manual_seed(seed)
    text.load_state_dict({n: own[n] + 0.05 * torch.randn_like(own[n]) for n in text.state_dict()})
    text.tie_weights()
    text.save_pretrained(folder)
    words.save_pretrained(folder)


def merged(folders, out, method="task_arithmetic", names=("a", "b"), base="base"):
    models = [{"model": str(folders / n), "parameters": {"weight": 0.5}} for n in names]
    raw = {"merge_method": method, "base_model": str(folders / base), "models": models, "dtype": "float32"}
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(raw))
    return evolver("merge", file, out)


def test_the_language_part_is_merged_and_the_rest_is_the_bases(folders, tmp_path):
    ended = merged(folders, tmp_path / "out")
    assert (ended.code, ended.err) == (0, "")
    made, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    base = loaded(LLAVA, folders / "base")
    texts = [load_file(folders / n / "model.safetensors") for n in ("a", "b")]
    for name, tensor in made.state_dict().items():
        own = name.replace(INSIDE, "model.")
        right = base[name].double()
        if name.startswith(INSIDE) or name == "lm_head.weight":
            right = right + sum(0.5 * (t[own].double() - base[name].double()) for t in texts)
            assert torch.allclose(tensor.double(), right, atol=1e-6), name
        else:
            assert torch.equal(tensor, base[name]), name
    kept = {f.name for f in (folders / "base").iterdir()} - {"model.safetensors"}
    assert kept <= {f.name for f in (tmp_path / "out").iterdir()}
    for name in ("preprocessor_config.json", "processor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folders / "base" / name).read_bytes()


def test_a_text_expert_without_a_head_of_its_own_uses_its_embedding(folders, tmp_path):
    shutil.copytree(folders / "base", tmp_path / "base")
    save_text(LLAVA.model(), tmp_path / "tied", 3, tie_word_embeddings=True)
    ended = merged(tmp_path, tmp_path / "out", names=("tied",))
    assert ended.code == 0, ended.err
    base, text = loaded(LLAVA, tmp_path / "base"), load_file(tmp_path / "tied" / "model.safetensors")
    head = loaded(LLAVA, tmp_path / "out")["lm_head.weight"]
    assert torch.allclose(head, (base["lm_head.weight"] + text["model.embed_tokens.weight"]) / 2, atol=1e-6)


def test_a_search_scores_texts_and_its_winner_reads_images_still(folders, tasks, tmp_path):
    entry = {"task": "toy", "metric": "acc", "dev": 12, "report": 8}
    raw = toys.settings(folders, tasks, {**toys.SHORT, "evaluation.tasks": [entry]})
    raw["experts"] = {n: str(folders / n) for n in ("a", "b")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    ended = evolver("run", tmp_path / "run.yaml", "--results", tmp_path / "results")
    assert ended.code == 0, ended.err
    folder = tmp_path / "results" / "toy"
    assert {r["status"] for r in rows(folder).values()} == {"ok"}
    assert loaded(LLAVA, folder / "best").keys() == loaded(LLAVA, folders / "base").keys()
    assert (folder / "best" / "preprocessor_config.json").exists()


def test_the_reverse_is_refused(folders, tmp_path):
    ended = merged(folders, tmp_path / "out", names=("base",), base="a")
    said = refusal(ended.code, ended.err)
    assert "is a llava model, which reads more than text" in said
    assert "give the llava model as the base" in said
    assert not (tmp_path / "out").exists()


def test_a_text_model_that_lacks_a_layer_is_refused(folders, tmp_path):
    shutil.copytree(folders / "base", tmp_path / "base")
    save_text(LLAVA.model(), tmp_path / "short", 3, num_hidden_layers=1)
    ended = merged(tmp_path, tmp_path / "out", names=("short",))
    assert "lacks the tensor" in refusal(ended.code, ended.err)


def test_only_text_models_of_the_same_family_are_parts():
    def part(text, own):
        return is_text_of({"model_type": own}, {"model_type": "whole", "text_config": {"model_type": text}})

    assert part("llama", "llama")
    assert part("qwen2_5_vl_text", "qwen2_5_vl") == part("qwen2_5_vl_text", "qwen2") == True  # noqa: E712
    assert not part("llama4_text", "llama")
    assert not part("llama", "mistral")
    assert not is_text_of({"model_type": "llama"}, {"model_type": "llama"})
