"""The pointwise loss that RankT5 compares the listwise ones with."""

import torch
from torch import Tensor

from ..numerics import softplus
from .list_loss import list_loss


@list_loss
def listwise_point_loss(lists, scores, relevance):
    """Pointwise logistic: L = Σ_i softplus(s_i) − r_i s_i, for r of 0 or 1 the sum of each item's cross-entropy.

    Honglei Zhuang et al., "RankT5: Fine-Tuning T5 for Text Ranking with Ranking Losses", 2022, arXiv 2210.10634. Rax
    takes the mean over the items instead. Where r is 0 a score of −inf costs 0.
    """
    return lists.sum(softplus(scores) - torch.where(relevance == 0, 0.0, relevance * scores))


def reference(scores: Tensor, relevance: Tensor) -> Tensor:
    """The loss of one list (n,), densely."""
    return (torch.logaddexp(scores, torch.zeros_like(scores)) - relevance * scores).sum()


CASES = ({},)
