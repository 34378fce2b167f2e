"""BiXSE: sigmoid loss with graded positives."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_reduction, expect
from ..row_loss import row_loss
from ..scores import FLOATING, Scores
from ..statistics import Score, SumOf
from ..targets import spoilt
from .pairs import checked_columns, pair_scores, positives


@row_loss
def _bixse_loss(scores, grade, columns, *, per_pair: bool):
    every, hits = scores.reduce(SumOf("softplus"), Score(columns))
    losses = every - (grade.to(hits.dtype) * hits).sum(1)
    return losses / scores.columns if per_pair else losses


def bixse_loss(
    scores: Tensor | Scores,
    grade: Tensor,
    target: Tensor | None = None,
    *,
    divisor: str = "rows",
    row_weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """BiXSE: L = Σ_j log(1 + e^{z_j}) − Σ_{j graded} g_j z_j.

    Binary cross-entropy with grades g, 0 where none is given. Christos Tsirigotis et al., "BiXSE: Improving Dense
    Retrieval via Probabilistic Graded Relevance Distillation", 2025, arXiv 2508.06781: pointwise cross-entropy on
    graded labels with in-batch negatives. There is no official code, and of scale, bias and divisor the abstract
    says nothing: z = scale · x·y + bias is made by `similarity_scores`; divisor="rows" is `sigmoid_loss`'s, "pairs"
    divides by M once more. The least value is the grades' entropy, not 0.

        scores: `similarity_scores(x, y, …)`, N × M, or a dense matrix (N, M).
        grade: g in [0, 1], (N,), the grade of each row's own column, or (N, k); may require grad.
        target: columns of the grades, int64, of the same shape; None: the diagonal. −100: no column.
        row_weight: (N,) weights of the rows, differentiable. reduction: "mean" over rows, "sum" or "none".

    Returns a float32 loss (float64 for float64 scores). Raises ValueError or TypeError; IndexError for a column out of
    range.
    """
    name = "bixse_loss"
    check_reduction(name, reduction)
    expect(divisor in ("rows", "pairs"), name, "divisor", "rows or pairs", divisor)
    scores = pair_scores(name, scores)
    target = positives(name, scores, target)
    kind = getattr(grade, "dtype", type(grade))
    expect(kind in FLOATING, name, "grade", "a floating-point tensor", kind, TypeError)
    right = isinstance(target, Tensor) and target.dim() in (1, 2) and target.shape[:1] == scores.leading
    expect(right, name, "target", "columns of shape (N,) or (N, k)", target)
    expect(grade.shape == target.shape, name, "grade", f"shape {tuple(target.shape)} as target", grade)
    columns, valid = checked_columns(name, scores, target.reshape(len(target), -1 if len(target) else 1))
    options = dict(per_pair=divisor == "pairs", row_weight=row_weight, reduction=reduction)
    return _bixse_loss(scores, spoilt(grade, valid).reshape(columns.shape), columns, **options)


def reference(z: Tensor, grade, target=None, divisor="rows") -> Tensor:
    """Mean over rows, densely."""
    columns = torch.arange(z.shape[1], device=z.device)
    target = columns[: z.shape[0]] if target is None else target
    grade, target = grade.to(z.dtype).reshape(z.shape[0], -1), target.reshape(z.shape[0], -1)
    grades = ((target[:, :, None] == columns) * grade[:, :, None]).sum(1)
    losses = torch.nn.functional.binary_cross_entropy_with_logits(z, grades, reduction="none")
    return losses.sum(1).mean() if divisor == "rows" else losses.mean()


def _grade(rows: int, columns: int) -> Tensor:
    return torch.linspace(0, 1, rows)


def _two_columns(rows: int, columns: int) -> Tensor:
    """The row's own and the next one; the first row has none but its own."""
    own = torch.arange(rows)
    return torch.stack([own, torch.where(own == 0, -100, (own + 1) % columns)], 1)


_SPARSE = {"grade": lambda rows, columns: torch.linspace(0, 1, 2 * rows).reshape(rows, 2), "target": _two_columns}
CASES = ({"grade": _grade}, {"grade": _grade, "divisor": "pairs"}, _SPARSE)
SCORES = "pair"
