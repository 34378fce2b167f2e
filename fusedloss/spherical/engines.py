"""Who computes the steps of a factored layer: each engine has `visit`, `backward` and `step` as steps.py means them, and
says in `upkeep` whether its step keeps U well-conditioned too."""

from __future__ import annotations

from types import ModuleType

import torch

from .. import backends
from . import native_steps, steps
from .factors import Factors


def engine(f: Factors) -> ModuleType:
    """The fastest one for where the factors lie."""
    native = native_steps.supports(f.p) and native_steps.why_not() is None
    return _device_steps(f.p.device) or (native_steps if native else steps)


def _device_steps(device: torch.device) -> ModuleType | None:
    """Triton's, where that backend is the first live one: the `cuda` kernels have none. Of float64 factors too."""
    for backend in backends.BACKENDS:
        if backend is not backends.cuda and backend.supports(device, torch.float32) and backend.why_not() is None:
            break
    if backend is not backends.triton:
        return None
    from . import device_steps  # not above: it imports triton

    return device_steps
