"""What the rows of a batch count: targets, class weights, row weights and reduction, as of losses on scores, but of
scores that nobody makes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import check_reduction, expect
from ..nn.loss import Loss
from ..row_loss import row_factors, shares
from ..scores import Scores
from ..targets import checked_target

F64 = torch.float64


@dataclass(frozen=True)
class ScoreShape:
    """What targets and weights are checked against, in place of scores."""

    leading: torch.Size
    columns: int
    dtype: torch.dtype  # of the losses

    def total(self, values: Tensor) -> Tensor:
        return values.sum()


@dataclass(frozen=True)
class Rows:
    """N rows of K targets, and how their losses enter the result."""

    target: Tensor  # (N, K) int64, safe to index with
    share: Tensor  # (N, K) float64: what each target counts in its row's loss, 0 for none there
    keep: Tensor  # (N,) bool: rows that count
    factor: Tensor  # (N,) of the result's type, differentiable
    leading: torch.Size
    reduction: str

    @classmethod
    def of(cls, caller: str, loss: Loss, scores: Scores | ScoreShape, target: Tensor, row_weight) -> Rows:
        """Of `loss`, a module of the spherical family. `scores` tell leading shape, number of classes and type."""
        check_reduction(caller, loss.reduction)
        for name, given in (("target", target), ("row_weight", row_weight), ("loss.weight", loss.weight)):
            tensor = given is None or isinstance(given, Tensor)
            expect(tensor, caller, name, "a tensor", type(given).__name__, TypeError)
        weight, leading, counted = loss.weight, scores.leading, None
        several = target.dim() == len(leading) + 1
        if weight is not None:
            expect(
                weight.shape == (scores.columns,), caller, "loss.weight", f"({scores.columns},) class weights", weight
            )
        if row_weight is not None:
            expect(row_weight.shape == leading, caller, "row_weight", f"shape {tuple(leading)}", row_weight)
        index, keep, valid = checked_target(caller, scores, target, loss.ignore_index, several)
        picked = None if weight is None else weight[index]
        if several:
            trained = picked is not None and picked.requires_grad
            expect(
                not trained, caller, "loss.weight", "constants with several targets to a row", "a parameter", TypeError
            )
            share, keep, counted = shares(keep, picked, F64)
            index, picked, counted = torch.where(share > 0, index, 0), None, counted.to(scores.dtype)
            if not index.shape[1]:  # a place for a target, with none there
                index, share = pad(index, (0, 1)), pad(share, (0, 1))
        else:  # one target: its class weight is the row's, and may be trained
            index, share = index.unsqueeze(1), keep.to(F64).unsqueeze(1)
        factor = row_factors(scores, keep, valid, picked, row_weight, loss.reduction, counted)
        return cls(index, share, keep, factor, leading, loss.reduction)

    def reduced(self, losses: Tensor) -> Tensor:
        """The result, of the rows' own losses (N,)."""
        # Before the factor: a loss that does not count may be inf or NaN, and would reach ∂/∂factor.
        losses = torch.where(self.keep, losses, 0.0).to(self.factor.dtype) * self.factor
        return losses.reshape(self.leading) if self.reduction == "none" else losses.sum()


def weighted(
    caller: str,
    loss: Loss,
    scores: ScoreShape,
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
