"""PolyLoss on the focal loss."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number
from ..numerics import softplus
from ..relation import Rest
from ..row_loss import row_loss
from ..statistics import LogSumExp, Score
from .focal_loss import balance, focal
from .focal_loss import reference as focal_reference


@row_loss
def poly_focal_loss(
    scores,
    target,
    *,
    epsilon: float | Tensor = 1.0,
    gamma: float | Tensor = 2.0,
    alpha: float | Tensor | None = None,
):
    """Poly-1 focal loss: L = −α_y (1 − p)^γ log p + ε (1 − p)^{γ+1}, p = softmax(s)_y.

    Zhaoqi Leng, Mingxing Tan, Chenxi Liu, Ekin Dogus Cubuk, Xiaojie Shi, Shuyang Cheng and Dragomir Anguelov,
    "PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions", ICLR 2022, arXiv 2204.12511.

        epsilon: ε, which the paper tunes per task. α multiplies the focal term only, as in the paper's listing.
        gamma, alpha: as in `focal_loss`.
    """
    name = "poly_focal_loss"
    check_number(name, "epsilon", epsilon)
    check_number(name, "gamma", gamma, 0)
    lse, hit = scores.reduce(LogSumExp(where=Rest(target)), Score(target))
    loss = focal(lse, hit, gamma)
    if alpha is not None:
        loss = balance(name, alpha, target, scores.columns, loss.dtype) * loss
    return loss + epsilon * torch.exp(-(gamma + 1) * softplus(hit - lse))


def reference(logits: Tensor, target: Tensor, epsilon=1.0, gamma=2.0, alpha=None) -> Tensor:
    """(N,) losses, densely."""
    away = 1 - torch.softmax(logits, 1).gather(1, target[:, None])[:, 0]
    return focal_reference(logits, target, gamma, alpha) + epsilon * away ** (gamma + 1)


CASES = ({}, {"epsilon": -1.0, "gamma": 0.5, "alpha": 0.25})
