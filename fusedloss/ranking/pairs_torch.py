"""Sums over the pairs of each list in plain PyTorch: the meaning of the compiled and the Triton kernels.

Pairs are made for a few rows i at a time and forgotten: O(n) numbers beside a block of fixed size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..lists import Lists

BLOCK = 1 << 20  # pairs at a time
LEAST_GAIN = 1e-10  # of a list's best discounted gain

# Of x = σ (s_i − s_j): f, −f′, f″
FUNCTIONS: dict[str, tuple[Callable[[Tensor], Tensor], ...]] = {
    "softplus": (
        lambda x: -logsigmoid(x),
        lambda x: torch.sigmoid(-x),
        lambda x: torch.sigmoid(x) * torch.sigmoid(-x),
    ),
    "logistic": (
        lambda x: torch.sigmoid(-x),
        lambda x: torch.sigmoid(x) * torch.sigmoid(-x),
        lambda x: torch.sigmoid(x) * torch.sigmoid(-x) * (torch.sigmoid(x) - torch.sigmoid(-x)),
    ),
}


@dataclass(frozen=True)
class Items:
    """What a pair's loss is made of: w_ij = |a_i − a_j| (table[|rank_i − rank_j|] + |b_i − b_j|), of which parts may be
    missing, over pairs of relevance r_i > r_j; with `own`, w_ij = a_i over all ordered pairs. Flat, as Lists has it."""

    scores: Tensor
    relevance: Tensor
    counts: Tensor | None = None  # bool: who takes part
    a: Tensor | None = None
    b: Tensor | None = None
    rank: Tensor | None = None
    table: Tensor | None = None
    own: bool = False

    def cut(self, take: Callable[[Tensor], Tensor]) -> Items:
        parts = {name: getattr(self, name) for name in ("scores", "relevance", "counts", "a", "b", "rank")}
        return replace(self, **{name: None if part is None else take(part) for name, part in parts.items()})


def ranks(lists: Lists, values: Tensor) -> Tensor:
    """1-based ranks by falling value, ties in rising order of position, int64; what does not count comes last."""
    left_out = None if lists.mask is None else ~lists.mask
    order = values.sort(dim=-1, descending=True, stable=True).indices
    keys = [left_out] if lists.offsets is None else [left_out, lists.row]
    for key in keys:  # less significant keys first
        if key is not None:
            order = order.gather(-1, key.gather(-1, order).sort(dim=-1, stable=True).indices)
    place = torch.arange(1, values.shape[-1] + 1, device=values.device)
    place = place.expand_as(order) if lists.offsets is None else place - lists.spread(lists.offsets[:-1])
    return torch.empty_like(order).scatter_(-1, order, place)


def weighted(lists: Lists, scores: Tensor, relevance: Tensor, weight: str, mu: float, k: int) -> Items:
    """The items of a call, and what their weights are made of; `weight` and k as csrc/pairwise.h has them."""
    items = Items(scores, relevance, lists.mask)
    if k or weight in ("ndcg1", "ndcg2", "lambdarank", "ndcg2pp"):
        rank = ranks(lists, scores)
        items = replace(items, rank=rank)
    if k:
        top = rank <= k
        items = replace(items, counts=top if lists.mask is None else top & lists.mask)
    if weight == "one":
        return items
    if weight in ("difference", "squares"):
        return replace(items, a=relevance if weight == "difference" else relevance.square())
    gain, at = torch.expm1(relevance.double() * math.log(2)), 1 / (1 + rank.double()).log2()
    place = ranks(lists, relevance)
    best = gain / (1 + place.double()).log2()
    best = lists.sum(torch.where(place <= k, best, 0.0) if k else best)
    gain = gain / lists.spread(best.clamp(min=LEAST_GAIN))
    if weight == "ndcg1":
        return replace(items, a=(gain * at).to(scores.dtype), own=True)
    items = replace(items, a=gain.to(scores.dtype))
    if weight != "ndcg2":
        items = replace(items, b=at.to(scores.dtype))
    if weight != "lambdarank":
        apart = torch.arange(1, scores.shape[-1] + 2, device=scores.device).double()
        deltas = (1 / (1 + apart).log2()).diff().neg() * (mu if weight == "ndcg2pp" else 1.0)
        items = replace(items, table=torch.cat([deltas.new_zeros(1), deltas]).to(scores.dtype))
    return items


def pieces(lists: Lists, length: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """Views (rows, n) of flat values: some lists of one length at a time, or with offsets one list."""
    if lists.offsets is not None:
        ends = lists.offsets.tolist()
        for begin, end in zip(ends[:-1], ends[1:]):
            if end > begin:
                yield lambda flat, begin=begin, end=end: flat[begin:end].unsqueeze(0)
        return
    step = max(1, BLOCK // max(1, length * length))
    for row in range(0, lists.rows if length else 0, step):
        yield lambda flat, row=row: flat[row : row + step]


def blocks(n: int, rows: int) -> Iterator[slice]:
    step = max(1, BLOCK // max(1, n * rows))
    return (slice(first, min(n, first + step)) for first in range(0, n, step))


def _pairs(items: Items, i: slice) -> tuple[Tensor, Tensor | None]:
    """(rows, block, n): which pairs there are, and their weights."""

    def apart(x: Tensor) -> Tensor:
        return (x[:, i, None] - x[:, None, :]).abs()

    there = items.relevance[:, i, None] > items.relevance[:, None, :]
    if items.own:
        there = torch.ones_like(there)
    if items.counts is not None:
        there = there & items.counts[:, i, None] & items.counts[:, None, :]
    if items.a is None:
        return there, None
    if items.own:
        return there, items.a[:, i, None].expand_as(there)
    weight = apart(items.a)
    by = None if items.b is None else apart(items.b)
    if items.table is not None:
        delta = items.table[apart(items.rank)]
        by = delta if by is None else by + delta
    return there, weight if by is None else weight * by


def _sums(items: Items, sigma: float, *terms: Callable[[Tensor, slice], Tensor]) -> tuple[list, Tensor]:
    """(Σ_j, Σ_i) of w_ij term(σ (s_i − s_j)), (rows, n) each, for every term; and how many pairs each item begins."""
    rows, n = items.scores.shape
    own, others = [[] for _ in terms], [torch.zeros_like(items.scores) for _ in terms]
    pairs = []
    for i in blocks(n, rows):
        there, weight = _pairs(items, i)
        x = (items.scores[:, i, None] - items.scores[:, None, :]) * sigma
        for k, term in enumerate(terms):
            y = term(x, i)
            y = torch.where(there, y if weight is None else y * weight, 0.0)
            own[k].append(y.sum(2))
            others[k] += y.sum(1)
        pairs.append(there.sum(2))
    return [(torch.cat(mine, 1), theirs) for mine, theirs in zip(own, others)], torch.cat(pairs, 1)


def _joined(lists: Lists, like: Tensor, parts: list[Tensor]) -> Tensor:
    if not parts:
        return torch.zeros_like(like)
    return torch.cat([p.squeeze(0) for p in parts]) if lists.offsets is not None else torch.cat(parts)


def pair_losses(lists: Lists, items: Items, function: str, sigma: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """(losses, gradient, pairs) as csrc/pairwise.h has them."""
    f, falling, _ = FUNCTIONS[function]
    losses, gradient, pairs = [], [], []
    for view in pieces(lists, items.scores.shape[-1]):
        sums, begun = _sums(items.cut(view), sigma, lambda x, i: f(x), lambda x, i: falling(x))
        (loss, _), (own, others) = sums
        losses.append(loss)
        gradient.append((others - own) * (sigma * scale))
        pairs.append(begun)
    whole = Lists(lists.shape, lists.dim, None, lists.offsets)  # what does not count is 0 already
    loss = whole.sum(_joined(lists, items.scores, losses).double() * scale).to(items.scores.dtype)
    number = whole.sum(_joined(lists, items.scores.long(), pairs))
    return loss, _joined(lists, items.scores, gradient), number


def pair_curvature(lists: Lists, items: Items, function: str, sigma: float, scale: float, v: Tensor) -> Tensor:
    """The second derivative of each list's loss in the scores, times v."""
    bent, found = FUNCTIONS[function][2], []
    for view in pieces(lists, items.scores.shape[-1]):
        u = view(v)
        sums, _ = _sums(items.cut(view), sigma, lambda x, i, u=u: bent(x) * (u[:, i, None] - u[:, None, :]))
        found.append((sums[0][0] - sums[0][1]) * (sigma * sigma * scale))
    return _joined(lists, items.scores, found)


# --- soft positions --------------------------------------------------------------------------------------------------


def _positions(lists: Lists, scores: Tensor, sigma: float, term: Callable) -> Tensor:
    """Σ over j ≠ i of term(σ (s_i − s_j), view, i) of each item, 0 of what does not count."""
    found = []
    for view in pieces(lists, scores.shape[-1]):
        s, counts = view(scores), None if lists.mask is None else view(lists.mask)
        n, parts = s.shape[1], []
        for i in blocks(n, len(s)):
            x = term((s[:, i, None] - s[:, None, :]) * sigma, view, i)
            there = torch.arange(n, device=s.device)
            there = (there[i, None] != there).expand_as(x)
            if counts is not None:
                there = there & counts[:, i, None] & counts[:, None, :]
            parts.append(torch.where(there, x, 0.0).sum(2))
        found.append(torch.cat(parts, 1))
    return _joined(lists, scores, found)


def soft_positions(lists: Lists, scores: Tensor, sigma: float) -> Tensor:
    found = _positions(lists, scores, sigma, lambda x, view, i: torch.sigmoid(-x)) + 1
    return found if lists.mask is None else torch.where(lists.mask, found, 0.0)


def soft_positions_backward(lists: Lists, scores: Tensor, upstream: Tensor, sigma: float) -> Tensor:
    def term(x, view, i):
        c = view(upstream)
        return torch.sigmoid(x) * torch.sigmoid(-x) * (c[:, None, :] - c[:, i, None])

    return _positions(lists, scores, sigma, term) * sigma


def soft_positions_curvature(lists: Lists, scores: Tensor, upstream: Tensor, v: Tensor, sigma: float) -> Tensor:
    """The derivative in the scores of v · soft_positions_backward(upstream)."""

    def term(x, view, i):
        c, u = view(upstream), view(v)
        both = (c[:, i, None] - c[:, None, :]) * (u[:, i, None] - u[:, None, :])
        return torch.sigmoid(x) * torch.sigmoid(-x) * (torch.sigmoid(x) - torch.sigmoid(-x)) * both

    return _positions(lists, scores, sigma, term) * (sigma * sigma)
