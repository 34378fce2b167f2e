"""The Triton backend: tile primitives on GPUs. Triton itself is imported at the first use, never by `import fusedloss`.

Every call is a fixed sequence of launches that depends on shapes, types and strides alone: nothing waits for the
device, so a CUDA graph can record it. In Triton's interpreter (TRITON_INTERPRET=1) the same kernels run on CPU tensors.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from .. import __path__ as package_path
from ..statistics import Statistic
from .cublas import gemm as device_gemm
from .tile import GPU_LIMITS, Across, Exponentials, Limits, Sums, Tile
from .torch import gemm as plain_gemm
from .torch import take_columns as take_columns

# An installed fusedloss has the folder kernels/ as fusedloss.kernels; in a bare checkout it lies beside the package.
if importlib.util.find_spec("fusedloss.kernels") is None:
    package_path.append(str(Path(__file__).resolve().parents[2]))

name = "triton"
reads_scale = True  # a learnable scale is read by the device, without a wait
# Columns to each row of `Exponentials.shift` that `linear_statistics` keeps: half of a program's block.
LINEAR_KEPT_COLUMNS = 64
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for; Triton reads the variable when a kernel is defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _loaded() -> tuple[ModuleType | None, BaseException | None]:
    """The module that launches the kernels, or why it could not be imported."""
    try:
        from . import triton_launch
    except Exception as error:  # kept, and shown by `info()`: a broken driver raises more than ImportError
        return None, error
    return triton_launch, None


def why_not() -> str | None:
    """Why this backend cannot run here; None when it can."""
    if not interpreted() and not torch.cuda.is_available():
        return "torch sees no CUDA or ROCm device, and TRITON_INTERPRET=1 is not set"
    module, error = _loaded()
    return None if module is not None else f"the Triton kernels did not load: {error!r}"


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """CPU tensors only in the interpreter; float64 is left to the torch backend: it is for checking, not for speed."""
    return device.type == ("cpu" if interpreted() else "cuda") and dtype in _DTYPES


def describe(dtype: torch.dtype) -> str:
    return "triton (interpreted)" if interpreted() else "triton (compiled kernels, cuBLAS or hipBLAS GEMM)"


def limits(device: torch.device) -> Limits:
    return replace(GPU_LIMITS, fused_columns=LINEAR_KEPT_COLUMNS)


# --- GEMM with fp32 sums ---------------------------------------------------------------------------------------------


def gemm(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b, fp32 sums whatever the operands' type: cuBLAS or hipBLAS."""
    (device_gemm if out.device.type == "cuda" else plain_gemm)(out, a, b, accumulate)


# --- tile primitives -------------------------------------------------------------------------------------------------


def _launcher(which: str = "triton_launch") -> ModuleType:
    module, error = _loaded()
    if module is None:
        raise RuntimeError(f"fusedloss: {why_not()}") from error
    return importlib.import_module(f".{which}", __package__)


def statistics(
    tile: Tile, stats: Sequence[Statistic], states: Sequence[Tensor], keep: Exponentials | None = None
) -> None:
    """Merge the tile into the states, in place; with `keep`, also fill it in for `gradient_of_exponentials`."""
    _launcher().statistics(tile, stats, states, keep)


def column_statistics(tile: Tile, stats: Sequence[Statistic], states: Sequence[Tensor]) -> None:
    """Merge the tile into states of its columns; the statistics see it transposed."""
    _launcher().column_statistics(tile, stats, states)


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
    _launcher().gradient(tile, out, stats, states, coefficients, sums, across)


def gradient_of_exponentials(
    tile: Tile,
    kept: Exponentials,
    stats: Sequence[Statistic],
    states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    sums: Sums,
) -> None:
    """∂L/∂a in place of kept.data. The statistics are one LogSumExp of factor 1, and Scores; `tile.data` is unread."""
    _launcher().gradient_of_exponentials(tile, kept, stats, states, coefficients, sums)


# --- GEMM and statistics in one --------------------------------------------------------------------------------------


def fuses(stats: Sequence[Statistic], tile: Tile, across: Sequence[Statistic] = ()) -> bool:
    """Whether `linear_statistics` takes these: not lists of extremes, nor scores at more than a few columns."""
    return _launcher().fuses([*stats, *across])


def linear_statistics(
    x: Tensor,
    weight: Tensor,
    tile: Tile,
    stats: Sequence[Statistic],
    states: Sequence[Tensor],
    keep: Exponentials | None = None,
    across: Sequence[Statistic] = (),
    below: Sequence[Tensor] = (),
) -> None:
    """`statistics` of the scores x (n, D) @ weight (m, D)ᵀ, which are never in memory; `tile.data` is not read.

    With `keep` (of LINEAR_KEPT_COLUMNS columns to a shift), exponentials are all that is written. `below` are the
    states of statistics `across`, those of columns.
    """
    _launcher().linear_statistics(x, weight, tile, stats, states, keep, across, below)


# --- GEMM and gradient in one ----------------------------------------------------------------------------------------


def fuses_gradient(stats: Sequence[Statistic], across: Across | None, sums: Sums, tile: Tile) -> bool:
    """Whether `linear_gradient` takes these: what `linear_statistics` takes, if it is not too much; any sums."""
    return _launcher("triton_linear_gradient").fuses_gradient(stats, across)


def linear_gradient(
    x: Tensor,
    weight: Tensor,
    tile: Tile,
    out: Tensor,
    stats: Sequence[Statistic],
    states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    sums: Sums,
    across: Across | None = None,
    visit_states: Sequence[Tensor] | None = None,
) -> None:
    """`gradient` of the scores x (n, D) @ weight (m, D)ᵀ, which are never in memory; `tile.data` is not read.

    With `visit_states`, the scores are merged into them as by `statistics`; the slopes look at `states` as they were.
    """
    given = x, weight, tile, out, stats, states, coefficients, sums, across, visit_states
    _launcher("triton_linear_gradient").linear_gradient(*given)
