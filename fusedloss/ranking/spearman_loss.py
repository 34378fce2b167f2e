"""Differentiable Spearman: the correlation between soft ranks of the scores and ranks of the relevance."""

import torch
from torch import Tensor

from ..sorting import permutahedron
from ..sorting.soft_sort import on_lists
from .list_loss import list_loss, spoilt


@list_loss
def spearman_loss(
    lists,
    scores: Tensor,
    relevance: Tensor,
    *,
    regularization: str = "l2",
    regularization_strength: float | Tensor = 1.0,
):
    """Soft Spearman: L = 1 − ρ, ρ = Pearson's correlation of soft_rank(scores) with the ranks of the relevance.

    Equal relevance shares its mean rank, as Spearman's ρ has it; strength 0 gives 1 − ρ itself, without a gradient.
    regularization ("l2" or "kl") and regularization_strength (a number, or one per list) are `soft_rank`'s, and as
    there the strength is in the units of the scores: one far above their spread gives Pearson's correlation of the
    scores themselves with the ranks (docs/sorting.md). L lies in [0, 2]. Where one side is constant ρ has no meaning:
    it counts as 0, so L = 1 with gradient 0, lists of one item included. A list without items has loss 0. The ranks
    are computed in float64: those of a strong regularization lie close together. O(n log n) time, O(n) memory.

    Mathieu Blondel, Olivier Teboul, Quentin Berthet and Josip Djolonga, "Fast Differentiable Sorting and Ranking",
    ICML 2020, arXiv 2002.08871, section 6.3; their loss is ½‖r − r'‖², which falls with ρ where there are no ties.
    torchsort's example is the correlation, as here, but of soft ranks of the target too.
    """
    n = lists.count(scores.double())
    middle = lists.spread((n + 1) / 2)  # the mean of the soft ranks too: a block's sum to what its hard ranks sum to
    values = spoilt(scores, relevance).double()
    soft = on_lists("soft_rank", lists, values, regularization, regularization_strength) - middle
    hard = on_lists("soft_rank", lists, relevance.detach().double(), "l2", 0.0) - middle
    spread = lists.sum(soft.square()), lists.sum(hard.square())
    rounding = n * (4 * torch.finfo(torch.float64).eps * n) ** 2
    varied = (spread[0] > rounding) & (spread[1] > 0)
    size = torch.where(varied, spread[0] * spread[1], 1.0).sqrt()
    rho = torch.where(varied, lists.sum(soft * hard) / size, 0.0)
    rho = torch.where(spread[0].isnan(), torch.nan, rho)
    return torch.where(n > 0, 1 - rho, 0.0).to(scores.dtype)


def reference(scores: Tensor, relevance: Tensor, regularization="l2", regularization_strength=1.0) -> Tensor:
    """The loss of one list (n,), densely."""
    soft = permutahedron.reference(scores, regularization_strength, sort=False, kl=regularization == "kl")
    above, equal = relevance[:, None] > relevance, relevance[:, None] == relevance
    hard = above.sum(1) + (equal.sum(1) + 1) / 2
    return 1 - torch.corrcoef(torch.stack([soft, hard.to(soft.dtype)]))[0, 1]


CASES = ({}, {"regularization": "kl"}, {"regularization_strength": 0.1}, {"regularization_strength": 30.0})
