"""What every merge method costs, beside a copy and torch's own decompositions: ``make benchmark-methods-cost``.

``python tests/benchmarks/methods_cost.py [METHOD …] [--pool FOLDER] [--large]`` writes
results/benchmarks/methods_cost.json, and the page methods_cost.md of all that this file holds. A method runs in a
process of its own, which reads the base and its experts tensor by tensor and merges them. Three limits are checked:

- methods that look at each scalar once may take twice as long as a copy of the bytes that they read and write;
- methods made of decompositions may take 1.5 times as long as torch takes for those of the same matrices;
- no method may take more memory than the largest tensor (in float32) times the number of experts + 4, and 0.5 GB.

``--large`` does the same with a model of 3 GB with random weights, which it writes to a temporary folder. Methods on
whole tensors, which take too long there, merge one tensor of each shape, and only their memory is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from evolver.merging.engine import apply as engine  # noqa: E402
from evolver.merging.engine.pieces import InputTensors  # noqa: E402
from evolver.merging.methods import METHODS, Method, Of  # noqa: E402
from evolver.report.text import markdown_table  # noqa: E402
from evolver.storage.paths import expand  # noqa: E402

KEPT = ROOT / "results" / "benchmarks" / "methods_cost.json"
POOL, LARGE = "$EVOLVER_CACHE/experts/emotion-l3", "random, 3 GB"
EXPERTS, WIDTH, INNER, LAYERS, VOCABULARY = 3, 2048, 5632, 13, 32000  # of the large model
# Settings that have no default, and one at whose default nothing is thinned out.
GIVEN = {"t": 0.3, "measured": 0.7, "density": 0.5}
PASS_LIMIT, PARTS_LIMIT, MORE_TENSORS, MORE_BYTES = 2.0, 1.5, 4, 1 << 29
ROUNDS, LONG_SECONDS = 3, 5.0
Found = dict[str, Any]
Merge = Callable[[InputTensors, engine.AllTensors | None], Tensor]


# Torch's decompositions: of the task vectors of one matrix, and of the Grams of the experts' inputs where it has some.


def _of_each(deltas: Sequence[Tensor], _: Sequence[Tensor]) -> None:
    """The singular directions of each task vector."""
    for delta in deltas:
        torch.linalg.svd(delta, full_matrices=False)


def _of_sum(deltas: Sequence[Tensor], _: Sequence[Tensor]) -> None:
    """Those of their sum."""
    torch.linalg.svd(torch.stack(list(deltas)).sum(0), full_matrices=False)


def _of_directions(deltas: Sequence[Tensor], _: Sequence[Tensor]) -> None:
    """Two matrices as large as the left and the right directions of all experts side by side."""
    count = min(deltas[0].shape) // len(deltas)
    for sides in ([d[:, :count] for d in deltas], [d.T[:, :count] for d in deltas]):
        torch.linalg.svd(torch.cat(sides, 1), full_matrices=False)


def _of_products(deltas: Sequence[Tensor], _: Sequence[Tensor]) -> None:
    """The eigenvectors of the sum of all τᵀτ."""
    _eigen(torch.cat(list(deltas)).T)


def _of_row(deltas: Sequence[Tensor], _: Sequence[Tensor]) -> None:
    """The shared basis of the columns: of all task vectors side by side."""
    _eigen(torch.cat(list(deltas), 1))


def _of_column(deltas: Sequence[Tensor], _: Sequence[Tensor]) -> None:
    """The shared basis of the rows: of all task vectors one below the other."""
    _eigen(torch.cat([d.T for d in deltas], 1))


def _of_grams(_: Sequence[Tensor], grams: Sequence[Tensor]) -> None:
    """The eigenvectors of the sum of the inputs' Grams."""
    if grams:
        torch.linalg.eigh(torch.stack([g.double() for g in grams]).sum(0))


def _eigen(matrix: Tensor) -> None:
    """Of the smaller product of a matrix, in float64, as squares have half the digits."""
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().T
    torch.linalg.eigh(wide @ wide.T)


Part = Callable[[Sequence[Tensor], Sequence[Tensor]], None]
# What a method is made of, by its definition.
PARTS: dict[str, list[Part]] = {
    "tsv_m": [_of_each, _of_directions], "r_tsvm": [_of_each, _of_directions], "dc_merge": [_of_each, _of_directions],
    "stf": [_of_each], "opcm": [_of_each], "doge_ta": [_of_each], "do_merging": [_of_each],
    "iso_c": [_of_sum], "subspace_boosting": [_of_sum], "iso_cts": [_of_each, _of_sum, _of_directions],
    "swudi": [_of_products], "ace": [_of_products], "bayes_mm_free": [_of_products],
    "optmerge": [_of_each, _of_products],
    "drm": [_of_row], "knots": [_of_row], "core_space": [_of_row, _of_column],
    "regmean": [_of_grams], "bayes_mm": [_of_grams],
}  # fmt: skip
# Most of what these take are steps of gradient descent.
DESCENDING = ("doge_ta", "do_merging")


# Models: one file for each tensor, so that none is in memory before it is read.


def shapes() -> dict[str, tuple[int, ...]]:
    """The tensors of the large model."""
    out: dict[str, tuple[int, ...]] = {"embed": (VOCABULARY, WIDTH)}
    for layer in range(LAYERS):
        out |= {f"layers.{layer}.{p}.weight": (WIDTH, WIDTH) for p in "qkvo"}
        out |= {f"layers.{layer}.{p}.weight": (INNER, WIDTH) for p in ("gate", "up")}
        out |= {f"layers.{layer}.down.weight": (WIDTH, INNER), f"layers.{layer}.norm": (WIDTH,)}
    return out


def write_large(folder: Path) -> None:
    """A base with random weights, and experts near it."""
    draw = np.random.default_rng(0)
    for number in range(EXPERTS + 1):
        (folder / str(number)).mkdir()
    for name, shape in shapes().items():
        base = draw.standard_normal(shape, np.float32) * np.float32(0.02)
        np.save(folder / "0" / f"{name}.npy", base)
        for number in range(1, EXPERTS + 1):
            moved = base + np.float32(1e-3) * draw.standard_normal(shape, np.float32)
            np.save(folder / str(number) / f"{name}.npy", moved)


def write_pool(folder: Path, pool: Path) -> None:
    """A base and its experts, without what only one of them has."""
    experts = sorted(f for f in pool.iterdir() if (f / "model.safetensors").is_file() and f.name != "base")
    models = [load_file(f / "model.safetensors") for f in (pool / "base", *experts)]
    for number, model in enumerate(models):
        (folder / str(number)).mkdir()
        for name, tensor in model.items():
            if tensor.is_floating_point() and all(m[name].shape == tensor.shape for m in models if name in m):
                np.save(folder / str(number) / f"{name}.npy", tensor.float().numpy())


class Models:
    """The base and as many experts as a method takes, read tensor by tensor."""

    def __init__(self, folder: Path, method: Method, one_of_each_shape: bool) -> None:
        found = sorted((f for f in folder.iterdir() if f.name.isdigit()), key=lambda f: int(f.name))
        self.folders, self.method = found[: 1 + (method.takes or len(found))], method
        self.count = len(self.folders) - 1
        sizes = {f.stem: np.load(f, mmap_mode="r").shape for f in sorted(self.folders[0].glob("*.npy"))}
        self.shapes = {n: s for n, s in sizes.items() if all((f / f"{n}.npy").exists() for f in self.folders)}
        if one_of_each_shape:
            self.shapes = {n: s for s, n in {s: n for n, s in self.shapes.items()}.items()}

    def __iter__(self) -> Iterator[InputTensors]:
        """Every tensor of all models, afresh."""
        ids = [str(n) for n in range(self.count)]
        for name in self.shapes:
            base, *inputs = (torch.from_numpy(np.load(f / f"{name}.npy")) for f in self.folders)
            statistics = {p: self._statistics(of, name, base) for p, of in self.method.statistics.items()}
            yield InputTensors(name, inputs, base, ids, 0.5, statistics)

    def _statistics(self, of: Of, name: str, base: Tensor) -> list[Tensor] | None:
        """Random ones of every model: those of inputs belong to the matrices of layers only."""
        draw, wide = torch.Generator().manual_seed(0), base.shape[-1]
        if of.statistic in ("gram", "activation") and (base.dim() != 2 or "embed" in name):
            return None
        if of.statistic == "gram":
            inputs = [torch.randn(2 * wide, wide, generator=draw) for _ in range(self.count)]
            return [x.T @ x for x in inputs]
        shape = base.shape[-1:] if of.statistic == "activation" else base.shape
        return [torch.rand(shape, generator=draw) for _ in range(self.count)]

    @property
    def largest(self) -> int:
        """Bytes of the largest tensor in float32."""
        return max(4 * math.prod(s) for s in self.shapes.values())

    @property
    def size(self) -> int:
        """Scalars of a model."""
        return sum(math.prod(s) for s in self.shapes.values())


# Measurements


def measured(name: str, folder: Path, large: bool) -> Found:
    """Seconds and bytes of one method, in this process, which did nothing else before."""
    torch.set_num_threads(1)
    method = METHODS[name]
    models = Models(folder, method, large and method.whole)
    merge, tiny, ids = merging(method, models.count), torch.zeros(4, 4), [str(n) for n in range(models.count)]
    merge(InputTensors("tiny", [tiny + 1] * models.count, tiny, ids, 0.5), None)  # what is loaded at first use
    with passes() as asked:
        found = peak_of(merge, models)
    found |= {
        "memory": found["peak"] / models.largest,
        "limit": models.largest * (models.count + MORE_TENSORS) + MORE_BYTES,
        "kind": kind_of(method, not asked),
    }
    if large:
        if method.whole:
            del found["first"]
        else:
            found["copy"] = copy_all(models)
    else:
        tensors = list(models)
        found |= rounds(merge, models, tensors)
        if name in PARTS:
            found["torch"] = min(decomposing(PARTS[name], models, tensors) for _ in range(2))
    return found | ({"time": found["first"] / found["copy"]} if "copy" in found else {})


@contextmanager
def passes() -> Iterator[list[str]]:
    """What methods ask about tensors, each answered by a pass: the kinds of questions, and no tensor of them."""
    asked: list[str] = []
    answered = engine._answered

    def noted(parts: Any, size: int, question: Any, known: Any) -> Tensor:
        asked.append(question.kind)
        return answered(parts, size, question, known)

    with mock.patch.object(engine, "_answered", noted):
        yield asked


def kind_of(method: Method, one_pass: bool) -> str:
    """How a method works, which decides about its limit of time."""
    if method.name in PARTS:
        return "gradient steps" if method.name in DESCENDING else "decompositions"
    if method.whole:
        return "whole tensors"
    return "one pass" if one_pass else "several passes"


def merging(method: Method, count: int) -> Merge:
    """A merge of one tensor at the method's defaults, or at ``GIVEN`` where it has none or leaves all as it is."""
    needed = {n for n, s in method.settings.items() if s.required or s.default == (1.0,)}
    given = {n: GIVEN[n] for n in needed & set(GIVEN)}
    values = method.complete(given, count, method.name)
    return lambda tensors, model: engine.apply(method, values, tensors, model)


def peak_of(merge: Merge, models: Models) -> Found:
    """Bytes at most while the models are read and merged tensor by tensor, and the seconds of that."""
    begun = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    with new_cache():
        first = merge_all(merge, models, models)
    return {"peak": _memory("VmHWM") - begun, "first": first}


def rounds(merge: Merge, models: Models, tensors: Sequence[InputTensors]) -> Found:
    """The least processor seconds of a copy, of a merge, and of one with what the merge before it left in caches."""
    copies, firsts, agains = [], [], []
    for _ in range(ROUNDS):
        with new_cache():
            copies.append(copy_all(tensors))
            firsts.append(merge_all(merge, models, tensors))
            agains.append(merge_all(merge, models, tensors))
        if firsts[0] > LONG_SECONDS:
            break
    return {"copy": min(copies), "first": min(firsts), "again": min(agains)}


@contextmanager
def new_cache() -> Iterator[None]:
    """A cache of decompositions in which nothing is."""
    with tempfile.TemporaryDirectory() as cache, mock.patch.dict(os.environ, EVOLVER_CACHE=cache):
        yield


def copy_all(tensors: Iterable[InputTensors]) -> float:
    """Processor seconds in which a copy moves as many bytes as a merge reads and writes, into new memory as it does."""
    taken = 0.0
    for each in tensors:
        began = time.process_time()
        target = each.base.clone()
        cloned = time.process_time()
        for tensor in each.inputs:
            target.copy_(tensor)
        # Each copy reads and writes. A merge reads the base and the inputs and writes once: half of these are enough.
        taken += cloned - began + (time.process_time() - cloned) / 2
    return taken


def merge_all(merge: Merge, models: Models, tensors: Iterable[InputTensors]) -> float:
    """Processor seconds of merging all tensors; those of reading them are not counted."""
    model, taken = engine.AllTensors(models.size, lambda: tensors), 0.0
    for each in tensors:
        began = time.process_time()
        merge(each, model)
        taken += time.process_time() - began
    return taken


def decomposing(parts: Sequence[Part], models: Models, all_tensors: Iterable[InputTensors]) -> float:
    """Processor seconds of torch's decompositions of all matrices that moved."""
    taken = 0.0
    for tensors in all_tensors:
        if tensors.base.dim() == 2 and min(tensors.base.shape) >= models.count:
            deltas = [d for i in tensors.inputs if (d := i - tensors.base).any()]
            grams = next((s for s in tensors.statistics.values() if s is not None), [])
            began = time.process_time()
            for part in parts if deltas else []:
                part(deltas, grams)
            taken += time.process_time() - began
    return taken


def _memory(what: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM at most."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(what)).split()[1])


# The page


def page(kept: Mapping[str, Mapping[str, Found]], about: Mapping[str, str]) -> str:
    """The page, of all figures that are kept."""
    parts = [HEAD]
    for pool, found in kept.items():
        rows = sorted((f["kind"], name, f) for name, f in found.items())
        over = [f"`{name}` ({', '.join(o)})" for _, name, f in rows if (o := broken(f))]
        parts += [f"## {pool}", about[pool], f"Over a limit: {', '.join(over) or 'none'}."]
        parts.append(markdown_table(COLUMNS, [row(name, f) for _, name, f in rows]))
    return "\n\n".join(parts) + "\n"


def row(name: str, found: Found) -> list[str]:
    """What the table says of a method."""
    ratio = {"one pass": PASS_LIMIT, "decompositions": PARTS_LIMIT}
    beside = beside_of(found)
    limit = f"{ratio[found['kind']]:g}" if found["kind"] in ratio and beside is not None else ""
    times = [f"{found[k]:.3g}" if k in found else "" for k in ("copy", "first", "again", "torch")]
    over_copy = f"{found['time']:.1f}" if "time" in found else ""
    over_torch = f"{found['first'] / found['torch']:.2f}" if "torch" in found else ""
    sizes = [f"{found[k] / 1e6:.0f}" for k in ("peak", "limit")]
    return [f"`{name}`", found["kind"], *times, over_copy, over_torch, limit, *sizes]


def beside_of(found: Found) -> float | None:
    """The ratio that has a limit: over the copy for one pass, over torch for decompositions."""
    if found["kind"] == "one pass":
        return found.get("time")
    return found["first"] / found["torch"] if found["kind"] == "decompositions" and "torch" in found else None


def broken(found: Found) -> list[str]:
    """Which limits a method exceeds."""
    beside, out = beside_of(found), []
    if beside is not None and beside > (PASS_LIMIT if found["kind"] == "one pass" else PARTS_LIMIT):
        out.append("time")
    return out + ["memory"] * (found["peak"] > found["limit"])


def said_of(pool: str, folder: Path) -> str:
    """On which models and under which circumstances the figures were measured."""
    count = sum(f.name.isdigit() for f in folder.iterdir()) - 1
    size = sum(f.stat().st_size for f in (folder / "0").glob("*.npy"))
    large = " Of methods on whole tensors only the memory, with one tensor of each shape." if pool == LARGE else ""
    return (
        f"A base and {count} experts of {size / 1e6:.0f} MB in float32, torch {torch.__version__}, one thread of "
        f"{os.cpu_count()} cores. Other programs ran beside this one: the load average was {os.getloadavg()[1]:.1f}."
        f"{large}"
    )


COLUMNS = [
    "method", "kind", "copy (s)", "merge (s)", "again (s)", "torch (s)", "÷ copy", "÷ torch", "may be", "peak (MB)",
    "limit (MB)",
]  # fmt: skip
HEAD = """\
# What merge methods cost

Made by `make benchmark-methods-cost`. Every method merges the models in a process of its own, tensor by tensor, at its
defaults (`density` is 0.5 where the default keeps everything). Seconds are those of the processor, so that other
programs count only in so far as they take away caches and memory bandwidth. Each figure is the least of up to three
rounds, with all models in memory.

- *kind*: `one pass` is a method that looks at each scalar once. It may take twice the time of the copy.
  `decompositions` may take 1.5 times as long as torch. The others have no limit of time; `gradient steps` are methods
  that go downhill in a loop, beside the decompositions that they begin with.
- *copy* moves as many bytes as the merge reads and writes, into new memory as the merge does.
- *merge* finds no decompositions in the cache, *again* those of the merge before.
- *torch* are torch's own decompositions of the matrices that the method is defined by: `svd` in float32, and `eigh` of
  products in float64, with the products.
- *peak* is the process's memory above what it had before it read the first tensor, with the tensors of the base and of
  all experts. The limit is the largest tensor times the number of experts + 4, and 0.5 GB.

Methods that need statistics get random ones. To make these counts in the peak.

`ace`, `swudi` and `bayes_mm_free` multiply each expert's matrix by its Gram, and their sum by the solution: 2·experts +
1 products of a matrix, where *torch* counts one for each expert. On matrices with many more rows than columns, such as
embeddings, the products are nearly all of the work, and the limit of 1.5 is out of reach. `led` is handed two
statistics of each expert, which are as large as the experts themselves."""


def main() -> None:
    """Measure the methods that are named, or all, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=sorted(METHODS))
    parser.add_argument("--pool", type=Path, default=Path(expand(POOL)), help="a folder with base and experts")
    parser.add_argument("--large", action="store_true", help="a model of 3 GB with random weights instead")
    parser.add_argument("--one", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(measured(given.methods[0], given.one, given.large)))
        return
    pool = LARGE if given.large else given.pool.name
    with tempfile.TemporaryDirectory() as scratch:
        write_large(Path(scratch)) if given.large else write_pool(Path(scratch), given.pool)
        for name in given.methods:
            command = [sys.executable, __file__, "--one", scratch, name, *["--large"] * given.large]
            done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
            keep(pool, name, json.loads(done.stdout), said_of(pool, Path(scratch)))


def keep(pool: str, name: str, found: Found, about: str) -> None:
    """Write the figures of a method, and the page anew."""
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {"about": {}, "pools": {}}
    kept["about"][pool] = about
    kept["pools"].setdefault(pool, {})[name] = found
    KEPT.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
    KEPT.with_suffix(".md").write_text(page(kept["pools"], kept["about"]))
    print("| " + " | ".join(row(name, found)) + " |", flush=True)


if __name__ == "__main__":
    main()
