"""Allocation of large buffers, and the scratch memory that is kept from call to call.

A fresh buffer of hundreds of MiB is paid for at its first touch, one fault per 4 KiB page: as much time as writing it
ten times over. Linux hands out 2 MiB pages where it is asked to.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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


_ALIGNMENT = 4096
_limit = 320 << 20  # a tile of the default budget and what goes with it
_idle: list[Tensor] = []  # at most one buffer; list.pop and append are atomic


def set_workspace_limit(bytes: int) -> None:
    """Most bytes of scratch memory that a call on the CPU may leave to the next one (default 320 MiB), per process.

    As much as the last call took is kept, in one buffer; 0 gives all of it back and keeps nothing from now on. The peak
    of a call is the same either way: only fresh memory costs time, up to a fifth of a call, when it is touched first.
    GPUs do not need it: PyTorch's allocator keeps their memory.
    """
    global _limit
    if not isinstance(bytes, int) or bytes < 0:
        raise ValueError(f"set_workspace_limit: bytes: expected an integer >= 0, got {bytes!r}")
    _limit = bytes
    if any(buffer.nbytes > bytes for buffer in _idle):
        _idle.clear()


@contextmanager
def workspace(device: torch.device, *wanted: tuple[Sequence[int], torch.dtype]) -> Iterator[list[Tensor]]:
    """Scratch tensors of the `wanted` shapes and types, valid inside the with-block."""
    if device.type != "cpu":
        yield [empty(shape, dtype, device) for shape, dtype in wanted]
        return
    sizes = [torch.Size(shape).numel() * dtype.itemsize for shape, dtype in wanted]
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
    try:
        buffer = _idle.pop()
    except IndexError:
        buffer = None
    if buffer is None or buffer.nbytes < starts[-1]:
        buffer = None  # before its successor is there
        buffer = empty((starts[-1],), torch.uint8, device)
    yield [buffer[a : a + n].view(dtype).view(shape) for a, n, (shape, dtype) in zip(starts, sizes, wanted)]
    if not _idle and buffer.nbytes <= _limit:  # after an error nothing is kept
        _idle.append(buffer)
