"""Who computes the steps of a factored layer: each engine has `visit`, `backward` and `step` as steps.py means them."""

from __future__ import annotations

from types import ModuleType

import torch

from .. import backends
from . import native_products, native_steps, steps
from .factors import Factors


def engine(f: Factors) -> ModuleType:
    """That of the first live backend for where the factors lie; the `cuda` kernels have none."""
    for backend in backends.BACKENDS:
        if backend.supports(f.p.device, torch.float32) and backend.why_not() is None:
            if backend is backends.triton:  # of float64 factors too
                from . import device_steps  # not above: it imports triton

                return device_steps
            if backend is backends.cpu and native_products.supports(f.p) and native_products.why_not() is None:
                return native_steps
    return steps
