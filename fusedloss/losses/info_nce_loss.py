"""InfoNCE: each row's positive among all columns, a cross-entropy over the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import expect
from ..numerics import nll
from ..relation import Other, Rest
from ..row_loss import row_loss
from ..scores import Scores
from ..statistics import LogSumExp, Score
from .pairs import COMMON, labels, pair_scores, positives


@row_loss
def _info_nce_loss(scores, target):
    return nll(*scores.reduce(LogSumExp(where=Rest(target)), Score(target)))


@row_loss
def _info_nce_loss__of_groups(scores, target, row_group, *, column_group: Tensor):
    negatives = Other(row_group, column_group, without=target)
    return nll(*scores.reduce(LogSumExp(where=negatives), Score(target)))


def info_nce_loss(
    scores: Tensor | Scores,
    target: Tensor | None = None,
    *,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """InfoNCE, one-sided: L = log Σ_j e^{z_j} − z_y, y the positive.

    Aaron van den Oord, Yazhe Li and Oriol Vinyals, "Representation Learning with Contrastive Predictive Coding", 2018,
    arXiv 1807.03748. z = x·y / τ: pass ``scale=1 / τ``, or a learnable ``log_scale.exp()``. Of N queries and M > N
    documents the first N are the queries' own, the others are hard negatives. On raw dot products (scale 1) it is the
    N-pair loss of Sohn (NIPS 2016), without its penalty on the embeddings' lengths.

        row_group, column_group: (N,), (M,) integers: columns of the row's own group but its positive are no negatives,
            and left out of the sum (false negatives); column_group may be left out where N = M.

    A row without any negative has loss 0. A positive that is near certain keeps its digits.
    """
    name = "info_nce_loss"
    scores = pair_scores(name, scores)
    target = positives(name, scores, target)
    common = dict(row_weight=row_weight, ignore_index=ignore_index, reduction=reduction)
    if row_group is None:
        expect(column_group is None, name, "row_group", "given with column_group", row_group)
        return _info_nce_loss(scores, target, **common)
    rows, columns = labels(name, scores, "row_group", row_group, column_group)
    return _info_nce_loss__of_groups(scores, target, rows, column_group=columns, **common)


info_nce_loss.__doc__ += COMMON


def reference(z: Tensor, target=None, row_group=None, column_group=None) -> Tensor:
    """Mean over rows, densely."""
    columns = torch.arange(z.shape[1], device=z.device)
    target = columns[: z.shape[0]] if target is None else target
    if row_group is not None:
        own = row_group[:, None] == (row_group if column_group is None else column_group)
        z = z.masked_fill(own & (target[:, None] != columns), -torch.inf)
    return torch.nn.functional.cross_entropy(z, target)


def _group(count: int) -> Tensor:
    return torch.arange(count) // 3


_GROUPS = {"row_group": lambda rows, columns: _group(rows), "column_group": lambda rows, columns: _group(columns)}
_REVERSED = {"target": lambda rows, columns: torch.arange(rows).flip(0)}
CASES = ({}, _REVERSED, _GROUPS, {**_REVERSED, **_GROUPS})
SCORES = "pair"
