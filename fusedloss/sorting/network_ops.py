"""Sorting networks as operators: numbers sorted softly, and channels pushed through the same comparators.

* ``fusedloss::network_sort``  (rows, n) → sorted, and the gap of every comparator, which is all that is kept
* ``fusedloss::network_push``  channels (rows, n, c) forwards, or backwards, through comparators of these gaps
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.native import _native, address
from . import comparators as plain
from .comparators import DISTRIBUTIONS, Comparator, Network, network
from .derivatives import plain_gradients
from .engines import engine

_op = torch.ops.fusedloss
SPEC = "str kind, bool descending, str distribution, float art_lambda"
TYPES = {torch.float32: 0, torch.float64: 3}
NUMBERS = {name: i for i, name in enumerate(DISTRIBUTIONS)}

torch.library.define(
    "fusedloss::network_sort", f"(Tensor x, Tensor steepness, Tensor? active, {SPEC}) -> (Tensor, Tensor)"
)
torch.library.define(
    "fusedloss::network_sort_backward",
    f"(Tensor gaps, Tensor steepness, Tensor dsorted, Tensor dgaps, {SPEC}) -> (Tensor, Tensor)",
)
torch.library.define(
    "fusedloss::network_push", f"(Tensor gaps, Tensor steepness, Tensor v, bool transposed, {SPEC}) -> Tensor"
)
torch.library.define(
    "fusedloss::network_push_backward",
    f"(Tensor gaps, Tensor steepness, Tensor v, bool transposed, Tensor dout, bool needs_dv, {SPEC})"
    " -> (Tensor, Tensor, Tensor)",
)


def _native_network(net: Network, rows: int, dtype: torch.dtype, steepness: Tensor, comparator: Comparator):
    return _native.Network(
        *(rows, net.wires, net.comparators, net.layers, address(net.low), address(net.high), address(net.first)),
        *(TYPES[dtype], NUMBERS[comparator.distribution], float(steepness), comparator.art_lambda),
    )


def _rows_apart(v: Tensor) -> Tensor:
    """v (rows, n, c) whose rows are contiguous, each wherever it lies."""
    return v if v.shape[0] == 0 or v[0].is_contiguous() else v.contiguous()


def _totals(rows: int, like: Tensor) -> Tensor:
    return torch.empty(rows, dtype=torch.float64, device=like.device)


@torch.library.impl("fusedloss::network_sort", "CompositeExplicitAutograd")
def _sort(x, steepness, active, kind, descending, distribution, art_lambda):
    net, comparator = network(kind, x.shape[1], descending), Comparator(distribution, art_lambda)
    if engine(x.device, "cpu") == "torch":
        sorted, gaps = plain.sort(x, steepness, active, net, comparator)
        return (sorted.clone() if sorted is x else sorted), gaps
    x = x.contiguous()
    sorted, gaps = torch.empty_like(x), x.new_empty(len(x), net.comparators)
    given = _native_network(net, len(x), x.dtype, steepness, comparator)
    _native.network_sort(given, address(x), address(active), address(sorted), address(gaps))
    return sorted, gaps


@torch.library.register_fake("fusedloss::network_sort")
def _sort_fake(x, steepness, active, kind, descending, distribution, art_lambda):
    gaps = x.new_empty(x.shape[0], plain.count(kind, int(x.shape[1])))
    return torch.empty_like(x, memory_format=torch.contiguous_format), gaps


@torch.library.impl("fusedloss::network_sort_backward", "CompositeExplicitAutograd")
def _sort_backward(gaps, steepness, dsorted, dgaps, kind, descending, distribution, art_lambda):
    net, comparator = network(kind, dsorted.shape[1], descending), Comparator(distribution, art_lambda)
    if engine(gaps.device, "cpu") == "torch":
        dx, total = plain.sort_backward(gaps, steepness, dsorted, dgaps, net, comparator)
        return (dx.clone() if dx is dsorted else dx), total
    gaps, dsorted, dgaps = gaps.contiguous(), dsorted.contiguous(), dgaps.contiguous()
    dx, total = torch.empty_like(dsorted), _totals(len(gaps), gaps)
    given = _native_network(net, len(gaps), gaps.dtype, steepness, comparator)
    _native.network_sort_backward(given, *map(address, (gaps, dsorted, dgaps, dx, total)))
    return dx, total


@torch.library.register_fake("fusedloss::network_sort_backward")
def _sort_backward_fake(gaps, steepness, dsorted, dgaps, kind, descending, distribution, art_lambda):
    dx = torch.empty_like(dsorted, memory_format=torch.contiguous_format)
    return dx, gaps.new_empty(gaps.shape[0], dtype=torch.float64)


@torch.library.impl("fusedloss::network_push", "CompositeExplicitAutograd")
def _push(gaps, steepness, v, transposed, kind, descending, distribution, art_lambda):
    net, comparator = network(kind, v.shape[1], descending), Comparator(distribution, art_lambda)
    if engine(gaps.device, "cpu") == "torch":
        out = plain.push(gaps, steepness, v, transposed, net, comparator)
        return out.clone(memory_format=torch.contiguous_format) if out is v else out
    gaps, v = gaps.contiguous(), _rows_apart(v)
    out = v.new_empty(v.shape)
    given = _native_network(net, len(v), v.dtype, steepness, comparator)
    _native.network_push(given, address(gaps), address(v), v.stride(0), v.shape[2], transposed, address(out))
    return out


@torch.library.register_fake("fusedloss::network_push")
def _push_fake(gaps, steepness, v, transposed, kind, descending, distribution, art_lambda):
    return v.new_empty(v.shape)


@torch.library.impl("fusedloss::network_push_backward", "CompositeExplicitAutograd")
def _push_backward(gaps, steepness, v, transposed, dout, needs_dv, kind, descending, distribution, art_lambda):
    net, comparator = network(kind, v.shape[1], descending), Comparator(distribution, art_lambda)
    if engine(gaps.device, "cpu") == "torch":
        dgaps, total, dv = plain.push_backward(gaps, steepness, v, transposed, dout, net, comparator)
        return dgaps, total, dv.clone(memory_format=torch.contiguous_format) if needs_dv else v.new_empty(0)
    gaps, v, dout = gaps.contiguous(), _rows_apart(v), dout.contiguous()
    dgaps, total, dv = torch.empty_like(gaps), _totals(len(gaps), gaps), v.new_empty(v.shape if needs_dv else 0)
    given = _native_network(net, len(v), v.dtype, steepness, comparator)
    out = (address(dout), address(dv) if needs_dv else 0, address(dgaps), address(total))
    _native.network_push_backward(given, address(gaps), address(v), v.stride(0), v.shape[2], transposed, *out)
    return dgaps, total, dv


@torch.library.register_fake("fusedloss::network_push_backward")
def _push_backward_fake(gaps, steepness, v, transposed, dout, needs_dv, kind, descending, distribution, art_lambda):
    dgaps = torch.empty_like(gaps, memory_format=torch.contiguous_format)
    total = gaps.new_empty(gaps.shape[0], dtype=torch.float64)
    return dgaps, total, v.new_empty(v.shape if needs_dv else 0)


# --- autograd --------------------------------------------------------------------------------------------------------


def _sort_context(ctx, inputs, output):
    x, steepness, active, *ctx.spec = inputs
    ctx.save_for_backward(x, steepness, active, output[1])


def _sort_formula(ctx, dsorted, dgaps):
    x, steepness, active, gaps = ctx.saved_tensors
    if torch.is_grad_enabled():
        kind, descending, *rest = ctx.spec
        net, comparator = network(kind, x.shape[1], descending), Comparator(*rest)

        def formula(x, steepness):
            return plain.sort(x, steepness, active, net, comparator)

        found = plain_gradients(formula, (x, steepness), (dsorted, dgaps), ctx.needs_input_grad[:2])
        return *found, None, *(None,) * len(ctx.spec)
    dx, total = _op.network_sort_backward(gaps, steepness, dsorted, dgaps, *ctx.spec)
    dsteepness = total.sum().to(steepness.device, steepness.dtype) if ctx.needs_input_grad[1] else None
    return dx, dsteepness, None, *(None,) * len(ctx.spec)


def _push_context(ctx, inputs, output):
    gaps, steepness, v, ctx.transposed, *ctx.spec = inputs
    ctx.save_for_backward(gaps, steepness, v)


def _push_formula(ctx, dout):
    gaps, steepness, v = ctx.saved_tensors
    needs, after = ctx.needs_input_grad[:3], (None,) * (1 + len(ctx.spec))
    if torch.is_grad_enabled():
        kind, descending, *rest = ctx.spec
        net, comparator = network(kind, v.shape[1], descending), Comparator(*rest)

        def formula(gaps, steepness, v):
            return (plain.push(gaps, steepness, v, ctx.transposed, net, comparator),)

        return *plain_gradients(formula, (gaps, steepness, v), (dout,), needs), *after
    if not needs[0] and not needs[1]:
        dv = _op.network_push(gaps, steepness, dout, not ctx.transposed, *ctx.spec)
        return None, None, dv, *after
    dgaps, total, dv = _op.network_push_backward(gaps, steepness, v, ctx.transposed, dout, needs[2], *ctx.spec)
    dsteepness = total.sum().to(steepness.device, steepness.dtype) if needs[1] else None
    return dgaps, dsteepness, dv if needs[2] else None, *after


torch.library.register_autograd("fusedloss::network_sort", _sort_formula, setup_context=_sort_context)
torch.library.register_autograd("fusedloss::network_push", _push_formula, setup_context=_push_context)
