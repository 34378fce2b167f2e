"""Backends: who computes the tile primitives `gemm`, `statistics` and `gradient`, and which one is live."""

from __future__ import annotations

from types import ModuleType

from torch import device as Device
from torch import dtype as DType

# `torch` and `triton` below are the backends of those names, not the packages.
from . import cpu, cuda, torch, triton

# In order of preference; the last one takes everything.
BACKENDS: tuple[ModuleType, ...] = (cpu, cuda, triton, torch)


def choose(device: Device, dtype: DType, wanted: str = "auto") -> ModuleType:
    """The backend for scores of this device and type; `wanted` forces one by name."""
    for backend in BACKENDS:
        if wanted not in ("auto", backend.name):
            continue
        if backend.why_not() is None and backend.supports(device, dtype):
            return backend
        if wanted == backend.name:
            reason = backend.why_not() or f"it does not take {dtype} scores on {device}"
            raise RuntimeError(f"fusedloss: backend={wanted!r} was asked for, but {reason}")
    raise ValueError(f"fusedloss: backend: expected 'auto' or one of {[b.name for b in BACKENDS]}, got {wanted!r}")


def report() -> list[tuple[str, str, str]]:
    """(device, dtype, what computes it) for the devices of this process, and why other backends do not."""
    from torch import bfloat16, cuda, float16, float32, float64

    rows = []
    for kind in ["cpu"] + (["cuda"] if cuda.is_available() else []):
        for dtype in (float32, bfloat16, float16, float64):
            live = choose(Device(kind), dtype)
            rows.append((kind, str(dtype).removeprefix("torch."), live.describe(dtype)))
    rows += [(backend.name, "not live", reason) for backend in BACKENDS if (reason := backend.why_not()) is not None]
    return rows
