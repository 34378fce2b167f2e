"""Sparsemax loss: the loss whose gradient is sparsemax(s) − y, zero where the target leads by 1."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sorting.threshold import SPARSEMAX
from .fenchel_young import fenchel_young_loss


@fenchel_young_loss(SPARSEMAX)
def sparsemax_loss(scores, target):
    """Sparsemax loss: L = ½ Σ_j (p_j − δ_jy)² + [τ − s_y]₊, p_j = [s_j − τ]₊, Σ_j p_j = 1.

    The same as ½ (1 − Σ_j p_j²) + Σ_j p_j s_j − s_y, in a form that does not cancel. André Martins and Ramón Fernandez
    Astudillo, "From Softmax to Sparsemax: A Sparse Model of Attention and Multi-Label Classification", ICML
    2016, arXiv 1602.02068. The package `entmax` has the same values, but honours no `ignore_index` below 0.
    """


def reference(logits: Tensor, target: Tensor) -> Tensor:
    """(N,) losses, densely, by sorting."""
    falling = logits.sort(1, descending=True).values
    top = falling[:, :1].detach()  # a shift changes nothing; of equal scores autograd would pick one
    falling = torch.where(falling == -torch.inf, -torch.inf, falling - top)
    count = torch.arange(1, logits.shape[1] + 1, dtype=logits.dtype, device=logits.device)
    total = falling.cumsum(1)
    size = (1 + count * falling > total).sum(1, keepdim=True)
    tau = (total.gather(1, size - 1) - 1) / size
    z = torch.where(logits == -torch.inf, -1e30, logits - top)
    p = torch.relu(z - tau)
    return (1 - p.square().sum(1)) / 2 + (p * z).sum(1) - z.gather(1, target[:, None])[:, 0]


CASES = ({},)
