"""Multi-Similarity loss: only pairs that are hard within their row count, and the harder the more."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_constant, expect
from ..numerics import softplus
from ..relation import Other, Same
from ..row_loss import row_loss
from ..scores import Scores
from ..statistics import LogSumExp, Max, Min
from .labels import COMMON, all_masks, labelled, relations, some_labels

DISTINCT = 1 - 1e-5  # of the official code: a positive at least as similar as this is the row itself, or its copy
SCORES = "self"


@row_loss
def _multi_similarity_loss(scores, label, own, *, column_label, alpha, beta, base, epsilon, mining):
    positives, negatives = relations(label, own, column_label)
    if mining is not None:
        distinct = torch.full_like(label, DISTINCT if mining == "official" else torch.inf, dtype=torch.float64)
        candidates = Same(label, column_label, without=own, below=distinct)
        with torch.no_grad():
            (hardest_positive, _), (hardest_negative, _) = scores.reduce(Min(candidates), Max(negatives))
        below = torch.minimum(hardest_negative + epsilon, distinct)
        positives = Same(label, column_label, without=own, below=below)
        negatives = Other(label, column_label, above=hardest_positive - epsilon)
    positive, negative = scores.reduce(LogSumExp(-alpha, positives), LogSumExp(beta, negatives))
    loss = softplus(positive + alpha * base) / alpha + softplus(negative - beta * base) / beta
    either_empty = (positive == -torch.inf) | (negative == -torch.inf)
    return torch.where(either_empty, 0.0, loss) if mining == "official" else loss


def multi_similarity_loss(
    scores: Tensor | Scores,
    label: Tensor,
    *,
    column_label: Tensor | None = None,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    epsilon: float = 0.1,
    mining: str | None = "official",
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Multi-Similarity loss: L = log(1 + Σ_p e^{−α(s_p − λ)}) / α + log(1 + Σ_n e^{β(s_n − λ)}) / β.

    Xun Wang, Xintong Han, Weilin Huang, Dengke Dong and Matthew R. Scott, "Multi-Similarity Loss with General Pair
    Weighting for Deep Metric Learning", CVPR 2019, arXiv 1904.06627. The sums run over
    the negatives n with s_n > min_p s_p − ε and the positives p with s_p < max_n s_n + ε, thresholds without gradient.

        alpha, beta, base: α, β, λ; β = 50 as in the paper, the official configuration has 40.
        mining: "official": positives with s ≥ 1 − 1e-5 are left out, and a row without a kept positive or a kept
            negative has loss 0 (and stays in the mean). "pml": neither, as in pytorch-metric-learning's miner. None:
            all pairs, as there without a miner, and one pass instead of two.
        row_weight: (N,) weights of the rows. reduction: "mean", "sum" or "none".
    """
    name = "multi_similarity_loss"
    check_constant(name, "alpha", alpha, 0, above=True)
    check_constant(name, "beta", beta, 0, above=True)
    check_constant(name, "base", base)
    check_constant(name, "epsilon", epsilon, 0)
    expect(mining in ("official", "pml", None), name, "mining", "official, pml or None", mining)
    scores, label, column_label, own = labelled(name, scores, label, column_label)
    options = dict(alpha=alpha, beta=beta, base=base, epsilon=epsilon, mining=mining)
    common = dict(row_weight=row_weight, reduction=reduction)
    return _multi_similarity_loss(scores, label, own, column_label=column_label, **options, **common)


multi_similarity_loss.__doc__ += COMMON


def reference(
    z: Tensor, label, column_label=None, alpha=2.0, beta=50.0, base=0.5, epsilon=0.1, mining="official"
) -> Tensor:
    """The mean, densely."""
    positive, negative = all_masks(label, column_label)
    if mining is not None:
        positive = positive & (z < DISTINCT) if mining == "official" else positive
        hardest_positive = torch.where(positive, z, torch.inf).amin(1, keepdim=True).detach()
        hardest_negative = torch.where(negative, z, -torch.inf).amax(1, keepdim=True).detach()
        positive, negative = positive & (z < hardest_negative + epsilon), negative & (z > hardest_positive - epsilon)
    left, right = (
        torch.cat([torch.where(mask, factor * (z - base), -torch.inf), z.new_zeros(len(z), 1)], 1).logsumexp(1)
        for mask, factor in ((positive, -alpha), (negative, beta))
    )
    both = positive.any(1) & negative.any(1) | (mining != "official")
    return torch.where(both, left / alpha + right / beta, 0.0).mean()


CASES = tuple({"label": some_labels, **more} for more in ({}, {"mining": "pml", "beta": 40.0}, {"mining": None}))
