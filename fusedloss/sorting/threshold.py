"""Rows of scores through a threshold: p_j = [s z_j − τ]₊^e with Σ p = 1, of sparsemax (s = 1, e = 1) and entmax-1.5
(s = 1/2, e = 2), and their Fenchel–Young losses. What csrc/threshold.h says, in plain PyTorch, and the calls of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.native import ALL_DTYPES, DTYPES, _native, address
from ..lists import Lists
from .engines import engine

SPARSEMAX, ENTMAX15 = 0, 1
NEWTON, HALVINGS = 8, 40  # steps; a CPU stops as soon as all rows are done


def _native_rows(kind: int, lists: Lists, z: Tensor, out: Tensor | None, out_stride: int):
    width = 0 if z.numel() == 0 else int(lists.offsets.diff().max()) if lists.offsets is not None else z.shape[1]
    stride = z.stride(0) if z.dim() == 2 else 0
    into = ALL_DTYPES[z.dtype if out is None else out.dtype], address(out), out_stride
    given = ALL_DTYPES[z.dtype], z.data_ptr(), stride, *into
    return _native.Threshold(kind, lists.rows, width, address(lists.offsets), *given)


def who(z: Tensor, lists: Lists) -> str:
    """Which implementation takes such scores: "cpu", "triton" or "torch"."""
    found = engine(z.device, "cpu", "triton")
    if found == "triton" and (z.dtype not in DTYPES or lists.offsets is not None):
        return "torch"
    return found if z.dtype in ALL_DTYPES and z.numel() else "torch"


def _launched(which: str, device: torch.device, *given) -> None:
    from ..backends import triton_launch
    from . import threshold_launches  # not above: they import triton

    triton_launch.run(iter([getattr(threshold_launches, which)(*given)]), device)


def project(z: Tensor, lists: Lists, kind: int) -> Tensor:
    """p of flat scores (rows, width), or (items,) with offsets, in their type."""
    by = who(z, lists)
    if by == "torch":
        return _support(z, lists, kind)[2].to(z.dtype)
    z = z.contiguous()
    out = torch.empty_like(z)
    if by == "cpu":
        _native.threshold_project(_native_rows(kind, lists, z, out, z.stride(0)))
    else:
        _launched("rows", z.device, z, kind == ENTMAX15, out, None, None, None)
    return out


def project_backward(p: Tensor, g: Tensor, lists: Lists, kind: int) -> Tensor:
    """∂L/∂z from p and g = ∂L/∂p of one type: over the support w (g − Σ w g / Σ w), with w = 1 or √p."""
    by = who(p, lists)
    if by == "torch":
        return project_backward_plain(p, g, lists, kind)
    p, g = p.contiguous(), g.contiguous()
    out = torch.empty_like(p)
    if by == "cpu":
        _native.threshold_backward(_native_rows(kind, lists, p, out, p.stride(0)), g.data_ptr())
    else:
        _launched("backward", p.device, p, g, out, kind == ENTMAX15)
    return out


def project_backward_plain(p: Tensor, g: Tensor, lists: Lists, kind: int) -> Tensor:
    """The same in plain PyTorch, differentiable."""
    wide = torch.float64 if p.dtype == torch.float64 else torch.float32
    inside = p != 0
    at, g = torch.where(inside, p, 1.0).to(wide), torch.where(inside, g, 0.0).to(wide)
    weight = torch.where(inside, at.sqrt() if kind == ENTMAX15 else torch.where(at.isnan(), at.detach(), 1.0), 0.0)
    total = lists.sum(weight)
    mean = lists.sum(weight * g) / torch.where(total == 0, 1.0, total)
    return torch.where(inside, weight * (g - lists.spread(mean)), 0.0).to(p.dtype)


def losses(z: Tensor, target: Tensor, factor: Tensor | None, out: Tensor | None, kind: int, by: str) -> Tensor:
    """(n,) float64 losses of scores (n, V) and classes (n,); out (n, V) = factor (p − y), it may share z's memory.

    by: "cpu", "triton" or "torch".
    """
    if by != "torch":
        found = torch.empty(len(z), dtype=torch.float64, device=z.device)
    if by == "triton":
        factor = torch.ones_like(found) if factor is None else factor.contiguous()
        _launched("rows", z.device, z, kind == ENTMAX15, out, target.contiguous(), factor, found)
        return found
    if by == "cpu":
        given = _native_rows(kind, Lists(z.shape, 1), z, out, 0 if out is None else out.stride(0))
        factor = None if factor is None else factor.double().contiguous()
        _native.threshold_loss(given, target.contiguous().data_ptr(), address(factor), found.data_ptr())
        return found
    lists, at = Lists(z.shape, 1), target.unsqueeze(1)
    r, beyond, p = _support(z, lists, kind)
    hit, beyond = r.gather(1, at)[:, 0], beyond.gather(1, at)[:, 0]
    others = r.scatter(1, at, 0.0)
    if kind == SPARSEMAX:
        found = (others.sum(1).square() + others.square().sum(1)) / 2 + beyond
    else:
        rest = others.square().sum(1) / (1 + hit)  # 1 − √p_y
        found = (rest.square() * (2 + hit) + (others**3).sum(1)) * 2 / 3 + 2 * beyond
    found = torch.where((z == -torch.inf).all(1), torch.inf, found)
    if out is not None:
        own = -p.scatter(1, at, 0.0).sum(1, keepdim=True)  # p_y − 1
        p = p.scatter(1, at, torch.where(z.gather(1, at) == -torch.inf, 0.0, own))
        factor = torch.ones_like(found) if factor is None else factor
        out.copy_(torch.where(factor == 0, 0.0, factor).unsqueeze(1) * torch.where(factor.unsqueeze(1) == 0, 0.0, p))
    return found


def _support(z: Tensor, lists: Lists, kind: int) -> tuple[Tensor, Tensor, Tensor]:
    """r = [u − τ]₊, [τ − u]₊ and p, flat and in float64, u being s z less its row's maximum."""
    square = kind == ENTMAX15
    wrong = lists.sum(z.isnan().to(torch.float64)) > 0
    z = z.double()
    top = lists.spread(torch.where(wrong, torch.nan, lists.max(z.nan_to_num(-torch.inf, torch.inf, -torch.inf))))
    u = torch.where(z == top, 0.0, (z - top) * (0.5 if square else 1.0))
    u = torch.where(top == -torch.inf, -torch.inf, u)
    tau = lists.spread(_threshold(u, lists, square))
    tau = torch.where(top == -torch.inf, 0.0, tau)
    r, beyond = (u - tau).clamp(min=0), (tau - u).clamp(min=0)
    return r, beyond, r.square() if square else r


def _threshold(u: Tensor, lists: Lists, square: bool) -> Tensor:
    """τ of each row, by the C kernel's iteration on all rows at once."""
    tau = u.new_full((lists.rows,), -1.0)
    right, answer, done = torch.zeros_like(tau), tau.clone(), torch.zeros_like(tau, dtype=torch.bool)

    def powers(at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        d = (u - lists.spread(at)).clamp(min=0)
        return d, lists.sum(d), lists.sum(d.square())

    for step in range(NEWTON + HALVINGS):
        d, first, second = powers(tau)
        count = lists.sum((d > 0).double())
        least = -lists.max(torch.where(d > 0, -d, -torch.inf))
        exact = newton = (first - 1) / count
        if square:
            root = first.square() - count * (second - 1)
            exact = torch.where(root >= 0, (second - 1) / (first + root.clamp(min=0).sqrt()), torch.inf)
            newton = (second.sqrt() - 1) * second.sqrt() / first
        found, next = exact < least, tau + newton
        last = torch.where(found, tau + exact, tau)
        stops = found | ~(next > tau)
        answer, done = torch.where(done, answer, torch.where(stops, last, next)), done | stops
        if u.device.type == "cpu" and bool(done.all()):
            break
        tau = torch.where(done, tau, next)
        if step >= NEWTON:
            middle = tau + (right - tau) / 2
            left = powers(middle)[2 if square else 1] >= 1
            tau, right = torch.where(left, middle, tau), torch.where(left, right, middle)
    return answer
