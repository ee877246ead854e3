"""The counter-based random function: the same bits on every device, whatever the chunks, the threads or the order.

Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 3.3): ten rounds of two
32-bit multiplications turn (counter, key) into 128 random bits. Here the key is the seed, the counter the place of a
scalar in a model (tensor, flat offset), so a scalar's draw can be computed alone, anywhere.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
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
    for _ in range(ROUNDS):
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


def words(seed: int, stream: Tensor) -> Tensor:
    """As ``key_words``, for a stream (2,) that is on its device already."""
    key = torch.tensor([seed & LOW32, (seed >> 32) & LOW32], dtype=torch.int64, device=stream.device)
    return torch.cat([key, stream])


def block_draws(words: Tensor, first: Tensor, blocks: int) -> Tensor:
    """Draws in [0, 65536) for ``blocks`` whole blocks of 8,192 scalars, from block ``first`` (int64, ()) on.

    Returns:
        int64 tensor (blocks * 8192,), in the order of the flat offsets.
    """
    row = torch.arange(blocks, dtype=torch.int64, device=words.device)[:, None]
    lane = torch.arange(LANES, dtype=torch.int64, device=words.device)[None, :]
    place = (first + row) * LANES + lane  # (blocks, LANES)
    low, high = place & LOW32, (place >> 32) & LOW32
    out = philox4x32((low, high, words[2].expand_as(low), words[3].expand_as(low)), (words[0], words[1]))
    halves = [half for word in out for half in (word & 0xFFFF, word >> 16)]
    return torch.stack(halves, dim=1).reshape(-1)  # (blocks, HALVES, LANES) → flat


def draws(seed: int, name: str, start: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """Draws in [0, 65536) for the scalars ``start`` … ``start + count - 1`` of the tensor ``name``.

    Returns:
        int64 tensor (count,).
    """
    device = torch.device(device)
    first, last = start // BLOCK, -(-(start + count) // BLOCK)
    flat = block_draws(key_words(seed, name, device), torch.tensor(first, device=device), last - first)
    return flat[start - first * BLOCK : start - first * BLOCK + count]


def threshold(probability: float) -> int:
    """The level under which a draw counts as a success: the probability in steps of 1/65536."""
    if not 0.0 <= probability <= 1.0:
        raise ValueError(f"a probability lies between 0 and 1, not at {probability}")
    return round(probability * LEVELS)
