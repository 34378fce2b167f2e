"""From the operators of relaxed permutations to launches of kernels/permutation.py. Imports triton."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from ..backends.triton_launch import Launch, run
from ..kernels import permutation as kernels

BLOCK, OTHERS = 16, 32  # of P, in registers of one program: four entries to a thread
COLUMNS = 4  # of v, likewise
SCANNED = 512  # items at a time of a program that has a whole list


@dataclass(frozen=True)
class Band:
    """Sorted lists one after the other, and which programs have what of them."""

    t: Tensor
    tau: Tensor
    begin: Tensor  # of each list, like the next two
    lengths: Tensor
    counts: Tensor
    lists: Tensor  # of each program, like the next
    firsts: Tensor
    sides: Tensor  # x of items and A, x of places and C (csrc/permutation_rows.h); SoftSort: x each time
    relaxation: int
    cutoff: float

    @classmethod
    def of(cls, t: Tensor, tau: Tensor, counts: Tensor | None, offsets: Tensor | None, relaxation: int) -> Band:
        """Nothing here waits for the device: more programs than needed find nothing to do."""
        rows, items, device = len(tau), t.numel(), t.device
        width = items if offsets is not None else t.shape[1]
        if offsets is None:
            offsets = torch.arange(rows + 1, device=device) * width
            programs = rows * triton.cdiv(width, BLOCK)
        else:
            programs = items // BLOCK + rows
        lengths = offsets.diff()
        blocks = (lengths + (BLOCK - 1)) // BLOCK
        ends, index = blocks.cumsum(0), torch.arange(programs, device=device)
        lists = torch.searchsorted(ends, index, right=True).clamp_(max=rows - 1)
        firsts = (index - (ends - blocks)[lists]) * BLOCK
        counts = lengths if counts is None else counts.contiguous()
        numbers = 4 if relaxation == kernels.NEURAL_SORT.value else 1
        sides = torch.empty(numbers, items, dtype=torch.float64, device=device).expand(4, -1)
        # What is left out of a row, at most m exp(−cutoff), is below half a unit in the last place of its sum.
        cutoff = max(32.0, math.log(max(width, 1)) + 17.4)
        of_lists = offsets[:-1].contiguous(), lengths, counts
        return cls(t.contiguous(), tau.contiguous(), *of_lists, lists, firsts, sides, relaxation, cutoff)

    def _per_list(self, kernel, given: dict, **constants) -> Launch:
        given = given | {name: getattr(self, name) for name in ("t", "tau", "begin", "lengths", "counts")}
        return Launch(kernel, (len(self.tau),), given, dict(**constants, BLOCK=SCANNED), warps=4)

    def _per_block(self, kernel, items_own: bool, along: int, given: dict, **constants) -> Launch:
        items, places = self.sides[:2], self.sides[2:]
        own, other = (items, places) if items_own else (places, items)
        names = "begin", "lengths", "counts", "lists", "firsts", "cutoff"
        where = dict(own_x=own[0], own_p=own[1], other_x=other[0], other_p=other[1])
        constants |= dict(RELAXATION=self.relaxation, BLOCK=BLOCK, OTHERS=OTHERS)
        given = given | where | {name: getattr(self, name) for name in names}
        return Launch(kernel, (len(self.lists), along), given, constants, warps=4)

    def sides_launch(self) -> Launch:
        return self._per_list(kernels.sides, dict(zip(("x", "a", "w", "c"), self.sides)), RELAXATION=self.relaxation)

    def sums(self, values: Tensor, out: Tensor, rest: Tensor | None, deviation: Tensor | None) -> Launch:
        """P v, rest and deviation of v; or without room for these Pᵀ u of u / (1 + rest)."""
        columns, transposed = values.shape[-1], rest is None
        block = min(COLUMNS, triton.next_power_of_2(max(1, columns)))
        absent = self.t  # never read
        given = dict(values=values, out=out, rest=absent if transposed else rest, columns=columns,
                     deviation=absent if transposed else deviation)  # fmt: skip
        along = max(1, triton.cdiv(columns, block))
        return self._per_block(kernels.banded_sums, transposed, along, given, TRANSPOSED=transposed, COLUMNS=block)

    def gradient(self, r: Tensor, v: Tensor, deviation: Tensor, diagonal: Tensor, dt: Tensor, along: Tensor):
        """The launches for dt and each item's part of dtau. diagonal: the derivatives in D_ii."""
        total, moment = torch.empty_like(along), torch.empty_like(along)
        sums = dict(dt=dt, total=total, moment=moment, along=along)
        given = dict(r=r, v=v, deviation=deviation, columns=v.shape[-1], tau=self.tau, **sums)
        yield self._per_block(kernels.banded_slopes, True, 1, given, PLACES=False)
        if self.relaxation == kernels.NEURAL_SORT.value:
            given = dict(total=total, diagonal=diagonal, moment=moment, dt=dt)
            for back in (False, True):
                yield self._per_list(kernels.neural_slopes, given, BACK=back)
        else:
            yield self._per_block(kernels.banded_slopes, False, 1, given, PLACES=True)


def product(t: Tensor, tau: Tensor, v: Tensor, counts, offsets, relaxation: int) -> tuple[Tensor, Tensor, Tensor]:
    t, v = t.contiguous(), v.contiguous()
    y, rest, deviation = torch.empty_like(v), torch.empty_like(t), torch.empty_like(v)
    if t.numel():
        band = Band.of(t, tau, counts, offsets, relaxation)
        run(iter([band.sides_launch(), band.sums(v, y, rest, deviation)]), t.device)
    return y, rest, deviation


def transposed(t: Tensor, tau: Tensor, u: Tensor, counts, offsets, relaxation: int) -> tuple[Tensor, Tensor]:
    t, u, none = t.contiguous(), u.contiguous(), u.new_empty((*t.shape, 0))
    x, rest = torch.empty_like(u), torch.empty_like(t)
    if t.numel():
        band = Band.of(t, tau, counts, offsets, relaxation)
        run(iter([band.sides_launch(), band.sums(none, none, rest, none)]), t.device)
        run(iter([band.sums(u / (1 + rest).unsqueeze(-1), x, None, None)]), t.device)
    return x, rest


def gradient(t, tau, rest, u, v, deviation, counts, offsets, relaxation: int) -> tuple[Tensor, Tensor, Tensor | None]:
    t, u = t.contiguous(), u.contiguous()
    dt, along = torch.empty_like(t), torch.empty_like(t, dtype=torch.float64)
    x = None if v is None else torch.empty_like(u)
    if not t.numel():
        return dt, torch.zeros_like(tau), x
    if v is None:  # of the sum of e^D over j ≠ i, v_j − v_i − deviation_i is 1
        r, v, deviation = u, torch.zeros_like(u), torch.full_like(u, -1.0)
        diagonal = -(u.squeeze(-1) * rest).double()
    else:
        r, v, deviation = u / (1 + rest).unsqueeze(-1), v.contiguous(), deviation.contiguous()
        diagonal = -(r * deviation).sum(-1, dtype=torch.float64)
    band = Band.of(t, tau, counts, offsets, relaxation)
    launches = [band.sides_launch(), *band.gradient(r, v, deviation, diagonal, dt, along)]
    if x is not None:
        launches.append(band.sums(r, x, None, None))
    run(iter(launches), t.device)
    along = along.sum(1) if offsets is None else torch.segment_reduce(along, "sum", offsets=offsets, initial=0)
    return dt, along, x
