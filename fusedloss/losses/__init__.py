"""Losses: one file each, with formula, citation, function, `reference` (dense, plain PyTorch) and `CASES`."""

from __future__ import annotations

from types import ModuleType

import torch

from . import (
    auc_loss,
    bpr_loss,
    circle_loss,
    comp_sum_loss,
    cosine_contrastive_loss,
    cross_entropy,
    focal_loss,
    generalized_cross_entropy,
    logit_adjusted_cross_entropy,
    margin_softmax_loss,
    mean_absolute_error_loss,
    multi_similarity_loss,
    normalized_cross_entropy,
    number_token_loss,
    one_vs_rest_loss,
    pairwise_softmax_loss,
    poly_focal_loss,
    poly_loss,
    sigmoid_focal_loss,
    spherical_softmax_loss,
    spherical_z_loss,
    squared_error_loss,
    squentropy,
    taylor_softmax_loss,
    triplet_loss,
)

LOSSES: tuple[ModuleType, ...] = (
    cross_entropy,
    focal_loss,
    sigmoid_focal_loss,
    poly_loss,
    poly_focal_loss,
    generalized_cross_entropy,
    comp_sum_loss,
    normalized_cross_entropy,
    mean_absolute_error_loss,
    logit_adjusted_cross_entropy,
    number_token_loss,
    one_vs_rest_loss,
    squentropy,
    squared_error_loss,
    spherical_z_loss,
    spherical_softmax_loss,
    taylor_softmax_loss,
)

# Of scores between embeddings: x with y, x with itself, x with class vectors, as each says in SCORES.
PAIR_LOSSES: tuple[ModuleType, ...] = (
    multi_similarity_loss,
    circle_loss,
    triplet_loss,
    margin_softmax_loss,
    cosine_contrastive_loss,
    pairwise_softmax_loss,
    bpr_loss,
    auc_loss,
)


def name_of(module: ModuleType) -> str:
    """The loss' name: of its file, its function, its tests and its benchmark."""
    return module.__name__.rpartition(".")[2]


def function_of(module: ModuleType):
    """The public function of a loss' file."""
    return getattr(module, name_of(module))


def hyperparameters(case: dict, columns: int, dtype: torch.dtype = torch.float32, device: object = None) -> dict:
    """An entry of CASES for so many classes: tensors stand there as functions of their number."""
    made = {name: value(columns) if callable(value) else value for name, value in case.items()}
    for name, value in made.items():
        if isinstance(value, torch.Tensor):
            made[name] = value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    return made
