"""The factored layer of several ranks: replicas that all take the step of the batch of all ranks.

What travels is features and coefficients, m · d numbers, instead of a gradient of n · d. All else of a batch is
computed again from them, by every rank in the same way, so that replicas which began alike stay so, bit for bit.
"""

from __future__ import annotations

from dataclasses import fields

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import pad

from ..distributed.ranks import bytes_of, from_bytes, gathered, meet, row_bytes
from .factors import Factors
from .steps import F64, Batch


def broadcast(caller: str, f: Factors, group: dist.ProcessGroup) -> None:
    """Make the factors those of the group's first rank. All ranks have to call it."""
    (n, d), most = f.p.shape, range(1 << 62)
    sizes = {"out_features": (most, n), "in_features, bias or momentum": (most, d)}
    meet(caller, group, f.p.device, (n, d), {**sizes, "dtype": ((torch.float32, torch.float64), f.p.dtype)})
    first = dist.get_global_rank(group, 0)
    for field in fields(f):
        dist.broadcast(getattr(f, field.name), first, group=group)


def gather(
    caller: str, f: Factors, batch: Batch | None, group: dist.ProcessGroup, width: int | None = None
) -> Batch | None:
    """The batch of all ranks, in their order, of the average of their losses; None where no rank has one.

    All ranks have to call it, those without a batch too. Ranks may hold any number of rows, and of targets to a row.
    Features from column `width` on are 0, and do not travel.
    """
    rows, targets = (0, 0) if batch is None else batch.target.shape
    ranks = meet(caller, group, f.p.device, (rows, targets), {})
    if not any(ranks.rows):
        return None
    wide = f.p.new_empty(0, max(ranks.columns), dtype=F64)
    like = [f.p[:0, :width], wide.to(torch.int64), wide, wide.sum(1), wide.sum(1)]
    mine = like if batch is None else _sent(batch, width, wide.shape[1])
    everybody = gathered(group, torch.cat([bytes_of(part) for part in mine], 1), ranks.rows)
    pieces = everybody.split([row_bytes(part) for part in like], 1)
    h, target, *coefficients = [from_bytes(piece, part) for piece, part in zip(pieces, like)]
    h = pad(h, (0, f.p.shape[1] - h.shape[1]))
    return Batch.of(f, h, target, *[part / ranks.size for part in coefficients])


def _sent(b: Batch, width: int | None, targets: int) -> list[Tensor]:
    """Targets are filled up with α = 0."""
    more = (0, targets - b.target.shape[1])
    return [b.h[:, :width], pad(b.target, more), pad(b.alpha, more), b.t, b.gamma]
