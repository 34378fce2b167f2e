"""CLIP's loss: InfoNCE from rows to columns and from columns to rows, in one sweep."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics import nll
from ..relation import Rest
from ..scores import Scores
from ..statistics import Columns, LogSumExp, Score
from .pairs import pair_scores


def clip_loss(scores: Tensor | Scores) -> Tensor:
    """CLIP's symmetric loss: L = ½ mean_i(log Σ_j e^{z_ij} − z_ii) + ½ mean_j(log Σ_i e^{z_ij} − z_jj).

    Alec Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021, arXiv
    2103.00020. z = e^{t'} x·y of unit vectors: `similarity_scores` with ``scale=t.exp()`` and normalize=True; t' starts
    at log(1 / 0.07), and the official code keeps it ≤ log 100 after each step. A bias shared by all pairs changes
    nothing. One sweep gathers the log-sum-exps of rows and of columns.

        scores: `similarity_scores(x, y, …)` or a matrix, N × N: x_i and y_i are a pair. With more columns than rows
            only one side is defined: `info_nce_loss`.

    Returns a float32 mean (float64 for float64 scores), 0 for no pairs. Raises ValueError when N ≠ M.
    """
    scores = pair_scores("clip_loss", scores, square=True)
    own = scores.diagonal()
    rest = LogSumExp(where=Rest(own))
    rows, columns, hit = scores.reduce(rest, Columns(rest), Score(own))
    return ((scores.mean(nll(rows, hit)) + scores.mean(nll(columns, hit))) / 2).to(scores.dtype)


def reference(z: Tensor) -> Tensor:
    """The mean, densely."""
    own = torch.arange(z.shape[0], device=z.device)
    both = [torch.nn.functional.cross_entropy(side, own) for side in (z, z.t())]
    return (both[0] + both[1]) / 2


CASES = ({},)
SCORES = "pair"
