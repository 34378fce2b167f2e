"""Relations: which columns a statistic looks at, computed from O(N) + O(M) numbers inside the tile, never a dense mask."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import ClassVar

import torch
from torch import Tensor

# How a tensor that a statistic carries is cut when a walk looks at some rows and some columns only.
ROWS, CLASSES, MATRIX, IDS = "rows", "classes", "matrix", "ids"


@dataclass(frozen=True, eq=False)
class Where:
    """The columns j of row i for which all of these hold; what is None is no condition. Made by `Rest`, `Same`, `Other`.

    j is not ``without``_i ((N,) int64, negative for none); the integer labels ``row_label``_i and ``column_label``_j are
    equal (``same``) or different; the score itself is > ``above``_i and < ``below``_i ((N,) thresholds; constants: no
    gradient flows into them).
    """

    without: Tensor | None = None
    row_label: Tensor | None = None
    column_label: Tensor | None = None
    same: bool = True
    above: Tensor | None = None
    below: Tensor | None = None

    roles: ClassVar[dict[str, str]] = {
        "without": ROWS,
        "row_label": ROWS,
        "column_label": CLASSES,
        "above": ROWS,
        "below": ROWS,
    }

    def hide(self, z: Tensor, first: int) -> Tensor:
        """Scores (n, m) of the columns ``first`` … ``first + m - 1``, -inf where this relation does not hold."""
        hidden = []
        if self.without is not None:
            columns = torch.arange(first, first + z.shape[-1], device=z.device)
            hidden.append(columns == self.without.unsqueeze(-1))
        if self.row_label is not None:
            equal = self.row_label.unsqueeze(-1) == self.column_label
            hidden.append(~equal if self.same else equal)
        # So written, NaN is not hidden.
        if self.above is not None:
            hidden.append(z <= self.above.to(z.dtype).unsqueeze(-1))
        if self.below is not None:
            hidden.append(z >= self.below.to(z.dtype).unsqueeze(-1))
        for condition in hidden:
            z = z.masked_fill(condition, -torch.inf)
        return z

    def tensors(self) -> list[tuple[str, str, Tensor]]:
        """(field, role, tensor) of every tensor carried."""
        return [(name, role, getattr(self, name)) for name, role in self.roles.items() if getattr(self, name) is not None]

    def with_tensors(self, tensors: dict[str, Tensor]) -> Where:
        return replace(self, **tensors)


def Rest(column: Tensor) -> Where:
    """Every column but one per row: ``column`` (N,) int64, the class left out (the target, as a rule)."""
    return Where(without=column)


def Same(
    row_label: Tensor,
    column_label: Tensor,
    *,
    without: Tensor | None = None,
    above: Tensor | None = None,
    below: Tensor | None = None,
) -> Where:
    """The columns whose integer label equals the row's, but column ``without``, of scores between the thresholds."""
    return Where(without, row_label, column_label, True, above, below)


def Other(
    row_label: Tensor,
    column_label: Tensor,
    *,
    without: Tensor | None = None,
    above: Tensor | None = None,
    below: Tensor | None = None,
) -> Where:
    """The columns whose integer label is not the row's, but column ``without``, of scores between the thresholds."""
    return Where(without, row_label, column_label, False, above, below)


WHERE_FIELDS = frozenset(f.name for f in fields(Where))
