"""Log-probabilities of given tokens under a linear output layer: the building block of preference and RL losses."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..numerics import log_partition, nll
from ..relation import Rest
from ..scores import linear_scores
from ..statistics import Expectation, LogSumExp, Score
from ..targets import checked_target, spoilt


class LogProbs(NamedTuple):
    """What `linear_log_probs` returns when more than log p is asked for; each of the shape of target."""

    log_probs: Tensor
    lse: Tensor | None
    entropy: Tensor | None


def linear_log_probs(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | Tensor = 1.0,
    temperature: float = 1.0,
    ignore_index: int = -100,
    return_lse: bool = False,
    return_entropy: bool = False,
    **walk: object,
) -> Tensor | LogProbs:
    """Per-token log p: log softmax(s)_target with s = scale · cap(input · linear_weightᵀ + linear_bias) / temperature.

    The scores are never stored, one pass gives all three results, and all are differentiable in input, weight, bias
    and scale (the backward computes the scores a second time).

    Args:
        input: (*leading, D) hidden states. linear_weight: (V, D). linear_bias: (V,).
        target: (*leading) class indices. Where it is ignore_index all results and their gradients are exactly 0, and
            the row costs no GEMM.
        softcap, scale, temperature, walk (memory_budget, schedule, backend): see `fusedloss.linear_scores`.
        return_lse: also give log Σ_j e^{s_j}. return_entropy: also give −Σ_j p_j log p_j.

    Returns log p (*leading), float32 (float64 for float64 input), or `LogProbs(log_probs, lse, entropy)` with None for
    what was not asked for. log p keeps full relative accuracy where p is near 1; the entropy's error is absolute, of
    the size of the scores' rounding.

    Raises TypeError, ValueError, or IndexError that names the position and value of a target out of range.
    """
    options = dict(bias=linear_bias, softcap=softcap, scale=scale, temperature=temperature, **walk)
    scores = linear_scores(input, linear_weight, **options)
    target, keep, valid = checked_target("linear_log_probs", scores, target, ignore_index)
    asked = [LogSumExp(where=Rest(target)), Score(target)] + ([Expectation()] if return_entropy else [])
    lse_rest, hit, *mean = scores.keeping(keep).reduce(*asked)

    def shown(values: Tensor) -> Tensor:
        return spoilt(torch.where(keep, values, 0.0).to(scores.dtype).reshape(scores.leading), valid)

    log_probs = shown(-nll(lse_rest, hit))
    if not (return_lse or return_entropy):
        return log_probs
    lse = log_partition(lse_rest, hit)
    return LogProbs(log_probs, shown(lse) if return_lse else None, shown(lse - mean[0]) if return_entropy else None)


def reference(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(N,) log p, lse and entropy, densely."""
    log_p = torch.log_softmax(logits, 1)
    entropy = -torch.where(logits == -torch.inf, 0.0, log_p.exp() * log_p).sum(1)
    return log_p.gather(1, target[:, None])[:, 0], logits.logsumexp(1), entropy


CASES = ({}, {"return_lse": True, "return_entropy": True})
