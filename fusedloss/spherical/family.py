"""The losses whose layer need not see its classes, as the spherical layers use them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import expect
from ..losses import spherical_softmax_loss, spherical_z_loss, squared_error_loss, taylor_softmax_loss
from ..losses.centred import Centred
from ..nn import SphericalZLoss
from ..nn.loss import Loss

MEMBERS = (squared_error_loss, spherical_softmax_loss, taylor_softmax_loss, spherical_z_loss)
_COMMON = ("weight", "ignore_index", "reduction")


@dataclass(frozen=True)
class Member:
    """One of MEMBERS with its hyperparameters, all of them plain numbers."""

    name: str
    of: Callable[..., Centred]  # its file's `centred`
    rank: Callable[[Tensor], Tensor]
    options: tuple[tuple[str, float | bool], ...]

    def centred(self, hit: Tensor, mean: Tensor, squares: Tensor, count: int, share: Tensor) -> Centred:
        return self.of(hit, mean, squares, count, share, **dict(self.options))


def member(caller: str, loss: Loss) -> Member:
    """What the module of a spherical loss stands for; `weight`, `ignore_index` and `reduction` stay with the module."""
    module = sys.modules[loss.function.__module__] if isinstance(loss, Loss) else None
    words = [file.__name__.rpartition(".")[2].split("_") for file in MEMBERS]
    names = ", ".join("".join(map(str.capitalize, name)) for name in words)
    expect(module in MEMBERS, caller, "loss", f"one of fusedloss.nn's {names}", type(loss).__name__, TypeError)
    options = {name: getattr(loss, name) for name in loss.names if name not in _COMMON}
    for name, value in options.items():
        expect(isinstance(value, (int, float)), caller, name, "a number", value, TypeError)
    known = tuple(options.items())
    _try_out(loss.function, known)
    return Member(module.__name__.rpartition(".")[2], module.centred, module.rank, known)


def default_loss(classes: int) -> Loss:
    """The Z-loss with a b that tracks the number of classes: ζ of a row is at most √(n − 1)."""
    b = classes**0.5 / 5
    return SphericalZLoss(a=10 / b, b=b)


@functools.cache
def _try_out(function: Callable[..., Tensor], options: tuple[tuple[str, float | bool], ...]) -> None:
    """The loss checks its hyperparameters, and raises; once for each set of them, for it takes a millisecond."""
    function(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64), **dict(options))
