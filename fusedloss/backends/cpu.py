"""The CPU backend: the compiled tile primitives of csrc/, and the fastest GEMM with fp32 sums that this process has."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .. import statistics as S
from . import torch as plain
from .native import (
    DTYPES,
    _native,
    arguments,
    compiled,
    compiled_across,
    load_error,
    native_sums,
    native_tile,
)
from .tile import CPU_LIMITS, Across, Exponentials, Limits, Sums, Tile
from .torch import gemm as plain_gemm

name = "cpu"


def why_not() -> str | None:
    """Why this backend cannot run here; None when it can."""
    return load_error


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """float64 is left to the torch backend: it is for checking, not for speed."""
    return device.type == "cpu" and dtype in DTYPES


def limits(device: torch.device) -> Limits:
    return CPU_LIMITS


# --- GEMM with fp32 sums ---------------------------------------------------------------------------------------------


@functools.cache
def _processor() -> tuple[str, frozenset[str]]:
    """(vendor, feature flags) as Linux tells them; empty elsewhere."""
    vendor, flags = "", ""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                key, _, value = line.partition(":")
                if key.strip() == "vendor_id":
                    vendor = value.strip()
                elif key.strip() == "flags":
                    flags = value
                    break
    return vendor, frozenset(flags.split())


@functools.cache
def _blas(symbol: str):
    """A BLAS routine that torch brought along, or None. Torch itself offers no half × half → fp32 product."""
    folder = os.path.join(os.path.dirname(torch.__file__), "lib")
    suffix = {"Darwin": ".dylib", "Windows": ".dll"}.get(platform.system(), ".so")
    try:
        return getattr(ctypes.CDLL(os.path.join(folder, f"libtorch_cpu{suffix}")), symbol)
    except (OSError, AttributeError):
        return None


@functools.cache
def gemm_kind(dtype: torch.dtype) -> str:
    """Which GEMM multiplies operands of this type: "native", "blas" or "torch" (fp32 copies of both operands)."""
    vendor, flags = _processor()
    native = _native is not None and _native.gemm_available(DTYPES[dtype])
    if dtype == torch.bfloat16 and "amx_bf16" in flags and _blas("cblas_gemm_bf16bf16f32"):
        return "blas"
    if dtype == torch.float32 and vendor == "GenuineIntel":
        return "torch"  # MKL is at the peak there; on other processors it runs AVX2 code
    return "native" if native else "torch"


def gemm(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b, fp32 sums whatever the operands' type; columns of out contiguous."""
    kind = gemm_kind(a.dtype)
    if kind == "native":
        refused = _native.gemm(
            *(out.shape[0], out.shape[1], a.shape[1]),
            *(a.data_ptr(), a.stride(0), a.stride(1)),
            *(b.data_ptr(), b.stride(0), b.stride(1)),
            *(out.data_ptr(), out.stride(0), DTYPES[a.dtype], accumulate),
        )
        if refused:  # a layout that it does not read, or no memory; nothing was written
            plain_gemm(out, a, b, accumulate)
    elif kind == "blas":
        _blas_gemm(out, a, b, accumulate)
    else:
        plain_gemm(out, a, b, accumulate)


def _blas_gemm(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    (m, n), k = out.shape, a.shape[1]
    if m == 0 or n == 0:
        return
    row_major, plain, transposed = 101, 111, 112
    operands = []
    for matrix in (a, b):
        flip = matrix.stride(1) != 1 and matrix.shape[1] > 1
        pitch, length = (matrix.stride(1), matrix.shape[0]) if flip else (matrix.stride(0), matrix.shape[1])
        # Of a single row the stride may be anything; the library refuses one below the row's length, writing nothing.
        operands.append((transposed if flip else plain, matrix.data_ptr(), max(1, pitch, length)))
    (flip_a, data_a, pitch_a), (flip_b, data_b, pitch_b) = operands
    c_int, c_float, address = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    _blas("cblas_gemm_bf16bf16f32")(
        *map(c_int, (row_major, flip_a, flip_b, m, n, k)),
        *(c_float(1.0), address(data_a), c_int(pitch_a), address(data_b), c_int(pitch_b)),
        *(c_float(1.0 if accumulate else 0.0), address(out.data_ptr()), c_int(max(n, out.stride(0)))),
    )


def take_columns(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix[:, columns] for rising columns; it may lie in the matrix' own memory, which is then spoilt."""
    _native.take_columns(
        *(matrix.data_ptr(), matrix.shape[0], matrix.stride(0), DTYPES[matrix.dtype]),
        *(columns.data_ptr(), len(columns)),
    )
    return matrix[:, : len(columns)]


# --- tile primitives -------------------------------------------------------------------------------------------------


def statistics(
    tile: Tile, stats: Sequence[S.Statistic], states: Sequence[Tensor], keep: Exponentials | None = None
) -> None:
    """Merge the tile into the states, in place; with `keep`, also fill it in for `gradient_of_exponentials`."""
    if not compiled(stats):
        return plain.statistics(tile, stats, states, keep)
    given = arguments(stats, states, kept=keep)
    _native.statistics(native_tile(tile), [a.native for a in given])


def column_statistics(tile: Tile, stats: Sequence[S.Statistic], states: Sequence[Tensor]) -> None:
    """Merge the tile into states of its columns; the statistics see it transposed."""
    if not compiled_across(stats):
        return plain.column_statistics(tile, stats, states)
    given = arguments(stats, states)
    _native.column_statistics(native_tile(tile), [a.native for a in given])


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
    if not compiled(stats) or (across is not None and not compiled_across(across.stats)):
        return plain.gradient(tile, out, stats, states, coefficients, sums, across)
    given = arguments(stats, states, coefficients)
    below = [] if across is None else arguments(across.stats, across.states, across.coefficients)
    _native.gradient(
        *(native_tile(tile), out.data_ptr(), out.stride(0), DTYPES[out.dtype]),
        *([a.native for a in given], native_sums(sums), [a.native for a in below]),
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
    _native.gradient_of_exponentials(
        native_tile(replace(tile, data=kept.data)), [a.native for a in given], native_sums(sums)
    )


def describe(dtype: torch.dtype) -> str:
    products = {"native": "own GEMM", "blas": "BLAS of torch", "torch": "torch GEMM on fp32 copies"}[gemm_kind(dtype)]
    if dtype == torch.float32 and gemm_kind(dtype) == "torch":
        products = "torch GEMM"
    return f"cpu ({_native.isa()} kernels, {products})"
