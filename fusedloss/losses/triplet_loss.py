"""Triplet loss: a positive must be nearer than a negative, by a margin."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_constant, check_reduction, expect
from ..numerics import softplus
from ..row_loss import row_loss
from ..scores import Scores
from ..statistics import Max, Min
from .labels import COMMON, all_masks, labelled, relations, same_count, some_labels
from .row_chunks import over_chunks
from .triplets import all_triplets, distance, semihard_triplets

SCORES = "self"


@row_loss
def _triplet_loss(scores, label, own, *, column_label, margin, squared):
    """Batch-hard: of each row the farthest positive and the nearest negative."""
    positives, negatives = relations(label, own, column_label)
    (far, _), (near, _) = scores.reduce(Min(positives), Max(negatives))
    both = (far != torch.inf) & (near != -torch.inf)
    gap = distance(torch.where(both, far, 1.0), squared) - distance(torch.where(both, near, 1.0), squared)
    return torch.where(both, softplus(gap) if margin is None else torch.relu(gap + margin), 0.0)


def triplet_loss(
    scores: Tensor | Scores,
    label: Tensor,
    *,
    column_label: Tensor | None = None,
    mining: str = "hard",
    margin: float | None = 0.2,
    squared: bool = False,
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """Triplet loss: L = [D_p − D_n + m]₊ with D = √(2 − 2s), the distance of unit vectors.

    Florian Schroff, Dmitry Kalenichenko and James Philbin, "FaceNet: A Unified Embedding for Face Recognition and
    Clustering", CVPR 2015, arXiv 1503.03832; Alexander Hermans, Lucas Beyer and Bastian Leibe, "In Defense of the
    Triplet Loss for Person Re-Identification", 2017, arXiv 1703.07737. Rows without a positive or negative are skipped.

        mining: "hard": of each row the farthest positive and the nearest negative; a mean over rows, one pass.
            "all": every (row, positive, negative), the mean over triplets with loss > 0, as in pytorch-metric-learning.
            "semihard": for every (row, positive) the nearest negative that is farther, else the farthest one, as in
            TensorFlow; the mean over those pairs. These two sort each row of the scores, O(N M log M) in plain PyTorch,
            a chunk of rows at a time within the memory budget, once more in the backward pass.
        margin: m; None is the soft margin log(1 + e^{D_p − D_n}), for "hard".
        squared: D² in place of D; FaceNet has it, with m = 0.2.
        row_weight: (N,) weights of the rows. reduction: "mean", "sum" or "none"; both for "hard" only.
    """
    name = "triplet_loss"
    check_reduction(name, reduction)
    expect(mining in ("hard", "all", "semihard"), name, "mining", "hard, all or semihard", mining)
    if margin is not None:
        check_constant(name, "margin", margin)
    scores, label, column_label, own = labelled(name, scores, label, column_label)
    if mining == "hard":
        count = same_count(label, column_label)
        weight = ((count > 1) & (count < scores.columns)).to(scores.dtype)  # rows with both kinds
        weight = weight if row_weight is None else weight * row_weight
        options = dict(column_label=column_label, margin=margin, squared=squared)
        return _triplet_loss(scores, label, own, **options, row_weight=weight, reduction=reduction)
    expect(margin is not None, name, "margin", f"a number with mining={mining!r}", margin)
    expect(row_weight is None, name, "row_weight", f"None with mining={mining!r}", row_weight)
    expect(reduction == "mean", name, "reduction", f"mean with mining={mining!r}", reduction)
    triplets = (all_triplets if mining == "all" else semihard_triplets)(column_label, margin, squared)
    total, count = over_chunks(name, scores, triplets, label, own, copies=12)
    return (total / count.clamp(min=1)).to(scores.dtype)


triplet_loss.__doc__ += COMMON


def reference(z: Tensor, label, column_label=None, mining="hard", margin=0.2, squared=False) -> Tensor:
    """The mean, densely; N M² of them where all pairs of a row are compared."""
    positive, negative = all_masks(label, column_label)
    d = distance(z, squared)
    if mining == "hard":
        gap = torch.where(positive, d, -torch.inf).max(1).values - torch.where(negative, d, torch.inf).min(1).values
        gap = gap[positive.any(1) & negative.any(1)]
        return (softplus(gap) if margin is None else torch.relu(gap + margin)).sum() / max(1, len(gap))
    gap = d.unsqueeze(2) - d.unsqueeze(1)  # (row, positive, negative)
    known = positive.unsqueeze(2) & negative.unsqueeze(1)
    if mining == "all":
        losses = torch.where(known, torch.relu(gap + margin), 0.0)
        return losses.sum() / max(1, (losses > 0).sum())
    beyond, pairs = torch.where(known & (gap < 0), gap, -torch.inf).max(2).values, known.any(2)
    gap = torch.where(beyond == -torch.inf, torch.where(known, gap, torch.inf).min(2).values, beyond)
    return torch.relu(gap + margin)[pairs].sum() / max(1, pairs.sum())


CASES = tuple(
    {"label": some_labels, **more}
    for more in ({}, {"margin": None}, {"mining": "all"}, {"mining": "semihard", "squared": True})
)
