"""NeuralSort and SoftSort: relaxed permutations whose rows are softmaxes of logits of the sorted scores."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_constant, expect, expect_reverse_mode, visible
from ..lists import Lists, lists_of
from . import permutation_ops as ops
from .permutation_torch import NEURAL_SORT, SOFT_SORT, SOFT_SORT_SQUARED, logit, pairwise_sums
from .relaxed_permutation import RelaxedPermutation


class SortedSoftmax(RelaxedPermutation):
    """What NeuralSort and SoftSort share: P is a softmax by rows of logits of the sorted scores."""

    def __init__(self, relaxation: int, scores: Tensor, tau: float | Tensor, hard: bool, dim: int, mask, offsets):
        name = type(self).__name__
        self.lists = lists = lists_of(name, scores, dim, mask, offsets, "scores")
        expect(scores.is_floating_point(), name, "scores", "a floating-point tensor", scores.dtype, TypeError)
        expect_reverse_mode(name, scores=scores, tau=tau)
        self.device, self.hard, self.relaxation = scores.device, hard, relaxation
        self.dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
        if isinstance(tau, Tensor):
            right = tau.dim() == 0 or tau.shape == lists.leading
            expect(right, name, "tau", f"a number, or a tensor of shape () or {tuple(lists.leading)}", tau)
            expect(not tau.is_complex(), name, "tau", "real numbers", tau.dtype, TypeError)
            expect(tau.device == self.device, name, "tau", f"on {self.device}", tau.device)
            self.tau = tau.to(torch.float64).expand(lists.leading).reshape(lists.rows)
        else:
            check_constant(name, "tau", tau, 0, above=True)
            self.tau = torch.zeros(lists.rows, dtype=torch.float64, device=self.device) + tau  # compiled: it may change
        flat = lists.clean(scores).to(self.dtype)
        self._order = ops.order(flat.detach(), lists.mask, lists.offsets)
        self._sorted = self._by_place(flat.unsqueeze(-1)).squeeze(-1)
        self._counts = None
        if lists.mask is not None:
            self._counts = lists.mask.sum(1) if lists.offsets is None else lists.sum(lists.mask.long())

    def _by_place(self, v: Tensor) -> Tensor:
        """Flat values of items, as the items stand in the hard sort."""
        return v.reshape(-1, v.shape[-1]).index_select(0, self._order.reshape(-1)).reshape(v.shape)

    def _by_item(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        return torch.zeros_like(flat).index_copy(0, self._order.reshape(-1), flat).reshape(x.shape)

    @property
    def _live(self) -> Tensor:
        """Flat: the places that have an item that counts."""
        if self._counts is None:
            return torch.ones_like(self._place, dtype=torch.bool)
        return self._place < self.lists.spread(self._counts)

    def _given(self, v: Tensor):
        return self._sorted.to(v.dtype), self.tau, v, self._counts, self.lists.offsets, self.relaxation

    def _product(self, v: Tensor) -> Tensor:
        v = self._by_place(v)
        if not self.hard:
            return ops.product(*self._given(v))[0]
        soft = ops.product(*self._given(v.detach()))[0]
        return torch.where(self._live.unsqueeze(-1), v, 0.0) + (soft - soft.detach())

    def _transposed_product(self, u: Tensor) -> Tensor:
        if not self.hard:
            return self._by_item(ops.transposed(*self._given(u))[0])
        soft = ops.transposed(*self._given(u.detach()))[0]
        return self._by_item(torch.where(self._live.unsqueeze(-1), u, 0.0) + (soft - soft.detach()))

    def cross_entropy(self, permutation: Tensor) -> Tensor:
        """−mean over places i of log P[i, permutation_i], one number per list (0 of a list without items).

        permutation: int64, the scores' shape: which item of its list, from 0, belongs at each place, best first. The
        mean over places is that of NeuralSort's official sorting task, without the 1e-20 that it adds in the logarithm
        (it ends at 46 nats). P is the soft matrix also where `hard` is set. An item that is masked has infinite loss.
        """
        name, lists, count = type(self).__name__, self.lists, self._counts
        right = permutation.shape == lists.shape and not permutation.is_floating_point()
        expect(right, name, "permutation", f"integers of shape {tuple(lists.shape)}", permutation)
        place, live, t = self._place.reshape(-1), self._live.reshape(-1), self._sorted.reshape(-1).double()
        if lists.offsets is None:
            length = torch.full((lists.rows,), lists.shape[lists.dim], device=self.device)
        else:
            length = lists.offsets.diff()
        count = length if count is None else count
        at = torch.where(live, lists.flat(permutation).reshape(-1), 0)
        spread = lambda x: lists.spread(x).expand_as(self._place).reshape(-1)
        if visible(at):
            inside = bool(((at >= 0) & (at < spread(length).clamp(min=1))).all())
            expect(inside, name, "permutation", "items of each list, from 0", permutation)
        index = torch.arange(t.shape[0], device=self.device)
        where = torch.empty_like(index).scatter(0, self._order.reshape(-1), index)  # the place of each item in the sort
        other = where[index - place + at]
        rest = ops.product(*self._given(self._sorted.new_empty((*self._sorted.shape, 0))))[1]
        t = torch.where(t.isfinite() & live, t, 0.0)  # a list that is not finite has no finite rest
        a = pairwise_sums(t, place, spread(count)) if self.relaxation == NEURAL_SORT else t
        d = logit(self.relaxation, spread(count), place, t, t[other], a, a[other]) / spread(self.tau)
        d = torch.where(live[other], d, -torch.inf)
        losses = torch.where(live, rest.reshape(-1).log1p() - d, 0.0).reshape(self._place.shape)
        total = Lists(lists.shape, lists.dim, None, lists.offsets).sum(losses)
        return (total / count.clamp(min=1)).to(self.dtype).reshape(lists.leading)


class NeuralSort(SortedSoftmax):
    """NeuralSort: the relaxed permutation of rows softmax_j[((n + 1 − 2i) s_j − Σ_k |s_j − s_k|) / tau], i = 1 … n.

    scores: (…, n), lists along `dim`, or (items,) with offsets; the largest score belongs at the first place. fp16 and
    bf16 are computed, and returned, in fp32. tau > 0: a number, or a tensor of one number, or one per list, which then
    gets a gradient; small: the hard sort, large: every entry 1/n. hard: what is returned is the hard sort's (ties in
    the items' order), and the scores' gradient is the soft matrix' (straight-through). mask: False where there is no
    item. offsets: (lists + 1,) int64, list r is the items from offsets[r] to offsets[r + 1]. A score that is not finite
    makes its list NaN.

    `P @ v`, `P.T @ u`, `P.top_k_mass(k)` and `P.cross_entropy(permutation)` take O(n) memory, and time in proportion to
    the band about P's diagonal that a product can tell from 0; gradients of any order. `P.dense()` is (…, n, n).

    Aditya Grover, Eric Wang, Aaron Zweig and Stefano Ermon, "Stochastic Optimization of Sorting Networks via Continuous
    Relaxations", ICLR 2019, arXiv 1903.08850. The official code makes the n × n distances and multiplies them by a
    matrix of ones; the numbers are the same.
    """

    def __init__(self, scores: Tensor, tau: float | Tensor = 1.0, *, hard=False, dim=-1, mask=None, offsets=None):
        super().__init__(NEURAL_SORT, scores, tau, hard, dim, mask, offsets)


class SoftSort(SortedSoftmax):
    """SoftSort: the relaxed permutation of rows softmax_j[−|s_[i] − s_j|^power / tau], s_[i] the i-th largest score.

    power: 1 or 2. With 1 every product is two recurrences, exact in O(n) time; with 2 it is a band, as of `NeuralSort`,
    whose arguments and methods these are.

    Sebastian Prillo and Julian Martin Eisenschlos, "SoftSort: A Continuous Relaxation for the argsort Operator", ICML
    2020, arXiv 2006.16038. The paper's experiments take power 1, its code has both.
    """

    def __init__(
        self, scores: Tensor, tau: float | Tensor = 1.0, power: int = 1, *, hard=False, dim=-1, mask=None, offsets=None
    ):
        expect(power in (1, 2), "SoftSort", "power", "1 or 2", power)
        relaxation = SOFT_SORT if power == 1 else SOFT_SORT_SQUARED
        super().__init__(relaxation, scores, tau, hard, dim, mask, offsets)
