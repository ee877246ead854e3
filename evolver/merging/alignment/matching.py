"""Weight matching: the order of one model's hidden units in which its weights are most like another's.

Git Re-Basin (Ainsworth, Hayase and Srinivasa 2023, arXiv 2209.04836, §3.2): maximise ⟨θ_A, π(θ_B)⟩ over all orders π,
one order at a time, each of which is a linear sum assignment problem.

An order is a vector ``p`` (units,): unit ``i`` of the new model is unit ``p[i]`` of the old one. All products are
float64, so that noise of float32 does not move units that are alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

# An order is left only for one that is better by this share of the value.
BETTER = 1e-9
# The paper's limit of sweeps; a handful is enough.
MOST_SWEEPS = 100


def best_order(similarity: Tensor, present: Tensor | None = None) -> Tensor:
    """The order ``p`` with the largest Σᵢ similarity[i, p[i]].

    Args:
        similarity: (n, n), of our unit in the row to their unit in the column.
        present: the order that is kept unless another one is better; default: the units as they are.
    """
    same = torch.arange(len(similarity)) if present is None else present
    _, columns = linear_sum_assignment(similarity.double().numpy(), maximize=True)
    found = torch.from_numpy(columns).long()
    now, then = (float(similarity.gather(1, p[:, None]).double().sum()) for p in (same, found))
    return found if then > now + BETTER * max(abs(now), abs(then)) else same


def unit_order(ours: Tensor, theirs: Tensor) -> Tensor:
    """The order of an MLP's hidden units.

    Args:
        ours: (units, n), all weights of each unit of the model that stays as it is: incoming, bias and outgoing.
        theirs: the same of the model that is re-ordered.
    """
    return best_order(ours.double() @ theirs.double().T)


@dataclass(frozen=True)
class Heads:
    """The weights of an attention layer, cut by heads: n features of the stream, and one more where there is a bias.

    Attributes:
        query: (groups, heads of a group, d, n).
        key: (groups, d, n).
        value: (groups, e, n).
        output: (groups, heads of a group, e, n), the columns of the matrix that puts heads together.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor


@dataclass(frozen=True)
class HeadOrder:
    """The order of an attention layer.

    Attributes:
        groups: (groups,), which of their heads of keys and values takes the place of ours.
        heads: (groups, heads of a group), for each of our groups which of the heads in their group it is.
        values: (groups, e), the same for the dimensions of its values. Those of queries and keys stay where they are:
            rotary positions turn them in fixed pairs.
    """

    groups: Tensor
    heads: Tensor
    values: Tensor

    def rows(self, kind_of: Tensor, within: Tensor) -> Tensor:
        """Flat places of (groups, heads, dimension) units: ``within`` of each head of a group of heads ``kind_of``."""
        count, size = kind_of.shape[1], within.shape[-1]
        heads = self.groups[:, None] * count + kind_of
        return (heads[:, :, None] * size + within).reshape(-1)

    def flat(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The orders of the rows of queries, keys and values, and of the columns of the output.

        Args:
            size: the dimensions of a head's queries.
        """
        alone, all_of = torch.zeros_like(self.groups)[:, None], torch.arange(size)
        values = self.values[:, None, :]
        return (
            self.rows(self.heads, all_of), self.rows(alone, all_of), self.rows(alone, values),
            self.rows(self.heads, values),
        )  # fmt: skip


def head_order(ours: Heads, theirs: Heads) -> HeadOrder:
    """The order of an attention layer: whole groups, heads inside of a group, and dimensions of values.

    What two groups have in common does not depend on the others, so each pair is looked at once and the groups are
    then assigned exactly. Inside of a pair with several heads, heads and dimensions are matched in turn.
    """
    count = len(ours.key)
    pairs = [[_pair(_group(ours, i), _group(theirs, j)) for j in range(count)] for i in range(count)]
    groups = best_order(torch.tensor([[pair[0] for pair in row] for row in pairs], dtype=torch.float64))
    chosen = [pairs[i][j] for i, j in enumerate(groups.tolist())]
    return HeadOrder(groups, torch.stack([c[1] for c in chosen]), torch.stack([c[2] for c in chosen]))


def _group(layer: Heads, number: int) -> Heads:
    parts = (t[number].double() for t in (layer.query, layer.key, layer.value, layer.output))
    return Heads(*parts)


def _pair(ours: Heads, theirs: Heads) -> tuple[float, Tensor, Tensor]:
    """What two groups have in common, ⟨ours, theirs⟩ in the best order found, and this order: heads and dimensions."""
    queries = ours.query.flatten(1) @ theirs.query.flatten(1).T
    keys, values = float((ours.key * theirs.key).sum()), ours.value @ theirs.value.T
    # products[g, h] compares the dimensions of our head g and their head h: (heads, heads, e, e)
    products = torch.einsum("gen,hfn->ghef", ours.output, theirs.output)
    same = torch.arange(len(queries))
    starts = [same] if len(same) == 1 else [same, best_order(queries)]
    best = _ascend(queries, values, products, starts[0])
    for other in (_ascend(queries, values, products, start) for start in starts[1:]):
        best = other if other[0] > best[0] + BETTER * abs(best[0]) else best
    return keys + best[0], best[1], best[2]


def _ascend(queries: Tensor, values: Tensor, products: Tensor, heads: Tensor) -> tuple[float, Tensor, Tensor]:
    """Coordinate ascent from an order of heads: dimensions, heads, dimensions, … until nothing changes."""
    every, order = torch.arange(len(heads)), torch.arange(len(values))
    for _ in range(MOST_SWEEPS):
        new = best_order(values + products[every, heads].sum(0), order)
        moved = best_order(queries + products.gather(3, _spread(new, products)).squeeze(3).sum(2), heads)
        still = torch.equal(new, order) and torch.equal(moved, heads)
        order, heads = new, moved
        if still:
            break
    value = queries[every, heads].sum() + (values + products[every, heads].sum(0)).gather(1, order[:, None]).sum()
    return float(value), heads, order


def _spread(order: Tensor, products: Tensor) -> Tensor:
    return order.view(1, 1, -1, 1).expand(*products.shape[:3], 1)
