"""From losses of single rows to what a spherical layer returns: targets, class and row weights, reduction."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import check_reduction, expect
from ..nn.loss import Loss
from ..row_loss import row_factors, shares
from ..targets import checked_target


@dataclass(frozen=True)
class Rows:
    """What targets and weights are checked against, of scores that nobody makes."""

    leading: torch.Size
    columns: int
    dtype: torch.dtype  # of the losses

    def total(self, values: Tensor) -> Tensor:
        return values.sum()


def weighted(
    caller: str,
    rows: Rows,
    h: Tensor,
    target: Tensor,
    row_weight: Tensor | None,
    loss: Loss,
    losses_of: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """`loss` of h (*leading, d), as it would be of their scores.

    losses_of(h (m, d), target (m, K) in [0, n), share (m, K) float64, 0 for no target) → (m,) float64, for m ≥ 1 rows.
    """
    check_reduction(caller, loss.reduction)
    several = target.dim() == len(rows.leading) + 1
    safe, keep, valid = checked_target(caller, rows, target, loss.ignore_index, several)
    expect(not several or target.shape[-1] > 0, caller, "target", "at least one column", target)
    class_weight, counted = None, None
    if loss.weight is not None:
        expect(loss.weight.shape == (rows.columns,), caller, "weight", f"({rows.columns},) class weights", loss.weight)
        learnt = several and loss.weight.requires_grad
        expect(not learnt, caller, "weight", "no gradient for class weights with several targets", loss.weight)
        class_weight = loss.weight[safe]
    if several:
        share, keep, counted = shares(keep, class_weight, rows.dtype)
        class_weight = None
    else:
        safe, share = safe.unsqueeze(1), keep.unsqueeze(1)
    if row_weight is not None:
        expect(row_weight.shape == rows.leading, caller, "row_weight", f"shape {tuple(rows.leading)}", row_weight)
    factor = row_factors(rows, keep, valid, class_weight, row_weight, loss.reduction, counted)
    losses = _of_those_that_count(h.reshape(-1, h.shape[-1]), safe, share.double(), keep, losses_of)
    losses = losses.to(rows.dtype) * factor
    return losses.reshape(rows.leading) if loss.reduction == "none" else losses.sum()


def _of_those_that_count(h: Tensor, target: Tensor, share: Tensor, keep: Tensor, losses_of: Callable) -> Tensor:
    """(N,) losses, 0 and without gradient where not `keep`; a device is not waited for, and computes those on zeros."""
    if len(h) == 0:
        return losses_of(*(pad(t, (0, 0, 0, 1)) for t in (h, target, share)))[:0]
    if keep.is_cpu:
        some = keep.nonzero()[:, 0]
        if len(some) == len(h):
            return losses_of(h, target, share)
        if len(some):
            return share.new_zeros(len(h)).index_put((some,), losses_of(h[some], target[some], share[some]))
    return torch.where(keep, losses_of(torch.where(keep.unsqueeze(1), h, 0.0), target, share), 0.0)
