"""Cross-entropy on scores: what `cross_entropy` and `linear_cross_entropy` share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_reduction, expect
from ..row_loss import evaluate, row_factors
from ..scores import Scores, logits_scores
from ..statistics import Count
from ..targets import checked_target
from .cross_entropy_on_statistics import indexed, penalised, probable


@dataclass(frozen=True, eq=False)
class Options:
    """What both public functions take beside scores and targets."""

    weight: Tensor | None = None
    row_weight: Tensor | None = None
    ignore_index: int | None = None
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float | Tensor = 0.0


def probabilities(target: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether the target is class probabilities of scores of this shape."""
    return target.is_floating_point() and target.shape == shape


def check(name: str, scores: Scores, target: Tensor, given: Options) -> None:
    weight, row_weight, index = given.weight, given.row_weight, given.ignore_index
    check_reduction(name, given.reduction)
    expect(isinstance(target, Tensor), name, "target", "a tensor", target, TypeError)
    expect(
        index is None or isinstance(index, (int, torch.SymInt)), name, "ignore_index", "an integer", index, TypeError
    )
    if weight is not None:
        expect(weight.is_floating_point(), name, "weight", "floating point", weight.dtype, TypeError)
        expect(weight.shape == (scores.columns,), name, "weight", f"({scores.columns},)", weight)
    if row_weight is not None:
        expect(row_weight.shape == scores.leading, name, "row_weight", f"{tuple(scores.leading)}", row_weight)
    smoothing = given.label_smoothing
    expect(0.0 <= smoothing <= 1.0, name, "label_smoothing", "a number in [0, 1]", smoothing)


def on_scores(name: str, scores: Scores, target: Tensor, given: Options) -> Tensor:
    """Cross-entropy of any scores, classes last."""
    check(name, scores, target, given)
    row_weight, reduction, z_loss = given.row_weight, given.reduction, given.z_loss
    weight = None if given.weight is None else given.weight.to(scores.dtype)
    options = {"label_smoothing": given.label_smoothing}
    shared = {} if weight is None else {"class_weight": weight}
    (shared if isinstance(z_loss, Tensor) else options)["z_loss"] = z_loss
    if probabilities(target, (*scores.leading, scores.columns)):
        index = given.ignore_index
        expect(index is None or index < 0, name, "ignore_index", "None with target probabilities", index)
        y = target.reshape(-1, scores.columns)
        y = y if weight is None else y * weight
        factor = row_factors(scores, None, None, None, row_weight, reduction)
        count = logits_scores(y.detach()).reduce(Count(y.detach())).to(scores.dtype)  # (y != 0).sum(1), nothing N × V
        rows = [y, y.sum(1, dtype=scores.dtype), count]
        return evaluate(probable.key, scores, None, factor, rows, shared, options, reduction)
    safe, keep, valid = checked_target(name, scores, target, -100 if given.ignore_index is None else given.ignore_index)
    if reduction != "mean" or weight is None:
        factor = row_factors(scores, keep, valid, None, row_weight, reduction)
        return evaluate(indexed.key, scores, keep, factor, [safe], shared, options, reduction)
    # The weighted mean divides by the targets' weights, the z-loss' mean by the row weights alone: fold the quotient in.
    rows = row_factors(scores, keep, valid, None, row_weight, "sum")
    divisor = scores.total(rows * weight[safe])
    factor = torch.where(divisor == 0, 0.0, rows / torch.where(divisor == 0, 1.0, divisor))
    wanted, _ = penalised(z_loss), options.pop("z_loss", None)
    if wanted:
        shared["z_loss"] = z_loss * divisor / scores.total(rows).clamp(min=torch.finfo(rows.dtype).tiny)
    return evaluate(indexed.key, scores, keep, factor, [safe], shared, options, reduction)
