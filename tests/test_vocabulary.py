"""Merges of models whose vocabularies differ: every row is the right token's."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from evolver.commands.merge import merge_file
from evolver.config.model import TokenizerSettings
from evolver.errors import BadInput
from evolver.merging.mergekit.vocabulary import vocabulary

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Rows are constant: a model's number plus its token's place in hundredths.
TOKENS = {
    "base": ["<s>", "a", "b", "c"],
    "e1": ["<s>", "b", "a", "d"],
    "e2": ["<s>", "a", "e", "b", "d"],
}
TEMPLATES = {"base": None, "e1": "{{ messages }} one", "e2": "{{ messages }} one"}


def make(folder, name, number, tied, rows=None):
    tokens = TOKENS[name]
    inner = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<s>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    words = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>")
    words.chat_template = TEMPLATES[name]
    config = LlamaConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        vocab_size=rows or len(tokens), tie_word_embeddings=tied,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    for weights, sign in ((model.model.embed_tokens.weight, 1), (model.lm_head.weight, 1 if tied else -1)):
        places = torch.arange(weights.shape[0]) / 100
        weights.data = (sign * (number + places))[:, None].repeat(1, 8)
    model.save_pretrained(folder / name)
    words.save_pretrained(folder / name)


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def world(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    make(folder, "base", 1, request.param, rows=6)  # two rows of no token
    make(folder, "e1", 2, request.param)
    make(folder, "e2", 4, request.param)
    return folder, request.param


def merged(world, tmp_path, **more):
    """The merge of e1 and e2, half each: its rows by token, and the folder."""
    folder, tied = world
    entries = [{"model": str(folder / n), "parameters": {"weight": 0.5}} for n in ("e1", "e2")]
    config = {"merge_method": "task_arithmetic", "base_model": str(folder / "base"), "models": entries} | more
    file, out = tmp_path / "config.yml", tmp_path / "out"
    file.write_text(yaml.safe_dump(config).replace("FOLDER", str(folder)))
    merge_file(file, out)
    weights = load_file(out / "model.safetensors")
    ids = AutoTokenizer.from_pretrained(out).get_vocab()
    rows = {t: weights[EMBEDDING][i] for t, i in ids.items()}
    assert all(bool((row == row[0]).all()) for row in rows.values())
    assert json.loads((out / "config.json").read_text())["vocab_size"] == weights[EMBEDDING].shape[0]
    if not tied:
        torch.testing.assert_close(weights[HEAD], -weights[EMBEDDING])
    return {t: round(float(row[0]), 4) for t, row in rows.items()}, out


# With weights of one half, the merge is the mean of e1 and e2, whatever the base is.
# Both have <s>, a, b: e1 at places 0, 2, 1, and e2 at 0, 1, 3. c: the base's row, in both.
KNOWN = {"<s>": 3.0, "a": (2.02 + 4.01) / 2, "b": (2.01 + 4.03) / 2, "c": 1.03}
BOTH = {"d": (2.03 + 4.04) / 2}  # each has its own
ONE = {"e": 4.02}  # only e2 has it, so e1 gets its row


def test_base_keeps_the_base_tokens(world, tmp_path):
    rows, out = merged(world, tmp_path, tokenizer_source="base")
    assert rows == pytest.approx(KNOWN)
    assert load_file(out / "model.safetensors")[EMBEDDING].shape[0] == 4


def test_union_has_every_token_after_those_of_the_base(world, tmp_path):
    rows, out = merged(world, tmp_path, tokenizer_source="union")
    assert rows == pytest.approx(KNOWN | BOTH | ONE)
    assert AutoTokenizer.from_pretrained(out)("a d e b")["input_ids"] == [1, 4, 5, 2]


def test_a_model_can_be_the_source(world, tmp_path):
    rows, _ = merged(world, tmp_path, tokenizer_source="FOLDER/e2")
    assert rows == pytest.approx({t: v for t, v in (KNOWN | BOTH | ONE).items() if t in TOKENS["e2"]})


def test_tokens_can_be_configured(world, tmp_path):
    tokens = {
        "c": {"source": {"kind": "model_token", "model": "FOLDER/e2", "token": "e"}},
        "e": {"source": {"kind": "zero"}},
        "a": {"source": "FOLDER/base", "force": True},
        "d": {"source": {"kind": "model_token", "model": "FOLDER/e1", "token_id": 0}, "force": True},
    }
    rows, out = merged(world, tmp_path, tokenizer={"source": "union", "tokens": tokens, "pad_to_multiple_of": 8})
    # e1 and e2 get e's row for c, and e1 nothing for e; a and d are the same in all.
    assert rows == pytest.approx({**KNOWN, "c": 4.02, "e": 2.01, "a": 1.01, "d": 2.0})
    weights = load_file(out / "model.safetensors")[EMBEDDING]
    assert weights.shape[0] == 8
    # Rows of no token: the mean of the others, in each model and so in the merge.
    torch.testing.assert_close(weights[6:], weights[:6].mean(0).expand(2, -1))


def test_a_token_that_the_source_lacks_is_added_where_it_has_a_source(world, tmp_path):
    """As mergekit does: with the tokens of the base, and one of e2 under a new name."""
    tokens = {
        "e": {"source": "FOLDER/e2"},
        "f": {"source": {"kind": "model_token", "model": "FOLDER/e2", "token": "d"}},
    }
    rows, out = merged(world, tmp_path, tokenizer={"source": "base", "tokens": tokens})
    assert rows == pytest.approx(KNOWN | ONE | {"f": 4.04})
    assert AutoTokenizer.from_pretrained(out)("a f e")["input_ids"] == [1, 5, 4]


def test_several_donors_give_their_mean(tmp_path):
    """The base lacks x; e1 and e2 have it at different places; e3 lacks it, and gets their mean."""
    known = {"base": {"a": 0}, "e1": {"a": 0, "x": 1}, "e2": {"x": 0, "a": 1}, "e3": {"a": 0}}
    target = vocabulary(TokenizerSettings(), known, "base", "file")
    assert target.ids == {"a": 0, "x": 1}
    assert target.others[1] == (("e1", 1), ("e2", 0))
    assert {m: rows.tolist() for m, rows in target.own.items()} == {
        "base": [0, -1], "e1": [0, 1], "e2": [1, 0], "e3": [0, -1],
    }  # fmt: skip


@pytest.mark.whole
def test_the_merge_loads_in_a_new_process(world, tmp_path):
    _, out = merged(world, tmp_path, tokenizer_source="union")
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as M, AutoTokenizer as T;"
        "m, t = M.from_pretrained(sys.argv[1]), T.from_pretrained(sys.argv[1]);"
        "assert len(t) == m.config.vocab_size == 6; print(m(torch.tensor([t('a d e')['input_ids']])).logits.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(out)], capture_output=True, text=True, check=True)
    assert "[1, 3, 6]" in done.stdout
    assert AutoModelForCausalLM.from_pretrained(out).get_input_embeddings().weight.shape[0] == 6


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({}, "differs from that of the base"),
        ({"tokenizer_source": "FOLDER/e3"}, "is not a model of this merge"),
        ({"tokenizer": {"source": "base", "tokens": {"q": {}}}}, "'q' is not in the merged model's vocabulary"),
        ({"tokenizer": {"source": "base", "tokens": {"c": {"source": "FOLDER/e3"}}}}, "is not a model of this merge"),
        ({"tokenizer": {"source": "base", "tokens": {"c": {"source": "FOLDER/e1"}}}}, "has no token 'c'"),
        ({"tokenizer_source": "base", "chat_template": "llama"}, "chat_template: 'llama' is not usable"),
    ],
)
def test_what_does_not_fit_is_refused(more, says, world, tmp_path):
    with pytest.raises(BadInput, match=says):
        merged(world, tmp_path, **more)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_fast_tokenizer_is_refused(world, tmp_path):
    import shutil

    folder, tied = world
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "e1" / "tokenizer.json").unlink()
    with pytest.raises(BadInput, match=r"has no tokenizer\.json"):
        merged((tmp_path / "copy", tied), tmp_path, tokenizer_source="union")


@pytest.mark.parametrize(
    ("wanted", "found"),
    [("auto", "{{ messages }} one"), ("{% for m in messages %}x{% endfor %}", "{% for m in messages %}x{% endfor %}")],
)
def test_the_chat_template(wanted, found, world, tmp_path):
    _, out = merged(world, tmp_path, tokenizer_source="base", chat_template=wanted)
    assert AutoTokenizer.from_pretrained(out).chat_template == found


def test_named_chat_templates(world, tmp_path):
    _, out = merged(world, tmp_path, tokenizer_source="base", chat_template="chatml")
    talk = [{"role": "user", "content": "hi"}]
    said = AutoTokenizer.from_pretrained(out).apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert said == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
