"""CWCL: CLIP's loss with weights in [0, 1] from a frozen encoder in place of one positive a row."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import expect
from ..numerics import log_partition, nll
from ..relation import Rest
from ..scores import FLOATING, Scores
from ..similarity import unit
from ..statistics import Columns, LogSumExp, Score, Sum
from .pairs import pair_scores


def cwcl_loss(scores: Tensor | Scores, teacher: Tensor) -> Tensor:
    """CWCL: L = mean_i(log Σ_j e^{z_ij} − Σ_j w_ij z_ij / Σ_j w_ij) + mean_j(log Σ_i e^{z_ij} − z_jj).

    w_ij = (1 + u_i·u_j) / 2, u the teacher's embeddings brought to length 1. Rakshith Sharma Srinivasa et al., "CWCL:
    Cross-Modal Transfer with Continuously Weighted Contrastive Loss", NeurIPS 2023, arXiv 2309.14580: weighted from the
    strong modality, CLIP's loss back, summed and not averaged. No official code; the formula as others quote it.

    The weights are linear in u, and the scores in x: Σ_j w_ij z_ij = v_iᵀ (Σ_j v_j y_jᵀ) x_i with v = (1, u) / √2,
    which takes N·D·D_u products and no score. The rest is one sweep, as for `clip_loss`.

        scores: `similarity_scores(x, y, …)` or a matrix, N × N: x_i and y_i are a pair.
        teacher: (N, D_u), one embedding per pair, of the frozen side; no gradient flows into it.

    Returns a float32 mean (float64 for float64 scores), 0 for no pairs. Raises ValueError or TypeError.
    """
    name = "cwcl_loss"
    scores = pair_scores(name, scores, square=True)
    expect(isinstance(teacher, Tensor) and teacher.dtype in FLOATING, name, "teacher", "embeddings", teacher, TypeError)
    shape = teacher.dim() == 2 and len(teacher) == scores.rows
    expect(shape, name, "teacher", f"({scores.rows}, D_u), an embedding for each pair", teacher)
    plain = type(scores) is Scores and not scores.softcap and scores.bias is None and scores.class_scale is None
    expect(plain, name, "scores", "similarity_scores(x, y, …) of one process, or a matrix", type(scores).__name__)
    own = scores.diagonal()
    u = unit(teacher.detach().to(scores.dtype))
    v = torch.cat([torch.ones_like(u[:, :1]), u], 1) / 2**0.5
    rest = LogSumExp(where=Rest(own))
    asked = [rest, Columns(rest), Score(own)]
    with torch.autocast(u.device.type, enabled=False):
        total = (v @ v.sum(0)).double()
        weights = v @ v.t() if scores.weight is None else None  # as large as the given matrix
    if scores.weight is None:
        rows, columns, hit, weighted = scores.reduce(*asked, Sum(weights))
    else:
        rows, columns, hit = scores.reduce(*asked)
        weighted = _weighted(scores, v)
    there = log_partition(rows, hit) - weighted / total
    return (scores.mean(there) + scores.mean(nll(columns, hit))).to(scores.dtype)


def _weighted(scores: Scores, v: Tensor) -> Tensor:
    """Σ_j (v_i·v_j) z_ij of each row."""
    x, y = (t.to(scores.multiply_dtype).to(v.dtype) for t in (scores.input, scores.weight))
    with torch.autocast(v.device.type, enabled=False):
        sums = (x * (v @ (v.t() @ y))).sum(1) * scores.scale
        return (sums if scores.class_shift is None else sums + v @ (v.t() @ scores.class_shift.to(v.dtype))).double()


def reference(z: Tensor, teacher) -> Tensor:
    """The mean, densely."""
    own = torch.arange(z.shape[0], device=z.device)
    u = torch.nn.functional.normalize(teacher.to(z.dtype), dim=1)
    w = (1 + u @ u.t()) / 2
    there = z.logsumexp(1) - (w * z).sum(1) / w.sum(1)
    return there.mean() + torch.nn.functional.cross_entropy(z.t(), own)


CASES = ({"teacher": lambda rows, columns: torch.arange(6.0 * rows).reshape(rows, 6).mul(0.7).sin()},)
SCORES = "pair"
