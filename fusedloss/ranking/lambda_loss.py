"""LambdaRank and the LambdaLoss framework: the logistic loss of pairs, weighted by what their exchange does to NDCG."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from ..checks import check_constant, expect
from .list_loss import list_loss
from .pairs import pair_losses

WEIGHTINGS = {None: "one", "ranknet": "one", **{w: w for w in ("ndcg1", "ndcg2", "lambdarank", "ndcg2pp")}}


@list_loss
def lambda_loss(
    lists,
    scores,
    relevance,
    *,
    weighting: str | None = "ndcg2pp",
    k: int | None = None,
    sigma: float = 1.0,
    mu: float = 10.0,
    base: float = 2.0,
    normalization: str | None = None,
):
    """LambdaLoss: L = Σ_{r_i > r_j} w_ij log(1 + e^{−σ (s_i − s_j)}) / log(base).

    With ρ the rank by falling score (ties in order of position), A(ρ) = 1 / log2(1 + ρ), G = (2^r − 1) / ideal DCG@k
    and δ_ij = A(|ρ_i − ρ_j|) − A(|ρ_i − ρ_j| + 1), weighting is
      "ndcg2pp"      w = |G_i − G_j| (μ δ_ij + |A(ρ_i) − A(ρ_j)|)    NDCG-Loss2++
      "ndcg2"        w = |G_i − G_j| δ_ij                           NDCG-Loss2
      "lambdarank"   w = |G_i − G_j| |A(ρ_i) − A(ρ_j)|
      "ndcg1"        w = G_i A(ρ_i), over all ordered pairs, i = j too    NDCG-Loss1
      None, "ranknet"    w = 1
    k: only pairs of which both have rank ≤ k. Weights are constants. base: of the logarithm, math.e for the natural
    one. normalization: None, each list's sum; "pairs", that by its number of pairs; "batch", with which
    ``reduction="mean"`` is the mean over all pairs of the batch, whatever list they are of, and the other reductions
    are None's. O(n) memory, every pair computed once. Scores of −inf give what the formula gives (∞ or NaN); padding
    belongs into the mask.

    Xuanhui Wang, Cheng Li, Nadav Golbandi, Michael Bendersky and Marc Najork, "The LambdaLoss Framework for Ranking
    Metric Optimization", CIKM 2018; Christopher Burges, Robert Ragno and Quoc Viet Le, "Learning to Rank with
    Nonsmooth Cost Functions", NIPS 2006. allRank's lambdaLoss is ``reduction="sum"``, and its mean
    ``normalization="batch"``; it stops at a loss of 33 per pair, with gradient 0, where σ (s_i −
    s_j) < −23, and this form does not; its default weighting is None, sentence-transformers' and ours "ndcg2pp".
    TF-Ranking takes the natural logarithm.
    """
    expect(weighting in WEIGHTINGS, "lambda_loss", "weighting", f"one of {tuple(WEIGHTINGS)}", weighting)
    check_constant("lambda_loss", "base", base, 1.0, above=True)
    options = dict(sigma=sigma, mu=mu, scale=1 / math.log(base), k=k, normalization=normalization)
    return pair_losses("lambda_loss", lists, scores, relevance, weight=WEIGHTINGS[weighting], **options)


def reference(
    scores: Tensor, relevance: Tensor, weighting="ndcg2pp", k=None, sigma=1.0, mu=10.0, base=2.0, normalization=None
) -> Tensor:
    """The loss of one list (n,), densely."""
    n = len(scores)
    order = scores.detach().sort(descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(1, n + 1, device=order.device)).to(scores)
    a, top = 1 / (1 + rank).log2(), rank <= (k or n)
    gain = 2**relevance - 1
    best = gain.sort(descending=True).values / torch.arange(2, n + 2, device=order.device).to(scores).log2()
    gain = gain / best[:k].sum().clamp(min=1e-10)
    gap, apart = (gain[:, None] - gain).abs(), (rank[:, None] - rank).abs()
    delta = (1 / (1 + apart).log2() - 1 / (2 + apart).log2()).fill_diagonal_(0.0)
    weight = {
        "ndcg2pp": gap * (mu * delta + (a[:, None] - a).abs()),
        "ndcg2": gap * delta,
        "lambdarank": gap * (a[:, None] - a).abs(),
        "ndcg1": (gain * a)[:, None].expand_as(gap),
    }.get(weighting, torch.ones_like(gap))
    pairs = (relevance[:, None] > relevance) | (weighting == "ndcg1")
    pairs = pairs & top[:, None] & top
    loss = (weight * -logsigmoid(sigma * (scores[:, None] - scores)))[pairs].sum() / math.log(base)
    return loss / pairs.sum().clamp(min=1) if normalization == "pairs" else loss


CASES = (
    {},
    {"weighting": None, "sigma": 2.0},
    {"weighting": "ndcg1"},
    {"weighting": "ndcg2", "k": 4},
    {"weighting": "lambdarank", "normalization": "pairs"},
    {"k": 3, "mu": 5.0, "base": math.e, "normalization": "pairs"},
)
