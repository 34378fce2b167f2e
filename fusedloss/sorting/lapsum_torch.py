"""LapSum in plain PyTorch: O(n log n) on any device, float64 inside, differentiable in values, k and alpha.

csrc/laplace.h has the formulas. Lists lie flat one after the other, each in falling order, what is masked out last; the
recurrences over e^(−gap / alpha) are made in log2(n) steps.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


def scan(decay: Tensor, x: Tensor, longest: int) -> Tensor:
    """s_j = x_j + decay_{j−1} s_{j−1} along lists of at most `longest` items, at whose ends decay is 0."""
    factor, step = torch.cat([decay.new_zeros(min(1, len(x))), decay]), 1
    while step < longest:
        zeros = x.new_zeros(min(step, len(x)))
        x = x + factor * torch.cat([zeros, x[: len(x) - len(zeros)]])
        factor = factor * torch.cat([zeros, factor[: len(x) - len(zeros)]])
        step *= 2
    return x


class Ordered:
    """Flat values as their sort has them; `order` is where each comes from, `nan` which lists have a NaN."""

    def __init__(self, values: Tensor, alpha: Tensor, mask: Tensor | None, offsets: Tensor | None, negated=False):
        self.shape, rows, device = values.shape, len(alpha), values.device
        flat = -values.reshape(-1) if negated else values.reshape(-1)
        items = len(flat)
        where = torch.arange(items, device=device)
        if offsets is None:
            self.longest = values.shape[1]
            self.row, start = where // max(1, self.longest), torch.arange(rows, device=device) * self.longest
        else:
            self.longest, start = items, offsets[:-1]
            self.row = torch.repeat_interleave(offsets.diff(), output_size=items)
        self.rows, self.start = rows, start
        keys = flat.detach()
        order = keys.argsort(descending=True, stable=True)
        counts = torch.ones_like(keys, dtype=torch.bool) if mask is None else mask.reshape(-1)
        if mask is not None:
            order = order[counts[order].to(torch.int8).argsort(descending=True, stable=True)]
        if rows > 1:
            order = order[self.row[order].argsort(stable=True)]
        self.order, self.place, self.live = order, where - start[self.row], counts[order]
        y = flat.index_select(0, order).double()
        self.nan = self.per_list(self.live & y.isnan()) > 0
        sound = self.live & ~self.nan[self.row]
        self.top, self.finite = sound & (y == torch.inf), sound & y.isfinite()
        self.count, self.first = self.per_list(self.live), self.per_list(self.top)
        self.end = self.first + self.per_list(self.finite)  # places [first, end) of each list are finite
        self.alpha = alpha.double().index_select(0, self.row)
        self.y = torch.where(self.finite, y, 0.0)
        near = self.finite[:-1] & self.finite[1:] & (self.row[:-1] == self.row[1:])
        gap = torch.where(near, self.y[:-1] - self.y[1:], 0.0) / self.alpha[:-1]
        tied = (y[:-1] == y[1:]) & self.live[:-1] & self.live[1:] & (self.row[:-1] == self.row[1:])
        self.gap, self.decay = gap, torch.where(near, (-gap).exp(), tied.double())  # equal infinite ones are tied

    def per_list(self, flags: Tensor) -> Tensor:
        return torch.zeros(self.rows, dtype=torch.int64, device=flags.device).index_add(0, self.row, flags.long())

    def sums(self, x: Tensor) -> Tensor:
        return torch.zeros(self.rows, dtype=x.dtype, device=x.device).index_add(0, self.row, x)

    def down(self, x: Tensor) -> Tensor:
        return scan(self.decay, x, self.longest)

    def up(self, x: Tensor) -> Tensor:
        return scan(self.decay.flip(0), x.flip(0), self.longest).flip(0)

    def from_above(self, x: Tensor) -> Tensor:
        """Σ over the items before each of x e^−distance."""
        return torch.cat([x[:0] if len(x) == 0 else x.new_zeros(1), self.decay * self.down(x)[:-1]])

    def from_below(self, x: Tensor) -> Tensor:
        return torch.cat([self.decay * self.up(x)[1:], x[:0] if len(x) == 0 else x.new_zeros(1)])

    @cached_property
    def above(self) -> Tensor:
        return self.from_above(self.live.double())

    @cached_property
    def below(self) -> Tensor:
        return self.from_below(self.live.double())

    @cached_property
    def distances(self) -> tuple[Tensor, Tensor]:
        """Σ distance e^−distance over the items before, behind."""
        one = self.y.new_zeros(min(1, len(self.y)))
        return (
            self.down(torch.cat([one, self.gap]) * self.above),
            self.up(torch.cat([self.gap, one]) * self.below),
        )

    def back(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """Numbers of the sorted items, where the items lie; NaN lists NaN, 0 for what is masked out."""
        x = torch.where(self.live, torch.where(self.nan[self.row], torch.nan, x), 0.0)
        return torch.zeros_like(x).index_copy(0, self.order, x).reshape(self.shape).to(dtype)

    def local_order(self) -> Tensor:
        return (self.order - self.start[self.row]).to(torch.int32).reshape(self.shape)

    def threshold(self, k: Tensor, row: Tensor):
        """(above, upper, lower, P, Q, items next to it) of csrc/laplace.cpp for targets k in lists `row`."""
        sums = (self.place + 0.5 - 0.5 * self.above + 0.5 * self.below + self.start[self.row]).detach()
        with torch.no_grad():
            above = torch.searchsorted(sums, (k + self.start[row]).contiguous(), right=True) - self.start[row]
            above = torch.minimum(torch.maximum(above, self.first[row]), self.end[row])
            has_upper, has_lower = above > self.first[row], above < self.end[row]
            last = max(0, len(sums) - 1)
            upper_item = (self.start[row] + above - 1).clamp(0, last)
            lower_item = (self.start[row] + above).clamp(0, last)
        p = torch.where(has_upper, self.above[upper_item] + 1, 1.0)
        q = torch.where(has_lower, self.below[lower_item] + 1, 1.0)
        both = has_upper & has_lower
        decay = torch.where(both, torch.cat([self.decay, p.new_zeros(1)])[upper_item], 0.0)
        c = k - above
        side = (c < 0) | ((c == 0) & has_upper)
        inner = c * c + p * q * decay
        root = torch.where(inner > 0, inner, 1.0).sqrt()
        root = torch.where(both, torch.where(inner > 0, root, 0.0), torch.where(side, -c, c))
        up, low = (root - c) / (2 * p), (root + c) / (2 * q)  # the larger one first: nothing cancels
        upper = torch.where(side, up, decay / torch.where(low > 0, 4 * low, 1.0))
        lower = torch.where(side, decay / torch.where(up > 0, 4 * up, 1.0), low)
        lower = torch.where(both & (inner == 0), low, lower)
        upper, lower = torch.where(has_upper, upper, 0.0), torch.where(has_lower, lower, 0.0)
        return above, upper, lower, p, q, upper_item, lower_item


def rank(o: Ordered, descending: bool, dtype: torch.dtype) -> Tensor:
    less = 0.5 * (o.above - o.below)
    hard = o.place + 1.0 if descending else (o.count[o.row] - o.place).double()
    return o.back(hard - less if descending else hard + less, dtype)


def rank_backward(o: Ordered, upstream: Tensor, descending: bool) -> tuple[Tensor, Tensor]:
    by = (-0.5 if descending else 0.5) / o.alpha
    g = torch.where(o.live, upstream.reshape(-1)[o.order].double(), 0.0)
    dx = by * (g * (o.above + o.below) - o.from_above(g) - o.from_below(g))
    near, far = o.distances
    dalpha = o.sums(by * g * (near - far))
    return o.back(torch.where(o.finite, dx, 0.0), upstream.dtype), torch.where(o.nan, torch.nan, dalpha)


def _log(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0).log()


def _sorted_place(o: Ordered, descending: bool) -> Tensor:
    """Where in the output the k-th largest item of each list goes."""
    return o.start[o.row] + torch.where(o.live & (not descending), o.count[o.row] - 1 - o.place, o.place)


def sort(o: Ordered, values: Tensor, descending: bool) -> Tensor:
    _, upper, lower, _, _, upper_item, lower_item = o.threshold(o.place + 0.5, o.row)
    from_upper, from_lower = o.y[upper_item] + o.alpha * _log(2 * upper), o.y[lower_item] - o.alpha * _log(2 * lower)
    infinite = torch.where(o.top, torch.inf, torch.where(o.live, -torch.inf, 0.0))
    b = torch.where(o.finite, torch.where(upper > lower, from_upper, from_lower), infinite)
    b = torch.where(o.nan[o.row] & o.live, torch.nan, b)
    return torch.zeros_like(b).index_copy(0, _sorted_place(o, descending), b).reshape(o.shape).to(values.dtype)


def sort_backward(o: Ordered, upstream: Tensor, descending: bool) -> tuple[Tensor, Tensor]:
    _, upper, lower, p, q, upper_item, lower_item = o.threshold(o.place + 0.5, o.row)
    density = torch.where(o.finite, upper * p + lower * q, 1.0)
    weight = torch.where(o.finite, upstream.reshape(-1)[_sorted_place(o, descending)].double(), 0.0) / density
    sent = [torch.zeros_like(o.y).index_add(0, i, weight * s) for i, s in ((upper_item, upper), (lower_item, lower))]
    dx = torch.where(o.finite, o.up(sent[0]) + o.down(sent[1]), 0.0)
    near, far = o.distances
    change = lower * (far[lower_item] - _log(2 * lower) * q) - upper * (near[upper_item] - _log(2 * upper) * p)
    return o.back(dx, upstream.dtype), torch.where(o.nan, torch.nan, o.sums(weight * change))


def top_k(o: Ordered, k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    if len(o.y) == 0:
        return o.y.reshape(o.shape).to(dtype), k.new_zeros(o.rows, 4)
    row = torch.arange(o.rows, device=k.device)
    held = torch.minimum(torch.maximum(k, o.first.double()), o.end.double())
    above, upper, lower, _, _, upper_item, lower_item = o.threshold(held, row)
    high, low = o.y[upper_item], o.y[lower_item]
    ends = torch.where(above > o.first, high, torch.inf), torch.where(above < o.end, low, -torch.inf)
    over = o.place < above[o.row]
    apart = torch.where(over, o.y - high[o.row], low[o.row] - o.y) / o.alpha
    decay = torch.where(o.finite, -apart, 0.0).exp()
    p = torch.where(over, 1 - upper[o.row] * decay, lower[o.row] * decay)
    p = torch.where(o.finite, p, o.top.double())
    p = torch.where(k.isnan()[o.row], torch.nan, p)
    return o.back(p, dtype), torch.stack([*ends, upper, lower], 1)


def top_k_backward(o: Ordered, k: Tensor, threshold: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    ends, upper, lower = threshold[:, :2], threshold[:, 2], threshold[:, 3]
    g = torch.where(o.finite, upstream.reshape(-1)[o.order].double(), 0.0)
    over = o.finite & (o.y >= ends[o.row, 0])
    under = o.finite & ~over
    distance = torch.where(over, o.y - ends[o.row, 0], ends[o.row, 1] - o.y) / o.alpha
    decay = torch.where(o.finite, (-distance).exp(), 0.0)
    sizes = [o.sums(torch.where(s, decay, 0.0)) for s in (over, under)]
    means = [o.sums(torch.where(s, decay * g, 0.0)) for s in (over, under)]
    gone = upper + lower == 0  # at k = 0, at k = m, or nothing within reach: the ratio of the densities is what is left
    ratio = [torch.where(sizes[1 - i] > 0, (sizes[1 - i] / sizes[i]).sqrt(), 1.0) for i in (0, 1)]
    weights = [torch.where(gone & (sizes[i] > 0), ratio[i], (upper, lower)[i]) for i in (0, 1)]
    total = weights[0] * sizes[0] + weights[1] * sizes[1]
    mean = (weights[0] * means[0] + weights[1] * means[1]) / torch.where(total > 0, total, 1.0)
    density = torch.where(over, upper[o.row], lower[o.row])
    slope = torch.where(o.finite, density * decay * (g - mean[o.row]), 0.0)
    z = torch.where(slope == 0, 0.0, distance - _log(2 * density))
    dalpha = -o.sums(slope * torch.where(under, -z, z) / o.alpha)
    dk = torch.where((k >= o.first) & (k <= o.end), mean, 0.0)
    bad = o.nan | k.isnan()
    dx = o.back(torch.where(bad[o.row], torch.nan, slope / o.alpha), upstream.dtype)
    return dx, torch.where(bad, torch.nan, dk), torch.where(bad, torch.nan, dalpha)
