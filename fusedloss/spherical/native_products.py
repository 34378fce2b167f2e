"""The compiled steps' products: the BLAS that torch brought along, and whether it is there."""

from __future__ import annotations

import ctypes
import functools

import torch
from torch import Tensor

from ..backends.cpu import _blas
from ..backends.native import _native, load_error
from ..checks import expect

F64 = torch.float64
LETTERS = {torch.float32: "s", F64: "d"}
ROUTINES = ("gemm", "getrf", "trsm")


@functools.cache
def why_not() -> str | None:
    """Why these steps cannot run here; None when they can."""
    if load_error is not None:
        return load_error
    missing = [name for letter in "sd" for name in (f"{letter}{part}_" for part in ROUTINES) if _blas(name) is None]
    return f"torch's libtorch_cpu has no {', '.join(missing)}" if missing else None


def supports(p: Tensor) -> bool:
    """Whether they take this P."""
    return p.device.type == "cpu" and p.dtype in LETTERS and p.stride(1) == 1


@functools.cache
def blas(dtype: torch.dtype):
    routines = [_blas(f"{LETTERS[dtype]}{part}_") for part in ROUTINES] + [_blas("MKL_Set_Num_Threads_Local")]
    return _native.Blas(*(ctypes.cast(r, ctypes.c_void_p).value if r else 0 for r in routines))


def address(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The address of a tensor that has to be so."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
        got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
        expect(False, "fusedloss.spherical", name, f"a contiguous {shape} {dtype} on the CPU", got)
    return tensor.data_ptr()


def multiply(p: Tensor, k: Tensor) -> None:
    """P ← P K in place."""
    n, d = p.shape
    k = k.to(F64).contiguous()
    factors = _native.Factors(n, d, p.stride(0) if n > 1 else d, int(p.dtype is F64), p.data_ptr())
    _native.spherical_multiply(factors, blas(p.dtype), address("k", k, (d, d), F64))
