"""Kendall's rank correlation with a soft sign, as a loss."""

from __future__ import annotations

from torch import Tensor

from ..checks import check_constant
from .list_loss import list_loss
from .pairs import pair_losses


@list_loss
def kendall_loss(lists, scores, relevance, *, temperature: float = 1.0):
    """Soft Kendall: L = 1 − τ,  τ = Σ_{r_i > r_j} tanh((s_i − s_j) / T) / P, P the number of pairs with r_i > r_j.

    As T → 0, τ is the share of pairs in the right order less that in the wrong one. Pairs of equal relevance do not
    count, pairs of equal scores count 0: where relevance has no ties that is Kendall's τ_a (and τ_b, if scores have
    none either); where it has, Somers' D of the scores given the relevance, which a perfect order still takes to 1,
    as τ_a and τ_b do not. A list without pairs has loss 0. Each 1 − tanh is computed as 2 / (1 + e^{2 (s_i − s_j) /
    T}), which does not cancel. Every pair is computed once, with its gradient, in O(n) memory.

    M. G. Kendall, "A New Measure of Rank Correlation", Biometrika 30, 1938; Robert H. Somers, "A New Asymmetric
    Measure of Association for Ordinal Variables", American Sociological Review 27, 1962. tanh is 2 / (1 + e^{−2x}) − 1,
    the smooth order of a pair of Tao Qin, Tie-Yan Liu and Hang Li, "A General Approximation Framework for Direct
    Optimization of Information Retrieval Measures", Information Retrieval 13, 2010.
    """
    check_constant("kendall_loss", "temperature", temperature, 0.0, above=True)
    options = dict(function="logistic", sigma=2 / temperature, scale=2.0, normalization="pairs")
    return pair_losses("kendall_loss", lists, scores, relevance, **options)


def reference(scores: Tensor, relevance: Tensor, temperature=1.0) -> Tensor:
    """The loss of one list (n,), densely."""
    pairs = relevance[:, None] > relevance
    return (1 - ((scores[:, None] - scores) / temperature).tanh())[pairs].sum() / pairs.sum().clamp(min=1)


CASES = ({}, {"temperature": 0.2})
