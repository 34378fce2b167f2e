"""RankNet: the logistic loss of every pair of items whose order is known."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from ..checks import expect
from .list_loss import list_loss
from .pairs import pair_losses

WEIGHTINGS = {None: "one", "difference": "difference", "difference_of_squares": "squares"}


@list_loss
def ranknet_loss(
    lists, scores, relevance, *, weighting: str | None = None, sigma: float = 1.0, normalization: str | None = "batch"
):
    """RankNet: L = Σ_{r_i > r_j} w_ij log(1 + e^{−σ (s_i − s_j)}), by default divided by the pairs of the whole batch.

    weighting: None, w = 1; "difference", |r_i − r_j|; "difference_of_squares", |r_i² − r_j²|. normalization says what
    the mean is of, where `reduction` is "mean": "batch", of all pairs, whatever list they are of; "pairs", of the
    lists' own means, so that every list counts alike; None, of the lists' sums. With other reductions "batch" is
    None. Without pairs the loss is 0 (the official code divides 0 by 0). Every pair is computed once, with its gradient, in
    O(n) memory. Scores of −inf give what the formula gives: ∞ where they are the more relevant, NaN between two of
    them; padding belongs into the mask.

    Chris Burges, Tal Shaked, Erin Renshaw, Ari Lazier, Matt Deeds, Nicole Hamilton and Greg Hullender, "Learning to
    Rank using Gradient Descent", ICML 2005. The default, with both weightings, is allRank's rankNet.
    """
    expect(weighting in WEIGHTINGS, "ranknet_loss", "weighting", f"one of {tuple(WEIGHTINGS)}", weighting)
    options = dict(weight=WEIGHTINGS[weighting], sigma=sigma, normalization=normalization)
    return pair_losses("ranknet_loss", lists, scores, relevance, **options)


def reference(scores: Tensor, relevance: Tensor, weighting=None, sigma=1.0, normalization="batch") -> Tensor:
    """What one list (n,) contributes, densely."""
    r = relevance.square() if weighting == "difference_of_squares" else relevance
    weight = 1.0 if weighting is None else (r[:, None] - r).abs()
    pairs = relevance[:, None] > relevance
    loss = (weight * -logsigmoid(sigma * (scores[:, None] - scores)))[pairs].sum()
    return loss / pairs.sum().clamp(min=1) if normalization == "pairs" else loss


CASES = (
    {"normalization": "pairs"},
    {"weighting": "difference", "sigma": 2.0},
    {"weighting": "difference_of_squares", "normalization": None},
    {},
)
