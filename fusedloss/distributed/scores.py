"""Similarity scores between the features of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from .. import ops
from ..backends.tile import Across
from ..checks import expect
from ..plan import Walk
from ..scores import FLOATING, Scores
from ..similarity import check_features, shift_of, unit
from ..statistics import Score, Statistic, split
from .block import Product
from .gather import Gather
from .ranks import Ranks, Total, gathered, meet, span
from .ring import Ring

EXCHANGES = {"gather": Gather, "ring": Ring}
NAME = "distributed.similarity_scores"


@dataclass(frozen=True, eq=False)
class DistributedScores(Scores):
    """This rank's rows and columns of the scores between all ranks' features. Made by `distributed.similarity_scores`.

    What `Scores` gives of rows it gives of this rank's rows, over all columns; of `Columns`, of this rank's columns
    over all rows. Columns are numbered through, rank by rank.
    """

    ranks: Ranks | None = None
    exchange: Gather | Ring | None = None
    shift: Tensor | None = None

    @property
    def columns(self) -> int:
        """Number of columns of all ranks."""
        return sum(self.ranks.columns)

    @property
    def separable(self) -> bool:
        return False

    def diagonal(self) -> Tensor:
        """(n,) the column, among those of all ranks, that belongs to each row of this rank."""
        return self._diagonal

    @cached_property
    def _diagonal(self) -> Tensor:
        return torch.arange(self.rows, device=self.input.device) + span(self.ranks.columns, self.ranks.rank).start

    @torch.compiler.disable
    def of_columns(self, values: Tensor) -> Tensor:
        """(M, …) values of all columns, given those of this rank's. No gradient."""
        count = self.ranks.columns[self.ranks.rank]
        expect(len(values) == count, "Scores.of_columns", "values", f"({count}, …), of this rank's columns", values)
        return gathered(self.ranks.group, values, self.ranks.columns)

    @torch.compiler.disable
    def total(self, values: Tensor) -> Tensor:
        """Sum of values of all ranks' rows, on every rank."""
        return Total.apply(self.ranks.group, values.sum())

    @torch.compiler.disable
    def mean(self, values: Tensor) -> Tensor:
        """Mean of values of all ranks' rows or columns, on every rank; 0 for none."""
        count = torch.full((), values.numel(), dtype=values.dtype, device=values.device)
        total, count = Total.apply(self.ranks.group, torch.stack([values.sum(), count])).unbind()
        return total / count.clamp(min=1)

    def at(self, columns: Tensor) -> Tensor:
        """Scores at given columns (n,) or (n, k) of any rank: an exchange, but no pass over the scores.

        What `diagonal` returned takes no exchange either: those columns are here.
        """
        if columns is self._diagonal and all(n <= m for n, m in zip(self.ranks.rows, self.ranks.columns)):
            shift = None if self.shift is None else self.shift.expand(len(self.weight))
            here = Scores(self.input, self.weight, None, None, shift, 0.0, self.scale, self.walk)
            return here.at(columns - span(self.ranks.columns, self.ranks.rank).start)
        return self.reduce(Score(columns))

    def keeping(self, keep: Tensor | None) -> DistributedScores:
        """The same scores where only some rows count; the others cost as much."""
        if keep is None:
            return self
        if self.symmetric:  # a row that does not count is a column still
            return replace(self, keep=keep)
        x = torch.where(keep.unsqueeze(1), self.input, 0.0)  # NaN in it would spoil the gradient of the columns
        exchange = type(self.exchange)(self.ranks, x.detach(), self.exchange.y)
        return replace(self, keep=keep, input=x, exchange=exchange)

    def adjusted(self, class_scale=None, class_shift=None):
        raise ValueError(f"{NAME}: expected a loss without vectors of classes, got class_scale or class_shift")

    def at_columns(self, columns):
        raise ValueError(f"{NAME}: expected a loss of all columns, got one of some of them")

    def dense(self):
        raise ValueError(f"{NAME}: expected statistics whose tensors, but for row, need no gradient, got one that does")

    def plan(self):
        raise ValueError(f"{NAME}: plan: expected scores of one process, got those of {self.ranks.size}")

    def streams(self) -> tuple[Tensor | None, ...]:
        scale = self.scale if isinstance(self.scale, Tensor) else None
        return (self.input, None if self.symmetric else self.weight, None, None, self.shift, scale)

    @torch.compiler.disable
    def sizes(self, across: bool) -> tuple[int, int]:
        ranks = self.ranks
        return (sum(ranks.rows), ranks.columns[ranks.rank]) if across else (self.rows, self.columns)

    def reduced(self, statistics: Sequence[Statistic]) -> tuple[Tensor, ...]:
        plain = [s.with_tensors({name: t.detach() for name, _, t in s.tensors()}) for s in statistics]
        x, y, *_, shift, scale = self.streams()
        given = _Statistics.apply(self, *split(plain), x, y, scale, shift)
        if self.keep is None:
            return given
        of_rows = [torch.where(self.keep.unsqueeze(1), t, torch.zeros_like(t)) for t in given[:3]]
        return *of_rows, *given[3:]


class _Statistics(torch.autograd.Function):
    """Statistics of rows and of columns. Backward takes the coefficients of every rank's rows and columns for those of
    one sum, of all ranks' losses: so it is what an average over the ranks turns into the gradient of one of them."""

    @staticmethod
    def forward(ctx, scores, rows, columns, x, y, scale, shift):
        product = Product(
            scores.scale if scale is None else scale.detach(),
            None if shift is None else shift.detach(),
            scores.multiply_dtype,
            scores.walk,
        )
        states, below = scores.exchange.statistics(product, rows, columns)
        ctx.exchange, ctx.product, ctx.rows, ctx.columns = scores.exchange, product, rows, columns
        ctx.save_for_backward(x, y, scale, shift, *states, *below)
        ctx.set_materialize_grads(False)
        given = *ops.shown(rows, states, len(x), x.device), *ops.shown(columns, below, len(scores.weight), x.device)
        ctx.mark_non_differentiable(given[1], given[2], given[4], given[5])
        return given

    @staticmethod
    def backward(ctx, grad, _columns, _states, grad_across, *_):
        if torch.is_grad_enabled():
            raise RuntimeError(
                f"{NAME}: expected backward without create_graph, got one with: second derivatives are not there"
            )
        if grad is None and grad_across is None:
            return (None,) * 7
        x, y, scale, shift, *states = ctx.saved_tensors
        rows = _side(ctx.rows, states[: len(ctx.rows)], grad)
        columns = _side(ctx.columns, states[len(ctx.rows) :], grad_across)
        needs = ctx.needs_input_grad[3:]
        if y is None:  # a column's statistics are those of its row: what follows from s_ij is counted at s_ji too
            both = [[*a, *b] for a, b in zip(_parts(rows), _parts(columns))]
            dx, _, *shared = ctx.exchange.gradients(ctx.product, Across(*both), None, needs)
            found = [dx, None, *[None if g is None else g / 2 for g in shared]]
        else:
            found = ctx.exchange.gradients(ctx.product, rows, columns, needs)
        like = (x, y, scale, shift)
        return None, None, None, *[None if g is None else g.to(t.device, t.dtype) for g, t in zip(found, like)]


def _side(stats: Sequence[Statistic], states: Sequence[Tensor], grad: Tensor | None) -> Across:
    if grad is None:  # of values that nobody used
        grad = states[0].new_zeros(len(states[0]), sum(s.outputs for s in stats)) if stats else None
    coefficients = grad.split([s.outputs for s in stats], 1) if stats else ()
    return Across(list(stats), list(states), [c.contiguous() for c in coefficients])


def _parts(side: Across) -> tuple[Sequence, Sequence, Sequence]:
    return side.stats, side.states, side.coefficients


@torch.compiler.disable
def similarity_scores(
    x: Tensor,
    y: Tensor | None = None,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor | None = None,
    normalize: bool = False,
    group: torch.distributed.ProcessGroup | None = None,
    exchange: str = "gather",
    memory_budget: int | None = None,
    backend: str = "auto",
) -> DistributedScores:
    """Scores s_ij = scale · x_i · y_j + bias between the features of all ranks of a group, that are never stored.

    Every rank gives its own features and has the statistics of its own rows and columns, over those of all ranks. A
    loss is the same on all ranks: that of one process with the concatenated batch. Gradients are such that their
    average over the ranks, as DistributedDataParallel forms it, is the gradient of that loss: features get world size ·
    ∂L/∂x, a parameter's gradients average to ∂L/∂θ. No factor is left to the caller. docs/distributed.md has the costs.

    Args:
        x: (n, D) this rank's rows; n may differ from rank to rank, and be 0.
        y: (m, D) this rank's columns; None, or x itself, for the similarities of x with itself.
        scale, bias, normalize, memory_budget, backend: as for `fusedloss.similarity_scores`. Scale and bias are to have
            the same value on all ranks.
        group: a process group of torch.distributed; None: the default one.
        exchange: "gather" gathers all features on every rank; "ring" sends them round in blocks, so that no rank's
            memory grows with the number of ranks.

    All ranks of the group must call this, and every loss and backward, in the same order. Second derivatives are not
    supported.

    Raises:
        RuntimeError: no process group; a backward with create_graph=True.
        TypeError, ValueError: name the argument, what was expected and what came, here or on the other ranks.
    """
    same = check_features(NAME, x, y, scale, bias, memory_budget, empty=True)
    for argument, t in (("x", x), ("y", x if same else y)):
        expect(t.dtype in FLOATING, NAME, argument, "float64, float32, bfloat16 or float16", t.dtype, TypeError)
    expect(exchange in EXCHANGES, NAME, "exchange", "gather or ring", exchange)
    shift, y = shift_of(bias, x), x if same else y
    scale = scale if isinstance(scale, Tensor) else float(scale)
    agreed = {
        "D": (range(1 << 62), x.shape[1]),
        "x's dtype": (FLOATING, x.dtype),
        "y's dtype": (FLOATING, y.dtype),
        "y is x": ((False, True), same),
        "exchange": (tuple(EXCHANGES), exchange),
    }
    for argument, t in (("x", x), ("y", y), ("scale", scale), ("bias", shift)):
        trained = torch.is_grad_enabled() and isinstance(t, Tensor) and t.requires_grad
        agreed[f"{argument}.requires_grad"] = ((False, True), trained)
    ranks = meet(NAME, group, x.device, (len(x), len(y)), agreed)
    if normalize:
        x = unit(x)
        y = x if same else unit(y)
    walk = Walk(memory_budget, "recompute", 0.0, backend)
    held = EXCHANGES[exchange](ranks, x.detach(), None if same else y.detach())
    return DistributedScores(x, y, None, None, None, 0.0, scale, walk, None, same, ranks, held, shift)
