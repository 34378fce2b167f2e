"""The NDCG of lists in the relaxed order that NeuralSort and Sinkhorn's scaling make of their scores: an op.

csrc/sinkhorn.h has the formulas. The op finds the gradient on the way, since one number per list is all that comes back
from upstream: what is kept for the backward pass is that gradient, one number per item.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.native import ALL_DTYPES, _native, address, contiguous, native_lists
from ..lists import Lists
from ..operators import like, operator
from .engines import engine
from .sinkhorn_torch import relaxed_ndcg


def neural_ndcg(
    lists: Lists, scores: Tensor, gains: Tensor, tau: float, k: int, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Flat scores and gains → NDCG, differentiable in the scores, and ideal DCG of each list; k = 0: all ranks."""
    gradient = torch.is_grad_enabled() and scores.requires_grad
    options = float(tau), k, max_iterations, float(tolerance), gradient
    return _run(scores, gains.detach(), lists.mask, lists.offsets, *options)[:2]


def _compute(scores, gains, mask, offsets, tau, k, max_iterations, tolerance, gradient):
    if engine(scores.device, "cpu") != "cpu":
        found = relaxed_ndcg(scores, gains, mask, offsets, tau, k, max_iterations, tolerance, gradient)
        return tuple(x.contiguous() for x in found)
    scores, gains, mask = contiguous(scores, gains, mask)
    ndcg, ideal, dscores = _fake(scores, gains, mask, offsets, tau, k, max_iterations, tolerance, gradient)
    given = *native_lists(scores, offsets, mask), ALL_DTYPES[scores.dtype], tau, k, max_iterations, tolerance
    _native.neural_ndcg(*given, *map(address, (scores, gains, ndcg, ideal, dscores if gradient else None)))
    return ndcg, ideal, dscores


def _fake(scores, gains, mask, offsets, tau, k, max_iterations, tolerance, gradient):
    rows = scores.shape[0] if offsets is None else offsets.shape[0] - 1
    return scores.new_empty(rows), scores.new_empty(rows), scores.new_empty(scores.shape if gradient else 0)


def _compute_backward(dscores, grad, scores, offsets):
    if offsets is None:
        return grad.unsqueeze(1) * dscores
    return grad.repeat_interleave(offsets.diff(), output_size=dscores.shape[0]) * dscores


def _refuse(ctx, _):
    raise RuntimeError("neural_ndcg_loss: has no second derivative: what create_graph=True made is a constant")


_run_backward = operator(
    "neural_ndcg_backward",
    "(Tensor dscores, Tensor grad, Tensor scores, Tensor? offsets) -> Tensor",
    _compute_backward,
    like,
    _refuse,
)
_run = operator(
    "neural_ndcg",
    "(Tensor scores, Tensor gains, Tensor? mask, Tensor? offsets, float tau, int k, int max_iterations, "
    "float tolerance, bool gradient) -> (Tensor, Tensor, Tensor)",  # each list's NDCG and ideal DCG, ∂NDCG/∂scores
    _compute,
    _fake,
    lambda ctx, grad, *_: (_run_backward(ctx.saved_tensors[0], grad, *ctx.saved_tensors[1:]),),
    keep=lambda inputs, outputs: (outputs[2], inputs[0], inputs[3]),
    constant=(1, 2),
)
