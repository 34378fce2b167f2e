"""The listwise softmax cross-entropy of RankT5."""

import torch
from torch import Tensor

from .list_loss import list_loss


@list_loss
def listwise_softmax_loss(lists, scores, relevance, *, normalized: bool = False):
    """Listwise softmax: L = −Σ_i r_i log softmax(s)_i.

    With ``normalized``, r / Σr in place of r. Where r is 0 any score is fine, −inf too.

    Honglei Zhuang, Zhen Qin, Rolf Jagerman, Kai Hui, Ji Ma, Jing Lu, Jianmo Ni, Xuanhui Wang and Michael Bendersky,
    "RankT5: Fine-Tuning T5 for Text Ranking with Ranking Losses", 2022, arXiv 2210.10634. Rax takes the labels as
    they are, as here by default; TF-Ranking normalises them, and weighs each list by their sum.
    """
    return lists.sum(softmax_terms(lists, scores, relevance_of(lists, relevance, normalized)))


def relevance_of(lists, relevance: Tensor, normalized: bool) -> Tensor:
    if not normalized:
        return relevance
    total = lists.sum(relevance)
    return relevance / lists.spread(torch.where(total == 0, 1.0, total))


def softmax_terms(lists, scores: Tensor, relevance: Tensor) -> Tensor:
    """−r_i log softmax(s)_i; 0 where r is, whatever the score."""
    return torch.where(relevance == 0, 0.0, relevance * (lists.spread(lists.logsumexp(scores)) - scores))


def reference(scores: Tensor, relevance: Tensor, normalized=False) -> Tensor:
    """The loss of one list (n,), densely."""
    if normalized:
        relevance = relevance / relevance.sum().where(relevance.sum() != 0, torch.ones_like(relevance.sum()))
    return -(relevance * scores.log_softmax(0)).sum()


CASES = ({}, {"normalized": True})
