"""Encoder–decoders: per-item results are lm-eval's, and a whole search leaves a model that says the same."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import toys
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from toys import rows, run_here
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BartConfig,
    BartForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from evolver.checkpoints.sources import open_base, open_expert
from evolver.commands.evaluate import score_models
from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.evaluation.items import item_hash
from evolver.evaluation.language.encoder_decoder import EncoderDecoder
from evolver.evaluation.language.loglikelihood import LogLikelihoods
from evolver.evaluation.live import LiveModel
from evolver.records import Candidate
from evolver.records.recipe import load_recipe
from evolver.workers.worker import Worker

pytestmark = pytest.mark.whole

METRICS = {
    "toy": "acc",
    "pair": "acc_norm",
    "last": "acc",
    "echo": "exact_match",
    "free": "exact_match",
    "roll": "word_perplexity",
}
DEV = {"toy": 40, "pair": 30, "last": 30, "echo": 20, "free": 20, "roll": 6}


def t5(words):
    config = T5Config(
        vocab_size=len(words), d_model=32, d_kv=16, d_ff=64, num_layers=2, num_decoder_layers=2, num_heads=2,
        feed_forward_proj="gated-gelu", pad_token_id=2, eos_token_id=1, initializer_factor=4.0, n_positions=128,
    )  # fmt: skip
    config.decoder_start_token_id = 2
    config.tie_word_embeddings = False  # as FLAN-T5: the constructor would tie it
    config.scale_decoder_outputs = False
    return T5ForConditionalGeneration(config)


def bart(words):
    return BartForConditionalGeneration(
        BartConfig(
            vocab_size=len(words), d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64,
            decoder_ffn_dim=64, encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=192,
            pad_token_id=2, bos_token_id=0, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=1,
            init_std=0.3,
        )
    )  # fmt: skip


def tied_t5(words):
    """As the first T5: one tensor for all embeddings and the head."""
    model = t5(words)
    model.config.tie_word_embeddings = model.config.scale_decoder_outputs = True
    model.tie_weights()
    return model


def save_all(make, folder):
    """Save ``base``, and fine-tunes ``a`` and ``b`` of it."""
    words = toys.tokenizer()
    torch.manual_seed(0)
    model = make(words)
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    for seed, name in enumerate(("base", "a", "b")):
        torch.manual_seed(seed)
        model.load_state_dict({k: v + 0.1 * (seed > 0) * torch.randn_like(v) for k, v in weights.items()})
        model.tie_weights()
        model.save_pretrained(folder / name)
        words.save_pretrained(folder / name)


@pytest.fixture(scope="module", params=[t5, bart])
def experts(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    save_all(request.param, folder)
    return folder


@pytest.fixture(scope="module")
def configured(experts, tasks, tmp_path_factory):
    def make(names=METRICS, **changes):
        entries = [{"task": n, "metric": METRICS[n], "dev": DEV[n], "report": 4} for n in names]
        raw = toys.settings(experts, tasks, {"evaluation.tasks": entries, "run": "seq", **changes})
        raw["model"]["kind"] = "seq2seq"
        raw["experts"] = {n: str(experts / n) for n in ("a", "b")}
        file = tmp_path_factory.mktemp("seq") / "run.yaml"
        file.write_text(yaml.safe_dump(raw))
        return file

    return make


@pytest.fixture(scope="module")
def ready(configured):
    return prepare(config_at(configured()))


@pytest.fixture(scope="module")
def worker(ready):
    return Worker(ready.plan, "dev", tasks=ready.tasks)


@pytest.fixture(scope="module")
def judged(ready, experts, tasks):
    module = AutoModelForSeq2SeqLM.from_pretrained(experts / "a", dtype=torch.float32)
    module.tie_weights = lambda *_, **__: None  # lm-eval would tie what the checkpoint holds apart
    lm = HFLM(pretrained=module, tokenizer=AutoTokenizer.from_pretrained(experts / "a"), batch_size=1)
    indices = {t: sorted(i.index for i in ready.tasks.items.dev if i.task == t) for t in METRICS}
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    out = simple_evaluate(lm, tasks=list(METRICS), task_manager=manager, samples=indices, bootstrap_iters=0)
    return {(n, item_hash(s["doc"])): s for n, samples in out["samples"].items() for s in samples}


def test_per_item_results_are_those_of_lm_eval(ready, worker, judged):
    result = worker.evaluate(Candidate(0, ready.experts[0], "test"))
    assert result.status == "ok", result.reason
    for item, value in zip(ready.tasks.items.dev, result.items, strict=True):
        theirs = judged[item.task, item.hash][METRICS[item.task]]
        assert value == pytest.approx(theirs[0] if isinstance(theirs, tuple) else theirs, rel=1e-4), item
    assert 0 < sum(v for i, v in zip(ready.tasks.items.dev, result.items, strict=True) if i.task == "toy") < DEV["toy"]


def test_log_likelihoods_and_texts_are_those_of_lm_eval(ready, worker, judged):
    worker.live.write(worker.materialiser.stream(ready.experts[0]))
    (part, _), *_ = worker.scorer.parts
    lengths = set()
    for kind in ("toy", "last", "pair"):
        places = [p for p, i in enumerate(ready.tasks.items.dev) if i.task == kind]
        found = part._likely({p: part.groups[p] for p in places}).answers
        for place in places:
            item = ready.tasks.items.dev[place]
            theirs = judged[item.task, item.hash]["filtered_resps"]
            lengths |= {len(c) for _, c in part.groups[place].pairs}
            assert [v for v, _ in found[place]] == pytest.approx([float(r[0]) for r in theirs], rel=1e-5, abs=2e-4)
            assert [g for _, g in found[place]] == [str(r[1]) == "True" for r in theirs]
    assert len(lengths) > 1  # continuations of one token and of several
    places = [p for p, i in enumerate(ready.tasks.items.dev) if i.task == "free"]
    said = part._written({p: part._prompts[p] for p in places}).texts
    for place in places:
        item = ready.tasks.items.dev[place]
        assert said[place] == judged[item.task, item.hash]["resps"][0]


def test_batches_do_not_matter(ready, worker):
    worker.live.write(worker.materialiser.stream(ready.experts[0]))
    (part, _), *_ = worker.scorer.parts
    found = []
    for tokens, size in ((32, None), (4096, None), (4096, 1)):
        likely = LogLikelihoods(EncoderDecoder(worker.live, part.lm.max_length), tokens, size)
        found.append({g: [v for v, _ in a] for g, a in likely(part.groups).answers.items()})
    for other in found[1:]:
        for group, values in found[0].items():
            assert values == pytest.approx(other[group], rel=1e-4)


def test_every_tensor_has_its_own_place(ready, worker, experts):
    """A head that is not tied must stay what it is in the checkpoint, and be written to."""
    worker.live.write(worker.materialiser.stream(ready.experts[1]))
    theirs = AutoModelForSeq2SeqLM.from_pretrained(experts / "b", dtype=torch.float32).eval()
    assert_says_the_same(worker.live.module, theirs)
    assert isinstance(worker.live, LiveModel)


def test_a_head_that_equals_the_embedding_is_still_written_apart_from_it(ready, worker, experts, tmp_path):
    """Transformers ties the two where a checkpoint holds them with equal values; those of an expert need not be."""
    shutil.copytree(experts / "base", tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    embedding = next(n for n in ("shared.weight", "model.shared.weight") if n in tensors)
    save_file({**tensors, "lm_head.weight": tensors[embedding].clone()}, file, metadata={"format": "pt"})
    expert = load_file(experts / "b" / "model.safetensors")
    expert = {"lm_head.weight": expert[embedding].clone(), **expert}  # what is tied is saved once
    shapes = {name: tuple(tensor.shape) for name, tensor in expert.items()}
    live = LiveModel(ready.config.model, tmp_path / "base", shapes, "cpu")
    live.write(expert.items())
    assert_says_the_same(live.module, AutoModelForSeq2SeqLM.from_pretrained(experts / "b").eval())


def test_a_whole_search(configured, tmp_path):
    names = ("toy", "echo")
    file = configured(names, **{"budget.candidates": 6})
    folder = run_here(file, tmp_path)
    assert not [r["reason"] for r in rows(folder).values() if r["status"] != "ok"]
    count = sum(DEV[n] for n in names)
    assert json.loads((folder / "best.json").read_text()) == {"items": count, "equal": count}
    ready = prepare(config_at(file))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    worker.live.write(worker.materialiser.stream(load_recipe((folder / "recipe.json").read_text())))
    assert_says_the_same(worker.live.module, AutoModelForSeq2SeqLM.from_pretrained(folder / "best").eval())


NEW = [" stone", " tree"]  # words of the tasks' texts, which experts have as one token each


def with_tokens(folder, target, seed, added, rows=0):
    """Save a model of ``folder`` again with more tokens, whose rows and numbers are drawn with ``seed``."""
    model, words = (kind.from_pretrained(folder) for kind in (AutoModelForSeq2SeqLM, AutoTokenizer))
    words.add_tokens(added)
    torch.manual_seed(seed)
    model.resize_token_embeddings(len(words) + rows, mean_resizing=False)
    if hasattr(model, "final_logits_bias"):
        model.final_logits_bias += 0.3 * torch.randn_like(model.final_logits_bias)
    for part in (model, words):
        part.save_pretrained(target)


@pytest.fixture(scope="module", params=[t5, tied_t5, bart])
def worded(request, tmp_path_factory):
    """The toys, of which b has a token more and spare rows, and c two tokens more."""
    folder, plain = (tmp_path_factory.mktemp(name) for name in ("worded", "plain"))
    save_all(request.param, plain)
    for name in ("base", "a"):
        shutil.copytree(plain / name, folder / name)
    with_tokens(plain / "b", folder / "b", 5, NEW[:1], rows=8)
    with_tokens(plain / "a", folder / "c", 6, NEW)
    return folder


def by_token(folder):
    """The tensors that the class makes of a model, float64, and its vocabulary."""
    model = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32)
    return {n: t.double() for n, t in model.state_dict().items()}, AutoTokenizer.from_pretrained(folder).get_vocab()


def union_average(folder, names, tokens):
    """The mean of models in float64, by hand: a model that lacks a token gets the base's row, or the others' mean."""
    models = {n: by_token(folder / n) for n in ("base", *names)}
    out = {}
    for name, plain in models["base"][0].items():
        axis = {len(models["base"][1]): 0}.get(plain.shape[0], 1)
        if len(models["base"][1]) not in plain.shape:
            out[name] = sum(models[n][0][name] for n in names) / len(names)
            continue
        rows = []
        for token in sorted(tokens, key=tokens.get):
            known = {n: t[name].select(axis, v[token]) for n, (t, v) in models.items() if token in v}
            usual = known.get("base", sum(known.values()) / len(known))
            rows.append(sum(known.get(n, usual) for n in names) / len(names))
        out[name] = torch.stack(rows, axis)
    return out


def test_a_merge_with_the_tokens_of_all(worded, tmp_path):
    merge = {
        "merge_method": "task_arithmetic", "tokenizer_source": "union", "base_model": str(worded / "base"),
        "models": [{"model": str(worded / n), "parameters": {"weight": 1 / 3}} for n in ("a", "b", "c")],
    }  # fmt: skip
    (tmp_path / "merge.yml").write_text(yaml.safe_dump(merge))
    ended = toys.evolver("merge", tmp_path / "merge.yml", tmp_path / "out")
    assert ended.code == 0, ended.err
    model, info = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab()
    assert model.config.vocab_size == len(tokens) == len(by_token(worded / "base")[1]) + 2
    expected = union_average(worded, ("a", "b", "c"), tokens)
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape, name
        assert torch.allclose(found[name].double(), tensor, atol=2e-6), name


def test_a_search_scores_models_with_their_own_tokens_and_exports_the_union(worded, tasks, tmp_path):
    entries = [{"task": n, "metric": METRICS[n], "dev": 8, "report": 8} for n in ("toy", "echo", "roll")]
    entries[2].update(dev=4, report=4)
    changes = {"model.kind": "seq2seq", "model.compute": "float32", "search": {"algorithm": "tpe"}}
    raw = toys.settings(worded, tasks, {**toys.SHORT, **changes, "evaluation.tasks": entries})
    raw["experts"] = {n: str(worded / n) for n in ("b", "c")}
    (file := tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    run = run_here(file, tmp_path)
    assert {r["status"] for r in rows(run).values()} == {"ok"}
    agreement = json.loads((run / "best.json").read_text())
    assert agreement["items"] == 20
    assert agreement["equal"] >= 16  # the last digits of the four others depend on where in memory the weights lie
    ready = prepare(config_at(file))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    worker.live.write(worker.materialiser.stream(load_recipe((run / "recipe.json").read_text())))
    theirs = AutoModelForSeq2SeqLM.from_pretrained(run / "best").state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in worker.live.module.state_dict().items())
    recorded = json.loads((run / "summary.json").read_text())["report"]
    alone = score_models(str(file), [str(worded / n) for n in ("base", "b", "c")], "report", lambda _: None)
    assert [recorded[n] for n in ("base", "b", "c")] == [m.score for m in alone]
    assert len({m.score for m in alone}) == 3
    model, words = (kind.from_pretrained(run / "best") for kind in (AutoModelForSeq2SeqLM, AutoTokenizer))
    assert model.config.vocab_size == len(words) == model.get_input_embeddings().weight.shape[0]
    assert words.encode("a tree")[-1] == words.convert_tokens_to_ids(NEW[1]) == len(words) - 1
    done = toys.evolver("merge", run / "best" / "mergekit_config.yml", tmp_path / "again")
    assert done.code == 0, done.err
    ours, theirs = (load_file(p / "model.safetensors") for p in (run / "best", tmp_path / "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_an_adapter_with_tokens_of_its_own_has_to_be_merged_before(worded, tmp_path):
    """PEFT trains each place where an encoder-decoder uses its embedding by itself."""
    model, words = (kind.from_pretrained(worded / "base") for kind in (AutoModelForSeq2SeqLM, AutoTokenizer))
    words.add_tokens(NEW)
    model.resize_token_embeddings(len(words), mean_resizing=False)
    adapter = get_peft_model(model, LoraConfig(r=2, target_modules=["fc1", "wi_0"], modules_to_save=["shared"]))
    for part in (adapter, words):
        part.save_pretrained(tmp_path / "adapter")
    base = open_base(str(worded / "base"))
    for same in (True, False):
        toys.refused(
            lambda same=same: open_expert(str(tmp_path / "adapter"), base, "experts.x", same_tokens=same),
            "experts.x: the adapter", "into its base with PEFT and give that folder",
        )  # fmt: skip


def test_a_source_of_tokens_that_are_the_same_changes_nothing(experts, tmp_path):
    merge = {
        "merge_method": "task_arithmetic", "base_model": str(experts / "base"),
        "models": [{"model": str(experts / n), "parameters": {"weight": 1}} for n in ("a", "b")],
    }  # fmt: skip
    for name, more in {"plain": {}, "sourced": {"tokenizer_source": "union"}}.items():
        (tmp_path / "merge.yml").write_text(yaml.safe_dump(merge | more))
        ended = toys.evolver("merge", tmp_path / "merge.yml", tmp_path / name)
        assert ended.code == 0, ended.err
    plain, sourced = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "sourced"))
    assert plain.keys() == sourced.keys()
    assert all(torch.equal(plain[n], sourced[n]) for n in plain)
    AutoTokenizer.from_pretrained(tmp_path / "sourced")


def test_a_model_whose_answers_start_in_a_way_of_their_own_is_refused(worker, monkeypatch):
    forward = EncoderDecoder(worker.live, 128)
    forward.check()
    with monkeypatch.context() as patch:
        patch.setattr(worker.live.module, "prepare_decoder_input_ids_from_labels", lambda labels: labels.flip(1))
        with pytest.raises(BadInput, match=r"^model\.base: .* begins each answer with a token that names its language"):
            forward.check()
    monkeypatch.setattr(worker.live.module.config, "decoder_start_token_id", None)
    with pytest.raises(BadInput, match="has no decoder_start_token_id, with which the model begins each answer"):
        forward.check()


@pytest.mark.parametrize("task", ["toy", "echo"])
def test_a_t5_that_names_no_first_token_of_answers_is_refused_before_the_run(task, tasks, tmp_path):
    """Whether answers are compared or generated; a traceback ended such a run."""
    words = toys.tokenizer()
    model = t5(words)
    model.config.decoder_start_token_id = model.generation_config.decoder_start_token_id = None
    toys.noisy_experts(model, tmp_path, words)
    entry = {"task": task, "metric": METRICS[task], "dev": 8, "report": 4}
    raw = toys.settings(tmp_path, tasks, {"evaluation.tasks": [entry], "model.kind": "seq2seq"})
    raw["experts"] = {n: str(tmp_path / n) for n in ("a", "b")}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    for command in (("validate",), ("run", "--results", tmp_path / "results")):
        ended = toys.evolver(command[0], tmp_path / "run.yaml", *command[1:])
        assert "has no decoder_start_token_id" in toys.refusal(ended.code, ended.err)
    assert not (tmp_path / "results").exists()


def assert_says_the_same(one, other):
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        said = [m(input_ids=ids, decoder_input_ids=ids[:, :9]).logits for m in (one, other)]
    assert torch.equal(*said)
