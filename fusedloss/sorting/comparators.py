"""Sorting networks as lists of comparators, and the plain PyTorch meaning of sending numbers through them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Network:
    """Comparator t puts the smaller of what wires low[t] and high[t] hold on low[t]. Layers share no wire."""

    wires: int
    low: Tensor  # (comparators,) int32, CPU
    high: Tensor
    first: Tensor  # (layers + 1,) int64, CPU: the first comparator of each layer

    @property
    def comparators(self) -> int:
        return len(self.low)

    @property
    def layers(self) -> int:
        return len(self.first) - 1

    def steps(self, device: torch.device, transposed: bool = False) -> list[tuple[slice, Tensor, Tensor]]:
        """(comparators, low, high) of each layer in turn, indices on the device."""
        low, high, first = self.low.to(device).long(), self.high.to(device).long(), self.first.tolist()
        layers = [slice(a, b) for a, b in zip(first, first[1:])]
        return [(s, low[s], high[s]) for s in (reversed(layers) if transposed else layers)]


def odd_even(n: int) -> list[list[tuple[int, int]]]:
    """Neighbours, in n layers that begin at wire 0 and wire 1 by turns."""
    return [[(i, i + 1) for i in range(layer % 2, n - 1, 2)] for layer in range(n)]


def bitonic(n: int) -> list[list[tuple[int, int]]]:
    """k (k + 1) / 2 layers for 2^(k−1) < n ≤ 2^k; the first 2^k − n wires of the network of 2^k are left out."""
    blocks = (n - 1).bit_length()
    without, layers = (1 << blocks) - n, []
    for block in range(blocks):
        for m in (1 << b for b in range(block, -1, -1)):
            layer = []
            for a in range(without, 1 << blocks):
                if not a & m:
                    pair = (a - without, a + m - without)
                    layer.append(pair[::-1] if (a >> (block + 1)) & 1 else pair)
            layers.append(layer)
    return layers


KINDS: dict[str, Callable] = {"odd_even": odd_even, "bitonic": bitonic}


@lru_cache(maxsize=64)
def layers_of(kind: str, n: int) -> tuple[tuple[tuple[int, int], ...], ...]:
    return tuple(tuple(layer) for layer in KINDS[kind](n))


def count(kind: str, n: int) -> int:
    """Of comparators; no tensor is made, which may be one without data here and must not be kept."""
    return sum(map(len, layers_of(kind, n)))


@lru_cache(maxsize=64)
def network(kind: str, n: int, descending: bool) -> Network:
    layers = layers_of(kind, n)
    pairs = [pair[::-1] if descending else pair for layer in layers for pair in layer]
    first = [0, *accumulate(map(len, layers))]
    pairs = torch.tensor(pairs, dtype=torch.int32, device="cpu").reshape(-1, 2)
    return Network(n, *(w.contiguous() for w in pairs.unbind(1)), torch.tensor(first, dtype=torch.int64, device="cpu"))


# --- the share 1 − F(v) that a comparator exchanges, and the density F'(v) -------------------------------------------


def _optimal(v: Tensor) -> tuple[Tensor, Tensor]:
    tail = 0.0625 / v.abs().clamp(min=0.25)
    near = v.abs() <= 0.25
    return torch.where(near, 0.5 - v, torch.where(v > 0, tail, 1 - tail)), torch.where(near, 1.0, 16 * tail * tail)


def _logistic(v: Tensor) -> tuple[Tensor, Tensor]:
    rest = torch.sigmoid(-v)
    return rest, rest * torch.sigmoid(v)


DISTRIBUTIONS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {  # in the order of csrc/networks.h
    "cauchy": lambda v: (0.5 - torch.atan(v) / math.pi, 1 / (math.pi * (1 + v * v))),
    "logistic": _logistic,
    "logistic_phi": _logistic,
    "gaussian": lambda v: (torch.special.ndtr(-v), torch.exp(-0.5 * v * v) / math.sqrt(2 * math.pi)),
    "reciprocal": lambda v: (0.5 - 0.5 * v / (2 + v.abs()), (2 + v.abs()) ** -2.0),
    "optimal": _optimal,
}


@dataclass(frozen=True)
class Comparator:
    distribution: str
    art_lambda: float

    def _curve(self, gaps: Tensor, steepness: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
        most = torch.finfo(gaps.dtype).max
        return DISTRIBUTIONS[self.distribution]((steepness * u).to(gaps.dtype).clamp(-most, most))

    def share(self, gaps: Tensor, steepness: Tensor) -> Tensor:
        """1 − F(steepness · gap): 0 of a gap of +inf, 1 of −inf."""
        d = torch.where(gaps.isinf(), 0.0, gaps)
        u = d * (d.abs() + 1e-10) ** (-self.art_lambda) if self.distribution == "logistic_phi" else d
        rest = self._curve(gaps, steepness, u)[0]
        return torch.where(gaps.isinf(), (gaps < 0).to(rest.dtype), rest)

    def slopes(self, gaps: Tensor, steepness: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives of F(steepness · gap) in the gap and in the steepness."""
        d = torch.where(gaps.isinf(), 0.0, gaps)
        u, du = d, torch.ones_like(d)
        if self.distribution == "logistic_phi":
            size = d.abs() + 1e-10
            du = size ** (-self.art_lambda)
            u, du = d * du, du * (1 - self.art_lambda * d.abs() / size)
        density = torch.where(gaps.isinf(), 0.0, self._curve(gaps, steepness, u)[1])
        return (density * steepness * du).to(gaps.dtype), (density * u).to(gaps.dtype)


# --- the plain meaning -----------------------------------------------------------------------------------------------


def _mixed(x: Tensor, low: Tensor, high: Tensor, amount: Tensor) -> Tensor:
    """x with the amount added to the low wires and taken from the high ones, along dimension 1."""
    return x.index_add(1, torch.cat([low, high]), torch.cat([amount, -amount], 1))


def sort(x: Tensor, steepness: Tensor, active: Tensor | None, net: Network, comparator: Comparator):
    """(rows, wires) → the same sorted, and the gaps (rows, comparators). Differentiable."""
    all_gaps = [x.new_empty(len(x), 0)]
    for layer, (_, low, high) in enumerate(net.steps(x.device)):
        a, b = x.index_select(1, low), x.index_select(1, high)
        gaps = torch.where((a == b) & a.isinf(), 0.0, b - a)
        if active is not None:
            gaps = torch.where((layer < active).unsqueeze(1), gaps, torch.inf)
        all_gaps.append(gaps)
        amount = comparator.share(gaps, steepness) * torch.where(gaps.isinf(), 0.0, gaps)
        swap = gaps == -torch.inf
        pair = torch.cat([torch.where(swap, b, a + amount), torch.where(swap, a, b - amount)], 1)
        x = x.index_copy(1, torch.cat([low, high]), pair)
    return x, torch.cat(all_gaps, 1)


def sort_backward(
    gaps: Tensor, steepness: Tensor, dsorted: Tensor, dgaps: Tensor, net: Network, comparator: Comparator
) -> tuple[Tensor, Tensor]:
    """∂L/∂x (rows, wires) and ∂L/∂steepness (rows,) float64."""
    share = comparator.share(gaps, steepness)
    slope, by_steepness = comparator.slopes(gaps, steepness)
    d = torch.where(gaps.isinf(), 0.0, gaps)
    g, total = dsorted, torch.zeros(len(gaps), dtype=torch.float64, device=gaps.device)
    for s, low, high in net.steps(gaps.device, transposed=True):
        apart = g.index_select(1, low) - g.index_select(1, high)
        by_gap = apart * (share[:, s] - slope[:, s] * d[:, s]) + torch.where(gaps[:, s].isinf(), 0.0, dgaps[:, s])
        total = total - (apart.double() * d[:, s] * by_steepness[:, s]).sum(1)
        swap = gaps[:, s] == -torch.inf
        g = _mixed(g, low, high, torch.where(gaps[:, s].isinf(), torch.where(swap, -apart, 0.0), -by_gap))
    return g, total


def push(gaps: Tensor, steepness: Tensor, v: Tensor, transposed: bool, net: Network, comparator: Comparator) -> Tensor:
    """v (rows, wires, channels) through the comparators. Differentiable."""
    share = comparator.share(gaps, steepness).unsqueeze(2)
    for s, low, high in net.steps(gaps.device, transposed):
        v = _mixed(v, low, high, share[:, s] * (v.index_select(1, high) - v.index_select(1, low)))
    return v


def push_backward(
    gaps: Tensor, steepness: Tensor, v: Tensor, transposed: bool, dout: Tensor, net: Network, comparator: Comparator
) -> tuple[Tensor, Tensor, Tensor]:
    """∂L/∂gaps, ∂L/∂steepness (rows,) float64, ∂L/∂v. Channels in groups: what one leaves for its way back is small."""
    share = comparator.share(gaps, steepness).unsqueeze(2)
    steps = net.steps(gaps.device, transposed)
    per_channel = max(1, len(gaps) * net.comparators * gaps.element_size())
    dshare, dv = torch.zeros_like(gaps, dtype=torch.float64), []
    for part, g in zip(*(t.split(max(1, (64 << 20) // per_channel), 2) for t in (v, dout))):
        differences = []
        for s, low, high in steps:
            differences.append(part.index_select(1, high) - part.index_select(1, low))
            part = _mixed(part, low, high, share[:, s] * differences[-1])
        for s, low, high in reversed(steps):
            apart = g.index_select(1, low) - g.index_select(1, high)
            dshare[:, s] += (apart * differences.pop()).sum(2)
            g = _mixed(g, low, high, -share[:, s] * apart)
        dv.append(g)
    slope, by_steepness = comparator.slopes(gaps, steepness)
    total = -(dshare * by_steepness).sum(1)
    return (-dshare * slope).to(gaps.dtype), total, torch.cat(dv, 2) if dv else v
