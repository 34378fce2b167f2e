"""Sorting networks as operators: numbers sorted softly, and channels pushed through the same comparators.

* ``fusedloss::network_sort``  (rows, n) → sorted, and the gap of every comparator, which is all that is kept
* ``fusedloss::network_push``  channels (rows, n, c) forwards, or backwards, through comparators of these gaps
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.native import ALL_DTYPES, _native, address, contiguous
from ..operators import like, operator, plain_gradients
from . import comparators as plain
from .comparators import DISTRIBUTIONS, Comparator, Network, network
from .engines import engine

SPEC = "str kind, bool descending, str distribution, float art_lambda"
NUMBERS = {name: i for i, name in enumerate(DISTRIBUTIONS)}


def _native_network(net: Network, rows: int, dtype: torch.dtype, steepness: Tensor, comparator: Comparator):
    return _native.Network(
        *(rows, net.wires, net.comparators, net.layers, address(net.low), address(net.high), address(net.first)),
        *(ALL_DTYPES[dtype], NUMBERS[comparator.distribution], float(steepness), comparator.art_lambda),
    )


def _rows_apart(v: Tensor) -> Tensor:
    """v (rows, n, c) whose rows are contiguous, each wherever it lies."""
    return v if v.shape[0] == 0 or v[0].is_contiguous() else v.contiguous()


def _totals(rows: int, like: Tensor) -> Tensor:
    return torch.empty(rows, dtype=torch.float64, device=like.device)


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


def _sort_fake(x, steepness, active, kind, descending, distribution, art_lambda):
    return like(x), x.new_empty(x.shape[0], plain.count(kind, int(x.shape[1])))


def _sort_backward(gaps, steepness, dsorted, dgaps, kind, descending, distribution, art_lambda):
    net, comparator = network(kind, dsorted.shape[1], descending), Comparator(distribution, art_lambda)
    if engine(gaps.device, "cpu") == "torch":
        dx, total = plain.sort_backward(gaps, steepness, dsorted, dgaps, net, comparator)
        return (dx.clone() if dx is dsorted else dx), total
    gaps, dsorted, dgaps = contiguous(gaps, dsorted, dgaps)
    dx, total = torch.empty_like(dsorted), _totals(len(gaps), gaps)
    given = _native_network(net, len(gaps), gaps.dtype, steepness, comparator)
    _native.network_sort_backward(given, *map(address, (gaps, dsorted, dgaps, dx, total)))
    return dx, total


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


def _push_backward(gaps, steepness, v, dout, transposed, needs_dv, kind, descending, distribution, art_lambda):
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


def _push_backward_fake(gaps, steepness, v, dout, transposed, needs_dv, *spec):
    return like(gaps), _totals(gaps.shape[0], gaps), v.new_empty(v.shape if needs_dv else 0)


# --- autograd --------------------------------------------------------------------------------------------------------


def _steepness_gradient(total: Tensor, steepness: Tensor, needed: bool) -> Tensor | None:
    return total.sum().to(steepness.device, steepness.dtype) if needed else None


def _sort_derivative(ctx, dsorted, dgaps):
    x, steepness, active, gaps = ctx.saved_tensors
    if torch.is_grad_enabled():
        kind, descending, *rest = ctx.options
        net = network(kind, x.shape[1], descending)
        formula = lambda x, steepness: plain.sort(x, steepness, active, net, Comparator(*rest))
        return plain_gradients(formula, (x, steepness), (dsorted, dgaps), ctx.needs_input_grad)
    dsorted = torch.zeros_like(x) if dsorted is None else dsorted
    dgaps = torch.zeros_like(gaps) if dgaps is None else dgaps
    dx, total = sort_backward(gaps, steepness, dsorted, dgaps, *ctx.options)
    return dx, _steepness_gradient(total, steepness, ctx.needs_input_grad[1])


def _push_derivative(ctx, dout):
    gaps, steepness, v = ctx.saved_tensors
    transposed, *spec = ctx.options
    needs = ctx.needs_input_grad
    if torch.is_grad_enabled():
        kind, descending, *rest = spec
        net = network(kind, v.shape[1], descending)
        formula = lambda *inputs: (plain.push(*inputs, transposed, net, Comparator(*rest)),)
        return plain_gradients(formula, (gaps, steepness, v), (dout,), needs)
    if not needs[0] and not needs[1]:
        return None, None, push(gaps, steepness, dout, not transposed, *spec)
    dgaps, total, dv = push_backward(gaps, steepness, v, dout, transposed, needs[2], *spec)
    return dgaps, _steepness_gradient(total, steepness, needs[1]), dv if needs[2] else None


sort = operator(
    "network_sort",
    f"(Tensor x, Tensor steepness, Tensor? active, {SPEC}) -> (Tensor, Tensor)",
    _sort,
    _sort_fake,
    _sort_derivative,
    keep=lambda inputs, outputs: (*inputs[:3], outputs[1]),
)
sort_backward = operator(
    "network_sort_backward",
    f"(Tensor gaps, Tensor steepness, Tensor dsorted, Tensor dgaps, {SPEC}) -> (Tensor, Tensor)",
    _sort_backward,
    lambda gaps, steepness, dsorted, *_: (like(dsorted), _totals(gaps.shape[0], gaps)),
)
push = operator(
    "network_push",
    f"(Tensor gaps, Tensor steepness, Tensor v, bool transposed, {SPEC}) -> Tensor",
    _push,
    lambda gaps, steepness, v, *_: v.new_empty(v.shape),
    _push_derivative,
)
push_backward = operator(
    "network_push_backward",
    f"(Tensor gaps, Tensor steepness, Tensor v, Tensor dout, bool transposed, bool needs_dv, {SPEC})"
    " -> (Tensor, Tensor, Tensor)",
    _push_backward,
    _push_backward_fake,
)
