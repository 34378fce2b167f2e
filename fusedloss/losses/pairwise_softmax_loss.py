"""Pairwise softmax losses of recommenders: SL, and PSL with a surrogate that grows slower than the exponential."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_constant, expect
from ..numerics import softplus
from ..relation import Rest
from ..row_loss import row_loss
from ..scores import Scores
from ..statistics import LogSumExp, LogSumExpOf, Score
from .bpr_loss import positive_scores
from .pairs import COMMON, pair_scores, positives

SCORES = "pair"
FORMS = ("sl", "tanh", "atan", "relu")


def _finished(lse: Tensor, include_positive: bool) -> Tensor:
    """The positive's own term is σ(0) = 1."""
    return softplus(lse) if include_positive else torch.where(lse == -torch.inf, 0.0, lse)


@row_loss
def _pairwise_softmax_loss__of_exponentials(scores, target, *, temperature, include_positive):
    lse, hit = scores.reduce(LogSumExp(1 / temperature, Rest(target)), Score(target))
    return _finished(lse - hit / temperature, include_positive)


@row_loss
def _pairwise_softmax_loss__of_surrogates(scores, target, hit, *, form, temperature, include_positive):
    lse = scores.reduce(LogSumExpOf(f"log_{form}", weight=1 / temperature, row=hit, where=Rest(target)))
    return _finished(lse, include_positive)


def pairwise_softmax_loss(
    scores: Tensor | Scores,
    target: Tensor | None = None,
    *,
    form: str = "tanh",
    temperature: float = 0.2,
    include_positive: bool = False,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Pairwise softmax loss: L = log Σ_{j≠y} σ(s_j − s_y)^{1/τ}, y the positive.

    Weiqin Yang, Jiawei Chen, Xin Xin, Sheng Zhou, Binbin Hu, Yan Feng, Chun Chen and Can Wang, "PSL: Rethinking and
    Improving Softmax Loss from Pairwise Perspective for Recommendation", NeurIPS 2024, arXiv 2411.00163. Of its scores
    cos / 2, differences are in [−1, 1]: ``similarity_scores(x, y, scale=0.5, normalize=True)`` (cosines for "sl"). The
    official code draws 1000 negatives; here all other columns are negatives.

        form: σ(d) = "tanh": tanh d + 1, "atan": arctan d + 1, "relu": [d + 1]₊, "sl": e^d (softmax loss). Columns with
            σ = 0 do not count.
        temperature: τ, outside of σ.
        include_positive: j = y in the sum too, as in the paper; the official code leaves it out. Without it, a row for
            which no column counts has loss 0 (log 0 there).
    """
    name = "pairwise_softmax_loss"
    expect(form in FORMS, name, "form", ", ".join(FORMS), form)
    check_constant(name, "temperature", temperature, 0, above=True)
    scores = pair_scores(name, scores)
    target = positives(name, scores, target)
    options = dict(temperature=temperature, include_positive=include_positive)
    common = dict(row_weight=row_weight, ignore_index=ignore_index, reduction=reduction)
    if form == "sl":
        return _pairwise_softmax_loss__of_exponentials(scores, target, **options, **common)
    hit = positive_scores(name, scores, target, ignore_index)
    return _pairwise_softmax_loss__of_surrogates(scores, target, hit, form=form, **options, **common)


pairwise_softmax_loss.__doc__ += COMMON


def reference(z: Tensor, target=None, form="tanh", temperature=0.2, include_positive=False) -> Tensor:
    """The mean, densely."""
    target = torch.arange(len(z), device=z.device) if target is None else target
    d = z - z.gather(1, target.unsqueeze(1))
    grown = {"sl": d.exp, "tanh": lambda: d.tanh() + 1, "atan": lambda: d.atan() + 1, "relu": lambda: torch.relu(d + 1)}
    sigma = grown[form]()
    counts = sigma > 0
    if not include_positive:
        counts = counts.scatter(1, target.unsqueeze(1), False)
    lse = torch.where(counts, torch.where(counts, sigma, 1.0).log() / temperature, -torch.inf)
    some = counts.any(1)
    return torch.where(some, torch.where(some.unsqueeze(1), lse, 0.0).logsumexp(1), 0.0).mean()


CASES = tuple({"form": form} for form in FORMS) + ({"temperature": 0.5, "include_positive": True},)
