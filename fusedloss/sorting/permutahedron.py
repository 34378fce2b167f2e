"""Soft sort and soft rank in plain PyTorch: the blocks, what they give, and its derivative.

Mathieu Blondel, Olivier Teboul, Quentin Berthet and Josip Djolonga, "Fast Differentiable Sorting and Ranking", ICML
2020, arXiv 2002.08871. csrc/permutahedron.h has the formulas. `partition` finds the blocks, once; everything else is
O(n) tensor code on them in fp64, which autograd differentiates as often as one likes: the blocks do not change near x.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

POSITION = 0x7FFFFFFF  # bits of an entry of `order`; the one above them says that a block starts
F64 = torch.float64
TINY = 1e-300  # strengths below it, by which ordinary numbers divided overflow, give the hard answer


@dataclass(frozen=True, eq=False)
class Projection:
    """Which projection of which rows. Rows lie as `Lists` has them flat, and mask and offsets are its."""

    sort: bool  # or rank
    kl: bool
    descending: bool
    strength: float | Tensor  # one number, or (rows,) float64
    mask: Tensor | None = None
    offsets: Tensor | None = None

    @property
    def sign(self) -> int:
        """s is made of sign · x, in falling order."""
        return 1 if self.sort == self.descending else -1


def _rows(p: Projection, shape: torch.Size, device: torch.device) -> tuple[Tensor, Tensor, int]:
    """Of each item its row and where that begins, and how many rows there are."""
    if p.offsets is not None:
        row = torch.repeat_interleave(p.offsets.diff(), output_size=shape[0])
        return row, p.offsets[row], len(p.offsets) - 1
    row = torch.arange(shape.numel(), device=device) // max(1, shape[1])
    return row, row * shape[1], shape[0]


class Blocks:
    """Items in the order of the blocks, all rows one after the other: s, w, and sums over blocks."""

    def __init__(self, p: Projection, x: Tensor, order: Tensor):
        place = torch.arange(order.numel(), device=x.device)
        self.row, begin, self.rows = _rows(p, order.shape, x.device)
        order = order.reshape(-1)
        self.at = begin + (order & POSITION)
        self.first = torch.where(order < 0, place, 0).cummax(0).values if len(place) else place
        self.counts = torch.ones_like(place, dtype=torch.bool) if p.mask is None else p.mask.reshape(-1)[self.at]
        items = self.of_rows(self.counts.to(F64))
        w = torch.where(self.counts, items[self.row] - (place - begin), 0.0)

        e = torch.as_tensor(p.strength, dtype=F64, device=x.device)
        e = e.masked_fill((e > 0) & (e < TINY), 0.0)
        e = e[self.row] if e.dim() else e.expand(len(place))
        given = x.reshape(-1).to(F64)[self.at]
        self.ends = self.counts & given.isinf()  # where the sort returns what is given
        self.given = given.detach()
        v = torch.where(self.counts & ~self.ends, given, 0.0)
        wrong = (v.isnan() | ~(e >= 0)) & self.counts
        self.wrong = (self.of_rows(wrong.to(F64))[self.row] > 0) & self.counts
        self.soft = self.counts & ~self.ends & (e > 0)  # what the strength has a say in
        self.e = torch.where(e > 0, e, 1.0)
        if p.sort:
            self.s, self.w = p.sign * v, torch.where(self.soft, w / self.e, 0.0)
        else:
            self.s, self.w = torch.where(self.soft, p.sign * v / self.e, 0.0), w

    def of_rows(self, values: Tensor) -> Tensor:
        return values.new_zeros(self.rows).index_add(0, self.row, values)

    def sum(self, values: Tensor) -> Tensor:
        """Over each block, at each of its items."""
        return torch.zeros_like(values).index_add(0, self.first, values)[self.first]

    def mean(self, values: Tensor) -> Tensor:
        return self.sum(values) / self.sum(torch.ones_like(values))

    def softmax(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """And logsumexp, of what falls within a block."""
        top = values[self.first].detach()
        e = (values - top).exp()
        total = self.sum(e)
        return e / total, total.log() + top

    def placed(self, values: Tensor, shape: torch.Size) -> Tensor:
        """Values of the items where these lie in x."""
        return torch.zeros_like(values).index_copy(0, self.at, values).reshape(shape)


def project(p: Projection, x: Tensor, order: Tensor) -> Tensor:
    """The soft ranks (float32, or float64 of float64) or the soft sort (in the type of x), the blocks being known."""
    b = Blocks(p, x, order)
    if not p.sort:
        y = b.softmax(b.s)[0] * b.sum(b.w) if p.kl else b.mean(b.w) + (b.s - b.mean(b.s))
        y = torch.where(b.counts, y.masked_fill(b.wrong, torch.nan), 0.0)
        return b.placed(y, x.shape).to(ranks_dtype(x.dtype))
    if p.kl:
        y = (b.w - b.softmax(b.w)[1]) + b.softmax(b.s)[1]
    else:
        y = (b.w - b.mean(b.w)) + b.mean(b.s)
    y = torch.where(b.ends, b.given, p.sign * y).masked_fill(b.wrong, torch.nan)
    return torch.where(b.counts, y, 0.0).reshape(x.shape).to(x.dtype)


def project_backward(p: Projection, x: Tensor, order: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    """The derivative in x and in the strength of each row, float64, given that in what `project` returned."""
    b = Blocks(p, x, order)
    g = grad.reshape(-1).to(F64)
    g = torch.where(b.counts, g if p.sort else g[b.at], 0.0)
    if p.sort:
        share = b.softmax(b.s)[0] * b.sum(g) if p.kl else b.mean(g)
        across = g - (b.softmax(b.w)[0] * b.sum(g) if p.kl else b.mean(g))
        by_strength = -p.sign * across * b.w / b.e
    else:
        if p.kl:
            softmax, _ = b.softmax(b.s)
            h = g * softmax * b.sum(b.w)
            across = h - softmax * b.sum(h)
        else:
            across = g - b.mean(g)
        share = torch.where(b.soft, p.sign * across / b.e, 0.0)
        by_strength = -across * b.s / b.e
    by_strength = torch.where(b.soft, by_strength, 0.0).masked_fill(b.wrong, torch.nan)
    dx = torch.where(b.counts, share.masked_fill(b.wrong, torch.nan), 0.0)
    return b.placed(dx, x.shape).to(x.dtype), b.of_rows(by_strength)


def ranks_dtype(dtype: torch.dtype) -> torch.dtype:
    """float16 ends at 65504 and counts to 2048."""
    return F64 if dtype == F64 else torch.float32


# --- which blocks ---------------------------------------------------------------------------------------------------


def partition(p: Projection, x: Tensor) -> Tensor:
    """The order in which the blocks have the items, int32, bit 31 where one starts: pooling of adjacent violators."""
    row, begin, rows = _rows(p, x.shape, x.device)
    key = p.sign * x.detach().reshape(-1).to(F64)
    at = key.argsort(descending=True, stable=True)
    counts = torch.ones_like(key, dtype=torch.bool) if p.mask is None else p.mask.reshape(-1)
    at = at[(~counts[at]).to(torch.int8).argsort(stable=True)]
    at = at[row[at].argsort(stable=True)]  # rows; in them what counts; in that by value
    strengths = p.strength.tolist() if isinstance(p.strength, Tensor) else [p.strength] * rows
    lengths = p.offsets.diff().tolist() if p.offsets is not None else [x.shape[1]] * rows
    values, counting = key[at].tolist(), counts[at].tolist()
    starts, done = [], 0
    for e, length in zip(strengths, lengths):
        m = sum(counting[done : done + length])
        starts += _starts(p, values[done : done + m], e) + [True] * (length - m)
        done += length
    order = (at - begin).to(torch.int32)
    flags = torch.tensor(starts, dtype=torch.bool, device=x.device)
    return torch.where(flags, order | -POSITION - 1, order).reshape(x.shape)


def _starts(p: Projection, values: list[float], e: float) -> list[bool]:
    """Of one row's falling values that count: which of them start a block."""
    m = len(values)
    if any(v != v for v in values) or not e >= 0:
        return [True] * m
    if e < TINY:
        return [p.sort or k == 0 or values[k] != values[k - 1] for k in range(m)]
    starts = [True] * m
    finite = [k for k, v in enumerate(values) if abs(v) != torch.inf]
    low, high = (finite[0], finite[-1] + 1) if finite else (m, m)
    for k in [*range(1, low), *range(high + 1, m)]:
        starts[k] = p.sort or values[k] != values[k - 1]
    s = torch.tensor(values[low:high], dtype=F64, device="cpu")  # whatever the default device
    w = torch.arange(m - low, m - high, -1, dtype=F64, device="cpu")
    first, second = (w / e, s) if p.sort else (s / e, w.log() if p.kl else w)  # the value of a block is falling in
    stack: list[tuple] = []  # (start, sums)
    for k, (a, b) in enumerate(zip(first.tolist(), second.tolist())):
        block = (k, a, b) if p.kl else (k, a - b, 1.0)
        while stack and _value(p, stack[-1]) <= _value(p, block):
            block = _pooled(p, stack.pop(), block)
        stack.append(block)
    kept = {block[0] for block in stack}
    starts[low:high] = [k in kept for k in range(high - low)]
    return starts


def _value(p: Projection, block: tuple) -> float:
    return block[1] - block[2] if p.kl else block[1] / block[2]


def _pooled(p: Projection, a: tuple, b: tuple) -> tuple:
    if not p.kl:
        return a[0], a[1] + b[1], a[2] + b[2]
    return a[0], _logaddexp(a[1], b[1]), _logaddexp(a[2], b[2])


def _logaddexp(a: float, b: float) -> float:
    high, low = (a, b) if a > b else (b, a)
    return high + math.log1p(math.exp(low - high))


# --- the definition -------------------------------------------------------------------------------------------------


def reference(x: Tensor, e: float | Tensor, *, sort: bool, kl: bool, descending: bool = False) -> Tensor:
    """Soft sort or rank of one list (n,), e > 0, densely: falling regression as min over starts of max over ends.

    Differentiable in x and e; memory n³ for kl.
    """
    n, sign = len(x), 1 if sort == descending else -1
    falling, at = (sign * x).sort(descending=True)
    w = torch.arange(n, 0, -1, dtype=x.dtype, device=x.device)
    above, below = (w / e, falling) if sort else (falling / e, w.log() if kl else w)
    i = torch.arange(n, device=x.device)
    start, end = i[:, None, None], i[:, None]
    inside = ((start <= i) & (i <= end)) | (start > end)  # (start, end, item); nobody looks where start > end
    if kl:
        value = torch.where(inside, above, -torch.inf).logsumexp(2) - torch.where(inside, below, -torch.inf).logsumexp(
            2
        )
    else:
        value = (inside * (above - below)).sum(2) / inside.sum(2)
    y = above - torch.stack([value[: k + 1, k:].max(1).values.min() for k in range(n)])
    if sort:
        return sign * y
    return torch.empty_like(y).index_copy(0, at, y.exp() if kl else y)
