"""Schedules: how the tiles of a score matrix are walked.

Two sweeps over two-dimensional blocks, and one walk that fuses them:

* `statistics_sweep`: every block once, nothing kept but the statistics' states (1 GEMM);
* `gradient_sweep`: class blocks outside, row blocks inside, each block computed again and turned into its gradient;
  a block of dW is formed whole, in fp32, and rounded once (3 GEMMs);
* `eager_sweep`: per chunk of rows all classes at once, the tile kept between the two passes (3 GEMMs in all). It needs
  the loss to separate over row chunks, and in half precision an fp32 accumulator for dW.

`plan` chooses between eager (3 GEMMs, a tile of rows × V) and the two sweeps (4 GEMMs, hardly any memory).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from types import ModuleType

import torch
from torch import Tensor

from .backends.tile import Exponentials, Sums, Tile
from .memory import empty
from .statistics import LogSumExp, Mass, Score, Statistic

MIB = 1 << 20
# Fewest rows per chunk at which the eager schedule beats recomputing: below it, reading and writing dW for every chunk
# costs more than a fourth GEMM (measured on CPU, see docs/performance.md).
EAGER_ROWS = 192
# Most rows per chunk: more make the GEMMs no faster, and the tile larger.
MOST_ROWS = 2048
# A block of scores that stays in the caches between the GEMM that writes it and the pass that reads it.
BLOCK_BYTES = 8 * MIB
BLOCK_COLUMNS = 2048
# A dW this small stays in the caches.
CACHED_BYTES = 4 * MIB


@dataclass(frozen=True)
class Walk:
    """How a call walks its scores. The result does not depend on it beyond rounding (and the filter's stated bound)."""

    memory_budget: int = 256 * MIB  # bytes of score tile
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


def half(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def waiting_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type of a gradient that waits for the upstream factor: float16 would underflow before a loss scale reaches it."""
    return torch.float32 if dtype == torch.float16 else dtype


def plan(
    rows: int, width: int, columns: int, dtype: torch.dtype, walk: Walk, exponentials: bool = True, gradient_dtype=None
) -> Plan:
    """Choose schedule and chunk sizes for `rows` × `columns` scores of `width`-dimensional inputs of type `dtype`."""
    wide = accumulation_dtype(dtype).itemsize
    kept = dtype.itemsize if exponentials else wide
    fit = min(MOST_ROWS, walk.memory_budget // max(1, columns * kept))
    if walk.schedule == "eager" or (walk.schedule == "auto" and fit >= min(rows, EAGER_ROWS)):
        if columns * width * wide <= CACHED_BYTES:  # adding to dW costs nothing: chunks that stay in the caches too
            fit = min(fit, max(EAGER_ROWS, BLOCK_BYTES // max(1, columns * kept)))
        chunks = _divided_up(rows, max(1, fit))
        chunk_rows = _divided_up(rows, max(1, chunks))  # even chunks: a short last one wastes a pass over W
        block = _block(columns, BLOCK_BYTES // (max(1, chunk_rows) * wide))
        scratch = chunk_rows * block * wide if kept != wide else 0
        rounded = half(waiting_dtype(dtype if gradient_dtype is None else gradient_dtype))
        accumulator = columns * width * wide if rounded and chunks > 1 else 0
        tile = chunk_rows * columns * kept
        return Plan("eager", chunk_rows, chunks, block, tile, scratch, accumulator, exponentials)
    room = min(walk.memory_budget, BLOCK_BYTES)
    chunk_rows = max(1, min(rows, MOST_ROWS, room // (512 * wide)))
    block = _block(columns, room // (chunk_rows * wide))
    chunks = _divided_up(rows, chunk_rows)
    return Plan("recompute", chunk_rows, chunks, block, chunk_rows * block * wide, block * width * wide, 0)


def _block(columns: int, most: int) -> int:
    """Column blocks of even size, at most `most` and BLOCK_COLUMNS wide, in whole cache lines."""
    most = max(64, min(BLOCK_COLUMNS, most) // 64 * 64)
    count = _divided_up(max(1, columns), most)
    return _divided_up(_divided_up(max(1, columns), count), 64) * 64


def _divided_up(total: int, part: int) -> int:
    return -(-total // part)


def spans(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, max(1, step)):
        yield slice(start, min(total, start + step))


@dataclass(frozen=True, eq=False)
class Stream:
    """Scores as the walks see them: kept rows only, operands in the type in which they are multiplied."""

    x: Tensor  # (N, D), or the logits (N, V) when weight is None
    weight: Tensor | None
    bias: Tensor | None
    class_scale: Tensor | None
    class_shift: Tensor | None
    softcap: float
    scale: float
    kept: Tensor | None  # indices of the rows that count; None when all do
    backend: ModuleType

    @property
    def rows(self) -> int:
        return self.x.shape[0] if self.kept is None else self.kept.shape[0]

    @property
    def columns(self) -> int:
        return self.x.shape[1] if self.weight is None else self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.x.dtype if self.weight is None else self.weight.dtype

    def take(self, tensor: Tensor, rows: slice) -> Tensor:
        return tensor[rows] if self.kept is None else tensor.index_select(0, self.kept[rows])

    def input(self, rows: slice) -> Tensor:
        taken = self.take(self.x, rows)
        return taken if self.weight is None else taken.to(self.weight.dtype)

    def tile(self, data: Tensor, columns: slice) -> Tile:
        vectors = [None if v is None else v[columns] for v in (self.bias, self.class_scale, self.class_shift)]
        return Tile(data, columns.start, *vectors, self.softcap, self.scale)

    def put(self, out: Tensor, rows: slice, values: Tensor) -> None:
        """Write the rows of a chunk back to where they came from."""
        if self.kept is None:
            out[rows] = values
        else:
            out.index_copy_(0, self.kept[rows], values.to(out.dtype))

    def compute(self, out: Tensor, x: Tensor, columns: slice) -> Tile:
        """Raw scores of some rows in some columns, into `out`."""
        self.backend.gemm(out, x, self.weight[columns].t(), accumulate=False)
        return self.tile(out, columns)


def narrowed(buffer: Tensor, columns: slice, dtype: torch.dtype) -> Tensor:
    """Where the gradient of buffer[:, columns] is stored: in place, in the GEMMs' operand type.

    A half-precision row takes the first half of its own fp32 row, so a tile of fp32 scores costs no second buffer.
    """
    if dtype == buffer.dtype:
        return buffer[:, columns]
    factor = buffer.dtype.itemsize // dtype.itemsize
    return buffer.view(dtype)[:, columns.start * factor : columns.start * factor + (columns.stop - columns.start)]


@dataclass(eq=False)
class Gradients:
    """Buffers that a gradient sweep fills; None where nobody asked."""

    x: Tensor | None
    weight: Tensor | None
    sums: Sums


def statistics_sweep(stream: Stream, stats: Sequence[Statistic], layout: Plan) -> list[Tensor]:
    """States of all statistics for all kept rows. `stats` carry the kept rows."""
    states = [s.identity(stream.rows, stream.x.device) for s in stats]
    buffer = None if stream.weight is None else _buffer(stream, layout.chunk_rows, layout.block_columns)
    for rows in spans(stream.rows, layout.chunk_rows):
        x = stream.input(rows)
        mine = [s.taking(rows) for s in stats]
        for columns in spans(stream.columns, layout.block_columns):
            out = x[:, columns] if buffer is None else _corner(buffer, rows, columns)
            tile = stream.tile(out, columns) if buffer is None else stream.compute(out, x, columns)
            stream.backend.statistics(tile, [s.taking(columns=columns) for s in mine], [s[rows] for s in states])
    return states


def gradient_sweep(
    stream: Stream,
    stats: Sequence[Statistic],
    states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    into: Gradients,
    layout: Plan,
) -> None:
    """Gradients from coefficients ∂L/∂value per row, computing every block again."""
    backend, wait = stream.backend, accumulation_dtype(stream.dtype)
    if stream.weight is None:
        for rows in spans(stream.rows, layout.chunk_rows):
            data = stream.input(rows)
            tile = stream.tile(data, slice(0, stream.columns))
            direct = stream.kept is None and into.x is not None
            out = into.x[rows] if direct else torch.empty_like(data)
            cut = [s[rows] for s in states], [c[rows] for c in coefficients]
            backend.gradient(tile, out, [s.taking(rows) for s in stats], *cut, into.sums)
            if into.x is not None and not direct:
                stream.put(into.x, rows, out)
        return
    if stream.rows == 0:  # the gradients are 0 already; a block of dW without rows would stay unwritten
        return

    buffer = _buffer(stream, layout.chunk_rows, layout.block_columns)
    dx = into.x
    if dx is not None and (stream.kept is not None or dx.dtype != wait):
        dx = empty((stream.rows, stream.x.shape[1]), wait, stream.x.device)
    whole = into.weight is not None and into.weight.dtype == wait
    for columns in spans(stream.columns, layout.block_columns):
        block = None
        if into.weight is not None:
            block = into.weight[columns] if whole else torch.empty_like(into.weight[columns], dtype=wait)
        for rows in spans(stream.rows, layout.chunk_rows):
            x = stream.input(rows)
            corner = _corner(buffer, rows, columns)
            tile = stream.compute(corner, x, columns)
            out = narrowed(buffer[: corner.shape[0]], slice(0, corner.shape[1]), stream.dtype)
            mine = [s.taking(rows, columns) for s in stats]
            cut = [s[rows] for s in states], [c[rows] for c in coefficients]
            backend.gradient(tile, out, mine, *cut, into.sums.taking(columns))
            if dx is not None:
                backend.gemm(dx[rows], out, stream.weight[columns], accumulate=columns.start > 0)
            if block is not None:
                backend.gemm(block, out.t(), x, accumulate=rows.start > 0)
        if block is not None and not whole:
            into.weight[columns] = block
    if dx is not into.x:
        stream.put(into.x, slice(0, stream.rows), dx)


def keeps_exponentials(stream: Stream, stats: Sequence[Statistic], sums: Sums) -> bool:
    """Whether exp(s − shift) is all that the gradient needs of a score: one plain log-sum-exp, single scores, no softcap."""
    plain = [s for s in stats if isinstance(s, LogSumExp) and s.factor == 1.0]
    rest = [s for s in stats if not isinstance(s, (Score, Mass))]
    return len(plain) == 1 and len(rest) == 1 and not stream.softcap and sums.scale is None and sums.class_scale is None


def eager_sweep(
    stream: Stream,
    stats: Sequence[Statistic],
    step: Callable[[slice, list[Tensor]], list[Tensor]],
    into: Gradients,
    layout: Plan,
    threshold: float,
) -> None:
    """Statistics, loss and gradients chunk by chunk; `step` maps a chunk's states to its coefficients."""
    backend, wide, device = stream.backend, accumulation_dtype(stream.dtype), stream.x.device
    blocks = list(spans(stream.columns, layout.block_columns))
    kept_dtype = stream.dtype if layout.exponentials else wide
    buffer = empty((layout.chunk_rows, stream.columns), kept_dtype, device)
    scratch = None if kept_dtype == wide else _buffer(stream, layout.chunk_rows, layout.block_columns)
    shifts = torch.empty(len(blocks), layout.chunk_rows, dtype=wide, device=device)
    dw = into.weight
    if layout.accumulator_bytes and dw is not None:
        dw = empty(dw.shape, wide, device)

    for rows in spans(stream.rows, layout.chunk_rows):
        x = stream.input(rows)
        count = rows.stop - rows.start
        tile = buffer[:count]
        mine = [s.taking(rows) for s in stats]
        cut = [[s.taking(columns=columns) for s in mine] for columns in blocks]
        kept = [
            Exponentials(tile[:, c], shift[:count]) if layout.exponentials else None for c, shift in zip(blocks, shifts)
        ]
        states = [s.identity(count, device) for s in stats]
        for number, columns in enumerate(blocks):
            raw = tile[:, columns] if scratch is None else _corner(scratch, rows, columns)
            backend.statistics(stream.compute(raw, x, columns), cut[number], states, kept[number])
        coefficients = step(rows, states)

        dx = None
        if into.x is not None:
            direct = stream.kept is None and into.x.dtype == wide
            dx = into.x[rows] if direct else empty((count, stream.x.shape[1]), wide, device)
        for number in reversed(range(len(blocks))):  # backwards: the last blocks are still in the caches
            columns = blocks[number]
            sums = into.sums.taking(columns)
            if threshold > 0:
                sums = replace(sums, largest=torch.zeros(columns.stop - columns.start, dtype=wide, device=device))
            part = stream.tile(tile[:, columns], columns)
            if layout.exponentials:
                out = tile[:, columns]
                backend.gradient_of_exponentials(part, kept[number], cut[number], states, coefficients, sums)
            else:
                out = narrowed(tile, columns, stream.dtype)
                backend.gradient(part, out, cut[number], states, coefficients, sums)
            weight, live = stream.weight[columns], None
            if threshold > 0:
                live = (sums.largest >= threshold).nonzero().squeeze(1)
                out, weight = out.index_select(1, live), weight.index_select(0, live)
            if dx is not None:
                backend.gemm(dx, out, weight, accumulate=number < len(blocks) - 1)
            if dw is not None:
                _add_to_weight(stream, dw[columns], out, x, live, first=rows.start == 0)
        if dx is not None and not direct:
            stream.put(into.x, rows, dx)
    if dw is not into.weight:
        into.weight.copy_(dw)


def _add_to_weight(stream: Stream, dw: Tensor, out: Tensor, x: Tensor, live: Tensor | None, first: bool) -> None:
    """dW block (+)= outᵀ x, or only its `live` classes when the others were filtered out."""
    wide = accumulation_dtype(stream.dtype)
    if live is None and dw.dtype == wide:
        stream.backend.gemm(dw, out.t(), x, accumulate=not first)
        return
    part = torch.empty(out.shape[1], dw.shape[1], dtype=wide, device=dw.device)
    stream.backend.gemm(part, out.t(), x, accumulate=False)
    if live is None:  # the only chunk: rounded once, here
        dw.copy_(part)
        return
    if first:
        dw.zero_()
    dw.index_add_(0, live, part.to(dw.dtype))


def _buffer(stream: Stream, rows: int, columns: int) -> Tensor:
    return empty((rows, columns), accumulation_dtype(stream.dtype), stream.x.device)


def _corner(buffer: Tensor, rows: slice, columns: slice) -> Tensor:
    return buffer[: rows.stop - rows.start, : columns.stop - columns.start]
