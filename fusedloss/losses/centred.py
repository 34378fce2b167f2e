"""The spherical family: losses of the target's scores, and mean and centred sum of squares of all scores of a row.

P. Vincent, A. de Brébisson and X. Bouthillier, "Efficient Exact Gradient Update for training Deep Networks with Very
Large Sparse Targets", NeurIPS 2015, arXiv 1412.7091. Here in centred coordinates, where nothing cancels:

    a_k = o_k − μ of the targets k,   μ = mean of the row's n scores,   v = Σ_j (o_j − μ)²

Each loss of the family has in its file `centred(hit, mean, squares, count, share, …)` → `Centred` (loss, α, t, γ):

    hit (N, K) a;  mean, squares, count (N,) μ, v, n;  share (N, K) what each target counts, 0 for none there
    α (N, K) = ∂L/∂a,   t (N,) = ∂L/∂μ at constant a and v,   γ (N,) = ∂L/∂v
    ∂L/∂o = 2γ (o − μ) + Σ_k α_k (e_k − 1/n) + t/n

and `rank(scores)`, what classes are ranked by.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..relation import Rest
from ..statistics import Moments, Score


class Centred(NamedTuple):
    """A loss of the family and its derivatives, as `centred` returns them."""

    loss: Tensor  # (N,)
    alpha: Tensor  # (N, K)
    t: Tensor  # (N,)
    gamma: Tensor  # (N,)


def gather_centred(scores, target: Tensor, share: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hit, mean, squares, count and share of rows of scores, in one pass; target (N,) or (N, K)."""
    if share is not None:
        (count, mean, squares), hits = scores.reduce(Moments(), Score(target))
        return hits - mean.unsqueeze(1), mean, squares, count, share.to(hits.dtype)
    # Joined by Chan's rule after the pass, in float64: the sum over the others of a confident row keeps its digits.
    (others, mean, squares), hit = scores.reduce(Moments(where=Rest(target)), Score(target))
    count, apart = others + 1, hit - mean
    away = apart * others / count
    return away.unsqueeze(1), hit - away, squares + apart * away, count, torch.ones_like(away).unsqueeze(1)


def of_quotient(
    term: Tensor, term_slope: Tensor, total: Tensor, per_mean: Tensor, per_squares: float, share: Tensor
) -> Centred:
    """L = Σ_k share_k log(T / f_k): its value and (α, t, γ), from f_k and f′_k (N, K) and T, ∂T/∂μ, ∂T/∂v.

    As log1p((T − f) / f) it keeps the digits of a loss near 0.
    """
    loss = (share * torch.log1p((total.unsqueeze(1) - term) / term)).sum(1)
    alpha, gamma = -share * term_slope / term, share.sum(1) / total
    return Centred(loss, alpha, alpha.sum(1) + gamma * per_mean, gamma * per_squares)
