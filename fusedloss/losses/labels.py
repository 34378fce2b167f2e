"""What losses of labelled rows share: positives and negatives, as relations and as masks; means over some rows."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import expect
from ..relation import Other, Same, Where
from ..scores import Scores
from .pairs import labels, pair_scores

COMMON = """
    Common arguments:
        scores: cosines of x with itself, ``similarity_scores(x, normalize=True)``, or a matrix of them.
        label: (N,) integers. column_label: (M,), where the columns' labels are not the rows'
            (``similarity_scores(x, y)``, x the first rows of y); row i is column i all the same, no pair with itself.
    Returns a float32 loss (float64 for float64 scores). Raises ValueError or TypeError for bad arguments.
"""


def labelled(name: str, scores: Scores | Tensor, label: Tensor, column_label: Tensor | None):
    """Scores, labels of rows and of columns, and every row's own column."""
    scores = pair_scores(name, scores)
    expect(scores.rows <= scores.columns, name, "scores", "each row among the columns", (scores.rows, scores.columns))
    return scores, *labels(name, scores, "label", label, column_label), scores.diagonal()


def relations(label: Tensor, own: Tensor, column_label: Tensor) -> tuple[Where, Where]:
    """The positives of each row, the row itself left out, and its negatives."""
    return Same(label, column_label, without=own), Other(label, column_label)


def masks(label: Tensor, own: Tensor, column_label: Tensor) -> tuple[Tensor, Tensor]:
    """The same two densely (n, M), for few rows."""
    same = label.unsqueeze(1) == column_label
    return same.scatter(1, own.unsqueeze(1), False), ~same


def all_masks(label: Tensor, column_label: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same of all rows, for a reference."""
    return masks(label, torch.arange(len(label), device=label.device), label if column_label is None else column_label)


def same_count(label: Tensor, column_label: Tensor) -> Tensor:
    """(N,) number of columns with the row's label, its own among them. No wait for a device."""
    ordered = column_label.sort().values
    return torch.searchsorted(ordered, label, right=True) - torch.searchsorted(ordered, label)


def nonzero_mean(scores: Scores, losses: Tensor) -> Tensor:
    """Mean of the losses of rows that are above 0; 0 where none is."""
    count = scores.mean((losses > 0).to(losses.dtype))
    return scores.mean(losses) / torch.where(count == 0, 1.0, count)


def some_labels(rows: int, columns: int) -> Tensor:
    """For CASES: the last label occurs once in 5 k + 1 rows."""
    return torch.arange(rows) % 5 + 5 * (torch.arange(rows) == rows - 1)
