"""SGD with momentum on a weight in factors, exactly and at a cost free of the number of classes.

The weight and its velocity are one matrix of twice the width, X = [W, V] = P U + 1 (δ + m̄)ᵀ. Features get d zeros appended,
so that its scores are those of W, and `visit` and `backward` of steps.py serve it unchanged: the gradient of X that they
leave in the batch is [G, 0]. With G + decay W = W A + B, A = S + decay I, a step as torch.optim.SGD makes it is

    V ← momentum V + (W A + B)
    W ← W − β V,  β = lr               or, with nesterov,  W ← W − lr (W A + B) − β V,  β = lr · momentum

X is multiplied by E = E₁ E₂, E₁ = [[I, A], [0, momentum I]], E₂ = [[I − ν A, 0], [−β I, I]], ν = lr with nesterov, else 0:
the inverse of E₁ needs no solving, and E₂ is a plain step.

det E₁ = momentum^d: the rows of U that carry V shrink as momentum^t, and P's columns to them grow. That in itself costs
no digit (P U has the same relative error at any scale of U's rows), but unless the shrinking rows are those that a step
without gradients only scales, (lr · momentum / (1 − momentum) I, I), they come to lie along the others. `rebalance` starts
there, and `condition` tells when.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number
from .factors import Factors, multiply
from .steps import F64, SINGULAR, Batch, gradient_gram, sparse_gram

# Rows of U this far apart in length are levelled: float32 has room for 10³⁸, and P for what classes add to it.
APART = 2.0**60


def double(f: Factors) -> Factors:
    """[W, 0] for W of n × d: a new P, n × 2d. `rows` of it has W in the first d columns and V in the others."""
    d = f.p.shape[1]
    pad = torch.nn.functional.pad
    u, inverse = pad(f.u, (0, d, 0, d)), pad(f.inverse, (0, d, 0, d))
    for square in (u, inverse):
        square.diagonal()[d:] = 1
    return Factors(pad(f.p, (0, d)), u, inverse, pad(f.gram, (0, d, 0, d)), pad(f.offset, (0, d)), pad(f.mean, (0, d)))


def step(f: Factors, b: Batch, lr: float, decay: float, momentum: float, nesterov: bool = False) -> None:
    """One step of torch.optim.SGD(lr, momentum, weight_decay=decay, nesterov=nesterov) from zero velocity.

    f: of doubled width; b: its batch, features (m, 2d) with zeros in the last d columns. No rows, no step.
    """
    check_number("momentum.step", "momentum", momentum, 0, 1, above=True)
    if not len(b.h):
        return
    d = f.p.shape[1] // 2
    nu, beta = (lr, lr * momentum) if nesterov else (0.0, lr)
    h = b.h[:, :d]
    dtype, few = h.dtype, len(h) < d
    hg = (2 * b.gamma).unsqueeze(1).to(dtype) * h
    s = None if few else (hg.t() @ h).to(F64)

    def along(x: Tensor, g: Tensor) -> Tensor:
        """[x_W, x_V] → itself after the step, where G is g in x's coordinates."""
        w, v = x[..., :d], x[..., d:]
        g = g + decay * w
        v = momentum * v + g
        return torch.cat([w - nu * g - beta * v, v], -1)

    cross, square = (t.to(F64) for t in _grams(f, b, h, hg, few))
    # Xᵀ and G's products with [W, V, G]: from the left as from the right.
    half = along(f.gram, cross)
    f.gram.copy_(along(half.t(), along(cross.t(), square).t()))

    wide = h.to(F64)
    ones, within = b.alpha.sum(1) / f.p.shape[0], wide @ f.offset[:d]
    f.offset.copy_(along(f.offset, wide.t() @ (2 * b.gamma * within - ones)))
    f.mean.copy_(along(f.mean, wide.t() @ b.t / f.p.shape[0]))

    f.u.copy_(along(f.u, (b.hu.t() @ hg).to(F64) if few else f.u[:, :d] @ s))
    top, bottom = f.inverse[:d], f.inverse[d:]
    slope = (hg.t() @ (h @ bottom.to(dtype))).to(F64) if few else s @ bottom
    top.sub_((slope + decay * bottom) / momentum)
    bottom.div_(momentum)
    if nesterov and _undo_plain(top, h, hg, s, lr, 1 - lr * decay):
        rebalance(f, lr, momentum)
    else:
        bottom.add_(beta * top)
    rows = h @ (bottom - (nu + beta) * top).to(dtype)
    moved = b.alpha.to(dtype).unsqueeze(2) * rows.unsqueeze(1)
    f.p.index_add_(0, b.target.reshape(-1), moved.reshape(-1, 2 * d))


def _grams(f: Factors, b: Batch, h: Tensor, hg: Tensor, few: bool) -> tuple[Tensor, Tensor]:
    """Xᵀ G (2d, d) and Gᵀ G (d, d), centred."""
    cross = b.gh.t() @ h
    d = h.shape[1]
    one = Batch(b.alpha, b.t, b.gamma, h, b.target, b.hu, b.yw[:, :d], b.gh[:, :d])
    if few:
        return cross, h.t() @ (gradient_gram(f, one) @ h)
    half = (hg.t() @ h) @ ((one.gh + one.yw).t() @ h) / 2
    return cross, half + half.t() + sparse_gram(f, one)


def _undo_plain(top: Tensor, h: Tensor, hg: Tensor, s: Tensor | None, lr: float, keep: float) -> bool:
    """top ← (keep I − lr S)⁻¹ top. Returns whether that was too close to singular; then nothing has changed."""
    few = s is None
    e = (h @ hg.t()).to(F64) if few else s
    eye = torch.eye(len(e), dtype=F64, device=e.device)
    lu, pivots = torch.linalg.lu_factor(keep * eye - lr * e)
    if lu.diagonal().abs().min() < SINGULAR:
        return True
    if few:
        change = hg.t() @ torch.linalg.lu_solve(lu, pivots, (h @ top.to(h.dtype)).to(F64)).to(h.dtype)
    else:
        change = s @ torch.linalg.lu_solve(lu, pivots, top)
    top.add_(lr * change).div_(keep)
    return False


def condition(f: Factors) -> Tensor:
    """What the error of W and V is in units of P's rounding; ∞ where U's rows have become too unequal in length.

    The mean over i of ‖u_i‖ ‖u⁻¹_i‖, of U's rows and U⁻¹'s columns: ‖U‖ ‖U⁻¹‖ / 2d in Frobenius norms where U's rows are
    scaled for the least, with V in units in which it is as large as W.
    """
    d = f.p.shape[1] // 2
    size = f.gram.diagonal().reshape(2, d).sum(1).sqrt().repeat_interleave(d)
    row = (f.u / size).norm(dim=1)
    length = f.u.norm(dim=1)
    apart = length.max() / length.min()
    return torch.where(apart > APART, torch.inf, (row * (f.inverse * size.unsqueeze(1)).norm(dim=0)).mean())


def rebalance(f: Factors, lr: float, momentum: float) -> None:
    """Move into P all of U but the shear that separates what decays from what stays. One pass over P."""
    d = f.p.shape[1] // 2
    shear = torch.eye(2 * d, dtype=F64, device=f.u.device)
    shear[d:, :d].diagonal().fill_(lr * momentum / (1 - momentum))
    back = 2 * torch.eye(2 * d, dtype=F64, device=f.u.device) - shear
    multiply(f.p, f.u @ back)
    f.u.copy_(shear)
    f.inverse.copy_(back)
