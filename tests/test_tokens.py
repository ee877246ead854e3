"""A search over models whose tokens differ: merges have common tokens, base and experts are scored with their own."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import toys
from toys import refused

from evolver.checkpoints.sources import open_base, open_expert
from evolver.checkpoints.weights import TensorInfo
from evolver.config.model import TokenizerSettings
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.merging.mergekit.vocabulary import check_named_tokens, vocabulary, with_vocabulary
from evolver.workers.vocabulary import with_common_tokens

pytestmark = pytest.mark.whole

NEW = " stone"  # words of the tasks' texts, which the expert b has as one token each
BOTH = [" stone", " tree"]
ROLL = {"task": "roll", "metric": "bits_per_byte", "dev": 4, "report": 4}
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def worded(models, tmp_path_factory):
    """The toys, of which b has one token more, c two, and roomy one in spare rows."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path_factory.mktemp("worded")
    for name in ("base", "a"):
        shutil.copytree(models / name, folder / name)
    for name, source, words, rows in (("b", "b", [NEW], 0), ("c", "c", BOTH, 0), ("roomy", "b", [NEW], 40),
                                      ("moved", "b", BOTH[::-1], 0)):  # fmt: skip
        tokenizer = AutoTokenizer.from_pretrained(models / source)
        model = AutoModelForCausalLM.from_pretrained(models / source)
        tokenizer.add_tokens(words)
        torch.manual_seed(len(name))
        model.resize_token_embeddings(len(tokenizer) + rows, mean_resizing=False)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def searching(make_config, worded):
    def make(folder, experts=("a", "b", "c"), **changes):
        places = {"model.base": str(worded / "base"), "experts": {n: str(worded / n) for n in experts}}
        given = {k.replace("__", "."): v for k, v in changes.items()}
        return make_config(folder, {**places, **toys.SHORT, **given})

    return make


@pytest.fixture
def opened(worded):
    def make(*names):
        base = open_base(str(worded / "base"))
        return base, {n: open_expert(str(worded / n), base, f"experts.{n}", same_tokens=False) for n in names}

    return make


def row(source, tokens, token):
    return source.tensor(EMBEDDING)[tokens[token]]


def test_every_row_is_that_of_its_token(opened):
    base, experts = opened("a", "b", "c")
    found = with_common_tokens(TokenizerSettings(), base, experts)
    ids = found.tokens.target.ids
    assert [ids[t] for t in BOTH] == [len(base.vocabulary), len(base.vocabulary) + 1]
    for name in ("b", "c"):
        own = row(experts[name], experts[name].vocabulary, NEW)
        assert row(found.experts[name], ids, NEW).equal(own), name
    both = (row(experts[n], experts[n].vocabulary, NEW).double() for n in ("b", "c"))
    assert row(found.base, ids, NEW).double().sub(sum(both) / 2).abs().max() < 1e-6  # in models without the token
    only = row(experts["c"], experts["c"].vocabulary, BOTH[1])
    assert all(row(m, ids, BOTH[1]).equal(only) for m in (found.base, *found.experts.values()))


def test_models_with_the_same_tokens_are_left_alone(opened):
    base, experts = opened("a")
    found = with_common_tokens(TokenizerSettings(), base, experts)
    assert found.tokens is None
    assert found.base is base
    padded = with_common_tokens(TokenizerSettings(pad_to_multiple_of=100), base, experts)
    assert padded.base.headers[EMBEDDING].shape[0] == padded.tokens.target.size == 400
    plain, rows = base.tensor(EMBEDDING), padded.base.tensor(EMBEDDING)
    assert rows[: len(plain)].equal(plain)
    used = plain[sorted(base.vocabulary.values())].mean(0)
    torch.testing.assert_close(rows[len(plain) :], used.expand(400 - len(plain), -1))  # as mergekit makes them


def test_other_sources_of_tokens(opened):
    base, experts = opened("b", "c")
    assert NEW not in with_common_tokens(TokenizerSettings(source="base"), base, experts).tokens.target.ids
    found = with_common_tokens(TokenizerSettings(source="expert b"), base, experts).tokens
    assert found.target.ids == experts["b"].vocabulary
    assert found.folder == experts["b"].path


def test_one_token_with_two_numbers_has_no_union(opened):
    base, experts = opened("c", "moved")
    refused(
        lambda: with_common_tokens(TokenizerSettings(), base, experts),
        "experts.moved", "the number 319", "the number 320", "no union", "model.tokenizer: base",
    )  # fmt: skip
    assert with_common_tokens(TokenizerSettings(source="base"), base, experts).tokens is not None


def test_the_numbers_that_a_configuration_names_follow_their_tokens():
    models = {"base": {"<s>": 0, "<image>": 1, "a": 2}, "x": {"a": 0, "<image>": 4, "<s>": 1, "b": 2}}
    config = {
        "vocab_size": 3, "eos_token_id": [0, 2], "image_token_index": 1, "pad_token_id": None, "tie_embeddings": True,
        "hidden_size": 1, "text_config": {"bos_token_id": 0, "vocab_size": 3},
    }  # fmt: skip
    kept = vocabulary(TokenizerSettings(), models, "base", "here")
    assert with_vocabulary(config, kept) == {
        **config,
        "vocab_size": 4,
        "text_config": {"bos_token_id": 0, "vocab_size": 4},
    }
    target = vocabulary(TokenizerSettings(source="x"), models, "base", "here")
    found = with_vocabulary(config, target)
    named = {"eos_token_id": [1, 0], "image_token_index": 4, "text_config": {"bos_token_id": 1, "vocab_size": 5}}
    assert found == {**config, **named, "vocab_size": 5}
    check_named_tokens(config, target, "here")
    lacking = vocabulary(TokenizerSettings(source="x"), {**models, "x": {"a": 0, "b": 1}}, "base", "here")
    refused(lambda: check_named_tokens(config, lacking, "here"), "here: ", "'<image>'", "image_token_index")


def test_tokens_that_no_model_has_are_refused(searching, tmp_path):
    file = searching(tmp_path, model__tokenizer={"tokens": {"qq": {"source": "b"}}})
    done = toys.evolver("validate", file)
    assert "model.tokenizer.tokens.qq.source: b has no token 'qq'" in toys.refusal(done.code, done.err)
    for wrong, says in (("expert d", "no expert 'd'"), ("onion", "did you mean 'union'"), ({"sauce": 1}, "sauce")):
        done = toys.evolver("validate", searching(tmp_path, model__tokenizer=wrong))
        assert says in toys.refusal(done.code, done.err)


def test_a_model_with_other_tensors_of_tokens_has_to_have_the_same_tokens(opened):
    """A bias of the head would stay where it is, while the rows of the head are moved."""
    base, experts = opened("b")
    base.headers["lm_head.bias"] = TensorInfo((len(base.vocabulary),), base.headers[EMBEDDING].dtype)
    experts["b"].headers["lm_head.bias"] = TensorInfo((len(base.vocabulary),), base.headers[EMBEDDING].dtype)
    refused(
        lambda: with_common_tokens(TokenizerSettings(), base, experts), "experts.b", "differs from that of the base"
    )


@pytest.mark.parametrize("experts", [("a", "b", "c"), ("a", "roomy")])
def test_a_search_scores_models_as_they_are_and_exports_the_union(searching, worded, experts, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evolver.commands.evaluate import score_models

    file = searching(tmp_path, experts, search={"algorithm": "tpe"})
    display = toys.Silent()
    run = toys.run_here(file, tmp_path / "results", display=display)
    assert any("different tokens" in line for line in display.lines)
    agreement = json.loads((run / "best.json").read_text())
    assert agreement["equal"] == agreement["items"] == 12
    recorded = json.loads((run / "summary.json").read_text())["report"]
    alone = score_models(str(file), [str(worded / n) for n in ("base", *experts)], "report", lambda _: None)
    assert [recorded[n] for n in ("base", *experts)] == [m.score for m in alone]

    model, words = (kind.from_pretrained(run / "best") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert len(words) == model.config.vocab_size == model.get_input_embeddings().weight.shape[0]
    assert words.encode("a stone")[-1] == words.convert_tokens_to_ids(NEW)
    toys.run_here(file, tmp_path / "results", toys.no_work)  # nothing is scored again


def test_an_adapter_beside_an_expert_with_more_tokens(searching, models, tmp_path):
    """It has the base's tokens, and scores what it scores among models that have them, too."""
    found = {}
    for other in ("a", "b"):
        changes = {"experts__lora": str(models / "lora"), "evaluation__tasks": [ROLL]}
        file = searching(tmp_path, (other,), search={"algorithm": "tpe"}, **changes)
        run = toys.run_here(file, tmp_path / f"results-{other}")
        found[other] = {n: r["items"] for (n, r) in named(run).items()}
    assert found["a"]["base"] == found["b"]["base"]
    assert found["a"]["lora"] == found["b"]["lora"] != found["b"]["base"]


def named(run):
    """The rows of the report set by the name of the model."""
    return {row["label"]: row for (stage, _), row in toys.rows(run).items() if stage == "report"}


def test_mergekit_file_of_the_winner_makes_it(searching, tmp_path):
    from safetensors.torch import load_file

    run = toys.run_here(searching(tmp_path, search={"algorithm": "tpe"}), tmp_path / "results")
    best = run / "best"
    done = toys.evolver("merge", best / "mergekit_config.yml", tmp_path / "again")
    assert done.code == 0, done.err
    ours, theirs = (load_file(p / "model.safetensors") for p in (best, tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    assert all(ours[n].equal(theirs[n]) for n in ours)
    assert (best / "tokenizer.json").read_text() == (tmp_path / "again" / "tokenizer.json").read_text()


def test_an_expert_that_wins_is_exported_with_its_own_tokens(searching, worded, tmp_path):
    file = searching(tmp_path)  # the first candidates of a population are the experts themselves
    run = toys.run_here(file, tmp_path / "results")
    searched = toys.rows(run)
    assert ("search", 0) in searched
    for number in range(3):
        done = toys.evolver("export", run, tmp_path / f"out-{number}", "--candidate", number)
        assert done.code == 0, done.err
        assert "on 12 of 12 dev items" in done.out
    done = toys.evolver("export", run, tmp_path / "delta", "--delta")
    assert "have other tokens than the base" in toys.refusal(done.code, done.err)


def test_the_source_of_tokens_belongs_to_the_run_only_where_tokens_differ(searching, tmp_path):
    def identity(*names, **changes):
        return prepare(config_at(searching(tmp_path, names, **changes))).identity

    assert identity("a", "b")["model"]["tokenizer"] == "union"
    other = identity("a", "b", model__tokenizer="base")
    assert other["model"]["tokenizer"] == "base"
    assert other["experts"] != identity("a", "b")["experts"]


@pytest.fixture(scope="module", params=["tied", "untied"])
def resized(request, models, tmp_path_factory):
    """An adapter that was trained after its base had got a token more, and the folder into which PEFT merges it."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, tokenizer = tmp_path_factory.mktemp("resized"), AutoTokenizer.from_pretrained(models / "base")
    tied = {"tie_word_embeddings": request.param == "tied"}
    for name in ("base", "a"):
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_pretrained(models / name, **tied)
        if request.param == "untied":
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.05 * torch.randn(len(tokenizer), 64))
        for part in (model, tokenizer):
            part.save_pretrained(folder / name)
    tokenizer.add_tokens([NEW])

    def grown():
        model = AutoModelForCausalLM.from_pretrained(folder / "base")
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return model

    saved = ["embed_tokens"] if request.param == "tied" else ["embed_tokens", "lm_head"]
    weights = LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=saved, ensure_weight_tying=len(saved) == 1)
    torch.manual_seed(4)
    adapter = get_peft_model(grown(), weights)
    for name, parameter in adapter.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    for part in (adapter, tokenizer):
        part.save_pretrained(folder / "adapter")
    whole = PeftModel.from_pretrained(grown(), folder / "adapter").merge_and_unload()
    for part in (whole, tokenizer):
        part.save_pretrained(folder / "whole")
    return folder


def test_an_adapter_trained_after_resizing_is_its_merged_folder(resized):
    base = open_base(str(resized / "base"))
    found = {n: open_expert(str(resized / n), base, f"experts.{n}", same_tokens=False) for n in ("adapter", "whole")}
    assert found["adapter"].has_own_tokens
    seen = with_common_tokens(TokenizerSettings(), base, found)
    assert seen.tokens.target.ids == found["whole"].vocabulary
    for name in seen.base.headers:
        ours, theirs = (seen.experts[n].tensor(name) for n in found)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    new = seen.tokens.target.ids[NEW]
    assert seen.experts["adapter"].tensor(EMBEDDING)[new].equal(found["whole"].tensor(EMBEDDING)[new])


@pytest.mark.parametrize("other", ["a", "whole"])
def test_a_search_over_an_adapter_trained_after_resizing(make_config, resized, other, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evolver.commands.evaluate import score_models

    changes = {"model.base": str(resized / "base"), "search": {"algorithm": "tpe"}, "model.compute": "float32"}
    changes["experts"] = {n: str(resized / n) for n in (other, "adapter")}
    file = make_config(tmp_path, {**toys.SHORT, **changes, "evaluation.tasks": [ROLL]})
    run = toys.run_here(file, tmp_path / "results")
    assert json.loads((run / "best.json").read_text()) == {"items": 4, "equal": 4}
    recorded = json.loads((run / "summary.json").read_text())["report"]
    (alone,) = score_models(str(file), [str(resized / "whole")], "report", lambda _: None)
    assert recorded["adapter"] == pytest.approx(alone.score, abs=1e-5)
    model, words = (kind.from_pretrained(run / "best") for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert model.config.vocab_size == len(words) == model.get_input_embeddings().weight.shape[0]
    assert words.encode("a stone")[-1] == words.convert_tokens_to_ids(NEW)


def test_an_adapter_whose_tokens_are_not_known_is_refused(resized, tmp_path):
    base = open_base(str(resized / "base"))
    shutil.copytree(resized / "adapter", tmp_path / "adapter")
    said = "experts.x: the vocabulary of", "(320 tokens) differs from that of the base (319 tokens)"
    refused(lambda: open_expert(str(tmp_path / "adapter"), base, "experts.x"), *said)
    (tmp_path / "adapter" / "tokenizer.json").unlink()
    said = "of shape (320, 64), which the base", "does not have"
    for same in (True, False):
        refused(lambda same=same: open_expert(str(tmp_path / "adapter"), base, "experts.x", same_tokens=same), *said)
