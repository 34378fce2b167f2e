"""From statistics and tiles to the arguments of the Triton kernels, as kernels/words.py numbers them. Imports triton."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .. import statistics as S
from ..kernels import words as W
from ..relation import Where
from .tile import Tile

_FUNCTIONS = {"softplus": W.SOFTPLUS, "sigmoid": W.SIGMOID, "hinge": W.HINGE, "squared_hinge": W.SQUARED_HINGE,
              "focal": W.FOCAL, "log_tanh": W.LOG_TANH, "log_atan": W.LOG_ATAN, "log_relu": W.LOG_RELU,
              "circle": W.CIRCLE}  # fmt: skip


def _score(s: S.Score) -> dict:
    at = s.at if s.columns is None else s.columns
    shared = int(s.columns is not None)
    return {"kind": W.SCORE, "count": s.width, "at": at.to(torch.int64).contiguous(), "shared": shared}


def _expectation(s: S.Expectation) -> dict:
    if s.values is None:
        function = W.OF_SCORE
    elif s.near is None:
        function = W.OF_OPERAND
    else:
        function = W.OF_DISTANCE if s.power == 1 else W.OF_SQUARE
    return {"kind": W.EXPECTATION, "function": function, "operand": s.values, "row": s.near, "factor": s.factor}


_FIELDS = {
    S.Score: _score,
    S.LogSumExp: lambda s: {"kind": W.LOGSUMEXP, "factor": s.factor},
    S.Sum: lambda s: {"kind": W.SUM, "operand": s.weights},
    S.Count: lambda s: {"kind": W.COUNT_SEEN, "operand": s.weights},
    S.SumOfSquares: lambda s: {"kind": W.SUM_OF_SQUARES},
    S.Moments: lambda s: {"kind": W.MOMENTS},
    S.Expectation: _expectation,
    S.SumOf: lambda s: {"kind": W.SUM_OF, "function": _FUNCTIONS[s.function], "row": s.row, "factor": s.factor,
                        "parameter": s.parameter},
    S.LogSumExpOf: lambda s: {"kind": W.LOGSUMEXP_OF, "function": _FUNCTIONS[s.function], "row": s.row,
                              "factor": s.factor, "parameter": s.parameter, "weight": s.weight},
    S.Extreme: lambda s: {"kind": W.EXTREME, "count": s.k, "factor": s.factor},
}  # fmt: skip


def _operand(tensor: Tensor | None) -> Tensor | None:
    """A class vector in fp32, or a matrix that is read where it lies, in any type whose rows are contiguous."""
    if tensor is None:
        return None
    if tensor.dim() == 1 or tensor.stride(1) != 1 or tensor.dtype == torch.float64:
        tensor = tensor.to(torch.float32).contiguous()
    if tensor.dim() == 2 and tensor.stride(0) == 1:
        # A number 1 in a tuple of arguments becomes a constant, which triton 3.6 cannot hand to another function.
        tensor = torch.cat([tensor, tensor], 1)[:, : tensor.shape[1]]
    return tensor


def describe(s: S.Statistic, state: Tensor, coefficient: Tensor | None = None) -> tuple[tuple, tuple]:
    """(spec, arguments) of a statistic as words.py numbers them. What is missing is stood in for by the state."""
    assert state.is_contiguous() and state.dtype == torch.float64
    given = _FIELDS[type(s)](s)
    where = getattr(s, "where", None) or Where()
    operand, row = _operand(given.get("operand")), given.get("row")
    form = W.NONE if operand is None else W.VECTOR if operand.dim() == 1 else W.MATRIX
    count = given.get("count", 1)
    labels = W.NONE if where.row_label is None else W.SAME if where.same else W.OTHER
    spec = (given["kind"].value, given.get("function", W.NONE).value, int(where.without is not None), form.value,
            int(row is not None), count, triton.next_power_of_2(count), given.get("shared", 0),
            labels.value, int(where.above is not None), int(where.below is not None))  # fmt: skip

    def held(tensor: Tensor | None, dtype: torch.dtype) -> Tensor:
        return state if tensor is None else tensor.to(dtype).contiguous()

    arguments = (
        *(state, held(where.without, torch.int64), state if operand is None else operand),
        operand.stride(0) if form == W.MATRIX else 0,
        *(held(row, torch.float32), given.get("at", state)),
        *(float(given.get("factor", 1.0)), float(given.get("parameter", 0.0))),
        *(held(coefficient, torch.float32), held(where.row_label, torch.int64), held(where.column_label, torch.int64)),
        *(held(where.above, torch.float32), held(where.below, torch.float32), float(given.get("weight", 1.0))),
    )
    return spec, arguments


def describe_all(stats, states, coefficients=None) -> tuple[tuple, tuple]:
    """(specs, arguments) of several statistics."""
    coefficients = [None] * len(stats) if coefficients is None else coefficients
    pairs = [describe(*each) for each in zip(stats, states, coefficients)]
    return tuple(spec for spec, _ in pairs), tuple(arguments for _, arguments in pairs)


def way_of(tile: Tile, stand_in: Tensor, transposed: bool = False) -> tuple[dict, tuple]:
    """How raw scores become scores: arguments, and the tuple `HOW`. A scale in memory is read by the device only."""
    vectors = (tile.bias, tile.class_scale, tile.class_shift)
    given = tuple(stand_in if v is None else v.to(torch.float32).contiguous() for v in vectors)
    if isinstance(tile.scale, Tensor):
        how, scale = W.MEMORY, tile.scale
    else:
        how, scale = W.NONE if tile.scale == 1 else W.NUMBER, float(tile.scale)
    flags = (*(int(v is not None) for v in vectors), int(tile.softcap != 0), how.value, int(transposed))
    return {"vectors": given, "softcap": float(tile.softcap), "scale": scale}, flags
