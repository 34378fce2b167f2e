"""What the pair losses share: scores of pairs, the positive of each row, labels of rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import expect
from ..scores import Scores, as_scores
from ..targets import integral

COMMON = """
    Common arguments:
        scores: `similarity_scores(x, y, scale=…)`, N × M, never stored, or a dense matrix (N, M) of scores.
        target: (N,) the column of each row's positive; None: the diagonal, where x_i and y_i are a pair.
        row_weight: (N,) weights of the rows, differentiable; a mean divides by their sum.
        ignore_index: rows with this target have loss 0, gradient exactly 0, and do not count.
        reduction: "mean" over the rows that count (0 when there are none), "sum" or "none".
    Returns a float32 loss (float64 for float64 scores).
    Raises ValueError or TypeError for bad arguments, IndexError for a target out of range, before anything is computed.
"""


def pair_scores(name: str, scores: Scores | Tensor, argument: str = "scores", *, square: bool = False) -> Scores:
    """The scores, as N × M; with `square` N = M, where a column has a positive as a row has."""
    matrix = isinstance(scores, Scores) or (isinstance(scores, Tensor) and scores.dim() == 2)
    expect(matrix, name, argument, "similarity_scores(x, y) or a matrix (N, M)", scores)
    # A matrix without columns and rows is a batch of nothing, whose loss is 0.
    scores = Scores(scores) if isinstance(scores, Tensor) and scores.shape == (0, 0) else as_scores(scores)
    expect(len(scores.leading) == 1, name, argument, "one dimension of rows", tuple(scores.leading))
    shape = scores.rows, columns_here(scores)
    expect(not square or shape[0] == shape[1], name, argument, "as many rows as columns", shape)
    return scores


def columns_here(scores: Scores) -> int:
    """Number of columns that are given here: all M, but for scores between the features of several processes."""
    return scores.columns if scores.weight is None else len(scores.weight)


def positives(name: str, scores: Scores, target: Tensor | None) -> Tensor:
    """(N,) the column of each row's positive; or (N, k), where a loss takes several."""
    if target is None:
        shape = scores.rows, columns_here(scores)
        expect(shape[0] <= shape[1], name, "target", "given where N > M", shape)
        return scores.diagonal()
    expect(isinstance(target, Tensor), name, "target", "a tensor of columns", type(target).__name__, TypeError)
    return target


def labels(name: str, scores: Scores, kind: str, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N,) and (M,) int64 labels of rows and columns; the columns' are the rows' where they are not given.

    ``kind``: the argument's name, label or row_group; that of the columns' is then column_label or column_group.
    """
    other, here = f"column_{kind.removeprefix('row_')}", columns_here(scores)
    expect(columns is not None or scores.rows == here, name, other, "given where N ≠ M", columns)
    columns = rows if columns is None else columns
    for argument, values, count in ((kind, rows, scores.rows), (other, columns, here)):
        expect(isinstance(values, Tensor), name, argument, "an integer tensor", values, TypeError)
        whole = not (values.is_floating_point() or values.is_complex())
        expect(whole, name, argument, "integers", values.dtype, TypeError)
        if values.shape != (count,):  # to say the number would make it a constant under torch.compile
            expect(False, name, argument, f"shape ({count},)", values)
    return rows.long(), scores.of_columns(columns.long())


def checked_columns(name: str, scores: Scores, target: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of any shape, checked as targets are, −1 for none (−100); and what to multiply losses with."""
    expect(integral(target), name, "target", "an integer tensor of columns", target.dtype, TypeError)
    safe, keep, valid = torch.ops.fusedloss.checked_target(target, scores.columns, -100, name)
    return torch.where(keep, safe, -1), valid
