"""steps.py for CUDA and ROCm devices: products by cuBLAS or hipBLAS, all else in Triton (kernels/spherical.py).

Forward, backward and step are some thirty operations (a hundred and forty in steps.py), which take longer to start than
to run; what matters is how few they are, and that nothing waits for the device. No number is read back, there is no
`unique`, shapes depend on shapes alone: a CUDA graph can record a step. What steps.py decides by reading a pivot is
decided on the device. U′ = U E and its inverse are formed first; where ‖U′‖ ‖U′⁻¹‖ / d is above `limit`, or
no number because E has no inverse, one kernel multiplies P by U′, a block of rows at a time, and the next ones make
U = 1 and use H for H U′⁻¹. Where it is not, which is nearly always, that kernel returns at once. It is the folding of
steps.py, and all the upkeep that U needs: after a step there is nothing to rebalance, so nobody has to ask for
`condition()`, which waits.

Same inputs, same bits: sums over examples are taken by one owner in the order of the examples, without atomics. TF32 is
refused, whatever PyTorch is set to. Not run on a GPU so far: checked in Triton's interpreter, and compiled.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..backends.triton_launch import run
from . import device_launches as launch
from .exact import exact
from .factors import Factors
from .family import Member
from .steps import F64, Batch, Visit

CONDITION_LIMIT = 1.5


def _like(b: Batch | Visit) -> dict[str, Tensor]:
    """Memory for a batch's own numbers."""
    return {name: torch.empty_like(getattr(b, name)) for name in ("alpha", "t", "gamma")}


def visit(f: Factors, h: Tensor, target: Tensor, share: Tensor, loss: Member) -> Visit:
    """As in steps.py."""
    dtype, (m, targets) = f.p.dtype, target.shape
    h, target, share = h.contiguous(), target.contiguous(), share.to(F64).contiguous()
    with exact(h.device):
        hq, hu = h @ f.gram.to(dtype), h @ f.u.t().to(dtype)
    losses, t, gamma = (torch.empty(m, dtype=F64, device=h.device) for _ in range(3))
    alpha = torch.empty(m, targets, dtype=F64, device=h.device)
    found = Visit(losses, alpha, t, gamma, h, target, hq, hu, torch.empty_like(h))
    run(iter([launch.visit(f, found, share, loss)]), h.device)
    return found


def backward(f: Factors, v: Visit, upstream: Tensor) -> tuple[Tensor, Batch]:
    """As in steps.py."""
    with exact(v.h.device):
        picked = v.picked @ f.u.to(f.p.dtype)
    dh, yw, gh = (torch.empty_like(v.h) for _ in range(3))
    b = Batch(**_like(v), h=v.h, target=v.target, hu=v.hu, yw=yw, gh=gh)
    run(iter([launch.backward(f, v, upstream.contiguous(), picked, dh, b)]), v.h.device)
    return dh, b


def step(f: Factors, b: Batch, lr: float, decay: float = 0.0, limit: float = CONDITION_LIMIT) -> bool:
    """As in steps.py, but whether U was moved into P is not asked: it says that it was not."""
    if len(b.h):
        b = Batch(**{name: value.contiguous() for name, value in vars(b).items()})
        with exact(b.h.device):
            run(_step(f, b, lr, 1 - lr * decay, limit), b.h.device)
    return False


def _step(f: Factors, b: Batch, lr: float, keep: float, limit: float) -> Iterator[launch.Launch]:
    """The launches of a step, and products between them."""
    width, dtype, device = f.p.shape[1], f.p.dtype, f.p.device
    keys, hg, twice = torch.empty_like(b.target), torch.empty_like(b.h), torch.empty_like(b.h)
    weights = torch.empty(3, len(b.h), dtype=F64, device=device)
    yield launch.prepare(f, b, keys, hg, twice, weights)
    keys, order = keys.flatten().sort(stable=True)
    sums = torch.empty(launch.parts_of(len(b.h)), 3, width, dtype=F64, device=device)
    yield launch.column_sums(b.h, weights, sums)
    j = torch.empty(len(keys), width, dtype=dtype, device=device)  # Σ α h of each class
    folded = torch.zeros(1, dtype=torch.int32, device=device)
    yield launch.segments(f, keys, order, b, b.h, folded, j)
    small = len(b.h) < width
    if small:
        changes, rows = yield from _small(f, b, lr, keep, hg, twice, weights, j)
    else:
        changes, rows = _large(f, b, lr, keep, hg, twice, sums, j), None
    sizes = torch.empty(2, launch.squares_of(width), dtype=F64, device=device)
    yield launch.state(f, changes, sizes, lr, keep)
    yield launch.fold(f, sizes, limit)
    yield launch.settle(f, sums, sizes, folded, lr, keep, limit)
    if not small:
        rows = b.h @ f.inverse.to(dtype)
    yield launch.segments(f, keys, order, b, rows, folded, f.p, lr)


def _small(f: Factors, b: Batch, lr: float, keep: float, hg, twice, weights, j):
    """For m < d, all in m × m (Woodbury): A, B and C of kernels/spherical.py's `state`, and H (U E)⁻¹."""
    product, m = b.h @ b.h.t(), torch.empty(len(b.h), len(b.h), dtype=b.h.dtype, device=b.h.device)
    yield launch.grams(f, product, twice @ hg.t(), b.gamma, weights, m, lr, keep)
    lu, pivots, _ = torch.linalg.lu_factor_ex(product)
    rows = torch.linalg.lu_solve(lu, pivots, b.h @ f.inverse.to(b.h.dtype)).contiguous()
    change = b.h.t() @ torch.addmm(b.gh, m, b.h, beta=lr * keep, alpha=-lr * lr / 2)
    change.addmm_(j.t(), j, alpha=-lr * lr / 2)  # Y Yᵀ's part of Hᵀ M H, however many targets a row has
    return (b.hu.t() @ hg, hg.t() @ rows, change), rows


def _large(f: Factors, b: Batch, lr: float, keep: float, hg, twice, sums, j) -> tuple[Tensor, Tensor, Tensor]:
    """For m ≥ d, all in d × d: the same A, B and C."""
    s, ones = hg.t() @ b.h, sums[:, 2].sum(0).to(b.h.dtype)
    squares = torch.addmm(torch.addmm(j.t() @ j, s, twice.t() @ b.h), ones[:, None], ones[None], alpha=-1 / len(f.p))
    change = torch.mul(b.gh.t() @ b.h, lr * keep).sub_(squares, alpha=lr * lr / 2)
    s = s.to(F64)
    e = s * -lr
    e.diagonal().add_(keep)
    lu, pivots, _ = torch.linalg.lu_factor_ex(e)
    return f.u @ s, s @ torch.linalg.lu_solve(lu, pivots, f.inverse), change
