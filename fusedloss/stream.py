"""Scores as the walks see them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .backends.tile import Across, Exponentials, Limits, Sums, Tile
from .plan import Plan, Walk, half, plan
from .statistics import Statistic


@dataclass(frozen=True, eq=False)
class Stream:
    """Scores as the walks see them: kept rows only, operands in the type in which they are multiplied."""

    x: Tensor  # (N, D), or the logits (N, V) when weight is None
    weight: Tensor | None
    bias: Tensor | None
    class_scale: Tensor | None
    class_shift: Tensor | None
    softcap: float
    scale: float | Tensor
    kept: Tensor | None  # indices of the rows that count; None when all do
    backend: ModuleType
    symmetric: bool = False  # weight is x

    @property
    def rows(self) -> int:
        return self.x.shape[0] if self.kept is None else self.kept.shape[0]

    @property
    def columns(self) -> int:
        return self.x.shape[1] if self.weight is None else self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype if self.weight is None else self.weight.dtype

    def plan(
        self, walk: Walk, exponentials: bool = True, gradient_dtype=None, fused: bool = False, limits: Limits | None = None
    ) -> Plan:
        limits = limits or self.backend.limits(self.x.device)
        shape = self.rows, self.x.shape[1], self.columns
        return plan(*shape, self.dtype, walk, limits, exponentials, gradient_dtype, fused)

    def fuses(self, stats: Sequence[Statistic], across: Sequence[Statistic] = ()) -> bool:
        """Whether the backend takes these statistics out of the product itself."""
        fuses = getattr(self.backend, "fuses", None)
        if fuses is None or not self._multiplies():
            return False
        return fuses(stats, self.tile(None, slice(0, self.columns)), across)

    def fuses_gradient(self, stats: Sequence[Statistic], across: Across | None, sums: Sums) -> bool:
        """Whether it takes their gradient out of the product, and should."""
        if not self.backend.limits(self.x.device).fuses_gradient or not self._multiplies():
            return False
        return self.backend.fuses_gradient(stats, across, sums, self.tile(None, slice(0, self.columns)))

    def _multiplies(self) -> bool:
        """Whether there is a product that kernels would take: float32 would miss the matrix units."""
        if self.weight is None or not half(self.dtype):
            return False
        return self.x.stride(1) == 1 and self.weight.stride(1) == 1

    def fused_statistics(
        self, x: Tensor, stats, states, kept: Exponentials | None = None, across=(), below=(), first_row: int = 0
    ) -> None:
        """Statistics of whole rows, whose scores are never in memory."""
        tile = self.tile(None, slice(0, self.columns), first_row)
        self.backend.linear_statistics(x, self.weight, tile, stats, states, kept, across, below)

    def fused_gradient(self, x: Tensor, out: Tensor, columns: slice, first_row: int, *given) -> None:
        """Gradient of a block of scores that are never in memory."""
        self.backend.linear_gradient(x, self.weight[columns], self.tile(None, columns, first_row), out, *given)

    def take(self, tensor: Tensor, rows: slice) -> Tensor:
        return tensor[rows] if self.kept is None else tensor.index_select(0, self.kept[rows])

    def input(self, rows: slice) -> Tensor:
        taken = self.take(self.x, rows)
        return taken if self.weight is None else taken.to(self.weight.dtype)

    def tile(self, data: Tensor, columns: slice, first_row: int = 0) -> Tile:
        vectors = [None if v is None else v[columns] for v in (self.bias, self.class_scale, self.class_shift)]
        return Tile(data, columns.start, *vectors, self.softcap, self.scale, first_row)

    def put(self, out: Tensor, rows: slice, values: Tensor) -> None:
        """Write the rows of a chunk back to where they came from."""
        if self.kept is None:
            out[rows] = values
        else:
            out.index_copy_(0, self.kept[rows], values.to(out.dtype))

    def compute(self, out: Tensor, x: Tensor, columns: slice, first_row: int = 0) -> Tile:
        """Raw scores of some rows in some columns, into `out`."""
        self.backend.gemm(out, x, self.weight[columns].t(), accumulate=False)
        return self.tile(out, columns, first_row)


def narrowed(buffer: Tensor, columns: slice, dtype: torch.dtype) -> Tensor:
    """Where the gradient of buffer[:, columns] is stored: in place, in the GEMMs' operand type.

    A half-precision row takes the first half of its own fp32 row, so a tile of fp32 scores costs no second buffer.
    """
    if dtype == buffer.dtype:
        return buffer[:, columns]
    factor = buffer.dtype.itemsize // dtype.itemsize
    return buffer.view(dtype)[:, columns.start * factor : columns.start * factor + (columns.stop - columns.start)]
