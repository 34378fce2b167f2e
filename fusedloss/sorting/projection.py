"""Soft sort and soft rank as operators, on rows as `Lists` has them flat, and their autograd.

* ``fusedloss::soft_rank``, ``fusedloss::soft_sort``                    (what is returned, the order of the blocks)
* ``fusedloss::soft_rank_backward``, ``fusedloss::soft_sort_backward``  (gradient of x, of each row's strength)

Beyond x itself the backward keeps the order alone, 4 bytes per item. Second derivatives are autograd's, of
`permutahedron.project_backward` with the same blocks.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..backends.cuda import _launch
from ..backends.native import ALL_DTYPES, _native, address, contiguous
from ..operators import more_rows, operator
from .engines import engine
from .permutahedron import F64, Projection, partition, project, project_backward, ranks_dtype

NAMES = ("soft_rank", "soft_sort")
HOST = torch.device("cpu")


def _projection(name, strengths, mask, offsets, strength, kl, descending) -> Projection:
    e = strength if strengths is None else strengths
    return Projection(name == "soft_sort", kl, descending, e, mask, offsets)


# --- the engines -----------------------------------------------------------------------------------------------------


def live(device: torch.device) -> str:
    """Who computes there: "cpu" or "cuda", compiled kernels; "host", the CPU's on copies; "torch"."""
    found = engine(device, "cpu", "cuda")
    if found == "torch" and device.type != "cpu" and engine(HOST, "cpu") == "cpu":
        return "host"
    return found


MEANING = {
    "cpu": "compiled kernels",
    "cuda": "compiled kernels",
    "host": "compiled kernels of the CPU, on copies",
    "torch": "plain PyTorch",
}


def report() -> list[tuple[str, str]]:
    """For each kind of device what soft sort and soft rank are computed with."""
    kinds = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    return [(kind, MEANING[live(torch.device(kind))]) for kind in kinds]


def _compiled(where: str, name: str, x: Tensor, call: tuple, *tensors: Tensor | None) -> None:
    """The compiled kernels' C function of this name on x and what follows it there."""
    strengths, mask, offsets, strength, kl, descending = call
    addresses = [address(t) for t in (x, *tensors)]
    if offsets is None:
        rows, width = x.shape
    else:
        rows = len(offsets) - 1  # on a device nobody waits for the longest row
        width = int(offsets.diff().max()) if rows and where == "cpu" else len(x)
    lists = rows, width, address(offsets), address(mask)
    what = _native.Permutahedron(*lists, address(strengths), strength, ALL_DTYPES[x.dtype], kl, descending, x.numel())
    if where == "cuda":
        launch = getattr(_native, f"cuda_{name}")
        bytes = getattr(_native, f"cuda_{name}_workspace")(what)
        _launch(x.device, bytes, lambda *memory: launch(what, *addresses, *memory))
    else:
        getattr(_native, name)(what, *addresses)


def forward(name: str, x: Tensor, *call) -> tuple[Tensor, Tensor]:
    where = live(x.device)
    x, *tensors = contiguous(x, *call[:3])
    call = (*tensors, *call[3:])
    if where == "host":
        copies = [t if t is None else t.to(HOST) for t in tensors]
        out, order = forward(name, x.to(HOST), *copies, *call[3:])
        return out.to(x.device), order.to(x.device)
    if where == "torch":
        p = _projection(name, *call)
        order = partition(p, x)
        return project(p, x, order), order
    out = torch.empty_like(x, dtype=x.dtype if name == "soft_sort" else ranks_dtype(x.dtype))
    order = torch.empty_like(x, dtype=torch.int32)
    _compiled(where, name, x, call, out, order)
    return out, order


def backward(name: str, grad: Tensor, x: Tensor, order: Tensor, *call) -> tuple[Tensor, Tensor]:
    where = live(x.device)
    grad, x, order, *tensors = contiguous(grad, x, order, *call[:3])
    call = (*tensors, *call[3:])
    if where == "host":
        grad, on_host, order, *copies = [t if t is None else t.to(HOST) for t in (grad, x, order, *tensors)]
        dx, dstrengths = backward(name, grad, on_host, order, *copies, *call[3:])
        return dx.to(x.device), dstrengths.to(x.device)
    if where == "torch":
        dx, dstrengths = project_backward(_projection(name, *call), x, order, grad)
        return dx, dstrengths if call[0] is not None else dstrengths[:0].clone()
    dx, dstrengths = torch.empty_like(x), _strength_gradient(x, call[0])
    asked = dstrengths if call[0] is not None else None
    _compiled(where, f"{name}_backward", x, call, order, grad, dx, asked)
    return dx, dstrengths


def _strength_gradient(x: Tensor, strengths: Tensor | None) -> Tensor:
    return x.new_empty(0 if strengths is None else strengths.shape[0], dtype=F64)


# --- the operators ---------------------------------------------------------------------------------------------------


def _double_backward(name: str, saved, options, ddx: Tensor | None, ddstrengths: Tensor | None):
    """The derivative of the backward in (grad, x, strengths), whose own derivatives autograd knows."""
    grad, x, order, strengths, mask, offsets = saved

    def first(grad, x, strengths=None):
        found = project_backward(_projection(name, strengths, mask, offsets, *options), x, order, grad)
        return found[0] if strengths is None else found

    ddx = torch.zeros_like(x) if ddx is None else ddx
    if strengths is None:
        by_grad, by_x = torch.func.vjp(first, grad, x)[1](ddx)
        return by_grad, by_x, None, None
    ddstrengths = torch.zeros_like(strengths) if ddstrengths is None else ddstrengths
    by_grad, by_x, by_strengths = torch.func.vjp(first, grad, x, strengths)[1]((ddx, ddstrengths))
    return by_grad, by_x, None, by_strengths


def _operator(name: str) -> Callable:
    lists = "Tensor? strengths, Tensor? mask, Tensor? offsets, float strength, bool kl, bool descending"

    def fake(x, *_):
        wide = x.dtype if name == "soft_sort" else ranks_dtype(x.dtype)
        return torch.empty_like(x, dtype=wide), torch.empty_like(x, dtype=torch.int32)

    def differentiate(ctx, grad, _order):
        x, order, strengths, *lists = ctx.saved_tensors
        dx, dstrengths = run_backward(grad, x, order, strengths, *lists, *ctx.options)
        return dx, None if strengths is None else dstrengths

    run_backward = operator(
        f"{name}_backward",
        f"(Tensor grad, Tensor x, Tensor order, {lists}) -> (Tensor, Tensor)",
        partial(backward, name),
        lambda grad, x, order, strengths, *_: (torch.empty_like(x), _strength_gradient(x, strengths)),
        lambda ctx, *along: _double_backward(name, ctx.saved_tensors, ctx.options, *along),
        vmap=more_rows,
    )
    return operator(
        name,
        f"(Tensor x, {lists}) -> (Tensor, Tensor)",
        partial(forward, name),
        fake,
        differentiate,
        keep=lambda inputs, outputs: (inputs[0], outputs[1], *inputs[1:4]),
        constant=(1,),
        vmap=more_rows,
    )


# (x, strengths (rows,) float64, …) → what is returned, differentiable in both, and the order.
OPERATORS = {name: _operator(name) for name in NAMES}
