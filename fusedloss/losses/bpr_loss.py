"""BPR: the positive's score above each negative's, one logistic loss per pair."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..checks import expect
from ..numerics import softplus
from ..relation import Rest
from ..row_loss import row_loss
from ..scores import Scores
from ..statistics import SumOf
from .pairs import COMMON, pair_scores, positives

SCORES = "pair"


def positive_scores(name: str, scores: Scores, target: Tensor, ignore_index: int) -> Tensor:
    """Scores at the targets, which `row_loss` has yet to check: any column stands in for one out of range."""
    expect(target.shape == scores.leading, name, "target", f"shape {tuple(scores.leading)}", target)
    if scores.weight is not None:  # what an ignored row holds reaches no gradient
        ignored = (target == ignore_index).unsqueeze(1)
        scores = replace(scores, input=scores.input.masked_fill(ignored, 0.0))
    return scores.at(target.long().clamp(0, max(0, scores.columns - 1)))


@row_loss
def _bpr_loss(scores, target, hit):
    return scores.reduce(SumOf("softplus", row=hit, where=Rest(target))) / max(1, scores.columns - 1)


def bpr_loss(
    scores: Tensor | Scores,
    target: Tensor | None = None,
    *,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Bayesian personalised ranking: L = mean_{j≠y} log(1 + e^{s_j − s_y}), y the positive.

    Steffen Rendle, Christoph Freudenthaler, Zeno Gantner and Lars Schmidt-Thieme, "BPR: Bayesian Personalized Ranking
    from Implicit Feedback", UAI 2009, arXiv 1205.2618, which draws one negative per positive; here all other columns
    are negatives. Scores are raw dot products as a rule: ``similarity_scores(x, y)``. The penalty on the embeddings'
    lengths is yours to add. A row without negatives has loss 0.
    """
    scores = pair_scores("bpr_loss", scores)
    target = positives("bpr_loss", scores, target)
    common = dict(row_weight=row_weight, ignore_index=ignore_index, reduction=reduction)
    return _bpr_loss(scores, target, positive_scores("bpr_loss", scores, target, ignore_index), **common)


bpr_loss.__doc__ += COMMON


def reference(z: Tensor, target=None) -> Tensor:
    """The mean, densely."""
    target = torch.arange(len(z), device=z.device) if target is None else target
    pairs = softplus(z - z.gather(1, target.unsqueeze(1))).scatter(1, target.unsqueeze(1), 0.0)
    return pairs.sum() / (len(z) * max(1, z.shape[1] - 1))


CASES = ({}, {"target": lambda rows, columns: torch.arange(rows).flip(0)})
