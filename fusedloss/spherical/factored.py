"""`FactoredLinear`: an output layer with a spherical loss, trained at a cost that does not grow with its classes."""

from __future__ import annotations

from collections.abc import Callable
from math import isfinite

import torch
from torch import Tensor

from .. import nn
from ..checks import check_constant, expect
from . import evaluation, preconditioned, ranks
from . import momentum as moving
from .engines import engine
from .exact import exact
from .factors import ill
from .family import default_loss, member
from .gradients import Losses
from .rows import ScoreShape, weighted
from .steps import Batch, squared_norm
from .weight import NAME, FactoredWeight


class FactoredLinear(FactoredWeight):
    """A linear layer to n classes with its loss: loss = head(h, target), loss.backward(), head.step(lr).

    W (n, d) is kept as P U + 1 (δ + m̄)ᵀ. Loss, gradient of h and an exact step of SGD cost O(d²) per example, whatever
    n is: scores and the gradient of W are never made. P. Vincent, A. de Brébisson and X. Bouthillier, "Efficient Exact
    Gradient Update for training Deep Networks with Very Large Sparse Targets", NeurIPS 2015, arXiv 1412.7091::

        head = FactoredLinear(512, 793_471, fusedloss.nn.SphericalZLoss(a=0.05, b=200.0))
        loss = head(trunk(x), target)
        loss.backward()  # gradients of the trunk; that of W is queued in the head
        optimizer.step()
        head.step(lr=20.0)  # W ← W − lr · ∂L/∂W

    There are no Parameters: optimizers, `clip_grad_norm_` and DistributedDataParallel see nothing of W. Backward
    passes since the last step add up, as they would in ``.grad``, also two of one graph (``retain_graph``). In eval()
    mode they give the gradient of h and queue nothing. There are no second derivatives.

    Clipping by the norm of the whole model: that of W is ``head.grad_norm()``; pass the factor as ``grad_scale``.
    GradScaler: pass ``grad_scale=1 / scale``, with the scale that the loss was multiplied by, and call
    ``head.zero_grad()`` instead where the scaler skipped the step of the trunk. In float16 the gradient of h is rounded
    after all factors.

        in_features, out_features: d and n ≥ 2.
        loss: SphericalZLoss, TaylorSoftmaxLoss, SphericalSoftmaxLoss or SquaredErrorLoss of `fusedloss.nn`. Its class
            weights, ignore_index and reduction hold here too. None: SphericalZLoss with b = √n / 5 and a = 10 / b:
            b has to grow with n (docs/spherical.md: how to set a, b and the learning rate, about b m / (3 d)).
        bias: n biases, trained as one more column of W for a feature that is always `bias_scale`: they decay with it,
            and their learning rate is multiplied by bias_scale².
        momentum, nesterov: as in torch.optim.SGD. P is then twice as large.
        condition_limit: when ‖U‖ ‖U⁻¹‖ / d exceeds it, one pass over P makes U well-conditioned again; `rebalances`
            counts these passes, but on a GPU. Errors of W grow with it: at 1.5, 20,000 steps in float32 leave some 5e-6
            in the gradient of h. Not used with momentum, which has a measure of its own.
        process_group: ranks with replicas of W, made equal here. A step is that of the average of their losses: all of
            them have to call `step` (and `grad_norm`) together, also those with nothing queued.
        device, dtype: of P, float32 or float64. U, δ, m̄ and the Gram matrix are float64.

    W starts as in torch.nn.Linear; `load_dense` takes another. SphericalSoftmaxLoss and SphericalZLoss never train a W
    of zeros.
    ``to(device)`` moves the state; ``half()``, ``to(dtype)`` and the like leave its types as they are.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        loss: nn.loss.Loss | None = None,
        *,
        bias: bool = False,
        bias_scale: float = 1.0,
        momentum: float = 0.0,
        nesterov: bool = False,
        condition_limit: float = 1.5,
        process_group: torch.distributed.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        check_constant(NAME, "momentum", momentum, 0)
        check_constant(NAME, "condition_limit", condition_limit, 1, above=True)
        expect(momentum < 1, NAME, "momentum", "a number in [0, 1)", momentum)
        expect(not nesterov or momentum > 0, NAME, "nesterov", "a momentum above 0 with it", momentum)
        super().__init__(in_features, out_features, bool(bias), bias_scale, momentum, process_group, device, dtype)
        self.nesterov, self.condition_limit = bool(nesterov), condition_limit
        self.loss = default_loss(out_features) if loss is None else loss
        member(NAME, self.loss)

    def extra_repr(self) -> str:
        shown = f"{self.in_features}, {self.out_features}, dtype={self.factors.p.dtype}"
        bias = f", bias=True, bias_scale={self.bias_scale}" if self.has_bias else ""
        momentum = f", momentum={self.momentum}, nesterov={self.nesterov}" if self.momentum else ""
        return shown + bias + momentum

    @torch.compiler.disable
    def forward(self, h: Tensor, target: Tensor, row_weight: Tensor | None = None) -> Tensor:
        """The loss of features h (*leading, d), of any floating-point type, rounded to P's dtype.

            target: (*leading) class indices, or (*leading, K), several to a row (indices, not a matrix of 0 and 1).
            row_weight: (*leading) weights of the rows, differentiable.

        Returns float32 (float64 for float64 h), a number or (*leading), as the loss' reduction says.
        Raises TypeError, ValueError, IndexError for bad arguments, as the loss would for scores.
        """
        features, loss, trains = self._features(h), member(NAME, self.loss), self.training
        wide = torch.float64 if h.dtype == torch.float64 else torch.float32

        def losses_of(h: Tensor, target: Tensor, share: Tensor) -> Tensor:
            place = self._queue.place(trains)
            return Losses.apply(h, *place, self._queue, self.factors, loss, target, share)

        scores = ScoreShape(h.shape[:-1], self.out_features, wide)
        with torch.autocast(h.device.type, enabled=False):
            return weighted(NAME, self.loss, scores, features, target, row_weight, losses_of)

    def _queued(self) -> Batch | None:
        """All that is queued, of all ranks, as one batch."""
        queue = self._queue
        batch = Batch.join(queue.batches) if queue.batches else None
        if self.process_group is not None:  # asked again, ranks tell each other that there is nothing new
            batch = ranks.gather(NAME, self.factors, batch, self.process_group, self.width)
        parts = [part for part in (queue.joined, batch) if part is not None]
        queue.joined = Batch.join(parts) if parts else None
        queue.batches = []
        return queue.joined

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """‖∂L/∂W‖ of what is queued, 0-dimensional float64; the biases' part is times `bias_scale`."""
        with exact(self.factors.p.device):
            batch = self._queued()
            if batch is None:
                return torch.zeros((), dtype=torch.float64, device=self.factors.p.device)
            return squared_norm(self.factors, batch).sqrt()

    @torch.no_grad()
    def step(
        self,
        lr: float,
        weight_decay: float = 0.0,
        max_norm: float | None = None,
        grad_scale: float | Tensor = 1.0,
        preconditioner: Tensor | Callable[[Tensor], Tensor] | None = None,
    ) -> bool:
        """W ← W − lr (G + weight_decay W), where G is what is queued times `grad_scale`; then the queue is empty.

            max_norm: G is scaled down to this norm, as by `torch.nn.utils.clip_grad_norm_` for this layer alone.
            preconditioner: G R instead of G, without momentum: R (d, d) float64, or a function that makes it of GᵀG,
                such as `Muon()` and `Shampoo()` of this package. With biases d is one more.

        Returns True. Where nothing is queued nothing happens, and W does not decay. Where G is not finite, or squares
        of what it is made of overflow P's type, W stays, and False is returned.
        """
        check_constant(NAME, "lr", lr, 0)
        check_constant(NAME, "weight_decay", weight_decay, 0)
        expect(lr * weight_decay < 1, NAME, "weight_decay", f"less than 1 / lr, lr = {lr}", weight_decay)
        if max_norm is not None:
            check_constant(NAME, "max_norm", max_norm, 0)
        number = isinstance(grad_scale, (int, float)) or (isinstance(grad_scale, Tensor) and grad_scale.dim() == 0)
        if preconditioner is not None:
            expect(not self.momentum, NAME, "preconditioner", "None in a layer with momentum", preconditioner)
            square = isinstance(preconditioner, Tensor) and preconditioner.shape == (self.width, self.width)
            known = square or callable(preconditioner)
            expect(known, NAME, "preconditioner", f"({self.width}, {self.width}) or a function", preconditioner)
        expect(number, NAME, "grad_scale", "a number, or a 0-dimensional tensor", grad_scale, TypeError)
        with exact(self.factors.p.device):
            batch, scale = self._queued(), float(grad_scale)
            if batch is None:
                return True
            if max_norm is not None:
                norm = squared_norm(self.factors, batch).sqrt().item()
                scale = scale * min(1.0, max_norm / (norm * abs(scale) + 1e-6)) if isfinite(norm) else norm
            # Of squares: products of two rows must not overflow in P's type either.
            parts = [part.reshape(-1) for part in (batch.alpha, batch.t, batch.gamma, batch.h, batch.gh, batch.hu)]
            if not isfinite(sum(part.dot(part).double() for part in parts) * scale):
                self.zero_grad()
                return False
            batch = batch if scale == 1 else batch.scaled(scale)
            self._lr = lr
            self._descend(batch, lr, weight_decay, preconditioner)
        self._queue.changed()
        return True

    def _descend(self, batch: Batch, lr: float, decay: float, preconditioner: Tensor | Callable | None) -> None:
        f, limit = self.factors, self.condition_limit
        if self.momentum:
            moving.step(f, batch, lr, decay, self.momentum, self.nesterov)
            if not moving.condition(f, lr, self.momentum) <= moving.LIMIT:
                self._rebalance()
        elif preconditioner is not None:
            preconditioned.step(f, batch, lr, decay, preconditioner)
            if ill(f.u, f.inverse, limit):
                self._rebalance()
        else:
            self.rebalances += engine(f).step(f, batch, lr, decay, limit)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what is queued."""
        super().zero_grad(set_to_none)
        self._queue.batches, self._queue.joined = [], None

    @torch.no_grad()
    def logits(self, h: Tensor) -> Tensor:
        """(*leading, n) scores of P's dtype, all of them, without gradient."""
        with exact(h.device):
            return evaluation.logits(self.factors, self._flat(h)).reshape(*h.shape[:-1], self.out_features)

    @torch.no_grad()
    def topk(self, h: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and classes (*leading, k) of the k that rank highest, best first; ranked as the loss says: `rank`."""
        expect(isinstance(k, int) and 1 <= k <= self.out_features, NAME, "k", f"1 <= k <= {self.out_features}", k)
        with exact(h.device):
            found = evaluation.topk(self.factors, self._flat(h), k, member(NAME, self.loss).rank)
        return tuple(t.reshape(*h.shape[:-1], k) for t in found)
