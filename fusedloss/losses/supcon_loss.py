"""Supervised contrastive loss: all rows of the same label are positives."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number, expect
from ..numerics import nll
from ..relation import Other, Rest, Same
from ..scores import Scores
from ..statistics import Count, LogSumExp, Sum
from .pairs import columns_here, labels, pair_scores


def supcon_loss(
    scores: Tensor | Scores,
    label: Tensor,
    *,
    column_label: Tensor | None = None,
    form: str = "out",
    temperature_ratio: float | Tensor = 1.0,
) -> Tensor:
    """Supervised contrastive loss: L = mean_i(log Σ_{j≠i} e^{z_ij} − (1/n_i) Σ_{p≠i, same label} z_ip), n_i positives.

    That is form="out"; "in" has log((1/n_i) Σ_p e^{z_ip}) in place of the mean of z. Prannay Khosla et al., "Supervised
    Contrastive Learning", NeurIPS 2020, arXiv 2004.11362. z = x·x / τ of unit vectors, τ = 0.07 in the official code,
    0.1 in the paper: ``similarity_scores(x, scale=1 / τ, normalize=True)`` with the views of all samples in x. A row
    without a positive has loss 0 and stays in the mean, as in the official code (the paper's formula is 0/0 there;
    pytorch-metric-learning leaves such rows out of the mean).

        label: (N,) integers, labels of the rows. column_label: (M,), those of the columns where these are not the rows;
            row i is column i all the same (the official contrast_mode "one": x the first view, y all views).
        temperature_ratio: τ / τ_base, by which the official code multiplies; 1 by default, there too. A number, or a
            0-dimensional tensor where τ is learned.

    Returns a float32 mean (float64 for float64 scores), 0 for no rows. Raises ValueError or TypeError.
    """
    name = "supcon_loss"
    expect(form in ("out", "in"), name, "form", "out or in", form)
    check_number(name, "temperature_ratio", temperature_ratio, 0, above=True)
    scores = pair_scores(name, scores)
    shape = scores.rows, columns_here(scores)
    expect(shape[0] <= shape[1], name, "scores", "each row among the columns", shape)
    rows, columns = labels(name, scores, "label", label, column_label)
    own = scores.diagonal()
    positives = Same(rows, columns, without=own)
    if form == "out":
        lse, hits, count = scores.reduce(LogSumExp(where=Rest(own)), Sum(where=positives), Count(where=positives))
        losses = lse - hits / count.clamp(min=1)
    else:
        negatives = Other(rows, columns, without=own)
        statistics = LogSumExp(where=negatives), LogSumExp(where=positives), Count(where=positives)
        lse, hits, count = scores.reduce(*statistics)
        losses = nll(lse, torch.where(count == 0, 0.0, hits)) + torch.log(count.clamp(min=1))
    losses = torch.where(count == 0, 0.0, losses)
    return (temperature_ratio * scores.mean(losses)).to(scores.dtype)


def reference(z: Tensor, label, column_label=None, form="out", temperature_ratio=1.0) -> Tensor:
    """The mean, densely."""
    others = torch.arange(z.shape[0], device=z.device)[:, None] != torch.arange(z.shape[1], device=z.device)
    positive = (label[:, None] == (label if column_label is None else column_label)) & others
    some = positive.any(1)
    z, others, positive = z[some], others[some], positive[some]
    count = positive.sum(1, dtype=z.dtype)
    if form == "out":
        hits = torch.where(positive, z, 0.0).sum(1) / count
    else:
        hits = z.masked_fill(~positive, -torch.inf).logsumexp(1) - count.log()
    losses = z.masked_fill(~others, -torch.inf).logsumexp(1) - hits
    return temperature_ratio * losses.sum() / max(1, len(some))


def _label(rows: int, columns: int) -> Tensor:
    """Some labels occur once."""
    return torch.arange(rows) % max(1, 3 * rows // 5)


CASES = (
    {"label": _label},
    {"label": _label, "form": "in"},
    {"label": lambda rows, columns: torch.arange(rows) % 4, "temperature_ratio": 0.1 / 0.07},
)
SCORES = "self"
