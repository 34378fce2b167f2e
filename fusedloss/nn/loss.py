"""What the modules of all losses have in common."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import torch
from torch import Tensor

from ..scores import Scores


class Loss(torch.nn.Module):
    """Base of the modules: a subclass names its function, ``class FocalLoss(Loss, of=focal_loss)``, and takes after it.

    Constructor: the function's parameters after scores and target, in the same order, row_weight left out. Numbers stay
    as they are; tensors become buffers, and `torch.nn.Parameter`s parameters of the module.
    """

    function: Callable[..., Tensor]

    def __init_subclass__(cls, of: Callable[..., Tensor] | None = None, **more: object):
        super().__init_subclass__(**more)
        if of is None:
            return
        kept = [p for p in list(inspect.signature(of).parameters.values())[2:] if p.name != "row_weight"]
        cls.function = staticmethod(of)
        cls.__signature__ = inspect.Signature(kept)
        call = "forward(scores, target, *, row_weight=None)"
        cls.__doc__ = f"`fusedloss.{of.__name__}` as a module: {call}.\n\n{inspect.getdoc(of)}"

    def __init__(self, *arguments: object, **options: object):
        super().__init__()
        try:
            given = self.__signature__.bind(*arguments, **options)
        except TypeError as wrong:
            raise TypeError(f"{type(self).__name__}: {wrong}") from None
        given.apply_defaults()
        self.names = tuple(given.arguments)
        for name, value in given.arguments.items():
            if isinstance(value, Tensor) and not isinstance(value, torch.nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, scores: Tensor | Scores, target: Tensor, *, row_weight: Tensor | None = None) -> Tensor:
        options = {name: getattr(self, name) for name in self.names}
        return self.function(scores, target, row_weight=row_weight, **options)

    def extra_repr(self) -> str:
        """The parameters that differ from their defaults, as a call would give them."""
        shown = []
        for name in self.names:
            value, default = getattr(self, name), self.__signature__.parameters[name].default
            if isinstance(value, Tensor):
                shown.append(f"{name}=tensor(shape={tuple(value.shape)})")
            elif value is not default and value != default:
                shown.append(f"{name}={value!r}")
        return ", ".join(shown)
