"""The relaxed NDCG in plain PyTorch, on any device: all lists at once, P kept where it is small, else by rows.

The way of csrc/sinkhorn.cpp, whose formulas stand there and in csrc/sinkhorn.h, but for the band: rows of P are whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..lists import Lists

KEPT = 1 << 24  # entries of P; above, rows of it are computed whenever they are needed
AT_ONCE = 1 << 22  # entries that are computed together


def padded(lists: Lists, *values: Tensor) -> tuple[list[Tensor], Tensor, tuple[Tensor, Tensor] | None]:
    """Flat values as (rows, longest), which of those count, and where the items stand (None: as they do)."""
    if lists.offsets is None:
        keep = torch.ones_like(values[0], dtype=torch.bool) if lists.mask is None else lists.mask
        return list(values), keep, None
    lengths = lists.offsets.diff()
    longest = int(lengths.max()) if lists.rows else 0
    keep = torch.arange(longest, device=lengths.device) < lengths.unsqueeze(1)
    items = keep.nonzero(as_tuple=True)
    if lists.mask is not None:
        keep[items] = lists.mask
    return [v.new_zeros(lists.rows, longest).index_put(items, v) for v in values], keep, items


class Relaxed:
    """P of each list: (rows, width) scores falling, of which `count` (rows, 1) are there."""

    def __init__(self, scores: Tensor, count: Tensor, tau: float):
        self.dtype, self.tau = scores.dtype, tau
        rows, width = scores.shape
        place = torch.arange(width, device=scores.device)
        self.place, self.here = place, place < count
        t = scores.double()
        self.t = torch.where(self.here, t, t.gather(1, (count - 1).clamp(min=0)))
        steps = (self.t[:, :-1] - self.t[:, 1:]) * (2 * place[:-1] + 1)
        w = torch.cat([t.new_zeros(rows, 1), steps.cumsum(1)], 1)
        self.w = torch.where(self.here, w, torch.inf)
        self.at_once = max(1, AT_ONCE // max(1, rows * width))
        self.kept = list(self._parts()) if rows * width * width <= KEPT else None

    def _parts(self):
        for first in range(0, len(self.place), self.at_once):
            i = self.place[first : first + self.at_once]
            here = self.here[:, i].unsqueeze(2)
            below = self.w[:, i, None] - self.w[:, None] + 2 * i[:, None] * (self.t[:, i, None] - self.t[:, None])
            below = torch.where(here, below / self.tau, 0.0).clamp(max=0).to(self.dtype)
            below = torch.where(self.here.unsqueeze(1), below, -torch.inf)
            yield i, torch.where(here, below.softmax(2), 0.0)

    def parts(self):
        return self.kept or self._parts()

    def times(self, x: Tensor) -> Tensor:
        return torch.cat([(p @ x.unsqueeze(2)).squeeze(2) for _, p in self.parts()], 1)

    def transposed_times(self, x: Tensor) -> Tensor:
        return sum((x[:, None, i] @ p).squeeze(1).double() for i, p in self.parts())

    def gradient(self, left: list[Tensor], right: list[Tensor]) -> Tensor:
        """∂/∂scores, falling, of Σ_ij P_ij (Σ left_i right_j), left and right being constants."""
        new = torch.cat([self.here[:, :1], self.t[:, 1:] != self.t[:, :-1]], 1) | ~self.here  # where other scores begin
        first = torch.where(new, self.place, 0).cummax(1).values
        final = torch.cat([new[:, 1:], torch.ones_like(new[:, :1])], 1)
        last = torch.where(final, self.place, len(self.place)).flip(1).cummin(1).values.flip(1)
        middle = (first + last).to(self.dtype) / 2
        sums, moments = torch.zeros_like(self.t), torch.zeros_like(self.t)
        left, right = torch.stack(left, 2), torch.stack(right, 1)
        for i, p in self.parts():
            g = left[:, i] @ right
            d = p * (g - (p * g).sum(2, keepdim=True))
            sums += d.sum(1)
            moments += (d * (middle.unsqueeze(1) - i.unsqueeze(1))).sum(1)
        to = torch.nn.functional.pad(sums.cumsum(1), (1, 0))
        after = to[:, -1:] - to.gather(1, last + 1)
        return (2 * moments + to.gather(1, first) - after) / self.tau


def relaxed_ndcg(
    scores, gains, mask, offsets, tau, k, max_iterations, tolerance, gradient
) -> tuple[Tensor, Tensor, Tensor]:
    """What the op `neural_ndcg` returns, of flat scores and gains."""
    lists = Lists(scores.shape, scores.dim() - 1, mask, offsets)
    (s, g), keep, items = padded(lists, scores, gains)
    count = keep.sum(1, keepdim=True)
    width = s.shape[1]
    if s.numel() == 0:
        zero = scores.new_zeros(lists.rows)
        return zero, zero.clone(), torch.zeros_like(scores) if gradient else scores.new_zeros(0)
    order = torch.where(keep, s, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    g = torch.where(keep, g, -torch.inf)
    best = g.sort(1, descending=True).values
    place = torch.arange(width, device=s.device)
    discount = torch.where(place < (k or width), 1 / (place.double() + 2).log2(), 0.0).to(s.dtype)
    p = Relaxed(s.gather(1, order), count, tau)
    ideal = (torch.where(p.here, best, 0.0) * discount).sum(1)
    g = torch.where(p.here, g.gather(1, order), 0.0)

    u = v = p.here.to(s.dtype)
    us, vs, live = [u], [], [torch.ones_like(count, dtype=torch.bool)]  # live: the lists that take the next step
    sums = p.transposed_times(u) if max_iterations else None
    for _ in range(max_iterations):
        v = torch.where(live[-1], torch.where(p.here, 1 / sums, 0.0).to(s.dtype), v)
        u = torch.where(live[-1], torch.where(p.here, 1 / p.times(v), 0.0), u)
        sums = p.transposed_times(u)
        if gradient:
            us.append(u), vs.append(v)
        off = torch.where(p.here, (v * sums - 1).abs(), 0.0).amax(1, keepdim=True)
        live.append(live[-1] & ~(off < tolerance))
        if s.device.type == "cpu" and not live[-1].any():  # elsewhere it would wait for the device
            break

    a = p.times(v * g)
    scale = torch.where(ideal <= 0, 0.0, 1 / ideal)  # of a NaN, NaN
    ndcg = torch.where(ideal <= 0, 0.0, (discount * u * a).sum(1) * scale)
    if not gradient:
        return ndcg, ideal, scores.new_zeros(0)
    left, right = [discount * u], [v * g]
    du, dv = discount * a, g * p.transposed_times(discount * u)
    for u, before, v, taken in zip(us[:0:-1], us[-2::-1], vs[::-1], live[len(vs) - 1 :: -1]):
        w = torch.where(taken, -du * u * u, 0.0)
        dv = dv + p.transposed_times(w)
        z = torch.where(taken, -dv * v * v, 0.0).to(s.dtype)
        left += [w, before]
        right += [v, z]
        du, dv = torch.where(taken, p.times(z), du), torch.where(taken, 0.0, dv)
    ds = torch.where(p.here, p.gradient(left, right) * scale.unsqueeze(1), 0.0).to(s.dtype)
    wide = torch.zeros_like(s).scatter(1, order, ds)
    return ndcg, ideal, wide if items is None else wide[items]
