"""A loss of the family of scores that nobody makes: those of its rows that count, weighted and reduced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..nn.loss import Loss
from .rows import Rows


@dataclass(frozen=True)
class Unmade:
    """What targets and weights are checked against, in place of scores."""

    leading: torch.Size
    columns: int
    dtype: torch.dtype  # of the losses

    def total(self, values: Tensor) -> Tensor:
        return values.sum()


def weighted(
    caller: str,
    loss: Loss,
    scores: Unmade,
    h: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    losses_of: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """`loss` of features (*leading, d), as it would be of their scores.

    losses_of(h (m, d), target (m, K) in [0, n), share (m, K) float64, 0 for no target) → (m,) float64, for m ≥ 1 rows.
    """
    rows = Rows.of(caller, loss, scores, target, row_weight)
    return rows.reduced(_of_those_that_count(h.reshape(len(rows.keep), h.shape[-1]), rows, losses_of))


def _of_those_that_count(h: Tensor, rows: Rows, losses_of: Callable) -> Tensor:
    """(N,) losses, 0 for rows that do not count: left out on a CPU, taken as zeros on a device, which is not asked."""
    target, share, keep = rows.target, rows.share, rows.keep
    if len(h) == 0:
        return losses_of(*(pad(t, (0, 0, 0, 1)) for t in (h, target, share)))[:0]
    if keep.is_cpu:
        some = keep.nonzero()[:, 0]
        if len(some) == len(h):
            return losses_of(h, target, share)
        if len(some):
            return share.new_zeros(len(h)).index_put((some,), losses_of(h[some], target[some], share[some]))
    return torch.where(keep, losses_of(torch.where(keep.unsqueeze(1), h, 0.0), target, share), 0.0)
