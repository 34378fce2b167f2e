"""Margins on the cosine of the target: what `margin_softmax_loss` puts in its place."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..relation import Rest
from ..statistics import LogSumExp, LogSumExpOf

# m of insightface (arcface_torch), of AdaFace's and of circle loss' papers.
MARGINS = {"none": 0.0, "cosface": 0.4, "arcface": 0.5, "adaface": 0.4, "circle": 0.25}
NEAR = {"arcface": 1e-7, "adaface": 1e-3}  # |cos| is cut off so far below 1, where an angle's slope is infinite


def with_margin(cos: Tensor, quality: Tensor, margin: str, m: float, easy_margin: bool) -> Tensor:
    """ψ(cos) of the target's cosine."""
    if margin == "circle":
        return torch.relu(1 + m - cos).detach() * (cos - (1 - m))
    if margin not in NEAR:
        return cos - m
    cut = cos.clamp(NEAR[margin] - 1, 1 - NEAR[margin])
    if margin == "adaface":
        angle = (torch.acos(cut) - m * quality).clamp(NEAR[margin], math.pi - NEAR[margin])
        return torch.cos(angle) - (m + m * quality)
    turned = cut * math.cos(m) - (1 - cut.square()).sqrt() * math.sin(m)  # cos(θ + m)
    if easy_margin:
        return torch.where(cos > 0, turned, cos)
    return torch.where(cos > -math.cos(m), turned, cos - m * math.sin(m))


def rest_of(target: Tensor, margin: str, m: float, scale: float) -> LogSumExp | LogSumExpOf:
    """The log-sum-exp over the classes that are not the target."""
    if margin == "circle":
        return LogSumExpOf("circle", weight=scale, parameter=m, where=Rest(target))
    return LogSumExp(scale, Rest(target))


def feature_quality(norm: Tensor, mean: float | Tensor, deviation: float | Tensor, h: float) -> Tensor:
    """AdaFace's q in [−1, 1]: how long a feature vector is, measured by the lengths seen so far; a constant."""
    return (h * (norm.detach().clamp(0.001, 100) - mean) / (deviation + 1e-3)).clamp(-1, 1)
