"""LapSum's operators on flat lists (`Lists`); csrc/laplace.h says what they compute.

x (rows, width), or (items,) with offsets, float32 or float64; alpha and k (rows,) float64; mask as x, bool.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.native import _native, address
from . import lapsum_torch as plain
from .derivatives import plain_gradients
from .engines import engine

_op = torch.ops.fusedloss
NATIVE = {torch.float32: 0, torch.float64: 3}
LISTS = "Tensor? mask, Tensor? offsets"

# ranks or sorted numbers, and the order; what is chosen, and the threshold
for _name in ("rank", "sort"):
    torch.library.define(
        f"fusedloss::lapsum_{_name}", f"(Tensor x, Tensor alpha, {LISTS}, bool descending) -> (Tensor, Tensor)"
    )
    torch.library.define(
        f"fusedloss::lapsum_{_name}_backward",
        f"(Tensor x, Tensor alpha, {LISTS}, bool descending, Tensor order, Tensor upstream) -> (Tensor, Tensor)",
    )
torch.library.define(
    "fusedloss::lapsum_top_k", f"(Tensor x, Tensor k, Tensor alpha, {LISTS}, bool largest) -> (Tensor, Tensor)"
)
torch.library.define(
    "fusedloss::lapsum_top_k_backward",
    f"(Tensor x, Tensor k, Tensor alpha, {LISTS}, bool largest, Tensor threshold, Tensor upstream)"
    " -> (Tensor, Tensor, Tensor)",
)


def _given(x: Tensor, alpha: Tensor, mask: Tensor | None, offsets: Tensor | None, descending: bool):
    width = x.shape[1] if offsets is None else 0
    return _native.Laplace(
        *(len(alpha), width, address(offsets), address(mask), address(alpha), NATIVE[x.dtype], descending)
    )


def _filled(x: Tensor, layout: tuple) -> tuple[Tensor, ...]:
    """Contiguous, as the extension reads them."""
    alpha, mask, offsets, descending = layout
    return x.contiguous(), (alpha.contiguous(), None if mask is None else mask.contiguous(), offsets, descending)


def _define(name: str, forward, backward):
    """Operators of rank or sort, by forward(ordered, x, descending), backward(ordered, upstream, descending)."""
    op_name, native = f"fusedloss::lapsum_{name}", f"lapsum_{name}"

    def compute(x, *layout):
        if engine(x.device, "cpu") == "torch":
            ordered = plain.Ordered(x, *layout[:3])
            return forward(ordered, x, layout[3]), ordered.local_order()
        x, layout = _filled(x, layout)
        out, order = torch.empty_like(x), torch.empty_like(x, dtype=torch.int32)
        getattr(_native, native)(_given(x, *layout), address(x), address(out), address(order))
        return out, order

    def fake(x, *layout):
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        return out, torch.empty_like(out, dtype=torch.int32)

    def differentiate(x, alpha, mask, offsets, descending, order, upstream):
        if engine(x.device, "cpu") == "torch":
            return backward(plain.Ordered(x, alpha, mask, offsets), upstream, descending)
        x, layout = _filled(x, (alpha, mask, offsets, descending))
        upstream, order = upstream.contiguous(), order.contiguous()
        dx, dalpha = torch.empty_like(x), torch.empty_like(alpha)
        given = map(address, (x, order, upstream, dx, dalpha))
        getattr(_native, native + "_backward")(_given(x, *layout), *given)
        return dx, dalpha

    def differentiate_fake(x, alpha, *rest):
        return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(alpha)

    def context(ctx, inputs, output):
        x, alpha, mask, offsets, ctx.descending = inputs
        ctx.save_for_backward(x, alpha, mask, offsets, output[1])
        ctx.set_materialize_grads(False)

    def formula(ctx, upstream, _):
        x, alpha, mask, offsets, order = ctx.saved_tensors
        if upstream is None:
            return None, None, None, None, None
        if torch.is_grad_enabled():

            def meaning(x, alpha):
                return (forward(plain.Ordered(x, alpha, mask, offsets), x, ctx.descending),)

            return *plain_gradients(meaning, (x, alpha), (upstream,), ctx.needs_input_grad[:2]), None, None, None
        found = getattr(_op, native + "_backward")(x, alpha, mask, offsets, ctx.descending, order, upstream)
        return *found, None, None, None

    torch.library.impl(op_name, "CompositeExplicitAutograd")(compute)
    torch.library.impl(op_name + "_backward", "CompositeExplicitAutograd")(differentiate)
    torch.library.register_fake(op_name)(fake)
    torch.library.register_fake(op_name + "_backward")(differentiate_fake)
    torch.library.register_autograd(op_name, formula, setup_context=context)


_define("rank", lambda ordered, x, descending: plain.rank(ordered, descending, x.dtype), plain.rank_backward)
_define("sort", plain.sort, plain.sort_backward)


@torch.library.impl("fusedloss::lapsum_top_k", "CompositeExplicitAutograd")
def _top_k(x, k, *layout):
    if engine(x.device, "cpu") == "torch":
        return plain.top_k(plain.Ordered(x, *layout[:3], negated=not layout[3]), k, x.dtype)
    (x, layout), k = _filled(x, layout), k.contiguous()
    chosen, threshold = torch.empty_like(x), k.new_empty(len(k), 4)
    _native.lapsum_top_k(_given(x, *layout), *map(address, (x, k, chosen, threshold)))
    return chosen, threshold


@torch.library.register_fake("fusedloss::lapsum_top_k")
def _top_k_fake(x, k, *layout):
    return torch.empty_like(x, memory_format=torch.contiguous_format), k.new_empty(k.shape[0], 4)


@torch.library.impl("fusedloss::lapsum_top_k_backward", "CompositeExplicitAutograd")
def _top_k_backward(x, k, alpha, mask, offsets, largest, threshold, upstream):
    if engine(x.device, "cpu") == "torch":
        ordered = plain.Ordered(x, alpha, mask, offsets, negated=not largest)
        dx, dk, dalpha = plain.top_k_backward(ordered, k, threshold, upstream)
        return dx if largest else -dx, dk, dalpha
    x, layout = _filled(x, (alpha, mask, offsets, largest))
    k, threshold, upstream = k.contiguous(), threshold.contiguous(), upstream.contiguous()
    dx, dk, dalpha = torch.empty_like(x), torch.empty_like(k), torch.empty_like(k)
    _native.lapsum_top_k_backward(_given(x, *layout), *map(address, (x, k, threshold, upstream, dx, dk, dalpha)))
    return dx, dk, dalpha


@torch.library.register_fake("fusedloss::lapsum_top_k_backward")
def _top_k_backward_fake(x, k, alpha, mask, offsets, largest, threshold, upstream):
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(k), torch.empty_like(k)


def _top_k_context(ctx, inputs, output):
    x, k, alpha, mask, offsets, ctx.largest = inputs
    ctx.save_for_backward(x, k, alpha, mask, offsets, output[1])
    ctx.set_materialize_grads(False)


def _top_k_formula(ctx, upstream, _):
    x, k, alpha, mask, offsets, threshold = ctx.saved_tensors
    if upstream is None:
        return (None,) * 6
    if torch.is_grad_enabled():

        def meaning(x, k, alpha):
            return plain.top_k(plain.Ordered(x, alpha, mask, offsets, negated=not ctx.largest), k, x.dtype)[:1]

        return *plain_gradients(meaning, (x, k, alpha), (upstream,), ctx.needs_input_grad[:3]), None, None, None
    found = _op.lapsum_top_k_backward(x, k, alpha, mask, offsets, ctx.largest, threshold, upstream)
    return *found, None, None, None


torch.library.register_autograd("fusedloss::lapsum_top_k", _top_k_formula, setup_context=_top_k_context)
