"""The statistics: what they are is in `base`."""

from ..relation import WHERE_FIELDS, Where
from .base import Statistic
from .columns import Columns, split
from .exponentials import LOG_FUNCTIONS, Expectation, LogSumExp, LogSumExpOf
from .extremes import Extreme, Max, Min, TopK
from .sums import FUNCTIONS, Count, Moments, Score, Sum, SumOf, SumOfSquares

KINDS = {
    kind.__name__: kind
    for kind in (Score, LogSumExp, LogSumExpOf, Sum, Count, SumOfSquares, Moments, Expectation, SumOf, Extreme)
}


def build(static: tuple, tensors: list) -> Statistic:
    """Inverse of `Statistic.static` and `Statistic.tensors`; takes its tensors off the front of the list."""
    name, options, carried = static
    values = dict(options)
    if name == "Columns":
        return Columns(build(values["statistic"], tensors))
    values |= {field: tensors.pop(0) for field, _ in carried}
    inside = {f: values.pop(f"where.{f}") for f in WHERE_FIELDS if f"where.{f}" in values}
    return KINDS[name](**values, **({"where": Where(**inside)} if inside else {}))
