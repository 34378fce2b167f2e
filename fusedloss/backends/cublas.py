"""GEMM with fp32 sums on a device: PyTorch's cuBLAS (or hipBLAS), for the cuda and the triton backend."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def _adds_products(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this PyTorch adds products of half-precision operands to a float32 matrix. Tried once, on next to nothing:
    it refuses, if it does, before anything is launched."""
    a, out = torch.zeros(8, 8, dtype=dtype, device=device), torch.zeros(8, 8, device=device)
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError):
        return False
    return True


def gemm(out: Tensor, a: Tensor, b: Tensor, accumulate: bool) -> None:
    """out = a @ b, or out += a @ b, fp32 sums and results whatever the operands' type.

    float32 operands are multiplied as `torch.backends.cuda.matmul` says, in TF32 if that is what the user chose.
    """
    with torch.autocast(out.device.type, enabled=False):  # it would round the products to its own type
        if a.dtype == out.dtype:
            if accumulate:
                out.addmm_(a, b)
            else:
                torch.mm(a, b, out=out)
        elif not accumulate:
            torch.mm(a, b, out_dtype=out.dtype, out=out)
        elif _adds_products(a.dtype, a.device):
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
        else:
            out += torch.mm(a, b, out_dtype=out.dtype)
