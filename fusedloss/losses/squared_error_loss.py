"""Squared error between the scores and a scaled one-hot target."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number
from ..row_loss import row_loss
from .centred import Centred, gather_centred


def centred(
    hit, mean, squares, count, share, *, value=1.0, k=1.0, mean_over_classes=True, columns=None
) -> Centred:
    """(loss, α, t, γ) as in losses/centred.py; 1 / V of `columns` scores, masked ones among them (None: of `count`)."""
    at, there = hit + mean.unsqueeze(1), share > 0
    over = ((count if columns is None else columns) if mean_over_classes else 1.0) * torch.ones_like(mean)
    per_row = share.sum(1) / there.sum(1).clamp(min=1) / over  # targets of several weights share the other classes' term
    share = share / over.unsqueeze(1)
    loss = (share * (k * (at - value).square() - at.square())).sum(1) + per_row * (squares + count * mean.square())
    alpha = 2 * share * (k * (at - value) - at)
    return Centred(loss, alpha, alpha.sum(1) + 2 * count * mean * per_row, per_row)


def rank(scores: Tensor) -> Tensor:
    """What classes are ranked by: the scores."""
    return scores


@row_loss
def squared_error_loss(
    scores,
    target,
    share=None,
    *,
    value: float | Tensor = 1.0,
    k: float | Tensor = 1.0,
    mean_over_classes: bool = True,
):
    """Squared error: L = (1 / V) [k (s_y − M)² + Σ_{j≠y} s_j²], M = `value`.

    Like Hui and Mikhail Belkin, "Evaluation of Neural Architectures Trained with Square Loss vs Cross-Entropy in
    Classification Tasks", ICLR 2021, arXiv 2006.07322 (rescaled for many classes, such as k = 15, M = 30 on ImageNet).
    With several targets to a row all of them have the target's term, and the other classes count once.

        value: M, the score that the target should have. k: weight of the target's term, ≥ 0.
        mean_over_classes: False leaves out 1 / V; with k = 1 that is ‖s − M e_y‖², the squared error of the spherical
            family (Vincent, de Brébisson and Bouthillier, 2015, arXiv 1412.7091).
    """
    check_number("squared_error_loss", "value", value)
    check_number("squared_error_loss", "k", k, 0)
    found = gather_centred(scores, target, share)
    return centred(*found, value=value, k=k, mean_over_classes=mean_over_classes, columns=scores.columns)[0]


def reference(logits: Tensor, target: Tensor, value=1.0, k=1.0, mean_over_classes=True) -> Tensor:
    """(N,) losses, densely."""
    positive = torch.nn.functional.one_hot(target, logits.shape[1]).bool()
    known = torch.where(logits == -torch.inf, 0.0, logits)
    loss = torch.where(positive, k * (known - value).square(), known.square()).sum(1)
    return loss / logits.shape[1] if mean_over_classes else loss


CASES = ({}, {"value": 30.0, "k": 15.0}, {"value": 2.0, "mean_over_classes": False})
