"""Similarity scores: two sets of embeddings, or one with itself."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import expect
from .plan import Walk
from .scores import Scores, check_linear


def similarity_scores(
    x: Tensor,
    y: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor | None = None,
    normalize: bool = False,
    memory_budget: int | None = None,
    schedule: str = "auto",
    backend: str = "auto",
) -> Scores:
    """Scores s_ij = scale · x_i · y_j + bias between two sets of embeddings, that are never stored.

    Args:
        x: (N, D) embeddings, one row each; float64, float32, bfloat16 or float16.
        y: (M, D), of the same type; None, or x itself, for the similarities of x with itself: then s_ij = s_ji, and
            half of the products are enough.
        scale: number, or a 0-dimensional tensor that may be learnable: 1 / temperature. Models keep its logarithm:
            pass ``log_scale.exp()``.
        bias: number, or a 0-dimensional tensor that may be learnable, added to every score.
        normalize: divide every row of x and y by its Euclidean length first (a row of zeros stays zero): cosines.
        memory_budget, schedule, backend: as for `linear_scores`.

    Raises:
        TypeError, ValueError: name the argument, what was expected and what came.
    """
    name = "similarity_scores"
    same = check_features(name, x, y, scale, bias, memory_budget)
    expect(schedule in ("auto", "eager", "recompute"), name, "schedule", "auto, eager or recompute", schedule)
    if normalize:
        x, y = unit(x), None if same else unit(y)
    y = x if same else y
    shift = shift_of(bias, x)
    shift = None if shift is None else shift.expand(y.shape[0])
    scale = scale if isinstance(scale, Tensor) else float(scale)
    walk = Walk(memory_budget, schedule, 0.0, backend)
    return Scores(x, y, None, None, shift, 0.0, scale, walk, None, same and schedule != "eager")


def check_features(
    name: str, x: Tensor, y: Tensor | None, scale, bias, memory_budget: int | None, empty: bool = False
) -> bool:
    """Whether the scores are those of x with itself. ``empty``: there may be rows but no columns."""
    same = y is None or y is x
    expect(isinstance(x, Tensor) and x.dim() == 2, name, "x", "a tensor (N, D)", x)
    expect(same or (isinstance(y, Tensor) and y.dim() == 2), name, "y", "a tensor (M, D)", y)
    expect(same or y.shape[1] == x.shape[1], name, "y", f"(M, {x.shape[1]}) to match x", y)
    columns = len(x if same else y)
    if columns or (len(x) and not empty):  # no rows and no columns: a batch of nothing, whose losses are 0
        check_linear(name, x, x if same else y, None, prefix="y: ")
    expect(
        memory_budget is None or memory_budget > 0, name, "memory_budget", "a positive number of bytes", memory_budget
    )
    for argument, value in (("scale", scale), ("bias", 0.0 if bias is None else bias)):
        number = isinstance(value, (int, float)) and value - value == 0  # neither infinite nor NaN
        scalar = value.dim() == 0 if isinstance(value, Tensor) else number
        expect(scalar, name, argument, "a number or a 0-dimensional tensor", value)
    return same


def shift_of(bias: float | Tensor | None, x: Tensor) -> Tensor | None:
    """The bias as a 0-dimensional tensor; None for none."""
    if bias is None or (isinstance(bias, (int, float)) and bias == 0):
        return None
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    return bias.to(x.device) if isinstance(bias, Tensor) else torch.full((), bias, dtype=wide, device=x.device)


def unit(x: Tensor) -> Tensor:
    """Rows of length 1, in x's type; computed in float32 (float64 for float64). A row of zeros stays zero."""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    length = wide.square().sum(1, keepdim=True)
    return (wide * torch.rsqrt(torch.where(length == 0, 1.0, length))).to(x.dtype)
