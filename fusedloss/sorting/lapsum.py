"""LapSum: soft top-k of an exact sum, soft ranks and a soft sort, from sums of Laplace distribution functions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import check_number, expect, expect_reverse_mode, visible
from ..lists import Lists, lists_of
from . import lapsum_ops as ops


def lapsum_top_k(
    values: Tensor,
    k: float | Tensor,
    alpha: float | Tensor = 1.0,
    *,
    largest: bool = True,
    dim: int = -1,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Soft top-k: p_i = Lap((x_i − b) / α) with the b at which Σ_i p_i = k.

    Lap(z) = e^z / 2 for z ≤ 0 and 1 − e^−z / 2 above, the distribution function of Laplace's law. p lies in [0, 1]; as
    α → 0 it becomes the indicator of the k largest values (equal ones share). k is real and may be learned.

    values: any shape, lists along `dim`; or (items,) with `offsets` (lists + 1,) int64, list r being the items from
    offsets[r] to offsets[r + 1]. mask: of the values' shape, bool; False: no item, its p is 0. k ≥ 0 and α > 0:
    numbers, or tensors that broadcast to one number per list (the values' shape without `dim`), with gradient. A list
    of fewer than k items has p = 1 throughout. largest: False for the smallest. float64, float32, and half precision
    computed in float32; p has the values' type. Of values at ±inf p is 1 or 0, without gradient, and the others share
    the rest of k, as far as it can be had; a NaN makes its list NaN. O(n) after the sort, forward and backward;
    derivatives of any order.

    Łukasz Struski, Michał B. Bednarczyk, Igor T. Podolak and Jacek Tabor, "LapSum - One Method to Differentiate Them
    All: Ranking, Sorting and Top-k Selection", 2025, arXiv 2503.06242. The official code selects by Lap((b − x_i) /
    α), the smallest; that is `largest=False`.
    """
    lists, x, alpha = _prepared("lapsum_top_k", values, alpha, dim, mask, offsets)
    expect_reverse_mode("lapsum_top_k", k=k)
    k = _per_list("lapsum_top_k", "k", k, lists, values.device, above=False)
    chosen, _ = ops.top_k(x, k, alpha, lists.mask, lists.offsets, largest)
    return lists.shaped(chosen).to(values.dtype)


def lapsum_rank(
    values: Tensor,
    alpha: float | Tensor = 1.0,
    *,
    descending: bool = False,
    dim: int = -1,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Soft ranks: r_i = 1 + Σ_{j ≠ i} Lap((x_i − x_j) / α), 1 for the smallest value.

    descending: 1 for the largest. As α → 0 the hard ranks (equal values share their mean rank), as α → ∞ (n + 1) / 2.
    Arguments as for `lapsum_top_k`. Ranks are float64 of float64 values, float32 of all others (float16 counts to
    2048 only); 0 where the mask leaves an item out. ±inf takes the rank at its end, without gradient; a NaN makes its
    list NaN. O(n) after the sort, forward and backward; derivatives of any order.

    Struski et al. 2025, arXiv 2503.06242. The official code counts from 0, its backward takes n² steps and fails where
    alpha is a number.
    """
    lists, x, alpha = _prepared("lapsum_rank", values, alpha, dim, mask, offsets)
    return lists.shaped(ops.rank(x, alpha, lists.mask, lists.offsets, descending)[0])


def lapsum_sort(
    values: Tensor,
    alpha: float | Tensor = 1.0,
    *,
    descending: bool = False,
    dim: int = -1,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Soft sort: b_t with Σ_i Lap((b_t − x_i) / α) = t − ½, t = 1 … n, rising; as α → 0 the sorted values.

    descending: falling. Arguments as for `lapsum_top_k`; the result has the values' shape and type. Under a mask of m
    items the first m places hold them, and 0 follows. ±inf stands at its end as it is, the finite values are sorted
    among themselves; a NaN makes its list NaN. O(n) after the sort, forward and backward; derivatives of any order.

    Struski et al. 2025, arXiv 2503.06242.
    """
    lists, x, alpha = _prepared("lapsum_sort", values, alpha, dim, mask, offsets)
    return lists.shaped(ops.sort(x, alpha, lists.mask, lists.offsets, descending)[0]).to(values.dtype)


def _prepared(name: str, values: Tensor, alpha, dim: int, mask, offsets) -> tuple[Lists, Tensor, Tensor]:
    lists = lists_of(name, values, dim, mask, offsets)
    expect(values.is_floating_point(), name, "values", "a floating-point tensor", values.dtype, TypeError)
    expect_reverse_mode(name, values=values, alpha=alpha)
    flat = lists.flat(values)
    x = flat if flat.dtype in (torch.float32, torch.float64) else flat.float()
    return lists, x, _per_list(name, "alpha", alpha, lists, values.device, above=True)


def _per_list(name: str, argument: str, value: float | Tensor, lists: Lists, device: torch.device, above: bool):
    """One float64 per list, ≥ 0 or, `above`, > 0."""
    if not isinstance(value, Tensor):
        check_number(name, argument, value, 0, above=above)
        if torch.compiler.is_compiling():  # a sum of a tensor and a number: the compiler lets the number change
            return torch.zeros(lists.rows, dtype=torch.float64, device=device) + value
        return torch.full((lists.rows,), value, dtype=torch.float64, device=device)
    expect(value.device in (device, torch.device("cpu")), name, argument, f"on {device}", value.device)
    fits = value.dim() <= len(lists.leading) and all(
        given == 1 or given == wanted for given, wanted in zip(value.shape[::-1], lists.leading[::-1])
    )
    expect(fits, name, argument, f"a number, or a tensor that broadcasts to {tuple(lists.leading)}", value)
    expect(not value.is_complex(), name, argument, "real numbers", value.dtype, TypeError)
    if visible(value):
        inside = (value > 0) if above else (value >= 0)
        expected = "numbers above 0" if above else "numbers of 0 or more"
        expect(bool(inside.all()), name, argument, expected, value.tolist())
    return value.to(device, torch.float64).expand(lists.leading).reshape(lists.rows)
