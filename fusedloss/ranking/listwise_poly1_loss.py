"""The listwise Poly-1 loss of RankT5."""

import torch
from torch import Tensor

from ..checks import check_constant
from .list_loss import list_loss
from .listwise_softmax_loss import relevance_of, softmax_terms


@list_loss
def listwise_poly1_loss(lists, scores, relevance, *, epsilon: float = 1.0, normalized: bool = False):
    """Listwise Poly-1: L = −Σ_i r_i log p_i + ε Σ_i r_i (1 − p_i), p = softmax(s).

    With ``normalized``, r / Σr in place of r.

    Honglei Zhuang et al., "RankT5: Fine-Tuning T5 for Text Ranking with Ranking Losses", 2022, arXiv 2210.10634;
    Zhaoqi Leng et al., "PolyLoss", ICLR 2022, arXiv 2204.12511. Rax and TF-Ranking normalise r in the second sum
    (TF-Ranking in both, which is ``normalized`` here): the same for one relevant item. The paper's form is followed.
    """
    check_constant("listwise_poly1_loss", "epsilon", epsilon)
    relevance = relevance_of(lists, relevance, normalized)
    missed = 1 - lists.softmax(scores)
    return lists.sum(softmax_terms(lists, scores, relevance) + epsilon * relevance * missed)


def reference(scores: Tensor, relevance: Tensor, epsilon=1.0, normalized=False) -> Tensor:
    """The loss of one list (n,), densely."""
    if normalized:
        relevance = relevance / relevance.sum().where(relevance.sum() != 0, torch.ones_like(relevance.sum()))
    return -(relevance * scores.log_softmax(0)).sum() + epsilon * (relevance * (1 - scores.softmax(0))).sum()


CASES = ({}, {"epsilon": 0.5, "normalized": True})
