"""How much of each item a sorting network brings to the places of the positives, as one operator.

Of each list the k largest negatives and all positives, both in rising order, stand on the wires of an odd-even
network; the positives' places are the last ones. The indicator of those places goes backwards through it: one
channel, no matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..operators import like, operator, plain_gradients
from . import network_ops as ops

LISTS = "Tensor positive, Tensor? mask, Tensor? offsets"
SPEC = "odd_even", False


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


def _forward(scores, steepness, positive, mask, offsets, k, distribution):
    wires, spec = Wires(scores, positive, mask, offsets, k), (*SPEC, distribution, 0.25)
    _, gaps = ops.sort(wires.take(scores), steepness, wires.count, *spec)
    mass = ops.push(gaps, steepness, wires.indicator(scores), True, *spec)
    return wires.give(mass.squeeze(2), scores)


def _backward(scores, steepness, upstream, positive, mask, offsets, k, distribution):
    wires, spec = Wires(scores, positive, mask, offsets, k), (*SPEC, distribution, 0.25)
    sorted, gaps = ops.sort(wires.take(scores), steepness, wires.count, *spec)
    g = torch.where(wires.take(upstream).isinf(), 0.0, wires.take(upstream)).unsqueeze(2)
    dgaps, total, _ = ops.push_backward(gaps, steepness, wires.indicator(scores), g, True, False, *spec)
    dx, more = ops.sort_backward(gaps, steepness, torch.zeros_like(sorted), dgaps, *spec)
    return wires.give(dx, scores), (total + more).sum()


def _derivative(ctx, upstream):
    scores, steepness, *lists = ctx.saved_tensors
    if torch.is_grad_enabled():
        formula = lambda *inputs: (_forward(*inputs, *lists, *ctx.options),)
        found = plain_gradients(formula, (scores, steepness), (upstream,), ctx.needs_input_grad)
    else:
        found = _run_backward(scores, steepness, upstream, *lists, *ctx.options)
    return found[0], None if found[1] is None else found[1].to(steepness.device, steepness.dtype)


_run_backward = operator(
    "group_ordering_backward",
    f"(Tensor scores, Tensor steepness, Tensor upstream, {LISTS}, int k, str distribution) -> (Tensor, Tensor)",
    _backward,
    lambda scores, *_: (like(scores), scores.new_empty((), dtype=torch.float64)),
)
group_ordering = operator(
    "group_ordering",
    f"(Tensor scores, Tensor steepness, {LISTS}, int k, str distribution) -> Tensor",
    _forward,
    like,
    _derivative,
)
