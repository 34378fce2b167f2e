"""From the number of training examples of each class to the arguments of losses for long-tailed data.

Each function takes counts (V,) and returns keyword arguments::

    fusedloss.logit_adjusted_cross_entropy(scores, target, **vector_scaling(counts))
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number, expect


def _checked(name: str, counts: Tensor) -> Tensor:
    expect(counts.dim() == 1, name, "counts", "shape (V,)", counts)
    return counts if counts.is_floating_point() else counts.to(torch.get_default_dtype())


def logit_adjustment(counts: Tensor, tau: float = 1.0) -> dict[str, Tensor]:
    """Shift log(π_j^τ + 1e-12), π = counts / Σ counts, as the official code has it.

    Aditya Krishna Menon et al., "Long-tail learning via logit adjustment", ICLR 2021, arXiv 2007.07314.
    """
    counts = _checked("logit_adjustment", counts)
    return {"class_shift": torch.log((counts / counts.sum()) ** tau + 1e-12)}


def balanced_softmax(counts: Tensor) -> dict[str, Tensor]:
    """Shift log counts_j; a class without examples gets −inf and drops out of the softmax.

    Jiawei Ren et al., "Balanced Meta-Softmax for Long-Tailed Visual Recognition", NeurIPS 2020, arXiv 2007.10740.
    """
    return {"class_shift": torch.log(_checked("balanced_softmax", counts))}


def vector_scaling(counts: Tensor, gamma: float = 0.3, tau: float = 1.0) -> dict[str, Tensor]:
    """Scale (counts_j / max counts)^γ and shift τ log π_j: the VS-loss.

    Ganesh Ramachandra Kini et al., "Label-Imbalanced and Group-Sensitive Classification under Overparameterization",
    NeurIPS 2021, arXiv 2103.01550.
    """
    counts = _checked("vector_scaling", counts)
    return {"class_scale": (counts / counts.max()) ** gamma, "class_shift": tau * torch.log(counts / counts.sum())}


def target_margin(counts: Tensor, largest: float = 0.5) -> dict[str, Tensor]:
    """Margin ∝ counts_j^(−1/4), scaled to a largest one of `largest`: LDAM, which scales cosine scores by 30.

    Kaidi Cao et al., "Learning Imbalanced Datasets with Label-Distribution-Aware Margin Loss", NeurIPS 2019,
    arXiv 1906.07413.
    """
    margin = _checked("target_margin", counts) ** -0.25
    return {"margin": margin * (largest / margin.max())}


def class_balanced_weight(counts: Tensor, beta: float = 0.9999) -> dict[str, Tensor]:
    """Class weights ∝ (1 − β) / (1 − β^counts_j) that sum to V, for a loss' `weight`; a class without examples gets 0.

    Yin Cui et al., "Class-Balanced Loss Based on Effective Number of Samples", CVPR 2019, arXiv 1901.05555.
    """
    check_number("class_balanced_weight", "beta", beta, 0, 1)
    counts = _checked("class_balanced_weight", counts)
    beta = beta.to(counts) if isinstance(beta, torch.Tensor) else counts.new_full((), beta)
    log_beta = torch.log(beta)
    weight = torch.where(counts > 0, (beta - 1) / torch.expm1(counts * log_beta), 0.0)
    return {"weight": weight * (counts.shape[0] / weight.sum())}
