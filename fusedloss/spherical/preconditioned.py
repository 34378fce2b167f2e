"""Steps whose gradient is multiplied by a d × d matrix, on a weight in factors, exactly and at a cost free of n.

    W ← (1 − lr · decay) W − lr G R

G is ∂L/∂W (n, d), which nobody has; but GᵀG is known, and with it what depends on it alone:

    Muon                     R = (GᵀG)^(−1/2): G R has G's singular vectors, and 1 for its singular values.
    Shampoo, on one side     R = (ε I + Σ_t G_tᵀ G_t)^(−1/2)

Keller Jordan et al., "Muon: An optimizer for hidden layers in neural networks", 2024 (there by Newton–Schulz, here by
eigenvectors, and without momentum). Vineet Gupta, Tomer Koren and Yoram Singer, "Shampoo: Preconditioned Stochastic
Tensor Optimization", ICML 2018, arXiv 1802.09568: its exponents are −1/4 on both sides of a matrix; with the side of d
features alone, as the side of n classes cannot be kept, −1/2.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .factors import Factors
from .steps import F64, Batch, gradient_square, nearly_singular, scatter


def inverse_root(square: Tensor, eps: float = 0.0) -> Tensor:
    """(square + eps I)^(−1/2) in float64, square (d, d) with eigenvalues ≥ 0; 0 along those that are rounding."""
    sizes, vectors = torch.linalg.eigh(square.to(F64))
    sizes = sizes + eps
    seen = sizes > sizes.max() * len(sizes) * torch.finfo(square.dtype).eps
    return (vectors * torch.where(seen, sizes, torch.inf).rsqrt()) @ vectors.t()


class Muon:
    """R = (GᵀG)^(−1/2) of each step's own G.

    0 along what G lacks: fewer rows than d leave such directions, and a singular value below √(d · eps) of the largest,
    eps of P's type, cannot be told from none.
    """

    def __call__(self, square: Tensor) -> Tensor:
        return inverse_root(square)


class Shampoo:
    """R = (ε I + Σ GᵀG)^(−1/2) over all steps so far."""

    def __init__(self, eps: float = 1e-4):
        self.eps, self.sum = eps, None

    def __call__(self, square: Tensor) -> Tensor:
        self.sum = square.to(F64) + (0 if self.sum is None else self.sum)
        return inverse_root(self.sum, self.eps)


def step(f: Factors, b: Batch, lr: float, decay: float, right: Tensor | Callable[[Tensor], Tensor]) -> None:
    """W ← (1 − lr · decay) W − lr G R. No rows, no step.

    right: R (d, d) float64, or what makes it of GᵀG (d, d) of P's type: a `Muon`, a `Shampoo`, any function.
    """
    if not len(b.h):
        return
    dtype, wide, n, keep = b.h.dtype, b.h.to(F64), f.p.shape[0], 1 - lr * decay
    square, mean = gradient_square(f, b), wide.t() @ b.t / n
    r = right if isinstance(right, Tensor) else right(square + torch.outer(mean, mean * n).to(dtype))
    r = lr * r.to(F64)
    hg = (2 * b.gamma).unsqueeze(1) * wide
    e = hg.t() @ wide @ r
    change = keep * (b.gh.t() @ b.h).to(F64) @ r - r.t() @ square.to(F64) @ r / 2
    along = hg.t() @ (wide @ f.offset) - wide.t() @ b.alpha.sum(1) / n
    f.gram.mul_(keep * keep).sub_(change).sub_(change.t())
    f.offset.mul_(keep).sub_(along @ r)
    f.mean.mul_(keep).sub_(mean @ r)
    lu, pivots, _ = torch.linalg.lu_factor_ex(keep * torch.eye(len(e), dtype=F64, device=e.device) - e)
    f.u.copy_(keep * f.u - f.u @ e)
    if nearly_singular(lu):
        f.fold(f.u.clone())
    else:
        f.inverse.add_(e @ torch.linalg.lu_solve(lu, pivots, f.inverse)).div_(keep)
    scatter(f, b, 1.0, b.h @ (r @ f.inverse).to(dtype))
