"""Squentropy: cross-entropy plus the mean squared score of the wrong classes."""

import torch
from torch import Tensor

from ..checks import expect
from ..numerics import nll
from ..relation import Rest
from ..row_loss import row_loss
from ..statistics import LogSumExp, Score, SumOfSquares


@row_loss
def squentropy(scores, target):
    """Squentropy: L = −log p_y + (1 / (V − 1)) Σ_{j≠y} s_j².

    Like Hui, Mikhail Belkin and Stephen Wright, "Cut your Losses with Squentropy", ICML 2023, arXiv 2302.03952. No
    hyperparameter; the vision code's multiplier of the square term is 1 here, as in the paper. Needs V ≥ 2.
    """
    expect(scores.columns >= 2, "squentropy", "scores", "at least two classes", scores.columns)
    others = Rest(target)  # Σ_j s_j² − s_y² would cancel: leave the target out while summing
    lse, hit, squares = scores.reduce(LogSumExp(where=others), Score(target), SumOfSquares(where=others))
    return nll(lse, hit) + squares / (scores.columns - 1)


def reference(logits: Tensor, target: Tensor) -> Tensor:
    """(N,) losses, densely."""
    hit = logits.gather(1, target[:, None])[:, 0]
    squares = torch.where(logits == -torch.inf, 0.0, logits).square().sum(1) - hit.square()
    return logits.logsumexp(1) - hit + squares / (logits.shape[1] - 1)


CASES = ({},)
