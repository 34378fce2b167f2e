"""Entmax-1.5 loss: the loss whose gradient is entmax15(s) − y, zero where the target leads by 2."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sorting.threshold import ENTMAX15
from .fenchel_young import fenchel_young_loss


@fenchel_young_loss(ENTMAX15)
def entmax15_loss(scores, target):
    """Entmax-1.5 loss: L = ⅔ ((1 − r_y)² (2 + r_y) + Σ_{j≠y} r_j³) + 2 [τ − s_y/2]₊, r_j = [s_j/2 − τ]₊, Σ_j r_j² = 1.

    With p = r² the same as (1 − Σ_j p_j^1.5) / 0.75 + Σ_j p_j s_j − s_y, in a form that does not cancel. Ben Peters,
    Vlad Niculae and André Martins, "Sparse Sequence-to-Sequence Models", ACL 2019, arXiv 1905.05702. The package
    `entmax` has the same values, but honours no `ignore_index` below 0, and looks at the 100 largest scores first.
    """


def reference(logits: Tensor, target: Tensor) -> Tensor:
    """(N,) losses, densely, by sorting."""
    z = torch.where(logits == -torch.inf, -1e30, logits - logits.max(1, keepdim=True).values) / 2
    falling = z.sort(1, descending=True).values.clamp(min=-2)  # below −1 none counts
    count = torch.arange(1, logits.shape[1] + 1, dtype=logits.dtype, device=logits.device)
    mean = falling.cumsum(1) / count
    apart = falling.square().cumsum(1) - count * mean.square()
    tau = mean - ((1 - apart) / count).clamp(min=0).sqrt()
    size = (tau <= falling).sum(1, keepdim=True)
    p = (z - tau.gather(1, size - 1)).clamp(min=0).square()
    return (1 - (p * p.sqrt()).sum(1)) / 0.75 + 2 * ((p * z).sum(1) - z.gather(1, target[:, None])[:, 0])


CASES = ({},)
