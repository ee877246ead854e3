"""What merging costs against the copy of the same bytes, and against mergekit: ``make benchmark-merging``.

Writes results/benchmarks/merging.md. Models are random, of the size and shapes of SmolLM2-135M; five experts, bfloat16.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
import yaml
from safetensors.torch import save_file

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from evolver.kernels import native, random  # noqa: E402
from evolver.merging import crossing  # noqa: E402
from evolver.merging.engine.apply import apply  # noqa: E402
from evolver.merging.engine.pieces import InputTensors  # noqa: E402
from evolver.merging.methods import METHODS  # noqa: E402

EVOLVER = Path(sys.executable).parent / "evolver"
PAGE = ROOT / "results" / "benchmarks" / "merging.md"
ROUNDS = 5
EXPERTS = 5
WIDTH, INNER, LAYERS, VOCABULARY, KEYS = 576, 1536, 30, 49152, 192
CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": INNER,
    "num_hidden_layers": LAYERS, "num_attention_heads": 9, "num_key_value_heads": 3, "vocab_size": VOCABULARY,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "dtype": "bfloat16",
}  # fmt: skip
# What mergekit's time over ours must reach, by method; others must reach 1.
GOALS = {"linear": 2.5, "task_arithmetic": 2.5, "model_stock": 2.0, "dare_ties": 5.0, "ties": 10.0, "della": 10.0}
# Method, settings, how many models it takes, and the limit of its time over the copy's.
CASES = [
    ("linear", {}, EXPERTS, 2.0),
    ("task_arithmetic", {}, EXPERTS, 2.0),
    ("dare_linear", {"density": 0.5}, EXPERTS, 2.0),
    ("ties", {"density": 0.2}, EXPERTS, 12.0),
    ("della", {"density": 0.5}, EXPERTS, 12.0),
    ("breadcrumbs", {"density": 0.8, "gamma": 0.01}, EXPERTS, 12.0),
    ("sce", {"select_topk": 0.3}, EXPERTS, 12.0),
    ("dare_linear", {"density": 0.5, "rescale": "inv_p"}, EXPERTS, 2.0),
    ("dare_ties", {"density": 0.5}, EXPERTS, None),
    ("slerp", {"t": 0.3}, 2, None),
    ("model_stock", {}, EXPERTS, None),
    ("karcher", {}, EXPERTS, None),
]


def shapes() -> dict[str, tuple[int, ...]]:
    out: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCABULARY, WIDTH), "model.norm.weight": (WIDTH,)}
    for layer in range(LAYERS):
        at = f"model.layers.{layer}."
        out |= {f"{at}self_attn.{p}_proj.weight": (WIDTH, WIDTH) for p in "qo"}
        out |= {f"{at}self_attn.{p}_proj.weight": (KEYS, WIDTH) for p in "kv"}
        out |= {f"{at}mlp.{p}_proj.weight": (INNER, WIDTH) for p in ("gate", "up")}
        out |= {f"{at}mlp.down_proj.weight": (WIDTH, INNER)}
        out |= {f"{at}{p}_layernorm.weight": (WIDTH,) for p in ("input", "post_attention")}
    return out


Model = dict[str, torch.Tensor]


def models() -> list[Model]:
    """The base and five experts."""
    generator = torch.Generator().manual_seed(0)
    base = {n: torch.randn(s, generator=generator) * 0.05 for n, s in shapes().items()}
    moved = [
        {n: t + torch.randn(t.shape, generator=generator) * 0.003 for n, t in base.items()} for _ in range(EXPERTS)
    ]
    return [{n: t.bfloat16() for n, t in m.items()} for m in (base, *moved)]


def median(work: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Seconds, after one round that warms up."""
    began = time.perf_counter()
    work()
    if time.perf_counter() - began > 60:
        rounds = 1
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def copy_seconds(all_models: Sequence[Model], count: int) -> float:
    """A copy that moves the bytes of a merge: ``count`` models and the base read, one written."""
    targets = [{n: torch.empty_like(t) for n, t in m.items()} for m in all_models[:1]]
    sources = all_models[: count + 1]

    def copy(sources: Sequence[Model]) -> None:
        for model in sources:
            for name, tensor in model.items():
                targets[0][name].copy_(tensor)

    # A copy of one model reads and writes it: (count + 2) models' bytes are moved by (count + 2) / 2 such copies.
    return median(lambda: copy(sources)) / len(sources) * (count + 2) / 2


def merge(name: str, given: dict[str, object], count: int, all_models: Sequence[Model]) -> None:
    base, experts = all_models[0], all_models[1 : count + 1]
    weight = {"weight": 1 / count} if "weight" in METHODS[name].settings else {}
    values = METHODS[name].complete({**weight, **given}, count, name)
    for tensor, origin in base.items():
        apply(METHODS[name], values, InputTensors(tensor, [e[tensor] for e in experts], origin, list("abcde"[:count]), 0.5))  # fmt: skip  # noqa: E501


def offspring(all_models: Sequence[Model]) -> None:
    for name, tensor in all_models[1].items():
        crossing.cross("evolver", tensor, [all_models[2][name]], 0.5, 0.5, 7, name)


def in_memory(all_models: Sequence[Model]) -> list[list[str]]:
    rows = []
    for name, given, count, limit in CASES:
        copied = copy_seconds(all_models, count)
        with mock.patch.object(native, "library", return_value=None):
            began = time.perf_counter()
            merge(name, given, count, all_models)
            plain = time.perf_counter() - began
        looped = median(lambda: merge(name, given, count, all_models))  # noqa: B023
        ratio = looped / copied
        label = name + (" inv_p" if "rescale" in given else "")
        rows.append(
            [label, f"{copied:.3f}", f"{plain:.2f}", f"{looped:.3f}", f"{ratio:.1f}", f"{limit:g}" if limit else ""]
        )
        print(rows[-1], flush=True)
    copied = copy_seconds(all_models, 1)
    child = median(lambda: offspring(all_models))
    rows.append(["Evolver offspring", f"{copied:.3f}", "", f"{child:.3f}", f"{child / copied:.1f}", "5"])
    print(rows[-1], flush=True)
    return rows


def floors(all_models: Sequence[Model]) -> list[list[str]]:
    """What parts of a merge cost alone: the least that these methods can take with these parts."""
    copied, base = copy_seconds(all_models, EXPERTS), all_models[0]
    deltas = {n: (all_models[1][n].float() - t.float()).abs() for n, t in base.items()}

    def draw() -> None:
        for tensor in base.values():
            drawn = random.Drawn(1, list("abcde"), tensor.device)
            for start in range(0, tensor.numel(), 1 << 17):
                drawn.piece(start, [min(1 << 17, tensor.numel() - start)])

    def magnitudes() -> None:
        for n, t in base.items():
            for expert in all_models[1:]:
                torch.abs(expert[n].float() - t, out=deltas[n])

    works = {
        "the draws of five experts, once": draw,
        "magnitudes of five task vectors, written once (plain torch)": magnitudes,
    }
    seconds = {what: median(work, 3) for what, work in works.items()}
    return [[what, f"{s:.2f}", f"{s / copied:.1f}"] for what, s in seconds.items()]


def write(all_models: Sequence[Model], folder: Path) -> list[str]:
    paths = []
    for name, model in zip(("base", *(f"e{i}" for i in range(EXPERTS))), all_models, strict=True):
        (folder / name).mkdir()
        save_file(model, folder / name / "model.safetensors", metadata={"format": "pt"})
        (folder / name / "config.json").write_text(json.dumps(CONFIG))
        paths.append(str(folder / name))
    return paths


def configuration(name: str, given: dict[str, object], count: int, paths: Sequence[str]) -> dict[str, object]:
    base, experts = paths[0], paths[1 : count + 1]
    listed = [base, experts[0]] if name == "slerp" else experts
    weight = {"parameters": {"weight": 1 / count}} if "weight" in METHODS[name].settings and name != "karcher" else {}
    out: dict[str, object] = {
        "merge_method": name,
        "models": [{"model": m, **weight} for m in listed],
        "dtype": "bfloat16",
    }
    if name not in ("linear", "karcher"):
        out["base_model"] = base
    return out | ({"parameters": given} if given else {})


def seconds_of(command: Sequence[str], out: Path | None = None, rounds: int = 1, **environment: str) -> float:
    """The least of some calls: what disturbs one only adds to it. ``out`` is removed before each."""
    times = []
    for _ in range(rounds):
        if out is not None:
            shutil.rmtree(out, ignore_errors=True)
        began = time.perf_counter()
        subprocess.run(
            command, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"} | environment,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        times.append(time.perf_counter() - began)
    return min(times)


HEAD = (
    "method", "first call", "second call", "first call after --prepare", "mergekit",
    "mergekit ÷ second", "mergekit ÷ prepared", "must reach",
)  # fmt: skip


def whole_commands(mergekit: str | None, methods: Sequence[str] | None = None) -> str:
    """`evolver merge` as a user gets it, and `mergekit-yaml`: a section of a page. See ``whole_rows``."""
    return (
        "## Whole command, file to file\n\nWall seconds of `evolver merge` from an empty cache: the first call, which "
        "compiles the loop and reads all weights for their digests; the second (least of 3); and the first one of "
        "another empty cache, after `evolver doctor --prepare`. And of `mergekit-yaml` 0.1.5 (one call), in the same "
        f"run.\n\n{table(HEAD, whole_rows(mergekit, methods))}"
    )


def whole_rows(mergekit: str | None, methods: Sequence[str] | None = None) -> list[list[str]]:
    """`evolver merge` as a user gets it, every method from an empty cache, and `mergekit-yaml`: rows under HEAD.

    Args:
        mergekit: the command `mergekit-yaml` of another environment; without it its columns stay empty.
        methods: these only.
    """
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        paths = write(models(), folder)
        alone = seconds_of([sys.executable, "-c", "import torch"], rounds=3)
        rows.append(["(Python and torch alone)", "", f"{alone:.2f}", *[""] * 5])
        for name, given, count, _ in CASES:
            if "rescale" in given or (methods is not None and name not in methods):  # mergekit has no such rescale
                continue
            file = folder / f"{name}.yml"
            file.write_text(yaml.safe_dump(configuration(name, given, count, paths)))
            rows.append([name, *_whole_command(file, folder, mergekit), f"{GOALS.get(name, 1.0):g}"])
            print(rows[-1], flush=True)
    return rows


def _whole_command(file: Path, folder: Path, mergekit: str | None) -> list[str]:
    """Seconds of the first, the second and the first prepared call, and of mergekit, and what it is over ours."""
    ours, out = [str(EVOLVER), "merge", str(file), str(folder / "ours")], folder / "ours"
    empty, prepared = ({"EVOLVER_CACHE": tempfile.mkdtemp(dir=folder)} for _ in range(2))
    first = seconds_of(ours, out, **empty)
    second = seconds_of(ours, out, 3, **empty)
    seconds_of([str(EVOLVER), "doctor", "--prepare"], **prepared)
    after = seconds_of(ours, out, **prepared)
    shown = [f"{s:.2f}" for s in (first, second, after)]
    if mergekit is None:
        return [*shown, "", "", ""]
    theirs = seconds_of(
        [mergekit, str(file), str(folder / "theirs"), "--no-write-model-card", "--no-copy-tokenizer"], folder / "theirs"
    )
    return [*shown, f"{theirs:.2f}", f"{theirs / second:.1f}", f"{theirs / after:.1f}"]


WHY = """## What is short of its limit, and why

Limits are of the time over the copy's.

- `dare_*`, `della`: every scalar of every expert needs a draw of a counter-based generator (ten rounds of Philox, 16
  bits a draw, with vector instructions), and `rescale: l1` needs them twice, once for the norms and once for the merge.
  The draws alone, once, cost several copies (the table above).
- `ties`, `breadcrumbs`, `sce`: two or three passes over the experts and one small selection; each operation of a pass
  reads and writes a core's cache. `della` ranks every scalar in its row by counting leading bits: sorting the rows took
  three times as long on a processor of 2023, whose sort by vector instructions is slow.
- Tried and left: kernels of torch's compiler, one for every method, number of experts and dtype: 17 to 100 s each to
  compile, for an Evolver crossing as fast as the loop with AVX-512, and eight times slower without.
- Whole commands: starting Python and importing torch cannot be spared (first row), and files are read and written."""


def anonymous_mb(pid: int) -> float:
    """Memory of a process that is its own: pages of mapped files, which the system may drop at will, do not count."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0.0
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("RssAnon")), 0.0)


def peak_mb(command: list[str]) -> float:
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    peak = 0.0
    while process.poll() is None:
        peak = max(peak, anonymous_mb(process.pid))
        time.sleep(0.01)
    assert process.returncode == 0, command
    return peak


def memory() -> list[list[str]]:
    """Peaks of merges of five models of 1.5 GB above that of an interpreter with torch."""
    tile = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.05
    wide = {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 10, "vocab_size": 51200}
    dims = {"model.embed_tokens.weight": (51200, 2048)}
    for layer in range(10):
        at = f"model.layers.{layer}."
        dims |= {f"{at}self_attn.{p}_proj.weight": (2048, 2048) for p in "qkvo"}
        dims |= {f"{at}mlp.{p}_proj.weight": (8192, 2048) for p in ("gate", "up", "down")}
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for number in range(EXPERTS + 1):
            values = (tile + (number > 0) * 0.003 * torch.randn(tile.shape)).bfloat16()
            model = {
                n: values.repeat(-(-math.prod(d) // values.numel()))[: math.prod(d)].view(d) for n, d in dims.items()
            }
            place = folder / ("base" if number == 0 else f"e{number - 1}")
            place.mkdir()
            save_file(model, place / "model.safetensors", metadata={"format": "pt"})
            (place / "config.json").write_text(json.dumps(CONFIG | wide))
        paths = [str(folder / n) for n in ("base", *(f"e{i}" for i in range(EXPERTS)))]
        idle = peak_mb([sys.executable, "-c", "import evolver.commands.cli, time; time.sleep(1)"])
        for name, given in [("linear", {}), ("ties", {"density": 0.2}), ("dare_linear", {"density": 0.5}), ("sce", {"select_topk": 0.3})]:  # fmt: skip  # noqa: E501
            file = folder / f"{name}.yml"
            file.write_text(yaml.safe_dump(configuration(name, given, EXPERTS, paths)))
            peak = peak_mb([str(EVOLVER), "merge", str(file), str(folder / "out")])
            subprocess.run(["rm", "-rf", str(folder / "out")], check=True)
            rows.append([name, f"{idle:.0f}", f"{peak:.0f}", f"{peak - idle:.0f}", "1024"])
            print(rows[-1], flush=True)
    return rows


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(r) + " |" for r in [head, ["---"] * len(head), *rows])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mergekit", help="the command mergekit-yaml of another environment")
    parser.add_argument("--memory", action="store_true", help="also the peak memory of merges of five 1.5 GB models")
    parser.add_argument("--whole", action="store_true", help="print whole commands only, and write no page")
    parser.add_argument("--methods", nargs="*", help="these only; default: all")
    given = parser.parse_args()
    CASES[:] = [c for c in CASES if given.methods is None or c[0] in given.methods]
    if given.whole:
        print(whole_commands(given.mergekit))
        return
    all_models = models()
    scalars = sum(t.numel() for t in all_models[0].values())
    parts = [
        "# Merging against the copy and against mergekit",
        (
            f"Five experts and a base of {scalars / 1e6:.0f} M scalars (the shapes of SmolLM2-135M), bfloat16; "
            f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}. "
            "Made by `make benchmark-merging`."
        ),
        "## In memory",
        (
            "Copy: the time in which a plain copy moves the bytes that the merge reads and writes. Plain and loop: "
            "without and with the compiled loop, which is made once on a machine, in some two seconds. Medians, in "
            "seconds (plain: one run); the ratio is of the loop."
        ),
        table(["method", "copy", "plain", "loop", "ratio", "must reach"], in_memory(all_models)),
        "What some parts cost alone:",
        table(["part", "seconds", "÷ copy"], floors(all_models)),
        WHY,
    ]  # fmt: skip
    if given.mergekit:
        parts.append(whole_commands(given.mergekit))
    if given.memory:
        parts += [
            "## Peak memory",
            (
                "`evolver merge` of five models of 1.5 GB, file to file, in MB of the process's own memory (`RssAnon`; "
                "pages of the models' files are the system's to drop), above an "
                "interpreter with nothing but the command line, torch not yet imported."
            ),
            table(["method", "interpreter", "peak", "above", "must reach"], memory()),
        ]
    PAGE.write_text("\n\n".join(parts) + "\n")


if __name__ == "__main__":
    main()
