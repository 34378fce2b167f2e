"""A spherical loss of a linear layer whose weight is an ordinary tensor, at a cost per example free of its classes.

With the rows' mean m̄ and Gram matrix Q = W_cᵀ W_c, W_c = W − 1 m̄ᵀ, of which Gram.of says more, for an example h

    μ = h·m̄,   v = hᵀ Q h,   a = h·(w_c − m̄)          the statistics of scores that nobody computes
    ∂L/∂h = 2γ Q h + Σ_k α_k (w_ck − m̄) + t m̄          with (α, t, γ) of losses/centred.py
    ∂L/∂W = W_c S + Σ_ik α_ik e_ck h_iᵀ + 1 gᵀ,        S = 2 Hᵀ Γ H,   g = Hᵀ (t − Σ_k α_k) / n

A bias is one more column of W, and h has a 1 there. Examples cost O(d²), the matrix n d² and ∂L/∂W 2 n d min(d, 2N).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import expect
from ..nn.loss import Loss
from ..scores import FLOATING, Scores
from .family import Member, member
from .gram import F64, Gram, exact_products
from .rows import Rows
from .weight_gradient import Features, weight_gradient


@torch.compiler.disable
def linear_loss(
    h: Tensor,
    weight: Tensor,
    target: Tensor,
    loss: Loss,
    *,
    bias: Tensor | None = None,
    row_weight: Tensor | None = None,
    gram: Gram | None = None,
    caller: str = "linear_loss",
) -> Tensor:
    """`loss(h @ weight.T + bias, target, row_weight=row_weight)` of a spherical loss, without the scores.

    P. Vincent, A. de Brébisson and X. Bouthillier, 2015, arXiv 1412.7091. The Gram matrix of `weight` is made anew in
    every call, for nothing tells for certain that a weight has not changed. Under torch.compile the graph breaks here.

    Args:
        h: (*leading, d) features; weight: (n, d), n ≥ 2; bias: (n,). Each float64, float32, bfloat16 or float16.
            Products and their sums are float32 (float64 for a float64 weight), also under autocast.
        target: (*leading) class indices, or (*leading, K), whose losses are added.
        loss: a `fusedloss.nn` module: SphericalZLoss, TaylorSoftmaxLoss, SphericalSoftmaxLoss or SquaredErrorLoss. Its
            hyperparameters are numbers; class weights, ignore_index and reduction are its own.
        row_weight: (*leading) weights of the rows, differentiable.
        gram: `Gram.of(weight, bias)`, made before; the caller answers for its being that of this weight.
        caller: whom errors name.

    Returns a float32 loss (float64 for a float64 weight). Gradients flow into h, weight, bias and row_weight, each in its
    own type; derivatives of any order are right.

    Raises:
        TypeError, ValueError, IndexError: name the argument, what was expected and what came.
    """
    _check(caller, h, weight, bias, gram)
    kind = member(caller, loss)
    with torch.autocast(h.device.type, enabled=False):
        rows = Rows.of(caller, loss, Scores(h, weight, bias), target, row_weight)
        flat = h.reshape(len(rows.target), h.shape[-1])
        return rows.reduced(_Losses.apply(flat, weight, bias, rows.target, rows.share, rows.keep, kind, gram))


def _check(caller: str, h: Tensor, weight: Tensor, bias: Tensor | None, gram: Gram | None) -> None:
    expect(isinstance(h, Tensor) and h.dim() >= 1, caller, "h", "a tensor (*leading, d)", h)
    expect(isinstance(weight, Tensor) and weight.dim() == 2, caller, "weight", "a tensor (n, d)", weight)
    expect(len(weight) >= 2, caller, "weight", "at least two classes", weight)
    expect(h.shape[-1] == weight.shape[1], caller, "h", f"(*leading, {weight.shape[1]}) to match weight", h)
    expect(bias is None or bias.shape == weight.shape[:1], caller, "bias", f"({len(weight)},) to match weight", bias)
    for name, tensor in (("h", h), ("weight", weight), ("bias", bias)):
        if tensor is not None:
            known = tensor.dtype in FLOATING
            expect(known, caller, name, "float64, float32, bfloat16 or float16", tensor.dtype, TypeError)
            expect(tensor.device == weight.device, caller, name, f"a tensor on {weight.device}", tensor.device)
    width = weight.shape[1] + (bias is not None)
    fits = gram is None or (
        len(gram.pivot) == width and gram.pivot.dtype == torch.promote_types(weight.dtype, torch.float32)
    )
    expect(fits, caller, "gram", "Gram.of(weight, bias)", gram)


class _Losses(torch.autograd.Function):
    """(N,) float64 losses of rows, each the sum over its targets times their shares."""

    @staticmethod
    def forward(ctx, h, weight, bias, target, share, keep, kind, gram):
        with exact_products(h.device):
            ctx.gram = (Gram.of(weight, bias) if gram is None else gram) if len(h) else None
            ctx.kind, ctx.mask = kind, None if keep.device.type == "cpu" and keep.all() else keep
            ctx.save_for_backward(h, weight, bias, target, share)
            ctx.set_materialize_grads(False)
            losses, ctx.slopes, ctx.dh = _visit(ctx, h, weight, bias, target, share, ctx.needs_input_grad[0])
        return losses

    @staticmethod
    def backward(ctx, upstream):
        if upstream is None:
            return (None,) * 8
        h, weight, bias, target, share = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _graph_of_gradients(ctx, upstream)
        dh = dweight = dbias = None
        column = upstream.unsqueeze(1)
        with exact_products(h.device):
            if ctx.needs_input_grad[0]:
                kept, ctx.dh = ctx.dh, None
                if kept is None:  # a second backward: the first one gave the buffer away
                    kept = _visit(ctx, h, weight, bias, target, share, True)[2]
                dh = kept.mul_(column.to(kept.dtype)).to(h.dtype)
            if any(ctx.needs_input_grad[1:3]):
                alpha, t, gamma = ctx.slopes
                slopes = alpha * column, t * upstream, gamma * upstream
                where = torch.where(share > 0, target, len(weight))
                features = Features(h, ctx.mask, weight, bias is not None)
                dweight, dbias = weight_gradient(weight, bias, ctx.gram, features, where, *slopes)
        return dh, dweight, dbias, None, None, None, None, None


def _visit(ctx, h, weight, bias, target, share, with_gradient):
    """Losses, (α, t, γ), and of each row's own loss ∂L/∂h in the type of products; by chunks of rows."""
    features, gram = Features(h, ctx.mask, weight, bias is not None), ctx.gram
    dtype, d = features.dtype, h.shape[1]
    losses, slopes = share.new_empty(len(h)), (torch.empty_like(share), *share.new_empty(2, len(h)))
    dh = torch.empty(h.shape, dtype=dtype, device=h.device) if with_gradient else None
    if not len(h):
        return losses, slopes, dh
    matrix, vectors = gram.matrix.to(dtype), torch.stack([gram.offset, gram.mean], 1)
    for rows in features.chunks(share.shape[1] + 3):
        x = features.take(rows)
        xq, shifts = x @ matrix, x.to(F64) @ vectors
        squares = (xq * x).sum(1, dtype=F64).clamp(min=0)
        picked = weight[target[rows]].to(dtype).sub_(gram.pivot[:d])
        hit = (picked * x[:, :d].unsqueeze(1)).sum(2, dtype=F64) + shifts[:, :1]
        if bias is not None:
            hit += bias[target[rows]] - gram.pivot[d]
        losses[rows], alpha, t, gamma = ctx.kind.centred(hit, shifts[:, 1], squares, len(weight), share[rows])
        for whole, part in zip(slopes, (alpha, t, gamma)):
            whole[rows] = part
        if with_gradient:
            along = torch.stack([alpha.sum(1), t], 1) @ vectors[:d].t()
            along += picked.mul_(alpha.to(dtype).unsqueeze(2)).sum(1)
            dh[rows] = along.add_(xq[:, :d] * (2 * gamma).to(dtype).unsqueeze(1))
    return losses, slopes, dh


def _graph_of_gradients(ctx, upstream):
    """What backward returns, as the gradient of a plain formula: differentiable again. It takes a copy of W."""
    h, weight, bias, target, share = ctx.saved_tensors
    # Views: one input may be made from another, and a derivative in the one must not run through the other.
    inputs = [None if x is None else x.view_as(x) for x in (h, weight, bias)]
    with exact_products(h.device):
        losses = _plain(*inputs, target, share, ctx.mask, ctx.kind)
        wanted = [x for x, needed in zip(inputs, ctx.needs_input_grad) if needed]
        found = iter(torch.autograd.grad(losses, wanted, upstream, create_graph=True, allow_unused=True))
    return *[next(found) if needed else None for needed in ctx.needs_input_grad[:3]], None, None, None, None, None


def _plain(h, weight, bias, target, share, mask, kind: Member) -> Tensor:
    """The losses in a few lines of autograd's; O(n d²) as well."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    h, w = (h if mask is None else torch.where(mask.unsqueeze(1), h, 0.0)).to(dtype), weight.to(dtype)
    if bias is not None:
        h, w = torch.cat([h, torch.ones_like(h[:, :1])], 1), torch.cat([w, bias.to(dtype).unsqueeze(1)], 1)
    mean = w.mean(0)
    away = w - mean
    squares = ((h @ (away.t() @ away)) * h).sum(1).clamp(min=0)
    hit = (away[target] * h.unsqueeze(1)).sum(2)
    return kind.centred(hit.to(F64), (h @ mean).to(F64), squares.to(F64), len(w), share).loss
