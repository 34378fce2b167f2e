"""What a backend is given: a tile of raw scores and how they are meant."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..statistics import Statistic


@dataclass(frozen=True, eq=False)
class Tile:
    """A block of raw scores a (n rows from row ``first_row`` on × m classes from class ``first`` on) that stand for

    z_ij = class_scale_j · scale · cap(a_ij + bias_j) + class_shift_j,   cap(t) = softcap · tanh(t / softcap).
    """

    data: Tensor
    first: int = 0
    bias: Tensor | None = None
    class_scale: Tensor | None = None
    class_shift: Tensor | None = None
    softcap: float = 0.0
    scale: float | Tensor = 1.0
    first_row: int = 0

    @property
    def compute_dtype(self) -> torch.dtype:
        return torch.float64 if self.data.dtype == torch.float64 else torch.float32

    def capped(self, a: Tensor) -> Tensor:
        """cap(a + bias)."""
        if self.bias is not None:
            a = a + self.bias.to(a.dtype)
        return self.softcap * torch.tanh(a / self.softcap) if self.softcap else a

    def scores(self) -> Tensor:
        """z, in float32 (float64 for float64 tiles). Plain differentiable PyTorch."""
        z = self.capped(self.data.to(self.compute_dtype))
        scaled = not (isinstance(self.scale, float) and self.scale == 1.0)
        if scaled:
            z = z * self.scale
        if self.class_scale is not None:
            z = z * self.class_scale.to(z.dtype)
        if self.class_shift is not None:
            z = z + self.class_shift.to(z.dtype)
        if not (self.softcap or scaled or self.class_scale is not None):
            return z
        # A softcap would make -inf a finite score, a scale of 0 NaN; a masked class stays masked.
        return z.masked_fill(self.data == -torch.inf, -torch.inf)


@dataclass(frozen=True, eq=False)
class Across:
    """Statistics of a tile's columns, over its rows: as those of the rows of the transposed tile. For the gradient."""

    stats: Sequence[Statistic]
    states: Sequence[Tensor]
    coefficients: Sequence[Tensor]


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums that the gradient primitive gathers on its way, all added to; None where nobody asked.

    bias (m,): Σ_i ∂L/∂a_ij · class_shift (m,): Σ_i ∂L/∂z_ij · class_scale (m,): Σ_i ∂L/∂z_ij · scale · cap(…)
    scale (): Σ_ij ∂L/∂z_ij · class_scale_j · cap(…) · largest (m,): max_i |∂L/∂a_ij|
    """

    bias: Tensor | None = None
    class_scale: Tensor | None = None
    class_shift: Tensor | None = None
    scale: Tensor | None = None
    largest: Tensor | None = None

    def taking(self, columns: slice) -> Sums:
        cut = [None if s is None else s[columns] for s in (self.bias, self.class_scale, self.class_shift)]
        return Sums(*cut, self.scale, None if self.largest is None else self.largest[columns])


@dataclass(frozen=True, eq=False)
class Exponentials:
    """What is kept of a tile between its two passes where that is enough: e_ij = exp(z_ij − shift_bi), b = j // block,
    0 where the log-sum-exp does not look. One exponential per score instead of two, and a relative rounding error that
    does not grow with the scores, as that of scores kept in half precision does."""

    data: Tensor  # (n, m), in the type of the GEMMs' operands
    shift: Tensor  # (⌈m / block⌉, n)
    block: int  # columns that share a shift

    def columns(self) -> Iterator[tuple[slice, Tensor]]:
        """The blocks of columns, each with its shift (n,)."""
        for number, shift in enumerate(self.shift):
            yield slice(number * self.block, min(self.data.shape[1], (number + 1) * self.block)), shift


@dataclass(frozen=True)
class Limits:
    """How a backend likes its tiles; `schedule.plan` keeps to it."""

    budget: int  # bytes of a tile when the caller names no budget
    eager_rows: int  # fewest rows per chunk at which the eager schedule beats recomputing
    most_rows: int  # most rows per chunk: more make the GEMMs no faster, and the tile larger
    block_bytes: int  # eager: a block of scores between the GEMM that writes it and the pass that reads it
    recompute_bytes: int  # recompute: the same
    logits_bytes: int  # given logits that are looked at in one pass
    block_columns: int
    cached_bytes: int  # a dW this small is added to for nothing
    kept_columns: int  # columns that share a shift in `Exponentials`
    pair_bytes: int  # a block of scores that rows and columns look at, computed again for the gradient
    in_place: bool  # narrow kept exponentials in the fp32 tile itself, rather than from a scratch block
    fused_columns: int = 0  # columns that share a shift where the product itself leaves exponentials; 0: it does not
    fuses_eager: bool = False  # and whether the eager schedule lets it
    fuses_gradient: bool = False  # whether `gradient_sweep` lets the product leave gradients


# Measured; see docs/performance.md. A block stays in the caches between the GEMM and the pass over it.
CPU_LIMITS = Limits(
    budget=256 << 20,
    eager_rows=192,
    most_rows=2048,
    block_bytes=8 << 20,
    recompute_bytes=8 << 20,
    logits_bytes=16 << 20,
    block_columns=2048,
    cached_bytes=4 << 20,
    kept_columns=2048,
    pair_bytes=8 << 20,
    in_place=False,
)

# Expectations, not measured; see bench/results/NOTES.md. Whole row chunks: there is no cache that a block of scores could
# stay in, and few launches are what counts.
GPU_LIMITS = Limits(
    budget=1 << 30,
    eager_rows=512,
    most_rows=4096,
    block_bytes=1 << 30,
    recompute_bytes=64 << 20,
    logits_bytes=1 << 62,
    block_columns=1 << 62,
    cached_bytes=0,
    kept_columns=4096,
    pair_bytes=1 << 30,
    in_place=True,
)
