"""The operators of relaxed permutations that are never stored (csrc/permutation.h says what they compute).

Flat tensors in sorted order: t (rows, width), or (items,) with offsets; tau (rows,) float64; v, u the shape of t and
one more dimension, their columns. counts (rows,): how many of each list count, its first ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.native import ALL_DTYPES, _native, address, contiguous, native_lists
from ..operators import like, more_rows, operator
from . import permutation_torch as plain
from .engines import engine

LAYOUT = "Tensor? counts, Tensor? offsets, int relaxation"


def _engine(t: Tensor) -> str:
    found = engine(t.device, "cpu", "triton")
    return "torch" if found == "triton" and t.dtype != torch.float32 else found


def _given(t: Tensor, tau: Tensor, columns: int, counts: Tensor | None, offsets: Tensor | None, relaxation: int):
    rows, width, offsets, _ = native_lists(t, offsets)
    return _native.Permutation(
        rows, width, offsets, address(counts), address(tau), columns, ALL_DTYPES[t.dtype], relaxation
    )


def _order(scores: Tensor, mask: Tensor | None, offsets: Tensor | None) -> Tensor:
    if engine(scores.device, "cpu") == "cpu":
        scores, mask = contiguous(scores, mask)
        index = torch.empty_like(scores, dtype=torch.int64)
        given = *native_lists(scores, offsets, mask), ALL_DTYPES[scores.dtype]
        _native.permutation_order(*given, address(scores), address(index))
        return index
    if offsets is None:
        index = scores.sort(dim=-1, descending=True, stable=True).indices
        if mask is not None:
            index = index.gather(1, mask.gather(1, index).sort(dim=1, descending=True, stable=True).indices)
        return index + scores.shape[1] * torch.arange(len(scores), device=scores.device)[:, None]
    index = scores.sort(descending=True, stable=True).indices
    if mask is not None:
        index = index[mask[index].sort(descending=True, stable=True).indices]
    row = torch.repeat_interleave(offsets.diff(), output_size=len(scores))
    return index[row[index].sort(stable=True).indices]


def _product(t, tau, v, counts, offsets, relaxation):
    if (found := _engine(t)) == "cpu":
        t, tau, v = contiguous(t, tau, v)
        y, rest, deviation = torch.empty_like(v), torch.empty_like(t), torch.empty_like(v)
        given = _given(t, tau, v.shape[-1], counts, offsets, relaxation)
        _native.permutation_product(given, *map(address, (t, v, y, rest, deviation)))
        return y, rest, deviation
    if found == "triton":
        from . import permutation_triton as device

        return device.product(t, tau, v, counts, offsets, relaxation)
    run = lambda t, v, tau, counts: plain.product(relaxation, t, tau, v, counts)
    return tuple(plain.over_lists(run, (t, v), (tau,), counts, offsets))


def _transposed(t, tau, u, counts, offsets, relaxation):
    if (found := _engine(t)) == "cpu":
        _, rest, _ = product(t, tau, u[..., :0], counts, offsets, relaxation)
        t, tau, u = contiguous(t, tau, u)
        x, given = torch.empty_like(u), _given(t, tau, u.shape[-1], counts, offsets, relaxation)
        _native.permutation_transposed(given, *map(address, (t, rest, u, x)))
        return x, rest
    if found == "triton":
        from . import permutation_triton as device

        return device.transposed(t, tau, u, counts, offsets, relaxation)
    run = lambda t, u, tau, counts: plain.transposed(relaxation, t, tau, u, counts)
    return tuple(plain.over_lists(run, (t, u), (tau,), counts, offsets))


def _gradient(t, tau, rest, u, v, deviation, counts, offsets, relaxation):
    if (found := _engine(t)) == "cpu":
        t, tau, rest, u, v, deviation = contiguous(t, tau, rest, u, v, deviation)
        dt, dtau, x = torch.empty_like(t), torch.empty_like(tau), None if v is None else torch.empty_like(u)
        given = _given(t, tau, u.shape[-1], counts, offsets, relaxation)
        _native.permutation_gradient(given, *map(address, (t, rest, u, v, deviation, dt, dtau, x)))
        return dt, dtau, u.new_empty(0) if x is None else x
    if found == "triton":
        from . import permutation_triton as device

        dt, dtau, x = device.gradient(t, tau, rest, u, v, deviation, counts, offsets, relaxation)
    else:
        run = lambda t, u, v, tau, counts: plain.gradient(relaxation, t, tau, u, v, counts)
        dt, dtau, x = plain.over_lists(run, (t, u, v), (tau,), counts, offsets)
    return dt, dtau, u.new_empty(0) if x is None else x


# --- derivatives -----------------------------------------------------------------------------------------------------


def _product_derivative(ctx, dy, drest, _):
    """`rest` has a gradient where v has no columns: it is asked for alone, or not at all."""
    t, tau, v, counts, offsets, rest, deviation = ctx.saved_tensors
    layout = counts, offsets, *ctx.options
    if v.shape[-1] == 0:
        if drest is None:
            return ()
        dt, dtau, _ = gradient(t, tau, rest, drest.unsqueeze(-1), None, None, *layout)
        return dt, dtau, torch.zeros_like(v)
    if dy is None:
        return ()
    if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
        return None, None, transposed(t, tau, dy, *layout)[0]
    return gradient(t, tau, rest, dy, v, deviation, *layout)


def _transposed_derivative(ctx, dx, _):
    if dx is None:
        return ()
    t, tau, u, counts, offsets = ctx.saved_tensors
    layout = counts, offsets, *ctx.options
    du, rest, deviation = product(t, tau, dx, *layout)
    dt = dtau = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        dt, dtau, _ = gradient(t, tau, rest, u, dx, deviation, *layout)
    return dt, dtau, du


def _gradient_derivative(ctx, by_t, by_tau, by_v):
    """By the plain formula, of which rest and deviation are a part: no gradient is left for them."""
    t, tau, u, v, counts, offsets = ctx.saved_tensors
    by_t, by_tau, by_v = (
        torch.zeros_like(x) if g is None and x is not None else g for g, x in ((by_t, t), (by_tau, tau), (by_v, v))
    )
    by_v = None if v is None else by_v

    def run(t, u, v, by_t, by_v, tau, by_tau, counts):
        return plain.second_gradient(*ctx.options, t, tau, u, v, counts, (by_t, by_tau, by_v))

    dt, dtau, du, dv = plain.over_lists(run, (t, u, v, by_t, by_v), (tau, by_tau), counts, offsets)
    return dt, dtau, None, du, dv


def _order_of_rows(op, size: int, dims, inputs):
    """Each sample's order begins at its own first item."""
    found, dim = more_rows(op, size, dims, inputs)
    first = torch.arange(size, device=found.device) * found[0].numel()
    return found - first.reshape(-1, *[1] * (found.dim() - 1)), dim


# Where in all lists' items the k-th item of each list's sort lies; what is masked out comes last.
order = operator(
    "permutation_order",
    "(Tensor scores, Tensor? mask, Tensor? offsets) -> Tensor",
    _order,
    lambda scores, *_: like(scores).to(torch.int64),
    vmap=_order_of_rows,
)
# P v, rest, deviation.
product = operator(
    "permutation_product",
    f"(Tensor t, Tensor tau, Tensor v, {LAYOUT}) -> (Tensor, Tensor, Tensor)",
    _product,
    lambda t, tau, v, *_: (like(v), like(t), like(v)),
    _product_derivative,
    keep=lambda inputs, outputs: (*inputs[:5], *outputs[1:]),
    vmap=more_rows,
)
# P^T u, rest.
transposed = operator(
    "permutation_transposed",
    f"(Tensor t, Tensor tau, Tensor u, {LAYOUT}) -> (Tensor, Tensor)",
    _transposed,
    lambda t, tau, u, *_: (like(u), like(t)),
    _transposed_derivative,
    vmap=more_rows,
)
# Of u^T P v in t, tau, v; without v of u^T rest, and an empty third.
gradient = operator(
    "permutation_gradient",
    "(Tensor t, Tensor tau, Tensor rest, Tensor u, Tensor? v, Tensor? deviation, "
    f"{LAYOUT}) -> (Tensor, Tensor, Tensor)",
    _gradient,
    lambda t, tau, rest, u, v, *_: (like(t), like(tau), u.new_empty(0) if v is None else like(u)),
    _gradient_derivative,
    keep=lambda inputs, outputs: (*inputs[:2], *inputs[3:5], *inputs[6:8]),
    vmap=more_rows,
)
