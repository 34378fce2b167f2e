"""The ranks of a process group, how many rows and columns each of them holds, and what they tell each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch renamed it in 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)


@dataclass(frozen=True, eq=False)
class Ranks:
    """This rank among the others. Rows and columns are numbered through, rank by rank."""

    group: dist.ProcessGroup | None
    rank: int
    rows: tuple[int, ...]  # how many each rank holds
    columns: tuple[int, ...]

    @property
    def size(self) -> int:
        return len(self.rows)

    def neighbour(self, step: int) -> int:
        """Rank in the world of the one `step` further round the ring."""
        group = dist.group.WORLD if self.group is None else self.group
        return dist.get_global_rank(group, (self.rank + step) % self.size)


def span(counts: Sequence[int], rank: int) -> slice:
    """The rows (or columns) that a rank holds."""
    start = sum(counts[:rank])
    return slice(start, start + counts[rank])


def _flat(tensor: Tensor) -> Tensor:
    """Its numbers in a line: also where `contiguous` leaves a dimension of one entry with a stride of its own."""
    return tensor.detach().contiguous().as_strided((tensor.numel(),), (1,))


def bytes_of(tensor: Tensor) -> Tensor:
    """A row of bytes for each of its rows: whatever the type, every process group can carry that."""
    return _flat(tensor).view(torch.uint8).reshape(len(tensor), row_bytes(tensor))


def from_bytes(rows: Tensor, like: Tensor) -> Tensor:
    """Inverse of `bytes_of`, for a tensor that is `like` this one but for the number of its rows."""
    flat = _flat(rows)
    flat = flat.clone() if flat.storage_offset() % like.element_size() else flat
    return flat.view(like.dtype).reshape(len(rows), *like.shape[1:])


def row_bytes(tensor: Tensor) -> int:
    return tensor.shape[1:].numel() * tensor.element_size()


def gathered(group: dist.ProcessGroup | None, tensor: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all ranks, which hold `counts` of them. No gradient."""
    mine, most = bytes_of(tensor), max(counts)
    if len(mine) < most:  # an all-gather takes equal parts
        mine = torch.cat([mine, mine.new_zeros(most - len(mine), mine.shape[1])])
    parts = mine.new_empty(most * len(counts), mine.shape[1])
    _all_gather(parts, mine, group=group)
    if min(counts) < most:
        parts = torch.cat([part[:count] for part, count in zip(parts.split(most), counts)])
    return from_bytes(parts, tensor)


class Total(torch.autograd.Function):
    """Sum over the ranks, on every rank. Its adjoint is itself: what is differentiated is the sum of all ranks' losses."""

    @staticmethod
    def forward(ctx, group, value):
        ctx.group, total = group, value.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx, grad):
        return None, Total.apply(ctx.group, grad.contiguous())


def meet(
    name: str,
    group: dist.ProcessGroup | None,
    device: torch.device,
    counts: tuple[int, int],
    same: dict[str, tuple[Sequence, object]],
) -> Ranks:
    """Exchange the numbers of rows and columns, and check what has to be the `same` on all ranks.

    That is, by what the user calls it, (what it is chosen from, what it is here).
    """
    if not (dist.is_available() and dist.is_initialized()):
        raise RuntimeError(
            f"{name}: group: expected an initialised one (torch.distributed.init_process_group), got none"
        )
    rank = dist.get_rank(group)
    if rank < 0:
        raise ValueError(f"{name}: group: expected one that this rank belongs to, got {group}")
    # Through the host's own channel where there is one: reading what came over the device's means waiting for it.
    where = torch.device("cpu") if "cpu:" in dist.get_backend_config(group) else device
    told = [*counts, *[choices.index(value) for choices, value in same.values()]]
    heard = gathered(group, torch.tensor([told], device=where), [1] * dist.get_world_size(group))
    rows, columns, *others = zip(*heard.tolist())
    for (what, (choices, _)), values in zip(same.items(), others):
        if len(set(values)) > 1:  # on all ranks alike, so none is left waiting
            got = [choices[v] for v in values]
            raise ValueError(f"{name}: {what}: expected the same on all ranks, got {got}")
    return Ranks(group, rank, rows, columns)
