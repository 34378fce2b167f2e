"""NT-Xent (SimCLR): each view's other view among all other views."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import expect
from ..numerics import nll
from ..relation import Other
from ..scores import Scores
from ..statistics import LogSumExp, Score
from ..targets import checked_target, spoilt
from .pairs import pair_scores


def nt_xent_loss(scores: Tensor | Scores, target: Tensor | None = None) -> Tensor:
    """NT-Xent: L = mean_i(log Σ_{j≠i} e^{z_ij} − z_ip), p the other view of i.

    Ting Chen, Simon Kornblith, Mohammad Norouzi and Geoffrey Hinton, "A Simple Framework for Contrastive Learning of
    Visual Representations", ICML 2020, arXiv 2002.05709. The mean runs over all 2N views, as in the paper; the official
    code adds the means of the two halves, which is twice as much. z = x·x / τ of unit vectors (τ = 0.1 there):
    ``similarity_scores(torch.cat([x1, x2]), scale=1 / τ, normalize=True)``; of x with itself, half of the products do.
    pytorch-metric-learning's NTXentLoss is another loss: it leaves the other positives of the row out.

        scores: of x with itself, or a matrix (2N, 2N).
        target: (2N,) the other view of each row; None: views are stacked, p = i ± N. A row with target −100 has loss 0,
            and stays in the mean.

    Returns a float32 mean (float64 for float64 scores), 0 for no rows. Raises ValueError, TypeError or IndexError.
    """
    name = "nt_xent_loss"
    scores = pair_scores(name, scores, square=True)
    alone = scores.weight is None or scores.weight is scores.input
    expect(alone, name, "scores", "of x with itself, all views in x: similarity_scores(torch.cat([x1, x2]), …)", "of x with y")
    own = scores.diagonal()
    if target is None:
        expect(len(own) % 2 == 0, name, "scores", "an even number of rows, two views of each", len(own))
        target = own.roll(len(own) // 2)  # of the rows that are here
    other, keep, valid = checked_target(name, scores, target, -100)
    if other.device.type == "cpu":  # elsewhere it would wait for the device
        expect(not (keep & (other == own)).any(), name, "target", "another view of each row", "the row itself")
    negatives = Other(other, scores.of_columns(own), without=own)  # all but the row itself and its other view
    losses = nll(*scores.reduce(LogSumExp(where=negatives), Score(other)))
    return spoilt(scores.mean(torch.where(keep, losses, 0.0)), valid).to(scores.dtype)


def reference(z: Tensor, target=None) -> Tensor:
    """The mean, densely."""
    rows = torch.arange(z.shape[0], device=z.device)
    target = rows.roll(len(rows) // 2) if target is None else target
    z = z.masked_fill(torch.eye(len(rows), dtype=torch.bool, device=z.device), -torch.inf)
    return torch.nn.functional.cross_entropy(z, target, reduction="sum") / len(rows)


CASES = (
    {},
    {"target": lambda rows, columns: torch.arange(rows) ^ 1},  # views next to each other
    {"target": lambda rows, columns: torch.where(torch.arange(rows) % 5 == 0, -100, (torch.arange(rows) + 3) % rows)},
)
SCORES = "self"
