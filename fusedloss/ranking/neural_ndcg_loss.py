"""NeuralNDCG: the NDCG of a relaxed order, doubly stochastic by Sinkhorn's scaling."""

import torch
from torch import Tensor

from ..checks import check_constant, check_integer
from ..sorting.sinkhorn import neural_ndcg
from .list_loss import list_loss
from .noise import copies, gumbel, positive_scores


@list_loss
def neural_ndcg_loss(
    lists,
    scores,
    relevance,
    *,
    tau: float = 1.0,
    k: int | None = None,
    powered_relevancies: bool = True,
    transposed: bool = False,
    stochastic: bool = False,
    n_samples: int = 32,
    beta: float = 0.1,
    log_scores: bool = True,
    generator: torch.Generator | None = None,
    max_iterations: int = 50,
    tolerance: float = 1e-6,
):
    """NeuralNDCG: L = −Σ_{i≤k} (P̂g)_i / log2(1+i) / idealDCG@k, of gains g = 2^r − 1 (or r) and P̂ = Sinkhorn(P).

    P_ij = softmax_j(((n+1−2i) s_j − Σ_m |s_j−s_m|) / tau), with n the list's own length. Sinkhorn divides columns, then
    rows, by their sums, at most ``max_iterations`` times (0: P as it is), until all sums of the list are within
    ``tolerance`` of 1. The gradient is that of the steps which were taken, for memory of n·max_iterations numbers while
    it is computed; n×n is never in memory for long lists. It has no second derivative, and none in the relevance.

    reduction="mean" is over the lists whose ideal DCG is above 0; the others have loss 0. A NaN or infinite score makes
    its list NaN. ``transposed`` is accepted and changes nothing: it names another way to sum the same number.

    stochastic: the mean over ``n_samples`` orders, of scores with Gumbel noise times ``beta`` (from ``generator``);
    with ``log_scores``, of log(s + |min s| + 1e-10).

    Przemysław Pobrotyn and Radosław Białobrzeski, "NeuralNDCG: Direct Optimisation of a Ranking Metric via
    Differentiable Relaxation of Sorting", 2021, arXiv 2102.07831; Aditya Grover et al., "Stochastic Optimization of
    Sorting Networks via Continuous Relaxations", ICLR 2019, arXiv 1903.08850. The authors' code (allRank) ends
    Sinkhorn for all lists of a batch at once (always after 50 iterations where there is padding), and takes min s
    over the batch: here a list's loss does not depend on its neighbours; tolerance=0 is the same in both. Its
    transposed form divides 2^r − 1 gains out of raw ones, and its stochastic form mixes up the lists of a batch with
    padding: neither is followed.
    """
    name = "neural_ndcg_loss"
    check_constant(name, "tau", tau, 0, above=True)
    check_constant(name, "tolerance", tolerance, 0)
    check_integer(name, "max_iterations", max_iterations, 0)
    if k is not None:
        check_integer(name, "k", k, 1)
    gains = relevance
    if powered_relevancies:  # relative to 2^max r: any relevance is safe, and the ratio is the same
        top = lists.spread(lists.max(relevance).clamp(min=0))
        gains = torch.exp2(relevance - top) - torch.exp2(-top)
    if not stochastic:
        ndcg, ideal = neural_ndcg(lists, scores, gains, tau, k or 0, max_iterations, tolerance)
        return -ndcg, ideal > 0
    check_integer(name, "n_samples", n_samples, 1)
    center = positive_scores(lists, scores).log() if log_scores else scores
    noisy = center + beta * gumbel((n_samples, *scores.shape), scores, generator)
    gains = gains.expand(noisy.shape).flatten(0, 1)
    ndcg, ideal = neural_ndcg(
        copies(lists, n_samples), noisy.flatten(0, 1), gains, tau, k or 0, max_iterations, tolerance
    )
    return -ndcg.view(n_samples, lists.rows).mean(0), ideal[: lists.rows] > 0


def reference(
    scores: Tensor, relevance: Tensor, tau=1.0, k=None, powered_relevancies=True, transposed=False, max_iterations=50,
    tolerance=1e-6, **_,
) -> Tensor:
    """The loss of one list (n,), densely, through autograd."""
    gains = torch.exp2(relevance) - 1 if powered_relevancies else relevance
    place = torch.arange(1, len(scores) + 1, dtype=scores.dtype)
    discount = torch.where(place <= (k or len(scores)), 1 / (1 + place).log2(), 0)
    ideal = (gains.sort(descending=True).values * discount).sum()
    if not ideal > 0:
        return 0 * scores.sum()
    apart = (scores[:, None] - scores).abs().sum(1)
    p = (((len(scores) + 1 - 2 * place)[:, None] * scores - apart) / tau).softmax(1)
    for _ in range(max_iterations):
        p = p / p.sum(0).clamp(min=1e-10)
        p = p / p.sum(1, keepdim=True).clamp(min=1e-10)
        if max((p.sum(0) - 1).abs().max(), (p.sum(1) - 1).abs().max()) < tolerance:
            break
    return -(gains @ (p.T @ discount) if transposed else discount @ (p @ gains)) / ideal


CASES = (
    {"tolerance": 0.0},
    {"k": 3, "tau": 0.5, "max_iterations": 10, "tolerance": 0.0},
    {"transposed": True, "powered_relevancies": False, "max_iterations": 0},
)
