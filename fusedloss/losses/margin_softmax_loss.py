"""Softmax of cosines with a margin at the target: CosFace, ArcFace, AdaFace, and circle loss for classes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import check_constant, expect
from ..numerics import nll
from ..row_loss import COMMON, row_loss
from ..scores import Scores
from ..statistics import Score
from .cosine_margins import MARGINS, feature_quality, rest_of, with_margin
from .pairs import pair_scores

SCORES = "classes"


@row_loss
def _margin_softmax_loss(scores, target, quality, *, margin, m, scale, easy_margin):
    lse, cos = scores.reduce(rest_of(target, margin, m, scale), Score(target))
    return nll(lse, scale * with_margin(cos, quality, margin, m, easy_margin))


def margin_softmax_loss(
    scores: Tensor | Scores,
    target: Tensor,
    *,
    margin: str = "arcface",
    m: float | None = None,
    scale: float = 64.0,
    easy_margin: bool = False,
    norm: Tensor | None = None,
    norm_mean: float | Tensor = 20.0,
    norm_deviation: float | Tensor = 100.0,
    h: float = 0.333,
    weight: Tensor | None = None,
    row_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Softmax with a margin: L = log(e^{s ψ(c_y)} + Σ_{j≠y} e^{s c_j}) − s ψ(c_y), c cosines.

    ``similarity_scores(x, class_weight, normalize=True)``. With c = cos θ of the target, ψ is, by ``margin``:
        "none": c; NormFace, Wang et al., 2017, arXiv 1704.06369. (Its learnable s: `cross_entropy` of scaled scores.)
        "cosface": c − m; Wang et al., CVPR 2018, arXiv 1801.09414. m = 0.4 as in insightface, 0.35 in the paper.
        "arcface": cos(θ + m), where θ > π − m c − m sin m; with easy_margin c where c ≤ 0. Deng et al., CVPR 2019,
            arXiv 1801.07698. m = 0.5. |c| is cut off at 1 − 1e-7, with slope 0 beyond.
        "adaface": cos(θ − m q) − m (1 + q), q = h (norm − mean) / deviation cut to [−1, 1]; Kim, Jain and Liu, CVPR
            2022, arXiv 2204.00964. m = 0.4. |c| is cut off at 1 − 1e-3, as in the official code.
        "circle": [1 + m − c]₊ (c − 1 + m), and [c_j + m]₊ (c_j − m) for the others, brackets constant for the gradient;
            Sun et al., CVPR 2020, arXiv 2002.10857. m = 0.25, scale 256 for faces.

        m: None for the value above. scale: s, 64 as in the official codes. norm: (N,), AdaFace's: lengths of x before
            they were normalised, constants for the gradient; norm_mean, norm_deviation: their running mean and
            deviation, this batch's entered already (`nn.MarginSoftmaxLoss` keeps them).
    """
    name = "margin_softmax_loss"
    scores = pair_scores(name, scores)
    expect(margin in MARGINS, name, "margin", ", ".join(MARGINS), margin)
    m = MARGINS[margin] if m is None else m
    check_constant(name, "m", m)
    check_constant(name, "scale", scale, 0, above=True)
    given = None if norm is None else tuple(norm.shape)
    expect(given == ((scores.rows,) if margin == "adaface" else None), name, "norm", "(N,) for adaface only", given)
    norm = torch.zeros(scores.rows, device=scores.input.device) if norm is None else norm
    quality = feature_quality(norm, norm_mean, norm_deviation, h)
    options = dict(margin=margin, m=m, scale=scale, easy_margin=easy_margin)
    common = dict(weight=weight, row_weight=row_weight, ignore_index=ignore_index, reduction=reduction)
    return _margin_softmax_loss(scores, target, quality, **options, **common)


margin_softmax_loss.__doc__ += COMMON


def reference(z: Tensor, target, margin="arcface", m=None, scale=64.0, easy_margin=False, norm=None, h=0.333) -> Tensor:
    """The mean, densely, with angles; AdaFace with its first running statistics."""
    m, cos = MARGINS[margin] if m is None else m, z.gather(1, target.unsqueeze(1)).squeeze(1)
    others = torch.relu(z + m).detach() * (z - m) if margin == "circle" else z
    psi = torch.relu(1 + m - cos).detach() * (cos - 1 + m) if margin == "circle" else cos - m
    if margin == "arcface":
        beyond = cos if easy_margin else cos - m * math.sin(math.pi - m)
        turned = torch.cos(torch.acos(cos.clamp(1e-7 - 1, 1 - 1e-7)) + m)
        psi = torch.where(cos > (0 if easy_margin else math.cos(math.pi - m)), turned, beyond)
    if margin == "adaface":
        q = (h * (norm.clamp(0.001, 100) - 20) / (100 + 1e-3)).clamp(-1, 1)
        psi = torch.cos((torch.acos(cos.clamp(-0.999, 0.999)) - m * q).clamp(1e-3, math.pi - 1e-3)) - (m + m * q)
    return torch.nn.functional.cross_entropy(scale * others.scatter(1, target.unsqueeze(1), psi.unsqueeze(1)), target)


CASES = tuple(
    {"target": lambda rows, columns: (3 * torch.arange(rows) + 1) % columns, **options}
    for options in (
        *({"margin": margin} for margin in ("arcface", "cosface", "circle", "none")),
        {"margin": "adaface", "norm": lambda rows, columns: 40.0 * torch.arange(rows)},
        {"margin": "arcface", "easy_margin": True, "m": 1.2},
    )
)
