"""PolyLoss: cross-entropy with the first terms of its Taylor series in 1 − p re-weighted."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number, expect
from ..numerics import log_partition, nll
from ..relation import Rest
from ..row_loss import row_loss
from ..statistics import Count, LogSumExp, Score, Sum


@row_loss
def poly_loss(scores, target, *, epsilon: float | Tensor | tuple = 2.0, label_smoothing: float = 0.0):
    """PolyLoss: L = −Σ_j y_j log p_j + Σ_k ε_k (1 − Σ_j y_j p_j)^k, k = 1 … len(ε).

    Zhaoqi Leng, Mingxing Tan, Chenxi Liu, Ekin Dogus Cubuk, Xiaojie Shi, Shuyang Cheng and Dragomir Anguelov,
    "PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions", ICLR 2022, arXiv 2204.12511.

        epsilon: ε₁ (Poly-1), or a tuple ε₁, ε₂, … (Poly-N). The paper's ε₁ is 2 on ImageNet, −1 in detection.
        label_smoothing: α in [0, 1]; y is then (1 − α) one-hot + α / V, in both terms.
    """
    name = "poly_loss"
    epsilons = epsilon if isinstance(epsilon, (tuple, list)) else (epsilon,)
    for value in epsilons:
        check_number(name, "epsilon", value)
    expect(not isinstance(label_smoothing, Tensor), name, "label_smoothing", "a number", label_smoothing, TypeError)
    check_number(name, "label_smoothing", label_smoothing, 0, 1)
    asked = [LogSumExp(where=Rest(target)), Score(target)]
    lse, hit, *smooth = scores.reduce(*asked, Sum(), Count()) if label_smoothing else scores.reduce(*asked)
    loss = nll(lse, hit)
    away = -torch.expm1(-loss)  # 1 − p, exact however close p is to 1
    if label_smoothing:
        total, seen = smooth
        spread = log_partition(lse, hit) - total / scores.columns
        spread = torch.where(seen < scores.columns, torch.inf, spread)  # a share of the target on an impossible class
        loss = (1 - label_smoothing) * loss + label_smoothing * spread
        away = (1 - label_smoothing) * away + label_smoothing * (1 - 1 / scores.columns)
    for power, value in enumerate(epsilons, 1):
        loss = loss + value * away**power
    return loss


def reference(logits: Tensor, target: Tensor, epsilon=2.0, label_smoothing=0.0) -> Tensor:
    """(N,) losses, densely."""
    classes = logits.shape[1]
    one_hot = torch.nn.functional.one_hot(target, classes).to(logits.dtype)
    y = (1 - label_smoothing) * one_hot + label_smoothing / classes
    log_p = torch.log_softmax(logits, 1)
    away = 1 - (y * log_p.exp()).sum(1)
    epsilons = epsilon if isinstance(epsilon, tuple) else (epsilon,)
    loss = -torch.where(y == 0, 0.0, y * log_p).sum(1)
    return loss + sum(value * away**power for power, value in enumerate(epsilons, 1))


CASES = ({}, {"epsilon": (1.0, 0.5, -0.3)}, {"epsilon": -1.0, "label_smoothing": 0.1})
