"""All scores of a factored layer, in blocks of classes: the one thing whose cost grows with the number of classes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .factors import BLOCK, Factors

NUMBERS = 1 << 22  # of a block of scores


def logits(f: Factors, h: Tensor) -> Tensor:
    """(m, n) scores of features (m, w) of P's dtype."""
    hu, shift = _in_p(f, h)
    return torch.addmm(shift.unsqueeze(1), hu, f.p.t())


def topk(f: Factors, h: Tensor, k: int, rank: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Scores and classes (m, k) of the k classes that rank highest, best first."""
    hu, shift = _in_p(f, h)
    best = hu.new_zeros(len(h), 0)
    classes = torch.zeros(len(h), 0, dtype=torch.int64, device=h.device)
    start = 0
    for block in f.p.split(max(k, NUMBERS // max(1, len(h)))):
        best = torch.cat([best, torch.addmm(shift.unsqueeze(1), hu, block.t())], 1)
        number = torch.arange(start, start + len(block), device=h.device).expand(len(h), -1)
        classes = torch.cat([classes, number], 1)
        chosen = rank(best).topk(k, 1).indices
        best, classes, start = best.gather(1, chosen), classes.gather(1, chosen), start + len(block)
    return best, classes


def _in_p(f: Factors, h: Tensor) -> tuple[Tensor, Tensor]:
    """(m, w) H Uᵀ and (m,) H (δ + m̄): o = P (U h) + h · (δ + m̄)."""
    wide = h.double()
    return (wide @ f.u.t()).to(f.p.dtype), (wide @ (f.offset + f.mean)).to(f.p.dtype)


def materialize(f: Factors, weight: Tensor, bias: Tensor | None, bias_scale: float) -> None:
    """Write W (n, d) and the biases (n,), block by block."""
    d, start = weight.shape[1], 0
    width = d + (bias is not None)
    u, shift = f.u[:, :width].to(f.p.dtype), (f.offset + f.mean)[:width].to(f.p.dtype)
    for block in f.p.split(BLOCK):
        rows, stop = torch.addmm(shift, block, u), start + len(block)
        weight[start:stop] = rows[:, :d]
        if bias is not None:
            bias[start:stop] = rows[:, d] * bias_scale
        start = stop
