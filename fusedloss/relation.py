"""Relations: which columns a statistic looks at, computed from O(N) integers inside the tile, never a dense mask."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Rest:
    """Every column but one per row.

    ``column``: (N,) int64, the class left out (the target, as a rule).
    """

    column: Tensor


def hide(scores: Tensor, column: Tensor, first: int) -> Tensor:
    """Scores (n, m) of the classes ``first`` … ``first + m - 1`` with the entry of each row's ``column`` set to -inf."""
    classes = torch.arange(first, first + scores.shape[-1], device=scores.device)
    return scores.masked_fill(classes == column.unsqueeze(-1), -torch.inf)
