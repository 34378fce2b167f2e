"""GroCo: positives above negatives, as groups, by a sorting network."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..checks import check_integer, check_number, expect
from ..sorting.comparators import DISTRIBUTIONS
from ..sorting.group_ordering import group_ordering
from .list_loss import list_loss, spoilt

NAME = "gro_co_loss"


@list_loss
def gro_co_loss(
    lists, scores, relevance, *, k: int = 10, steepness: float | Tensor = 1.0, distribution: str = "cauchy"
):
    """GroCo, group ordering constraints: L = mean_i BCE(p_i, [i positive]), p_i the part of item i that a
    differentiable odd-even network sorts to one of the last P places.

    Items of relevance > 0 are the P positives of a list (an anchor), all others its negatives. The network sorts all
    positives and the k negatives of largest score (fewer where there are fewer), which stand before it in rising
    order, group by group; the mean is over these items, so lists of different lengths count alike. A list of
    negatives only, or of positives only, has loss 0. scores: similarities, cosines in the paper. steepness β > 0 (a
    number or a 0-dimensional tensor, with gradient) and distribution: those of `fusedloss.sorting.SortingNetwork`.
    Time and memory are quadratic in k + P, whatever the length of the list: one channel goes through the network, no
    matrix is made. A logarithm below −100 counts as −100, as in torch's binary cross-entropy. Derivatives of any
    order.

    Nina Shvetsova, Felix Petersen, Anna Kukleva, Bernt Schiele and Hilde Kuehne, "Learning by Sorting: Self-supervised
    Learning with Group Ordering Constraints", ICCV 2023, arXiv 2301.02009. The official code averages the losses of the
    positives' and of the negatives' places, which are equal; the values agree. For several views take the mean of their
    losses.
    """
    check_integer(NAME, "k", k, 1)
    check_number(NAME, "steepness", steepness, 0, above=True)
    expect(distribution in DISTRIBUTIONS, NAME, "distribution", f"one of {list(DISTRIBUTIONS)}", distribution)
    if not isinstance(steepness, Tensor):
        steepness = torch.zeros((), dtype=torch.float64, device="cpu") + steepness
    positive = relevance > 0
    # In float64: a logarithm asks for the digits of a small part, which differences of neighbours lose.
    layout = positive, lists.mask, lists.offsets, k, distribution
    part = group_ordering(spoilt(scores, relevance).double(), steepness, *layout)
    right = torch.where(positive, part, 1 - part).clamp(max=1)  # 1 of negatives that are not among the k
    losses = torch.where(right <= 0, 100.0, -torch.where(right <= 0, 1.0, right).log()).clamp(max=100)
    positives = lists.sum(positive.to(scores.dtype))
    items = positives + (lists.count(scores) - positives).clamp(max=k)
    return lists.sum(losses).to(scores.dtype) / items.clamp(min=1)


def reference(scores: Tensor, relevance: Tensor, k: int = 10, steepness: float = 1.0, distribution="cauchy") -> Tensor:
    """The loss of one list (n,), with the permutation matrix."""
    negatives, positives = scores[relevance <= 0].sort().values[-k:], scores[relevance > 0].sort().values
    x, matrix = torch.cat([negatives, positives]), torch.eye(len(negatives) + len(positives), dtype=scores.dtype)
    for layer in range(len(x)):
        for i in range(layer % 2, len(x) - 1, 2):
            share = 1 - DISTRIBUTIONS[distribution](steepness * (x[i + 1] - x[i]))[0]
            mix = torch.stack([torch.stack([share, 1 - share]), torch.stack([1 - share, share])])
            x = torch.cat([x[:i], mix @ x[i : i + 2], x[i + 2 :]])
            matrix = torch.cat([matrix[:i], mix @ matrix[i : i + 2], matrix[i + 2 :]])
    part, target = matrix[len(negatives) :].sum(0).clamp(0, 1), torch.ones_like(x)
    target[: len(negatives)] = 0
    return 0 * scores.sum() + (F.binary_cross_entropy(part, target) if len(x) else 0)


CASES = ({}, {"k": 2}, {"k": 3, "steepness": 4.0, "distribution": "logistic"})
