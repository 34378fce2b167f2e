"""Fenchel–Young losses of sparsemax and entmax-1.5: their threshold has no summary that blocks of a row could merge.

L(z, y) = Ω*(z) + Ω(e_y) − z_y with Ω*(z) = max_p ⟨p, z⟩ − Ω(p) over the simplex, whose gradient is the maximiser p.
Mathieu Blondel, André Martins and Vlad Niculae, "Learning with Fenchel-Young Losses", JMLR 2020, arXiv 1901.02324.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from .. import autograd
from ..checks import expect
from ..lists import Lists
from ..row_loss import row_loss
from ..scores import Scores
from ..sorting import entmax, threshold
from ..trace import PROGRAMS
from ..whole_rows import WholeRows

COMMON = """
    Computed as a sum of terms >= 0, so that it keeps its digits where it is small, and exactly 0 where the target's
    score is above all others by the margin. −inf scores have probability and gradient 0; a target of −inf has loss inf.
    Scores of +inf share the probability. It walks chunks of whole rows within the memory budget (at least one row of V
    scores), three GEMMs forward and backward (four with reduction="none"); `schedule` and `gradient_filter` of
    `linear_scores` have no effect. Not for scores that are spread over processes.
"""


def _by(z: Tensor) -> str:
    return threshold.who(z, Lists(z.shape, 1))


class _Dense(torch.autograd.Function):
    """(n,) losses of dense scores, with ∂/∂z = p − y as a differentiable function of z."""

    @staticmethod
    def forward(ctx, z, target, kind):
        ctx.save_for_backward(z, target)
        ctx.kind = kind
        return threshold.losses(z.contiguous(), target, None, None, kind, _by(z)).to(z.dtype)

    @staticmethod
    def backward(ctx, grad):
        z, target = ctx.saved_tensors
        p = torch.ops.fusedloss.entmax(z.contiguous(), None, ctx.kind)
        y = torch.zeros_like(z).scatter(1, target.unsqueeze(1), 1.0).masked_fill(z == -torch.inf, 0.0)
        return grad.unsqueeze(1) * (p - y), None, None


def _step(kind: int, z: Tensor, rows: list[Tensor], factor: Tensor, out: Tensor | None, backend: str) -> Tensor:
    plain = backend == "torch" and z.dtype != torch.float64  # asked for; float64 has no other
    return threshold.losses(z, rows[0], factor, out, kind, "torch" if plain else _by(z))


def _evaluate(key, scores: Scores, keep, factor, rows, shared, options, reduction) -> Tensor:
    """`row_loss.evaluate` for whole rows."""
    expect(type(scores) is Scores, key, "scores", "scores of one process", type(scores).__name__)
    scores = scores.keeping(keep)
    text, streams = scores.spec((), key), scores.streams()
    if reduction != "none":
        return autograd.weighted_total(text, streams, keep, factor, rows, [])
    losses = autograd.row_losses(text, streams, keep, rows)
    if keep is not None:  # before the factor: an ignored row's loss may be inf or NaN
        losses = torch.where(keep, losses, 0.0)
    return (losses * factor).reshape(scores.leading)


def fenchel_young_loss(kind: int) -> Callable:
    """A decorator: of a function of (scores, target), read for name and docstring alone, the loss of that kind."""

    def decorate(function: Callable) -> Callable:
        loss = row_loss(function, _evaluate)
        PROGRAMS[function.key] = WholeRows(lambda z, target: _Dense.apply(z, target, kind), partial(_step, kind))
        loss.__doc__ = loss.__doc__.replace("\n\nCommon arguments:", f"\n{COMMON}\nCommon arguments:")
        return loss

    return decorate
