"""Sparsemax and entmax-1.5: softmax's relatives whose smallest probabilities are exactly 0."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.native import ALL_DTYPES
from ..checks import expect, expect_reverse_mode
from ..lists import Lists, lists_of
from ..operators import like, more_rows, operator
from . import threshold
from .threshold import ENTMAX15, SPARSEMAX

COMMON = """
        values: float64, float32, bfloat16 or float16 of any shape; the result has its shape and type, and is computed
            in float64 from the few entries near a row's largest. Cost: two passes over a row, no sort.
        dim: the dimension that sums to 1.
        mask: bool of values' shape, False: left out, as −inf is. offsets: (lists + 1,) int64 for values (items,): list
            r is the items from offsets[r] to offsets[r + 1].
    Entries of −inf get exactly 0 and gradient 0; a row with nothing else, or nothing at all, is all 0. Entries of +inf
    share the row's 1 among themselves. A NaN makes its row NaN. The backward pass needs the result alone; derivatives
    of any order are right. Raises TypeError, ValueError or IndexError for bad arguments.
"""


def _lists(values: Tensor, offsets: Tensor | None) -> Lists:
    return Lists(values.shape, values.dim() - 1, None, offsets)


def _second_derivative(ctx, v):
    """The Jacobian is symmetric, so it is applied to v; its own slope, where p moves, for entmax alone."""
    p, g, offsets = ctx.saved_tensors
    (kind,) = ctx.options
    by_grad, by_p = _run_backward(p, v, offsets, kind), torch.zeros_like(p)
    if kind == ENTMAX15 and ctx.needs_input_grad[0]:
        lists, inside = _lists(p, offsets), p != 0
        root = torch.where(inside, torch.where(inside, p, 1.0).sqrt(), 0.0)
        total = lists.sum(root)
        total = torch.where(total == 0, 1.0, total)
        apart = [t - lists.spread(lists.sum(root * torch.where(inside, t, 0.0)) / total) for t in (g, v)]
        by_p = torch.where(inside, apart[0] * apart[1] / torch.where(inside, 2 * root, 1.0), 0.0)
    return by_p, by_grad


_run_backward = operator(
    "entmax_backward",
    "(Tensor p, Tensor grad, Tensor? offsets, int kind) -> Tensor",
    lambda p, grad, offsets, kind: threshold.project_backward(p, grad, _lists(p, offsets), kind),
    like,
    _second_derivative,
    vmap=more_rows,
)
project = operator(
    "entmax",
    "(Tensor values, Tensor? offsets, int kind) -> Tensor",
    lambda values, offsets, kind: threshold.project(values, _lists(values, offsets), kind),
    like,
    lambda ctx, grad: (_run_backward(ctx.saved_tensors[0], grad, ctx.saved_tensors[1], *ctx.options),),
    keep=lambda inputs, outputs: (outputs[0], inputs[1]),
    vmap=more_rows,
)


def _call(name: str, values: Tensor, dim: int, mask: Tensor | None, offsets: Tensor | None, kind: int) -> Tensor:
    lists = lists_of(name, values, dim, mask, offsets)
    expect_reverse_mode(name, values=values)
    expect(values.dtype in ALL_DTYPES, name, "values", "a floating-point tensor", values.dtype, TypeError)
    flat = lists.flat(values)
    if lists.mask is not None:
        flat = torch.where(lists.mask, flat, -torch.inf)
    return lists.shaped(project(flat, lists.offsets, kind))


def sparsemax(values: Tensor, dim: int = -1, *, mask: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
    """Sparsemax: the point p of the probability simplex nearest to z, p_j = [z_j − τ]₊ with Σ p = 1.

    André Martins and Ramón Fernandez Astudillo, "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label
    Classification", ICML 2016, arXiv 1602.02068.
    """
    return _call("sparsemax", values, dim, mask, offsets, SPARSEMAX)


def entmax15(values: Tensor, dim: int = -1, *, mask: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
    """Entmax with α = 1.5, between softmax and sparsemax: p_j = [z_j / 2 − τ]₊² with Σ p = 1.

    Ben Peters, Vlad Niculae and André Martins, "Sparse Sequence-to-Sequence Models", ACL 2019, arXiv 1905.05702.
    """
    return _call("entmax15", values, dim, mask, offsets, ENTMAX15)


sparsemax.__doc__ += COMMON
entmax15.__doc__ += COMMON
