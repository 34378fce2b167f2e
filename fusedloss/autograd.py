"""Autograd around the ops: eager mode through `torch.autograd.Function`, `torch.compile` through registered formulas.

Eager mode can do two things that a registered formula cannot: the first backward scales the stored gradients in place
and hands them over (later ones compute them again), and ``create_graph=True`` differentiates the dense plain PyTorch
formula, so that derivatives of any order are right.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import ops
from .dense import DenseScores, dense_scores
from .memory import empty
from .ops import decode, encode
from .statistics import split

__all__ = ["encode", "row_losses", "statistics", "weighted_total"]

STREAMS = 6  # differentiable inputs: x, weight, bias, class_scale, class_shift, scale
_op = torch.ops.fusedloss


def _needs(streams: Sequence[Tensor | None]) -> list[bool]:
    grad = torch.is_grad_enabled()
    return [t is not None and grad and t.requires_grad for t in streams]


def _dense(spec: ops.Spec, streams: Sequence[Tensor | None]) -> DenseScores:
    scale = spec.scale if streams[5] is None else streams[5]
    x, weight, *vectors = streams[:5]
    weight = x if spec.symmetric else weight
    return DenseScores(dense_scores(x, weight, *vectors, spec.softcap, scale, ops.DTYPES[spec.multiply]))


def _scaled(gradient: Tensor, factor: Tensor, like: Tensor, in_place: bool) -> Tensor:
    """factor · gradient in the type of `like`; in place where the type allows and nobody else holds the buffer."""
    if gradient.dtype != like.dtype:
        if not in_place:
            return (gradient * factor).to(like.dtype)
        return torch.mul(gradient, factor, out=empty(like.shape, like.dtype, like.device))
    if not in_place:
        return gradient * factor
    # A read of a CPU scalar is free, and 1 is what a plain loss.backward() passes.
    if factor.device.type == "cpu" and factor.item() == 1.0:
        return gradient
    return gradient.mul_(factor)


# --- statistics ------------------------------------------------------------------------------------------------------


class _Statistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, text, keep, carried, *streams_and_rows):
        streams, rows = streams_and_rows[:STREAMS], streams_and_rows[STREAMS:]
        values, columns, states, *across = _op.statistics(text, *streams, keep, carried)
        ctx.text, ctx.live = text, [t.requires_grad for t in carried]
        ctx.save_for_backward(*streams, states, across[2], keep, *[t.detach() for t in carried], *rows)
        ctx.mark_non_differentiable(columns, states, *across[1:])
        ctx.set_materialize_grads(False)
        return values, columns, states, *across

    @staticmethod
    def backward(ctx, grad, _columns, _states, grad_across, *_):
        none = (None, None, None)
        saved = ctx.saved_tensors
        streams, (states, states_across, keep, *others) = saved[:STREAMS], saved[STREAMS:]
        carried, rows = others[: len(ctx.live)], others[len(ctx.live) :]
        both = _both_gradients(ctx.text, carried, grad, grad_across, states, states_across)
        if both is None:
            return *none, *([None] * (STREAMS + len(rows)))
        needs = list(ctx.needs_input_grad[len(none) : len(none) + STREAMS])
        if torch.is_grad_enabled():
            return *none, *_dense_statistics_gradient(ctx, streams, keep, carried, rows, *both, needs)
        found = _op.statistics_backward(
            ctx.text, *streams, keep, carried, states, both[0], states_across, both[1], needs
        )
        return *none, *[g if n else None for g, n in zip(found, needs)], *([None] * len(rows))


def _both_gradients(text, carried, grad, grad_across, states, states_across) -> tuple[Tensor, Tensor] | None:
    """Gradients of row and of column values, zeros for those that nobody used; None when nobody used any."""
    if grad is None and grad_across is None:
        return None
    outputs = [sum(s.outputs for s in part) for part in split(ops.skeletons(decode(text), carried))]
    return tuple(
        s.new_zeros(s.shape[0], n) if g is None else g
        for g, s, n in zip((grad, grad_across), (states, states_across), outputs)
    )


def _dense_statistics_gradient(ctx, streams, keep, carried, rows, grad, grad_across, needs) -> list[Tensor | None]:
    spec = decode(ctx.text)
    streams, rows = _apart(streams), _apart(rows)
    scores = _dense(spec, streams)
    if keep is not None:
        grad = torch.where(keep.unsqueeze(1), grad, 0.0)
    row = iter(rows)
    carried = [next(row) if live else t for t, live in zip(carried, ctx.live)]
    stats, across = split(ops.skeletons(spec, carried))
    found = [(s.value(s.of(scores.z, 0)), g) for s, g in _zipped(stats, grad)]
    found += [(s.value(s.of(scores.z.t(), 0)), g) for s, g in _zipped(across, grad_across)]
    found = [(v.double(), g.double()) for v, g in found if v.requires_grad]  # a count has no gradient
    values, upstream = [v for v, _ in found], [g for _, g in found]
    # The gradient of a row parameter is `reduce`'s business, but there its slope is a constant: add nothing but the
    # slope's own derivatives.
    slopes = _gradients(values, rows, [g.detach() for g in upstream], [True] * len(rows)) if rows else []
    return [*_gradients(values, streams, upstream, needs), *[None if g is None else g - g.detach() for g in slopes]]


def _apart(tensors: Sequence[Tensor | None]) -> list[Tensor | None]:
    """The same tensors, as views: one may be made from another (a row parameter from the weight), and a derivative in
    the one must not run through the other."""
    return [None if t is None else t.view_as(t) for t in tensors]


def _zipped(stats, grad: Tensor):
    return zip(stats, grad.split([s.outputs for s in stats], 1)) if stats else ()


def _gradients(output, streams, grad, needs) -> list[Tensor | None]:
    wanted = [t for t, n in zip(streams, needs) if n]
    found = iter(torch.autograd.grad(output, wanted, grad, create_graph=True, allow_unused=True))
    return [next(found) if n else None for n in needs]


def _setup_statistics(ctx, inputs, output):
    text, *rest = inputs
    ctx.text, ctx.carried, ctx.keep = text, rest[7], rest[6]
    ctx.save_for_backward(*rest[:6], output[2], output[5])
    ctx.set_materialize_grads(False)


def _statistics_formula(ctx, grad, _columns, _states, grad_across, *_):
    *streams, states, states_across = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[1 : 1 + STREAMS])
    after = (None, [None] * len(ctx.carried))
    both = _both_gradients(ctx.text, ctx.carried, grad, grad_across, states, states_across)
    if both is None:
        return None, *([None] * STREAMS), *after
    found = _op.statistics_backward(
        ctx.text, *streams, ctx.keep, ctx.carried, states, both[0], states_across, both[1], needs
    )
    return None, *[g if n else None for g, n in zip(found, needs)], *after


torch.library.register_autograd("fusedloss::statistics", _statistics_formula, setup_context=_setup_statistics)


def statistics(text: str, streams: Sequence[Tensor | None], keep: Tensor | None, carried: list[Tensor]):
    """(values, columns found, states) of the statistics that `text` names, of rows and then of columns; differentiable
    in the streams."""
    if torch.compiler.is_compiling():
        return _op.statistics(text, *streams, keep, carried)
    return _Statistics.apply(text, keep, carried, *streams, *[t for t in carried if t.requires_grad])


# --- weighted total of row losses ------------------------------------------------------------------------------------


class _WeightedTotal(torch.autograd.Function):
    @staticmethod
    def forward(ctx, text, needs, keep, rows, shared, row_factor, *streams):
        total, losses, *ctx.gradients = _op.eager_gradient(text, *streams, keep, row_factor, rows, shared, needs)
        ctx.text, ctx.needs, ctx.keep, ctx.rows, ctx.shared = text, needs, keep, rows, shared
        ctx.save_for_backward(*streams, row_factor, losses)
        return total

    @staticmethod
    def backward(ctx, grad):
        *streams, row_factor, losses = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _dense_total_gradient(ctx, streams, row_factor, grad)
        stored, ctx.gradients = ctx.gradients, None
        if stored is None:  # a second backward: the first one gave the buffers away
            text, needs = ctx.text, ctx.needs
            _, _, *stored = _op.eager_gradient(text, *streams, ctx.keep, row_factor, ctx.rows, ctx.shared, needs)
        found = [_scaled(g, grad, t, in_place=True) if n else None for g, t, n in zip(stored, streams, ctx.needs)]
        by_factor = grad * losses if ctx.needs_input_grad[5] else None
        return None, None, None, None, None, by_factor, *found


def _dense_total_gradient(ctx, streams, row_factor, grad):
    spec = decode(ctx.text)
    streams, (row_factor,) = _apart(streams), _apart([row_factor])
    losses = ops.PROGRAMS[spec.program].call(_dense(spec, streams), ctx.rows, ctx.shared)
    if ctx.keep is not None:
        losses = torch.where(ctx.keep, losses, 0.0)
    total = (losses * row_factor).sum()
    needs = [*ctx.needs, ctx.needs_input_grad[5]]
    *found, by_factor = _gradients(total, [*streams, row_factor], grad, needs)
    return None, None, None, None, None, by_factor, *found


def _setup_total(ctx, inputs, output):
    _, *rest = inputs
    ctx.lists = len(rest[8]), len(rest[9])
    ctx.needs = rest[10]
    total, losses, *gradients = output
    ctx.save_for_backward(*rest[:6], losses, *gradients)
    ctx.set_materialize_grads(False)


def _total_formula(ctx, grad, *_):
    saved = ctx.saved_tensors
    streams, losses, gradients = saved[:STREAMS], saved[STREAMS], saved[STREAMS + 1 :]
    rows, shared = ctx.lists
    found, by_factor = [None] * STREAMS, None
    if grad is not None:
        found = [_scaled(g, grad, t, in_place=False) if n else None for g, t, n in zip(gradients, streams, ctx.needs)]
        by_factor = grad * losses if ctx.needs_input_grad[8] else None
    return None, *found, None, by_factor, [None] * rows, [None] * shared, None


torch.library.register_autograd("fusedloss::eager_gradient", _total_formula, setup_context=_setup_total)


def weighted_total(
    text: str,
    streams: Sequence[Tensor | None],
    keep: Tensor | None,
    row_factor: Tensor,
    rows: list[Tensor],
    shared: list[Tensor],
) -> Tensor:
    """Σ_i row_factor_i · loss_i of the traced loss that `text` names, with the gradients computed on the way."""
    needs = _needs(streams)
    if torch.compiler.is_compiling():
        return _op.eager_gradient(text, *streams, keep, row_factor, rows, shared, needs)[0]
    return _WeightedTotal.apply(text, needs, keep, rows, shared, row_factor, *streams)


# --- row losses of a loss on whole rows ------------------------------------------------------------------------------


class _RowLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx, text, keep, rows, *streams):
        ctx.text, ctx.keep, ctx.rows = text, keep, rows
        ctx.save_for_backward(*streams)
        return _op.row_losses(text, *streams, keep, rows)

    @staticmethod
    def backward(ctx, grad):
        streams, needs = ctx.saved_tensors, list(ctx.needs_input_grad[3:])
        if torch.is_grad_enabled():
            streams = _apart(streams)
            losses = ops.PROGRAMS[decode(ctx.text).program].call(_dense(decode(ctx.text), streams), ctx.rows, [])
            losses = losses if ctx.keep is None else torch.where(ctx.keep, losses, 0.0)
            return None, None, None, *_gradients(losses, streams, grad, needs)
        return None, None, None, *_row_gradients(ctx, streams, needs, grad)


def _row_gradients(ctx, streams, needs, grad) -> list[Tensor | None]:
    _, _, *found = _op.eager_gradient(ctx.text, *streams, ctx.keep, grad, ctx.rows, [], needs)
    return [g.to(t.dtype) if n else None for g, t, n in zip(found, streams, needs)]


def _setup_row_losses(ctx, inputs, output):
    ctx.text, *streams, ctx.keep, ctx.rows = inputs
    ctx.save_for_backward(*streams)


def _row_losses_formula(ctx, grad):
    needs = list(ctx.needs_input_grad[1 : 1 + STREAMS])
    return None, *_row_gradients(ctx, ctx.saved_tensors, needs, grad), None, [None] * len(ctx.rows)


torch.library.register_autograd("fusedloss::row_losses", _row_losses_formula, setup_context=_setup_row_losses)


def row_losses(text: str, streams: Sequence[Tensor | None], keep: Tensor | None, rows: list[Tensor]) -> Tensor:
    """(N,) losses of the loss on whole rows that `text` names; backward walks the scores again."""
    if torch.compiler.is_compiling():
        return _op.row_losses(text, *streams, keep, rows)
    return _RowLosses.apply(text, keep, rows, *streams)
