"""Allocation of large buffers.

A fresh buffer of hundreds of MiB is paid for at its first touch, one fault per 4 KiB page: as much time as writing it
ten times over. Linux hands out 2 MiB pages where it is asked to.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Sequence

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_MADV_HUGEPAGE = 14
_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def empty(shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """torch.empty; large CPU tensors on huge pages where the system grants them."""
    tensor = torch.empty(shape, dtype=dtype, device=device)
    if _libc is not None and device.type == "cpu":
        start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
        size = (tensor.data_ptr() + tensor.nbytes - start) // _HUGE_PAGE * _HUGE_PAGE
        if size > 0:  # advice only: a refusal changes nothing
            _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _MADV_HUGEPAGE)
    return tensor
