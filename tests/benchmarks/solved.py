"""What methods on whole matrices cost beside torch's own decompositions: ``python tests/benchmarks/solved.py``.

It merges a base and its experts (default: emotion-l3) tensor by tensor in memory, every method in a process of its own,
and prints Markdown rows: seconds of one processor with an empty cache of directions, seconds again, and the peak of
memory above what the models take. Seconds are those that the process ran, so that other programs do not count. The
first rows are what torch.linalg.svd of every task vector takes, and torch.linalg.eigh of the Gram matrix of every task
vector.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from evolver.merging.engine.apply import apply
from evolver.merging.engine.pieces import InputTensors
from evolver.merging.methods import METHODS
from evolver.storage.paths import expand

POOL = Path("$EVOLVER_CACHE/experts/emotion-l3")
OWN = ["swudi", "optmerge", "ace", "drm", "knots", "core_space", "doge_ta", "do_merging"]
TORCH = {"svd": "torch's svd of every task vector", "eigh": "torch's eigh of every Gram matrix"}
Models = Sequence[dict[str, Tensor]]


def main() -> None:
    """Measure every method that is named, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="*", default=OWN, help=f"default: {', '.join(OWN)}")
    parser.add_argument("--pool", type=Path, default=Path(expand(str(POOL))), help="a folder with base and experts")
    parser.add_argument(
        "--setting", action="append", default=[], metavar="NAME=VALUE", help="as JSON; for every method"
    )
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    settings = {name: json.loads(value) for name, value in (s.split("=", 1) for s in given.setting)}
    if given.one:
        print(json.dumps(measured(given.one, given.pool, settings)))
        return
    print("| what | seconds | seconds again | beside svd | peak memory, MB |\n|---|---|---|---|---|")
    svd = None
    for name in [*TORCH, *given.methods]:
        found = in_own_process(name, given.pool, given.setting if name not in TORCH else [])
        svd = svd or found["first"]
        print(
            f"| {TORCH.get(name, name)} | {found['first']:.2f} | {found['again']:.2f} | {found['first'] / svd:.2f} | "
            f"{found['peak']:.0f} |",
            flush=True,
        )


def in_own_process(name: str, pool: Path, settings: Sequence[str]) -> dict[str, float]:
    """Seconds and megabytes of one method, with a cache of its own."""
    more = [word for setting in settings for word in ("--setting", setting)]
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, __file__, "--one", name, "--pool", str(pool), *more]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"EVOLVER_CACHE": cache})
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def measured(name: str, pool: Path, settings: dict[str, object]) -> dict[str, float]:
    """Processor seconds of a merge of all tensors, of a second one, and the peak of memory above the models, MB."""
    folders = sorted(f for f in pool.iterdir() if f.is_dir() and f.name != "base")
    base, *experts = (load_file(folder / "model.safetensors") for folder in [pool / "base", *folders])
    run = decomposing(name) if name in TORCH else merging(name, settings, len(experts))
    names = [n for n in base if base[n].is_floating_point() and all(n in e for e in experts)]
    touched = sum(float(model[n].flatten()[0]) for model in (base, *experts) for n in names)
    assert touched == touched
    torch.set_num_threads(1)
    held, taken = _memory(), []
    for _ in range(2):
        began = time.process_time()
        for tensor in names:
            run(tensor, base[tensor], [e[tensor] for e in experts])
        taken.append(time.process_time() - began)
    return {"first": taken[0], "again": taken[1], "peak": _memory() - held}


def merging(name: str, settings: dict[str, object], experts: int) -> Callable[[str, Tensor, list[Tensor]], Tensor]:
    """The method with its defaults, but for the settings that it knows."""
    method = METHODS[name]
    values = method.complete({k: v for k, v in settings.items() if k in method.settings}, experts, "settings")
    ids = [str(n) for n in range(experts)]
    return lambda tensor, base, inputs: apply(method, values, InputTensors(tensor, inputs, base, ids, None, {}))


def decomposing(name: str) -> Callable[[str, Tensor, list[Tensor]], None]:
    """torch's own decomposition of every task vector that is a matrix and moved, in float32."""

    def decompose(_: str, base: Tensor, inputs: list[Tensor]) -> None:
        for expert in inputs:
            delta = expert.float() - base.float()
            if delta.dim() == 2 and delta.any():
                if name == "svd":
                    torch.linalg.svd(delta, full_matrices=False)
                else:
                    torch.linalg.eigh(delta.T @ delta)

    return decompose


def _memory() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


if __name__ == "__main__":
    main()
