"""Every method by the loop in C against its plain code, bit by bit; and on processors of several kinds."""

import functools
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_methods import EVERY, experts_of, merge, variants

from evolver.kernels import native
from evolver.merging.engine import order, recorded
from evolver.merging.methods import METHODS, method
from evolver.merging.methods.here import PieceView

# These look at whole rows, or take exponentials or eigenvalues in float64: they run as plain code.
PLAIN = {"pcb", "widen", "arcee_fusion", "neuro"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Shapes, how many experts, and of what dtype; one of each at least, and sizes that no vector divides.
CASES = [
    ((1,), 1), ((33,), 2), ((511,), 3), ((513,), 4), ((70, 51), 5), ((8191,), 6), ((8193,), 7), ((130, 192), 3),
    ((3, 4, 5), 2),
]  # fmt: skip
MORE = {
    "ties": [{"density": 0.3, "elect": "raw", "sign": "count"}, {"density": 0.3, "trim_scope": "global"}],
    "dare_linear": [{"density": 0.4, "rescale": "inv_p"}],
    "dare_ties": [{"density": 0.4, "normalize": True, "lambda": 0.7}],
    "della": [{"density": 0.4, "epsilon": 0.1, "rescale": "inv_p"}],
    "breadcrumbs_ties": [{"density": 0.8, "gamma": 0.05, "sign": "count"}],
    "multislerp": [{"task_vectors": True}],
    "linear": [{"normalize": False}],
    "ram": [{"epsilon": 1e-3}],
    "lines": [{"alpha": 0.7, "beta": 0.4}],
}


@pytest.fixture(autouse=True)
def _compiled():
    if native.library() is None:
        pytest.fail("no C compiler: the loop cannot be built here, so nothing would be tested")


def settings(name):
    return [*variants(name), *MORE.get(name, [])]


def cases(name):
    """Every case with every dtype in turn: the method's inputs and settings."""
    for number, (shape, count) in enumerate(CASES):
        if count == 1 and name in ("sce", "model_stock"):  # which need two
            count = 2
        base, experts = experts_of(name, shape, count, DTYPES[number % len(DTYPES)])
        experts[0] = experts[0].to(DTYPES[(number + 1) % len(DTYPES)])  # an input's dtype may be its own
        for more in settings(name):
            yield experts, base, more


def plain(monkeypatch, work):
    with monkeypatch.context() as patch:
        patch.setattr(native, "library", lambda: None)
        return work()


def bits(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


@EVERY
def test_the_loop_gives_the_bits_of_the_plain_code(name, monkeypatch):
    for experts, base, more in cases(name):
        work = functools.partial(merge, name, experts, base, **more)
        assert torch.equal(bits(work()), bits(plain(monkeypatch, work))), (base.shape, base.dtype, len(experts), more)


@EVERY
def test_so_it_does_in_many_pieces_and_stretches(name, monkeypatch):
    """Order statistics from brackets, too, which so small a tensor does not need."""
    monkeypatch.setattr(order, "DIRECT", 0)
    monkeypatch.setattr(recorded, "STRETCH", 1 << 14)
    base, experts = experts_of(name, (300, 128), 3, torch.bfloat16)
    for more in settings(name):
        work = functools.partial(merge, name, experts, base, piece=8192, **more)
        assert torch.equal(bits(work()), bits(plain(monkeypatch, work))), more


@EVERY
def test_the_loop_knows_what_the_method_does(name, monkeypatch):
    found = []
    original = recorded.Recorded.merge
    monkeypatch.setattr(recorded.Recorded, "merge", lambda self, out: found.append(1) or original(self, out))
    base, experts = experts_of(name, (300, 70))
    merge(name, experts, base)
    assert bool(found) != (name in PLAIN or METHODS[name].whole)


def test_a_method_that_does_what_the_loop_does_not_know_runs_as_plain_code():
    @method("Nobody 2026, Sines")
    def sines(deltas, *, here: PieceView):
        return torch.sin(deltas[0]) * here.sum(lambda d, _: d[0].sort().values[:1].double().sum())

    try:
        base, experts = experts_of("sines", (40,), 2)
        delta = experts[0] - base
        wanted = base + torch.sin(delta) * delta.min().double()
        assert torch.allclose(merge("sines", experts, base), wanted)
    finally:
        del METHODS["sines"]


def test_a_mistake_in_a_method_is_shown_and_not_hidden():
    @method("Nobody 2026, Mistaken")
    def mistaken(deltas):
        return deltas[0] + {}["nothing"]

    try:
        base, experts = experts_of("mistaken", (40,), 2)
        with pytest.raises(KeyError, match="nothing"):
            merge("mistaken", experts, base)
    finally:
        del METHODS["mistaken"]


@pytest.mark.whole
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are of another processor")
def test_code_for_an_older_processor_gives_the_same_bits(tmp_path, monkeypatch):
    here = {(name, n): bits(merge(name, e, b, **m)) for name in METHODS for n, (e, b, m) in enumerate(cases(name))}
    monkeypatch.setenv("EVOLVER_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "BEST_FIRST", (("-march=x86-64-v3", "-fopenmp"),))
    older = native.library.__wrapped__()
    assert Path(older._name).is_relative_to(tmp_path)
    monkeypatch.setattr(native, "library", lambda: older)
    for name in METHODS:
        for n, (experts, base, more) in enumerate(cases(name)):
            assert torch.equal(bits(merge(name, experts, base, **more)), here[name, n]), (name, n)


DIGESTS = """
import hashlib, json, sys
sys.path.insert(0, "tests")
import numpy as np
import torch

def numbers(shape, generator):
    made = np.random.default_rng(generator.initial_seed()).standard_normal(shape)
    generator.manual_seed(generator.initial_seed() + 1)
    return torch.from_numpy(np.asarray(made, dtype=np.float32))

torch.randn = lambda shape, generator: numbers(shape, generator)  # torch's own are not the same everywhere
from test_recorded import settings
from test_methods import experts_of, merge
from evolver.kernels import native
from evolver.merging.crossing import STRATEGIES, cross
from evolver.merging.methods import METHODS

if sys.argv[1] == "plain":
    native.library = lambda: None
found = {}
for name in (n for n, m in METHODS.items() if m.exact):
    for shape in ((33,), (300, 70)):
        for more in settings(name):
            base, experts = experts_of(name, shape, 3, torch.bfloat16 if len(shape) > 1 else torch.float32)
            merged = merge(name, experts, base, **more)
            digest = hashlib.sha256(merged.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
            found[f"{name} {shape} {more}"] = digest
for strategy, (_, count) in STRATEGIES.items():
    base, experts = experts_of("linear", (9000,), count)
    child = cross(strategy, base, experts, 0.5, 0.4, 7, "w")
    found[strategy] = hashlib.sha256(child.numpy().tobytes()).hexdigest()
print(json.dumps([torch.backends.cpu.get_cpu_capability(), found]))
"""
LEVELS = {
    "this one": {},
    "AVX-512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "ATEN_CPU_CAPABILITY": "avx512"},
    "AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2", "ATEN_CPU_CAPABILITY": "avx2"},
    "neither": {"ATEN_CPU_CAPABILITY": "default"},
}


def digests(how, level):
    done = subprocess.run(
        [sys.executable, "-c", DIGESTS, how], cwd=Path(__file__).parents[1], env=os.environ | LEVELS[level],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(done.stdout)


@pytest.mark.whole
def test_every_method_has_the_same_bits_on_other_processors():
    """As far as torch can pass for one: its own operations are those of the level."""
    (_, here), *others = [digests("looped", "this one"), *(digests("plain", level) for level in LEVELS)]
    assert {capability for capability, _ in others} >= {"DEFAULT", "AVX2"} or platform.machine() != "x86_64"
    assert len(here) > 2 * len(METHODS)
    for capability, found in others:
        assert {k: v for k, v in found.items() if v != here[k]} == {}, capability
