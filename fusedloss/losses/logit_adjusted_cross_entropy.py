"""Cross-entropy of scores that are scaled and shifted per class: the losses for long-tailed data in one."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import expect
from ..numerics import nll
from ..relation import Rest
from ..row_loss import COMMON, row_loss
from ..scores import Scores, as_scores
from ..statistics import LogSumExp, Score


@row_loss
def _logit_adjusted_cross_entropy(scores, target, *, margin: Tensor | None = None):
    lse, hit = scores.reduce(LogSumExp(where=Rest(target)), Score(target))
    return nll(lse, hit if margin is None else hit - margin[target])


def logit_adjusted_cross_entropy(
    scores: Tensor | Scores,
    target: Tensor,
    *,
    class_shift: Tensor | None = None,
    class_scale: Tensor | None = None,
    margin: Tensor | None = None,
    weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Adjusted cross-entropy: L = −log softmax(z)_y, z_j = c_j (s_j − m_j [j = y]) + t_j.

    One formula for logit adjustment and balanced softmax (t), vector scaling (c, t), and LDAM (m, and c or the scores'
    own `scale`). `fusedloss.class_counts` makes the vectors from the classes' counts, and cites the papers; the first
    is Aditya Krishna Menon, Sadeep Jayasumana, Ankit Singh Rawat, Himanshu Jain, Andreas Veit and Sanjiv Kumar,
    "Long-tail learning via logit adjustment", ICLR 2021, arXiv 2007.07314; the others are arXiv 2007.10740, 2103.01550
    and 1906.07413.

        class_shift: t (V,), added after the scale; −inf takes a class out.
        class_scale: c (V,). margin: m (V,), taken off the target's score. All three may be learnable.
    """
    name = "logit_adjusted_cross_entropy"
    scores = as_scores(scores)
    for argument, given in (("class_shift", class_shift), ("class_scale", class_scale), ("margin", margin)):
        right = given is None or given.shape == (scores.columns,)
        expect(right, name, argument, f"shape ({scores.columns},) or None", given)
    if margin is not None:  # taken off before the scale, which the statistics have applied already
        margin = (margin if class_scale is None else class_scale * margin).to(scores.dtype)
    options = dict(weight=weight, row_weight=row_weight, ignore_index=ignore_index, reduction=reduction)
    return _logit_adjusted_cross_entropy(scores.adjusted(class_scale, class_shift), target, margin=margin, **options)


logit_adjusted_cross_entropy.__doc__ += COMMON


def reference(logits: Tensor, target: Tensor, class_shift=None, class_scale=None, margin=None) -> Tensor:
    """(N,) losses, densely."""
    z = logits
    if margin is not None:
        z = z - margin * torch.nn.functional.one_hot(target, z.shape[1])
    z = z if class_scale is None else z * class_scale
    z = z if class_shift is None else z + class_shift
    return torch.nn.functional.cross_entropy(z, target, reduction="none")


def _line(first: float, last: float):
    return lambda columns: torch.linspace(first, last, columns)


CASES = (
    {"class_shift": _line(0, -4)},
    {"class_shift": _line(0, -4), "class_scale": _line(1, 0.3)},
    {"class_scale": _line(3, 3), "margin": _line(0.1, 0.5)},
)
