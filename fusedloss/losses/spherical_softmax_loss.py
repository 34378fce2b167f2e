"""Log-spherical-softmax: the softmax's exponential replaced by a square."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number
from ..row_loss import row_loss
from .centred import Centred, gather_centred, of_quotient


def centred(hit, mean, squares, count, share, *, eps=0.01) -> Centred:
    """(loss, α, t, γ) as in losses/centred.py. T = v + n (μ² + ε)."""
    at = hit + mean.unsqueeze(1)
    total = squares + count * (mean.square() + eps)
    return of_quotient(at.square() + eps, 2 * at, total, 2 * count * mean, 1.0, share)


def rank(scores: Tensor) -> Tensor:
    """What classes are ranked by: |s|."""
    return scores.abs()


@row_loss
def spherical_softmax_loss(scores, target, share=None, *, eps: float | Tensor = 0.01):
    """Log-spherical-softmax loss: L = −log((s_y² + ε) / Σ_j (s_j² + ε)).

    Alexandre de Brébisson and Pascal Vincent, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss
    Family", ICLR 2016, arXiv 1511.05042; the form goes back to Pascal Vincent, Alexandre de Brébisson and Xavier
    Bouthillier, "Efficient Exact Gradient Update for training Deep Networks with Very Large Sparse Targets", NeurIPS
    2015, arXiv 1412.7091. The sign of a score is lost: rank classes by |s|. Zero scores have a zero gradient: do not
    start from a zero weight.

        eps: ε > 0, to be tuned (no official default); |∂L/∂s_y| ≤ 1/√ε.
    """
    check_number("spherical_softmax_loss", "eps", eps, 0, above=True)
    return centred(*gather_centred(scores, target, share), eps=eps)[0]


def reference(logits: Tensor, target: Tensor, eps=0.01) -> Tensor:
    """(N,) losses, densely; masked classes are left out."""
    seen = logits != -torch.inf
    f = torch.where(seen, torch.where(seen, logits, 0.0).square() + eps, 0.0)
    return f.sum(1).log() - f.gather(1, target[:, None])[:, 0].log()


CASES = ({}, {"eps": 1.0})
