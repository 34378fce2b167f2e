"""Soft sort and soft rank: differentiable in the values, and in the strength of the regularization."""

from __future__ import annotations

import torch
from torch import Tensor

from ..backends.native import ALL_DTYPES
from ..checks import check_number, expect, visible
from ..lists import Lists, lists_of
from .projection import OPERATORS

REGULARIZATIONS = ("l2", "kl")


def soft_rank(
    values: Tensor,
    regularization: str = "l2",
    regularization_strength: float | Tensor = 1.0,
    *,
    dim: int = -1,
    descending: bool = False,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Soft ranks: of each list the point of the permutahedron of (n, …, 1) nearest to values / ε.

    Rank 1 is the smallest value's, or with `descending` the largest's (then read −values below). ε, the
    regularization_strength, is in the units of the values (docs/sorting.md says how to choose it): with l2 neighbours
    whose gap is at most ε are pooled. ε = 0 gives the hard ranks (equal values share their mean rank, no gradient),
    ε → ∞ the mean rank for all.

    "l2": r = argmin ‖r − values / ε‖² over the permutahedron; in a block B of pooled items r_i = mean_B(ranks) +
    (values_i − mean_B(values)) / ε. "kl": the projection in log space, r_i = softmax_B(values / ε)_i Σ_B ranks.

    values: any shape, lists along `dim`; or (items,) with `offsets` (lists + 1,) int64, list r being the items from
    offsets[r] to offsets[r + 1]. mask: of the values' shape, bool; False: no item, its rank is 0.
    regularization_strength: a finite number ≥ 0, or a tensor that broadcasts to one per list (the values' shape
    without `dim`, or (lists,)), in which there is a gradient too. float64, float32, bfloat16, float16; integers are
    converted to torch's default type. Returns ranks in the values' shape, float64 of float64 and float32 of all else
    (float16 counts to 2048 only). ±inf takes the rank at its end and has no gradient; a NaN makes its list NaN.
    Forward O(n log n), backward O(n); derivatives of any order, in reverse mode.

    Errors: ValueError, TypeError or IndexError, naming the argument. Strengths that are negative or NaN in a tensor
    that cannot be looked at (on a device, under torch.compile or torch.func) make their lists NaN instead.

    Mathieu Blondel, Olivier Teboul, Quentin Berthet and Josip Djolonga, "Fast Differentiable Sorting and Ranking",
    ICML 2020, arXiv 2002.08871. The first three arguments are torchsort's, with the same meaning. As in the authors'
    code and torchsort, the projection in log space is exponentiated for ranks and is not for `soft_sort`.
    """
    return _project("soft_rank", values, regularization, regularization_strength, dim, descending, mask, offsets)


def soft_sort(
    values: Tensor,
    regularization: str = "l2",
    regularization_strength: float | Tensor = 1.0,
    *,
    dim: int = -1,
    descending: bool = False,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
) -> Tensor:
    """Soft sort: of each list the point of the permutahedron of its values nearest to (n, …, 1) / ε, rising.

    With l2 sorted neighbours whose gap is at least 1 / ε are pooled; ε = 0 gives the hard sort, ε → ∞ the mean for
    all.

    "l2": in a block B of sorted values s: y_i = mean_B(s) + (i − mean_B(i)) / ε, so a block alone is the value itself.
    "kl", descending: y_i = LSE_B(s) + w_i − LSE_B(w), w = (n, …, 1) / ε, LSE = log Σ exp; rising: −y of −values.

    Arguments and errors as for `soft_rank`. Returns the values' shape and type, lists sorted along `dim` in rising
    order, or in falling order with `descending`. Under a mask of m items the first m places hold them, and 0 follows.
    ±inf stands at its end as it is, the finite values are sorted among themselves; a NaN makes its list NaN. Forward
    O(n log n), backward O(n); derivatives of any order, in reverse mode.

    Mathieu Blondel, Olivier Teboul, Quentin Berthet and Josip Djolonga, "Fast Differentiable Sorting and Ranking",
    ICML 2020, arXiv 2002.08871.
    """
    return _project("soft_sort", values, regularization, regularization_strength, dim, descending, mask, offsets)


def _project(name, values, regularization, strength, dim, descending, mask, offsets) -> Tensor:
    if mask is None and offsets is None and type(strength) is float and not torch.compiler.is_compiling():
        # Nothing to check and nothing to move: small inputs are common.
        plain = isinstance(values, Tensor) and values.dim() == 2 and values.dtype in ALL_DTYPES
        if plain and dim in (-1, 1) and 0 <= strength < torch.inf and regularization in REGULARIZATIONS:
            kl = regularization == "kl"
            return OPERATORS[name](values.contiguous(), None, None, None, strength, kl, bool(descending))[0]
    lists = lists_of(name, values, dim, mask, offsets)
    if not values.is_floating_point() and not values.is_complex():
        values = values.to(torch.get_default_dtype())
    supported = "float64, float32, bfloat16, float16 or integers"
    expect(values.dtype in ALL_DTYPES, name, "values", supported, values.dtype, TypeError)
    return lists.shaped(on_lists(name, lists, lists.flat(values), regularization, strength, descending))


def on_lists(
    name: str,
    lists: Lists,
    values: Tensor,
    regularization: str = "l2",
    strength: float | Tensor = 1.0,
    descending: bool = False,
) -> Tensor:
    """The same of flat values; `name` is "soft_rank" or "soft_sort"."""
    expect(regularization in REGULARIZATIONS, name, "regularization", "'l2' or 'kl'", regularization)
    strengths = None
    if not isinstance(strength, Tensor):
        check_number(name, "regularization_strength", strength, 0)
        if torch.compiler.is_compiling():  # a sum of a tensor and a number: the compiler lets the number change
            strength = torch.zeros((), dtype=torch.float64, device=values.device) + strength
    if isinstance(strength, Tensor):
        strengths, strength = _strengths(name, lists, values, strength), 0.0
    call = strengths, lists.mask, lists.offsets, float(strength), regularization == "kl", bool(descending)
    return OPERATORS[name](values, *call)[0]


def _strengths(name: str, lists: Lists, values: Tensor, strength: Tensor) -> Tensor:
    """One float64 per list."""
    what = "regularization_strength"
    expect(strength.device in (values.device, torch.device("cpu")), name, what, f"on {values.device}", strength.device)
    expect(not strength.is_complex(), name, what, "real numbers", strength.dtype, TypeError)
    fits = strength.dim() <= len(lists.leading) and all(
        given == 1 or given == wanted for given, wanted in zip(strength.shape[::-1], lists.leading[::-1])
    )
    expect(fits, name, what, f"a number, or a tensor that broadcasts to {tuple(lists.leading)}", strength)
    if visible(strength):
        inside = (strength >= 0) & (strength < torch.inf)
        expect(bool(inside.all()), name, what, "numbers in [0, inf)", strength.tolist())
    return strength.to(values.device, torch.float64).expand(lists.leading).reshape(lists.rows)
