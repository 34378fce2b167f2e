"""Who computes the steps of a factored layer: each engine has `visit`, `backward` and `step` as steps.py means them."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import torch

from .. import backends
from .factors import Factors

ENGINES = {"cpu": "steps", "triton": "device_steps", "torch": "steps"}  # by backend; the `cuda` kernels have none


def engine(f: Factors) -> ModuleType:
    """That of the first live backend for where the factors lie; of float64 factors too, whatever its tiles are of."""
    for backend in backends.BACKENDS:
        if backend.name in ENGINES and backend.supports(f.p.device, torch.float32) and backend.why_not() is None:
            break
    return import_module(f".{ENGINES[backend.name]}", __package__)
