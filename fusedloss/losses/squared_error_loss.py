"""Squared error between the scores and a scaled one-hot target."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number
from ..relation import Rest
from ..row_loss import row_loss
from ..statistics import Score, SumOfSquares


@row_loss
def squared_error_loss(
    scores, target, *, value: float | Tensor = 1.0, k: float | Tensor = 1.0, mean_over_classes: bool = True
):
    """Squared error: L = (1 / V) [k (s_y − M)² + Σ_{j≠y} s_j²], M = `value`.

    Like Hui and Mikhail Belkin, "Evaluation of Neural Architectures Trained with Square Loss vs Cross-Entropy in
    Classification Tasks", ICLR 2021, arXiv 2006.07322 (rescaled for many classes, such as k = 15, M = 30 on ImageNet).

        value: M, the score that the target should have. k: weight of the target's term, ≥ 0.
        mean_over_classes: False leaves out 1 / V; with k = 1 that is ‖s − M e_y‖², the squared error of the spherical
            family (Vincent, de Brébisson and Bouthillier, 2015, arXiv 1412.7091).
    """
    check_number("squared_error_loss", "value", value)
    check_number("squared_error_loss", "k", k, 0)
    hit, others = scores.reduce(Score(target), SumOfSquares(where=Rest(target)))
    loss = k * (hit - value).square() + others
    return loss / scores.columns if mean_over_classes else loss


def reference(logits: Tensor, target: Tensor, value=1.0, k=1.0, mean_over_classes=True) -> Tensor:
    """(N,) losses, densely."""
    positive = torch.nn.functional.one_hot(target, logits.shape[1]).bool()
    known = torch.where(logits == -torch.inf, 0.0, logits)
    loss = torch.where(positive, k * (known - value).square(), known.square()).sum(1)
    return loss / logits.shape[1] if mean_over_classes else loss


CASES = ({}, {"value": 30.0, "k": 15.0}, {"value": 2.0, "mean_over_classes": False})
