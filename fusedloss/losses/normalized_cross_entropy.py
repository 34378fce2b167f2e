"""Normalized cross-entropy: bounded, and robust to label noise."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import expect
from ..numerics import log_partition, nll
from ..relation import Rest
from ..row_loss import row_loss
from ..statistics import Count, LogSumExp, Score, Sum


@row_loss
def normalized_cross_entropy(scores, target):
    """Normalized cross-entropy: L = −log p_y / −Σ_j log p_j, p = softmax(s).

    Xingjun Ma, Hanxun Huang, Yisen Wang, Simone Romano, Sarah Erfani and James Bailey, "Normalized Loss Functions for
    Deep Learning with Noisy Labels", ICML 2020, arXiv 2006.13554. Needs V ≥ 2; the sum is over the classes whose score
    is not -inf. The gradient is of the size 1 / (V log V): the paper multiplies the loss by up to 10 for 100 classes.
    """
    expect(scores.columns >= 2, "normalized_cross_entropy", "scores", "at least two classes", scores.columns)
    lse, hit, total, seen = scores.reduce(LogSumExp(where=Rest(target)), Score(target), Sum(), Count())
    loss = nll(lse, hit)
    all_classes = seen * log_partition(lse, hit) - total
    alone = all_classes <= 0  # every other class is masked: p = 1
    return torch.where(alone, 0.0, loss / torch.where(alone, 1.0, all_classes))


def reference(logits: Tensor, target: Tensor) -> Tensor:
    """(N,) losses, densely."""
    log_p = torch.log_softmax(logits, 1)
    return -log_p.gather(1, target[:, None])[:, 0] / -torch.where(logits == -torch.inf, 0.0, log_p).sum(1)


CASES = ({},)
