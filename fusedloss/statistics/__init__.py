"""The statistics: what they are is in `base`."""

from ..relation import Rest
from .base import Statistic
from .exponentials import Expectation, LogSumExp
from .extremes import Extreme, Max, Min, TopK
from .sums import FUNCTIONS, Count, Moments, Score, Sum, SumOf, SumOfSquares

KINDS = {
    kind.__name__: kind for kind in (Score, LogSumExp, Sum, Count, SumOfSquares, Moments, Expectation, SumOf, Extreme)
}


def build(static: tuple, tensors: list) -> Statistic:
    """Inverse of `Statistic.static` and `Statistic.tensors`; takes its tensors off the front of the list."""
    name, options, carried = static
    values = dict(options)
    for field, _ in carried:
        tensor = tensors.pop(0)
        values[field] = Rest(tensor) if field == "where" else tensor
    return KINDS[name](**values)
