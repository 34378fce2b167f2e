"""The operators of relaxed permutations that are never stored (csrc/permutation.h says what they compute).

Flat tensors in sorted order: t (rows, width), or (items,) with offsets; tau (rows,) float64; v, u the shape of t and
one more dimension, their columns. counts (rows,): how many of each list count, its first ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.native import _native, address
from . import permutation_torch as plain
from .engines import engine

LAYOUT = "Tensor? counts, Tensor? offsets, int relaxation"
SCHEMAS = {
    # where in all lists' items the k-th item of each list's sort lies; what is masked out comes last
    "permutation_order": "(Tensor scores, Tensor? mask, Tensor? offsets) -> Tensor",
    # P v, rest, deviation
    "permutation_product": f"(Tensor t, Tensor tau, Tensor v, {LAYOUT}) -> (Tensor, Tensor, Tensor)",
    # P^T u, rest
    "permutation_transposed": f"(Tensor t, Tensor tau, Tensor u, {LAYOUT}) -> (Tensor, Tensor)",
    # of u^T P v in t, tau, v; without v of u^T rest, and an empty third
    "permutation_gradient": "(Tensor t, Tensor tau, Tensor rest, Tensor u, Tensor? v, Tensor? deviation, "
    f"{LAYOUT}) -> (Tensor, Tensor, Tensor)",
}
for name, schema in SCHEMAS.items():
    torch.library.define(f"fusedloss::{name}", schema)
order, product, transposed, gradient = (getattr(torch.ops.fusedloss, name).default for name in SCHEMAS)

NATIVE = {torch.float32: 0, torch.float64: 3}


def _rows(like: Tensor, offsets: Tensor | None) -> tuple[int, int]:
    return (like.shape[0], like.shape[1]) if offsets is None else (len(offsets) - 1, 0)


def _engine(t: Tensor) -> str:
    found = engine(t.device, "cpu", "triton")
    return "torch" if found == "triton" and t.dtype != torch.float32 else found


def _given(t: Tensor, tau: Tensor, columns: int, counts: Tensor | None, offsets: Tensor | None, relaxation: int):
    return _native.Permutation(
        *_rows(t, offsets), address(offsets), address(counts), address(tau), columns, NATIVE[t.dtype], relaxation
    )


@torch.library.impl("fusedloss::permutation_order", "CompositeExplicitAutograd")
def _order(scores: Tensor, mask: Tensor | None, offsets: Tensor | None) -> Tensor:
    if engine(scores.device, "cpu") == "cpu":
        scores, index = scores.contiguous(), torch.empty(scores.shape, dtype=torch.int64, device=scores.device)
        mask = None if mask is None else mask.contiguous()
        layout = *_rows(scores, offsets), address(offsets), address(mask)
        _native.permutation_order(*layout, NATIVE[scores.dtype], scores.data_ptr(), index.data_ptr())
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


@torch.library.impl("fusedloss::permutation_product", "CompositeExplicitAutograd")
def _product(t, tau, v, counts, offsets, relaxation):
    if (found := _engine(t)) == "cpu":
        t, tau, v = t.contiguous(), tau.contiguous(), v.contiguous()
        y, rest, deviation = torch.empty_like(v), torch.empty_like(t), torch.empty_like(v)
        given = _given(t, tau, v.shape[-1], counts, offsets, relaxation)
        _native.permutation_product(given, *(x.data_ptr() for x in (t, v, y, rest, deviation)))
        return y, rest, deviation
    if found == "triton":
        from . import permutation_triton as device

        return device.product(t, tau, v, counts, offsets, relaxation)
    run = lambda t, v, tau, counts: plain.product(relaxation, t, tau, v, counts)
    return tuple(plain.over_lists(run, (t, v), (tau,), counts, offsets))


@torch.library.impl("fusedloss::permutation_transposed", "CompositeExplicitAutograd")
def _transposed(t, tau, u, counts, offsets, relaxation):
    if (found := _engine(t)) == "cpu":
        _, rest, _ = product(t, tau, u[..., :0], counts, offsets, relaxation)
        t, tau, u = t.contiguous(), tau.contiguous(), u.contiguous()
        x, given = torch.empty_like(u), _given(t, tau, u.shape[-1], counts, offsets, relaxation)
        _native.permutation_transposed(given, *(x.data_ptr() for x in (t, rest, u, x)))
        return x, rest
    if found == "triton":
        from . import permutation_triton as device

        return device.transposed(t, tau, u, counts, offsets, relaxation)
    run = lambda t, u, tau, counts: plain.transposed(relaxation, t, tau, u, counts)
    return tuple(plain.over_lists(run, (t, u), (tau,), counts, offsets))


@torch.library.impl("fusedloss::permutation_gradient", "CompositeExplicitAutograd")
def _gradient(t, tau, rest, u, v, deviation, counts, offsets, relaxation):
    if (found := _engine(t)) == "cpu":
        t, tau, rest, u = (x.contiguous() for x in (t, tau, rest, u))
        v, deviation = (None if x is None else x.contiguous() for x in (v, deviation))
        dt, dtau, x = torch.empty_like(t), torch.empty_like(tau), None if v is None else torch.empty_like(u)
        given = _given(t, tau, u.shape[-1], counts, offsets, relaxation)
        _native.permutation_gradient(given, *(address(a) for a in (t, rest, u, v, deviation, dt, dtau, x)))
        return dt, dtau, u.new_empty(0) if x is None else x
    if found == "triton":
        from . import permutation_triton as device

        dt, dtau, x = device.gradient(t, tau, rest, u, v, deviation, counts, offsets, relaxation)
    else:
        run = lambda t, u, v, tau, counts: plain.gradient(relaxation, t, tau, u, v, counts)
        dt, dtau, x = plain.over_lists(run, (t, u, v), (tau,), counts, offsets)
    return dt, dtau, u.new_empty(0) if x is None else x


# --- shapes ----------------------------------------------------------------------------------------------------------


@torch.library.register_fake("fusedloss::permutation_order")
def _(scores, mask, offsets):
    return torch.empty(scores.shape, dtype=torch.int64, device=scores.device)


def _like(x: Tensor) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.register_fake("fusedloss::permutation_product")
def _(t, tau, v, counts, offsets, relaxation):
    return _like(v), _like(t), _like(v)


@torch.library.register_fake("fusedloss::permutation_transposed")
def _(t, tau, u, counts, offsets, relaxation):
    return _like(u), _like(t)


@torch.library.register_fake("fusedloss::permutation_gradient")
def _(t, tau, rest, u, v, deviation, counts, offsets, relaxation):
    return _like(t), _like(tau), u.new_empty(0) if v is None else _like(u)


# --- derivatives -----------------------------------------------------------------------------------------------------


def _keep_product(ctx, inputs, output):
    t, tau, v, counts, offsets, ctx.relaxation = inputs
    ctx.save_for_backward(t, tau, v, counts, offsets, *output[1:])


def _product_backward(ctx, dy, drest, _):
    """`rest` has a gradient where v has no columns: it is asked for alone, or not at all."""
    t, tau, v, counts, offsets, rest, deviation = ctx.saved_tensors
    layout = counts, offsets, ctx.relaxation
    if v.shape[-1] == 0:
        dt, dtau, _ = gradient(t, tau, rest, drest.unsqueeze(-1), None, None, *layout)
        return dt, dtau, torch.zeros_like(v), None, None, None
    if not (ctx.needs_input_grad[0] or ctx.needs_input_grad[1]):
        return None, None, transposed(t, tau, dy, *layout)[0], None, None, None
    return *gradient(t, tau, rest, dy, v, deviation, *layout), None, None, None


def _keep_transposed(ctx, inputs, output):
    t, tau, u, counts, offsets, ctx.relaxation = inputs
    ctx.save_for_backward(t, tau, u, counts, offsets)


def _transposed_backward(ctx, dx, _):
    t, tau, u, counts, offsets = ctx.saved_tensors
    layout = counts, offsets, ctx.relaxation
    du, rest, deviation = product(t, tau, dx, *layout)
    dt = dtau = None
    if ctx.needs_input_grad[0] or ctx.needs_input_grad[1]:
        dt, dtau, _ = gradient(t, tau, rest, u, dx, deviation, *layout)
    return dt, dtau, du, None, None, None


def _keep_gradient(ctx, inputs, output):
    t, tau, _, u, v, _, counts, offsets, ctx.relaxation = inputs
    ctx.save_for_backward(t, tau, u, v, counts, offsets)


def _gradient_backward(ctx, *by):
    """By the plain formula, of which rest and deviation are a part: no gradient is left for them."""
    t, tau, u, v, counts, offsets = ctx.saved_tensors
    by_t, by_tau, by_v = by[0], by[1], None if v is None else by[2]

    def run(t, u, v, by_t, by_v, tau, by_tau, counts):
        return plain.second_gradient(ctx.relaxation, t, tau, u, v, counts, (by_t, by_tau, by_v))

    dt, dtau, du, dv = plain.over_lists(run, (t, u, v, by_t, by_v), (tau, by_tau), counts, offsets)
    return dt, dtau, None, du, dv, None, None, None, None


for op, backward, keep in (
    (product, _product_backward, _keep_product),
    (transposed, _transposed_backward, _keep_transposed),
    (gradient, _gradient_backward, _keep_gradient),
):
    torch.library.register_autograd(op, backward, setup_context=keep)


# --- vmap: more rows -------------------------------------------------------------------------------------------------


def _batched(op):
    def run(info, in_dims, *args):
        size = info.batch_size
        offsets = args[-1] if op is order else args[-2]
        if offsets is not None:
            raise NotImplementedError("fusedloss.sorting: vmap: lists of one length, not offsets")

        def joined(x, dim):
            if not isinstance(x, Tensor):
                return x
            x = x.expand(size, *x.shape) if dim is None else x.movedim(dim, 0)
            return x.reshape(size * x.shape[1], *x.shape[2:])

        def split(x):
            return x.reshape(size, x.shape[0] // size, *x.shape[1:])

        found = op(*(joined(x, dim) for x, dim in zip(args, in_dims)))
        if op is order:  # from the first item of each sample on
            found = split(found)
            return found - torch.arange(size, device=found.device).view(-1, 1, 1) * found[0].numel(), 0
        return tuple(split(x) if x.dim() > 0 and x.shape[0] else x for x in found), (0,) * len(found)

    return run


for op in (order, product, transposed, gradient):
    torch.library.register_vmap(op, _batched(op))
