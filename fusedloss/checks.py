"""Argument checks: every error names the function, the argument, what was expected and what came."""

from __future__ import annotations

from math import inf

import torch
from torch import Tensor
from torch.autograd import forward_ad


def expect(condition: bool, function: str, argument: str, expected: str, got: object, error: type = ValueError) -> None:
    if not condition:
        shown = tuple(got.shape) if hasattr(got, "shape") else got
        raise error(f"{function}: {argument}: expected {expected}, got {shown}")


def visible(tensor: Tensor) -> bool:
    """Whether a check may look at the numbers: no device to wait for, no compiler or transformation at work."""
    traced = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return tensor.device.type == "cpu" and not traced


def expect_reverse_mode(function: str, **arguments: object) -> None:
    """No tangents of forward mode: torch.library's operators would drop them without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    for argument, value in arguments.items():
        real = isinstance(value, Tensor) and value.is_floating_point()
        dual = real and forward_ad.unpack_dual(value).tangent is not None
        expect(not dual, function, argument, "reverse-mode derivatives", "a forward-mode tangent", NotImplementedError)


def fixed(value: object) -> object:
    """The same number, known while torch.compile traces.

    The compiler makes an input of the graph of a number that has changed; what an op is told in its text must be
    known, and a set takes nothing else.
    """
    if isinstance(value, (int, float)):
        (value,) = {value}
    return value


def check_reduction(function: str, reduction: str) -> None:
    # torch raises ValueError with this wording; callers match on it.
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(
            f"{function}: reduction: {reduction} is not a valid value for reduction; expected none, mean or sum"
        )


def check_number(
    function: str, argument: str, value: object, low: float = -inf, high: float = inf, *, above: bool = False
) -> None:
    """A hyperparameter in [low, high], in (low, high] with `above`; the value of a 0-dimensional tensor is not read."""
    bounds = f"{'(' if above else '['}{low:g}, {high:g}]"
    if isinstance(value, Tensor):
        expect(value.dim() == 0, function, argument, f"a number in {bounds}, or a 0-dimensional tensor", value)
    else:
        number = isinstance(value, (int, float)) and value - value == 0  # neither infinite nor NaN
        inside = number and (low < value if above else low <= value) and value <= high
        expect(inside, function, argument, f"a number in {bounds}", value, ValueError if number else TypeError)


def check_integer(function: str, argument: str, value: object, low: int) -> None:
    """A whole number from `low`."""
    expect(isinstance(value, int), function, argument, f"an integer from {low}", value, TypeError)
    expect(value >= low, function, argument, f"an integer from {low}", value)


def check_constant(
    function: str, argument: str, value: object, low: float = -inf, high: float = inf, *, above: bool = False
) -> None:
    """A hyperparameter that no gradient flows into: a plain number within the bounds of `check_number`."""
    expect(not isinstance(value, Tensor), function, argument, "a number", value, TypeError)
    check_number(function, argument, value, low, high, above=above)
