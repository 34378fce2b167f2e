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
from .tile import Exponentials, Limits, Sums, Tile
from .torch import gemm as plain_gemm

try:
    from .. import _native
except ImportError as error:  # kept, and shown by `info()`
    _native, _error = None, error

name = "cpu"
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def why_not() -> str | None:
    """Why this backend cannot run here; None when it can."""
    return None if _native is not None else f"the compiled extension did not load: {_error!r}"


def supports(device: torch.device, dtype: torch.dtype) -> bool:
    """float64 is left to the torch backend: it is for checking, not for speed."""
    return device.type == "cpu" and dtype in _DTYPES


def limits(device: torch.device) -> Limits:
    """Measured; see docs/performance.md. A block stays in the caches between the GEMM and the pass over it."""
    return Limits(
        budget=256 << 20,
        eager_rows=192,
        most_rows=2048,
        block_bytes=8 << 20,
        recompute_bytes=8 << 20,
        block_columns=2048,
        cached_bytes=4 << 20,
        kept_columns=2048,
        in_place=False,
    )


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
    """A BLAS routine of the library that torch brought along, or None. Torch itself offers no half × half → fp32 product."""
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
    native = _native is not None and _native.gemm_available(_DTYPES[dtype])
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
            *(out.data_ptr(), out.stride(0), _DTYPES[a.dtype], accumulate),
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
        pitch = matrix.stride(1) if flip else matrix.stride(0)
        operands.append((transposed if flip else plain, matrix.data_ptr(), max(1, pitch)))
    (flip_a, data_a, pitch_a), (flip_b, data_b, pitch_b) = operands
    c_int, c_float, address = ctypes.c_int, ctypes.c_float, ctypes.c_void_p
    _blas("cblas_gemm_bf16bf16f32")(
        *map(c_int, (row_major, flip_a, flip_b, m, n, k)),
        *(c_float(1.0), address(data_a), c_int(pitch_a), address(data_b), c_int(pitch_b)),
        *(c_float(1.0 if accumulate else 0.0), address(out.data_ptr()), c_int(max(1, out.stride(0)))),
    )


def take_columns(matrix: Tensor, columns: Tensor) -> Tensor:
    """matrix[:, columns] for rising columns; it may lie in the matrix' own memory, which is then spoilt."""
    _native.take_columns(
        *(matrix.data_ptr(), matrix.shape[0], matrix.stride(0), _DTYPES[matrix.dtype]),
        *(columns.data_ptr(), len(columns)),
    )
    return matrix[:, : len(columns)]


# --- tile primitives -------------------------------------------------------------------------------------------------


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _tile(tile: Tile):
    return _native.Tile(
        data=tile.data.data_ptr(),
        rows=tile.data.shape[0],
        columns=tile.data.shape[1],
        stride=tile.data.stride(0),
        dtype=_DTYPES[tile.data.dtype],
        first_column=tile.first,
        softcap=tile.softcap,
        scale=tile.scale,
        bias=_address(tile.bias),
        class_scale=_address(tile.class_scale),
        class_shift=_address(tile.class_shift),
    )


class _Arguments:
    """One statistic for the extension, and the tensors that must outlive the call."""

    def __init__(
        self,
        statistic: S.Statistic,
        state: Tensor,
        coefficient: Tensor | None = None,
        kept: Exponentials | None = None,
    ):
        self.held: list[Tensor] = []
        where = getattr(statistic, "where", None)
        fields = _FIELDS[type(statistic)](self, statistic)
        if where is not None:
            fields |= {"where": _native.REST, "rest": self.hold(where.column, torch.int64)}
        if kept is not None and isinstance(statistic, S.LogSumExp):
            data = kept.data
            fields |= {"keep": data.data_ptr(), "keep_stride": data.stride(0), "keep_dtype": _DTYPES[data.dtype]}
            assert kept.shift.shape[0] == 1
            fields["keep_shift"] = kept.shift.data_ptr()
        if coefficient is not None:
            fields["coefficient"] = self.hold(coefficient, torch.float32)
        assert state.is_contiguous()
        self.native = _native.Statistic(state=state.data_ptr(), **fields)

    def hold(self, tensor: Tensor | None, dtype: torch.dtype | None = None) -> int:
        if tensor is None:
            return 0
        self.held.append(tensor.to(dtype or tensor.dtype).contiguous())
        return self.held[-1].data_ptr()

    def operand(self, tensor: Tensor | None) -> dict:
        """A class vector, or a matrix that is read where it lies."""
        if tensor is None:
            return {}
        if tensor.dim() == 2 and tensor.dtype in _DTYPES and tensor.stride(1) == 1:
            self.held.append(tensor)
            return {
                "operand": tensor.data_ptr(),
                "operand_stride": tensor.stride(0),
                "operand_dtype": _DTYPES[tensor.dtype],
            }
        stride = tensor.shape[1] if tensor.dim() == 2 else 0
        return {"operand": self.hold(tensor, torch.float32), "operand_stride": stride}

    def score(self, s: S.Score) -> dict:
        shared = s.columns is not None
        at = s.columns if shared else s.at
        return {
            "kind": _native.SCORE,
            "count": s.width,
            "at": self.hold(at, torch.int64),
            "at_stride": 0 if shared else s.width,
        }

    def expectation(self, s: S.Expectation) -> dict:
        if s.values is None:
            function = _native.V_SCORE
        elif s.near is None:
            function = _native.V_OPERAND
        else:
            function = _native.V_ABSOLUTE if s.power == 1 else _native.V_SQUARE
        row = self.hold(s.near, torch.float32)
        return {
            "kind": _native.EXPECTATION,
            "function": function,
            "factor": s.factor,
            "row": row,
            **self.operand(s.values),
        }

    def sum_of(self, s: S.SumOf) -> dict:
        function = getattr(_native, f"F_{s.function.upper()}")
        row = self.hold(s.row, torch.float32)
        return {"kind": _native.SUM_OF, "function": function, "factor": s.factor, "parameter": s.parameter, "row": row}


_FIELDS = {
    S.Score: _Arguments.score,
    S.LogSumExp: lambda self, s: {"kind": _native.LOGSUMEXP, "factor": s.factor},
    S.Sum: lambda self, s: {"kind": _native.SUM, **self.operand(s.weights)},
    S.Count: lambda self, s: {"kind": _native.COUNT, **self.operand(s.weights)},
    S.SumOfSquares: lambda self, s: {"kind": _native.SUM_OF_SQUARES},
    S.Moments: lambda self, s: {"kind": _native.MOMENTS},
    S.Expectation: _Arguments.expectation,
    S.SumOf: _Arguments.sum_of,
    S.Extreme: lambda self, s: {"kind": _native.EXTREME, "count": s.k, "factor": s.factor},
}


def statistics(
    tile: Tile, stats: Sequence[S.Statistic], states: Sequence[Tensor], keep: Exponentials | None = None
) -> None:
    """Merge the tile into the states, in place; with `keep`, also fill it in for `gradient_of_exponentials`."""
    arguments = [_Arguments(s, state, kept=keep) for s, state in zip(stats, states)]
    _native.statistics(_tile(tile), [a.native for a in arguments])


def gradient(
    tile: Tile,
    out: Tensor,
    stats: Sequence[S.Statistic],
    states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    sums: Sums,
) -> None:
    """out = ∂L/∂a of the tile, given ∂L/∂value of every statistic; `out` may share the tile's memory."""
    arguments = []
    for statistic, state, coefficient in zip(stats, states, coefficients):
        if isinstance(statistic, S.Moments):
            coefficient = coefficient[:, 1:]  # the count has no derivative
        arguments.append(_Arguments(statistic, state, coefficient))
    _native.gradient(
        _tile(tile), out.data_ptr(), out.stride(0), _DTYPES[out.dtype], [a.native for a in arguments], _sums(sums)
    )


def gradient_of_exponentials(
    tile: Tile,
    kept: Exponentials,
    stats: Sequence[S.Statistic],
    states: Sequence[Tensor],
    coefficients: Sequence[Tensor],
    sums: Sums,
) -> None:
    """∂L/∂a in place of kept.data. The statistics are one LogSumExp of factor 1, and Scores; `tile.data` is not read."""
    arguments = [_Arguments(*each, kept=kept) for each in zip(stats, states, coefficients)]
    _native.gradient_of_exponentials(_tile(replace(tile, data=kept.data)), [a.native for a in arguments], _sums(sums))


def _sums(sums: Sums):
    fields = ("bias", "class_shift", "class_scale", "scale", "largest")
    asked = {field: _address(getattr(sums, field)) for field in fields}
    return _native.Sums(**asked) if any(asked.values()) else None


def describe(dtype: torch.dtype) -> str:
    products = {"native": "own GEMM", "blas": "BLAS of torch", "torch": "torch GEMM on fp32 copies"}[gemm_kind(dtype)]
    if dtype == torch.float32 and gemm_kind(dtype) == "torch":
        products = "torch GEMM"
    return f"cpu ({_native.isa()} kernels, {products})"
