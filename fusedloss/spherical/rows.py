"""What the rows of a batch count: targets, class weights, row weights and reduction, as the losses on scores have them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_reduction, expect
from ..nn.loss import Loss
from ..row_loss import row_factors, shares
from ..scores import Scores
from ..targets import checked_target

F64 = torch.float64


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
    def of(cls, caller: str, loss: Loss, scores: Scores, target: Tensor, row_weight: Tensor | None) -> Rows:
        """Of `loss`, a module of the spherical family. `scores` tell leading shape, number of classes and type."""
        check_reduction(caller, loss.reduction)
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
        else:  # one target: its class weight is the row's, and may be trained
            index, share = index.unsqueeze(1), keep.to(F64).unsqueeze(1)
        factor = row_factors(scores, keep, valid, picked, row_weight, loss.reduction, counted)
        return cls(index, share, keep, factor, leading, loss.reduction)

    def reduced(self, losses: Tensor) -> Tensor:
        """The result, of the rows' own losses (N,)."""
        # Before the factor: a loss that does not count may be inf or NaN, and would reach ∂/∂factor.
        losses = torch.where(self.keep, losses, 0.0).to(self.factor.dtype) * self.factor
        return losses.reshape(self.leading) if self.reduction == "none" else losses.sum()
