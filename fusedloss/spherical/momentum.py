"""SGD with momentum on a weight in factors, exactly and at a cost free of the number of classes.

The weight and its velocity are one matrix of twice the width, X = [W, V] = P U + 1 (δ + m̄)ᵀ. Features get d zeros
appended: its scores are those of W, and `visit` and `backward` of steps.py serve it unchanged: the gradient of X
that they leave in the batch is [G, 0]. With G + decay W = W A + B, A = S + decay I, a step of torch.optim.SGD is

    V ← momentum V + (W A + B)
    W ← W − β V,  β = lr               or, with nesterov,  W ← W − lr (W A + B) − β V,  β = lr · momentum

X is multiplied by E = E₁ E₂, E₁ = [[I, A], [0, momentum I]], E₂ = [[I − ν A, 0], [−β I, I]], ν = lr with nesterov or 0:
the inverse of E₁ needs no solving, and E₂ is a plain step.

det E₁ = momentum^d: the rows of U that carry V shrink as momentum^t, and P's columns to them grow. That in itself
costs no digit (P U has the same relative error at any scale of U's rows), but unless those rows are the ones that a
step without gradients only scales, (lr · momentum / (1 − momentum) I, I), they come to lie along the others.
`rebalance` starts there, and `condition` tells when it is due: at momentum 0.9 every 60 steps or so.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ..checks import expect
from .factors import Factors, multiply
from .steps import F64, Batch, gradient_square, nearly_singular, scatter

# `rebalance` is due above this condition. Few passes are saved by a higher one, the condition grows as momentum^-t.
LIMIT = 1.5
# And where U's rows differ by more in length: what float64 rounds in the long ones shows in the short ones times that.
APART = {torch.float32: 2.0**24, torch.float64: 2.0**8}


def step(f: Factors, b: Batch, lr: float, decay: float, momentum: float, nesterov: bool = False) -> None:
    """One step of torch.optim.SGD(lr, momentum, weight_decay=decay, nesterov=nesterov) from zero velocity.

    f: the factors of [W, V], V = 0 at first; b: its batch, features (m, 2d) with zeros in the last d columns. No rows,
    no step.
    """
    expect(0 < momentum < 1, "momentum.step", "momentum", "a number in (0, 1)", momentum)
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

    cross = (b.gh.t() @ h).to(F64)  # Xᵀ G
    square = gradient_square(f, replace(b, h=h, yw=b.yw[:, :d], gh=b.gh[:, :d])).to(F64)
    half = along(f.gram, cross)  # Xᵀ X after the step on the right, then on the left
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
    scatter(f, b, -1.0, h @ (bottom - (nu + beta) * top).to(dtype))


def _undo_plain(top: Tensor, h: Tensor, hg: Tensor, s: Tensor | None, lr: float, keep: float) -> bool:
    """top ← (keep I − lr S)⁻¹ top. Returns whether that was too close to singular; then nothing has changed."""
    few = s is None
    e = (h @ hg.t()).to(F64) if few else s
    eye = torch.eye(len(e), dtype=F64, device=e.device)
    lu, pivots, _ = torch.linalg.lu_factor_ex(keep * eye - lr * e)
    if nearly_singular(lu):
        return True
    if few:
        change = hg.t() @ torch.linalg.lu_solve(lu, pivots, (h @ top.to(h.dtype)).to(F64)).to(h.dtype)
    else:
        change = s @ torch.linalg.lu_solve(lu, pivots, top)
    top.add_(lr * change).div_(keep)
    return False


def condition(f: Factors, lr: float, momentum: float) -> Tensor:
    """By how much more than after a rebalance P's rounding grows on the way to W and V, about; ∞ past APART.

    The root mean square of ‖u_i‖ ‖u⁻¹_i‖ over U's rows and U⁻¹'s columns: as `Factors.condition`, but whatever the
    scale of U's rows. Columns are in units in which V moves W by all of it, and not of V itself, which may be 0 for a
    while, when U⁻¹ goes on growing and waits for the next gradient.
    """
    d, reach = f.p.shape[1] // 2, lr * momentum / (1 - momentum)
    unit = torch.ones(2 * d, dtype=F64, device=f.u.device)
    unit[d:] = 1 / reach if reach else 1.0
    grown = (f.u / unit).norm(dim=1) * (f.inverse * unit.unsqueeze(1)).norm(dim=0)
    length = f.u.norm(dim=1)
    far = length.max() > APART[f.p.dtype] * length.min()
    return torch.where(far, torch.inf, (grown.square().mean() / 2).sqrt())


def rebalance(f: Factors, lr: float, momentum: float) -> None:
    """Move into P all of U but the shear that separates what decays from what stays. One pass over P."""
    d = f.p.shape[1] // 2
    shear = torch.eye(2 * d, dtype=F64, device=f.u.device)
    shear[d:, :d].diagonal().fill_(lr * momentum / (1 - momentum))
    back = 2 * torch.eye(2 * d, dtype=F64, device=f.u.device) - shear
    multiply(f.p, f.u @ back)
    f.u.copy_(shear)
    f.inverse.copy_(back)
