"""ListNet: cross-entropy between the softmax of the relevance and the softmax of the scores."""

from torch import Tensor

from .list_loss import list_loss


@list_loss
def listnet_loss(lists, scores, relevance):
    """ListNet (top one): L = −Σ_i softmax(r)_i log softmax(s)_i.

    Zhe Cao, Tao Qin, Tie-Yan Liu, Ming-Feng Tsai and Hang Li, "Learning to Rank: From Pairwise Approach to Listwise
    Approach", ICML 2007. allRank adds 1e-10 inside the logarithm, which ends at 23 nats; this form does not.
    """
    return lists.sum(lists.softmax(relevance) * (lists.spread(lists.logsumexp(scores)) - scores))


def reference(scores: Tensor, relevance: Tensor) -> Tensor:
    """The loss of one list (n,), densely."""
    return -(relevance.softmax(0) * scores.log_softmax(0)).sum()


CASES = ({},)
