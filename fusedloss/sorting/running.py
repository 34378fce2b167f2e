"""Running log-sum-exps of lists, from each list's end, as an op: φ_i = log Σ_{m≥i} e^{x_m}."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.native import _native, address
from .engines import engine

DTYPES = {torch.float32: 0, torch.float64: 3}
_op = torch.ops.fusedloss

torch.library.define("fusedloss::running_logsumexp", "(Tensor x, Tensor? offsets) -> Tensor")
torch.library.define(
    "fusedloss::running_logsumexp_backward", "(Tensor grad, Tensor x, Tensor phi, Tensor? offsets) -> Tensor"
)


def running_logsumexp(x: Tensor, offsets: Tensor | None) -> Tensor:
    """Of flat values: (rows, n), or (items,) with offsets."""
    if torch.is_grad_enabled() and x.requires_grad and not torch.compiler.is_compiling():
        return _Function.apply(x, offsets)
    return _op.running_logsumexp(x, offsets)


def plain(x: Tensor, offsets: Tensor | None) -> Tensor:
    """Its meaning in plain PyTorch, of derivatives of any order; with offsets in O(n log n)."""
    if offsets is None:
        return x.flip(-1).logcumsumexp(-1).flip(-1)
    place, step = torch.arange(len(x), device=x.device), 1
    last = offsets[1:].repeat_interleave(offsets.diff(), output_size=len(x))
    while step < len(x):  # each item has the sum of `step` items; take the next step's along
        x = torch.where(place + step < last, torch.logaddexp(x, x.roll(-step)), x)
        step *= 2
    return x


def _given(x: Tensor, offsets: Tensor | None) -> tuple[int, int, int, int]:
    rows, width = x.shape if offsets is None else (offsets.shape[0] - 1, 0)
    return rows, width, address(offsets), DTYPES[x.dtype]


@torch.library.impl("fusedloss::running_logsumexp", "CompositeExplicitAutograd")
def _forward(x, offsets):
    if engine(x.device, "cpu") != "cpu":
        return plain(x, offsets).contiguous().clone()
    x = x.contiguous()
    phi = torch.empty_like(x)
    _native.running_logsumexp(*_given(x, offsets), x.data_ptr(), phi.data_ptr())
    return phi


@torch.library.impl("fusedloss::running_logsumexp_backward", "CompositeExplicitAutograd")
def _backward(grad, x, phi, offsets):
    if engine(x.device, "cpu") != "cpu":
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(plain(x, offsets), x, grad)[0].contiguous()
    x, phi, grad = x.contiguous(), phi.contiguous(), grad.contiguous()
    dx = torch.empty_like(x)
    _native.running_logsumexp_backward(
        *_given(x, offsets), x.data_ptr(), phi.data_ptr(), grad.data_ptr(), dx.data_ptr()
    )
    return dx


@torch.library.register_fake("fusedloss::running_logsumexp")
def _forward_fake(x, offsets):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@torch.library.register_fake("fusedloss::running_logsumexp_backward")
def _backward_fake(grad, x, phi, offsets):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _differentiate(ctx, grad):
    x, phi, offsets = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        (found,) = torch.autograd.grad(plain(x, offsets), x, grad, create_graph=True)
        return found, None
    return _op.running_logsumexp_backward(grad, x, phi, offsets), None


class _Function(torch.autograd.Function):
    """The op in eager mode, where a registered formula takes three times as long to get going."""

    @staticmethod
    def forward(ctx, x, offsets):
        phi = _op.running_logsumexp(x, offsets)
        ctx.save_for_backward(x, phi, offsets)
        return phi

    backward = staticmethod(_differentiate)


torch.library.register_autograd(
    "fusedloss::running_logsumexp",
    _differentiate,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0], output, inputs[1]),
)
