"""The walk of losses that no statistic gives: dense scores of a few rows at a time, value and gradient at once.

Such a loss compares the scores of a row, or of the batch, with each other: more work per score than a pass over them,
in plain PyTorch. What it keeps is what every loss keeps: a chunk of rows, never the matrix.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dense import dense_scores
from ..scores import Scores

BUDGET = 64 << 20  # bytes, where the scores come without a memory budget


def total_over_chunks(scores: Scores, function: Callable, *rows: Tensor, copies: int, shared: Tensor | None = None):
    """(total, count) of ``function(z, *rows, shared)`` over chunks of rows, z (n, M) their dense scores.

    ``function`` returns total and count, 0-dimensional, and the derivatives of the total in z and in ``shared``, a
    tensor that all chunks see, or None. ``copies``: how many numbers it holds per score. Differentiable once, in the
    scores and in ``shared``; the gradients are computed with the value.
    """
    x, weight, *more = scores.streams()
    weight = x if scores.symmetric else weight  # its gradient too
    cells = (scores.walk.memory_budget or BUDGET) // (8 * copies)
    step = max(1, cells // max(1, scores.columns))
    return _Total.apply(scores, function, rows, step, shared, x, weight, *more)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, function, rows, step, shared, *streams):
        needs = ctx.needs_input_grad[5:]
        # x and weight as they are multiplied, but in the type of sums: gradients are not rounded chunk by chunk.
        wide = [t if t is None else t.to(scores.multiply_dtype).to(scores.dtype) for t in streams[:2]]
        leaves = [None if t is None else t.detach().requires_grad_(n) for t, n in zip((*wide, *streams[2:]), needs)]
        x, *leaves = leaves
        weight, *vectors, scale = leaves
        scale = scores.scale if scale is None else scale
        dx = torch.zeros_like(x) if needs[0] else None
        by_shared = None if shared is None else torch.zeros_like(shared)
        total, count = (torch.zeros((), dtype=torch.float64, device=x.device) for _ in range(2))
        for start in range(0, len(x), step):
            part = slice(start, start + step)
            few = x.detach()[part].requires_grad_(needs[0])
            with torch.enable_grad():
                z = dense_scores(few, weight, *vectors, scores.softcap, scale, scores.dtype)
            part_total, part_count, slope, slope_shared = function(z.detach(), *[r[part] for r in rows], shared)
            total, count = total + part_total, count + part_count
            if z.requires_grad:
                z.backward(slope.to(z.dtype))  # adds to the leaves' gradients
            if needs[0]:
                dx[part] = few.grad
            if shared is not None:
                by_shared += slope_shared
        found = [by_shared, dx, *[None if t is None else t.grad for t in leaves]]
        ctx.gradients = [None if g is None else (g, t.dtype) for g, t in zip(found, (shared, *streams))]
        ctx.mark_non_differentiable(count)
        return total, count

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        return None, None, None, None, *[None if g is None else (g[0] * grad).to(g[1]) for g in ctx.gradients]
