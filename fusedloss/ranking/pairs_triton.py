"""From lists to launches of kernels/pairwise.py. Imports triton."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.triton_launch import Launch, run
from ..kernels import pairwise as kernels
from ..lists import Lists
from .pairs_torch import Items

BLOCK, PARTNERS = 16, 32  # pairs in registers of one program: four to a thread
FUNCTIONS = {"softplus": kernels.SOFTPLUS.value, "logistic": kernels.LOGISTIC.value}


def _ends(lists: Lists, like: Tensor) -> tuple[Tensor, Tensor]:
    """Where each item's list begins and stops, of flat items."""
    if lists.offsets is not None:
        return lists.spread(lists.offsets[:-1]), lists.spread(lists.offsets[1:])
    width = like.shape[-1]
    begin = torch.arange(0, like.numel(), max(1, width), device=like.device).repeat_interleave(width)
    return begin, begin + width


def _grid(items: int) -> tuple[int]:
    return (-(-items // BLOCK),)


def loss_launch(items: Items, ends, losses: Tensor, gradient: Tensor, pairs: Tensor, function, sigma, scale) -> Launch:
    s, begin_stop = items.scores, dict(zip(("begin", "stop"), ends))
    form = kernels.ONE if items.a is None else kernels.OWN if items.own else kernels.GAP
    if items.b is not None or items.table is not None:
        form = kernels.PRODUCT
    given = {name: getattr(items, name) for name in ("relevance", "counts", "a", "b", "rank", "table")}
    # A pointer that is not read is that of the scores.
    given = {name: s if tensor is None else tensor for name, tensor in given.items()}
    return Launch(
        kernels.pair_sums,
        _grid(s.numel()),
        dict(scores=s, **given, **begin_stop, losses=losses, gradient=gradient, pairs=pairs, items=s.numel(),
             sigma=float(sigma), scale=float(scale)),
        dict(FUNCTION=FUNCTIONS[function], FORM=form.value, ALL=items.counts is None, GAPS=items.b is not None,
             TABLE=items.table is not None, BLOCK=BLOCK, PARTNERS=PARTNERS),
        warps=4,
    )  # fmt: skip


def position_launch(scores: Tensor, mask, upstream, ends, out: Tensor, sigma: float) -> Launch:
    return Launch(
        kernels.position_sums,
        _grid(scores.numel()),
        dict(scores=scores, counts=scores if mask is None else mask, upstream=scores if upstream is None else upstream,
             begin=ends[0], stop=ends[1], out=out, items=scores.numel(), sigma=float(sigma)),
        dict(ALL=mask is None, BACKWARD=upstream is not None, BLOCK=BLOCK, PARTNERS=PARTNERS),
        warps=4,
    )  # fmt: skip


def _bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def _totals(lists: Lists, of_items: Tensor) -> Tensor:
    """Sums of lists in a fixed order: no atomics."""
    if lists.offsets is None:
        return of_items.sum(1)
    return torch.segment_reduce(of_items, "sum", offsets=lists.offsets, initial=0)


def pair_losses(lists: Lists, items: Items, function: str, sigma: float, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    items = items.cut(torch.Tensor.contiguous)
    items = Items(**{**vars(items), "counts": _bytes(items.counts)})
    s = items.scores
    losses, gradient, pairs = torch.empty_like(s), torch.empty_like(s), torch.empty_like(s, dtype=torch.int32)
    run(iter([loss_launch(items, _ends(lists, s), losses, gradient, pairs, function, sigma, scale)]), s.device)
    number = _totals(lists, pairs.double()).long()  # exact to 2^53
    return _totals(lists, losses.double()).to(s.dtype), gradient, number


def soft_positions(lists: Lists, scores: Tensor, upstream: Tensor | None, sigma: float) -> Tensor:
    """The positions, or the scores' gradient where there is one from above."""
    out = torch.empty_like(scores)
    ends = _ends(lists, scores)
    run(iter([position_launch(scores, _bytes(lists.mask), upstream, ends, out, sigma)]), scores.device)
    return out
