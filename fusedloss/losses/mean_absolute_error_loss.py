"""Mean absolute error of the softmax probabilities: robust to label noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number
from ..numerics import nll
from ..relation import Rest
from ..row_loss import row_loss
from ..statistics import LogSumExp, Score


@row_loss
def mean_absolute_error_loss(scores, target, *, factor: float | Tensor = 2.0):
    """Mean absolute error: L = factor · (1 − p), p = softmax(s)_y; with factor = 2 it is Σ_j |p_j − y_j|.

    Aritra Ghosh, Himanshu Kumar and P. S. Sastry, "Robust Loss Functions under Label Noise for Deep Neural Networks",
    AAAI 2017, arXiv 1712.09482.

        factor: 2 is the paper's loss. The code of Ma et al. (2020, arXiv 2006.13554) drops it: factor = 1. Their
            normalized form is 1 / (V − 1) (their code: half of that); reverse cross-entropy (Wang et al., 2019,
            arXiv 1908.06112) is −log 1e-4 = 9.2103….
    """
    check_number("mean_absolute_error_loss", "factor", factor)
    lse, hit = scores.reduce(LogSumExp(where=Rest(target)), Score(target))
    return -factor * torch.expm1(-nll(lse, hit))


def reference(logits: Tensor, target: Tensor, factor=2.0) -> Tensor:
    """(N,) losses, densely."""
    return factor * (1 - torch.softmax(logits, 1).gather(1, target[:, None])[:, 0])


CASES = ({}, {"factor": 1.0})
