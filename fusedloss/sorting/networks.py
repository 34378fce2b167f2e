"""Differentiable sorting networks: relaxed comparators by index, never as matrices."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_constant, check_number, expect, expect_reverse_mode, fixed
from ..lists import lists_of
from . import network_ops as ops
from .comparators import DISTRIBUTIONS, KINDS
from .relaxed_permutation import RelaxedPermutation

NAME = "SortingNetwork"


class SortingNetwork(RelaxedPermutation):
    """Numbers sorted by a network of relaxed comparators, and the relaxed permutation P that does it.

    A comparator on a and b, of share α = F(β (b − a)), puts α a + (1 − α) b on the wire of the smaller and
    (1 − α) a + α b on that of the larger; P is the product of all of them, doubly stochastic, rows = places, columns =
    items, and ``net.sorted == net @ values``.

    values: (…, n, …), the numbers along `dim`; fp64, fp32, or half precision, computed in fp32.
    kind: "odd_even" (n layers; any n) or "bitonic" (k (k + 1)/2 layers with k = ⌈log₂ n⌉; of an n that is no power of
        two, the first wires of the next larger network are left out).
    distribution: F. "cauchy" (default) ½ + atan(v)/π; "logistic" σ(v); "logistic_phi" σ(v/|b − a|^art_lambda);
        "gaussian" Φ(v); "reciprocal" ½ + ½ v/(2 + |v|); "optimal" v + ½ for |v| ≤ ¼, 1 − 1/(16 v) above that,
        1/(16 |v|) below −¼.
        With cauchy, reciprocal and optimal the sorted numbers rise with every input, whatever the steepness.
    steepness: β > 0, a number or a 0-dimensional tensor, with gradient. art_lambda: for logistic_phi alone.
    descending: the largest number first.

    ``net.sorted``: the values' shape and type. ``net @ v`` and ``net.T @ u``: v has the values' shape, or that and a
    last dimension of several columns. ``net.dense()``: P, (…, n, n). Products of half precision are fp32.
    P is not kept: n/2 numbers per layer are (n²/2 of "odd_even", n log₂² n / 4 of "bitonic"), and products send v
    through the comparators again, forwards or backwards. ±inf are sorted hard and have no gradient; NaN spreads.
    Derivatives of any order; the second ones take the plain PyTorch formula, which keeps every layer.

    Felix Petersen, Christian Borgelt, Hilde Kuehne and Oliver Deussen, "Differentiable Sorting Networks for Scalable
    Sorting and Ranking Supervision", ICML 2021, arXiv 2105.04019, and "Monotonic Differentiable Sorting Networks", ICLR
    2022, arXiv 2203.09630. Numbers are those of the authors' package diffsort 0.2, which returns (sorted, Pᵀ) and takes
    0/1 matrices to move numbers about.
    """

    def __init__(
        self,
        values: Tensor,
        kind: str = "odd_even",
        distribution: str = "cauchy",
        steepness: float | Tensor = 10.0,
        *,
        art_lambda: float = 0.25,
        descending: bool = False,
        dim: int = -1,
    ) -> None:
        self.lists = lists_of(NAME, values, dim)
        expect(values.is_floating_point(), NAME, "values", "a floating-point tensor", values.dtype, TypeError)
        expect(kind in KINDS, NAME, "kind", f"one of {list(KINDS)}", kind)
        expect(distribution in DISTRIBUTIONS, NAME, "distribution", f"one of {list(DISTRIBUTIONS)}", distribution)
        check_number(NAME, "steepness", steepness, 0, above=True)
        expect_reverse_mode(NAME, values=values, steepness=steepness)
        check_constant(NAME, "art_lambda", art_lambda, 0, 1)
        self.device = values.device
        self.dtype = torch.float64 if values.dtype == torch.float64 else torch.float32
        if not isinstance(steepness, Tensor):
            steepness = torch.full((), fixed(steepness), dtype=torch.float64, device="cpu")
        self._given = steepness, (kind, descending, distribution, float(fixed(art_lambda)))
        steepness, spec = self._given
        flat, self._gaps = ops.sort(self.lists.flat(values).to(self.dtype), steepness, None, *spec)
        self.sorted = self.lists.shaped(flat).to(values.dtype)

    def _product(self, v: Tensor) -> Tensor:
        """(rows, n, c) → P v."""
        steepness, spec = self._given
        return ops.push(self._gaps.to(v.dtype), steepness, v, False, *spec)

    def _transposed_product(self, u: Tensor) -> Tensor:
        steepness, spec = self._given
        return ops.push(self._gaps.to(u.dtype), steepness, u, True, *spec)
