"""Sigmoid loss (SigLIP): every pair of embeddings is a yes-or-no question of its own."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_reduction, expect
from ..relation import Same
from ..row_loss import row_loss
from ..scores import Scores
from ..statistics import Score, Sum, SumOf
from .pairs import COMMON, labels, pair_scores, positives


# Sums, linear in the loss, whose terms look at one score only: the walk can form the gradient in the sweep that sums.
@row_loss
def _sigmoid_loss(scores, target):
    every, hit = scores.reduce(SumOf("softplus"), Score(target))
    return every - hit


@row_loss
def _sigmoid_loss__of_groups(scores, row_group, *, column_group: Tensor):
    every, hits = scores.reduce(SumOf("softplus"), Sum(where=Same(row_group, column_group)))
    return every - hits


def sigmoid_loss(
    scores: Tensor | Scores,
    target: Tensor | None = None,
    *,
    row_group: Tensor | None = None,
    column_group: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Sigmoid loss of pairs: L = Σ_j log(1 + e^{z_j}) − Σ_{j positive} z_j = −Σ_j log σ(± z_j), + for positives.

    Xiaohua Zhai, Basil Mustafa, Alexander Kolesnikov and Lucas Beyer, "Sigmoid Loss for Language Image Pre-Training",
    ICCV 2023, arXiv 2303.15343. z = e^{t'} x·y + b: pass ``scale=t.exp()`` and ``bias=b`` to `similarity_scores`, with
    normalize=True. The paper (and open_clip) start from t' = log 10, b = −10; big_vision's siglip_lit_coco from
    log 10, −2.71, and it normalises by length + 1e-8. open_clip keeps t' ≤ log 100. The sum runs over columns, the mean
    over rows, as in all three: not over pairs. With several processes each divides by its own number of rows.

        row_group, column_group: (N,), (M,) integers instead of a target: all pairs of equal groups are positives
            (duplicates, several captions); column_group may be left out where N = M. Groups ignore no row.
    """
    name = "sigmoid_loss"
    check_reduction(name, reduction)
    scores = pair_scores(name, scores)
    if row_group is None:
        expect(column_group is None, name, "row_group", "given with column_group", row_group)
        common = dict(row_weight=row_weight, ignore_index=ignore_index, reduction=reduction)
        return _sigmoid_loss(scores, positives(name, scores, target), **common)
    expect(target is None, name, "target", "None with row_group", target)
    rows, columns = labels(name, scores, "row_group", row_group, column_group)
    return _sigmoid_loss__of_groups(scores, rows, column_group=columns, row_weight=row_weight, reduction=reduction)


sigmoid_loss.__doc__ += COMMON


def reference(z: Tensor, target=None, row_group=None, column_group=None) -> Tensor:
    """Mean over rows, densely."""
    columns = torch.arange(z.shape[1], device=z.device)
    if row_group is None:
        positive = (columns[: z.shape[0]] if target is None else target)[:, None] == columns
    else:
        positive = row_group[:, None] == (row_group if column_group is None else column_group)
    return -torch.nn.functional.logsigmoid(torch.where(positive, z, -z)).sum(1).mean()


def _group(count: int) -> Tensor:
    return torch.arange(count) // 3


CASES = (
    {},
    {"target": lambda rows, columns: torch.arange(rows).flip(0)},
    {"row_group": lambda rows, columns: _group(rows), "column_group": lambda rows, columns: _group(columns)},
)
SCORES = "pair"
