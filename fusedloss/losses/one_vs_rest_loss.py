"""One against the rest: a logistic loss for every class."""

from __future__ import annotations

from torch import Tensor

from ..numerics import softplus
from ..relation import Rest
from ..row_loss import row_loss
from ..statistics import Score, SumOf


@row_loss
def one_vs_rest_loss(scores, target):
    """One-vs-the-rest loss: L = softplus(−s_y) + Σ_{j≠y} softplus(s_j).

    Sekitoshi Kanai, Shin'ya Yamaguchi, Masanori Yamada, Hiroshi Takahashi, Kentaro Ohno and Yasutoshi Ida,
    "One-vs-the-Rest Loss to Focus on Important Samples in Adversarial Training", ICML 2023, arXiv 2207.10283 (its
    loss of one row; the switching between it and cross-entropy is not included). At zero scores L = V log 2: start the
    bias near −log V when V is large.
    """
    hit, others = scores.reduce(Score(target), SumOf("softplus", where=Rest(target)))
    return softplus(-hit) + others


def reference(logits: Tensor, target: Tensor) -> Tensor:
    """(N,) losses, densely."""
    return softplus(logits).sum(1) - logits.gather(1, target[:, None])[:, 0]


CASES = ({},)
