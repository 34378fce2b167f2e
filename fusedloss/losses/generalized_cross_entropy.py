"""Generalized cross-entropy: between cross-entropy (q → 0) and mean absolute error (q = 1), for noisy labels."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_number, expect
from ..numerics import nll
from ..relation import Rest
from ..row_loss import row_loss
from ..statistics import LogSumExp, Score


@row_loss
def generalized_cross_entropy(scores, target, *, q: float | Tensor = 0.7, k: float | None = None):
    """Generalized cross-entropy: L = (1 − p^q) / q, p = softmax(s)_y; with k, truncated: (1 − k^q) / q where p ≤ k.

    Zhilu Zhang and Mert R. Sabuncu, "Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy
    Labels", NeurIPS 2018, arXiv 1805.07836. p is never clamped (common code clamps at 1e-7, which stops the gradient).

        q: in (0, 1].
        k: in (0, 1); a row of p ≤ k has a constant loss and no gradient, as in the paper (0.5 there). Common code
            subtracts the constant instead and prunes by flags of its own: for that, pass the flags as `row_weight`.
    """
    name = "generalized_cross_entropy"
    check_number(name, "q", q, 0, 1, above=True)
    lse, hit = scores.reduce(LogSumExp(where=Rest(target)), Score(target))
    minus_log_p = nll(lse, hit)
    loss = -torch.expm1(-q * minus_log_p) / q
    if k is None:
        return loss
    expect(not isinstance(k, Tensor) and 0 < k < 1, name, "k", "a number in (0, 1) or None", k)
    return torch.where(minus_log_p < -math.log(k), loss, (1 - k**q) / q)


def reference(logits: Tensor, target: Tensor, q=0.7, k=None) -> Tensor:
    """(N,) losses, densely."""
    p = torch.softmax(logits, 1).gather(1, target[:, None])[:, 0]
    loss = (1 - p**q) / q
    return loss if k is None else torch.where(p > k, loss, (1 - k**q) / q)


CASES = ({}, {"q": 1.0}, {"q": 0.7, "k": 0.3})
