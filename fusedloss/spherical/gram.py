"""The centred Gram matrix of a weight that lies in memory as a matrix, in one pass over blocks of its rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from ..backends import choose

F64 = torch.float64
SAMPLE = 1 << 12  # rows that the pivot is the mean of
PANELS, PANELS_FROM = 4, 256  # of a Gram matrix this wide, the panels below the diagonal's are not computed
UNCENTRED = 4.0  # most that a column's mean square may be of its variance, for a product before the mean is taken off


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """float32 products stay float32: no autocast, and no TF32 or bfloat16 inside them."""
    owners = [torch.backends.cuda.matmul] if device.type == "cuda" else [torch.backends.mkldnn.matmul]
    before = [owner.fp32_precision for owner in owners]
    try:
        for owner in owners:
            owner.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for owner, precision in zip(owners, before):
            owner.fp32_precision = precision


def block_rows(device: torch.device, width: int, dtype: torch.dtype) -> int:
    """Rows of a block that is in the cache while it is worked on; on a device, large enough to fill it."""
    return max(16, ((2 << 20) if device.type == "cpu" else (64 << 20)) // (width * dtype.itemsize))


@dataclass(frozen=True)
class Gram:
    """Of the rows w_j of W (with a bias, of [W, b]), n × D: their mean m̄ and Q = Σ_j (w_j − m̄)(w_j − m̄)ᵀ.

    Rows are taken as w_j − pivot, a mean of some of them in the type of products: no sum cancels, wherever they lie.
    """

    pivot: Tensor  # (D,) float32, float64 for a float64 weight
    offset: Tensor  # (D,) float64, pivot − m̄
    mean: Tensor  # (D,) float64
    matrix: Tensor  # (D, D) float64

    @classmethod
    @torch.no_grad()
    def of(cls, weight: Tensor, bias: Tensor | None = None) -> Gram:
        """W is read once, no copy of it is ever whole. Products and sums over a block in the pivot's type, then float64."""
        pivot, straight = _pivot(weight, bias)
        width, device = len(pivot), weight.device
        matrix, total = torch.zeros(width, width, dtype=F64, device=device), pivot.new_zeros(width, dtype=F64)
        part = torch.empty(width, width, dtype=pivot.dtype, device=device)
        if straight:
            pivot = torch.zeros_like(pivot)
        with exact_products(device):
            for block in (
                weight.split(block_rows(device, width, pivot.dtype)) if straight else blocks(weight, bias, pivot)
            ):
                _upper_square(part, block)
                matrix += part
                total += block.sum(0, dtype=pivot.dtype)
        matrix = matrix.triu() + matrix.triu(1).t()
        offset = -total / len(weight)
        return cls(pivot, offset, pivot - offset, matrix - len(weight) * torch.outer(offset, offset))


def blocks(weight: Tensor, bias: Tensor | None, pivot: Tensor) -> Iterator[Tensor]:
    """[W, b] − pivot in the pivot's type, block by block, each in the memory of the one before."""
    width = weight.shape[1]
    size = block_rows(weight.device, len(pivot), pivot.dtype)
    buffer = torch.empty(min(size, len(weight)), len(pivot), dtype=pivot.dtype, device=weight.device)
    for first in range(0, len(weight), size):
        away = buffer[: len(weight) - first]
        torch.sub(weight[first : first + size], pivot[:width], out=away[:, :width])
        if bias is not None:
            torch.sub(bias[first : first + size], pivot[width], out=away[:, width])
        yield away


def _pivot(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, bool]:
    """The mean of evenly spaced rows, and whether W may be multiplied as it is: in half precision, means near 0."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    some = slice(None, None, -(-len(weight) // SAMPLE))
    sample = weight[some].to(dtype)
    if bias is not None:
        sample = torch.cat([sample, bias[some].to(dtype).unsqueeze(1)], 1)
    mean = sample.mean(0)
    if bias is not None or dtype.itemsize == weight.dtype.itemsize or weight.device.type != "cpu":
        return mean, False
    return mean, bool((mean.square() <= UNCENTRED * (sample - mean).square().mean(0)).all())


def _upper_square(out: Tensor, block: Tensor) -> None:
    """blockᵀ block; entries below the diagonal are not all written."""
    width, gemm = block.shape[1], choose(block.device, block.dtype).gemm
    step = width if width < PANELS_FROM else -(-width // PANELS)
    for first in range(0, width, step):
        panel = slice(first, first + step)
        gemm(out[panel, first:], block[:, panel].t(), block[:, first:], False)
