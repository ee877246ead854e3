"""What merging and scoring cost on a GPU, and whether the bits are the CPU's: ``make gpu`` writes
results/benchmarks/gpu.md.

Needs torch, transformers and an accelerator, nothing else: no model, no data.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from evolver.evaluation.language.decoder import DecoderOnly  # noqa: E402
from evolver.evaluation.language.loglikelihood import Group, LogLikelihoods  # noqa: E402
from evolver.kernels.compiled import Kernels  # noqa: E402
from evolver.merging import crossing  # noqa: E402

KERNELS = Kernels()

PAGE = ROOT / "results" / "benchmarks" / "gpu.md"
ROUNDS = 5
# Llama 2 7B (Touvron et al. 2023): 32 layers of width 4,096 with 11,008 inner units, and a vocabulary of 32,000.
WIDTH, INNER, VOCABULARY, LAYERS = 4096, 11008, 32000, 32
LAYER = [(WIDTH, WIDTH)] * 4 + [(INNER, WIDTH)] * 2 + [(WIDTH, INNER)] + [(WIDTH,)] * 2
SHAPES = [(VOCABULARY, WIDTH)] * 2 + LAYER * LAYERS + [(WIDTH,)]


def model(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    return [torch.randn(s, generator=generator, device="cuda", dtype=torch.bfloat16) * 0.02 for s in SHAPES]


def seconds(work: Callable[[], object]) -> float:
    """Median of ROUNDS, after one round that compiles and warms up."""
    work()
    times = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def offspring(strategy: str, models: Sequence[Sequence[torch.Tensor]]) -> None:
    parent, *partners = models
    for i, tensor in enumerate(parent):
        crossing.cross(strategy, tensor, [p[i] for p in partners], 0.5, 0.5, 7, f"tensor.{i}", KERNELS)


def offspring_ratio() -> float:
    """An offspring of two parents ÷ a device-to-device copy that moves the same bytes (two reads, one write)."""
    models = [model(seed) for seed in range(2)]
    size = sum(t.numel() for t in models[0])
    source = torch.empty(size * 3 // 2, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copy = seconds(lambda: target.copy_(source))
    ours = seconds(lambda: offspring("evolver", models))
    print(f"offspring {ours:.4f} s, copy {copy:.4f} s, ratio {ours / copy:.2f}")
    return ours / copy


def differing_scalars() -> dict[str, int]:
    """Scalars of an offspring whose bits differ between GPU and CPU, for every strategy and dtype."""
    generator = torch.Generator().manual_seed(0)
    out = {}
    for strategy, (_, partners) in crossing.STRATEGIES.items():
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            tensors = [torch.randn(1537, 1024, generator=generator).to(dtype) for _ in range(partners + 1)]
            here = crossing.cross(strategy, tensors[0], tensors[1:], 0.37, 0.6, 11, "w")
            there = crossing.cross(
                strategy, tensors[0].cuda(), [t.cuda() for t in tensors[1:]], 0.37, 0.6, 11, "w", KERNELS
            )
            out[f"{strategy} {str(dtype).removeprefix('torch.')}"] = int((here != there.cpu()).sum())
    return out


class Random:
    """A Llama of random weights in the place of a live model."""

    def __init__(self, device: str, width: int = 2048, layers: int = 16, vocabulary: int = 49152) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
            num_key_value_heads=width // 64, vocab_size=vocabulary, max_position_embeddings=4096, dtype=torch.bfloat16,
        )  # fmt: skip
        self.device = torch.device(device)
        with self.device:
            self.module = LlamaForCausalLM(config).to(torch.bfloat16).eval()


def questions(count: int, vocabulary: int) -> dict[int, Group]:
    """Items of four choices of a few tokens behind a context of 50 to 150."""
    draw = torch.Generator().manual_seed(0)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        size = int(torch.randint(low, high, (), generator=draw))
        return tuple(torch.randint(vocabulary, (size,), generator=draw).tolist())

    groups = {}
    for number in range(count):
        context = tokens(50, 150)
        groups[number] = Group(tuple((context, tokens(1, 6)) for _ in range(4)))
    return groups


def scoring_speed(model: Random, count: int, batch_tokens: int, time: Callable[[Callable[[], object]], float]) -> float:
    """Tokens per second of scoring ÷ those of the bare forward passes on the same batches."""
    forward = DecoderOnly(model, 4096)  # type: ignore[arg-type]  # it has what is needed of a live model
    likely, groups = LogLikelihoods(forward, batch_tokens, None), questions(count, model.module.config.vocab_size)
    likely(groups)
    inputs = [forward.inputs(b) for _, batches, _ in likely._ready.values() for _, b in batches._batches]

    def bare() -> None:
        with torch.inference_mode():
            for given in inputs:
                model.module(**given)

    limit, ours = time(bare), time(lambda: likely(groups))
    print(f"scoring {ours:.3f} s, bare forward passes {limit:.3f} s, ratio {limit / ours:.3f}")
    return limit / ours


def main() -> None:
    if not torch.cuda.is_available():
        sys.exit("make gpu: torch sees no GPU here; run it on a machine that has one.")
    ratio, differing = offspring_ratio(), sum(differing_scalars().values())
    speed = scoring_speed(Random("cuda"), 1000, 1 << 15, seconds)
    PAGE.write_text(
        f"# Evolver on a GPU\n\n{torch.cuda.get_device_name()}, torch {torch.__version__}; a model of the "
        f"shapes of Llama 2 7B, bfloat16, median of {ROUNDS}. Made by `make gpu`.\n\n"
        f"| figure | value | must reach |\n| --- | --- | --- |\n"
        f"| offspring ÷ device-to-device copy of the same bytes | {ratio:.2f} | 1.3 |\n"
        f"| scalars whose bits differ from the CPU's | {differing} | 0 |\n"
        "| tokens per second of scoring 1,000 four-choice items ÷ bare forward passes, 1.3 G parameters | "
        f"{speed:.3f} | ≥ 0.95 |\n"
    )


if __name__ == "__main__":
    main()
