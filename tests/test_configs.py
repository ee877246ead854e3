"""The configurations in configs/examples: their own commands, typed on tiny models in the place of the named ones."""

from __future__ import annotations

import random
import re
import shutil

import pytest
import torch
import toys
import yaml
from safetensors.torch import load_file, save_file
from toys import texts
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForPreTraining,
    BertForSequenceClassification,
    MistralConfig,
    MistralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

pytestmark = pytest.mark.whole

EXAMPLES = toys.ROOT / "configs" / "examples"
SPACES = {"mood": ("sad", "calm", "happy"), "topic": ("sports", "politics")}
SIZES = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": toys.LENGTH, "initializer_range": 0.2, "pad_token_id": 2,
}  # fmt: skip
LANGUAGE = {"num_key_value_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False}
TEMPLATE = "{% for m in messages %}<|MARK|>{{ m['content'] }}{{ eos_token }}{% endfor %}<|MARK|>"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def fine_tune(model, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model


def save(model, words, folder, template=None):
    words.chat_template = template
    for part in (model, words):
        part.save_pretrained(folder)


def example(name, folder, changes):
    """The example with local models and small numbers, and its commands as it says that they are typed."""
    text = (EXAMPLES / f"{name}.yaml").read_text()
    raw = yaml.safe_load(text)
    assert raw["experts"].keys() == changes["experts"].keys()
    raw["model"]["base"] = str(folder / "base")
    raw["experts"] = changes["experts"]
    raw["budget"] = {"candidates": 3}
    raw["evaluation"]["include_path"] = changes.get("include_path")
    assert len(raw["evaluation"]["tasks"]) == len(changes["tasks"])
    for entry, own in zip(raw["evaluation"]["tasks"], changes["tasks"], strict=True):
        entry.update({"dev": 12, "report": 8, **own})
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    return file, commands_in(name, text, file)


def commands_in(name, text, file):
    """The commands in an example's comments, with another file in its place."""
    typed = re.findall(r"^#   \.venv/bin/evolver (.+?)(?: +# .*)?$", text, re.MULTILINE)
    path = f"configs/examples/{name}.yaml"
    assert all(path in line or line.startswith("export ") for line in typed)
    return [line.replace(path, str(file)).split() for line in typed]


def type_all(commands, folder):
    """Type the commands; returns what they printed."""
    out = []
    for command in commands:
        ended = toys.evolver(*command, cwd=folder)
        assert ended.code == 0, f"{command}\n{ended.out}\n{ended.err}"
        out.append(ended.out)
    return out


def loaded(kind, folder):
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model


def published_bert(folder):
    """BERT as its hub holds it: with pretraining heads, and the oldest names of norms."""
    config = BertConfig(vocab_size=len(toys.tokenizer()), **SIZES)
    torch.manual_seed(0)
    model = BertForPreTraining(config)
    save(model, toys.tokenizer(), folder)
    names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    tensors = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        new = next((n for n in names if name.endswith(n)), "")
        tensors[name.removesuffix(new) + names.get(new, "")] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return model


def test_classifiers_on_a_published_bert(tmp_path):
    base, tasks = published_bert(tmp_path / "base"), []
    for seed, (name, labels) in enumerate(SPACES.items(), 1):
        ids = {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}
        model = BertForSequenceClassification(BertConfig(**{**base.config.to_dict(), **ids}))
        model.bert.load_state_dict(base.bert.state_dict())
        save(fine_tune(model, seed), toys.tokenizer(), tmp_path / name)
        draw = random.Random(name)
        lines = [{"text": t, "label": draw.choice(labels)} for t in texts()]
        tasks.append({"data": toys.write_rows(tmp_path / f"{name}.jsonl", lines)})
    changes = {"experts": {n: str(tmp_path / n) for n in SPACES}, "tasks": tasks}
    _, commands = example("classifiers", tmp_path, changes)
    assert [c[0] for c in commands] == ["validate", "run", "export"]
    said = type_all(commands, tmp_path)[-1]
    assert "gives the answers in the ledger on 24 of 24 dev items" in said
    for name, labels in SPACES.items():
        model = loaded(AutoModelForSequenceClassification, tmp_path / "merged-classifiers" / name)
        assert tuple(model.config.id2label.values()) == labels
        AutoTokenizer.from_pretrained(tmp_path / "merged-classifiers" / name)
        expert = AutoModelForSequenceClassification.from_pretrained(tmp_path / name)
        assert torch.equal(model.classifier.weight, expert.classifier.weight)
        assert not torch.equal(model.bert.pooler.dense.weight, expert.bert.pooler.dense.weight)


def test_fine_tunes_of_a_mixture_of_experts(tmp_path, tasks):
    names = ("base", "instruct", "thinking", "coder")
    config = Qwen3MoeConfig(
        vocab_size=len(toys.tokenizer()), num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8,
        **SIZES, **LANGUAGE,
    )  # fmt: skip
    for seed, name in enumerate(names):
        torch.manual_seed(0)
        template = TEMPLATE.replace("MARK", name)
        save(fine_tune(Qwen3MoeForCausalLM(config), seed), toys.tokenizer(), tmp_path / name, template)
    small = [{"task": "toy"}, {"task": "pair"}]
    changes = {"experts": {n: str(tmp_path / n) for n in names[1:]}, "tasks": small, "include_path": str(tasks)}
    _, commands = example("qwen3-moe", tmp_path, changes)
    said = type_all(commands, tmp_path)[-1]
    assert "gives the answers in the ledger on 24 of 24 dev items" in said
    merged = tmp_path / "merged-moe"
    assert load_file(merged / "model.safetensors").keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in load_file(merged / "model.safetensors")
    loaded(AutoModelForCausalLM, merged)
    assert "<|instruct|>" in AutoTokenizer.from_pretrained(merged).chat_template


def test_instruct_experts_on_a_bare_base(tmp_path, tasks):
    words = toys.tokenizer()
    config = MistralConfig(vocab_size=len(words), head_dim=8, **SIZES, **LANGUAGE)
    for seed, name in enumerate(("base", "zephyr", "hermes")):
        torch.manual_seed(0)
        model, words = fine_tune(MistralForCausalLM(config), seed), toys.tokenizer()
        if name == "hermes":
            words.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
            model.resize_token_embeddings(len(words))
            model.generation_config.eos_token_id = [1, words.convert_tokens_to_ids("<|im_end|>")]
        template = {"base": None, "zephyr": TEMPLATE.replace("MARK", "user"), "hermes": CHATML}[name]
        save(model, words, tmp_path / name, template)
    small = [{"task": "toy"}, {"task": "free", "metric": "exact_match"}]
    experts = {n: str(tmp_path / n) for n in ("zephyr", "hermes")}
    file, commands = example(
        "instruct", tmp_path, {"experts": experts, "tasks": small, "include_path": str(tasks)}
    )  # fmt: skip
    assert [c[0] for c in commands] == ["validate", "explain", "run", "export"]
    _, prompts, _, said = type_all(commands, tmp_path)
    assert "<|im_start|>" in prompts
    assert "gives the answers in the ledger on 24 of 24 dev items" in said
    merged = tmp_path / "merged-instruct"
    model, words = loaded(AutoModelForCausalLM, merged), AutoTokenizer.from_pretrained(merged)
    stop = words.convert_tokens_to_ids("<|im_end|>")
    assert model.get_input_embeddings().weight.shape[0] == len(words) == len(toys.tokenizer()) + 2
    assert stop in model.generation_config.eos_token_id
    talk = words.apply_chat_template([{"role": "user", "content": "red"}], tokenize=False, add_generation_prompt=True)
    assert talk == "<|im_start|>user\nred<|im_end|>\n<|im_start|>assistant\n"
    # Without the choice of a template it is refused, since the two contradict each other.
    raw = yaml.safe_load(file.read_text())
    del raw["model"]["chat_template"]
    file.write_text(yaml.safe_dump(raw))
    ended = toys.evolver("validate", file, cwd=tmp_path)
    assert "model.chat_template" in toys.refusal(ended.code, ended.err)


def test_safety_as_a_constraint_and_as_an_objective(tmp_path, models, tasks):
    experts = {"helpful": "a", "honest": "b", "harmless": "c"}
    (tmp_path / "tasks").mkdir()
    for name in experts:
        task = yaml.safe_load((tasks / "toy.yaml").read_text())
        (tmp_path / "tasks" / f"{name}.yaml").write_text(yaml.safe_dump({**task, "task": name}))
    (tmp_path / "base").symlink_to(models / "base")
    changes = {
        "experts": {name: str(models / model) for name, model in experts.items()},
        "tasks": [{}, {}, {}], "include_path": str(tmp_path / "tasks"),
    }  # fmt: skip
    _, commands = example("safety", tmp_path, changes)
    assert [c[0] for c in commands] == ["validate", "run", "export", "export"]
    said = type_all(commands, tmp_path)[-1]
    assert "is the best on the front for these weights" in said
    loaded(AutoModelForCausalLM, tmp_path / "careful")
    text = (tmp_path / "results" / "safety" / "report.md").read_text()
    assert "## Constraints" in text
    assert "| model | useful | harmless | useful against " in text


def test_a_mergekit_file_with_free_numbers(tmp_path, models, tasks):
    """The models' places stand in the file of the search, and the experts follow from them."""
    text, template = (EXAMPLES / "recipe.yaml").read_text(), TEMPLATE.replace("MARK", "user")
    for place, own in {
        "mistralai/Mistral-7B-v0.1": "base", "HuggingFaceH4/zephyr-7b-beta": "a",
        "teknium/OpenHermes-2.5-Mistral-7B": "OpenHermes-2.5-Mistral-7B",
    }.items():  # fmt: skip
        text = text.replace(place, str(tmp_path / own))
    for source, own in {"base": "base", "a": "a", "b": "OpenHermes-2.5-Mistral-7B"}.items():
        shutil.copytree(models / source, tmp_path / own)
        if source != "base":
            words = AutoTokenizer.from_pretrained(tmp_path / own)
            words.chat_template = template
            words.save_pretrained(tmp_path / own)
    raw = yaml.safe_load(text)
    raw["budget"] = {"candidates": 3}
    raw["evaluation"] = {"include_path": str(tasks), "tasks": [{"task": "toy", "dev": 12, "report": 8}]}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(raw, sort_keys=False))
    commands = commands_in("recipe", text, file)
    assert [c[0] for c in commands] == ["validate", "explain", "run", "export"]
    validated, explained, _, said = type_all(commands, tmp_path)
    free = "searched: models.OpenHermes-2.5-Mistral-7B.weight[1]: 0 to 1"
    assert free in validated
    assert free in explained
    assert "gives the answers in the ledger on 12 of 12 dev items" in said
    type_all([["merge", str(tmp_path / "merged-recipe" / "recipe.yaml"), "again"]], tmp_path)
    one, two = (tmp_path / folder / "model.safetensors" for folder in ("merged-recipe", "again"))
    assert one.read_bytes() == two.read_bytes()


def test_every_example_is_linked_and_typed():
    """The pages that a newcomer reads name each of them, and a test above runs it."""
    names = {p.name for p in EXAMPLES.glob("*.yaml")}
    assert names == {"classifiers.yaml", "qwen3-moe.yaml", "instruct.yaml", "safety.yaml", "recipe.yaml"}
    for page in ("README.md", "docs/merging.md"):
        text = (toys.ROOT / page).read_text()
        assert {n for n in names if f"configs/examples/{n}" not in text} == set(), page
