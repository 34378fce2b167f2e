"""The plan of a walk: which schedule, how many rows to a chunk, and the memory that it takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from .backends.tile import Limits


@dataclass(frozen=True)
class Walk:
    """How a call walks its scores. The result does not depend on it beyond rounding (and the filter's stated bound)."""

    memory_budget: int | None = None  # bytes of score tile; None: the backend's choice
    schedule: str = "auto"  # "auto", "eager", "recompute"
    gradient_filter: float = (
        0.0  # skip classes whose every |∂L/∂s| in a row chunk is below this × the largest row factor
    )
    backend: str = "auto"


@dataclass(frozen=True)
class Plan:
    """What `plan` decided, for a reader: chunks of rows and the memory that the walk takes beside inputs and gradients."""

    schedule: str  # "eager", "recompute", or "logits" when they are given
    chunk_rows: int
    chunks: int
    block_columns: int
    tile_bytes: int  # the tile of a whole chunk, or of one block when it is computed again
    block_bytes: int  # fp32 scratch for one block
    accumulator_bytes: int  # dW in fp32, when more than one chunk adds to a half-precision dW
    exponentials: bool = False  # what the eager schedule keeps of the tile
    kept_columns: int = 0  # columns that share a shift of the exponentials
    in_place: bool = False  # exponentials lie in the fp32 tile itself
    fused: bool = False  # statistics out of the product itself: scores are never in memory


def half(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def waiting_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of a gradient that waits for the upstream factor: float16 would underflow before a loss scale reaches it."""
    return torch.float32 if dtype == torch.float16 else dtype


def plan(
    rows: int,
    width: int,
    columns: int,
    dtype: torch.dtype,
    walk: Walk,
    limits: Limits,
    exponentials: bool = True,
    gradient_dtype: torch.dtype | None = None,
    fused: bool = False,
) -> Plan:
    """Choose schedule and chunk sizes for `rows` × `columns` scores of `width`-dimensional inputs of type `dtype`."""
    budget = limits.budget if walk.memory_budget is None else walk.memory_budget
    wide = accumulation_dtype(dtype).itemsize
    fused = fused and exponentials and limits.fuses_eager
    in_place = limits.in_place and not fused
    kept = dtype.itemsize if exponentials and not in_place else wide
    fit = min(limits.most_rows, budget // max(1, columns * kept))
    if walk.schedule == "eager" or (walk.schedule == "auto" and fit >= min(rows, limits.eager_rows)):
        if columns * width * wide <= limits.cached_bytes:  # chunks that stay in the caches too
            fit = min(fit, max(limits.eager_rows, limits.block_bytes // max(1, columns * kept)))
        chunks = divided_up(rows, max(1, fit))
        rounded = half(waiting_dtype(dtype if gradient_dtype is None else gradient_dtype))
        accumulator = columns * width * wide if rounded and chunks > 1 else 0
        if accumulator > limits.cached_bytes and rows * columns * kept <= budget + accumulator:
            chunks, accumulator = 1, 0  # the memory of the accumulator is better spent on the tile
        chunk_rows = divided_up(rows, max(1, chunks))  # even chunks: a short last one wastes a pass over W
        block = _block(columns, limits.block_bytes // (max(1, chunk_rows) * wide), limits)
        block = columns if fused else block
        scratch = chunk_rows * block * wide if kept != wide and not fused else 0
        tile = chunk_rows * columns * kept
        return Plan(
            *("eager", chunk_rows, chunks, block, tile, scratch, accumulator),
            *(exponentials, limits.fused_columns if fused else min(block, limits.kept_columns), in_place, fused),
        )
    room = min(budget, limits.recompute_bytes)
    chunk_rows = max(1, min(rows, limits.most_rows, room // (512 * wide)))
    block = _block(columns, room // (chunk_rows * wide), limits)
    chunks = divided_up(rows, chunk_rows)
    return Plan("recompute", chunk_rows, chunks, block, chunk_rows * block * wide, block * width * wide, 0)


def _block(columns: int, most: int, limits: Limits) -> int:
    """Column blocks of even size, at most `most` wide, in whole cache lines."""
    most = max(64, min(limits.block_columns, most) // 64 * 64)
    count = divided_up(max(1, columns), most)
    return divided_up(divided_up(max(1, columns), count), 64) * 64


def divided_up(total: int, part: int) -> int:
    return -(-total // part)


def spans(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, max(1, step)):
        yield slice(start, min(total, start + step))
