"""Relaxed permutations in plain PyTorch: the meaning of csrc/permutation.h, on any device, a few rows of P at a time.

t (lists, n) falling, of which the first `counts` (lists,) of each count; tau (lists,); u and v (lists, n, columns). All
is additive over rows of P, so that derivatives of any order are made chunk by chunk too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

NEURAL_SORT, SOFT_SORT, SOFT_SORT_SQUARED = range(3)
CHUNK = 1 << 21  # entries of P that are there at a time


def tied(t: Tensor, place: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Of each item of lists one after the other, flat and falling: the first that equals it, and one past the last.

    place, count: the item's place in its list, from 0, and how many items the list has.
    """
    index = torch.arange(t.shape[0], device=t.device)
    starts = (place == 0) | (t != t.roll(1)) | (place == count)
    ends = (place >= count - 1) | (t != t.roll(-1))
    first = torch.where(starts, index, 0).cummax(0).values
    return first, torch.where(ends, index + 1, t.shape[0]).flip(0).cummin(0).values.flip(0)


def prefix_sums(x: Tensor) -> Tensor:
    return torch.cat([x.new_zeros(1), x.cumsum(0)])


def pairwise_sums(t: Tensor, place: Tensor, count: Tensor) -> Tensor:
    """Σ_k |t_j − t_k| over the items of j's list, by prefix sums, of lists as `tied` takes them; 0 behind their count.

    Equal items stand in no order, as the derivative 0 of |0| has it.
    """
    first = torch.arange(len(t), device=t.device) - place
    (above, below), dead, last = tied(t, place, count), place >= count, first + count
    sums = prefix_sums(torch.where(dead, 0.0, t))
    larger = sums[above] - sums[first] - (above - first) * t
    smaller = (last - below) * t - (sums[last] - sums[below])
    return torch.where(dead, 0.0, larger + smaller)


def pairwise_slopes(by: Tensor, t: Tensor, place: Tensor, count: Tensor) -> Tensor:
    """The gradient of Σ_j by_j pairwise_sums_j in t."""
    first = torch.arange(len(t), device=t.device) - place
    (above, below), dead, last = tied(t, place, count), place >= count, first + count
    sums = prefix_sums(torch.where(dead, 0.0, by))
    own = (last - below - above + first) * by
    return torch.where(dead, 0.0, own - (sums[above] - sums[first]) + (sums[last] - sums[below]))


def logit(relaxation: int, count: Tensor, place: Tensor, t_place: Tensor, t_item: Tensor, a_place, a_item) -> Tensor:
    """D of csrc/permutation.h; `place` from 0."""
    if relaxation == NEURAL_SORT:
        return (count - 1 - 2 * place) * (t_item - t_place) - (a_item - a_place)
    apart = t_place - t_item
    return -apart.abs() if relaxation == SOFT_SORT else -apart * apart


def centred(t: Tensor, tau: Tensor, counts: Tensor) -> Tensor:
    """t in fp64 less its mean, 0 behind the count; NaN where a score is not finite or tau not above 0."""
    count = counts.unsqueeze(1)
    live = torch.arange(t.shape[1], device=t.device) < count
    finite = (t.isfinite() | ~live).all(1, keepdim=True) & (tau > 0).unsqueeze(1)
    t = torch.where(live, t.double(), 0.0)
    t = torch.where(live, t - t.detach().sum(1, keepdim=True) / count.clamp(min=1), 0.0)
    return torch.where(finite, t, torch.nan)


def _flat_lists(t: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Flat t, place and count; a list that is not finite would spoil the prefix sums of those behind it."""
    place = torch.arange(t.shape[1], device=t.device).expand_as(t).reshape(-1)
    return t.nan_to_num(0.0).reshape(-1), place, counts.unsqueeze(1).expand_as(t).reshape(-1)


def exponents(relaxation: int, t: Tensor, tau: Tensor, counts: Tensor, first: int, last: int) -> Tensor:
    """D / tau of places first to last: (lists, places, n), −inf at items that do not count, 0 at places that do not."""
    index, count = torch.arange(t.shape[1], device=t.device), counts.unsqueeze(1)
    live, places, t = index < count, slice(first, last), centred(t, tau, counts)
    a_place = a_item = None
    if relaxation == NEURAL_SORT:
        a = pairwise_sums(*_flat_lists(t, counts)).view_as(t)
        a_place, a_item = a[:, places, None], a[:, None]
    d = logit(relaxation, count.unsqueeze(2), index[places, None], t[:, places, None], t[:, None], a_place, a_item)
    d = torch.where(live[:, None], d / tau[:, None, None], -torch.inf)
    return torch.where(live[:, places, None], d, 0.0)


def chunks(t: Tensor) -> Iterator[tuple[int, int]]:
    lists, n = t.shape
    rows = max(1, CHUNK // max(1, lists * n))
    for first in range(0, n, rows):
        yield first, min(first + rows, n)


def without_peak(d: Tensor, first: int) -> Tensor:
    """e^D of places from `first` on, 0 at each one's own item."""
    place = torch.arange(first, first + d.shape[1], device=d.device)
    peak = torch.arange(d.shape[2], device=d.device) == place[:, None]
    return torch.where(peak, 0.0, d.exp())


def _clean(x: Tensor, counts: Tensor) -> Tensor:
    """0 behind the places or items that count."""
    live = torch.arange(x.shape[1], device=x.device) < counts.unsqueeze(1)
    return torch.where(live[..., None] if x.dim() == 3 else live, x, 0.0)


def product(relaxation: int, t: Tensor, tau: Tensor, v: Tensor, counts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """y = P v, rest and deviation."""
    v, y, rest, deviation = _clean(v, counts), torch.empty_like(v), torch.empty_like(t), torch.empty_like(v)
    for first, last in chunks(t):
        e = without_peak(exponents(relaxation, t, tau, counts, first, last).to(t.dtype), first)
        rest[:, first:last] = mass = e.sum(2)
        own = v[:, first:last]
        deviation[:, first:last] = change = (e @ v - mass[..., None] * own) / (1 + mass[..., None])
        y[:, first:last] = own + change
    return _clean(y, counts), _clean(rest, counts), _clean(deviation, counts)


def transposed(relaxation: int, t: Tensor, tau: Tensor, u: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """x = Pᵀ u, and rest."""
    u, x, rest = _clean(u, counts), torch.zeros_like(u), torch.empty_like(t)
    for first, last in chunks(t):
        d = exponents(relaxation, t, tau, counts, first, last).to(t.dtype)
        x += d.softmax(2).mT @ u[:, first:last]
        rest[:, first:last] = without_peak(d, first).sum(2)
    return _clean(x, counts), _clean(rest, counts)


def bilinear(relaxation: int, t: Tensor, tau: Tensor, u: Tensor, v: Tensor | None, counts, first: int, last: int):
    """The part of uᵀ P v, or without v of uᵀ rest, that is from places first to last."""
    d = exponents(relaxation, t, tau, counts, first, last).to(t.dtype)
    u = _clean(u, counts)[:, first:last]
    if v is None:
        return (u * without_peak(d, first).sum(2, keepdim=True)).sum()
    return (u * (d.softmax(2) @ _clean(v, counts))).sum()


def _variables(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same tensors with no way from one to another, for derivatives in each of them."""
    given = [x if x is None or x.requires_grad else x.detach().requires_grad_() for x in tensors]
    return [x if x is None else x.view_as(x) for x in given]


def _gradients(output: Tensor, inputs: Sequence[Tensor | None], create_graph: bool) -> list[Tensor | None]:
    wanted = [x for x in inputs if x is not None]
    if not output.requires_grad:
        found = iter([torch.zeros_like(x) for x in wanted])
    else:
        found = iter(
            torch.autograd.grad(output, wanted, create_graph=create_graph, allow_unused=True, materialize_grads=True)
        )
    return [None if x is None else next(found) for x in inputs]


def _summed(parts: Iterator[list[Tensor | None]], inputs: Sequence[Tensor | None]) -> list[Tensor | None]:
    total = [None if x is None else torch.zeros_like(x) for x in inputs]
    for part in parts:
        total = [None if a is None else a + b for a, b in zip(total, part)]
    return total


def gradient(relaxation: int, t: Tensor, tau: Tensor, u: Tensor, v: Tensor | None, counts: Tensor):
    """∂(uᵀ P v) in t, tau and v; without v, ∂(uᵀ rest) in t and tau, and None."""
    u, middle, count = _clean(u, counts), centred(t, tau, counts), counts[:, None]
    v, x = (None, None) if v is None else (_clean(v, counts), torch.zeros_like(v))
    dt, along, total = (torch.zeros_like(middle) for _ in range(3))
    for first, last in chunks(t):
        d = exponents(relaxation, t, tau, counts, first, last)
        own = u[:, first:last]
        if v is None:
            slope = own * without_peak(d.to(t.dtype), first)
            slope.diagonal(first, 1, 2).sub_(slope.sum(2))  # D is taken from the peak on
        else:
            p = d.to(t.dtype).softmax(2)
            x += p.mT @ own
            slope = p * (own @ v.mT - (own * (p @ v)).sum(2, keepdim=True))
        slope = slope.double()
        along += (slope * torch.where(d == -torch.inf, 0.0, d)).sum(1)
        if relaxation == NEURAL_SORT:
            place = torch.arange(first, last, device=t.device)
            total += slope.sum(1)
            dt += ((count - 1 - 2 * place).double()[:, None] @ slope).squeeze(1)
        else:
            apart = middle[:, first:last, None] - middle[:, None]
            apart = slope * (apart.sign() if relaxation == SOFT_SORT else 2 * apart)
            dt += apart.sum(1)
            dt[:, first:last] -= apart.sum(2)
    if relaxation == NEURAL_SORT:
        flat, place, many = _flat_lists(middle, counts)
        dt -= pairwise_slopes(total.nan_to_num(0.0).reshape(-1), flat, place, many).view_as(dt)
    dtau = -along.sum(1) / tau
    return _clean(dt / tau[:, None], counts).to(t.dtype), dtau, None if x is None else _clean(x, counts)


def second_gradient(relaxation: int, t, tau, u, v, counts: Tensor, by: Sequence[Tensor | None]):
    """The derivatives in t, tau, u and v of Σ by · gradient(…); differentiable in turn where gradients are recorded."""
    again = torch.is_grad_enabled()

    def parts():
        for first, last in chunks(t):
            inside = bilinear(relaxation, *variables, counts, first, last)
            found = _gradients(inside, (variables[0], variables[1], variables[3]), True)
            total = sum((a * b).sum() for a, b in zip(found, by) if a is not None and b is not None)
            yield _gradients(total, variables, again)

    with torch.enable_grad():
        variables = _variables(t, tau, u, v)
        result = _summed(parts(), variables)
    return result if again else [None if x is None else x.detach() for x in result]


def over_lists(function: Callable, per_item: Sequence[Tensor | None], per_list: Sequence[Tensor], counts, offsets):
    """function(per_item…, per_list…, counts) of lists of any lengths, padded to (lists, n), and its results as flat as
    they came. Lists are padded together where their lengths have the same number of bits: at most twofold."""
    like = next(x for x in per_item if x is not None)
    if offsets is None:
        if counts is None:
            counts = torch.full((like.shape[0],), like.shape[1], device=like.device)
        return function(*per_item, *per_list, counts)
    lengths = offsets.diff()
    counts = lengths if counts is None else counts
    by_bits: dict[int, list[int]] = {}
    for row, length in enumerate(lengths.tolist()):
        by_bits.setdefault(length.bit_length(), []).append(row)
    results = None
    for rows in by_bits.values():
        rows = torch.tensor(rows, device=like.device)
        index = torch.arange(int(lengths[rows].max()), device=like.device)
        inside = index < lengths[rows, None]
        index = torch.where(inside, offsets[rows, None] + index, 0)
        if not index.numel():
            index = index.new_zeros(len(rows), 1)  # lists without items, of which none counts
            inside = torch.zeros_like(index, dtype=torch.bool)
        items = [None if x is None else x[index] for x in per_item]
        part = function(*items, *(None if x is None else x[rows] for x in per_list), counts[rows])
        if results is None:
            size = lambda x: len(like) if x.dim() > 1 else len(lengths)
            results = [None if x is None else x.new_zeros(size(x), *x.shape[2:]) for x in part]
        where = [None if x is None else (index[inside] if x.dim() > 1 else rows) for x in part]
        flat = [x if x is None or x.dim() == 1 else x[inside] for x in part]
        results = [r if r is None else r.index_put((w,), x) for r, w, x in zip(results, where, flat)]
    return results
