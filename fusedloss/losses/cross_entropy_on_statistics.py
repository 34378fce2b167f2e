"""Cross-entropy on statistics, for class indices and for class probabilities."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import log_partition, nll
from ..relation import Rest
from ..row_loss import register
from ..statistics import Count, LogSumExp, Score, Sum


@register
def indexed(scores, target, *, class_weight=None, label_smoothing=0.0, z_loss=0.0):
    """(1 − ε) w_y (lse − s_y) + (ε / V) Σ_j w_j (lse − s_j) + λ lse²."""
    others = Rest(target)
    if label_smoothing:
        asked = LogSumExp(where=others), Score(target), Sum(class_weight), Count(class_weight)
        lse, hit, total, seen = scores.reduce(*asked)
    else:
        lse, hit = scores.reduce(LogSumExp(where=others), Score(target))
    loss = nll(lse, hit)
    if class_weight is not None:
        loss = loss * class_weight[target]
    if label_smoothing:
        mass = scores.columns if class_weight is None else class_weight.sum()
        spread = (mass * log_partition(lse, hit) - total) / scores.columns
        spread = spread + _infinite(seen < _count(class_weight, scores.columns))
        # With ε = 1 the first part counts nothing, be it infinite.
        loss = label_smoothing * spread + ((1 - label_smoothing) * loss if label_smoothing < 1 else 0.0)
    return loss + z_loss * log_partition(lse, hit).square() if penalised(z_loss) else loss


@register
def probable(scores, target, total, count, *, class_weight=None, label_smoothing=0.0, z_loss=0.0):
    """Σ_j w_j y_j (lse − s_j) for target probabilities y, smoothed with ε.

    `target` is w y already, `total` its sum and `count` the number of its entries that are not 0.
    """
    asked = [LogSumExp(), Sum(target), Count(target)]
    if label_smoothing:
        asked += [Sum(class_weight), Count(class_weight)]
    lse, hit, seen, *smooth = scores.reduce(*asked)
    # Probability on a class of score -inf is an infinite loss; y_j = 0 there is none (torch: 0 · inf = NaN).
    loss = total * lse - hit + _infinite(seen < count)
    if label_smoothing:
        spread = (scores.columns if class_weight is None else class_weight.sum()) * lse - smooth[0]
        spread = spread + _infinite(smooth[1] < _count(class_weight, scores.columns))
        spread = label_smoothing / scores.columns * spread
        loss = spread + ((1 - label_smoothing) * loss if label_smoothing < 1 else 0.0)
    return loss + z_loss * lse.square() if penalised(z_loss) else loss


def _infinite(impossible: Tensor) -> Tensor:
    """What a share of the target on a class of score -inf adds; the gradient at the other classes stays."""
    return torch.where(impossible, torch.inf, 0.0)


def _count(class_weight: Tensor | None, columns: int) -> Tensor | int:
    return columns if class_weight is None else (class_weight != 0).sum()


def penalised(z_loss: float | Tensor) -> bool:
    return isinstance(z_loss, Tensor) or z_loss != 0.0
