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
        row_weight: (N,) weights of the rows, differentiable. ignore_index: rows with this target have loss 0, gradient
            exactly 0, and do not count. reduction: "mean" over the rows that count (0 when there are none), "sum", "none".
    Returns a float32 loss (float64 for float64 scores).
    Raises ValueError or TypeError for bad arguments, IndexError for a target out of range, before anything is computed.
"""


def pair_scores(name: str, scores: Scores | Tensor, *, square: bool = False) -> Scores:
    """The scores, as N × M; with `square` N = M, where a column has a positive as a row has."""
    matrix = isinstance(scores, Scores) or (isinstance(scores, Tensor) and scores.dim() == 2)
    expect(matrix, name, "scores", "similarity_scores(x, y) or a matrix (N, M)", scores, ValueError)
    # A matrix without columns has no rows either: a batch of nothing.
    scores = Scores(scores) if isinstance(scores, Tensor) and scores.shape == (0, 0) else as_scores(scores)
    shape = scores.rows, scores.columns
    expect(len(scores.leading) == 1, name, "scores", "N × M of them", tuple(scores.leading))
    expect(not square or scores.rows == scores.columns, name, "scores", "as many rows as columns", shape)
    return scores


def positives(name: str, scores: Scores, target: Tensor | None) -> Tensor:
    """(N,) the column of each row's positive."""
    if target is None:
        shape = scores.rows, scores.columns
        expect(scores.rows <= scores.columns, name, "target", "given where N > M", shape)
        return scores.diagonal()
    return target


def labels(name: str, scores: Scores, kind: str, rows: Tensor, columns: Tensor | None) -> tuple[Tensor, Tensor]:
    """(N,) and (M,) int64 labels of rows and columns; the columns' are the rows' where they are not given."""
    expect(columns is not None or scores.rows == scores.columns, name, f"column_{kind}", "given where N ≠ M", columns)
    here = len(scores.diagonal())
    for argument, values in ((kind, rows), (f"column_{kind}", columns)):
        given = argument == kind or values is not None
        expect(not given or isinstance(values, Tensor), name, argument, "an integer tensor", values, TypeError)
        expect(not given or integral(values), name, argument, "integers", getattr(values, "dtype", None), TypeError)
    expect(rows.shape == (here,), name, kind, f"shape ({here},)", rows)
    columns = scores.of_columns(rows.long() if columns is None else columns.long())
    expect(columns.shape == (scores.columns,), name, f"column_{kind}", f"shape ({scores.columns},)", columns)
    return rows.long(), columns


def checked_columns(name: str, scores: Scores, target: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of any shape, checked as targets are: −1 for −100, none. And what to multiply losses with (see targets)."""
    expect(integral(target), name, "target", "an integer tensor of columns", target.dtype, TypeError)
    safe, keep, valid = torch.ops.fusedloss.checked_target(target, scores.columns, -100, name)
    return torch.where(keep, safe, -1), valid
