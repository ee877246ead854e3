"""The counter-based random function: the same bits on every device, whatever the chunks, the threads or the order.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3): ten rounds of two
32-bit multiplications turn (counter, key) into 128 random bits. Here the key is the seed, the counter the place of a
scalar in a model (tensor, flat offset), so a scalar's draw can be computed alone, anywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evolver.kernels import native
from evolver.kernels.compiled import Kernels

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
PHILOX_ROUNDS = 10
LOW32 = 0xFFFFFFFF

# A draw has 16 bits, so one call of Philox serves eight scalars. They do not lie side by side: each of the eight
# halves fills a run of LANES scalars, which keeps the kernel free of interleaving and so vectorised.
LEVELS = 1 << 16
HALVES = 8
LANES = 1024
BLOCK = HALVES * LANES

Words = tuple[Tensor, Tensor, Tensor, Tensor]


def philox4x32(counter: Words, key: tuple[Tensor, Tensor]) -> Words:
    """Four 32-bit random words for each counter.

    Args:
        counter: four int64 tensors of one shape, each element a 32-bit word.
        key: two int64 tensors that broadcast with them, each element a 32-bit word.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(PHILOX_ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]  # 64 bits, wrapped: & LOW32 mends the sign
        c0, c1, c2, c3 = (
            ((product1 >> 32) & LOW32) ^ c1 ^ k0,
            product1 & LOW32,
            ((product0 >> 32) & LOW32) ^ c3 ^ k1,
            product0 & LOW32,
        )
        k0, k1 = (k0 + WEYL[0]) & LOW32, (k1 + WEYL[1]) & LOW32
    return c0, c1, c2, c3


def stream_of(name: str) -> tuple[int, int]:
    """The two counter words that stand for a tensor: the first 64 bits of the SHA-256 of its name."""
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:8], "little")


def key_words(seed: int, name: str, device: torch.device) -> Tensor:
    """Seed and stream as one int64 tensor (4,): k0, k1, c2, c3. A tensor, so that a compiled kernel serves all."""
    return torch.tensor([seed & LOW32, (seed >> 32) & LOW32, *stream_of(name)], dtype=torch.int64, device=device)


def halves(words: Tensor, first: Tensor, blocks: int) -> list[Tensor]:
    """Draws in [0, 65536) for ``blocks`` whole blocks of 8,192 scalars, from block ``first`` (int64, ()) on.

    Returns:
        HALVES int64 tensors (blocks, LANES); side by side, (blocks, HALVES, LANES), they are in the scalars' order.
    """
    row = torch.arange(blocks, dtype=torch.int64, device=words.device)[:, None]
    lane = torch.arange(LANES, dtype=torch.int64, device=words.device)[None, :]
    place = (first + row) * LANES + lane
    low, high = place & LOW32, (place >> 32) & LOW32
    found = philox4x32((low, high, words[2].expand_as(low), words[3].expand_as(low)), (words[0], words[1]))
    return [half for word in found for half in (word & 0xFFFF, word >> 16)]


def fill(words: Tensor, first: Tensor, out: Tensor) -> tuple[()]:
    """Write draws to ``out``, float32 (blocks, HALVES, LANES), whose scalars lie in the order of their offsets.

    Floats hold them exactly, and kernels that compare whole numbers beside bfloat16 are not vectorised.
    """
    for place, half in enumerate(halves(words, first, out.shape[0])):
        out[:, place].copy_(half)
    return ()


class Drawn:
    """The draws of some tensors, piece by piece; may be asked by several threads.

    Args:
        seed: of all.
        names: of the tensors, or whatever else tells streams of draws apart.
        kernels: fused kernels for a GPU, where there are some; the bits are the same.
    """

    def __init__(self, seed: int, names: Sequence[str], device: torch.device, kernels: Kernels | None = None) -> None:
        self.device, self.kernels = device, kernels
        self.words = [key_words(seed, name, device) for name in names]
        self.plain_words = [words.tolist() for words in self.words]

    def piece(self, start: int, shape: Sequence[int]) -> list[Tensor]:
        """For every tensor the draws of its scalars from ``start`` on, float32, in that shape."""
        first, skip = divmod(start, BLOCK)
        count = math.prod(shape)
        blocks = -(-(skip + count) // BLOCK)
        return [
            self._blocks(n, first, blocks).view(-1)[skip : skip + count].view(*shape) for n in range(len(self.words))
        ]

    def _blocks(self, number: int, first: int, blocks: int) -> Tensor:
        on_gpu, words = self.device.type != "cpu", self.words[number]
        # Kernels take no fewer than two blocks.
        out = torch.empty((max(2, blocks) if on_gpu else blocks, HALVES, LANES), device=self.device)
        loops = None if on_gpu else native.library()
        if loops is not None:
            native.draw_blocks(loops, self.plain_words[number], first, out)
            return out
        tensors = words, torch.tensor(first, device=self.device), out
        kernel = self.kernels.get(fill, tensors, [False, False, True], "draws") if on_gpu and self.kernels else None
        if kernel:
            kernel(list(tensors))
        else:
            fill(*tensors)
        return out


def draws(seed: int, name: str, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Draws in [0, 65536) for ``count`` scalars of the tensor ``name`` from ``start`` on, float32 (count,)."""
    return Drawn(seed, [name], torch.device(device)).piece(start, [count])[0]


def threshold(probability: float) -> int:
    """The level under which a draw counts as a success: the probability in steps of 1/65536."""
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"a probability lies between 0 and 1, not at {probability}")
    return round(probability * LEVELS)
