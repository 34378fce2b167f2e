"""The exchange "ring": blocks of columns travel round, and no rank ever holds more than three of them.

While a rank works on one block the next one is on its way. What is gathered of a block on the way (states of its
columns, the gradient of its features) follows one step behind, and comes home with the last step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from ..backends.tile import Across
from ..statistics import Statistic
from .block import NOBODY, Product, facing, moved_state, packed, unpacked
from .ranks import Ranks, span


class Transfer:
    """Tensors on their way to the next rank, while as many of the previous one come `into` their places."""

    def __init__(self, ranks: Ranks, tensors: Sequence[Tensor], into: Sequence[Tensor]):
        self.sent, self.received, self.works = [t.contiguous() for t in tensors], into, []
        calls = [(dist.isend, t, ranks.neighbour(1)) for t in self.sent]
        calls += [(dist.irecv, t, ranks.neighbour(-1)) for t in into]
        wanted = [dist.P2POp(call, t, peer, ranks.group) for call, t, peer in calls if t.numel()]
        self.works = dist.batch_isend_irecv(wanted) if wanted else []

    def wait(self) -> Sequence[Tensor]:
        for work in self.works:
            work.wait()
        return self.received


def room(tensors: Sequence[Tensor], rows: int) -> list[Tensor]:
    """Places for tensors like these, of so many rows."""
    return [t.new_empty(rows, *t.shape[1:]) for t in tensors]


def visits(ranks: Ranks, own: Sequence[Tensor], counts: Sequence[int]) -> Iterator[tuple[int, Sequence[Tensor]]]:
    """Each block's owner and tensors, the own block first. Two places are enough: one is read and sent, one filled."""
    places = [room(own, max(counts)) for _ in range(min(2, ranks.size - 1))]
    held = own
    for step in range(ranks.size):
        owner, coming = (ranks.rank - step) % ranks.size, None
        if step < ranks.size - 1:
            coming = Transfer(ranks, held, [place[: counts[owner - 1]] for place in places[step % 2]])
        yield owner, held
        held = held if coming is None else coming.wait()


class Gathered:
    """What is gathered of each block on its way."""

    def __init__(self, ranks: Ranks, counts: Sequence[int], merge: Callable):
        self.ranks, self.counts, self.merge = ranks, counts, merge
        self.own, self.coming = None, None

    def add(self, owner: int, found: list[Tensor]) -> None:
        """What this rank adds to the block that it looks at."""
        coming, self.coming = self.coming, None
        if coming is not None:
            found = self.merge(coming.wait(), found)
            del coming  # before the next one's places are there
        if self.ranks.size == 1:
            self.own = found
        else:
            self.coming = Transfer(self.ranks, found, room(found, self.counts[owner - 1]))

    def home(self) -> Sequence[Tensor]:
        """What all ranks added to the own block, after the last step."""
        return self.own if self.coming is None else self.coming.wait()


class Ring:
    """Features x of this rank's rows and y of its columns (None: the same)."""

    def __init__(self, ranks: Ranks, x: Tensor, y: Tensor | None):
        self.ranks, self.x, self.y = ranks, x, y
        self.mine = span(ranks.rows, ranks.rank)

    def statistics(
        self, product: Product, rows: Sequence[Statistic], columns: Sequence[Statistic]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """States of this rank's rows, and of its columns."""
        if self.y is None:
            states, _ = self._statistics(product, self.x, [*rows, *columns], ())
            return states[: len(rows)], states[len(rows) :]
        return self._statistics(product, self.y, rows, columns)

    def _statistics(self, product, y, rows, columns):
        states = [s.identity(len(self.x), self.x.device) for s in rows]
        mine, theirs = Across(rows, (), ()), Across(columns, (), ())
        below = Gathered(self.ranks, self.ranks.columns, lambda a, b: [s.merge(*ab) for s, *ab in zip(columns, a, b)])
        for owner, (block, *data) in visits(self.ranks, self._travelling(y, theirs), self.ranks.columns):
            here = span(self.ranks.columns, owner)
            over = facing(unpacked(theirs, *data), self.mine).stats if data else ()
            found, across = product.statistics(self.x, block, facing(mine, here).stats, over)
            states = [s.merge(state, moved_state(s, new, here.start)) for s, state, new in zip(rows, states, found)]
            if data:
                below.add(owner, [moved_state(s, t, self.mine.start) for s, t in zip(columns, across)])
        return states, below.home() if columns else []

    def gradients(self, product: Product, rows: Across, columns: Across, needs: Sequence[bool]) -> list[Tensor | None]:
        """Of this rank's x and y, and its part of those of scale and bias."""
        same = self.y is None
        y, theirs = (self.x, rows) if same else (self.y, columns)
        want_y = needs[1] and not same
        home = Gathered(self.ranks, self.ranks.columns, lambda a, b: [p.add_(q) for p, q in zip(a, b)])
        totals: list[Tensor | None] = [None, None, None]
        for owner, (block, *data) in visits(self.ranks, self._travelling(y, theirs), self.ranks.columns):
            over = facing(unpacked(theirs, *data), self.mine) if data else NOBODY
            mine = facing(rows, span(self.ranks.columns, owner))
            wanted = needs[0], want_y, *needs[2:]
            dx, dy, *shared = product.gradients(self.x, block, mine, over, wanted, rounded=False)
            totals = [new if old is None else old.add_(new) for old, new in zip(totals, (dx, *shared))]
            if want_y:
                home.add(owner, [dy])
            del dx, dy, shared  # before the next block's are there
        dx, *shared = totals
        dx = None if dx is None else dx.to(self.x.dtype)
        return [dx, home.home()[0].to(y.dtype) if want_y else None, *shared]

    def _travelling(self, y: Tensor, theirs: Across) -> list[Tensor]:
        """A block: its features, and what its columns carry."""
        return [y, packed(theirs, len(y))] if theirs.stats else [y]
