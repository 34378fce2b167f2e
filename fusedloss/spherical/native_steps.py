"""A step of the factored layer in C++, on the CPU: steps.py's meaning, one call for each of its three phases.

Its products are those of the BLAS that torch brought along, cut so that no result depends on the number of threads.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch
from torch import Tensor

from ..backends.cpu import _blas
from ..backends.native import _native, load_error
from ..checks import expect
from . import steps
from .factors import Factors
from .family import Member
from .steps import F64, Batch, Visit

I64 = torch.int64
LETTERS = {torch.float32: "s", F64: "d"}
ROUTINES = ("gemm", "getrf", "trsm")

# The number of a loss and its parameters' names and defaults, in the order of the C surface.
LOSSES = {
    "squared_error_loss": ("SPHERICAL_SQUARED", {"value": 1.0, "k": 1.0, "mean_over_classes": True}),
    "spherical_softmax_loss": ("SPHERICAL_SOFTMAX", {"eps": 0.01}),
    "taylor_softmax_loss": ("SPHERICAL_TAYLOR", {}),
    "spherical_z_loss": ("SPHERICAL_Z", {"a": 1.0, "b": 0.0, "eps": 1e-6}),
}


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


def _is(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """The address of a tensor that has to be so."""
    if tensor.shape != shape or tensor.dtype is not dtype or not tensor.is_contiguous() or not tensor.is_cpu:
        got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
        expect(False, "fusedloss.spherical", name, f"a contiguous {shape} {dtype} on the CPU", got)
    return tensor.data_ptr()


def _empty(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    """On the CPU, whatever the default device."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _factors(f: Factors):
    (n, d), p = f.p.shape, f.p
    state = [_is(name, getattr(f, name), (d, d), F64) for name in ("u", "inverse", "gram")]
    state += [_is(name, getattr(f, name), (d,), F64) for name in ("offset", "mean")]
    return _native.Factors(n, d, p.stride(0) if n > 1 else d, int(p.dtype is F64), p.data_ptr(), *state)


@functools.lru_cache(maxsize=256)
def _loss(member: Member) -> tuple[float, ...]:
    number, defaults = LOSSES[member.name]
    parameters = [float(value) for value in (defaults | dict(member.options)).values()]
    return getattr(_native, number), *parameters, *(0.0,) * (3 - len(parameters))


def visit(f: Factors, h: Tensor, target: Tensor, share: Tensor, loss: Member) -> Visit:
    """h (m, d) of P's dtype; target (m, K) in [0, n); share (m, K) float64, 0 for no target."""
    h, target, share = h.contiguous(), target.contiguous(), share.contiguous()
    (m, k), d, dtype = target.shape, f.p.shape[1], f.p.dtype
    given = _is("h", h, (m, d), dtype), _is("target", target, (m, k), I64), _is("share", share, (m, k), F64)
    losses, alpha, (t, gamma) = _empty(m), _empty(m, k), _empty(2, m).unbind()
    hq, hu, picked = _empty(3, m, d, dtype=dtype).unbind()
    out = (x.data_ptr() for x in (losses, t, gamma, alpha, hq, hu, picked))
    _native.spherical_visit(_factors(f), blas(dtype), *_loss(loss), m, k, *given, *out)
    return Visit(losses, alpha, t, gamma, h, target, hq, hu, picked)


def backward(f: Factors, v: Visit, upstream: Tensor) -> tuple[Tensor, Batch]:
    """upstream (m,) float64 → ∂L/∂H (m, d) and the batch."""
    (m, k), d, dtype = v.target.shape, f.p.shape[1], f.p.dtype
    upstream = upstream.contiguous()
    given = _is("target", v.target, (m, k), I64), _is("upstream", upstream, (m,), F64)
    given += _is("t", v.t, (m,), F64), _is("gamma", v.gamma, (m,), F64), _is("alpha", v.alpha, (m, k), F64)
    given += _is("hq", v.hq, (m, d), dtype), _is("picked", v.picked, (m, d), dtype)
    alpha, (t, gamma) = _empty(m, k), _empty(2, m).unbind()
    dh, (yw, gh) = _empty(m, d, dtype=dtype), _empty(2, m, d, dtype=dtype).unbind()
    out = (x.data_ptr() for x in (t, gamma, alpha, yw, gh, dh))
    _native.spherical_backward(_factors(f), blas(dtype), m, k, *given, *out)
    return dh, Batch(alpha, t, gamma, v.h, v.target, v.hu, yw, gh)


def step(f: Factors, b: Batch, lr: float, decay: float = 0.0, limit: float = math.inf) -> bool:
    """As in steps.py."""
    (m, k), d, dtype = b.target.shape, f.p.shape[1], f.p.dtype
    b = Batch(**{name: part.contiguous() for name, part in vars(b).items()})
    given = _is("h", b.h, (m, d), dtype), _is("target", b.target, (m, k), I64)
    given += _is("t", b.t, (m,), F64), _is("gamma", b.gamma, (m,), F64), _is("alpha", b.alpha, (m, k), F64)
    given += tuple(_is(name, getattr(b, name), (m, d), dtype) for name in ("hu", "yw", "gh"))
    ill = not _native.spherical_step(_factors(f), blas(dtype), lr, 1 - lr * decay, limit, m, k, *given)
    if ill:
        steps.fold(f, b, lr, 1 - lr * decay)
    return ill


def multiply(p: Tensor, k: Tensor) -> None:
    """P ← P K in place."""
    n, d = p.shape
    k = k.to(F64).contiguous()
    factors = _native.Factors(n, d, p.stride(0) if n > 1 else d, int(p.dtype is F64), p.data_ptr())
    _native.spherical_multiply(factors, blas(p.dtype), _is("k", k, (d, d), F64))
