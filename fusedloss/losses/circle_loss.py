"""Circle loss: every pair is weighted by how far it is from its optimum."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_constant, expect
from ..numerics import softplus
from ..row_loss import row_loss
from ..scores import Scores
from ..statistics import LogSumExpOf
from .labels import COMMON, all_masks, labelled, nonzero_mean, relations, some_labels

SCORES = "self"


@row_loss
def _circle_loss(scores, label, own, *, column_label, margin, scale):
    positives, negatives = relations(label, own, column_label)
    one = torch.ones_like(label, dtype=torch.float64)  # [1 + m − s]₊ (1 − m − s) is `circle` of 1 − s
    positive, negative = scores.reduce(
        LogSumExpOf("circle", factor=-1.0, weight=scale, parameter=margin, row=one, where=positives),
        LogSumExpOf("circle", weight=scale, parameter=margin, where=negatives),
    )
    return softplus(positive + negative)  # −∞ where either is empty: loss and gradient 0


def circle_loss(
    scores: Tensor | Scores,
    label: Tensor,
    *,
    column_label: Tensor | None = None,
    margin: float = 0.25,
    scale: float = 256.0,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Circle loss: L = log(1 + Σ_n e^{γ α_n (s_n − m)} · Σ_p e^{−γ α_p (s_p − 1 + m)}).

    α_n = [s_n + m]₊ and α_p = [1 + m − s_p]₊ are constants for the gradient. Yifan Sun, Changmao Cheng, Yuhan Zhang,
    Chi Zhang, Liang Zheng, Zhongdao Wang and Yichen Wei, "Circle Loss: A Unified Perspective of Pair Similarity
    Optimization", CVPR 2020, arXiv 2002.10857; its form for pairs, of which there is no code by the authors. Its form
    for classes is a margin of `margin_softmax_loss`.

        margin, scale: m, γ; the paper's m = 0.25, γ = 256 for faces, 128 for persons. pytorch-metric-learning has
            m = 0.4, γ = 80.
        row_weight: (N,) weights of the rows.
        reduction: "mean", "sum" or "none"; "nonzero_mean" is the mean over rows with loss > 0, as in
            pytorch-metric-learning. A row without a positive or without a negative has loss 0.
    """
    name = "circle_loss"
    check_constant(name, "margin", margin)
    check_constant(name, "scale", scale, 0, above=True)
    expected = "mean, nonzero_mean, sum or none"
    expect(reduction in ("mean", "nonzero_mean", "sum", "none"), name, "reduction", expected, reduction)
    scores, label, column_label, own = labelled(name, scores, label, column_label)
    options = dict(column_label=column_label, margin=margin, scale=scale, row_weight=row_weight)
    if reduction == "nonzero_mean":
        return nonzero_mean(scores, _circle_loss(scores, label, own, **options, reduction="none"))
    return _circle_loss(scores, label, own, **options, reduction=reduction)


circle_loss.__doc__ += COMMON


def reference(z: Tensor, label, column_label=None, margin=0.25, scale=256.0, reduction="mean") -> Tensor:
    """The mean, densely."""
    positive, negative = all_masks(label, column_label)
    far, near = torch.relu(1 + margin - z).detach(), torch.relu(z + margin).detach()
    left = torch.where(positive, -scale * far * (z - 1 + margin), -torch.inf).logsumexp(1)
    right = torch.where(negative, scale * near * (z - margin), -torch.inf).logsumexp(1)
    both = positive.any(1) & negative.any(1)
    losses = torch.where(both, softplus(torch.where(both, left + right, 0.0)), 0.0)
    return losses.sum() / max(1, (losses > 0).sum() if reduction == "nonzero_mean" else len(z))


CASES = tuple(
    {"label": some_labels, **more} for more in ({}, {"margin": 0.4, "scale": 80.0, "reduction": "nonzero_mean"})
)
