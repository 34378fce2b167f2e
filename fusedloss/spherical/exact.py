"""Products of the factored layer's state keep the digits of their type, whatever the program around it asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MATMULS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No autocast on `device`, no TF32 or bfloat16 in products of float32; afterwards all is as it was.

    PyTorch refuses to multiply where its older switch and the newer ones disagree: all of them are moved.
    """
    older, newer = torch.get_float32_matmul_precision(), [m.fp32_precision for m in _MATMULS]
    try:
        torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(older)
        for matmul, precision in zip(_MATMULS, newer):
            matmul.fp32_precision = precision
