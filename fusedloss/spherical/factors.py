"""A weight matrix kept in factors, W = P U + 1 (δ + m̄)ᵀ, and what is done to it whole.

P. Vincent, A. de Brébisson and X. Bouthillier, 2015, arXiv 1412.7091, here centred: P U + 1 δᵀ has columns that sum to
0, m̄ is W's mean row, and Q = (W − 1 m̄ᵀ)ᵀ (W − 1 m̄ᵀ). A step changes few rows of P, and all else has d or d² numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import native_products
from .gram import Gram

BLOCK = 1 << 14  # rows of P at a time
SMALLEST, LARGEST = 1e-6, 8.0  # of ‖U‖ / √d


@dataclass
class Factors:
    """n classes of d features. P's dtype is that of products over examples; the rest is float64, incremented only."""

    p: Tensor  # (n, d) float32 or float64
    u: Tensor  # (d, d)
    inverse: Tensor  # (d, d) U⁻¹
    gram: Tensor  # (d, d) Q
    offset: Tensor  # (d,) δ
    mean: Tensor  # (d,) m̄

    @classmethod
    def of(cls, p: Tensor) -> Factors:
        """Those of W = p, which is taken over, not copied."""
        found, eye = Gram.of(p), torch.eye(p.shape[1], dtype=torch.float64, device=p.device)
        return cls(p, eye, eye.clone(), found.matrix, -found.mean, found.mean)

    def rows(self, index: Tensor) -> Tensor:
        """W[index], (*index.shape, d) of P's dtype."""
        return self.p[index] @ self.u.to(self.p.dtype) + (self.offset + self.mean).to(self.p.dtype)

    def fold(self, u: Tensor) -> None:
        """P ← P u, U ← 1, in one pass over P."""
        multiply(self.p, u)
        for square in (self.u, self.inverse):
            square.zero_().diagonal().fill_(1)

    def refresh(self) -> None:
        """Make δ and Q anew from P, where U is 1: errors of theirs that grew with U. One more pass over P."""
        found = Gram.of(self.p)
        self.mean.add_(self.offset + found.mean)
        self.offset.copy_(-found.mean)
        self.gram.copy_(found.matrix)

    def condition(self) -> Tensor:
        """‖U‖ ‖U⁻¹‖ / d in Frobenius norms: 1 for a multiple of a rotation, never above cond₂(U)."""
        return self.u.norm() * self.inverse.norm() / len(self.u)


def ill(u: Tensor, inverse: Tensor, limit: float) -> bool:
    """Whether the condition is above the limit, or no number, or U far from size 1.

    Decay shrinks U for ever. The Z-loss may let it grow while decay holds W: errors of δ grow as U does, those of Q as
    its square.
    """
    size, other = torch.stack([u.norm(), inverse.norm()]).tolist()
    return not (size * other <= limit * len(u) and SMALLEST <= size / len(u) ** 0.5 <= LARGEST)


def multiply(p: Tensor, k: Tensor) -> None:
    """P ← P K in place, block by block."""
    if native_products.supports(p) and native_products.why_not() is None:
        return native_products.multiply(p, k)
    k = k.to(p.dtype)
    for block in p.split(BLOCK):
        block.copy_(block @ k)


def rebalance(f: Factors) -> None:
    """Move U into P, and make δ and Q anew from it. W stays as it is.

    The error of W is about cond(U) · eps(P): how long this may wait depends on the loss and the learning rate, not on a
    number of steps (the squared error at lr 0.1 reaches a condition of 10⁹ within 50 steps).
    """
    f.fold(f.u)
    f.refresh()
