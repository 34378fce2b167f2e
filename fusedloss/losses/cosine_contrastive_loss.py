"""Cosine contrastive loss (SimpleX): positives to cosine 1, negatives below a margin."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_constant
from ..relation import Rest
from ..row_loss import row_loss
from ..scores import Scores
from ..statistics import Score, SumOf
from .pairs import COMMON, pair_scores, positives

SCORES = "pair"


@row_loss
def _cosine_contrastive_loss(scores, target, *, margin, negative_weight):
    threshold = None if margin == 0 else torch.full_like(target, margin, dtype=torch.float64)
    hit, over = scores.reduce(Score(target), SumOf("hinge", row=threshold, where=Rest(target)))
    return torch.relu(1 - hit) + over * (1 if negative_weight is None else negative_weight / max(1, scores.columns - 1))


def cosine_contrastive_loss(
    scores: Tensor | Scores,
    target: Tensor | None = None,
    *,
    margin: float = 0.0,
    negative_weight: float | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Cosine contrastive loss: L = [1 − s_y]₊ + w mean_{j≠y} [s_j − m]₊, y the positive.

    Kelong Mao, Jieming Zhu, Jinpeng Wang, Quanyu Dai, Zhenhua Dong, Xi Xiao and Xiuqiang He, "SimpleX: A Simple and
    Strong Baseline for Collaborative Filtering", CIKM 2021, arXiv 2109.12613, which samples its negatives; here
    all other columns are negatives. Scores are cosines: ``similarity_scores(x, y, normalize=True)``.

        margin, negative_weight: m, w. None: the sum over the negatives in place of w times the mean, as in the official
            code, whose defaults these are; for Yelp18 it has m = 0.9, w = 150.
    """
    name = "cosine_contrastive_loss"
    check_constant(name, "margin", margin)
    if negative_weight is not None:
        check_constant(name, "negative_weight", negative_weight, 0)
    scores = pair_scores(name, scores)
    options = dict(margin=margin, negative_weight=negative_weight)
    common = dict(row_weight=row_weight, ignore_index=ignore_index, reduction=reduction)
    return _cosine_contrastive_loss(scores, positives(name, scores, target), **options, **common)


cosine_contrastive_loss.__doc__ += COMMON


def reference(z: Tensor, target=None, margin=0.0, negative_weight=None) -> Tensor:
    """The mean, densely."""
    target = torch.arange(len(z), device=z.device) if target is None else target
    over = torch.relu(z - margin).scatter(1, target.unsqueeze(1), 0.0).sum(1)
    over = over if negative_weight is None else negative_weight * over / max(1, z.shape[1] - 1)
    return (torch.relu(1 - z.gather(1, target.unsqueeze(1)).squeeze(1)) + over).mean()


CASES = (
    {},
    {"margin": 0.4, "negative_weight": 150.0},
    {"target": lambda rows, columns: torch.arange(rows).flip(0), "margin": -0.1},
)
