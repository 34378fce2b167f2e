"""The output layer and its cross-entropy in one module."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import expect
from ..losses.linear_cross_entropy import linear_cross_entropy


class LinearCrossEntropyLoss(torch.nn.Module):
    """Drop-in for `torch.nn.LinearCrossEntropyLoss`: owns the layer, and its state dict has the same keys.

    `fusedloss.linear_cross_entropy` of ``self.linear``'s scores. Arguments as torch's; then those of the function
    (z_loss, softcap, temperature, memory_budget, schedule, gradient_filter, backend, scale).
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: object = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
        temperature: float = 1.0,
        **walk: object,
    ):
        super().__init__()
        right = weight is None or weight.shape == (num_classes,)
        expect(right, type(self).__name__, "weight", f"shape ({num_classes},)", weight)
        self.num_classes, self.out_features = num_classes, tuple(out_features)
        self.linear = torch.nn.Linear(in_features, math.prod(out_features, start=num_classes), bias, device, dtype)
        self.register_buffer("weight", weight)
        self.reduction, self.ignore_index, self.label_smoothing = reduction, ignore_index, label_smoothing
        self.options = options
        self.more = dict(z_loss=z_loss, softcap=softcap, temperature=temperature, **walk)

    def forward(self, input: Tensor, target: Tensor, *, row_weight: Tensor | None = None) -> Tensor:
        shape = (self.num_classes, *self.out_features)
        return linear_cross_entropy(
            input,
            self.linear.weight.reshape(*shape, self.linear.in_features),
            target,
            linear_bias=None if self.linear.bias is None else self.linear.bias.reshape(shape),
            weight=self.weight,
            reduction=self.reduction,
            ignore_index=self.ignore_index,
            label_smoothing=self.label_smoothing,
            options=self.options,
            row_weight=row_weight,
            **self.more,
        )

    def extra_repr(self) -> str:
        shown = f"num_classes={self.num_classes}, out_features={self.out_features}, reduction={self.reduction!r}, "
        shown += f"ignore_index={self.ignore_index}, label_smoothing={self.label_smoothing}"
        unset = {"z_loss": 0.0, "softcap": None, "temperature": 1.0}
        changed = [f", {k}={v!r}" for k, v in self.more.items() if k not in unset or unset[k] != v]
        return shown + "".join(changed)
