"""Scalar functions in the forms that stay exact where the textbook form does not."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def softplus(u: Tensor) -> Tensor:
    """log(1 + e^u). Beyond u = 36 the linear branch is exact to the last bit in float64 (torch switches at 20)."""
    return F.softplus(u, threshold=36.0)


def nll(lse_rest: Tensor, hit: Tensor) -> Tensor:
    """-log p of the target from the log-sum-exp over the *other* classes and the target's own score.

    ``lse - hit`` rounds to 0 in fp32 once p is within 1e-7 of 1; this keeps full relative accuracy.
    """
    return softplus(lse_rest - hit)


def log_partition(lse_rest: Tensor, hit: Tensor) -> Tensor:
    """log-sum-exp over all classes, from the same two statistics."""
    return torch.logaddexp(lse_rest, hit)
