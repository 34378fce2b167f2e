"""Sparsemax and entmax-1.5: softmax's relatives whose smallest probabilities are exactly 0."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import expect, expect_reverse_mode
from ..lists import Lists, lists_of
from . import threshold
from .threshold import ENTMAX15, SPARSEMAX

COMMON = """
        values: float64, float32, bfloat16 or float16 of any shape; the result has its shape and type, and is computed
            in float64 from the few entries near a row's largest. Cost: two passes over a row, no sort.
        dim: the dimension that sums to 1.
        mask: bool of values' shape, False: left out, as −inf is. offsets: (lists + 1,) int64 for values (items,): list
            r is the items from offsets[r] to offsets[r + 1].
    Entries of −inf get exactly 0 and gradient 0; a row with nothing else, or nothing at all, is all 0. Entries of +inf
    share the row's 1 among themselves. A NaN makes its row NaN. The backward pass needs the result alone; derivatives
    of any order are right. Raises TypeError, ValueError or IndexError for bad arguments.
"""

torch.library.define("fusedloss::entmax", "(Tensor values, Tensor? offsets, int kind) -> Tensor")
torch.library.define("fusedloss::entmax_backward", "(Tensor p, Tensor grad, Tensor? offsets, int kind) -> Tensor")


def _lists(values: Tensor, offsets: Tensor | None) -> Lists:
    return Lists(values.shape, values.dim() - 1, None, offsets)


@torch.library.impl("fusedloss::entmax", "CompositeExplicitAutograd")
def _entmax(values, offsets, kind):
    return threshold.project(values, _lists(values, offsets), kind)


@torch.library.impl("fusedloss::entmax_backward", "CompositeExplicitAutograd")
def _entmax_backward(p, grad, offsets, kind):
    return threshold.project_backward(p, grad, _lists(p, offsets), kind)


@torch.library.register_fake("fusedloss::entmax")
def _entmax_fake(values, offsets, kind):
    return torch.empty_like(values, memory_format=torch.contiguous_format)


@torch.library.register_fake("fusedloss::entmax_backward")
def _entmax_backward_fake(p, grad, offsets, kind):
    return torch.empty_like(p, memory_format=torch.contiguous_format)


def _keep_output(ctx, inputs, output):
    _, offsets, ctx.kind = inputs
    ctx.save_for_backward(output, offsets)


def _formula(ctx, grad):
    p, offsets = ctx.saved_tensors
    return torch.ops.fusedloss.entmax_backward(p, grad, offsets, ctx.kind), None, None


def _keep_inputs(ctx, inputs, output):
    p, grad, offsets, ctx.kind = inputs
    ctx.save_for_backward(p, grad, offsets)


def _second_formula(ctx, v):
    """The Jacobian is symmetric, so it is applied to v; its own slope, where p moves, for entmax alone."""
    p, g, offsets = ctx.saved_tensors
    by_grad, by_p = torch.ops.fusedloss.entmax_backward(p, v, offsets, ctx.kind), None
    if ctx.kind == ENTMAX15 and ctx.needs_input_grad[0]:
        lists, inside = _lists(p, offsets), p != 0
        root = torch.where(inside, torch.where(inside, p, 1.0).sqrt(), 0.0)
        total = lists.sum(root)
        total = torch.where(total == 0, 1.0, total)
        apart = [t - lists.spread(lists.sum(root * torch.where(inside, t, 0.0)) / total) for t in (g, v)]
        by_p = torch.where(inside, apart[0] * apart[1] / torch.where(inside, 2 * root, 1.0), 0.0)
    return by_p, by_grad, None, None


torch.library.register_autograd("fusedloss::entmax", _formula, setup_context=_keep_output)
torch.library.register_autograd("fusedloss::entmax_backward", _second_formula, setup_context=_keep_inputs)


def _batched(tensors: list[Tensor], dims, size: int) -> list[Tensor]:
    """Tensors of more rows: the mapped dimension in front, (size * rows, width)."""
    found = [t.unsqueeze(0).expand(size, *t.shape) if d is None else t.movedim(d, 0) for t, d in zip(tensors, dims)]
    return [t.reshape(-1, t.shape[-1]) for t in found]


def _mapped(op, info, dims, tensors: list[Tensor], offsets: Tensor | None, kind: int):
    if offsets is not None:
        raise NotImplementedError("sparsemax, entmax15: offsets: expected None under vmap")
    whole = _batched(tensors, dims, info.batch_size)
    return op(*whole, None, kind).reshape(info.batch_size, -1, whole[0].shape[-1]), 0


@torch.library.register_vmap("fusedloss::entmax")
def _entmax_vmap(info, dims, values, offsets, kind):
    return _mapped(torch.ops.fusedloss.entmax, info, dims[:1], [values], offsets, kind)


@torch.library.register_vmap("fusedloss::entmax_backward")
def _entmax_backward_vmap(info, dims, p, grad, offsets, kind):
    return _mapped(torch.ops.fusedloss.entmax_backward, info, dims[:2], [p, grad], offsets, kind)


def _call(name: str, values: Tensor, dim: int, mask: Tensor | None, offsets: Tensor | None, kind: int) -> Tensor:
    lists = lists_of(name, values, dim, mask, offsets)
    expect_reverse_mode(name, values=values)
    expect(values.dtype in threshold.KINDS, name, "values", "a floating-point tensor", values.dtype, TypeError)
    flat = lists.flat(values)
    if lists.mask is not None:
        flat = torch.where(lists.mask, flat, -torch.inf)
    return lists.shaped(torch.ops.fusedloss.entmax(flat, lists.offsets, kind))


def sparsemax(values: Tensor, dim: int = -1, *, mask: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
    """Sparsemax: the point p of the probability simplex nearest to z, p_j = [z_j − τ]₊ with Σ p = 1.

    André Martins and Ramón Fernandez Astudillo, "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label
    Classification", ICML 2016, arXiv 1602.02068.
    """
    return _call("sparsemax", values, dim, mask, offsets, SPARSEMAX)


def entmax15(values: Tensor, dim: int = -1, *, mask: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
    """Entmax with α = 1.5, between softmax and sparsemax: p_j = [z_j / 2 − τ]₊² with Σ p = 1.

    Ben Peters, Vlad Niculae and André Martins, "Sparse Sequence-to-Sequence Models", ACL 2019, arXiv 1905.05702.
    """
    return _call("entmax15", values, dim, mask, offsets, ENTMAX15)


sparsemax.__doc__ += COMMON
entmax15.__doc__ += COMMON
