"""Searches that descend over encoder–decoders: gradients against plain loops in float64, and whole runs."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import toys
import yaml
from test_descent import ADA, TAUGHT, asked_of, ready_of
from test_encoder_decoder import bart, save_all, t5, tied_t5
from tokenizers.processors import TemplateProcessing
from toys import MOODS, run_here, texts
from transformers import AutoModelForSeq2SeqLM, BartConfig, BartForSequenceClassification

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.records.loss import UnlabelledLoss
from evolver.records.order import item_order
from evolver.runs.history import read_history
from evolver.storage import storage_at
from evolver.workers.worker import Worker

NUMBERS = [(0.3, 0.1), (0.5, 0.2), (0.1, 0.7)]


def configured(folder, tasks, search, names=("toy",), **changes):
    metrics = {"echo": "exact_match"}
    entries = [{"task": n, "metric": metrics.get(n, "acc"), "dev": 20, "report": 4} for n in names]
    raw = toys.settings(folder, tasks, {"evaluation.tasks": entries, "run": "seq", **changes})
    raw["model"]["kind"], raw["experts"] = "seq2seq", {n: str(folder / n) for n in ("a", "b")}
    raw["search"], raw["budget"] = search, {"candidates": 9}
    (folder / "run.yaml").write_text(yaml.safe_dump(raw))
    return folder / "run.yaml"


def plain_loss(ready, numbers, loss, examples):
    """The mean over both experts of the loss on all examples, each by itself and without padding, in float64."""
    folders = {"base": ready.opened.base.path, **{n: e.path for n, e in ready.opened.experts.items()}}
    models = {n: AutoModelForSeq2SeqLM.from_pretrained(f).double().eval() for n, f in folders.items()}
    base, weights = models["base"], {}
    for name, origin in base.state_dict().items():
        place = [part for part in ("block.", "layers.") if part in name]
        row = 1 + int(name.split(place[0])[1].split(".")[0]) if place else 0
        deltas = [models[n].state_dict()[name] - origin for n in "ab"]
        weights[name] = origin + sum(c * d for c, d in zip(numbers[row], deltas, strict=True))
    total, tokens = 0.0, sum(e["decoder_input_ids"].shape[1] for e in examples)
    read = sum(e["input_ids"].shape[1] for e in examples)
    for given in examples:
        given = {**given, "use_cache": False, "output_hidden_states": True}
        merged = torch.func.functional_call(base, weights, kwargs=given, tie_weights=False)
        for name in "ab":
            with torch.no_grad():
                expert = models[name](**given)
            p, q = ((x.logits[0] / loss.temperature).softmax(-1) for x in (expert, merged))
            total = total + loss.temperature**2 * (p * (p / q).log()).sum() / tokens / 2
            for part, count in (("encoder_hidden_states", read), ("decoder_hidden_states", tokens)):
                for h, g in zip(getattr(merged, part)[1:], getattr(expert, part)[1:], strict=True):
                    total = total + loss.hidden * (h - g).square().mean(-1).sum() / count / 2
    return total


def examples_of(worker, places):
    """What the model reads and says of every different answer to the items, without padding."""
    ((scorer, _),) = worker.scorer.parts
    pairs = dict.fromkeys(pair for place in sorted(places) for pair in scorer.groups[place].pairs)
    return [
        {"input_ids": torch.tensor([context]), "decoder_input_ids": torch.tensor([(2, *said[:-1])])}
        for context, said in pairs
    ]


@pytest.mark.parametrize("hidden", [0.0, 0.5])
def test_a_gradient_is_that_of_a_plain_loop_in_float64(tasks, tmp_path, hidden):
    save_all(t5, tmp_path)
    ready = ready_of(configured(tmp_path, tasks, TAUGHT))
    worker, loss = Worker(ready.plan, "dev", tasks=ready.tasks), UnlabelledLoss("distillation", 2.0, hidden)
    result = worker.evaluate(asked_of(ready, NUMBERS, loss, limit=6))
    numbers = torch.tensor(NUMBERS, dtype=torch.float64, requires_grad=True)
    examples = examples_of(worker, item_order("some", 20)[:6])
    assert len(examples) > 6
    wanted = plain_loss(ready, numbers, loss, examples)
    (slope,) = torch.autograd.grad(wanted, numbers)
    assert result.loss == pytest.approx(wanted.item(), rel=1e-4)
    assert result.gradient == pytest.approx(slope.flatten().tolist(), rel=2e-3, abs=1e-5)
    assert max(map(abs, result.gradient)) > 1e-3


@pytest.mark.parametrize("make", [bart, tied_t5])
def test_an_expert_has_nothing_to_learn_from_itself(tasks, tmp_path, make):
    """With the whole expert a as the merge, and as the only example, on items of several kinds."""
    save_all(make, tmp_path)
    file = configured(tmp_path, tasks, TAUGHT, ("toy", "last"), statistics={"tasks": {"a": ["toy"], "b": ["last"]}})
    ready = ready_of(file)
    loss = UnlabelledLoss("distillation")
    result = Worker(ready.plan, "dev", tasks=ready.tasks).evaluate(asked_of(ready, [(1.0, 0.0)] * 3, loss))
    assert result.status == "ok", result.reason
    assert result.loss > 1e-3  # that of b's items
    ready.config.statistics.tasks["b"] = ["nobody"]
    alone = Worker(ready.plan, "dev", tasks=ready.tasks).evaluate(asked_of(ready, [(1.0, 0.0)] * 3, loss))
    assert alone.loss == pytest.approx(0.0, abs=1e-6 * result.loss)  # θ₀ + 1·τ is rounded
    assert max(map(abs, alone.gradient)) < 1e-3 * max(map(abs, result.gradient))


def test_a_gradient_changes_no_score_after_it(tasks, tmp_path):
    save_all(t5, tmp_path)
    ready = ready_of(configured(tmp_path, tasks, TAUGHT))
    worker = Worker(ready.plan, "dev", tasks=ready.tasks)
    asked = asked_of(ready, NUMBERS, UnlabelledLoss("distillation"))
    plain = type(asked)(0, asked.recipe, "x")
    before, first, after, second = (worker.evaluate(c) for c in (plain, asked, plain, asked))
    assert before.complete
    assert (before.items, first.gradient) == (after.items, second.gradient)


@pytest.mark.parametrize(
    ("search", "names", "said"),
    [(ADA, ("toy",), "would only learn to repeat itself"), (TAUGHT, ("toy", "echo"), "where a text is written")],
)
def test_what_has_no_gradient_is_refused(tasks, tmp_path, search, names, said):
    save_all(t5, tmp_path)
    file = configured(tmp_path, tasks, search, names)
    toys.refused(lambda: prepare(config_at(file)), said)


@pytest.mark.whole
@pytest.mark.parametrize(
    "search",
    [
        {**TAUGHT, "steps": 4, "lr": 0.2, "anchor": 0.0},
        {"algorithm": "fw_merging", "loss": "distillation", "steps": 4, "items": 12, "scale": 0.6},
    ],
    ids=["expert_merging", "fw_merging"],
)
def test_a_run_descends(tasks, tmp_path, search):
    save_all(t5, tmp_path)
    folder = run_here(configured(tmp_path, tasks, search), tmp_path / "results")
    searched = read_history(storage_at(folder)).stages["search"]
    assert [r.loss is None for _, r in searched] == [False] * 4 + [True]
    assert searched[3][1].loss < searched[0][1].loss
    assert searched[-1][1].complete


@pytest.mark.whole
def test_classifiers_that_encode_and_decode_get_sure(tmp_path):
    """BART reads its answer off the last token, which ends the text."""
    words = toys.tokenizer()
    words._tokenizer.post_processor = TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = BartConfig(
        vocab_size=len(words), d_model=32, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=64, decoder_ffn_dim=64,
        encoder_attention_heads=2, decoder_attention_heads=2, max_position_embeddings=192, pad_token_id=2,
        bos_token_id=0, eos_token_id=1, decoder_start_token_id=1, forced_eos_token_id=1, init_std=0.3,
        id2label=dict(enumerate(MOODS)), label2id={n: i for i, n in enumerate(MOODS)},
    )  # fmt: skip
    torch.manual_seed(0)
    toys.noisy_experts(BartForSequenceClassification(config), tmp_path, words)
    data = toys.write_rows(tmp_path / "data.jsonl", [{"text": t, "label": MOODS[n % 3]} for n, t in enumerate(texts())])
    raw = {
        "run": "bart", "model": {"base": str(tmp_path / "base"), "kind": "classifier"},
        "experts": {n: str(tmp_path / n) for n in ("a", "b")}, "budget": {"candidates": 9},
        "search": {**ADA, "steps": 8, "lr": 0.1, "redraw": False},
        "evaluation": {"tasks": [{"task": "mood", "data": data, "dev": 30, "report": 20}], "batch_tokens": 256},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
    folder = Path(run_here(tmp_path / "run.yaml", tmp_path / "results"))
    losses = [r.loss for _, r in read_history(storage_at(folder)).stages["search"]]
    assert losses[7] < losses[0]
