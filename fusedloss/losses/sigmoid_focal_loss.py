"""Focal loss on one sigmoid per class, the detector's form."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number, expect
from ..numerics import softplus
from ..relation import Rest
from ..row_loss import row_loss
from ..statistics import Score, SumOf


@row_loss
def sigmoid_focal_loss(scores, target, *, gamma: float = 2.0, alpha: float | None = 0.25):
    """Sigmoid focal loss: L = −α (1 − σ(s_y))^γ log σ(s_y) − (1 − α) Σ_{j≠y} σ(s_j)^γ log(1 − σ(s_j)).

    Tsung-Yi Lin, Priya Goyal, Ross Girshick, Kaiming He and Piotr Dollár, "Focal Loss for Dense Object Detection",
    ICCV 2017, arXiv 1708.02002. Summed over the classes, so a mean over rows is the paper's: a sum over the number of
    positives. (torchvision's mean divides by V once more.)

        gamma: γ ≥ 0, a number. alpha: α in [0, 1]; None leaves out both balancing factors.
    """
    name = "sigmoid_focal_loss"
    expect(not isinstance(gamma, Tensor), name, "gamma", "a number", gamma, TypeError)
    check_number(name, "gamma", gamma, 0)
    if alpha is not None:
        check_number(name, "alpha", alpha, 0, 1)
    hit, others = scores.reduce(Score(target), SumOf("focal", parameter=float(gamma), where=Rest(target)))
    own = torch.exp(-gamma * softplus(hit)) * softplus(-hit)  # σ(−s)^γ = exp(−γ softplus(s)): no 0/0 anywhere
    return own + others if alpha is None else alpha * own + (1 - alpha) * others


def reference(logits: Tensor, target: Tensor, gamma=2.0, alpha=0.25) -> Tensor:
    """(N,) losses, densely."""
    positive = torch.nn.functional.one_hot(target, logits.shape[1]).bool()
    log_p = torch.nn.functional.logsigmoid(torch.where(positive, logits, -logits))
    terms = -((1 - log_p.exp()) ** gamma) * log_p
    share = positive.to(terms.dtype)
    return (terms if alpha is None else (alpha * share + (1 - alpha) * (1 - share)) * terms).sum(1)


CASES = ({}, {"gamma": 0.0, "alpha": None}, {"gamma": 1.5, "alpha": 0.6})
