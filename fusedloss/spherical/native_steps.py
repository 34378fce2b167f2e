"""A step of the factored layer in C++, on the CPU: steps.py's meaning, one call for each of its three phases.

Its products are those of the BLAS that torch brought along, cut so that no result depends on the number of threads.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ..backends.native import _native
from . import steps
from .factors import Factors
from .family import Member
from .native_products import address, blas
from .steps import F64, Batch, Visit

I64 = torch.int64

# The number of a loss and its parameters' names, in the order of the C surface.
LOSSES = {
    "squared_error_loss": ("SPHERICAL_SQUARED", ("value", "k", "mean_over_classes")),
    "spherical_softmax_loss": ("SPHERICAL_SOFTMAX", ("eps",)),
    "taylor_softmax_loss": ("SPHERICAL_TAYLOR", ()),
    "spherical_z_loss": ("SPHERICAL_Z", ("a", "b", "eps")),
}


def _empty(*shape: int, dtype: torch.dtype = F64) -> Tensor:
    """On the CPU, whatever the default device."""
    return torch.empty(shape, dtype=dtype, device="cpu")


def _factors(f: Factors):
    (n, d), p = f.p.shape, f.p
    state = [address(name, getattr(f, name), (d, d), F64) for name in ("u", "inverse", "gram")]
    state += [address(name, getattr(f, name), (d,), F64) for name in ("offset", "mean")]
    return _native.Factors(n, d, p.stride(0) if n > 1 else d, int(p.dtype is F64), p.data_ptr(), *state)


@functools.lru_cache(maxsize=256)
def _loss(member: Member) -> tuple[float, ...]:
    (number, names), options = LOSSES[member.name], dict(member.options)
    parameters = [float(options[name]) for name in names]
    return getattr(_native, number), *parameters, *(0.0,) * (3 - len(parameters))


def visit(f: Factors, h: Tensor, target: Tensor, share: Tensor, loss: Member) -> Visit:
    """h (m, d) of P's dtype; target (m, K) in [0, n); share (m, K) float64, 0 for no target."""
    h, target, share = h.contiguous(), target.contiguous(), share.contiguous()
    (m, k), d, dtype = target.shape, f.p.shape[1], f.p.dtype
    given = address("h", h, (m, d), dtype), address("target", target, (m, k), I64), address("share", share, (m, k), F64)
    losses, alpha, (t, gamma) = _empty(m), _empty(m, k), _empty(2, m).unbind()
    hq, hu, picked = _empty(3, m, d, dtype=dtype).unbind()
    out = (x.data_ptr() for x in (losses, t, gamma, alpha, hq, hu, picked))
    _native.spherical_visit(_factors(f), blas(dtype), *_loss(loss), m, k, *given, *out)
    return Visit(losses, alpha, t, gamma, h, target, hq, hu, picked)


def backward(f: Factors, v: Visit, upstream: Tensor) -> tuple[Tensor, Batch]:
    """upstream (m,) float64 → ∂L/∂H (m, d) and the batch."""
    (m, k), d, dtype = v.target.shape, f.p.shape[1], f.p.dtype
    upstream = upstream.contiguous()
    given = address("target", v.target, (m, k), I64), address("upstream", upstream, (m,), F64)
    given += address("t", v.t, (m,), F64), address("gamma", v.gamma, (m,), F64), address("alpha", v.alpha, (m, k), F64)
    given += address("hq", v.hq, (m, d), dtype), address("picked", v.picked, (m, d), dtype)
    alpha, (t, gamma) = _empty(m, k), _empty(2, m).unbind()
    dh, (yw, gh) = _empty(m, d, dtype=dtype), _empty(2, m, d, dtype=dtype).unbind()
    out = (x.data_ptr() for x in (t, gamma, alpha, yw, gh, dh))
    _native.spherical_backward(_factors(f), blas(dtype), m, k, *given, *out)
    return dh, Batch(alpha, t, gamma, v.h, v.target, v.hu, yw, gh)


def step(f: Factors, b: Batch, lr: float, decay: float = 0.0, limit: float = math.inf) -> bool:
    """As in steps.py."""
    (m, k), d, dtype = b.target.shape, f.p.shape[1], f.p.dtype
    b = Batch(**{name: part.contiguous() for name, part in vars(b).items()})
    given = address("h", b.h, (m, d), dtype), address("target", b.target, (m, k), I64)
    given += address("t", b.t, (m,), F64), address("gamma", b.gamma, (m,), F64), address("alpha", b.alpha, (m, k), F64)
    given += tuple(address(name, getattr(b, name), (m, d), dtype) for name in ("hu", "yw", "gh"))
    ill = not _native.spherical_step(_factors(f), blas(dtype), lr, 1 - lr * decay, limit, m, k, *given)
    if ill:
        steps.fold(f, b, lr, 1 - lr * decay)
    return ill
