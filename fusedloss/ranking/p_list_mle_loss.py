"""p-ListMLE: ListMLE whose first choices weigh most."""

import torch
from torch import Tensor

from .list_loss import list_loss, spoilt
from .list_mle_loss import choices, falling


@list_loss
def p_list_mle_loss(lists, scores, relevance, *, shuffle_ties: bool = False, generator: torch.Generator | None = None):
    """p-ListMLE: L = Σ_k w_k (log Σ_{m≥k} e^{s_(m)} − s_(k)), w_k ∝ 2^{n−k+1} − 1 with Σ_k w_k = 1, k from 1 to n.

    (k) is the k-th item in falling order of relevance, n the list's own length. Items of equal relevance stand in their
    given order, or with ``shuffle_ties`` in a random one (from ``generator``).

    Yanyan Lan, Yadong Zhu, Jiafeng Guo, Shuzi Niu and Xueqi Cheng, "Position-Aware ListMLE: A Sequential Learning
    Process for Ranking", UAI 2014. The paper weighs by 2^{n−k} − 1; the weights here
    are those of sentence-transformers, taken relative to 2^n, so that no list is too long for them.
    """
    ordered, losses = choices(lists, spoilt(scores, relevance), falling(lists, relevance, shuffle_ties, generator))
    place = torch.arange(scores.shape[-1], device=scores.device)
    if lists.offsets is not None:
        place = place - lists.offsets[:-1][lists.row]
    weight = torch.exp2(-place.to(scores.dtype)) - lists.spread(torch.exp2(-lists.count(scores)))
    weight = weight.expand(scores.shape)
    return ordered.sum(losses * weight) / ordered.sum(weight).clamp(min=torch.finfo(scores.dtype).tiny)


def reference(scores: Tensor, relevance: Tensor, **_) -> Tensor:
    """The loss of one list (n,), by its definition."""
    n, s = len(scores), scores[relevance.sort(descending=True, stable=True).indices]
    weight = torch.tensor([float(2 ** (n - k) - 1) for k in range(n)], dtype=scores.dtype)
    losses = (w * (s[k:].logsumexp(0) - s[k]) for k, w in enumerate(weight / weight.sum()))
    return sum(losses, 0 * scores.sum())


CASES = ({},)
