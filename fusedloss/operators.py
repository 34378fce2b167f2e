"""How the operators on lists are registered: opaque `torch.library` ops on plain tensors, and their autograd.

The same few functions make three things of an operator: the registered op, which torch.compile, fake tensors and
opcheck see; an `autograd.Function` for eager mode, whose call costs a third less; and one that torch.func can
transform, which a registered formula cannot be. `operator` returns the function that calls the right one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import Parameter


def operator(
    name: str,
    schema: str,
    compute: Callable,
    fake: Callable,
    differentiate: Callable | None = None,
    *,
    keep: Callable[[Sequence, Sequence[Tensor]], Sequence[Tensor | None]] | None = None,
    constant: Sequence[int] = (),
    vmap: Callable | None = None,
) -> Callable:
    """Registers ``fusedloss::name``, whose inputs are tensors first and then options; returns what calls it.

    compute(*inputs): new tensors that share no memory with the inputs; autograd does not look inside. fake: the same
    for shapes alone. differentiate(ctx, *upstream): gradients of the first inputs, as many as have one; None comes from
    an output that nobody used. It sees ``ctx.saved_tensors``, by default the inputs' tensors, otherwise what
    keep(inputs, outputs) chooses; ``ctx.options``, the inputs after the tensors; and ``ctx.needs_input_grad``. For
    ``create_graph=True`` it must itself be differentiable: made of operators, or of `plain_gradients`. constant: the
    outputs without a gradient. vmap(op, size, dims, inputs) → output, its dims.
    """
    torch.library.define(f"fusedloss::{name}", schema)
    torch.library.impl(f"fusedloss::{name}", "CompositeExplicitAutograd", compute)
    torch.library.register_fake(f"fusedloss::{name}", fake)
    op = getattr(torch.ops.fusedloss, name).default
    if vmap is not None:
        torch.library.register_vmap(op, lambda info, dims, *inputs: vmap(op, info.batch_size, dims, inputs))
    kinds = [str(argument.type) for argument in op._schema.arguments]
    options = next((i for i, kind in enumerate(kinds) if "Tensor" not in kind), len(kinds))

    def call_plain(*inputs):
        return op(*inputs) if _watched(inputs[:options]) else compute(*inputs)

    if differentiate is None:
        return call_plain

    def setup(ctx, inputs, output):
        outputs = output if isinstance(output, tuple) else (output,)
        ctx.save_for_backward(*(inputs[:options] if keep is None else keep(inputs, outputs)))
        ctx.options = inputs[options:]
        ctx.set_materialize_grads(False)
        if constant:
            ctx.mark_non_differentiable(*(outputs[i] for i in constant))

    def formula(ctx, *upstream):
        found = () if all(g is None for g in upstream) else differentiate(ctx, *upstream)
        return *found, *(None,) * (len(kinds) - len(found))

    def forward(ctx, *inputs):
        output = compute(*inputs)
        setup(ctx, inputs, output)
        return output

    torch.library.register_autograd(op, formula, setup_context=setup)
    static = {"backward": staticmethod(formula)}
    eager = type(name, (torch.autograd.Function,), {**static, "forward": staticmethod(forward)})
    static |= {"forward": staticmethod(lambda *inputs: op(*inputs)), "setup_context": staticmethod(setup)}
    transformed = type(name, (torch.autograd.Function,), {**static, "generate_vmap_rule": True})

    def call(*inputs):
        if torch.compiler.is_compiling():
            return op(*inputs)
        if torch._C._are_functorch_transforms_active():
            return transformed.apply(*inputs)
        if not torch.is_grad_enabled():
            return call_plain(*inputs)
        return op(*inputs) if _watched(inputs[:options]) else eager.apply(*inputs)

    return call


def _watched(tensors: Sequence[Tensor | None]) -> bool:
    """Whether somebody wants to see the registered op: a compiler, a mode, a transformation, a kind of tensor."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return True
    if torch._C._are_functorch_transforms_active():
        return True
    return any(t is not None and (type(t) not in (Tensor, Parameter) or t.is_meta) for t in tensors)


def like(x: Tensor, *_) -> Tensor:
    """A fake's output: contiguous, of the first input's shape and type."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def more_rows(op, size: int, dims: Sequence, inputs: Sequence) -> tuple:
    """vmap of an operator whose tensors have one row per list, or one number per item: a batch of calls is one call.

    The last tensor is `offsets`, of every sample its own.
    """
    tensors = [x for x, kind in zip(inputs, op._schema.arguments) if "Tensor" in str(kind.type)]
    tensors = [t if t is None or d is None else t.movedim(d, 0) for t, d in zip(tensors, dims)]
    tensors = [t.expand(size, *t.shape) if t is not None and d is None else t for t, d in zip(tensors, dims)]
    *tensors, offsets = tensors
    tensors = [t if t is None else t.flatten(0, 1) for t in tensors]
    if offsets is not None:
        items = len(tensors[0]) // size
        begin = torch.arange(size, device=offsets.device)[:, None] * items + offsets[:, :-1]
        offsets = torch.cat([begin.flatten(), begin.new_full((1,), size * items)])
    found = op(*tensors, offsets, *inputs[len(tensors) + 1 :])
    several = found if isinstance(found, tuple) else (found,)
    several = tuple(t.reshape(size, t.shape[0] // size, *t.shape[1:]) for t in several)
    return (several, (0,) * len(several)) if isinstance(found, tuple) else (several[0], 0)


def plain_gradients(
    formula: Callable[..., Sequence[Tensor]], inputs: Sequence[Tensor], upstream: Sequence[Tensor | None], needs
) -> list[Tensor | None]:
    """Σ upstream_i ∂formula_i/∂input for the inputs that `needs` names, differentiable in inputs and upstream.

    For a backward that runs under create_graph=True. `formula(*inputs)` must be a differentiable PyTorch function.
    """
    with torch.enable_grad():
        # Views: one input may be made from another, and a derivative in the one must not run through the other.
        inputs = [t.view_as(t) for t in inputs]
        pairs = [(y, g) for y, g in zip(formula(*inputs), upstream) if g is not None and y.requires_grad]
        wanted = [t for t, need in zip(inputs, needs) if need]
        if not pairs or not wanted:
            return [None] * len(inputs)
        outputs, grads = zip(*pairs)
        found = iter(torch.autograd.grad(outputs, wanted, grads, create_graph=True, allow_unused=True))
        return [next(found) if need else None for need in needs]
