"""LapSum's operators on flat lists (`Lists`); csrc/laplace.h says what they compute.

x (rows, width), or (items,) with offsets, float32 or float64; alpha and k (rows,) float64; mask as x, bool. Each gives
what was asked for, and what its backward pass needs: the order of rank and sort, the threshold of top-k.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..backends.native import ALL_DTYPES, _native, address, contiguous, native_lists
from ..operators import like, more_rows, operator, plain_gradients
from . import lapsum_torch as plain
from .engines import engine

LISTS = "Tensor? mask, Tensor? offsets, bool descending"


def _given(x: Tensor, alpha: Tensor, mask: Tensor | None, offsets: Tensor | None, descending: bool):
    return _native.Laplace(*native_lists(x, offsets, mask), address(alpha), ALL_DTYPES[x.dtype], descending)


def _differentiable(name: str, schema: str, compute: Callable, fake: Callable, meaning: Callable, backward: Callable):
    """The operator of inputs (*differentiated, mask, offsets, descending) by the function that runs its backward."""

    def differentiate(ctx, upstream, _):
        *inputs, mask, offsets, state = ctx.saved_tensors
        if torch.is_grad_enabled():
            formula = lambda *inputs: (meaning(*inputs, mask, offsets, *ctx.options),)
            return plain_gradients(formula, inputs, (upstream,), ctx.needs_input_grad)
        return backward(*inputs, state, upstream, mask, offsets, *ctx.options)

    keep = lambda inputs, outputs: (*inputs[:-1], outputs[1])
    return operator(name, schema, compute, fake, differentiate, keep=keep, constant=(1,), vmap=more_rows)


def _ordered(name: str, forward: Callable, backward: Callable) -> Callable:
    """Rank or sort, by forward(ordered, x, descending), backward(ordered, upstream, descending)."""

    def compute(x, alpha, mask, offsets, descending):
        if engine(x.device, "cpu") == "torch":
            ordered = plain.Ordered(x, alpha, mask, offsets)
            return forward(ordered, x, descending), ordered.local_order()
        x, alpha, mask = contiguous(x, alpha, mask)
        out, order = torch.empty_like(x), torch.empty_like(x, dtype=torch.int32)
        getattr(_native, name)(_given(x, alpha, mask, offsets, descending), *map(address, (x, out, order)))
        return out, order

    def compute_backward(x, alpha, order, upstream, mask, offsets, descending):
        if engine(x.device, "cpu") == "torch":
            return backward(plain.Ordered(x, alpha, mask, offsets), upstream, descending)
        x, alpha, order, upstream, mask = contiguous(x, alpha, order, upstream, mask)
        dx, dalpha = torch.empty_like(x), torch.empty_like(alpha)
        given = map(address, (x, order, upstream, dx, dalpha))
        getattr(_native, name + "_backward")(_given(x, alpha, mask, offsets, descending), *given)
        return dx, dalpha

    run_backward = operator(
        name + "_backward",
        f"(Tensor x, Tensor alpha, Tensor order, Tensor upstream, {LISTS}) -> (Tensor, Tensor)",
        compute_backward,
        lambda x, alpha, *_: (like(x), like(alpha)),
        vmap=more_rows,
    )
    return _differentiable(
        name,
        f"(Tensor x, Tensor alpha, {LISTS}) -> (Tensor, Tensor)",
        compute,
        lambda x, *_: (like(x), like(x).to(torch.int32)),
        lambda x, alpha, mask, offsets, descending: forward(plain.Ordered(x, alpha, mask, offsets), x, descending),
        run_backward,
    )


rank = _ordered(
    "lapsum_rank", lambda ordered, x, descending: plain.rank(ordered, descending, x.dtype), plain.rank_backward
)
sort = _ordered("lapsum_sort", plain.sort, plain.sort_backward)


def _chosen(x, k, alpha, mask, offsets, largest) -> tuple[Tensor, Tensor]:
    return plain.top_k(plain.Ordered(x, alpha, mask, offsets, negated=not largest), k, x.dtype)


def _top_k(x, k, alpha, mask, offsets, largest):
    if engine(x.device, "cpu") == "torch":
        return _chosen(x, k, alpha, mask, offsets, largest)
    x, k, alpha, mask = contiguous(x, k, alpha, mask)
    chosen, threshold = torch.empty_like(x), k.new_empty(len(k), 4)
    _native.lapsum_top_k(_given(x, alpha, mask, offsets, largest), *map(address, (x, k, chosen, threshold)))
    return chosen, threshold


def _top_k_backward(x, k, alpha, threshold, upstream, mask, offsets, largest):
    if engine(x.device, "cpu") == "torch":
        ordered = plain.Ordered(x, alpha, mask, offsets, negated=not largest)
        dx, dk, dalpha = plain.top_k_backward(ordered, k, threshold, upstream)
        return dx if largest else -dx, dk, dalpha
    x, k, alpha, threshold, upstream, mask = contiguous(x, k, alpha, threshold, upstream, mask)
    dx, dk, dalpha = torch.empty_like(x), torch.empty_like(k), torch.empty_like(k)
    given = map(address, (x, k, threshold, upstream, dx, dk, dalpha))
    _native.lapsum_top_k_backward(_given(x, alpha, mask, offsets, largest), *given)
    return dx, dk, dalpha


_run_top_k_backward = operator(
    "lapsum_top_k_backward",
    f"(Tensor x, Tensor k, Tensor alpha, Tensor threshold, Tensor upstream, {LISTS}) -> (Tensor, Tensor, Tensor)",
    _top_k_backward,
    lambda x, k, alpha, *_: (like(x), like(k), like(alpha)),
    vmap=more_rows,
)
top_k = _differentiable(
    "lapsum_top_k",
    f"(Tensor x, Tensor k, Tensor alpha, {LISTS}) -> (Tensor, Tensor)",
    _top_k,
    lambda x, k, *_: (like(x), k.new_empty(k.shape[0], 4)),
    lambda *inputs: _chosen(*inputs)[0],
    _run_top_k_backward,
)
