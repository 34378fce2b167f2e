"""The CUDA backend: the compiled tile primitives of csrc/*.cu, and cuBLAS with fp32 sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import statistics as S
from . import triton
from .cublas import gemm  # noqa: F401
from . import torch as plain
from .native import DTYPES, _native, arguments, compiled, compiled_across, load_error, native_sums, native_tile
from .tile import Across, Exponentials, Sums, Tile
from .triton import limits, linear_gradient, linear_statistics  # noqa: F401 (here too: no product is compiled)

name = "cuda"
reads_scale = True  # a learnable scale is read by the device, without a wait


def why_not() -> str | None:
    """Why this backend cannot run here; None when it can."""
    if load_error is not None:
        return load_error
    if not _native.cuda_compiled():
        return "the extension was built without nvcc: it has no CUDA kernels"
    if torch.version.cuda is None:
        return "this PyTorch was built without CUDA"
    if not torch.cuda.is_available():
        return "torch.cuda.is_available() is False: no CUDA device or no driver"
    return None


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """float64 is left to the torch backend: it is for checking, not for speed."""
    return device.type == "cuda" and dtype in DTYPES




def take_columns(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix[:, columns] for rising columns; it may lie in the matrix' own memory, which is then spoilt."""
    return matrix.index_select(1, columns)


# --- tile primitives -------------------------------------------------------------------------------------------------


def _launch(device: torch.device, bytes: int, call: Callable[[int, int, int], None]) -> None:
    """call(workspace, its bytes, stream) on the stream that PyTorch is using. Nothing waits: PyTorch's allocator hands
    memory out again in the order of the stream."""
    with torch.cuda.device(device):
        workspace = torch.empty(bytes, dtype=torch.uint8, device=device)
        call(workspace.data_ptr(), bytes, torch.cuda.current_stream(device).cuda_stream)


def statistics(
    tile: Tile, stats: Sequence[S.Statistic], states: Sequence[Tensor], keep: Exponentials | None = None
) -> None:
    """Merge the tile into the states, in place; with `keep`, also fill it in for `gradient_of_exponentials`."""
    if not compiled(stats):
        return plain.statistics(tile, stats, states, keep)
    given = arguments(stats, states, kept=keep)
    what = native_tile(tile), [a.native for a in given]
    _launch(
        tile.data.device,
        _native.cuda_statistics_workspace(*what),
        lambda *memory: _native.cuda_statistics(*what, *memory),
    )


def _takes_across(stats: Sequence[S.Statistic]) -> bool:
    """Whether there are kernels for these as statistics of columns. What picks single scores is left to PyTorch."""
    return compiled_across(stats) and not any(isinstance(s, (S.Score, S.Extreme)) for s in stats)


def column_statistics(tile: Tile, stats: Sequence[S.Statistic], states: Sequence[Tensor]) -> None:
    """Merge the tile into states of its columns; the statistics see it transposed."""
    pairs = list(zip(stats, states))
    left = [pair for pair in pairs if not _takes_across(pair[:1])]
    mine = [pair for pair in pairs if _takes_across(pair[:1])]
    if left:
        plain.column_statistics(tile, *zip(*left))
    if mine:
        given = arguments(*zip(*mine))
        what = native_tile(tile), [a.native for a in given]
        _launch(
            tile.data.device,
            _native.cuda_column_statistics_workspace(*what),
            lambda *memory: _native.cuda_column_statistics(*what, *memory),
        )


def gradient(
    tile: Tile,
    out: Tensor,
    stats: Sequence[S.Statistic],
    states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    sums: Sums,
    across: Across | None = None,
) -> None:
    """out = ∂L/∂a of the tile, given ∂L/∂value of every statistic; `out` may share the tile's memory."""
    below = across or Across((), (), ())
    if not (compiled(stats) and _takes_across(below.stats)):
        return plain.gradient(tile, out, stats, states, coefficients, sums, across)
    given = arguments(stats, states, coefficients)
    lower = arguments(below.stats, below.states, below.coefficients)
    what = [a.native for a in given], native_sums(sums), [a.native for a in lower]
    native, to = native_tile(tile), (out.data_ptr(), out.stride(0), DTYPES[out.dtype])
    _launch(
        tile.data.device,
        _native.cuda_gradient_workspace(native, *what),
        lambda *memory: _native.cuda_gradient(native, *to, *what, *memory),
    )


def gradient_of_exponentials(
    tile: Tile,
    kept: Exponentials,
    stats: Sequence[S.Statistic],
    states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    sums: Sums,
) -> None:
    """∂L/∂a in place of kept.data. The statistics are one LogSumExp of factor 1, and Scores; `tile.data` is unread."""
    given = arguments(stats, states, coefficients, kept)
    what = native_tile(replace(tile, data=kept.data)), [a.native for a in given], native_sums(sums)
    _launch(
        kept.data.device,
        _native.cuda_gradient_workspace(*what),
        lambda *memory: _native.cuda_gradient_of_exponentials(*what, *memory),
    )


def fuses(stats: Sequence[S.Statistic], tile: Tile, across: Sequence[S.Statistic] = ()) -> bool:
    """Whether `linear_statistics` takes these; that one is Triton's."""
    return triton.why_not() is None and triton.fuses(stats, tile, across)


def fuses_gradient(stats: Sequence[S.Statistic], across: Across | None, sums: Sums, tile: Tile) -> bool:
    """The same of `linear_gradient`."""
    return triton.why_not() is None and triton.fuses_gradient(stats, across, sums, tile)


def describe(dtype: torch.dtype) -> str:
    return f"cuda (compiled kernels, {'cuBLAS' if dtype == torch.float32 else 'cuBLAS with fp32 sums'})"
