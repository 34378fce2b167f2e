"""The spherical family's Z-loss: a logistic loss on the target's standard score. Not PaLM's log-partition penalty."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number, expect
from ..numerics import softplus
from ..row_loss import row_loss
from .centred import Centred, gather_centred


def centred(hit, mean, squares, count, share, *, a=1.0, b=0.0, eps=1e-6) -> Centred:
    """(loss, α, t, γ) as in losses/centred.py; t ≡ 0, for a shift of all scores changes nothing."""
    variance = squares / count
    varied = variance > eps * eps
    # Chosen before the root and the quotient: behind them, the NaN of a constant row would reach the gradient.
    deviation = torch.where(varied, variance, 1.0).sqrt().unsqueeze(1)
    zeta = torch.where(varied.unsqueeze(1), hit, 0.0) / deviation
    slope = -share * torch.sigmoid(a * (b - zeta))
    alpha = torch.where(varied.unsqueeze(1), slope / deviation, 0.0)
    gamma = -(slope * zeta).sum(1) / (2 * torch.where(varied, squares, 1.0))
    return Centred((share * softplus(a * (b - zeta))).sum(1) / a, alpha, torch.zeros_like(gamma), gamma)


def rank(scores: Tensor) -> Tensor:
    """What classes are ranked by: the scores."""
    return scores


@row_loss
def spherical_z_loss(
    scores, target, share=None, *, a: float | Tensor = 1.0, b: float | Tensor = 0.0, eps: float | Tensor = 1e-6
):
    """Spherical Z-loss: L = (1/a) softplus(a (b − ζ)), ζ = (s_y − μ) / σ, μ and σ the scores' mean and deviation.

    Alexandre de Brébisson and Pascal Vincent, "The Z-loss: a shift and scale invariant classification loss belonging to
    the Spherical Family", 2016, arXiv 1604.08859. Statistics are centred (Chan's rule), so nothing cancels where
    |μ| ≫ σ. Needs V ≥ 2. |ζ| ≤ √(V − 1): tune a and b again when V changes. It is no likelihood, and not the "z-loss"
    of PaLM (arXiv 2204.02311), λ lse(s)², which is added to a cross-entropy: that one is the argument ``z_loss`` of
    `fusedloss.cross_entropy`.

        a: sharpness > 0. b: location.
        eps: a row with σ ≤ eps counts as constant: ζ = 0 and its gradient is 0. (The authors' code divides by
            σ + 1e-12, which makes rounding errors of a constant row into a gradient of 1e12.)
    """
    name = "spherical_z_loss"
    expect(scores.columns >= 2, name, "scores", "at least two classes", scores.columns)
    check_number(name, "a", a, 0, above=True)
    check_number(name, "b", b)
    check_number(name, "eps", eps, 0)
    return centred(*gather_centred(scores, target, share), a=a, b=b, eps=eps)[0]


def reference(logits: Tensor, target: Tensor, a=1.0, b=0.0, eps=1e-6) -> Tensor:
    """(N,) losses, densely; rows that are not constant. Masked classes are left out of mean and deviation."""
    seen = logits != -torch.inf
    known = torch.where(seen, logits, 0.0)
    mean = known.sum(1, keepdim=True) / seen.sum(1, keepdim=True)
    variance = torch.where(seen, known - mean, 0.0).square().sum(1) / seen.sum(1)
    zeta = (logits.gather(1, target[:, None]) - mean)[:, 0] / variance.sqrt()
    return softplus(a * (b - zeta)) / a


CASES = ({}, {"a": 2.0, "b": 1.5})
