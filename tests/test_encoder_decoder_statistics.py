"""Statistics of encoder–decoders: every collector, held against plain loops with Transformers."""

from __future__ import annotations

import pytest
import torch
import toys
import yaml
from test_encoder_decoder import METRICS, bart, save_all, t5
from test_gradients import of_run
from test_statistics import cache, ready_of, worker_of  # noqa: F401  # a fixture
from test_stats_command import collected
from transformers import AutoModelForSeq2SeqLM

from evolver.config.reading import config_at
from evolver.driver.prepare import prepare
from evolver.errors import BadInput
from evolver.evaluation.collectors import COLLECTORS
from evolver.merging.methods import METHODS
from evolver.records import Candidate

pytestmark = pytest.mark.whole

SEARCH = {"algorithm": "tpe", "method": "regmean", "tune": ["a"], "startup": 2}
CROSS = ("EncDecAttention.k.", "EncDecAttention.v.", "encoder_attn.k_proj.", "encoder_attn.v_proj.")
WITH_STATISTICS = [name for name, found in METHODS.items() if found.statistics]


@pytest.fixture(scope="module", params=[t5, bart], ids=["t5", "bart"])
def experts(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param.__name__)
    save_all(request.param, folder)
    return folder


@pytest.fixture
def seq2seq(experts, tasks, tmp_path):
    """``seq2seq(tasks, changes)`` writes a configuration of two experts."""

    def make(names=("toy", "pair"), **changes):
        entries = [{"task": n, "metric": METRICS[n], "dev": 9, "report": 4} for n in names]
        raw = toys.settings(experts, tasks, {"evaluation.tasks": entries, "search": SEARCH, **changes})
        raw["model"]["kind"], raw["experts"] = "seq2seq", {n: str(experts / n) for n in ("a", "b")}
        (tmp_path / "run.yaml").write_text(yaml.safe_dump(raw))
        return tmp_path / "run.yaml"

    return make


def inputs_by_hand(worker, folder):
    """The inputs (M, d) of every linear layer: each context is encoded once, each continuation decoded by itself; the
    decoder's first step, which all continuations of a context have in common, counts once.
    """
    model, out = AutoModelForSeq2SeqLM.from_pretrained(folder, dtype=torch.float32).eval(), {}
    first = [True]

    def hook(name):
        def hear(_, given):
            rows = given[0].reshape(-1, given[0].shape[-1])
            if not first[0]:
                rows = rows[:0] if "decoder" not in name or any(c in name for c in CROSS) else rows[1:]
            out.setdefault(name, []).append(rows.double())

        return hear

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings():
            module.register_forward_pre_hook(hook(f"{name}.weight"))
    said = {}
    for scorer, _ in worker.scorer.parts:
        for group in scorer.groups.values():
            for context, continuation in group.pairs:
                said.setdefault(context, {})[continuation] = None
    for context, continuations in said.items():
        for number, continuation in enumerate(continuations):
            first[0] = number == 0
            start = [model.config.decoder_start_token_id, *continuation[:-1]]
            with torch.no_grad():
                model(input_ids=torch.tensor([context]), decoder_input_ids=torch.tensor([start]))
    return {name: torch.cat(parts) for name, parts in out.items()}


@pytest.mark.parametrize("batch_tokens", [48, 4096])
def test_grams_and_activations_are_those_of_a_plain_loop_without_padding(seq2seq, experts, batch_tokens):
    ready = ready_of(seq2seq(**{"evaluation.batch_tokens": batch_tokens}))
    worker = worker_of(ready)
    recipe = ready.search.space.decode({"a": 0.9})
    assert worker.evaluate(Candidate(0, recipe, "test")).status == "ok"
    grams = worker.materialiser._statistics[recipe.statistics[0].id]
    wanted = inputs_by_hand(worker, experts / "a")
    worker.live.write(worker.materialiser.stream(ready.experts[0]), whole=True)
    items = worker._statistics._items(recipe.statistics[0], worker.live, range(18))
    sizes = dict(COLLECTORS["activation"].collect(worker.live, items))
    lengths = {len(rows) for rows in wanted.values()}
    assert len(lengths) == 2  # encoder and cross-attention, decoder
    assert set(sizes) == set(wanted)
    for name, rows in wanted.items():
        scale = float((rows.T @ rows).abs().max())
        assert torch.allclose(grams.get(name).double(), rows.T @ rows, rtol=1e-3, atol=1e-5 * scale), name
        assert torch.allclose(sizes[name].double(), rows.abs().mean(0), rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("source", ["tasks", "random"])
def test_every_kind_is_collected(seq2seq, cache, source):  # noqa: F811
    kinds = [name for name, found in COLLECTORS.items() if source == "tasks" or not found.observed]
    file = seq2seq(statistics={"items": 3, "source": source})
    found = collected(file, *kinds)
    assert {k.node.collected for k in found} == set(kinds)
    assert all(k.fresh for k in found)
    assert {k.file for k in found} == set(cache.iterdir())


@pytest.mark.parametrize("name", WITH_STATISTICS)
def test_every_method_with_statistics_merges(seq2seq, name):
    ready = ready_of(seq2seq(search={"algorithm": "tpe", "method": name}, statistics={"items": 3}))
    worker = worker_of(ready)
    recipe = ready.search.space.decode({k.name: k.low for k in ready.search.space.knobs})
    result = worker.evaluate(Candidate(0, recipe, "test"))
    assert result.status == "ok", result.reason


def test_the_fisher_information_of_all_items_has_the_decoders_tensors_and_the_encoders(seq2seq):
    ready = ready_of(seq2seq())
    worker = worker_of(ready)
    examples = of_run(ready, worker, "a")
    assert len(examples) == 18

    class Given:
        def examples(self):
            return iter(examples)

    found = dict(COLLECTORS["fisher"].collect(worker.live, Given()))
    parts = {part: [n for n in found if f"{part}." in n and found[n].max() > 0] for part in ("encoder", "decoder")}
    assert len(parts["encoder"]) > 5
    assert len(parts["decoder"]) > 10


def test_written_answers_are_refused(seq2seq):
    with pytest.raises(BadInput, match=r"evaluation\.tasks\[1\]: echo is scored in a way that does not say which"):
        prepare(config_at(seq2seq(("toy", "echo"))), weights=False)
