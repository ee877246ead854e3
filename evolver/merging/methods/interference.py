"""Methods that make the merged layer differ from each expert where that expert's task vector does not look.

The rows of a task vector lie in the space of the inputs that it was trained on, so that τᵀτ stands for the Gram matrix
of these inputs, which nobody has (WUDI). All methods here are one quadratic problem, which is solved in closed form.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Annotated, Literal, NamedTuple

import torch
from torch import Tensor

from evolver.merging.methods import Range, each, method, number
from evolver.merging.methods.averages import SumMass, Weight
from evolver.merging.methods.here import Stack
from evolver.merging.methods.lowrank import root_of
from evolver.merging.methods.operators import total_of, weighted_sum
from evolver.merging.methods.quadratic import Directions, Term, directions, flow, gram_merge, ridge
from evolver.merging.methods.spectrum import factors, matrix_by_matrix

Time = Annotated[Tensor, Range(10.0, 1e4, log=True, least=0.0)]
Start = Literal["sum", "mean", "zero"]
# Above this variance of the logarithms of the traces, over the square of their mean, ACE makes the traces equal.
HETEROGENEOUS = 0.3


@method(
    "Wei et al. 2026, SWUDI, arXiv 2606.07289; Cheng et al. 2025, WUDI-Merging, arXiv 2503.08099",
    whole=True,
    exact=False,
)
def swudi(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: SumMass = number(1.0),
    t: Time = number(300.0),
    rho: Annotated[Tensor, Range(0.01, 1.0, above=0.0, most=1.0)] = number(0.65),
    rank: Directions = "share",
    init: Start = "sum",
) -> Tensor:
    """WUDI's problem, min Σ ‖(θ - τ)τᵀ‖²/‖τ‖², after the gradient has flowed from ``init`` for the time ``t``.

    WUDI itself stops Adam after 300 small steps, which is about this flow; at t = 0 the result is ``init``, with much
    time and ρ = 1 the exact solution. Of the n directions of a layer's inputs only ρn are changed (``rank: share``),
    or as many as the spectrum of all task vectors says (ASWUDI: ``participation`` and the others). The result is
    multiplied by λ Σw / N, where N is the number of experts: by the paper's 1 at the defaults. Vectors are averaged,
    at the same scale.
    """
    put = BalancedWeights.of(weight)

    def of_matrix(stack: Stack) -> Tensor:
        signed = put.signed(stack)
        roots = [root_of(x) for x in signed]
        kept = directions(rank, float(rho), sum(len(x) for x in signed))
        terms = [
            Term(x, root, p / square)
            for x, root, p in zip(signed, roots, put.shares, strict=True)
            if (square := _square(x)) > 0
        ]
        return gram_merge(terms, sum(map(len, roots)), put.start(signed, init), flow(float(t), kept))

    return lambda_.float() * put.scale * matrix_by_matrix(deltas, of_matrix, put.mean)


@method("Wei et al. 2025, OptMerge, arXiv 2505.19892", whole=True, exact=False)
def optmerge(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: SumMass = number(1.0),
    t: Time = number(300.0),
    rank_fraction: Annotated[Tensor, Range(0.2, 1.0, above=0.0, most=1.0)] = number(1.0),
    centre: bool = True,
    init: Start = "sum",
) -> Tensor:
    """WUDI's problem on truncated task vectors: of each only the strongest ⌊min(m, n)/N⌋ directions count.

    With ``centre``, which the paper uses for full fine-tunes, the truncation T is that of τ minus the mean of all τ,
    and the problem is min Σ ‖(θ - mean - T)(ΣVᵀ)ᵀ‖²/‖τ‖². For LoRA experts the paper truncates τ itself and starts
    from the mean: write ``centre: false, init: mean``. Where the paper takes 300 steps of Adam or SGD, the gradient
    flows here for the time ``t``, as in ``swudi``; scale and vectors are as there, too.
    """
    put = BalancedWeights.of(weight)

    def of_matrix(stack: Stack) -> Tensor:
        count = max(1, int(float(rank_fraction) * (min(stack[0].shape) // len(stack))))
        signed = put.signed(stack)
        middle = total_of(stack) / len(stack) if centre else torch.zeros_like(stack[0])

        def terms() -> Iterator[Term]:
            for x, sign, p in zip(stack, put.signs, put.shares, strict=True):
                if (square := _square(x)) > 0:
                    found = factors(x - middle).first(count)
                    yield Term(sign * (middle + found.product()), found.s[:, None] * found.v.T, p / square)

        everything = directions("share", 1.0, count * len(stack))
        return gram_merge(terms(), count * len(stack), put.start(signed, init), flow(float(t), everything))

    return lambda_.float() * put.scale * matrix_by_matrix(deltas, of_matrix, put.mean)


@method("Xu et al. 2026, ACE-Merging, arXiv 2603.02945", whole=True, exact=False)
def ace(
    deltas: Stack,
    *,
    weight: Weight = each(1.0),
    lambda_: SumMass = number(1.0),
    ridge_: Annotated[Tensor, Range(1e-6, 1e-1, log=True, least=0.0)] = number(1e-2),
    centre: bool = True,
    traces: Literal["auto", "equal", "own"] = "auto",
) -> Tensor:
    """RegMean with covariances that are estimated from the task vectors: (Σ τ(Ĝ + μ)) (Σ (Ĝ + μ))⁻¹.

    Ĝ = τᵀτ after the mean row of τ is taken off (``centre``). The Ĝ are divided by their traces where these differ
    much: where the variance of log tr(τᵀτ) over the square of its mean is above 0.3 (``traces: auto``, always with
    ``equal``, never with ``own``). Read so: the ridge μ is a share of the mean eigenvalue of all Ĝ, so that it means
    the same for small and large task vectors, and draws towards the mean of the task vectors; the collective prior and
    the refinement of the spectrum, which the paper adds, are left out. Scale and vectors are as in ``swudi``.
    """
    put = BalancedWeights.of(weight)

    def of_matrix(stack: Stack) -> Tensor:
        signed = put.signed(stack)
        equal = traces == "equal" or (traces == "auto" and _differ([_square(x) for x in stack]))

        def terms() -> Iterator[Term]:
            for x, p in zip(signed, put.shares, strict=True):
                root = x - x.mean(0) if centre else x
                if (square := _square(root)) > 0:
                    yield Term(x, root, p / square if equal else p)

        rows = sum(len(x) for x in stack)
        return gram_merge(terms(), rows, put.start(signed, "mean"), ridge(float(ridge_)))

    return lambda_.float() * put.scale * matrix_by_matrix(deltas, of_matrix, put.mean)


class BalancedWeights(NamedTuple):
    """Weights as a quadratic problem takes them: positive numbers of mean 1, signs on the task vectors, and a scale."""

    shares: list[float]  # |w| N / Σ|w|
    signs: list[float]  # 1 or -1
    scale: float  # Σ|w| / N

    @classmethod
    def of(cls, weight: Tensor) -> BalancedWeights:
        mean = float(weight.abs().mean())
        shares = (weight.abs() / mean).tolist() if mean > 0 else [1.0] * len(weight)
        return cls(shares, [-1.0 if w < 0 else 1.0 for w in weight.tolist()], mean)

    def signed(self, stack: Stack) -> list[Tensor]:
        return [x if sign > 0 else -x for x, sign in zip(stack, self.signs, strict=True)]

    def mean(self, stack: Stack) -> Tensor:
        """Σ share·τ / N."""
        return self.start(self.signed(stack), "mean")

    def start(self, signed: Stack, init: Start) -> Tensor:
        total = weighted_sum(signed, torch.tensor(self.shares, dtype=torch.float64), False)
        return {"sum": total, "mean": total / len(signed), "zero": torch.zeros_like(total)}[init]


def _square(matrix: Tensor) -> float:
    square = float(matrix.double().square().sum())
    if not math.isfinite(square):
        raise FloatingPointError("the task vector is not finite")
    return square


def _differ(squares: list[float]) -> bool:
    """ACE's heterogeneity of the experts' squared norms, those that moved nowhere left out."""
    logs = torch.tensor([s for s in squares if s > 0], dtype=torch.float64).log()
    return len(logs) > 1 and bool(logs.var() > HETEROGENEOUS * logs.mean().square())
