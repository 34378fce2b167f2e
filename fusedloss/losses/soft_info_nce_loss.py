"""Soft-InfoNCE: negatives that a teacher finds similar count less."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_constant, expect
from ..dense import dense_scores
from ..numerics import nll
from ..scores import Scores
from .pairs import pair_scores
from .row_chunks import over_chunks


def soft_info_nce_loss(
    scores: Tensor | Scores, teacher: Tensor | Scores, *, alpha: float = 1.0, beta: float = 1.0, least: float = 0.1
) -> Tensor:
    """Soft-InfoNCE: L = mean_i(log(e^{z_ii} + Σ_{j≠i} w_ij e^{z_ij}) − z_ii).

    w = max(0.1, (β − α π) / (β − α / (M − 1))), π the softmax over j ≠ i of the teacher's scores. Haochen Li, Xin
    Zhou, Luu Anh Tuan and Chunyan Miao, "Rethinking Negative Pairs in Code Search", EMNLP 2023, arXiv 2310.08069; z
    are raw dot products there. The official code adds 1e-15 inside the logarithm, which caps the loss at 34.5; left
    out here.

    The maximum with 0.1 needs π, hence all of a row, before a weight is known: it is no statistic. The loss walks
    chunks of rows in plain PyTorch instead, and computes each again in the backward pass: six products of N × M, two of
    them the teacher's, on no compiled backend, and chunk · M scores of memory.

        scores: `similarity_scores(x, y, …)` or a matrix, N × M, N ≤ M: x_i and y_i are a pair.
        teacher: the teacher's scores, divided by its temperature t: `similarity_scores(u, v, scale=1 / t)` or a
            matrix, N × M. No gradient flows into it.
        alpha, beta: α ≥ 0, β > α / (M − 1). least: the 0.1.

    Returns a float32 mean (float64 for float64 scores), 0 for no rows.
    """
    name = "soft_info_nce_loss"
    check_constant(name, "alpha", alpha, 0)
    check_constant(name, "least", least, 0, above=True)
    scores = pair_scores(name, scores)
    teacher = pair_scores(name, teacher, "teacher")
    shape, theirs = (scores.rows, scores.columns), (teacher.rows, teacher.columns)
    expect(shape[0] <= shape[1], name, "scores", "each row's positive among the columns, N ≤ M", shape)
    expect(theirs == shape, name, "teacher", f"{shape} scores", theirs)
    expect(type(teacher) is Scores, name, "teacher", "scores of one process", type(teacher).__name__)
    others = max(0, shape[1] - 1)
    if others > 1:  # a single negative has weight 1, whatever α and β are
        check_constant(name, "beta", beta, alpha / others, above=True)
    guide, *made, _ = teacher.streams()

    def losses(z, at, guide):
        at = at.unsqueeze(1)
        with torch.no_grad():
            pi = dense_scores(guide, *made, teacher.softcap, teacher.scale, teacher.multiply_dtype)
            pi = pi.scatter(1, at, -torch.inf).softmax(1)
            w = (beta - alpha * pi) / (beta - alpha / others) if others > 1 else torch.ones_like(pi)
        negatives = (z + w.clamp(min=least).log().to(z.dtype)).scatter(1, at, -torch.inf)
        return (nll(negatives.logsumexp(1).double(), z.gather(1, at)[:, 0].double()).sum(),)

    (total,) = over_chunks(name, scores, losses, scores.diagonal(), guide.detach(), copies=5)
    return (total / max(1, shape[0])).to(scores.dtype)


def reference(z: Tensor, teacher, alpha=1.0, beta=1.0, least=0.1) -> Tensor:
    """The mean, densely."""
    own = torch.eye(*z.shape, dtype=torch.bool, device=z.device)
    pi = teacher.to(z.dtype).masked_fill(own, -torch.inf).softmax(1)
    w = torch.where(own, 1.0, ((beta - alpha * pi) / (beta - alpha / max(1, z.shape[1] - 1))).clamp(min=least))
    return ((z + w.log()).logsumexp(1) - z.diagonal()).mean()


def _teacher(rows: int, columns: int) -> Tensor:
    return torch.arange(float(rows * columns)).reshape(rows, columns).mul(0.7).sin().mul(4)


CASES = ({"teacher": _teacher}, {"teacher": _teacher, "beta": 2.0, "least": 0.3})
SCORES = "pair"
