"""How much of each item a sorting network brings to the places of the positives, as one operator.

Of each list the k largest negatives and all positives, both in rising order, stand on the wires of an odd-even
network; the positives' places are the last ones. The indicator of those places goes backwards through it: one
channel, no matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import network_ops  # noqa: F401 (defines the operators)
from .derivatives import plain_gradients

_op = torch.ops.fusedloss
LISTS = "Tensor positive, Tensor? mask, Tensor? offsets, int k, str distribution"

torch.library.define("fusedloss::group_ordering", f"(Tensor scores, Tensor steepness, {LISTS}) -> Tensor")
torch.library.define(
    "fusedloss::group_ordering_backward",
    f"(Tensor scores, Tensor steepness, {LISTS}, Tensor upstream) -> (Tensor, Tensor)",
)


class Wires:
    """Which items stand on which wires: item `item[i]` of all lists on wire `place[i]` of list `row[i]`."""

    def __init__(self, scores: Tensor, positive: Tensor, mask: Tensor | None, offsets: Tensor | None, k: int):
        device, items = scores.device, scores.numel()
        where = torch.arange(items, device=device)
        if offsets is None:
            rows = scores.shape[0]
            row, start = where // max(1, scores.shape[1]), torch.arange(rows, device=device) * scores.shape[1]
        else:
            rows, start = len(offsets) - 1, offsets[:-1]
            row = torch.repeat_interleave(offsets.diff(), output_size=items)
        group = positive.reshape(-1).long()  # 0 and 1, and 2 for what does not count
        if mask is not None:
            group = torch.where(mask.reshape(-1), group, 2)
        order = scores.reshape(-1).detach().argsort(stable=True)
        order = order[group[order].argsort(stable=True)]
        order = order[row[order].argsort(stable=True)]
        zero = torch.zeros(rows, dtype=torch.int64, device=device)
        negatives, positives = (zero.index_add(0, row, (group == g).long()) for g in (0, 1))
        place = where - start[row] - (negatives - k).clamp(min=0)[row]
        self.negatives = negatives.clamp(max=k)
        self.count = self.negatives + positives
        kept = (place >= 0) & (place < self.count[row])
        self.item, self.row, self.place = order[kept], row[kept], place[kept]
        self.shape = rows, int(self.count.max()) if rows else 0

    def take(self, x: Tensor) -> Tensor:
        """Of each item a number → of each wire; +inf on wires without one: comparators leave their neighbours alone."""
        empty = x.new_full(self.shape, torch.inf)
        return empty.index_put((self.row, self.place), x.reshape(-1).index_select(0, self.item))

    def give(self, wires: Tensor, like: Tensor) -> Tensor:
        flat = wires.new_zeros(like.numel()).index_copy(0, self.item, wires[self.row, self.place])
        return flat.reshape(like.shape)

    def indicator(self, like: Tensor) -> Tensor:
        places = torch.arange(self.shape[1], device=like.device)
        return (places >= self.negatives.unsqueeze(1)).to(like.dtype).unsqueeze(2)


def _meaning(scores, steepness, positive, mask, offsets, k, distribution):
    wires, spec = Wires(scores, positive, mask, offsets, k), ("odd_even", False, distribution, 0.25)
    _, gaps = _op.network_sort(wires.take(scores), steepness, wires.count, *spec)
    mass = _op.network_push(gaps, steepness, wires.indicator(scores), True, *spec)
    return wires.give(mass.squeeze(2), scores)


@torch.library.impl("fusedloss::group_ordering", "CompositeExplicitAutograd")
def _forward(scores, steepness, *rest):
    return _meaning(scores, steepness, *rest)


@torch.library.register_fake("fusedloss::group_ordering")
def _forward_fake(scores, steepness, *rest):
    return torch.empty_like(scores, memory_format=torch.contiguous_format)


@torch.library.impl("fusedloss::group_ordering_backward", "CompositeExplicitAutograd")
def _backward(scores, steepness, positive, mask, offsets, k, distribution, upstream):
    wires, spec = Wires(scores, positive, mask, offsets, k), ("odd_even", False, distribution, 0.25)
    sorted, gaps = _op.network_sort(wires.take(scores), steepness, wires.count, *spec)
    g = torch.where(wires.take(upstream).isinf(), 0.0, wires.take(upstream)).unsqueeze(2)
    indicator = wires.indicator(scores)
    dgaps, total, _ = _op.network_push_backward(gaps, steepness, indicator, True, g, False, *spec)
    dx, more = _op.network_sort_backward(gaps, steepness, torch.zeros_like(sorted), dgaps, *spec)
    return wires.give(dx, scores), (total + more).sum()


@torch.library.register_fake("fusedloss::group_ordering_backward")
def _backward_fake(scores, steepness, *rest):
    total = scores.new_empty((), dtype=torch.float64)
    return torch.empty_like(scores, memory_format=torch.contiguous_format), total


def _context(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:5])
    ctx.options = inputs[5:]


def _formula(ctx, upstream):
    scores, steepness, *lists = ctx.saved_tensors
    if torch.is_grad_enabled():

        def meaning(scores, steepness):
            return (_meaning(scores, steepness, *lists, *ctx.options),)

        found = plain_gradients(meaning, (scores, steepness), (upstream,), ctx.needs_input_grad[:2])
    else:
        found = _op.group_ordering_backward(scores, steepness, *lists, *ctx.options, upstream)
    dsteepness = None if found[1] is None else found[1].to(steepness.device, steepness.dtype)
    return found[0], dsteepness, *(None,) * 5


torch.library.register_autograd("fusedloss::group_ordering", _formula, setup_context=_context)
