"""Lists of items: rows along one dimension, of which a mask says what counts, or of any lengths one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor

from .checks import expect, visible


@dataclass(frozen=True, eq=False)
class Lists:
    """How lists lie in a caller's tensors, and sums over them that autograd knows.

    Flat values are what kernels take: (rows, width) contiguous; with offsets (items,), list r being the items from
    offsets[r] to offsets[r + 1]. What has one number per list is (rows,).
    """

    shape: torch.Size  # of the caller's values
    dim: int
    mask: Tensor | None = None  # (rows, width), or (items,) with offsets; bool, False: left out
    offsets: Tensor | None = None  # (rows + 1,) int64

    @property
    def rows(self) -> int:
        # Not len(), not numel(): where a fake runs or torch.export traces, they would fix the size.
        return self.offsets.shape[0] - 1 if self.offsets is not None else prod(self.leading)

    @property
    def leading(self) -> torch.Size:
        """The shape of what has one number per list."""
        if self.offsets is not None:
            return torch.Size((self.rows,))
        return self.shape[: self.dim] + self.shape[self.dim + 1 :]

    @property
    def _is_flat(self) -> bool:
        """Whether the caller's values lie as kernels take them: nothing to do, and small inputs are common."""
        return self.offsets is not None or (len(self.shape) == 2 and self.dim == 1)

    def flat(self, values: Tensor) -> Tensor:
        """The caller's values as kernels take them."""
        if self._is_flat:
            return values.contiguous()
        return values.movedim(self.dim, -1).reshape(self.rows, self.shape[self.dim]).contiguous()

    def clean(self, values: Tensor) -> Tensor:
        """The same, 0 where the mask leaves an item out: NaN does not come in."""
        flat = self.flat(values)
        return flat if self.mask is None else torch.where(self.mask, flat, flat.new_zeros(()))

    def shaped(self, flat: Tensor) -> Tensor:
        """Flat values as the caller has them; of any last dimensions beyond the items."""
        if self._is_flat:
            return flat
        return flat.reshape(*self.leading, self.shape[self.dim]).movedim(-1, self.dim)

    # --- sums over each list, (rows,), of flat values -----------------------------------------------------------------

    @property
    def row(self) -> Tensor:
        """With offsets: the list of each item."""
        # Kept, but not by functools.cached_property, whose lock torch.compile cannot trace through.
        kept = None if torch.compiler.is_compiling() else self.__dict__.get("_row")
        if kept is None:
            kept = torch.repeat_interleave(self.offsets.diff(), output_size=self.shape[0])
            if not torch.compiler.is_compiling():
                self.__dict__["_row"] = kept
        return kept

    def spread(self, numbers: Tensor) -> Tensor:
        """One number per list (rows,) at each of its items; by broadcasting where there are no offsets."""
        return numbers.unsqueeze(1) if self.offsets is None else numbers.index_select(0, self.row)

    def sum(self, values: Tensor) -> Tensor:
        if self.mask is not None:
            values = torch.where(self.mask, values, values.new_zeros(()))
        if self.offsets is None:
            return values.sum(1)
        return values.new_zeros(self.rows).index_add(0, self.row, values)

    def max(self, values: Tensor) -> Tensor:
        """The largest item of each list, of which no gradient is made; −inf of none."""
        values = values.detach()
        if self.mask is not None:
            values = torch.where(self.mask, values, -torch.inf)
        if self.offsets is None:
            return values.max(1).values if values.shape[1] else values.new_full((self.rows,), -torch.inf)
        return values.new_full((self.rows,), -torch.inf).scatter_reduce(0, self.row, values, "amax")

    def count(self, like: Tensor) -> Tensor:
        """How many items each list has, in the type and on the device of `like`."""
        if self.mask is not None:
            return self.sum(self.mask.to(like.dtype))
        if self.offsets is not None:
            return self.offsets.diff().to(like.dtype)
        return like.new_full((self.rows,), self.shape[self.dim])

    def logsumexp(self, values: Tensor) -> Tensor:
        """log Σ e^v of each list; −inf of none."""
        top = self.max(values)
        top = torch.where(top.isfinite(), top, 0.0)
        return self.sum((values - self.spread(top)).exp()).log() + top

    def softmax(self, values: Tensor) -> Tensor:
        """The softmax over each list, 0 where the mask leaves an item out."""
        logs = values - self.spread(self.logsumexp(values))
        # Before exp: the 0 of padding may lie so far above the list that it overflows; 0 · inf is a gradient of NaN.
        return (logs if self.mask is None else torch.where(self.mask, logs, -torch.inf)).exp()


def lists_of(
    name: str,
    values: Tensor,
    dim: int = -1,
    mask: Tensor | None = None,
    offsets: Tensor | None = None,
    argument: str = "values",
) -> Lists:
    """Checks how a caller of `name` lays out his lists."""
    expect(isinstance(values, Tensor), name, argument, "a tensor", type(values).__name__, TypeError)
    expect(values.dim() >= 1, name, argument, "at least one dimension", values)
    expect(values.layout == torch.strided, name, argument, "a strided tensor", values.layout, TypeError)
    expect(isinstance(dim, (int, torch.SymInt)), name, "dim", "an integer", dim, TypeError)
    expect(-values.dim() <= dim < values.dim(), name, "dim", f"a dimension of {tuple(values.shape)}", dim, IndexError)
    if mask is not None:
        expect(isinstance(mask, Tensor), name, "mask", "a tensor", type(mask).__name__, TypeError)
        expect(mask.dtype == torch.bool, name, "mask", "torch.bool", mask.dtype, TypeError)
        expect(mask.shape == values.shape, name, "mask", f"shape {tuple(values.shape)}", mask)
        expect(mask.device == values.device, name, "mask", f"on {values.device}", mask.device)
    if offsets is not None:
        expect(isinstance(offsets, Tensor), name, "offsets", "a tensor", type(offsets).__name__, TypeError)
        expect(values.dim() == 1, name, argument, "one dimension with offsets", values)
        right = offsets.dim() == 1 and len(offsets) >= 1 and offsets.dtype in (torch.int64, torch.int32)
        expect(right, name, "offsets", "int64 (lists + 1,)", f"{offsets.dtype} {tuple(offsets.shape)}")
        expect(offsets.device == values.device, name, "offsets", f"on {values.device}", offsets.device)
        offsets = offsets.long().contiguous()
        if visible(offsets):
            whole = offsets[0] == 0 and offsets[-1] == len(values) and bool((offsets[1:] >= offsets[:-1]).all())
            expect(whole, name, "offsets", f"rising from 0 to {len(values)}", offsets[:8].tolist())
    lists = Lists(values.shape, dim % values.dim(), None, offsets)
    return lists if mask is None else Lists(lists.shape, lists.dim, lists.flat(mask), offsets)
