"""The situations that mergekit's own tests stand for, made again with small models: 43, of which two are refused.

That the numbers of every method are mergekit's is held by tests/oracles; here every file runs unchanged, and what it
writes is loaded by the model's own class.
"""

from __future__ import annotations

import itertools
import json

import pytest
import tokenizers
import torch
import toys
import transformers
import yaml
from safetensors.torch import load_file

pytestmark = pytest.mark.whole

NAMES = ("a", "b", "c")
# Weights that half of the methods do not use.
PAIR = (("a", 0.6), ("b", 0.4))


def llama(rows=64):
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=rows, hidden_size=32, intermediate_size=48, num_attention_heads=4, num_hidden_layers=2,
        )
    )  # fmt: skip


def granite():
    return transformers.GraniteForCausalLM(
        transformers.GraniteConfig(
            vocab_size=64, hidden_size=32, intermediate_size=48, num_attention_heads=2, num_key_value_heads=2,
            num_hidden_layers=2,
        )
    )  # fmt: skip


def gpt2():
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            n_embd=32, n_head=2, n_layer=2, n_positions=32, vocab_size=64, bos_token_id=0, eos_token_id=1
        )
    )


def llava():
    vision = transformers.CLIPVisionConfig(
        image_size=16, patch_size=4, num_hidden_layers=2, num_attention_heads=2, hidden_size=32, intermediate_size=48
    )
    config = transformers.LlavaConfig(vision_config=vision, text_config=llama().config, image_seq_length=16)
    return transformers.LlavaForConditionalGeneration(config)


FAMILIES = {"llama": llama, "granite": granite, "gpt2": gpt2, "llava": llava}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Three unrelated models of every family: a method has to do without a common origin, as in mergekit's tests."""
    folder = tmp_path_factory.mktemp("world")
    for family, make in FAMILIES.items():
        for seed, name in enumerate(NAMES):
            torch.manual_seed(seed)
            make().save_pretrained(folder / family / name)
    return folder


def two(method, base=None, **parameters):
    """The file of a merge of two models with weights, whatever the method makes of them."""
    models = [{"model": n, "parameters": {"weight": w}} for n, w in PAIR]
    out = {"merge_method": method, "models": models, "dtype": "bfloat16", "parameters": parameters}
    return out | ({"base_model": base} if base else {})


def stock(**parameters):
    models = [{"model": n, "parameters": {"weight": w}} for n, w in (("b", 0.6), ("c", 0.4))]
    return two("model_stock", "a", **parameters) | {"models": models}


def nuslerp():
    """Every way to cut a tensor into vectors, with and without a base, and weights that cancel."""
    for base, row_wise, flatten in itertools.product((None, "c"), (False, True), (False, True)):
        yield two("nuslerp", base, nuslerp_row_wise=row_wise, nuslerp_flatten=flatten)
    models = [{"model": n, "parameters": {"weight": w}} for n, w in (("a", -0.5), ("b", 0.5))]
    yield two("nuslerp", "c", nuslerp_flatten=False) | {"models": models}


def copied(name):
    return {"merge_method": "passthrough", "models": [{"model": name}], "dtype": "bfloat16"}


SLICE = {"sources": [{"model": "a", "layer_range": [0, 2]}]}
SCALE = [{"filter": "o_proj", "value": 0}, {"value": 1}]
LLAMA = {
    "scale": [{"merge_method": "passthrough", "models": [{"model": "a", "parameters": {"scale": SCALE}}]}],
    "linear": [two("linear")],
    "slerp": [two("slerp", "a", t=0.35)],
    "nuslerp": list(nuslerp()),
    "task arithmetic": [two("task_arithmetic", "c")],
    "breadcrumbs": [two("breadcrumbs", "c")],
    "ties": [two("ties", "c", density=0.3)],
    "sce": [two("sce", "c", select_topk=0.5)],
    "ram": [two("ram", "c")],
    "ramplus": [two("ramplus_tl", "c", r=0.05, alpha=1.0)],
    "multislerp": [two("multislerp", "c")],
    "dare ties": [two("dare_ties", "c", density=0.66)],
    "stock": [stock()],
    "stock by rows": [stock(filter_wise=True)],
    "fusion": [two("arcee_fusion", "a")],
    "nearswap": [two("nearswap", "a", t=0.0001)],
    "della": [two("della", "c", density=0.66, epsilon=0.05, **{"lambda": 0.5})],
    "karcher": [two("karcher", "c", max_iter=5, tol=1e-5)],
}
OF_LLAVA = (
    "linear",
    "slerp",
    "nuslerp",
    "task arithmetic",
    "breadcrumbs",
    "ties",
    "dare ties",
    "stock",
    "stock by rows",
)
SITUATIONS = {
    ("granite", "copy"): [copied("a")],
    ("granite", "linear"): [two("linear")],
    ("granite", "slerp"): [two("slerp", "a", t=0.5) | {"models": [{"model": "a"}, {"model": "b"}]}],
    ("gpt2", "copy"): [copied("a")],
    ("gpt2", "stack"): [{"merge_method": "passthrough", "slices": [SLICE, SLICE], "dtype": "bfloat16"}],
    **{("llama", name): files for name, files in LLAMA.items()},
    **{("llava", name): LLAMA[name] for name in OF_LLAVA},
}


def located(raw, folder):
    """The file with folders instead of names."""
    if isinstance(raw, dict):
        return {
            k: str(folder / v) if k in ("model", "base_model") and isinstance(v, str) else located(v, folder)
            for k, v in raw.items()
        }
    return [located(r, folder) for r in raw] if isinstance(raw, list) else raw


def merge(raw, folder, out):
    file = out.with_suffix(".yml")
    file.write_text(yaml.safe_dump(located(raw, folder)))
    return toys.evolver("merge", file, out)


def loaded(kind, folder):
    """The model, which lacks nothing and has nothing too much."""
    model, notes = type(kind).from_pretrained(folder, output_loading_info=True)
    assert {k: v for k, v in notes.items() if v} == {}
    assert all(bool(t.isfinite().all()) for t in model.state_dict().values())
    return model


@pytest.mark.parametrize(("family", "name"), SITUATIONS)
def test_a_file_runs_unchanged_and_its_model_loads(family, name, world, tmp_path):
    kind = FAMILIES[family]()
    for number, raw in enumerate(SITUATIONS[family, name]):
        out = tmp_path / str(number)
        ended = merge(raw, world / family, out)
        assert ended.code == 0, ended.err
        unused = raw["merge_method"] in {"slerp", "sce", "ram", "ramplus_tl", "model_stock", "arcee_fusion", "nearswap", "karcher"}  # fmt: skip  # noqa: E501
        weighed = any("parameters" in m for m in raw.get("models", []))
        assert ("does not use this parameter" in ended.err) is (unused and weighed)
        model = loaded(kind, out)
        if name == "stack":
            assert model.config.n_layer == 4
        if name == "scale":
            projections = [t for n, t in model.state_dict().items() if "o_proj" in n]
            assert len(projections) == 2
            assert not any(bool(t.any()) for t in projections)
            assert bool(model.lm_head.weight.any())


@pytest.mark.parametrize("family", ["llama", "llava"])
def test_the_numbers_of_the_plainest_ones(family, world, tmp_path):
    """Against the formulas, in float64; the methods themselves are compared with mergekit's numbers elsewhere."""
    a, b, c = (load_file(world / family / n / "model.safetensors") for n in NAMES)
    wanted = {
        "linear": lambda n: 0.6 * a[n].double() + 0.4 * b[n].double(),
        "task_arithmetic": lambda n: 0.6 * a[n].double() + 0.4 * b[n].double(),  # the weights sum to one
    }
    for method, formula in wanted.items():
        raw = two(method, None if method == "linear" else "c") | {"dtype": "float32"}
        assert merge(raw, world / family, tmp_path / method).code == 0
        found = load_file(tmp_path / method / "model.safetensors")
        assert set(found) == set(c)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor.double(), formula(name), rtol=1e-6, atol=1e-7)


def test_an_epsilon_without_room_is_refused(world, tmp_path):
    raw = two("della", "c", density=0.66, epsilon=1.35, **{"lambda": 0.5})
    ended = merge(raw, world / "llama", tmp_path / "out")
    assert "epsilon" in toys.refusal(ended.code, ended.err)
    assert not (tmp_path / "out").exists()


# Tokens


def words(*added):
    tokens = ["<unk>", "<s>", "</s>", *(f"_tok_{n}" for n in range(3, 64))]
    model = {"type": "BPE", "vocab": {t: i for i, t in enumerate(tokens)}, "merges": []}
    inner = tokenizers.Tokenizer.from_str(json.dumps({"version": "1.0", "model": model, "added_tokens": []}))
    out = transformers.PreTrainedTokenizerFast(tokenizer_object=inner)
    out.add_tokens(list(added))
    return out


@pytest.fixture(scope="module")
def spoken(tmp_path_factory):
    """A base, a model with two more tokens, and one whose tokenizer knows tokens that have no row."""
    folder = tmp_path_factory.mktemp("spoken")
    chatml, unused = ("<|im_start|>", "<|im_end|>"), tuple(f"<UNUSED_{n}>" for n in range(4))
    for seed, (name, added, rows) in enumerate((("base", (), 64), ("chatml", chatml, 66), ("padded", unused, 64))):
        torch.manual_seed(seed)
        llama(rows).save_pretrained(folder / name)
        words(*added).save_pretrained(folder / name)
    return folder


def spoken_merge(spoken, out, names, method="linear", base="base", **more):
    models = [{"model": n, "parameters": {"weight": 1.0}} for n in names]
    ended = merge(
        {"merge_method": method, "base_model": base, "models": models, "dtype": "float32", **more}, spoken, out
    )
    if ended.code:
        return ended
    vocabulary = transformers.AutoTokenizer.from_pretrained(out).get_vocab()
    return vocabulary, loaded(llama(), out).model.embed_tokens.weight


def rows_of(folder):
    return load_file(folder / "model.safetensors")["model.embed_tokens.weight"]


ALL = ("base", "padded", "chatml")


def test_vocabularies_that_differ_are_refused_without_a_word_on_tokens(spoken, tmp_path):
    """mergekit 0.1.5 refuses this, too; before, it cut the matrices to the smallest."""
    ended = spoken_merge(spoken, tmp_path / "out", ALL)
    assert "or say tokenizer_source in a mergekit file" in toys.refusal(ended.code, ended.err)


@pytest.mark.parametrize(("source", "size"), [("base", 64), ("union", 66), ("chatml", 66)])
def test_the_source_of_the_tokens(source, size, spoken, tmp_path):
    wanted = str(spoken / source) if source == "chatml" else source
    vocabulary, rows = spoken_merge(spoken, tmp_path / "out", ALL, tokenizer_source=wanted)
    assert (len(vocabulary), len(rows)) == (size, size)
    assert not any("UNUSED" in t for t in vocabulary)
    for place, token in ((64, "<|im_start|>"), (65, "<|im_end|>")):
        if size == 66:
            torch.testing.assert_close(rows[vocabulary[token]], rows_of(spoken / "chatml")[place])


def test_slerp_over_the_union(spoken, tmp_path):
    more = {"tokenizer_source": "union", "parameters": {"t": 0.5}}
    vocabulary, rows = spoken_merge(spoken, tmp_path / "out", ("base", "chatml"), "slerp", **more)
    assert {"<|im_start|>", "<|im_end|>"} <= vocabulary.keys()
    assert len(rows) == 66


def test_tokens_that_are_forced(spoken, tmp_path):
    tokens = {
        "_tok_10": {"source": str(spoken / "chatml"), "force": True},
        "_tok_11": {"source": str(spoken / "base"), "force": True},
    }
    more = {"tokenizer": {"source": "union", "tokens": tokens}}
    vocabulary, rows = spoken_merge(spoken, tmp_path / "out", ("base", "chatml"), **more)
    assert len(vocabulary) == 66
    torch.testing.assert_close(rows[10], rows_of(spoken / "chatml")[10])
    torch.testing.assert_close(rows[11], rows_of(spoken / "base")[11])


def test_tokens_that_get_the_row_of_another_one(spoken, tmp_path):
    by_id = {"kind": "model_token", "model": str(spoken / "chatml"), "token_id": 64}
    by_name = {"kind": "model_token", "model": str(spoken / "base"), "token": "<s>"}
    tokens = {"_tok_20": {"source": by_id, "force": True}, "_tok_21": {"source": by_name, "force": True}}
    more = {"tokenizer": {"source": "base", "tokens": tokens}}
    vocabulary, rows = spoken_merge(spoken, tmp_path / "out", ("base", "chatml"), **more)
    assert len(vocabulary) == 64
    torch.testing.assert_close(rows[20], rows_of(spoken / "chatml")[64])
    torch.testing.assert_close(rows[21], rows_of(spoken / "base")[1])


def test_a_padded_vocabulary(spoken, tmp_path):
    more = {"base": "chatml", "tokenizer": {"source": "base", "pad_to_multiple_of": 16}}
    vocabulary, rows = spoken_merge(spoken, tmp_path / "out", ("chatml",), **more)
    assert (len(vocabulary), len(rows)) == (66, 80)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["vocab_size"] == 80
    torch.testing.assert_close(rows[66:], rows[:66].mean(0).expand(14, -1))


@pytest.mark.parametrize("template", ["chatml", "{{messages[0]['content']}}"])
def test_a_chat_template(template, spoken, tmp_path):
    models = [{"model": "base", "parameters": {"weight": 0.5}}, {"model": "plain", "parameters": {"weight": 0.5}}]
    torch.manual_seed(9)
    llama().save_pretrained(spoken / "plain")  # it has no tokenizer
    raw = {"merge_method": "linear", "base_model": "base", "models": models, "chat_template": template}
    assert merge(raw, spoken, tmp_path / "out").code == 0
    found = transformers.AutoTokenizer.from_pretrained(tmp_path / "out").chat_template
    assert ("<|im_start|>" if template == "chatml" else template) in found
