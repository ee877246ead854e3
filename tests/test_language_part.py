"""Text experts of a model that also reads images: its language part is merged, the rest stays as it is."""

from __future__ import annotations

import json
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
from evolver.commands.evaluate import score_models

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


NEW, HEAD = " stone", "lm_head.weight"


@pytest.fixture(scope="module")
def worded(folders, tmp_path_factory):
    """The same, with a Llama ``more`` that has a token which the base lacks, and a base ``wide`` that has a token for
    images, which the Llamas lack, and spare rows.
    """
    folder = tmp_path_factory.mktemp("worded")
    for name in ("base", "a"):
        shutil.copytree(folders / name, folder / name)
    model = transformers.AutoModelForCausalLM.from_pretrained(folders / "b")
    words = toys.tokenizer()
    words.add_tokens([NEW])
    torch.manual_seed(7)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    for part in (model, words):
        part.save_pretrained(folder / "more")
    wide, words = transformers.LlavaForConditionalGeneration.from_pretrained(folder / "base"), toys.tokenizer()
    words.add_tokens(["<image>"], special_tokens=True)
    torch.manual_seed(8)
    wide.resize_token_embeddings(len(words) + 8, mean_resizing=False)
    wide.config.image_token_index = wide.config.image_token_id = words.convert_tokens_to_ids("<image>")
    for part in (wide, *LLAVA.beside()[1:], words):
        part.save_pretrained(folder / "wide")
    return folder


def with_new_row(folder, size):
    """What the language part of a merge of ``a`` and ``more`` is, at half weight each, by hand in float64."""
    texts = [load_file(folder / n / "model.safetensors") for n in ("a", "more")]
    out = {}
    for name, base in loaded(LLAVA, folder / "base").items():
        if not name.startswith(INSIDE) and name != "lm_head.weight":
            out[name] = base
            continue
        own = [t[name.replace(INSIDE, "model.")].double() for t in texts]
        out[name] = sum(t[: len(base)] for t in own) / 2
        if base.shape[0] == size - 1:  # a and the base lack the token, and get the row of the one that has it
            out[name] = torch.cat([out[name], own[1][-1:]])
    return out


def merge_union(worded, base, tmp_path):
    """Merge two text experts on a base with the union of all tokens into ``tmp_path / "out"``."""
    models = [{"model": str(worded / n), "parameters": {"weight": 0.5}} for n in ("a", "more")]
    raw = {
        "merge_method": "task_arithmetic", "base_model": str(worded / base), "models": models, "dtype": "float32",
        "tokenizer_source": "union",
    }  # fmt: skip
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(raw))
    ended = evolver("merge", tmp_path / "merge.yml", tmp_path / "out")
    assert ended.code == 0, ended.err


def test_a_text_expert_with_a_token_more(worded, tmp_path):
    merge_union(worded, "base", tmp_path)
    made, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert words.encode("a stone")[-1] == len(words) - 1
    assert made.config.text_config.vocab_size == len(words) == made.get_input_embeddings().weight.shape[0]
    assert made.config.image_token_index == LLAVA.model().config.image_token_index
    expected = with_new_row(worded, len(words))
    assert made.state_dict().keys() == expected.keys()
    for name, tensor in made.state_dict().items():
        assert torch.allclose(tensor.double(), expected[name].double(), atol=1e-6), name
    assert (tmp_path / "out" / "preprocessor_config.json").exists()


@pytest.mark.parametrize("base", ["base", "wide"])
def test_a_search_over_a_text_expert_with_a_token_more(worded, tasks, tmp_path, base):
    entries = [
        {"task": "toy", "metric": "acc", "dev": 8, "report": 8},
        {"task": "roll", "metric": "bits_per_byte", "dev": 4, "report": 4},
    ]
    changes = {"search": {"algorithm": "tpe"}, "model.compute": "float32", "evaluation.tasks": entries}
    raw = toys.settings(worded, tasks, {**toys.SHORT, **changes})
    raw["model"]["base"] = str(worded / base)
    raw["experts"] = {n: str(worded / n) for n in ("a", "more")}
    (file := tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    run = toys.run_here(file, tmp_path / "results")
    assert not [r["reason"] for r in rows(run).values() if r["status"] != "ok"]
    assert json.loads((run / "best.json").read_text())["equal"] >= 8  # of 12; the others show the last digits
    recorded = json.loads((run / "summary.json").read_text())["report"]
    alone = score_models(str(file), [str(worded / n) for n in (base, "a", "more")], "report", lambda _: None)
    assert [recorded[n] for n in ("base", "a", "more")] == pytest.approx([m.score for m in alone], rel=1e-6)
    assert len({m.score for m in alone}) == 3
    made = transformers.LlavaForConditionalGeneration.from_pretrained(run / "best")
    assert made.config.text_config.vocab_size == made.lm_head.weight.shape[0]
    assert made.lm_head.weight.shape[0] == len(toys.tokenizer()) + (1 if base == "base" else 2)
    own = loaded(LLAVA, worded / base)
    beside = {n: t for n, t in made.state_dict().items() if not n.startswith(INSIDE) and n != "lm_head.weight"}
    assert beside
    assert all(torch.equal(t, own[n]) for n, t in beside.items())


def test_a_base_that_has_a_token_for_images_and_spare_rows(worded, tmp_path):
    """As published ones: the text models have neither, and a new token of theirs has the number of that for images."""
    base = transformers.LlavaForConditionalGeneration.from_pretrained(worded / "wide")
    words = transformers.AutoTokenizer.from_pretrained(worded / "wide")
    merge_union(worded, "wide", tmp_path)
    made = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    image, new = (found.convert_tokens_to_ids(t) for t in ("<image>", NEW))
    assert (image, new) == (len(words) - 1, len(words))
    assert made.config.image_token_index == image
    texts = [load_file(worded / n / "model.safetensors") for n in ("a", "more")]
    for ours, own in ((made.get_input_embeddings().weight, "model.embed_tokens.weight"), (made.lm_head.weight, HEAD)):
        before = (base.get_input_embeddings() if own != HEAD else base.lm_head).weight
        assert len(ours) == new + 1
        assert torch.equal(ours[image], before[image])
        assert torch.allclose(ours[new], texts[1][own][-1], atol=1e-6)
        assert torch.allclose(ours[:image], (texts[0][own] + texts[1][own][:image]) / 2, atol=1e-6)


def test_the_token_of_images_is_not_lost(worded, tmp_path):
    """The merged model would read an image where another word stands."""
    words, image = toys.tokenizer(), LLAVA.model().config.image_token_index
    raw = json.loads((worded / "more" / "tokenizer.json").read_text())
    vocabulary = raw["model"]["vocab"]
    lost = next(t for t, n in vocabulary.items() if n == image)
    assert lost in words.get_vocab()
    shutil.copytree(worded / "more", tmp_path / "other")
    vocabulary["<|another|>"] = vocabulary.pop(lost)
    raw["model"]["merges"] = [m for m in raw["model"]["merges"] if lost not in m]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(raw))
    models = [{"model": str(tmp_path / "other"), "parameters": {"weight": 0.5}}]
    merge = {
        "merge_method": "task_arithmetic", "base_model": str(worded / "base"), "models": models,
        "tokenizer_source": str(tmp_path / "other"),
    }  # fmt: skip
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(merge))
    ended = evolver("merge", tmp_path / "merge.yml", tmp_path / "out")
    said = refusal(ended.code, ended.err)
    assert f"would lack the token {lost!r}" in said
    assert "image_token_index" in said
    assert not (tmp_path / "out").exists()
