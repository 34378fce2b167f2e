"""Running log-sum-exps of lists, from each list's end, as an op: φ_i = log Σ_{m≥i} e^{x_m}."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.native import ALL_DTYPES, _native, address, contiguous, native_lists
from ..operators import like, operator, plain_gradients
from .engines import engine


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
    return *native_lists(x, offsets)[:3], ALL_DTYPES[x.dtype]


def _forward(x, offsets):
    if engine(x.device, "cpu") != "cpu":
        return plain(x, offsets).contiguous().clone()
    x = x.contiguous()
    phi = torch.empty_like(x)
    _native.running_logsumexp(*_given(x, offsets), address(x), address(phi))
    return phi


def _backward(x, phi, grad, offsets):
    if engine(x.device, "cpu") != "cpu":
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad(plain(x, offsets), x, grad)[0].contiguous()
    x, phi, grad = contiguous(x, phi, grad)
    dx = torch.empty_like(x)
    _native.running_logsumexp_backward(*_given(x, offsets), *map(address, (x, phi, grad, dx)))
    return dx


def _differentiate(ctx, grad):
    x, phi, offsets = ctx.saved_tensors
    if torch.is_grad_enabled():
        return plain_gradients(lambda x: (plain(x, offsets),), (x,), (grad,), (True,))
    return (_run_backward(x, phi, grad, offsets),)


_run_backward = operator(
    "running_logsumexp_backward", "(Tensor x, Tensor phi, Tensor grad, Tensor? offsets) -> Tensor", _backward, like
)
# Of flat values: (rows, n), or (items,) with offsets.
running_logsumexp = operator(
    "running_logsumexp",
    "(Tensor x, Tensor? offsets) -> Tensor",
    _forward,
    like,
    _differentiate,
    keep=lambda inputs, outputs: (inputs[0], outputs[0], inputs[1]),
)
