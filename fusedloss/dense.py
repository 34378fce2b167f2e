"""Scores as a dense matrix in plain PyTorch: the way to second derivatives, and the meaning of everything else."""

from __future__ import annotations

import torch
from torch import Tensor

from .backends.tile import Tile
from .statistics import Columns, Statistic


def dense_scores(x, weight, bias, class_scale, class_shift, softcap, scale, multiply: torch.dtype) -> Tensor:
    """z (N, V) in plain differentiable PyTorch, products in the accumulation type."""
    wide = torch.float64 if multiply == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        raw = x.to(wide) if weight is None else x.to(multiply).to(wide) @ weight.to(multiply).to(wide).t()
    return Tile(raw, 0, bias, class_scale, class_shift, softcap, scale).scores()


class DenseScores:
    """Scores that are there, as (N, V); `reduce` by plain autograd."""

    def __init__(self, z: Tensor):
        self.z = z
        self.columns = z.shape[1]

    def reduce(self, *statistics: Statistic) -> object:
        shown = []
        for s in statistics:
            z = self.z.t() if isinstance(s, Columns) else self.z
            s = s.statistic if isinstance(s, Columns) else s
            state = s.of(z, 0)
            columns = s.columns(state) if hasattr(s, "k") else None
            shown.append(s.present(s.value(state).double(), columns))
        return shown[0] if len(shown) == 1 else shown
