"""What the backends with compiled kernels share: the extension, and a tile and its statistics as it takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import statistics as S
from ..relation import MATRIX, Where
from .tile import Exponentials, Sums, Tile

try:
    from .. import _native

    load_error = None
except ImportError as error:  # kept, and shown by `info()`
    _native, load_error = None, f"the compiled extension did not load: {error!r}"

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
ALL_DTYPES = {**DTYPES, torch.float64: 3}  # what kernels on lists take


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if t is None else t.contiguous() for t in tensors]


def native_lists(x: Tensor, offsets: Tensor | None, mask: Tensor | None = None) -> tuple[int, int, int, int]:
    """What the fl_lists of csrc/lists.h is made of, for flat values; of lists by offsets the width is not looked up."""
    rows, width = x.shape[:2] if offsets is None else (offsets.shape[0] - 1, 0)
    return rows, width, address(offsets), address(mask)


def native_tile(tile: Tile):
    in_memory = isinstance(tile.scale, Tensor)  # for a device to read
    assert not in_memory or tile.scale.dtype == torch.float32
    return _native.Tile(
        data=tile.data.data_ptr(),
        rows=tile.data.shape[0],
        columns=tile.data.shape[1],
        stride=tile.data.stride(0),
        dtype=DTYPES[tile.data.dtype],
        first_column=tile.first,
        first_row=tile.first_row,
        softcap=tile.softcap,
        scale=1.0 if in_memory else tile.scale,
        scale_pointer=address(tile.scale if in_memory else None),
        bias=address(tile.bias),
        class_scale=address(tile.class_scale),
        class_shift=address(tile.class_shift),
    )


def native_sums(sums: Sums):
    fields = ("bias", "class_shift", "class_scale", "scale", "largest")
    asked = {field: address(getattr(sums, field)) for field in fields}
    return _native.Sums(**asked) if any(asked.values()) else None


def compiled(stats: Sequence[S.Statistic]) -> bool:
    """Whether the extension has kernels for these as statistics of rows."""
    return all(type(s) in _FIELDS for s in stats)


def compiled_across(stats: Sequence[S.Statistic]) -> bool:
    """Whether it has kernels for these as statistics of columns: not where a matrix would be read across its rows."""
    return compiled(stats) and not any(role == MATRIX for s in stats for _, role, _ in s.tensors())


class Arguments:
    """One statistic for the extension, and the tensors that must outlive the call."""

    def __init__(
        self,
        statistic: S.Statistic,
        state: Tensor,
        coefficient: Tensor | None = None,
        kept: Exponentials | None = None,
    ):
        self.held: list[Tensor] = []
        self.device = state.device
        fields = _FIELDS[type(statistic)](self, statistic) | self.where(getattr(statistic, "where", None))
        if kept is not None and isinstance(statistic, S.LogSumExp):
            data, shift = kept.data, kept.shift
            assert shift.dtype == torch.float32 and shift.is_contiguous()
            fields |= {"keep": data.data_ptr(), "keep_stride": data.stride(0), "keep_dtype": DTYPES[data.dtype]}
            fields |= {"keep_block": kept.block, "keep_shift": shift.data_ptr()}
        if coefficient is not None:
            fields["coefficient"] = self.hold(coefficient, torch.float32)
        assert state.is_contiguous()
        self.native = _native.Statistic(state=state.data_ptr(), **fields)

    def hold(self, tensor: Tensor | None, dtype: torch.dtype | None = None) -> int:
        if tensor is None:
            return 0
        self.held.append(tensor.to(self.device, dtype or tensor.dtype).contiguous())
        return self.held[-1].data_ptr()

    def where(self, where: Where | None) -> dict:
        if where is None:
            return {}
        flags = {
            _native.REST: where.without,
            _native.SAME if where.same else _native.OTHER: where.row_label,
            _native.ABOVE: where.above,
            _native.BELOW: where.below,
        }
        return {
            "where": sum(flag for flag, tensor in flags.items() if tensor is not None),
            "rest": self.hold(where.without, torch.int64),
            "row_label": self.hold(where.row_label, torch.int64),
            "column_label": self.hold(where.column_label, torch.int64),
            "above": self.hold(where.above, torch.float32),
            "below": self.hold(where.below, torch.float32),
        }

    def operand(self, tensor: Tensor | None) -> dict:
        """A class vector, or a matrix that is read where it lies."""
        if tensor is None:
            return {}
        if tensor.dim() == 2 and tensor.dtype in DTYPES and tensor.stride(1) == 1 and tensor.device == self.device:
            self.held.append(tensor)
            return {
                "operand": tensor.data_ptr(),
                "operand_stride": tensor.stride(0),
                "operand_dtype": DTYPES[tensor.dtype],
            }
        stride = tensor.shape[1] if tensor.dim() == 2 else 0
        return {"operand": self.hold(tensor, torch.float32), "operand_stride": stride}

    def score(self, s: S.Score) -> dict:
        shared = s.columns is not None
        at = s.columns if shared else s.at
        return {
            "kind": _native.SCORE,
            "count": s.width,
            "at": self.hold(at, torch.int64),
            "at_stride": 0 if shared else s.width,
        }

    def expectation(self, s: S.Expectation) -> dict:
        if s.values is None:
            function = _native.V_SCORE
        elif s.near is None:
            function = _native.V_OPERAND
        else:
            function = _native.V_ABSOLUTE if s.power == 1 else _native.V_SQUARE
        row = self.hold(s.near, torch.float32)
        return {
            "kind": _native.EXPECTATION,
            "function": function,
            "factor": s.factor,
            "row": row,
            **self.operand(s.values),
        }

    def sum_of(self, s: S.SumOf) -> dict:
        function = getattr(_native, f"F_{s.function.upper()}")
        row = self.hold(s.row, torch.float32)
        return {"kind": _native.SUM_OF, "function": function, "factor": s.factor, "parameter": s.parameter, "row": row}

    def logsumexp_of(self, s: S.LogSumExpOf) -> dict:
        return {
            "kind": _native.LOGSUMEXP_OF,
            "function": getattr(_native, f"G_{s.function.upper()}"),
            "factor": s.factor,
            "weight": s.weight,
            "parameter": s.parameter,
            "row": self.hold(s.row, torch.float32),
        }


_FIELDS = {
    S.Score: Arguments.score,
    S.LogSumExp: lambda self, s: {"kind": _native.LOGSUMEXP, "factor": s.factor},
    S.LogSumExpOf: Arguments.logsumexp_of,
    S.Sum: lambda self, s: {"kind": _native.SUM, **self.operand(s.weights)},
    S.Count: lambda self, s: {"kind": _native.COUNT, **self.operand(s.weights)},
    S.SumOfSquares: lambda self, s: {"kind": _native.SUM_OF_SQUARES},
    S.Moments: lambda self, s: {"kind": _native.MOMENTS},
    S.Expectation: Arguments.expectation,
    S.SumOf: Arguments.sum_of,
    S.Extreme: lambda self, s: {"kind": _native.EXTREME, "count": s.k, "factor": s.factor},
}


def arguments(
    stats: Sequence[S.Statistic],
    states: Sequence[Tensor],
    coefficients: Sequence[Tensor] | None = None,
    kept: Exponentials | None = None,
) -> list[Arguments]:
    """A pass over a tile; `coefficients` make it the gradient's."""
    given = []
    for number, (statistic, state) in enumerate(zip(stats, states)):
        coefficient = None if coefficients is None else coefficients[number]
        if coefficient is not None and isinstance(statistic, S.Moments):
            coefficient = coefficient[:, 1:]  # the count has no derivative
        given.append(Arguments(statistic, state, coefficient, kept))
    return given
