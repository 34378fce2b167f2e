"""Comp-sum losses: one family with logistic, sum-exponential, generalized cross-entropy and mean absolute error."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number, expect
from ..numerics import nll
from ..relation import Rest
from ..row_loss import row_loss
from ..statistics import LogSumExp, Score


@row_loss
def comp_sum_loss(scores, target, *, tau: float = 1.0):
    """Comp-sum loss: L = ((1 + u)^{1−τ} − 1) / (1 − τ), log(1 + u) for τ = 1, with u = Σ_{j≠y} e^{s_j − s_y}.

    Anqi Mao, Mehryar Mohri and Yutao Zhong, "Cross-Entropy Loss Functions: Theoretical Analysis and Applications",
    ICML 2023, arXiv 2304.07288.

        tau: τ ≥ 0; 0 is sum-exponential, 1 logistic (cross-entropy), between 1 and 2 generalized cross-entropy with
            q = τ − 1, 2 mean absolute error 1 − p. For τ < 1 a float32 loss overflows where −log p > 88 / (1 − τ).
    """
    expect(not isinstance(tau, Tensor), "comp_sum_loss", "tau", "a number", tau, TypeError)
    check_number("comp_sum_loss", "tau", tau, 0)
    lse, hit = scores.reduce(LogSumExp(where=Rest(target)), Score(target))
    minus_log_p = nll(lse, hit)  # 1 + u = 1 / p
    return minus_log_p if tau == 1 else torch.expm1((1 - tau) * minus_log_p) / (1 - tau)


def reference(logits: Tensor, target: Tensor, tau=1.0) -> Tensor:
    """(N,) losses, densely."""
    hit = logits.gather(1, target[:, None])
    u = torch.exp(logits - hit).sum(1) - 1
    return torch.log1p(u) if tau == 1 else ((1 + u) ** (1 - tau) - 1) / (1 - tau)


CASES = ({}, {"tau": 0.5}, {"tau": 1.7})
