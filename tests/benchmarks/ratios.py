"""Speed and memory as ratios to what the machine itself does, compared with those that are committed: ``make ratios``.

Times of different machines cannot be compared, but a merge and a copy of the same bytes meet the same machine. Times
are processor time on one thread, which other processes disturb little, and the two works take turns, so that a change
of the machine's speed meets both. What threads gain is therefore not measured here, but by ``make benchmark-merging``.
``results/benchmarks/ratios.json`` keeps the ratios for each kind of processor. The exit status is 1 where a ratio has
grown by more than its factor, and 2 where the file has none for this kind of processor. ``--write`` keeps the ratios
that were measured.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import merging
import torch
import yaml

KEPT = Path(__file__).parents[2] / "results" / "benchmarks" / "ratios.json"
ROUNDS = 7
IN_MEMORY = {"linear": {}, "ties": {"density": 0.2}, "dare_ties": {"density": 0.5}, "model_stock": {}}
OFFSPRING = "time of an Evolver offspring ÷ copy of the same bytes"
FILES = "time of evolver merge, linear, ÷ reading and writing the same files"
MEMORY = "peak memory of evolver merge, {}, ÷ size of one shard"
PEAKS = ("linear", "ties")


def in_memory(method: str) -> str:
    """The name of the ratio of a method that merges tensors in memory."""
    return f"time of a merge in memory, {method}, ÷ copy of the same bytes"


# By what factor a ratio may grow. Two runs differed by 4 % in memory and by 23 % with files, which the system caches.
FACTORS = {
    **{in_memory(method): 1.3 for method in IN_MEMORY},
    OFFSPRING: 1.3,
    FILES: 1.5,
    **{MEMORY.format(method): 1.25 for method in PEAKS},
}


def grown(kept: Mapping[str, float], measured: Mapping[str, float]) -> list[str]:
    """A sentence for each ratio that has grown by more than its factor, and for each that is kept and not measured."""
    said = [f"{name}: it is kept, but was not measured" for name in kept if name not in measured]
    for name, ratio in measured.items():
        if name not in kept:
            said.append(f"{name}: it is {ratio:.2f}, and the file does not hold it")
        elif ratio > FACTORS[name] * kept[name]:
            said.append(f"{name}: it was {kept[name]:.2f}, is {ratio:.2f}, and may be {FACTORS[name] * kept[name]:.2f}")
    return said


def processor() -> str:
    """The kind of this processor: its vector instructions."""
    return torch.backends.cpu.get_cpu_capability()


def spent() -> float:
    """Seconds of processor time of this process and of those that it has waited for."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(used.ru_utime + used.ru_stime for used in both)


def turns(work: Callable[[], object], limit: Callable[[], object], rounds: int = ROUNDS) -> float:
    """The least processor time of a work over the least of the limit: what else the machine does adds to either.

    Both are done once before, and take turns.
    """
    times: dict[Callable[[], object], list[float]] = {work: [], limit: []}
    for number in range(rounds + 1):
        for done in times:
            began = spent()
            done()
            if number:
                times[done].append(spent() - began)
    return min(times[work]) / min(times[limit])


def measure_in_memory(models: Sequence[merging.Model]) -> dict[str, float]:
    """The ratios of merges and offspring of tensors that are in memory."""
    found = {}
    for method, given in IN_MEMORY.items():
        copy = copying(models, merging.EXPERTS)
        found[in_memory(method)] = turns(lambda: merging.merge(method, given, merging.EXPERTS, models), copy)  # noqa: B023
    return found | {OFFSPRING: turns(lambda: merging.offspring(models), copying(models, 1))}


def copying(models: Sequence[merging.Model], count: int) -> Callable[[], None]:
    """A copy that moves as many bytes as a merge of ``count`` models, which reads them and the base and writes one.

    A copy of one tensor reads it and writes it, so half of ``count + 2`` models are copied.
    """
    names = list(models[0]) * (count + 2)
    names = names[: len(names) // 2]
    targets = {name: torch.empty_like(tensor) for name, tensor in models[0].items()}
    sources = [(models[place // len(models[0])][name], targets[name]) for place, name in enumerate(names)]

    def copy() -> None:
        for source, target in sources:
            target.copy_(source)

    return copy


def measure_files(models: Sequence[merging.Model], folder: Path) -> dict[str, float]:
    """The ratios of whole commands, from files to files."""
    paths = merging.write(models, folder)
    size_mb = (Path(paths[0]) / "model.safetensors").stat().st_size / 2**20
    idle = merging.peak_mb([sys.executable, "-c", "import evolver.commands.cli, time; time.sleep(1)"])
    commands, found, out = {}, {}, folder / "out"
    for method in PEAKS:
        file = folder / f"{method}.yml"
        file.write_text(
            yaml.safe_dump(merging.configuration(method, dict(IN_MEMORY[method]), merging.EXPERTS, paths))
        )  # fmt: skip
        commands[method] = [str(merging.EVOLVER), "merge", str(file), str(out)]
        found[MEMORY.format(method)] = (merging.peak_mb(commands[method]) - idle) / size_mb
        shutil.rmtree(out)

    buffer = bytearray((Path(paths[0]) / "model.safetensors").stat().st_size)

    def merge() -> None:
        subprocess.run(
            commands["linear"], check=True, capture_output=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
        )  # fmt: skip
        shutil.rmtree(out)

    def read_and_write() -> None:
        for path in paths:
            with (Path(path) / "model.safetensors").open("rb", buffering=0) as file:
                file.readinto(buffer)
        (folder / "copy").write_bytes(buffer)

    return found | {FILES: turns(merge, read_and_write, 5)}


def main() -> int:
    """Measure all ratios, print them, and compare them with those that are kept, or keep them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="keep the ratios that are measured")
    given = parser.parse_args()
    torch.set_num_threads(1)
    models = merging.models()
    with tempfile.TemporaryDirectory() as folder:
        measured = measure_in_memory(models) | measure_files(models, Path(folder))
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for name, ratio in measured.items():
        print(f"{ratio:8.2f}  {name}")
    if given.write:
        kept[processor()] = {name: round(ratio, 3) for name, ratio in measured.items()}
        KEPT.write_text(json.dumps(kept, indent=1, ensure_ascii=False, sort_keys=True) + "\n")
        return 0
    if processor() not in kept:
        print(f"{KEPT} holds no ratios for {processor()}; keep these with: make ratios WRITE=1", file=sys.stderr)
        return 2
    said = grown(kept[processor()], measured)
    print("\n".join(said) or "no ratio has grown by more than its factor")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
