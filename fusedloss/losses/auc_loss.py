"""AUC loss: every positive of the batch above every negative of the batch, as the Mann–Whitney statistic counts."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_constant, expect
from ..numerics import softplus
from ..plan import spans
from ..scores import Scores
from ..targets import spoilt
from .pairs import checked_columns, pair_scores, positives
from .row_chunks import again, over_chunks

SCORES = "pair"
BLOCK = 1 << 18  # differences formed at once


def _against(hits: Tensor, temperature: float):
    """For `over_chunks`: the negatives of some rows against the positives of all, and the number of those negatives."""

    def block(z, seen, hits):
        u = (z.unsqueeze(2) - hits.to(z.dtype)) / temperature
        return softplus(u.masked_fill(~seen.unsqueeze(2), -torch.inf)).sum(dtype=torch.float64)

    def function(z, target):
        seen = z != -torch.inf
        seen = seen.scatter(1, target.clamp(min=0).unsqueeze(1), False) | (seen & (target < 0).unsqueeze(1))
        z = torch.where(seen, z, 0.0)
        blocks = [hits[part] for part in spans(len(hits), max(1, BLOCK // max(1, z.numel())))] or [hits]
        return sum([again(block, z, seen, few) for few in blocks]), seen.sum()

    return function


def auc_loss(
    scores: Tensor | Scores, target: Tensor | None = None, *, temperature: float = 0.01, negatives: str = "sum"
) -> Tensor:
    """AUC (Mann–Whitney) loss: L = (1/N) Σ_i Σ_{negatives s of the whole batch} log(1 + e^{(s − s_i⁺)/τ}).

    Sheikholeslami et al., "Optimizing What Matters: AUC-Driven Learning for Robust Neural Retrieval", 2025, arXiv
    2510.00137; no official code found. s_i⁺ is row i's positive, a negative is every other score of every row. Exact: N
    differences per score, O(N² M) of them in plain PyTorch, block by block within the memory budget, and again in the
    backward pass.

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
    total, count = over_chunks(name, scores, _against(hits, temperature), columns, copies=8)
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
