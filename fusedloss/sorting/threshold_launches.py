"""Launches of kernels/threshold.py. Imports triton."""

from __future__ import annotations

import triton
from torch import Tensor

from ..backends.triton_launch import Launch
from ..kernels import threshold as kernels

WIDEST = 4096  # columns at a time


def _block(columns: int) -> tuple[int, int]:
    """Columns at a time, and warps."""
    block = min(WIDEST, triton.next_power_of_2(max(1, columns)))
    return block, max(1, min(8, block // 128))


def rows(
    z: Tensor, square: bool, out: Tensor | None, target: Tensor | None, factor: Tensor | None, losses: Tensor | None
) -> Launch:
    """p or, with a target, losses and factor (p − y) of scores (n, V)."""
    block, warps = _block(z.shape[1])
    absent = z  # never read
    given = (absent if t is None else t for t in (target, factor, losses, out))
    return Launch(
        kernels.threshold_rows,
        (z.shape[0],),
        dict(zip(("target", "factor", "losses", "out"), given))
        | dict(scores=z, stride=z.stride(0), out_stride=0 if out is None else out.stride(0), columns=z.shape[1]),
        dict(SQUARE=square, LOSS=target is not None, WRITES=out is not None, BLOCK=block),
        warps=warps,
    )


def backward(p: Tensor, g: Tensor, out: Tensor, square: bool) -> Launch:
    block, warps = _block(p.shape[1])
    return Launch(
        kernels.threshold_backward,
        (p.shape[0],),
        dict(p=p, g=g, out=out, columns=p.shape[1]),
        dict(SQUARE=square, BLOCK=block),
        warps=warps,
    )
