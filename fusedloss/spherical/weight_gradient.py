"""∂L/∂W of a spherical loss, W_c S + sparse rows + one row for all classes, made block by block of W's rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends import choose
from ..memory import empty
from .gram import F64, Gram, block_rows, blocks


class Features:
    """(N, d) features as they are multiplied: in the type of products, masked rows 0, with a column of ones for a bias."""

    def __init__(self, h: Tensor, mask: Tensor | None, weight: Tensor, ones: bool):
        self.h, self.mask, self.ones = h, mask, ones
        self.dtype = torch.promote_types(weight.dtype, torch.float32)
        self.width = h.shape[1] + ones

    def take(self, rows: slice | Tensor) -> Tensor:
        x = self.h[rows].to(self.dtype)
        if self.mask is not None:
            x = torch.where(self.mask[rows].unsqueeze(1), x, 0.0)
        return torch.nn.functional.pad(x, (0, 1), value=1.0) if self.ones else x

    def chunks(self, copies: int) -> Iterator[slice]:
        """All rows by chunks, of which as many `copies` fit into a block."""
        size = max(1, block_rows(self.h.device, self.width * copies, self.dtype))
        for first in range(0, len(self.h), size):
            yield slice(first, min(first + size, len(self.h)))


def weight_gradient(
    weight: Tensor,
    bias: Tensor | None,
    gram: Gram | None,
    features: Features,
    target: Tensor,
    alpha: Tensor,
    t: Tensor,
    gamma: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """∂L/∂W and ∂L/∂bias in their own types, each number formed in the type of products and rounded once.

    target (N, K) with n where there is none; alpha (N, K), t, gamma (N,) float64: times upstream gradients. `gram` may be
    None for no rows.
    """
    n, d = weight.shape
    dweight = empty(weight.shape, weight.dtype, weight.device)
    dbias = None if bias is None else empty(bias.shape, bias.dtype, bias.device)
    if not len(target):
        return dweight.zero_(), None if dbias is None else dbias.zero_()
    left, right, row = _factors(gram, features, alpha, t, gamma, n)
    gemm = choose(weight.device, features.dtype).gemm
    sparse = _Sparse(features, target, alpha, n, block_rows(weight.device, features.width, features.dtype))
    straight = bias is None and weight.dtype == features.dtype
    buffer = middle = None
    first = 0
    for number, away in enumerate(blocks(weight, bias, gram.pivot)):
        last = first + len(away)
        if straight:
            out = dweight[first:last]
        else:
            buffer = torch.empty_like(away) if buffer is None else buffer
            out = buffer[: len(away)]
        out.copy_(row.expand_as(out))
        if left is not None:
            middle = away.new_empty(len(away), left.shape[1]) if middle is None else middle
            gemm(middle[: len(away)], away, left, False)
        gemm(out, away if left is None else middle[: len(away)], right, True)
        sparse.add_to(out, first, number)
        if not straight:
            dweight[first:last] = out[:, :d]
            if dbias is not None:
                dbias[first:last] = out[:, d]
        first = last
    return dweight, dbias


def _factors(gram: Gram, features: Features, alpha: Tensor, t: Tensor, gamma: Tensor, n: int):
    """(left, right, row): ∂L/∂W without its sparse rows is (W − pivot) left right + 1 rowᵀ; left None for the identity."""
    count, width, dtype = len(gamma), features.width, features.dtype
    shared = (t - alpha.sum(1)) / n
    if 2 * count < width:
        x = features.take(slice(None))
        left, right = x.t(), x * (2 * gamma).unsqueeze(1).to(dtype)
        row = shared @ x.to(F64) + (x.to(F64) @ gram.offset) @ right.to(F64)
        return left, right, row.to(dtype)
    s, g = gram.matrix.new_zeros(width, width), gram.offset.new_zeros(width)
    part, gemm = torch.empty(width, width, dtype=dtype, device=s.device), choose(s.device, dtype).gemm
    for rows in features.chunks(1):
        x = features.take(rows)
        gemm(part, x.t(), x * (2 * gamma[rows]).unsqueeze(1).to(dtype), False)
        s += part
        g += shared[rows] @ x.to(F64)
    return None, s.to(dtype), (g + gram.offset @ s).to(dtype)


class _Sparse:
    """Σ_ik α_ik e_ck h_iᵀ, by blocks of `size` classes; a class's examples are added in their order."""

    def __init__(self, features: Features, target: Tensor, alpha: Tensor, n: int, size: int):
        self.features, self.each, self.size = features, target.shape[1], size
        self.classes, self.order = target.reshape(-1).sort(stable=True)
        self.alpha = alpha.reshape(-1)[self.order].to(features.dtype)
        starts = torch.arange(0, n + size, size, device=target.device).clamp(max=n)
        self.starts = torch.searchsorted(self.classes, starts).tolist()

    def add_to(self, out: Tensor, first: int, number: int) -> None:
        for begin in range(self.starts[number], self.starts[number + 1], self.size):
            part = slice(begin, min(begin + self.size, self.starts[number + 1]))
            x = self.features.take(self.order[part] // self.each) * self.alpha[part].unsqueeze(1)
            where = self.classes[part] - first
            if out.device.type == "cpu":
                out.index_add_(0, where, x)
            else:  # sorts instead of racing: the same bits every time
                out.index_put_((where,), x, accumulate=True)
