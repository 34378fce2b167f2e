"""The NDCG of lists in the relaxed order that NeuralSort and Sinkhorn's scaling make of their scores: an op.

csrc/sinkhorn.h has the formulas. The op finds the gradient on the way, since one number per list is all that comes back
from upstream: what is kept for the backward pass is that gradient, one number per item.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.native import _native, address
from ..lists import Lists
from .engines import engine
from .sinkhorn_torch import relaxed_ndcg

DTYPES = {torch.float32: 0, torch.float64: 3}
_op = torch.ops.fusedloss

torch.library.define(
    "fusedloss::neural_ndcg",
    "(Tensor scores, Tensor gains, Tensor? mask, Tensor? offsets, float tau, int k, int max_iterations, "
    "float tolerance, bool gradient) -> (Tensor, Tensor, Tensor)",  # each list's NDCG and ideal DCG, ∂NDCG/∂scores
)
torch.library.define(
    "fusedloss::neural_ndcg_backward", "(Tensor grad, Tensor dscores, Tensor scores, Tensor? offsets) -> Tensor"
)


def neural_ndcg(
    lists: Lists, scores: Tensor, gains: Tensor, tau: float, k: int, max_iterations: int, tolerance: float
) -> tuple[Tensor, Tensor]:
    """Flat scores and gains → NDCG, differentiable in the scores, and ideal DCG of each list; k = 0: all ranks."""
    gradient = torch.is_grad_enabled() and scores.requires_grad
    given = scores, gains.detach(), lists.mask, lists.offsets, float(tau), k, max_iterations, float(tolerance), gradient
    if gradient and not torch.compiler.is_compiling():
        return _Function.apply(*given)
    return _op.neural_ndcg(*given)[:2]


class _Function(torch.autograd.Function):
    """The op in eager mode, where a registered formula takes three times as long to get going."""

    @staticmethod
    def forward(ctx, *given):
        ndcg, ideal, dscores = _op.neural_ndcg(*given)
        ctx.save_for_backward(dscores, given[0], given[3])
        ctx.mark_non_differentiable(ideal)
        ctx.set_materialize_grads(False)
        return ndcg, ideal

    @staticmethod
    def backward(ctx, grad, _ideal):
        return _differentiate(ctx, grad)


def _rows(scores: Tensor, offsets: Tensor | None) -> int:
    return scores.shape[0] if offsets is None else offsets.shape[0] - 1


@torch.library.impl("fusedloss::neural_ndcg", "CompositeExplicitAutograd")
def _neural_ndcg(scores, gains, mask, offsets, tau, k, max_iterations, tolerance, gradient):
    rows = _rows(scores, offsets)
    if engine(scores.device, "cpu") != "cpu":
        found = relaxed_ndcg(scores, gains, mask, offsets, tau, k, max_iterations, tolerance, gradient)
        return tuple(x.contiguous() for x in found)
    scores, gains = scores.contiguous(), gains.contiguous()
    ndcg, ideal = scores.new_empty(rows), scores.new_empty(rows)
    dscores = torch.empty_like(scores) if gradient else scores.new_empty(0)
    width = scores.shape[1] if offsets is None else 0
    mask = None if mask is None else mask.contiguous()
    given = rows, width, address(offsets), address(mask), DTYPES[scores.dtype], tau, k, max_iterations, tolerance
    out = ndcg.data_ptr(), ideal.data_ptr(), dscores.data_ptr() if gradient else 0
    _native.neural_ndcg(*given, scores.data_ptr(), gains.data_ptr(), *out)
    return ndcg, ideal, dscores


@torch.library.register_fake("fusedloss::neural_ndcg")
def _neural_ndcg_fake(scores, gains, mask, offsets, tau, k, max_iterations, tolerance, gradient):
    rows = _rows(scores, offsets)
    return scores.new_empty(rows), scores.new_empty(rows), scores.new_empty(scores.shape if gradient else 0)


@torch.library.impl("fusedloss::neural_ndcg_backward", "CompositeExplicitAutograd")
def _backward(grad, dscores, scores, offsets):
    if offsets is None:
        return grad.unsqueeze(1) * dscores
    return grad.repeat_interleave(offsets.diff(), output_size=dscores.shape[0]) * dscores


@torch.library.register_fake("fusedloss::neural_ndcg_backward")
def _backward_fake(grad, dscores, scores, offsets):
    return torch.empty_like(dscores)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(output[2], inputs[0], inputs[3])
    ctx.mark_non_differentiable(output[1], output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx, grad, *_):
    dscores, scores, offsets = ctx.saved_tensors
    found = None if grad is None else _op.neural_ndcg_backward(grad, dscores, scores, offsets)
    return found, *(None,) * 8


def _refuse(ctx, *_):
    raise RuntimeError("neural_ndcg_loss: has no second derivative: what create_graph=True made is a constant")


torch.library.register_autograd("fusedloss::neural_ndcg", _differentiate, setup_context=_keep)
torch.library.register_autograd("fusedloss::neural_ndcg_backward", _refuse)
