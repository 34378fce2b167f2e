"""Triplets of the rows of a chunk of scores: losses that compare all pairs of a row with each other."""

from __future__ import annotations

import torch
from torch import Tensor

from .labels import masks


def distance(s: Tensor, squared: bool) -> Tensor:
    """√(2 − 2s), or its square, between unit vectors; 0 with slope 0 where they coincide (or s is rounded above 1)."""
    apart = ~(s >= 1)
    square = torch.where(apart, 2 - 2 * s, 0.0)
    return square if squared else torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)


def _parts(z: Tensor, label: Tensor, own: Tensor, column_label: Tensor, squared: bool):
    """Distances, positives, negatives; the negatives' distances in rising order and their columns, without gradient."""
    seen = z != -torch.inf
    positive, negative = (mask & seen for mask in masks(label, own, column_label))
    d = distance(torch.where(seen, z, 1.0), squared)
    return d, positive, negative, *torch.where(negative, d, torch.inf).detach().sort(1)


def all_triplets(column_label: Tensor, margin: float, squared: bool):
    """For `over_chunks`: Σ [D_p + m − D_n]₊ of the rows' triplets, and the number of those above 0.

    Σ [D_p + m − D_n]₊ = Σ_p D_p #{n active} − Σ_n D_n #{p active} + m #{active}, and sorted distances tell the counts:
    O(M log M) per row where comparing takes O(M²).
    """

    def function(z, label, own):
        d, positive, negative, near, _ = _parts(z, label, own, column_label, squared)
        with torch.no_grad():
            bound = d + margin
            far = torch.where(positive, bound, -torch.inf).sort(1).values
            with_positive = torch.where(positive, torch.searchsorted(near, bound), 0)
            with_negative = torch.where(negative, z.shape[1] - torch.searchsorted(far, d, right=True), 0)
            count = with_positive.sum()
        return ((with_positive - with_negative).double() * d).sum() + margin * count.double(), count

    return function


def semihard_triplets(column_label: Tensor, margin: float, squared: bool):
    """For `over_chunks`: Σ over (row, positive) of [D_p + m − D_n]₊, n the next negative beyond p; and their number."""

    def function(z, label, own):
        d, positive, negative, near, column = _parts(z, label, own, column_label, squared)
        last = negative.sum(1, keepdim=True) - 1  # the farthest one stands in where none is beyond
        rank = torch.searchsorted(near, d.detach(), right=True).minimum(last).clamp(min=0)
        positive = positive & (last >= 0)
        gap = torch.where(positive, d - d.gather(1, column.gather(1, rank)) + margin, 0.0)
        return torch.relu(gap).sum(dtype=torch.float64), positive.sum()

    return function
