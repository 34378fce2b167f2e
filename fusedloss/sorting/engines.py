"""Which of a sort operator's implementations computes where a tensor lies."""

from __future__ import annotations

import torch

from .. import backends


def engine(device: torch.device, *names: str) -> str:
    """The first live backend for this device of those named, in the backends' order; else "torch", the plain one."""
    for backend in backends.BACKENDS:
        if backend.name in names and backend.supports(device, torch.float32) and backend.why_not() is None:
            return backend.name
    return "torch"
