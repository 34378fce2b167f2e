"""A step of the factored layer in plain PyTorch: the meaning of what the compiled ones do.

visit     features and targets → losses and their derivatives in the centred statistics
backward  upstream gradients of the losses → gradient of the features, and the batch that the step needs
step      batch, learning rate, decay → the factors changed in place, as SGD would have changed W
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from .factors import Factors, ill
from .family import Member

F64 = torch.float64


@dataclass
class Visit:
    """What forward leaves for backward. Derivatives (float64) are of each row's own loss."""

    losses: Tensor  # (m,) float64
    alpha: Tensor  # (m, K)
    t: Tensor  # (m,)
    gamma: Tensor  # (m,)
    h: Tensor  # (m, d), of P's dtype, as all below
    target: Tensor  # (m, K) int64
    hq: Tensor  # (m, d) H Q
    hu: Tensor  # (m, d) H Uᵀ
    picked: Tensor  # (m, d) Σ_k α_k P[c_k]


@dataclass
class Batch:
    """What backward leaves for the step; derivatives times upstream gradients."""

    alpha: Tensor  # (m, K)
    t: Tensor  # (m,)
    gamma: Tensor  # (m,)
    h: Tensor  # (m, d), of P's dtype, as all below
    target: Tensor  # (m, K) int64
    hu: Tensor  # (m, d) H Uᵀ
    yw: Tensor  # (m, d) Σ_k α_k (w_ck − m̄)
    gh: Tensor  # (m, d) 2γ H Q + yw: ∂L/∂H without the mean row's part

    @classmethod
    def of(cls, f: Factors, h: Tensor, target: Tensor, alpha: Tensor, t: Tensor, gamma: Tensor) -> Batch:
        """From what it is made of: a visit's part, done again for features that come from elsewhere."""
        dtype = f.p.dtype
        picked = (alpha.to(dtype).unsqueeze(2) * f.p[target]).sum(1)
        yw = picked @ f.u.to(dtype) + torch.outer(alpha.sum(1), f.offset).to(dtype)
        gh = (2 * gamma).unsqueeze(1).to(dtype) * (h @ f.gram.to(dtype)) + yw
        return cls(alpha, t, gamma, h, target, h @ f.u.t().to(dtype), yw, gh)

    @staticmethod
    def join(batches: list[Batch]) -> Batch:
        """One batch of several, all of the same W; targets are filled up with α = 0."""
        if len(batches) == 1:
            return batches[0]
        most = max(b.target.shape[1] for b in batches)
        wide = [
            {f.name: torch.nn.functional.pad(v, (0, most - v.shape[1])) if f.name in ("alpha", "target") else v
             for f in fields(Batch) for v in [getattr(b, f.name)]}
            for b in batches
        ]  # fmt: skip
        return Batch(**{f.name: torch.cat([w[f.name] for w in wide]) for f in fields(Batch)})

    def scaled(self, factor: float | Tensor) -> Batch:
        """The batch of `factor` times the loss."""
        linear = {name: getattr(self, name) * factor for name in ("alpha", "t", "gamma", "yw", "gh")}
        return Batch(**linear, h=self.h, target=self.target, hu=self.hu)


def visit(f: Factors, h: Tensor, target: Tensor, share: Tensor, loss: Member) -> Visit:
    """h (m, d) of P's dtype; target (m, K) in [0, n); share (m, K) float64, 0 for no target."""
    dtype = f.p.dtype
    hq, hu = h @ f.gram.to(dtype), h @ f.u.t().to(dtype)
    squares = (hq * h).sum(1, dtype=F64).clamp(min=0)
    rows = f.p[target]
    hit = (rows * hu.unsqueeze(1)).sum(2, dtype=F64) + (h.to(F64) @ f.offset).unsqueeze(1)
    losses, alpha, t, gamma = loss.centred(hit, h.to(F64) @ f.mean, squares, f.p.shape[0], share)
    picked = (alpha.to(dtype).unsqueeze(2) * rows).sum(1)
    return Visit(losses, alpha, t, gamma, h, target, hq, hu, picked)


def backward(f: Factors, v: Visit, upstream: Tensor) -> tuple[Tensor, Batch]:
    """upstream (m,) float64 → ∂L/∂H (m, d) and the batch."""
    dtype, column = f.p.dtype, upstream.unsqueeze(1)
    alpha, t, gamma = v.alpha * column, v.t * upstream, v.gamma * upstream
    yw = (v.picked * column.to(dtype)) @ f.u.to(dtype) + torch.outer(alpha.sum(1), f.offset).to(dtype)
    gh = (2 * gamma).unsqueeze(1).to(dtype) * v.hq + yw
    return gh + torch.outer(t, f.mean).to(dtype), Batch(alpha, t, gamma, v.h, v.target, v.hu, yw, gh)


def gradient_gram(f: Factors, b: Batch) -> Tensor:
    """M (m, m): the centred part of ∂L/∂O · ∂L/∂Oᵀ, of scores O that nobody computed."""
    hg = (2 * b.gamma).unsqueeze(1).to(b.h.dtype) * b.h
    half = (b.gh + b.yw) @ hg.t() / 2
    _, at = b.target.unique(return_inverse=True)
    y = b.h.new_zeros(len(b.h), int(at.max()) + 1).scatter_add_(1, at, b.alpha.to(b.h.dtype))
    ones = b.alpha.sum(1).to(b.h.dtype)
    return half + half.t() + y @ y.t() - torch.outer(ones, ones / f.p.shape[0])


def squared_norm(f: Factors, b: Batch) -> Tensor:
    """‖∂L/∂W‖² in Frobenius norm."""
    mean = (b.h.to(F64) * b.t.unsqueeze(1)).sum(0)
    return ((gradient_gram(f, b) @ b.h) * b.h).sum(dtype=F64).clamp(min=0) + mean.square().sum() / f.p.shape[0]


def step(f: Factors, b: Batch, lr: float, decay: float = 0.0, limit: float = math.inf) -> bool:
    """W ← (1 − lr · decay) W − lr ∂L/∂W, exactly. Where that would make U `ill`, U is moved into P instead.

    Returns whether it was: that is a pass over P. To step and to rebalance afterwards costs the same, but makes the
    rows of the targets with the inverse of an ill-conditioned U: their rounding errors, times its condition, stay in W.
    """
    keep = 1 - lr * decay
    way = _small if len(b.h) < b.h.shape[1] else _large
    refused = len(b.h) > 0 and (abs(keep) < SINGULAR or way(f, b, lr, keep, limit))
    if refused:
        fold(f, b, lr, keep)
    return refused


def _vectors(f: Factors, b: Batch, lr: float, keep: float) -> None:
    """δ and m̄, whose changes are sums over examples."""
    h, n = b.h.to(F64), f.p.shape[0]
    along = h @ f.offset
    f.offset.mul_(keep).sub_(lr * (h.t() @ (2 * b.gamma * along - b.alpha.sum(1) / n)))
    f.mean.mul_(keep).sub_(lr / n * (h.t() @ b.t))


def scatter(f: Factors, b: Batch, lr: float, rows: Tensor) -> None:
    """P[c] −= lr Σ α rows, over all examples of class c."""
    moved = b.alpha.to(rows.dtype).unsqueeze(2) * rows.unsqueeze(1)
    f.p.index_add_(0, b.target.reshape(-1), moved.reshape(-1, rows.shape[1]), alpha=-lr)


# A pivot of E = keep − lr S below this share of 1: U E can hardly be inverted, and is moved into P.
SINGULAR = 1e-4


def nearly_singular(lu: Tensor) -> bool:
    """Of E, by its LU factors."""
    return bool(lu.diagonal().abs().min() < SINGULAR)


def _turn(f: Factors, u: Tensor, inverse: Tensor, limit: float) -> bool:
    """Take U and its inverse, unless they are ill; returns whether they are."""
    if ill(u, inverse, limit):
        return True
    f.u.copy_(u)
    f.inverse.copy_(inverse)
    return False


def _small(f: Factors, b: Batch, lr: float, keep: float, limit: float) -> bool:
    """For m < d, all in m × m (Woodbury). Returns whether U E is too close to singular; then nothing has changed."""
    dtype = b.h.dtype
    two = (2 * b.gamma).to(dtype)
    hg = two.unsqueeze(1) * b.h
    e = keep * torch.eye(len(b.h), dtype=dtype, device=b.h.device) - lr * (b.h @ b.h.t()) * two
    lu, pivots, _ = torch.linalg.lu_factor_ex(e)
    if nearly_singular(lu):
        return True
    n = torch.linalg.lu_solve(lu, pivots, b.h @ f.inverse.to(dtype))  # H (U E)⁻¹
    if _turn(f, keep * f.u - lr * (b.hu.t() @ hg), (f.inverse + lr * (hg.t() @ n)) / keep, limit):
        return True
    change = b.h.t() @ (lr * keep * b.gh - lr * lr / 2 * (gradient_gram(f, b) @ b.h))
    _vectors(f, b, lr, keep)
    f.gram.mul_(keep * keep).sub_(change).sub_(change.t())
    scatter(f, b, lr, n)
    return False


def sparse_gram(f: Factors, b: Batch) -> Tensor:
    """Bᵀ B (d, d) of B = (Yᵀ − 1 ȳᵀ / n) H, the part of ∂L/∂W that has few rows, centred."""
    dtype = b.h.dtype
    classes, at = b.target.unique(return_inverse=True)
    moved = b.alpha.to(dtype).unsqueeze(2) * b.h.unsqueeze(1)
    j = torch.zeros(len(classes), b.h.shape[1], dtype=dtype, device=b.h.device)
    j.index_add_(0, at.reshape(-1), moved.reshape(-1, b.h.shape[1]))
    ones = b.h.t() @ b.alpha.sum(1).to(dtype)
    return j.t() @ j - torch.outer(ones, ones / f.p.shape[0])


def gradient_square(f: Factors, b: Batch) -> Tensor:
    """Gᵀ G (d, d) of the centred G = ∂L/∂W, of P's type."""
    if len(b.h) < b.h.shape[1]:
        square = b.h.t() @ (gradient_gram(f, b) @ b.h)
    else:
        s = b.h.t() @ ((2 * b.gamma).unsqueeze(1).to(b.h.dtype) * b.h)
        square = s @ ((b.gh + b.yw).t() @ b.h) + sparse_gram(f, b)
    return (square + square.t()) / 2


def _gram_change(f: Factors, b: Batch, lr: float, keep: float) -> tuple[Tensor, Tensor]:
    """S = 2 Hᵀ Γ H and Z with Q ← keep² Q − Z − Zᵀ, all in d × d."""
    hg = (2 * b.gamma).unsqueeze(1).to(b.h.dtype) * b.h
    s = hg.t() @ b.h
    across = b.gh.t() @ b.h
    z = lr * keep * across - lr * lr / 2 * (s @ ((b.gh + b.yw).t() @ b.h) + sparse_gram(f, b))
    return s, z


def _large(f: Factors, b: Batch, lr: float, keep: float, limit: float) -> bool:
    """For m ≥ d, all in d × d. Returns whether U E is too close to singular; then nothing has changed."""
    s, z = (t.to(F64) for t in _gram_change(f, b, lr, keep))
    e = keep * torch.eye(len(s), dtype=F64, device=s.device) - lr * s
    lu, pivots, _ = torch.linalg.lu_factor_ex(e)
    if nearly_singular(lu):
        return True
    inverse = (f.inverse + lr * (s @ torch.linalg.lu_solve(lu, pivots, f.inverse))) / keep
    if _turn(f, keep * f.u - lr * (f.u @ s), inverse, limit):
        return True
    _vectors(f, b, lr, keep)
    f.gram.mul_(keep * keep).sub_(z).sub_(z.t())
    scatter(f, b, lr, b.h @ f.inverse.to(b.h.dtype))
    return False


def fold(f: Factors, b: Batch, lr: float, keep: float) -> None:
    """The same where U E has no inverse worth having: P ← P U E, U ← I. One pass over P."""
    s, z = (t.to(F64) for t in _gram_change(f, b, lr, keep))
    _vectors(f, b, lr, keep)
    u = keep * f.u - lr * f.u @ s
    f.fold(u)
    f.gram.mul_(keep * keep).sub_(z).sub_(z.t())
    scatter(f, b, lr, b.h)
    if u.norm() > len(u) ** 0.5:
        f.refresh()
