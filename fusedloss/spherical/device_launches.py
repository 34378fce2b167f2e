"""From the factored layer's tensors to launches of kernels/spherical.py: memory, block sizes, grids. Imports triton."""

from __future__ import annotations

import ctypes
import math

import triton
from torch import Tensor

from ..backends.triton_launch import Launch
from ..kernels import spherical as kernels
from .factors import Factors
from .family import Member
from .steps import Batch, Visit

ELEMENTS, WIDEST = 2048, 512  # of gathered rows in registers of one program, and of one of them, at most
SLOTS = 8  # targets of a row at a time, at most
SQUARE = 32  # rows and columns of a block of a square matrix
SEGMENT = 8, 256  # rows of a class at a time, and columns, at most
SUMMED = 64, 32  # rows and columns of H at a time where rows are summed up
PARTS = 64  # of H's rows that are summed up side by side, at most
FOLD = 32, 32, 16  # rows, columns, depth
FOLDING, SCRATCH = 256, 16 << 20  # programs, and bytes that they share, at most


def pair(x: float) -> tuple[float, float]:
    """Two numbers of fp32 whose sum is x: a kernel takes no float64 as an argument."""
    high = ctypes.c_float(x).value
    return high, x - high if math.isfinite(high) else 0.0


def _row_blocks(width: int, targets: int) -> dict[str, int]:
    slots = min(SLOTS, triton.next_power_of_2(targets))
    return dict(SLOTS=slots, BLOCK=min(triton.next_power_of_2(width), WIDEST, ELEMENTS // slots))


def loss_of(loss: Member, classes: int) -> tuple[int, tuple[tuple[float, float], ...]]:
    """Which loss it is, and its numbers, as the kernel takes them."""
    given = dict(loss.options)
    if loss.name == "squared_error_loss":
        numbers = given["value"], given["k"], classes if given["mean_over_classes"] else 1.0
        return kernels.SQUARED_ERROR.value, tuple(map(pair, numbers))
    if loss.name == "spherical_softmax_loss":
        return kernels.SPHERICAL_SOFTMAX.value, (pair(given["eps"]),)
    if loss.name == "taylor_softmax_loss":
        return kernels.TAYLOR_SOFTMAX.value, (pair(0.0),)
    return kernels.SPHERICAL_Z.value, (pair(given["a"]), pair(given["b"]), pair(given["eps"]))


def visit(f: Factors, v: Visit, share: Tensor, loss: Member) -> Launch:
    """Fills in v, of which h, hq, hu and target are there."""
    which, options = loss_of(loss, f.p.shape[0])
    (m, width), targets = v.h.shape, v.target.shape[1]
    return Launch(
        kernels.visit,
        (m,),
        dict(p=f.p, p_stride=f.p.stride(0), offset=f.offset, mean=f.mean, h=v.h, hq=v.hq, hu=v.hu, target=v.target,
             share=share, losses=v.losses, alpha=v.alpha, t=v.t, gamma=v.gamma, picked=v.picked,
             classes=f.p.shape[0], width=width, targets=targets, options=options),
        dict(LOSS=which, **_row_blocks(width, targets)),
        warps=4,
    )  # fmt: skip


def backward(f: Factors, v: Visit, upstream: Tensor, picked: Tensor, dh: Tensor, b: Batch) -> Launch:
    """Fills in dh, and b, of which h, hu and target are there."""
    (m, width), targets = v.h.shape, v.target.shape[1]
    return Launch(
        kernels.backward,
        (m,),
        dict(upstream=upstream, alpha=v.alpha, t=v.t, gamma=v.gamma, offset=f.offset, mean=f.mean, hq=v.hq,
             picked=picked, alpha_out=b.alpha, t_out=b.t, gamma_out=b.gamma, yw=b.yw, gh=b.gh, dh=dh, width=width,
             targets=targets),
        _row_blocks(width, targets),
        warps=4,
    )  # fmt: skip


def prepare(f: Factors, b: Batch, keys: Tensor, hg: Tensor, twice: Tensor, weights: Tensor) -> Launch:
    (m, width), targets = b.h.shape, b.target.shape[1]
    return Launch(
        kernels.prepare,
        (m,),
        dict(alpha=b.alpha, t=b.t, gamma=b.gamma, target=b.target, h=b.h, yw=b.yw, gh=b.gh, offset=f.offset, keys=keys,
             hg=hg, twice=twice, weights=weights, classes=f.p.shape[0], rows=m, width=width, targets=targets),
        _row_blocks(width, targets),
        warps=4,
    )  # fmt: skip


def parts_of(rows: int) -> int:
    """Parts that column_sums leaves sums of."""
    return max(1, min(PARTS, rows // (4 * SUMMED[0])))


def column_sums(h: Tensor, weights: Tensor, sums: Tensor) -> Launch:
    (rows, width), (r, block) = h.shape, SUMMED
    return Launch(
        kernels.column_sums,
        (triton.cdiv(width, block), sums.shape[0]),
        dict(h=h, weights=weights, sums=sums, rows=rows, width=width, part_rows=triton.cdiv(rows, sums.shape[0])),
        dict(R=r, BLOCK=block),
        warps=4,
    )


def grams(f: Factors, product: Tensor, half: Tensor, gamma: Tensor, weights: Tensor, m: Tensor, lr, keep) -> Launch:
    rows = product.shape[0]
    return Launch(
        kernels.grams,
        (triton.cdiv(rows, SQUARE),) * 2,
        dict(product=product, half=half, gamma=gamma, weights=weights, m=m, rows=rows, classes=f.p.shape[0],
             lr=pair(lr), keep=pair(keep)),
        dict(BLOCK=SQUARE),
        warps=4,
    )  # fmt: skip


def squares_of(width: int) -> int:
    """Programs of a d × d matrix."""
    return triton.cdiv(width, SQUARE) ** 2


def state(f: Factors, changes: tuple[Tensor, Tensor, Tensor], sizes: Tensor, lr: float, keep: float) -> Launch:
    width = f.u.shape[0]
    return Launch(
        kernels.state,
        (triton.cdiv(width, SQUARE),) * 2,
        dict(u=f.u, inverse=f.inverse, gram=f.gram, change_u=changes[0], change_inverse=changes[1],
             change_gram=changes[2], sizes=sizes, width=width, lr=pair(lr), keep=pair(keep)),
        dict(BLOCK=SQUARE),
        warps=4,
    )  # fmt: skip


def fold(f: Factors, sizes: Tensor, limit: float) -> Launch:
    (n, width), (r, bn, bk) = f.p.shape, FOLD
    programs = max(1, min(FOLDING, triton.cdiv(n, r), SCRATCH // (r * width * f.p.element_size())))
    return Launch(
        kernels.fold,
        (programs,),
        dict(p=f.p, p_stride=f.p.stride(0), u=f.u, scratch=f.p.new_empty(programs, r, width), sizes=sizes,
             parts=sizes.shape[1], classes=n, width=width, limit=pair(limit)),
        dict(R=r, BN=bn, BK=bk, BLOCK=min(1024, triton.next_power_of_2(sizes.shape[1]))),
        warps=4,
    )  # fmt: skip


def settle(f: Factors, sums: Tensor, sizes: Tensor, folded: Tensor, lr: float, keep: float, limit: float) -> Launch:
    n, width = f.p.shape
    return Launch(
        kernels.settle,
        (triton.cdiv(width, SQUARE),) * 2,
        dict(u=f.u, inverse=f.inverse, offset=f.offset, mean=f.mean, sums=sums, sum_parts=sums.shape[0], sizes=sizes,
             parts=sizes.shape[1], folded=folded, classes=n, width=width, lr=pair(lr), keep=pair(keep),
             limit=pair(limit)),
        dict(BLOCK=SQUARE, SIZES=min(1024, triton.next_power_of_2(sizes.shape[1]))),
        warps=4,
    )  # fmt: skip


def segments(f: Factors, keys: Tensor, order: Tensor, b: Batch, rows: Tensor, folded: Tensor, out: Tensor, lr=0.0):
    """f.p −= lr Σ α rows, where that is `out`; else out (places, d) = Σ α rows. Of b.h rather than rows if `folded`."""
    count, width = keys.shape[0], rows.shape[1]
    block = min(triton.next_power_of_2(width), SEGMENT[1])
    return Launch(
        kernels.segments,
        (count, triton.cdiv(width, block)),
        dict(keys=keys, order=order, alpha=b.alpha, rows=rows, instead=b.h, folded=folded, out=out,
             out_stride=out.stride(0), classes=f.p.shape[0], count=count, width=width, targets=b.target.shape[1],
             lr=pair(lr)),
        dict(ADD=out is f.p, R=SEGMENT[0], BLOCK=block),
        warps=4,
    )  # fmt: skip
