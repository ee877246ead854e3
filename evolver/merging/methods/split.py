"""Two models on the arc between them, the beginning of a tensor by one ratio and its end by the other."""

from __future__ import annotations

import torch
from torch import Tensor

from evolver.merging.methods import method, number, operators
from evolver.merging.methods.here import Stack
from evolver.merging.methods.spherical import Share


@method(
    "Abrantes et al. 2025, Competition and attraction improve model fusion, arXiv 2508.16204",
    whole=True,
    takes=2,
    symmetric=False,
)
def split_slerp(models: Stack, *, t: Share = number(0.5), split: Share = number(1.0)) -> Tensor:
    """Slerp at ``t`` in the first share ``split`` of a tensor's scalars, and at 1 - ``t`` in the rest.

    Of (1, 0) and (0, 1) at t = 1/3 and a split of one half it is (0.8660, 0.8660), and (0.8660, 0.5) without a split.
    The angle is that of the whole tensor. Where |cos| > 0.9995 the way is straight.
    """
    _, cosine = operators.unit(operators.gram([m.flatten() for m in models]))
    count = models[0].numel()
    place = torch.arange(count, device=models[0].device).view(models[0].shape)
    before = place < torch.round(split * count)
    first, second = operators.slerp_factors(cosine[0, 1], t, operators.nearly_parallel)
    first_after, second_after = operators.slerp_factors(cosine[0, 1], 1 - t, operators.nearly_parallel)
    ours, theirs = torch.where(before, first, first_after), torch.where(before, second, second_after)
    return models[0] * ours.float() + models[1] * theirs.float()
