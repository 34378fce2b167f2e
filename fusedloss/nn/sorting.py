"""Modules of the soft sort and the soft rank."""

from __future__ import annotations

import torch
from torch import Tensor

from ..sorting.soft_sort import soft_rank, soft_sort


class SoftRank(torch.nn.Module):
    """`fusedloss.sorting.soft_rank` as a module: forward(values, *, mask=None, offsets=None).

    A strength that is a tensor becomes a buffer, a `torch.nn.Parameter` a parameter of the module.
    """

    function = staticmethod(soft_rank)

    def __init__(
        self,
        regularization: str = "l2",
        regularization_strength: float | Tensor = 1.0,
        *,
        dim: int = -1,
        descending: bool = False,
    ):
        super().__init__()
        self.regularization, self.dim, self.descending = regularization, dim, descending
        if isinstance(regularization_strength, Tensor) and not isinstance(regularization_strength, torch.nn.Parameter):
            self.register_buffer("regularization_strength", regularization_strength)
        else:
            self.regularization_strength = regularization_strength

    def forward(self, values: Tensor, *, mask: Tensor | None = None, offsets: Tensor | None = None) -> Tensor:
        layout = dict(dim=self.dim, descending=self.descending, mask=mask, offsets=offsets)
        return self.function(values, self.regularization, self.regularization_strength, **layout)

    def extra_repr(self) -> str:
        strength = self.regularization_strength
        shown = f"tensor(shape={tuple(strength.shape)})" if isinstance(strength, Tensor) else strength
        return f"{self.regularization!r}, {shown}, dim={self.dim}, descending={self.descending}"


class SoftSort(SoftRank):
    """`fusedloss.sorting.soft_sort` as a module: forward(values, *, mask=None, offsets=None)."""

    function = staticmethod(soft_sort)
