"""Log-Taylor-softmax: the softmax's exponential replaced by its second-order Taylor polynomial."""

from __future__ import annotations

import torch
from torch import Tensor

from ..row_loss import row_loss
from .centred import Centred, gather_centred, of_quotient


def _taylor(s: Tensor) -> Tensor:
    """1 + s + s²/2 as a sum of positive terms."""
    return ((1 + s).square() + 1) / 2


def centred(hit, mean, squares, count, share) -> Centred:
    """(loss, α, t, γ) as in losses/centred.py. T = n f(μ) + v / 2 is a sum of positive terms."""
    at = hit + mean.unsqueeze(1)
    total = count * _taylor(mean) + squares / 2
    return of_quotient(_taylor(at), 1 + at, total, count * (1 + mean), 0.5, share)


def rank(scores: Tensor) -> Tensor:
    """What classes are ranked by: |1 + s|, for f falls below s = −1."""
    return (1 + scores).abs()


@row_loss
def taylor_softmax_loss(scores, target, share=None):
    """Log-Taylor-softmax loss: L = −log(f(s_y) / Σ_j f(s_j)), f(s) = 1 + s + s²/2.

    Alexandre de Brébisson and Pascal Vincent, "An Exploration of Softmax Alternatives Belonging to the Spherical Loss
    Family", ICLR 2016, arXiv 1511.05042. Second order only. f falls below s = −1: rank classes by |1 + s|, not by s.
    """
    return centred(*gather_centred(scores, target, share))[0]


def reference(logits: Tensor, target: Tensor) -> Tensor:
    """(N,) losses, densely; masked classes are left out."""
    seen = logits != -torch.inf
    f = torch.where(seen, 1 + torch.where(seen, logits, 0.0) + torch.where(seen, logits, 0.0).square() / 2, 0.0)
    return f.sum(1).log() - f.gather(1, target[:, None])[:, 0].log()


CASES = ({},)
