"""AUC loss: every positive of the batch above every negative of the batch, as the Mann–Whitney statistic counts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_constant, expect
from ..numerics import softplus
from ..scores import Scores
from ..targets import spoilt
from .pairs import checked_columns, pair_scores, positives
from .row_chunks import total_over_chunks

SCORES = "pair"
BLOCK = 1 << 18  # differences formed at once


def _against_positives(temperature: float):
    """For `total_over_chunks`: negatives of some rows against the positives of all."""

    def function(z, target, hits):
        seen = z != -torch.inf
        seen = seen.scatter(1, target.clamp(min=0).unsqueeze(1), False) | (seen & (target < 0).unsqueeze(1))
        total, slope, by_hit = z.new_zeros((), dtype=torch.float64), torch.zeros_like(z), torch.zeros_like(hits)
        z = torch.where(seen, z, 0.0).unsqueeze(2)
        step = max(1, BLOCK // max(1, z.numel()))
        for part in (slice(k, k + step) for k in range(0, len(hits), step)):
            u = ((z - hits[part].to(z.dtype)) / temperature).masked_fill(~seen.unsqueeze(2), -torch.inf)
            total += softplus(u).sum(dtype=torch.float64)
            s = torch.sigmoid(u) / temperature
            slope += s.sum(2)
            by_hit[part] = -s.sum((0, 1), dtype=torch.float64)
        return total, seen.sum(), slope, by_hit

    return function


def auc_loss(
    scores: Tensor | Scores, target: Tensor | None = None, *, temperature: float = 0.01, negatives: str = "sum"
) -> Tensor:
    """AUC (Mann–Whitney) loss: L = (1/N) Σ_i Σ_{negatives s of the whole batch} log(1 + e^{(s − s_i⁺)/τ}).

    Sheikholeslami et al., "Optimizing What Matters: AUC-Driven Learning for Robust Neural Retrieval", 2025, arXiv
    2510.00137; no official code found. s_i⁺ is row i's positive, a negative is every other score of every row. Exact: N
    differences per score, O(N² M) of them in plain PyTorch, a chunk of rows at a time within the memory budget. It can
    be differentiated once.

        scores: `similarity_scores(x, y, normalize=True)`, or a matrix (N, M).
        target: (N,) the column of each row's positive; None: the diagonal. −100 for a row that has none: all of its
            scores are negatives, and N does not count it.
        temperature: τ, 0.01 in the paper.
        negatives: "sum", as in the paper's equation 3, or "mean": divided by their number too, as in its equation 2.

    Returns a float32 loss (float64 for float64 scores), 0 for no positives. Raises ValueError, TypeError or IndexError.
    """
    name = "auc_loss"
    check_constant(name, "temperature", temperature, 0, above=True)
    expect(negatives in ("sum", "mean"), name, "negatives", "sum or mean", negatives)
    scores = pair_scores(name, scores)
    target = positives(name, scores, target)
    expect(target.shape == (scores.rows,), name, "target", f"shape ({scores.rows},)", target)
    columns, valid = checked_columns(name, scores, target)
    hits = torch.where(columns < 0, torch.inf, scores.at(columns.clamp(min=0)))  # +∞ is above all, without a slope
    total, count = total_over_chunks(scores, _against_positives(temperature), columns, copies=8, shared=hits)
    divisor = (columns >= 0).sum().clamp(min=1) * (count.clamp(min=1) if negatives == "mean" else 1)
    return spoilt((total / divisor).to(scores.dtype), valid)


def reference(z: Tensor, target=None, temperature=0.01, negatives="sum") -> Tensor:
    """The mean over positives, densely: N² M differences."""
    target = torch.arange(len(z), device=z.device) if target is None else target
    rest = torch.ones_like(z, dtype=torch.bool).scatter(1, target.unsqueeze(1), False)
    pairs = softplus((z[rest].unsqueeze(1) - z.gather(1, target.unsqueeze(1)).squeeze(1)) / temperature)
    return pairs.sum(0).mean() / (rest.sum().clamp(min=1) if negatives == "mean" else 1)


CASES = (
    {},
    {"temperature": 0.5, "negatives": "mean"},
    {"target": lambda rows, columns: torch.arange(rows).flip(0), "temperature": 0.1},
)
