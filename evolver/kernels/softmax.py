"""Softmax in float32 with the same bits on every processor: those that torch has where there is AVX-512.

torch adds up a row in as many lanes as the processor has, and each order of additions rounds otherwise. Where a
decision hangs on the last bits, as in Arcee Fusion, models merged on two machines would differ. Here the order is
fixed, of 16 lanes, and so is the exponential: reduced to ±ln 2 / 2 as Cody and Waite do it, then a polynomial with the
coefficients of SLEEF (Shibata and Petrogalli 2020), which torch uses, and fused products and sums.
"""

from __future__ import annotations

import torch
from torch import Tensor

SUM_LANES = 16
# log2(e); ln 2 in two parts, of which products with small whole numbers are exact.
LOG2E, LN2_HIGH, LN2_LOW = 1.4426950408889634, 0.693145751953125, 1.428606765330187e-06
# Of s² to s⁷ in exp(s), highest first.
COEFFICIENTS = (0.00019852762, 0.0013930436, 0.008333361, 0.041666485, 0.16666667, 0.5)


def softmax(rows: Tensor) -> Tensor:
    """Of every row of (rows, columns), float32."""
    powers = _exp(rows - rows.amax(-1, keepdim=True))
    lanes = torch.nn.functional.pad(powers, (0, -powers.shape[-1] % SUM_LANES)).unflatten(-1, (-1, SUM_LANES))
    total = lanes[:, 0]
    for run in lanes[:, 1:].unbind(1):
        total = total + run
    while total.shape[-1] > 1:
        half = total.shape[-1] // 2
        total = total[:, :half] + total[:, half:]
    found: Tensor = powers * (1.0 / total)
    return found


def _exp(x: Tensor) -> Tensor:
    """exp(x) for x ≤ 0, float32; what is below 2^-126 counts as about that."""
    power = (x * _number(LOG2E, x)).round()
    rest = _fused(power, _number(-LN2_LOW, x), _fused(power, _number(-LN2_HIGH, x), x))
    series = _number(COEFFICIENTS[0], x)
    for coefficient in COEFFICIENTS[1:]:
        series = _fused(series, rest, _number(coefficient, x))
    two_to_power = ((power.clamp(min=-126).int() + 127) << 23).view(torch.float32)
    return (_fused(rest * rest, series, rest) + 1.0) * two_to_power


def _number(value: float, like: Tensor) -> Tensor:
    return torch.tensor(value, dtype=torch.float32, device=like.device)


def _fused(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """x·y + z, rounded once: a product of two float32 is exact in float64."""
    return (x.double() * y.double() + z.double()).float()
