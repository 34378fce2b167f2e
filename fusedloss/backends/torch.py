"""The torch backend: the tile primitives in plain PyTorch. Slow, on any device; the meaning of the other backends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..statistics import LogSumExp, Score, Statistic
from .tile import CPU_LIMITS, GPU_LIMITS, Across, Exponentials, Limits, Sums, Tile

name = "torch"
reads_scale = True


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    return True


def why_not() -> str | None:
    """Why this backend cannot run here; None when it can."""
    return None


def limits(device: torch.device) -> Limits:
    # Every step over given logits is written out here: not over all of them at once.
    return CPU_LIMITS if device.type == "cpu" else replace(GPU_LIMITS, logits_bytes=1 << 30)


def gemm(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b, with products and sums in out's dtype (float32 or float64)."""
    with torch.autocast(out.device.type, enabled=False):  # it would round the products to its own type
        a, b = a.to(out.dtype), b.to(out.dtype)
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)


def take_columns(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix[:, columns] for rising columns; it may lie in the matrix' own memory, which is then spoilt."""
    return matrix.index_select(1, columns)


def statistics(
    tile: Tile, stats: Sequence[Statistic], states: Sequence[Tensor], keep: Exponentials | None = None
) -> None:
    """Merge the tile into the states, in place; with `keep`, also fill it in for `gradient_of_exponentials`."""
    z = tile.scores()
    for statistic, state in zip(stats, states):
        state.copy_(statistic.merge(state, statistic.of(z, tile.first)))
    if keep is not None:  # last: it may take the tile's own memory
        (lse,) = [s for s in stats if isinstance(s, LogSumExp)]
        seen = lse.visible(z, tile.first)
        for columns, shift in keep.columns():
            top = seen[:, columns].amax(1)
            shift.copy_(torch.where(top == -torch.inf, 0.0, top))
            seen[:, columns] -= shift.unsqueeze(1)
        keep.data.copy_(torch.exp(seen))


def column_statistics(tile: Tile, stats: Sequence[Statistic], states: Sequence[Tensor]) -> None:
    """Merge the tile into states of its columns; the statistics see it transposed."""
    z = tile.scores().t()
    for statistic, state in zip(stats, states):
        state.copy_(statistic.merge(state, statistic.of(z, tile.first_row)))


def _slope(z: Tensor, first: int, stats, states, coefficients) -> Tensor:
    """∂L/∂z through statistics of rows."""
    slope = torch.zeros_like(z)
    for statistic, state, coefficient in zip(stats, states, coefficients):
        slope += statistic.slope(z, first, state, coefficient.to(z.dtype))
    # A row whose coefficients are all zero has gradient exactly zero, whatever its scores are (0 · inf is NaN).
    silent = [(c == 0).all(1) for c in coefficients]
    return slope.masked_fill_(torch.stack(silent).all(0).unsqueeze(1), 0.0) if silent else slope


def gradient(
    tile: Tile,
    out: Tensor,
    stats: Sequence[Statistic],
    states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    sums: Sums,
    across: Across | None = None,
) -> None:
    """out = ∂L/∂a of the tile, given ∂L/∂value of every statistic; `out` may share the tile's memory."""
    a, z = tile.data.to(tile.compute_dtype), tile.scores()
    masked = z == -torch.inf
    slope = _slope(z, tile.first, stats, states, coefficients)
    if across is not None:
        slope = slope + _slope(z.t(), tile.first_row, across.stats, across.states, across.coefficients).t()
    slope.masked_fill_(masked, 0.0)

    capped = tile.capped(a).masked_fill(masked, 0.0)
    class_scale = 1.0 if tile.class_scale is None else tile.class_scale.to(z.dtype)
    if sums.class_shift is not None:
        sums.class_shift.add_(slope.sum(0))
    if sums.class_scale is not None:
        sums.class_scale.add_((slope * capped).sum(0) * tile.scale)
    if sums.scale is not None:
        sums.scale.add_((slope * capped * class_scale).sum(dtype=torch.float64))
    slope *= class_scale * tile.scale
    if tile.softcap:
        slope *= 1 - (capped / tile.softcap).square()
    if sums.bias is not None:
        sums.bias.add_(slope.sum(0))
    if sums.largest is not None and slope.shape[0]:
        torch.maximum(sums.largest, slope.abs().amax(0), out=sums.largest)
    out.copy_(slope)


def gradient_of_exponentials(
    tile: Tile,
    kept: Exponentials,
    stats: Sequence[Statistic],
    states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    sums: Sums,
) -> None:
    """∂L/∂a in place of kept.data. The statistics are one LogSumExp of factor 1, and Scores; `tile.data` is unread."""
    slope = torch.zeros(kept.data.shape, dtype=kept.shift.dtype, device=kept.data.device)
    for statistic, state, coefficient in zip(stats, states, coefficients):
        if isinstance(statistic, LogSumExp):
            weight, lse = coefficient[:, 0], statistic.value(state)[:, 0]
            for columns, shift in kept.columns():
                factor = torch.where(weight == 0, 0.0, weight * torch.exp(shift - lse)).to(slope.dtype)
                e = kept.data[:, columns]
                slope[:, columns] += torch.where(e == 0, 0.0, e.to(slope.dtype) * factor.unsqueeze(1))
        elif isinstance(statistic, Score):
            slope += statistic.slope(slope, tile.first, state, coefficient.to(slope.dtype))
    if sums.class_shift is not None:
        sums.class_shift.add_(slope.sum(0))
    slope *= tile.scale
    if tile.class_scale is not None:
        slope *= tile.class_scale.to(slope.dtype)
    if sums.bias is not None:
        sums.bias.add_(slope.sum(0))
    if sums.largest is not None and slope.shape[0]:
        torch.maximum(sums.largest, slope.abs().amax(0), out=sums.largest)
    kept.data.copy_(slope)


def describe(dtype: torch.dtype) -> str:
    return "torch (plain PyTorch)"
