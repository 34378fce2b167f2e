"""Losses: one file each, with formula, citation, function, `reference` (dense, plain PyTorch) and `CASES`."""

from __future__ import annotations

from types import ModuleType

import torch

from . import (
    auc_loss,
    bixse_loss,
    bpr_loss,
    circle_loss,
    clip_loss,
    comp_sum_loss,
    cosine_contrastive_loss,
    cross_entropy,
    cwcl_loss,
    entmax15_loss,
    focal_loss,
    generalized_cross_entropy,
    info_nce_loss,
    logit_adjusted_cross_entropy,
    margin_softmax_loss,
    mean_absolute_error_loss,
    multi_similarity_loss,
    normalized_cross_entropy,
    nt_xent_loss,
    number_token_loss,
    one_vs_rest_loss,
    orthogonal_projection_loss,
    pairwise_softmax_loss,
    poly_focal_loss,
    poly_loss,
    sigmoid_focal_loss,
    sigmoid_loss,
    soft_info_nce_loss,
    sparsemax_loss,
    spherical_softmax_loss,
    spherical_z_loss,
    squared_error_loss,
    squentropy,
    supcon_loss,
    taylor_softmax_loss,
    triplet_loss,
)

# Of scores and classes.
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
    sparsemax_loss,
    entmax15_loss,
)

# Of similarities of pairs. SCORES in each file says whose: "pair" (x with y, N ≤ M), "self" (x with itself), "classes"
# (x with class weights).
PAIR_LOSSES: tuple[ModuleType, ...] = (
    sigmoid_loss,
    bixse_loss,
    info_nce_loss,
    clip_loss,
    nt_xent_loss,
    supcon_loss,
    soft_info_nce_loss,
    cwcl_loss,
    orthogonal_projection_loss,
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
    return _made({name: value(columns) if callable(value) else value for name, value in case.items()}, dtype, device)


def pair_arguments(
    case: dict, rows: int, columns: int, dtype: torch.dtype = torch.float32, device: object = None
) -> dict:
    """An entry of CASES of a pair loss for so many rows and columns: tensors stand there as functions of the two."""
    made = {name: value(rows, columns) if callable(value) else value for name, value in case.items()}
    return _made(made, dtype, device)


def _made(arguments: dict, dtype: torch.dtype, device: object) -> dict:
    for name, value in arguments.items():
        if isinstance(value, torch.Tensor):
            arguments[name] = value.to(device=device, dtype=dtype if value.is_floating_point() else None)
    return arguments
