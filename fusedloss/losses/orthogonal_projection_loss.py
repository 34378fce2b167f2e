"""Orthogonal projection loss: similar within a class, orthogonal between classes."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number, expect
from ..relation import Other, Same
from ..scores import Scores
from ..statistics import Count, Sum, SumOf
from ..symmetric import add_at
from .pairs import labels, pair_scores

GUARD = 1e-6  # the official code's, beside the numbers of pairs


def orthogonal_projection_loss(
    scores: Tensor | Scores, label: Tensor, *, form: str = "identity", gamma: float | Tensor = 0.5
) -> Tensor:
    """Orthogonal projection: L = 1 − Σ⁺ s_ij / (n⁺ + 1e-6) + γ Σ⁻ φ(s_ij) / (n⁻ + 1e-6).

    Σ⁺ runs over the n⁺ pairs i ≠ j of the same label, Σ⁻ over the n⁻ of different ones. Kanchana Ranasinghe,
    Muzammal Naseer, Munawar Hayat, Salman Khan and Fahad Shahbaz Khan, "Orthogonal Projection Loss", ICCV 2021,
    arXiv 2103.14021. Of the official code loss.py has φ(s) = s and γ = 0.5 (form="identity"), the CIFAR and
    ImageNet trainings φ(s) = |s| and γ = 2 (form="abs"); both divide by n + 1e-6, and the loss is added to
    cross-entropy with weight 1. s are cosines: ``similarity_scores(x, normalize=True)``.

    With φ(s) = s the sums over pairs are squared lengths of the classes' sums, Σ_{i, j of a class} x_i·x_j = ‖Σ_i
    x_i‖²: N·D additions and no score, in float64, for the own terms are taken off. |s| takes one sweep.

        scores: of x with itself, or a matrix (N, N). label: (N,) integers. gamma: γ ≥ 0, may be a tensor.

    Returns a float32 number (float64 for float64 scores), 0 for no rows. Raises ValueError or TypeError.
    """
    name = "orthogonal_projection_loss"
    expect(form in ("identity", "abs"), name, "form", "identity or abs", form)
    check_number(name, "gamma", gamma, 0)
    scores = pair_scores(name, scores, square=True)
    rows, columns = labels(name, scores, "label", label, None)
    if scores.columns == 0:
        return scores.input.sum().to(scores.dtype)
    if form == "identity" and scores.symmetric and type(scores) is Scores:  # all of the rows are here
        near, far, n_near, n_far = _by_classes(scores, rows)
    else:
        same, other = Same(rows, columns, without=scores.diagonal()), Other(rows, columns)
        signs = [SumOf("hinge", factor=sign, where=other) for sign in (1.0, -1.0)]  # |s| = max(0, s) + max(0, −s)
        far = [Sum(where=other)] if form == "identity" else signs
        near, n_near, n_far, *far = scores.reduce(Sum(where=same), Count(where=same), Count(where=other), *far)
        near, far, n_near, n_far = (scores.mean(t) for t in (near, sum(far), n_near, n_far))
    guard = GUARD / scores.columns  # all four are divided by the number of rows, that of columns
    return (1 - near / (n_near + guard) + gamma * far / (n_far + guard)).to(scores.dtype)


def _by_classes(scores: Scores, label: Tensor) -> tuple[Tensor, ...]:
    """Sums of scores over pairs of the same and of different labels, and their numbers; all divided by the rows."""
    x = scores.input.to(scores.multiply_dtype).double()
    x = torch.cat([x, torch.ones_like(x[:, :1])], 1)  # products of the last column count pairs
    ordered, order = label.sort()
    number = torch.cumsum(torch.diff(ordered, prepend=ordered[:1]) != 0, 0)  # 0, 1, … of the classes in order
    sums = torch.zeros_like(x)
    add_at(sums, number, x.index_select(0, order))
    squares = [(t * t).sum(0) for t in (x, sums, x.sum(0, keepdim=True))]  # of single rows, of classes, of all
    each, within, all_of = (torch.stack([s[:-1].sum(), s[-1]]) / len(x) for s in squares)
    (near, n_near), (far, n_far) = within - each, all_of - within
    shift = 0.0 if scores.class_shift is None else scores.class_shift.double().mean()
    # Without pairs a sum is a rounding error, which the guard in the divisor would blow up.
    near, far = [(scores.scale * t + shift * n) * (n > 0) for t, n in ((near, n_near), (far, n_far))]
    return near, far, n_near, n_far


def reference(z: Tensor, label, form="identity", gamma=0.5) -> Tensor:
    """Densely."""
    same = label[:, None] == label
    near = same & ~torch.eye(len(label), dtype=torch.bool, device=z.device)
    far = z if form == "identity" else z.abs()
    shares = [t[pairs].sum() / (pairs.sum().to(z.dtype) + GUARD) for t, pairs in ((z, near), (far, ~same))]
    return 1 - shares[0] + gamma * shares[1]


def _label(rows: int, columns: int) -> Tensor:
    return torch.arange(rows) * 7 % 4


CASES = ({"label": _label}, {"label": _label, "form": "abs", "gamma": 2.0})
SCORES = "self"
