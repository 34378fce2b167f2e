"""Products of the factored layer's state keep the digits of their type, whatever the program around it asks for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

_MATMULS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)


@contextmanager
def exact(device: torch.device) -> Iterator[None]:
    """No autocast on `device`, no TF32 or bfloat16 in products of float32; afterwards all is as it was.

    PyTorch refuses to multiply where its older switch and the newer ones disagree. The older moves all of them, unless
    a newer one was used; then it is not to be touched.
    """
    newer = [matmul.fp32_precision for matmul in _MATMULS]
    try:
        older = torch.get_float32_matmul_precision()
    except RuntimeError:
        older = None
    try:
        if older is None:
            _set(["ieee"] * len(_MATMULS))
        else:
            torch.set_float32_matmul_precision("highest")
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        _set(newer)


def _set(precisions: list[str]) -> None:
    for matmul, precision in zip(_MATMULS, precisions):
        matmul.fp32_precision = precision
