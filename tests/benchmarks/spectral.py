"""What the methods on singular directions cost beside torch's own decompositions of the same matrices.

Prints rows of a Markdown table: ``python tests/benchmarks/spectral.py [emotion-l3] [square]``. Each method runs in a
process of its own, first with an empty cache of directions, and then again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from evolver.merging.engine.apply import apply  # noqa: E402
from evolver.merging.engine.pieces import InputTensors  # noqa: E402
from evolver.merging.methods import METHODS  # noqa: E402
from evolver.storage.paths import expand  # noqa: E402

# How many decompositions a method is made of: of each expert, of their sum, and of all directions side by side.
PARTS = {
    "tsv_m": (1, 0, 2),
    "r_tsvm": (1, 0, 2),
    "stf": (1, 0, 0),
    "dc_merge": (1, 0, 2),
    "iso_c": (0, 1, 0),
    "iso_cts": (1, 1, 2),
    "subspace_boosting": (0, 1, 0),
    "opcm": (1, 0, 0),
}
POOLS = ("emotion-l3", "square")
HEAD = ["models", "method", "first (s)", "again (s)", "torch (s)", "first ÷ torch", "peak (MB)", "limit (MB)"]
Model = dict[str, torch.Tensor]


def models(pool: str) -> list[Model]:
    """The base and its experts: those of a pool on this machine, or two of one matrix (2048, 2048)."""
    if pool == "square":
        draw = torch.Generator().manual_seed(0)
        base = torch.randn((2048, 2048), generator=draw) * 0.02
        return [{"w": t} for t in (base, *(base + torch.randn(base.shape, generator=draw) * 1e-3 for _ in range(2)))]
    folder = Path(expand("$EVOLVER_CACHE")) / "experts" / pool
    experts = sorted(f for f in folder.iterdir() if (f / "model.safetensors").is_file() and f.name != "base")
    files = [f / "model.safetensors" for f in (folder / "base", *experts)]
    return [{n: t.clone() for n, t in load_file(file).items()} for file in files]  # read now, not when they are used


def merge(name: str, given: list[Model]) -> None:
    base, *experts = given
    values = METHODS[name].complete({}, len(experts), name)
    ids = [str(i) for i in range(len(experts))]
    for tensor, origin in base.items():
        if origin.is_floating_point() and all(e[tensor].shape == origin.shape for e in experts):
            apply(METHODS[name], values, InputTensors(tensor, [e[tensor] for e in experts], origin, ids, 0.5, {}))


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def decompositions(name: str, given: list[Model]) -> None:
    """torch's own decompositions of the matrices that the method is defined by; none of matrices of zeros."""
    of_experts, of_sum, of_all = PARTS[name]
    base, *experts = given
    for tensor, origin in base.items():
        if origin.dim() != 2 or min(origin.shape) < len(experts) or experts[0][tensor].shape != origin.shape:
            continue
        deltas = [d for e in experts if (d := e[tensor].float() - origin.float()).any()]
        found = [torch.linalg.svd(d, full_matrices=False) for d in deltas] if of_experts and deltas else []
        if of_sum and deltas:
            torch.linalg.svd(torch.stack(deltas).sum(0), full_matrices=False)
        if of_all and deltas:
            count = min(origin.shape) // len(experts)
            torch.linalg.svd(torch.cat([u[:, :count] for u, _, _ in found], 1), full_matrices=False)
            torch.linalg.svd(torch.cat([v[:count] for _, _, v in found]), full_matrices=False)


def memory(what: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


def measured(name: str, pool: str) -> dict[str, float]:
    """Seconds and bytes of one method, in this process, which did nothing else before."""
    given = models(pool)
    largest = max(4 * t.numel() for t in given[0].values() if t.is_floating_point())
    begun = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    with tempfile.TemporaryDirectory() as cache:
        os.environ["EVOLVER_CACHE"] = cache
        first, again = (seconds(lambda: merge(name, given)) for _ in range(2))
    peak = memory("VmHWM") - begun
    return {
        "first": first,
        "again": again,
        "torch": min(seconds(lambda: decompositions(name, given)) for _ in range(2)),
        "peak": peak + largest * (len(given) - 1),  # the experts' tensor is there before
        "limit": largest * (len(given) - 1 + 4) + (1 << 29),
    }


def rows(pools: list[str]) -> list[list[str]]:
    out = []
    for pool in pools:
        for name in PARTS:
            done = subprocess.run([sys.executable, __file__, "--one", name, pool], stdout=subprocess.PIPE, check=True)
            found = json.loads(done.stdout)
            times = [f"{found[k]:.2f}" for k in ("first", "again", "torch")]
            sizes = [f"{found[k] / 1e6:.0f}" for k in ("peak", "limit")]
            out.append([pool, f"`{name}`", *times, f"{found['first'] / found['torch']:.2f}", *sizes])
            print("| " + " | ".join(out[-1]) + " |", flush=True)
    return out


def main() -> None:
    if sys.argv[1:2] == ["--one"]:
        print(json.dumps(measured(*sys.argv[2:])))
        return
    print("| " + " | ".join(HEAD) + " |\n|" + " --- |" * len(HEAD), flush=True)
    rows(sys.argv[1:] or list(POOLS))


if __name__ == "__main__":
    main()
