"""Relaxed permutation matrices that are never stored: `P @ v`, `P.T @ u`, the dense matrix on request."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import expect, expect_reverse_mode
from ..lists import Lists


class LeftFactor:
    """The left side of a product: `self @ tensor`."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        """How torch.compile finds `__matmul__`; torch 2.13 hands the two over in reverse order."""
        if function.__name__ == "matmul" and len(args) == 2:
            if isinstance(args[0], LeftFactor):
                return args[0].__matmul__(args[1])
            if torch.compiler.is_compiling():
                return args[1].__matmul__(args[0])
        return NotImplemented


class RelaxedPermutation(LeftFactor):
    """A matrix P of each list: rows are places, columns are items, each row sums to 1. It stands for the
    permutation that sorts the list, and is differentiable.

    Subclasses say what P times something is, of flat tensors: (rows, n, columns), or with offsets (items, columns).
    """

    lists: Lists
    dtype: torch.dtype  # in which products are computed, at least
    device: torch.device

    def _product(self, v: Tensor) -> Tensor:
        raise NotImplementedError

    def _transposed_product(self, u: Tensor) -> Tensor:
        raise NotImplementedError

    def __matmul__(self, v: Tensor) -> Tensor:
        """P v: what stands at each place. v: the scores' shape, or that and a last dimension of several columns, or
        (n,), the same of every list. Of n places of a list of m items that count, the last n − m are 0."""
        return self._applied(self._product, v)

    @property
    def T(self) -> Transposed:
        return Transposed(self)

    def dense(self) -> Tensor:
        """P itself: (…, n, n), lists first. Zero where a place is behind the items that count, or an item is masked."""
        name, lists = type(self).__name__, self.lists
        expect(lists.offsets is None, name, "dense", "lists of one length", "offsets")
        n = lists.shape[lists.dim]
        identity = torch.eye(n, dtype=self.dtype, device=self.device).expand(lists.rows, n, n)
        return self._product(identity).reshape(*lists.leading, n, n)

    def top_k_mass(self, k: int) -> Tensor:
        """How much of each item is among the first k places: Σ_{i ≤ k} P[i, item], in the scores' shape."""
        expect(isinstance(k, int) and k >= 0, type(self).__name__, "k", "an integer of 0 or more", k)
        first = (self._place < k).to(self.dtype)
        return self.lists.shaped(self._transposed_product(first.unsqueeze(-1)).squeeze(-1))

    @property
    def _place(self) -> Tensor:
        """Flat: 0, 1, … along each list."""
        lists = self.lists
        if lists.offsets is None:
            n = lists.shape[lists.dim]
            return torch.arange(n, device=self.device).expand(lists.rows, n)
        return torch.arange(lists.shape[0], device=self.device) - lists.offsets[lists.row]

    def _applied(self, apply, v: Tensor) -> Tensor:
        name, lists, shape = type(self).__name__, self.lists, self.lists.shape
        expect(isinstance(v, Tensor), name, "operand", "a tensor", type(v).__name__, TypeError)
        expect_reverse_mode(name, operand=v)
        expect(v.device == self.device, name, "operand", f"on {self.device}", v.device)
        n = shape[lists.dim]
        if lists.offsets is None and v.shape == (n,) and len(shape) > 1:
            v = v.expand(*lists.leading, n).movedim(-1, lists.dim)
        several = v.shape[:-1] == shape
        expect(several or v.shape == shape, name, "operand", f"shape {tuple(shape)}, or that and columns", v)
        v = v.to(torch.promote_types(self.dtype, v.dtype) if v.is_floating_point() else self.dtype)
        v = v if several else v.unsqueeze(-1)
        if lists.offsets is not None:
            found = apply(v)
        else:
            found = apply(v.movedim(lists.dim, -2).reshape(lists.rows, n, v.shape[-1]))
            found = found.reshape(*lists.leading, n, v.shape[-1]).movedim(-2, lists.dim)
        return found if several else found.squeeze(-1)


class Transposed(LeftFactor):
    """Pᵀ of a relaxed permutation P."""

    def __init__(self, permutation: RelaxedPermutation):
        self.T = permutation

    def __matmul__(self, u: Tensor) -> Tensor:
        """Pᵀ u: what each item gets of what stands at the places; of (1, …, n), the soft ranks. u as v in `P @ v`."""
        return self.T._applied(self.T._transposed_product, u)
