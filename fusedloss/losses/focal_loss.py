"""Focal loss on the softmax: cross-entropy that fades out on rows that are already right."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number, expect
from ..numerics import nll, softplus
from ..relation import Rest
from ..row_loss import row_loss
from ..statistics import LogSumExp, Score


def focal(lse_rest: Tensor, hit: Tensor, gamma: float | Tensor, detach_weight: bool = False) -> Tensor:
    """(1 − p)^γ · (−log p). 1 − p = sigmoid(lse_rest − hit), so its power has no 0/0 in its slope for γ < 1."""
    loss = nll(lse_rest, hit)
    if not isinstance(gamma, Tensor) and gamma == 0:
        return loss
    weight = torch.exp(-gamma * softplus(hit - lse_rest))
    return (weight.detach() if detach_weight else weight) * loss


def balance(name: str, alpha: float | Tensor, target: Tensor, columns: int, dtype: torch.dtype) -> float | Tensor:
    """α of each row's class: a number is the same for all."""
    if isinstance(alpha, Tensor) and alpha.dim() == 1:
        expect(alpha.shape == (columns,), name, "alpha", f"a number or a tensor of shape ({columns},)", alpha)
        return alpha[target].to(dtype)
    check_number(name, "alpha", alpha, 0)
    return alpha


@row_loss
def focal_loss(
    scores, target, *, gamma: float | Tensor = 2.0, alpha: float | Tensor | None = None, detach_weight: bool = False
):
    """Focal loss: L = −α_y (1 − p)^γ log p, p = softmax(s)_y.

    Tsung-Yi Lin, Priya Goyal, Ross Girshick, Kaiming He and Piotr Dollár, "Focal Loss for Dense Object Detection",
    ICCV 2017, arXiv 1708.02002. The paper's detector uses the sigmoid form: see `sigmoid_focal_loss`.

        gamma: γ ≥ 0; 0 is cross-entropy.
        alpha: α, a number or one per class (V,). Unlike `weight` it does not enter a mean's divisor. None means 1.
        detach_weight: take the factor (1 − p)^γ as a constant, as the code of Ma et al. (2020, arXiv 2006.13554) does:
            the same value, another gradient. False is the paper's loss.
    """
    check_number("focal_loss", "gamma", gamma, 0)
    lse, hit = scores.reduce(LogSumExp(where=Rest(target)), Score(target))
    loss = focal(lse, hit, gamma, detach_weight)
    return loss if alpha is None else balance("focal_loss", alpha, target, scores.columns, loss.dtype) * loss


def reference(logits: Tensor, target: Tensor, gamma=2.0, alpha=None, detach_weight=False) -> Tensor:
    """(N,) losses, densely."""
    log_p = torch.log_softmax(logits, 1).gather(1, target[:, None])[:, 0]
    weight = (1 - log_p.exp()) ** gamma
    weight = weight.detach() if detach_weight else weight
    alpha = 1.0 if alpha is None else alpha[target] if isinstance(alpha, Tensor) else alpha
    return -alpha * weight * log_p


CASES = (
    {},
    {"gamma": 0.5, "alpha": 0.25},
    {"gamma": 1.0, "alpha": lambda columns: torch.linspace(0.2, 1.5, columns)},
    {"detach_weight": True},
)
