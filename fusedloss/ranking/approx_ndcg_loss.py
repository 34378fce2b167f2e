"""ApproxNDCG: NDCG of positions that are sums of sigmoids."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_constant
from .list_loss import list_loss
from .pairs import soft_positions
from .pairs_torch import ranks


@list_loss
def approx_ndcg_loss(lists, scores, relevance, *, temperature: float = 1.0, powered_relevancies: bool = True):
    """ApproxNDCG: L = −(Σ_i G_i / log2(1 + p_i)) / (Σ_i G_i / log2(1 + ρ_i)).

    p_i = 1 + Σ_{j ≠ i} 1 / (1 + e^{(s_i − s_j) / T}) is the soft position, ρ the rank by relevance; G = 2^r − 1, or r
    with powered_relevancies=False; both sums are over the whole list (no truncation). temperature: T, 1 in allRank
    (whose alpha is 1 / T), 0.1 in TensorFlow Ranking. A list whose second sum is not above 0 has loss 0 and counts in
    the mean, as a list without gains in allRank; TensorFlow Ranking leaves such lists out (``list_weight``,
    ``reduction="sum"``). Any relevance is safe: gains are scaled by 2^−max(r) before they can
    overflow. O(n) memory; two passes over the pairs of a list, one of them for the gradient. Scores must be finite;
    padding belongs into the mask.

    Tao Qin, Tie-Yan Liu and Hang Li, "A General Approximation Framework for Direct Optimization of Information
    Retrieval Measures", Information Retrieval 13, 2010; Sebastian Bruch, Masrour Zoghi, Michael Bendersky and Marc
    Najork, "Revisiting Approximate Metric Optimization in the Age of Deep Neural Networks", SIGIR 2019.
    """
    check_constant("approx_ndcg_loss", "temperature", temperature, 0.0, above=True)
    gain = relevance
    if powered_relevancies:
        largest = lists.spread(lists.max(relevance).clamp(min=0))
        gain = (relevance - largest).exp2() - (-largest).exp2()
    best = lists.sum(gain / (1 + ranks(lists, relevance)).to(scores.dtype).log2())
    empty = best <= 0
    share = torch.where(lists.spread(empty), 0.0, gain / lists.spread(torch.where(empty, 1.0, best)))
    position = soft_positions(lists, scores, 1 / temperature)
    if lists.mask is not None:  # padding has 0, which divides by log2(1)
        position = torch.where(lists.mask, position, 1.0)
    return -lists.sum(share / (1 + position).log2())


def reference(scores: Tensor, relevance: Tensor, temperature=1.0, powered_relevancies=True) -> Tensor:
    """The loss of one list (n,), densely."""
    gain = 2**relevance - 1 if powered_relevancies else relevance
    place = torch.arange(2, len(scores) + 2, device=scores.device).to(scores)
    best = (gain.sort(descending=True).values / place.log2()).sum()
    above = ((scores - scores[:, None]) / temperature).sigmoid()
    position = 1 + above.sum(1) - above.diagonal()
    return -(gain / (1 + position).log2()).sum() / torch.where(best > 0, best, torch.inf)


CASES = ({}, {"temperature": 0.1}, {"powered_relevancies": False})
