"""Soft sort and soft rank as operators, on rows as `Lists` has them flat, and their autograd.

* ``fusedloss::soft_rank``, ``fusedloss::soft_sort``                    (what is returned, the order of the blocks)
* ``fusedloss::soft_rank_backward``, ``fusedloss::soft_sort_backward``  (gradient of x, of each row's strength)

Beyond x itself the backward keeps the order alone, 4 bytes per item. In eager mode and under torch.func the kernels run
inside `torch.autograd.Function`s, under torch.compile the operators' registered autograd is used. Second derivatives
are autograd's, of `permutahedron.project_backward` with the same blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.cuda import _launch
from ..backends.native import DTYPES, _native, address
from .engines import engine
from .permutahedron import F64, Projection, partition, project, project_backward, ranks_dtype

TYPES = {**DTYPES, F64: 3}
NAMES = ("soft_rank", "soft_sort")
HOST = torch.device("cpu")
_op = torch.ops.fusedloss

CALL = "Tensor? strengths, Tensor? mask, Tensor? offsets, float strength, bool kl, bool descending"
for _name in NAMES:
    torch.library.define(f"fusedloss::{_name}", f"(Tensor x, {CALL}) -> (Tensor, Tensor)")
    torch.library.define(
        f"fusedloss::{_name}_backward", f"(Tensor grad, Tensor x, Tensor order, {CALL}) -> (Tensor, Tensor)"
    )


def _projection(name, strengths, mask, offsets, strength, kl, descending) -> Projection:
    e = strength if strengths is None else strengths
    return Projection(name == "soft_sort", kl, descending, e, mask, offsets)


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


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
    what = _native.Permutahedron(*lists, address(strengths), strength, TYPES[x.dtype], kl, descending, x.numel())
    if where == "cuda":
        launch = getattr(_native, f"cuda_{name}")
        bytes = getattr(_native, f"cuda_{name}_workspace")(what)
        _launch(x.device, bytes, lambda *memory: launch(what, *addresses, *memory))
    else:
        getattr(_native, name)(what, *addresses)


def forward(name: str, x: Tensor, *call) -> tuple[Tensor, Tensor]:
    where = live(x.device)
    x, *tensors = _contiguous(x, *call[:3])
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
    grad, x, order, *tensors = _contiguous(grad, x, order, *call[:3])
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


def _double_backward(name: str, saved, options, ddx: Tensor, ddstrengths: Tensor):
    """The derivative of the backward in (grad, x, strengths), whose own derivatives autograd knows."""
    grad, x, order, strengths, mask, offsets = saved

    def first(grad, x, strengths=None):
        found = project_backward(_projection(name, strengths, mask, offsets, *options), x, order, grad)
        return found[0] if strengths is None else found

    if strengths is None:
        return (*torch.func.vjp(first, grad, x)[1](ddx), None)
    return torch.func.vjp(first, grad, x, strengths)[1]((ddx, ddstrengths))


def _register(name: str) -> None:
    """Kernels, fakes, autograd and vmap of the two operators of this name."""

    def fake(x, *call):
        wide = x.dtype if name == "soft_sort" else ranks_dtype(x.dtype)
        return torch.empty_like(x, dtype=wide), torch.empty_like(x, dtype=torch.int32)

    def fake_backward(grad, x, order, strengths, *call):
        return torch.empty_like(x), _strength_gradient(x, strengths)

    def setup(ctx, inputs, output):
        _Project.setup_context(ctx, (name, *inputs), output)

    def formula(ctx, grad, _):
        x, order, *tensors = ctx.saved_tensors
        dx, dstrengths = getattr(_op, f"{name}_backward")(grad, x, order, *tensors, *ctx.options)
        return dx, None if tensors[0] is None else dstrengths, None, None, None, None, None

    def setup_backward(ctx, inputs, output):
        _ProjectBackward.setup_context(ctx, (name, *inputs), output)

    def formula_backward(ctx, ddx, ddstrengths):
        return _ProjectBackward.backward(ctx, ddx, ddstrengths)[1:]

    def vmapped(which: str, items: int):
        def rule(info, dims, *arguments):
            return _vmap(getattr(_op, which), info.batch_size, dims, arguments, items)

        torch.library.register_vmap(f"fusedloss::{which}", rule)

    composite, back = "CompositeExplicitAutograd", f"{name}_backward"
    torch.library.impl(f"fusedloss::{name}", composite)(lambda *a: forward(name, *a))
    torch.library.impl(f"fusedloss::{back}", composite)(lambda *a: backward(name, *a))
    torch.library.register_fake(f"fusedloss::{name}", fake)
    torch.library.register_fake(f"fusedloss::{back}", fake_backward)
    torch.library.register_autograd(f"fusedloss::{name}", formula, setup_context=setup)
    torch.library.register_autograd(f"fusedloss::{back}", formula_backward, setup_context=setup_backward)
    vmapped(name, 1)
    vmapped(back, 3)


def _vmap(op, size: int, dims, arguments, items: int):
    """A batch of calls as one call with more rows. The first `items` arguments have one number per item."""

    def front(tensor: Tensor | None, dim: int | None) -> Tensor | None:
        if tensor is None:
            return None
        return tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)

    *per_item, strengths, mask, offsets = (front(t, d) for t, d in zip(arguments[: items + 3], dims))
    shape = per_item[0].shape[1:]
    *per_item, strengths, mask = (None if t is None else t.flatten(0, 1) for t in (*per_item, strengths, mask))
    if offsets is not None:
        begin = torch.arange(size, device=offsets.device)[:, None] * shape[0] + offsets[:, :-1]
        offsets = torch.cat([begin.flatten(), begin.new_full((1,), size * shape[0])])
    found = op(*per_item, strengths, mask, offsets, *arguments[items + 3 :])
    second = shape if items == 1 else found[1].shape if strengths is None else (found[1].shape[0] // size,)
    if items > 1 and strengths is None:
        return (found[0].reshape(size, *shape), found[1]), (0, None)
    return (found[0].reshape(size, *shape), found[1].reshape(size, *second)), (0, 0)


def _direct(x: Tensor) -> bool:
    """Whether x is there as it is, and no transformation wants to see the operators."""
    hidden = torch._C._are_functorch_transforms_active() or torch._C._len_torch_dispatch_stack()
    return not hidden and not x.is_meta and type(x) in (Tensor, torch.nn.Parameter)


class _Project(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name, x, *call):
        return forward(name, x, *call) if _direct(x) else getattr(_op, name)(x, *call)

    @staticmethod
    def setup_context(ctx, inputs, output):
        name, x, *call = inputs
        ctx.save_for_backward(x, output[1], *call[:3])
        ctx.name, ctx.options = name, call[3:]
        ctx.mark_non_differentiable(output[1])

    @staticmethod
    def backward(ctx, grad, _):
        x, order, *tensors = ctx.saved_tensors
        if torch.is_grad_enabled():
            dx, dstrengths = _ProjectBackward.apply(ctx.name, grad, x, order, *tensors, *ctx.options)
        else:
            dx, dstrengths = _backward(ctx.name, grad, x, order, *tensors, *ctx.options)
        return None, dx, None if tensors[0] is None else dstrengths, None, None, None, None, None


class _Eager(torch.autograd.Function):
    """The same where no transformation is at work: torch spends 15 µs on the other form's arguments."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _Project.forward(*inputs)
        _Project.setup_context(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad):
        return _Project.backward(ctx, grad, None)


class _ProjectBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(name, *inputs):
        return _backward(name, *inputs)

    @staticmethod
    def setup_context(ctx, inputs, output):
        name, grad, x, order, *call = inputs
        ctx.save_for_backward(grad, x, order, *call[:3])
        ctx.name, ctx.options = name, call[3:]

    @staticmethod
    def backward(ctx, ddx, ddstrengths):
        by_grad, by_x, by_strengths = _double_backward(ctx.name, ctx.saved_tensors, ctx.options, ddx, ddstrengths)
        return None, by_grad, by_x, None, by_strengths, None, None, None, None, None


def _backward(name: str, grad: Tensor, x: Tensor, *rest) -> tuple[Tensor, Tensor]:
    if _direct(grad):
        return backward(name, grad, x, *rest)
    return getattr(_op, f"{name}_backward")(grad, x, *rest)


for _name in NAMES:
    _register(_name)


def call(name: str, x: Tensor, *call) -> Tensor:
    """The operator of this name, differentiable in x and in the strengths (rows,) float64."""
    if torch.compiler.is_compiling():
        return getattr(_op, name)(x, *call)[0]
    if torch._C._are_functorch_transforms_active():
        return _Project.apply(name, x, *call)[0]
    return _Eager.apply(name, x, *call)
