"""A linear output layer with a dense weight and a spherical loss."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..checks import expect
from ..nn.loss import Loss
from .dense import loss_of
from .family import default_loss, member
from .gram import Gram


class Linear(torch.nn.Module):
    """`loss(h @ weight.T + bias, target)` without the scores; weight and bias are Parameters, for any optimizer.

    Constructor: in_features d, out_features n ≥ 2; ``loss``, a `fusedloss.nn` module of the spherical family, which
    keeps class weights, ignore_index and reduction (default: SphericalZLoss with b = √n / 5, a = 10 / b); bias, device,
    dtype and the values at the start as of `torch.nn.Linear`. Call: ``head(h, target, row_weight=None)``, as
    `fusedloss.spherical.linear_loss`.

    Every call passes over the weight once, to make its Gram matrix. Micro-batches that share a weight can share that::

        with head.frozen_weight():
            for h, target in micro_batches:
                head(h, target).backward()
        optimizer.step()
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        loss: Loss | None = None,
        *,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        expect(out_features >= 2, "Linear", "out_features", "at least two classes", out_features)
        layer = torch.nn.Linear(in_features, out_features, bias, device, dtype)
        self.in_features, self.out_features = in_features, out_features
        self.weight, self.bias = layer.weight, layer.bias
        self.loss = default_loss(out_features) if loss is None else loss
        member("Linear", self.loss)
        self._frozen: _Frozen | None = None

    def forward(self, h: Tensor, target: Tensor, row_weight: Tensor | None = None) -> Tensor:
        gram = None if self._frozen is None else self._frozen.gram_of(self.weight, self.bias)
        return loss_of("Linear", h, self.weight, target, self.loss, self.bias, row_weight, gram)

    @contextmanager
    def frozen_weight(self) -> Iterator[None]:
        """Inside the block the weight is not to change: the first call makes its Gram matrix, the others use that.

        Each backward still makes its own gradient of the weight. Leaving drops the matrix, also by an exception; of
        nested blocks, leaving the outermost. A call that finds the weight changed raises RuntimeError, as far as
        PyTorch counts changes: those through `.data` and of some fused optimizers it does not count.
        """
        outer, self._frozen = self._frozen, self._frozen or _Frozen()
        try:
            yield
        finally:
            self._frozen = outer

    def __getstate__(self) -> dict[str, object]:
        """Copies are not frozen: nothing would thaw them."""
        return {**self.__dict__, "_frozen": None}

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class _Frozen:
    """The Gram matrix of a weight, and what shows that the weight is still that one."""

    def __init__(self) -> None:
        self.gram: Gram | None = None
        self.stamp: tuple = ()

    def gram_of(self, weight: Tensor, bias: Tensor | None) -> Gram:
        there = [x for x in (weight, bias) if x is not None]
        stamp = tuple((x.data_ptr(), x.shape, 0 if x.is_inference() else x._version) for x in there)
        if self.gram is None:
            self.gram, self.stamp = Gram.of(weight, bias), stamp
        if stamp != self.stamp:
            raise RuntimeError(
                "Linear: weight: expected no change inside frozen_weight(), got a changed weight or bias"
            )
        return self.gram
