"""The dtype of forward passes: chosen once, by measuring, kept by a run, and no other than the weights are stored in
where nothing is gained.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import toys
from safetensors.torch import load_file, save_file
from toys import refused

from evolver.checkpoints.weights import TensorInfo
from evolver.config.reading import config_at, load
from evolver.driver.prepare import prepare
from evolver.driver.run import run
from evolver.runs.history import read_history
from evolver.storage import storage_at
from evolver.workers import compute, opened, worker
from evolver.workers.compute import ComputeChoice, choose, choose_for_any, settled, stored_dtype
from evolver.workers.pools.local import LocalPool
from evolver.workers.worker import Worker


@pytest.fixture(scope="module")
def narrow(models, tmp_path_factory):
    """The toy models, rounded to bfloat16."""
    folder = tmp_path_factory.mktemp("narrow")
    for name in ("base", "a", "b", "c"):
        shutil.copytree(models / name, folder / name)
        file = folder / name / "model.safetensors"
        save_file({n: t.bfloat16() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
        config = json.loads((folder / name / "config.json").read_text())
        (folder / name / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))
    return folder


@pytest.fixture
def configured(make_config, narrow, tmp_path):
    """``configured(changes)``: a run of the rounded models."""

    def make(**changes):
        experts = {n: str(narrow / n) for n in ("a", "b", "c")}
        return make_config(tmp_path, {"model": {"base": str(narrow / "base"), **changes}, "experts": experts})

    return make


def took(seconds, monkeypatch):
    """Let a processor take so long with dtypes: what is not named it does not have."""
    monkeypatch.setattr(compute, "_timed", lambda dtypes, *_: {d: seconds[d] for d in dtypes if d in seconds})


@pytest.mark.parametrize(
    ("seconds", "chosen", "why"),
    [
        ({"bfloat16": 1.0, "float32": 2.0}, "bfloat16", "float32 takes 2.0 times as long"),
        ({"bfloat16": 4.0, "float32": 1.0}, "float32", "bfloat16 takes 4.0 times as long"),
        ({"bfloat16": 1.05, "float32": 1.0}, "bfloat16", "float32 takes 1.0 times as long"),
        ({"float32": 1.0}, "float32", "cpu does not compute in bfloat16"),
    ],
)
def test_the_faster_dtype_is_chosen(configured, narrow, monkeypatch, seconds, chosen, why):
    took(seconds, monkeypatch)
    choice = worker.choose_compute(load(configured()))
    assert choice.compute == chosen
    assert choice.why.startswith(why)


def test_it_is_really_measured_and_quickly(configured):
    for own in ("bfloat16", "float16"):
        assert choose_for_any(own, "cpu").compute in (own, "float32")
    seconds = compute._timed(["bfloat16", "float32"], {(64, 32): 2.0, (1 << 20, 1 << 13): 1.0}, "cpu")
    assert seconds.keys() == {"bfloat16", "float32"}
    assert all(0 < s < 60 for s in seconds.values())
    rows, matrix = (o := compute._operands("float32", compute._cut((1 << 20, 1 << 13)), "cpu")).rows, o.matrix
    assert matrix.numel() <= compute.SCALARS
    assert 2 * rows.shape[0] * matrix.numel() <= compute.OPERATIONS


def test_no_narrower_dtype_than_that_of_the_weights(models, make_config, tmp_path):
    config = load(make_config(tmp_path))
    headers = {"w": TensorInfo((8, 8), torch.float32), "steps": TensorInfo((100, 100), torch.int64)}
    assert settled(config, headers).model.compute == "float32"
    assert choose(config, headers, "cpu") == ComputeChoice("float32", "the weights are float32")
    assert prepare(config_at(make_config(tmp_path))).identity["model"]["compute"] == "float32"
    mixed = {"norm": TensorInfo((8,), torch.float32), "w": TensorInfo((8, 8), torch.bfloat16)}
    assert stored_dtype(config.model, mixed) == "bfloat16"
    assert stored_dtype(config.model.model_copy(update={"dtype": "float16"}), mixed) == "float16"


def test_where_there_is_no_room_the_weights_dtype_is_kept(configured, monkeypatch):
    took({"bfloat16": 9.0, "float32": 1.0}, monkeypatch)
    base = prepare(config_at(configured()), weights=False).opened.base
    monkeypatch.setattr(compute, "free_memory", lambda _: 3 * base.scalars)
    assert worker.choose_compute(load(configured())).compute == "bfloat16"
    monkeypatch.setattr(opened, "free_memory", lambda _: 3 * base.scalars)
    prepare(config_at(configured(compute="bfloat16")), weights=False, device="cpu")
    refused(
        lambda: prepare(config_at(configured(compute="float32")), weights=False, device="cpu"),
        "GiB in float32", "model.compute",
    )  # fmt: skip


def asked(answer, log):
    def choose_it(config):
        log.append(config.run)
        return ComputeChoice(answer, "said the test")

    return choose_it


def go(file, folder, chooser):
    shown = toys.Silent()
    return Path(run(config_at(file), storage_at(folder), LocalPool, shown, "cpu", choose=chooser).location), shown.lines


@pytest.mark.whole
def test_a_run_computes_as_was_chosen_once(configured, narrow, tmp_path):
    log: list[str] = []
    folder, lines = go(configured(), tmp_path / "results", asked("float32", log))
    assert "forward passes run in float32: said the test" in lines
    assert json.loads((folder / "identity.json").read_text())["model"]["compute"] == "float32"
    assert json.loads((folder / "best.json").read_text()) == {"items": 40, "equal": 40}
    assert {t.dtype for t in load_file(folder / "best" / "model.safetensors").values()} == {torch.bfloat16}
    assert "Forward passes ran in float32." in (folder / "report.md").read_text()
    assert read_history(storage_at(folder)).about.config.model.compute == "float32"

    # Another call does not choose anew, whatever is faster now, and every command computes alike.
    again, _ = go(configured(), tmp_path / "results", asked("bfloat16", log))
    assert log == ["toy"]
    assert toys.essence(again) == toys.essence(folder)
    done = toys.evolver("export", folder, tmp_path / "out")
    assert "gives the answers in the ledger on 40 of 40 dev items" in done.out, done
    # Named, it is the same run; another one is not.
    named, _ = go(configured(compute="float32"), tmp_path / "results", asked("bfloat16", log))
    assert (named, log) == (folder, ["toy"])
    refused(lambda: go(configured(compute="bfloat16"), tmp_path / "results", asked("float32", log)), "model.compute")


def test_scores_are_those_of_the_rounded_weights_in_that_dtype(configured, tmp_path):
    """Against Transformers alone: the exported model, its weights in bfloat16, loaded in float32."""
    from transformers import AutoModelForCausalLM

    scores = {}
    for chosen in ("float32", "bfloat16"):
        ready = prepare(config_at(configured(compute=chosen)))
        mine = Worker(ready.plan, "dev", tasks=ready.tasks)
        assert {p.dtype for p in mine.live.module.parameters()} == {getattr(torch, chosen)}
        mine.live.write(mine.materialiser.stream(ready.experts[0]))
        theirs = AutoModelForCausalLM.from_pretrained(
            ready.config.experts["a"], dtype=getattr(torch, chosen), attn_implementation="sdpa"
        ).eval()
        tokens = torch.tensor([[5, 6, 7, 8, 9]])
        with torch.inference_mode():
            assert torch.equal(mine.live.module(tokens).logits, theirs(tokens).logits)
            scores[chosen] = theirs(tokens).logits.float()
    assert not torch.equal(scores["float32"], scores["bfloat16"])


@pytest.mark.parametrize("command", ["validate", "run"])
def test_a_dtype_that_the_device_lacks_is_refused_before_anything_is_written(
    configured, tmp_path, monkeypatch, command
):  # fmt: skip
    def lacking(*_):
        raise RuntimeError('"addmm_impl_cpu_" not implemented\nfor Half')

    monkeypatch.setattr(compute, "_operands", lacking)
    more = ["--results", tmp_path / "results"] if command == "run" else []
    done = toys.evolver(command, configured(compute="float16"), *more)
    assert done.code == 2
    assert done.err.count("\n") == 1
    assert "model.compute: cpu cannot compute in float16" in done.err
    assert not (tmp_path / "results").exists()


def test_other_classes_compute_as_they_do(make_config, tmp_path):
    changes = {"evaluation.backend": "hf", "model.compute": "float32"}
    refused(
        lambda: prepare(config_at(make_config(tmp_path, changes))),
        "model.compute: the backend hf chooses its dtype itself",
    )
    on_cpu = {"evaluation.backend": "hf", "evaluation.model_args": {"device": "cpu"}}
    assert prepare(config_at(make_config(tmp_path, on_cpu))).identity["model"]["compute"] == "auto"


def test_validate_says_what_it_would_be(configured, monkeypatch):
    took({"bfloat16": 1.0, "float32": 3.0}, monkeypatch)
    done = toys.evolver("validate", configured())
    assert "model.compute: auto is bfloat16 on this machine: float32 takes 3.0 times as long" in done.out
    assert "model.compute" not in toys.evolver("validate", configured(compute="float32")).out
