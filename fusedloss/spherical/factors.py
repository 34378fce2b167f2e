"""A weight matrix kept in factors, W = P U + 1 (δ + m̄)ᵀ, and what is done to it whole.

P. Vincent, A. de Brébisson and X. Bouthillier, 2015, arXiv 1412.7091, here centred: P U + 1 δᵀ has columns that sum to 0,
m̄ is W's mean row, and Q = (W − 1 m̄ᵀ)ᵀ (W − 1 m̄ᵀ). A step changes few rows of P, and all else has d or d² numbers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 1 << 14  # rows of P at a time
SMALLEST = 1e-6  # of ‖U‖ / √d; the largest is 1 / that


@dataclass
class Factors:
    """n classes of d features. P's dtype is that of products over examples; the rest is float64, changed by increments."""

    p: Tensor  # (n, d) float32 or float64
    u: Tensor  # (d, d)
    inverse: Tensor  # (d, d) U⁻¹
    gram: Tensor  # (d, d) Q
    offset: Tensor  # (d,) δ
    mean: Tensor  # (d,) m̄

    @classmethod
    def of(cls, p: Tensor) -> Factors:
        """Those of W = p, which is taken over, not copied."""
        d, device = p.shape[1], p.device
        eye = torch.eye(d, dtype=torch.float64, device=device)
        mean = sum((block.sum(0, dtype=torch.float64) for block in p.split(BLOCK)), eye.new_zeros(d)) / p.shape[0]
        return cls(p, eye, eye.clone(), gram_of(p, mean), -mean, mean)

    def rows(self, index: Tensor) -> Tensor:
        """W[index], (*index.shape, d) of P's dtype."""
        return self.p[index] @ self.u.to(self.p.dtype) + (self.offset + self.mean).to(self.p.dtype)

    def condition(self) -> Tensor:
        """‖U‖ ‖U⁻¹‖ / d in Frobenius norms: 1 for a multiple of a rotation, never above cond₂(U)."""
        return self.u.norm() * self.inverse.norm() / len(self.u)


def ill(u: Tensor, inverse: Tensor, limit: float) -> bool:
    """Whether the condition is above the limit, or no number, or U as a whole far from size 1: decay shrinks it for ever."""
    size, other = torch.stack([u.norm(), inverse.norm()]).tolist()
    return not (size * other <= limit * len(u) and SMALLEST <= size / len(u) ** 0.5 <= 1 / SMALLEST)


def gram_of(w: Tensor, mean: Tensor) -> Tensor:
    """(W − 1 m̄ᵀ)ᵀ (W − 1 m̄ᵀ) in float64, block by block: W is read once, its copy never whole."""
    gram = mean.new_zeros(w.shape[1], w.shape[1], dtype=torch.float64)
    for block in w.split(BLOCK):
        away = block.to(torch.promote_types(w.dtype, torch.float32)) - mean.to(torch.promote_types(w.dtype, torch.float32))
        gram += away.t() @ away
    return gram


def multiply(p: Tensor, k: Tensor) -> None:
    """P ← P K in place, block by block."""
    from . import native_steps  # it is made of the factors

    if native_steps.supports(p) and native_steps.why_not() is None:
        return native_steps.multiply(p, k)
    k = k.to(p.dtype)
    for block in p.split(BLOCK):
        block.copy_(block @ k)


def rebalance(f: Factors) -> None:
    """Move from U to P what makes U ill-conditioned: singular values outside [½, 2]. W does not change; one pass over P.

    The error of W is about cond(U) · eps(P), so how long this may wait depends on the loss and the learning rate, not on
    a number of steps (mean squared error at lr 0.1 reaches a condition of 10⁹ within 50 steps).
    """
    left, sizes, right = torch.linalg.svd(f.u)
    out = (sizes < 0.5) | (sizes > 2)
    if out.sum() > len(sizes) // 3:
        multiply(f.p, f.u)
        f.u.copy_(torch.eye(len(sizes)))
        f.inverse.copy_(f.u)
        return
    moved, by = left[:, out], sizes[out]
    multiply(f.p, torch.eye(len(sizes), dtype=f.u.dtype, device=f.u.device) + (moved * (by - 1)) @ moved.t())
    kept = torch.where(out, 1.0, sizes)
    f.u.copy_((left * kept) @ right)
    f.inverse.copy_((right.t() / kept) @ left.t())
