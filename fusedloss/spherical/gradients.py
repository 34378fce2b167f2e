"""How autograd sees a factored layer: gradients of the features flow back, those of the weight wait in a queue."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from ..checks import expect
from .engines import engine
from .exact import exact
from .factors import Factors
from .family import Member
from .steps import Batch, Visit

_NAMES = [field.name for field in fields(Visit)]


def _nothing(**options: bool) -> Tensor:
    """One number on the CPU, whatever the default device: autograd's threads do not know of that."""
    return torch.zeros((), device="cpu", **options)


class Queue:
    """Batches of the backward passes since the last step, all of one W; `version` counts changes of the factors."""

    def __init__(self):
        self.version = 0
        self.batches: list[Batch] = []
        self.joined: Batch | None = None  # of earlier ones: of all ranks where there are several

    def changed(self, keep: Callable[[Batch], Batch] | None = None) -> None:
        """The factors are others now. What waits was of those before: dropped, unless `keep` makes it anew."""
        self.version += 1
        self.batches = [] if keep is None else [keep(batch) for batch in self.batches]
        self.joined = None if keep is None or self.joined is None else keep(self.joined)

    def place(self, wanted: bool) -> tuple[Tensor, list[Batch]]:
        """An input of a Function, the weight's as autograd sees it, and where its backward leaves the batch.

        It is queued when autograd accumulates into that input: not where it was asked for the gradient of others only.
        """
        leaf, left = _nothing(requires_grad=wanted), []
        if wanted:
            leaf.register_post_accumulate_grad_hook(lambda _: self.batches.extend(left))
        return leaf, left

    def check(self, version: int) -> None:
        """Called in backward: first derivatives only, and of the factors that forward saw."""
        once, same = not torch.is_grad_enabled(), version == self.version
        expect(once, "FactoredLinear", "backward", "first derivatives only", "create_graph=True", RuntimeError)
        expected = "the weight as forward saw it"
        expect(same, "FactoredLinear", "backward", expected, "one that step or a load has changed since", RuntimeError)


class Losses(torch.autograd.Function):
    """(m,) float64 losses of features (m, w) of P's dtype; leaf and left: of `Queue.place`."""

    @staticmethod
    def forward(
        ctx, h: Tensor, leaf: Tensor, left: list, queue: Queue, f: Factors, loss: Member, target: Tensor, share: Tensor
    ) -> Tensor:
        # A copy: between backward and step an optimizer may change features in place.
        h = h.detach().clone(memory_format=torch.contiguous_format)
        with exact(h.device):
            visit = engine(f).visit(f, h, target, share, loss)
        ctx.save_for_backward(*(getattr(visit, name) for name in _NAMES))
        ctx.left, ctx.queue, ctx.f, ctx.version = left, queue, f, queue.version
        return visit.losses

    @staticmethod
    def backward(ctx, upstream: Tensor):
        ctx.queue.check(ctx.version)
        with exact(upstream.device):
            dh, batch = engine(ctx.f).backward(ctx.f, Visit(*(t.detach() for t in ctx.saved_tensors)), upstream)
        ctx.left[:] = [batch]
        return dh, _nothing(), *(None,) * 6


class PickedRows(torch.autograd.Function):
    """W[index] (*index.shape, w); backward queues the gradient g as that of a loss Σ g · w_c of scores g · w_c."""

    @staticmethod
    def forward(ctx, leaf: Tensor, left: list, queue: Queue, f: Factors, index: Tensor) -> Tensor:
        with exact(f.p.device):
            rows = f.rows(index)
        ctx.save_for_backward(index.clone())
        ctx.left, ctx.queue, ctx.f, ctx.version = left, queue, f, queue.version
        return rows

    @staticmethod
    def backward(ctx, upstream: Tensor):
        ctx.queue.check(ctx.version)
        (index,) = ctx.saved_tensors
        g = upstream.reshape(-1, upstream.shape[-1]).clone(memory_format=torch.contiguous_format)
        ctx.left.clear()
        if len(g):
            one = torch.ones(len(g), dtype=torch.float64, device=g.device)
            with exact(g.device):
                batch = Batch.of(ctx.f, g, index.reshape(-1, 1), one.unsqueeze(1), one, torch.zeros_like(one))
            ctx.left.append(batch)
        return _nothing(), None, None, None, None
