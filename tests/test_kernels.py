"""Compiled kernels are found again by other processes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evolver.merging.kernels import OPTIONS, Kernels, can_compile

pytestmark = pytest.mark.whole

# Two, as what a compiler leaves behind in a process shows in the second one only.
SCRIPT = """
import torch
from evolver.merging.kernels import Kernels

def doubled(x, out):
    out.copy_(x * 2)
    return ()

def tripled(x, out):
    out.copy_(x * 3)
    return ()

x, build = torch.ones(100), {build}
for function in (doubled, tripled):
    out = torch.empty(100)
    kernel = Kernels(build).get(function, [x, out], [True, True], function.__name__)
    if kernel is None:
        print("none")
    else:
        kernel([x, out])
        print(int(out.sum()))
"""


def run(build):
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(build=build)],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, check=True,
    )  # fmt: skip
    return done.stdout.split()


def test_a_later_process_finds_what_an_earlier_one_compiled():
    if not can_compile(torch.device("cpu")):
        pytest.fail("no C++ compiler: nothing can be built here, so nothing would be tested")
    assert run(build=True) == ["200", "300"]
    assert run(build=False) == ["200", "300"]


def test_without_a_compiler_there_is_no_kernel(monkeypatch):
    monkeypatch.setattr("evolver.merging.kernels.can_compile", lambda device: False)
    x = torch.ones(10)
    assert Kernels().get(lambda x: (x,), [x], [True], "nowhere") is None


def test_options_are_what_the_exactness_of_kernels_rests_on():
    """No contraction of a product and a sum, and the threads of whoever calls."""
    assert OPTIONS == {"emulate_precision_casts": True, "cpp.dynamic_threads": True}
