"""Approximate discounted rank MSE: soft positions against the ranks of a teacher."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_constant, expect
from .list_loss import list_loss, spoilt
from .pairs import soft_positions
from .pairs_torch import ranks

DISCOUNTS = {"log2": lambda rank: 1 / (1 + rank).log2(), "reciprocal": lambda rank: 1 / rank, None: torch.ones_like}


@list_loss
def adr_mse_loss(lists, scores, relevance, *, temperature: float = 1.0, discount: str | None = "log2"):
    """ADR-MSE: L = (1/n) Σ_i d(ρ_i) (p_i − ρ_i)²,  p_i = 1 + Σ_{j ≠ i} 1 / (1 + e^{(s_i − s_j) / T}).

    ρ is the teacher's rank: by falling relevance (the teacher's scores will do), ties in order of position. discount:
    "log2", d = 1 / log2(1 + ρ); "reciprocal", 1 / ρ; None, 1. O(n) memory. Scores must be finite; padding belongs into
    the mask.

    Ferdinand Schlatt, Maik Fröbe, Harrisen Scells, Shengyao Zhuang, Bevan Koopman, Guido Zuccon, Benno Stein, Martin
    Potthast and Matthias Hagen, "Rank-DistiLLM: Closing the Effectiveness Gap Between Cross-Encoders and LLMs for
    Passage Re-Ranking", 2024, arXiv 2405.07920; as in lightning-ir's ApproxRankMSE, but each list is divided by its
    own length.
    """
    check_constant("adr_mse_loss", "temperature", temperature, 0.0, above=True)
    expect(discount in DISCOUNTS, "adr_mse_loss", "discount", f"one of {tuple(DISCOUNTS)}", discount)
    rank = ranks(lists, relevance).to(scores.dtype)
    error = (soft_positions(lists, spoilt(scores, relevance), 1 / temperature) - rank).square()
    return lists.sum(DISCOUNTS[discount](rank) * error) / lists.count(scores).clamp(min=1)


def reference(scores: Tensor, relevance: Tensor, temperature=1.0, discount="log2") -> Tensor:
    """The loss of one list (n,), densely."""
    order = relevance.sort(descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(0, order, torch.arange(1, len(order) + 1, device=order.device)).to(scores)
    above = ((scores - scores[:, None]) / temperature).sigmoid()
    error = (1 + above.sum(1) - above.diagonal() - rank).square()
    return (DISCOUNTS[discount](rank) * error).sum() / max(1, len(scores))


CASES = ({}, {"discount": "reciprocal", "temperature": 0.3}, {"discount": None})
