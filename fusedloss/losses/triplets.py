"""Triplets of the rows that a chunk of scores holds: losses that compare all pairs of a row with each other."""

from __future__ import annotations

import torch
from torch import Tensor

from .labels import masks


def distance(s: Tensor, squared: bool) -> Tensor:
    """√(2 − 2s), or its square, between unit vectors; 0 with slope 0 where they coincide (or s is rounded above 1)."""
    apart = ~(s >= 1)
    square = torch.where(apart, 2 - 2 * s, 0.0)
    return square if squared else torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)


def triplets(column_label: Tensor, margin: float, squared: bool, semihard: bool):
    """For `total_over_chunks`: the sum over the triplets of some rows, the number to divide by, and the sum's slope.

    Sorted distances turn comparisons of all pairs of a row into ranks: O(M log M) per row.
    """

    def function(z, label, own, _):
        seen = z != -torch.inf
        positive, negative = (mask & seen for mask in masks(label, own, column_label))
        d = distance(torch.where(seen, z, 1.0), squared)
        near = torch.where(negative, d, torch.inf).sort(1)
        if semihard:  # of each positive the next negative beyond it, or the farthest one
            last = negative.sum(1, keepdim=True) - 1
            rank = torch.searchsorted(near.values, d, right=True).minimum(last).clamp(min=0)
            gap = d - near.values.gather(1, rank) + margin
            positive = positive & (last >= 0)
            active = positive & ~(gap <= 0)
            weight = active.to(z.dtype).scatter_add(1, near.indices.gather(1, rank), -active.to(z.dtype))
            total, count = torch.where(active, gap, 0.0).sum(dtype=torch.float64), positive.sum()
        else:  # Σ [D_p + m − D_n]₊ = Σ_p D_p #{n active} − Σ_n D_n #{p active} + m #{active}
            bound = d + margin
            far = torch.where(positive, bound, -torch.inf).sort(1).values
            with_positive = torch.where(positive, torch.searchsorted(near.values, bound), 0)
            with_negative = torch.where(negative, z.shape[1] - torch.searchsorted(far, d, right=True), 0)
            weight, count = with_positive - with_negative, with_positive.sum()
            total, weight = (weight.double() * d).sum() + margin * count.double(), weight.to(z.dtype)
        slope = -2.0 if squared else torch.where(d == 0, 0.0, -1 / torch.where(d == 0, 1.0, d))
        return total, count, weight * slope, None

    return function
