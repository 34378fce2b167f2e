"""Log-spherical-softmax: the softmax's exponential replaced by a square."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number
from ..relation import Rest
from ..row_loss import row_loss
from ..statistics import Count, Score, SumOfSquares


@row_loss
def spherical_softmax_loss(scores, target, *, eps: float | Tensor = 0.01):
    """Log-spherical-softmax loss: L = −log((s_y² + ε) / Σ_j (s_j² + ε)).

    Alexandre de Brébisson and Pascal Vincent, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss
    Family", ICLR 2016, arXiv 1511.05042; the form goes back to Pascal Vincent, Alexandre de Brébisson and Xavier
    Bouthillier, "Efficient Exact Gradient Update for training Deep Networks with Very Large Sparse Targets", NeurIPS
    2015, arXiv 1412.7091. The sign of a score is lost: rank classes by |s|. Zero scores have a zero gradient: do not
    start from a zero weight.

        eps: ε > 0, to be tuned (no official default); |∂L/∂s_y| ≤ 1/√ε.
    """
    check_number("spherical_softmax_loss", "eps", eps, 0, above=True)
    others = Rest(target)
    squares, count, hit = scores.reduce(SumOfSquares(where=others), Count(where=others), Score(target))
    return torch.log1p((squares + count * eps) / (hit.square() + eps))


def reference(logits: Tensor, target: Tensor, eps=0.01) -> Tensor:
    """(N,) losses, densely; masked classes are left out."""
    seen = logits != -torch.inf
    f = torch.where(seen, torch.where(seen, logits, 0.0).square() + eps, 0.0)
    return f.sum(1).log() - f.gather(1, target[:, None])[:, 0].log()


CASES = ({}, {"eps": 1.0})
