"""`FactoredLinear`: an output layer with a spherical loss, trained at a cost that does not grow with its classes."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields, replace
from math import isfinite, sqrt

import torch
from torch import Tensor
from torch.nn.functional import pad

from .. import nn
from ..checks import check_constant, expect
from . import evaluation, ranks
from .engines import engine
from .exact import exact
from .factors import Factors, rebalance
from .family import Member, member
from .gradients import Losses, PickedRows, Queue, leaf
from .steps import Batch, squared_norm
from .weighted import Rows, weighted

NAME = "FactoredLinear"
KEPT = ("p", "u", "offset", "mean", "gram")  # of the factors, in a state_dict; U⁻¹ is made again


class FactoredLinear(torch.nn.Module):
    """A linear layer to n classes and its loss: loss = head(h, target), loss.backward(), head.step(lr).

    W (n, d) is kept as P U + 1 (δ + m̄)ᵀ (P. Vincent, A. de Brébisson and X. Bouthillier, "Efficient Exact Gradient Update
    for training Deep Networks with Very Large Sparse Targets", NeurIPS 2015, arXiv 1412.7091): loss, gradient of h and an
    exact step of SGD take O(d²) per example, whatever n is. Scores, and the gradient of W, are never made::

        head = FactoredLinear(512, 793_471, fusedloss.nn.SphericalZLoss(b=5.0))
        loss = head(trunk(x), target)
        loss.backward()                     # gradients of the trunk; that of W is queued in the head
        optimizer.step(), optimizer.zero_grad()
        head.step(lr=0.1)                   # W ← W − lr · ∂L/∂W

    There are no Parameters: an optimizer, `clip_grad_norm_` and DistributedDataParallel see nothing of it. All backward
    passes since the last step add up, as they would in ``.grad``: two of one graph (``retain_graph``) count twice. Passes
    in eval() mode give the gradient of h only. There are no second derivatives.

    Global clipping: ``norm = (clip_norm_of_the_rest² + head.grad_norm()²) ** 0.5``, then ``head.step(lr, grad_scale=…)``.
    GradScaler: ``head.step(lr, grad_scale=1 / scale)`` with the scale that the loss was multiplied by, and
    ``head.zero_grad()`` where the scaler skips the other optimizers' step.

    Args:
        in_features, out_features: d and n ≥ 2.
        loss: a `fusedloss.nn` module: SphericalZLoss (default), TaylorSoftmaxLoss, SphericalSoftmaxLoss,
            SquaredErrorLoss. Its class weights, ignore_index and reduction hold here too.
        bias: n biases, trained with the weight: features get a column of `bias_scale`, whose square multiplies their
            learning rate.
        momentum, nesterov: as in torch.optim.SGD (P is then twice as large).
        condition_limit: U is mended by a pass over P when ‖U‖ ‖U⁻¹‖ / d exceeds it; `rebalances` counts these passes.
        process_group: ranks that hold the same W and each see some of the examples: W starts as the first rank's, and
            `step` takes the gradients' average over the ranks, as DistributedDataParallel does. All of them have to
            call the constructor, `load_dense`, `grad_norm` and `step`. None: each process is on its own.
        device, dtype: of P; float32 or float64. U, δ, m̄ and the Gram matrix are float64.

    The weight starts as that of torch.nn.Linear; `load_dense` takes another. SphericalSoftmaxLoss never trains a weight
    that is 0 everywhere. ``to(device)`` moves the state; ``half()``, ``to(dtype)`` and the like leave it as it is.
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
        condition_limit: float = 8.0,
        process_group=None,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        for argument, value, least in (("in_features", in_features, 1), ("out_features", out_features, 2)):
            expect(isinstance(value, int) and value >= least, NAME, argument, f"an integer ≥ {least}", value)
        check_constant(NAME, "bias_scale", bias_scale, 0, above=True)
        check_constant(NAME, "momentum", momentum, 0)
        check_constant(NAME, "condition_limit", condition_limit, 1, above=True)
        expect(momentum < 1, NAME, "momentum", "a number in [0, 1)", momentum)
        expect(not nesterov or momentum > 0, NAME, "nesterov", "a momentum above 0 with it", momentum)
        expect(dtype in (torch.float32, torch.float64), NAME, "dtype", "float32 or float64", dtype, TypeError)
        self.in_features, self.out_features, self.bias, self.bias_scale = (
            in_features,
            out_features,
            bool(bias),
            bias_scale,
        )
        self.momentum, self.nesterov, self.condition_limit = momentum, bool(nesterov), condition_limit
        self.process_group, self.rebalances = process_group, 0
        self.loss = nn.SphericalZLoss() if loss is None else loss
        self._known = member(NAME, self.loss), self._options()
        # Plain attributes: a buffer or Parameter as large as P would be sent around by DistributedDataParallel.
        self._queue = Queue()
        p = torch.empty(out_features, self._width * (2 if momentum else 1), device=device, dtype=dtype)
        expect(not p.is_meta, NAME, "device", "one that holds numbers", p.device)
        bound = 1 / sqrt(in_features)
        p[:, :in_features].uniform_(-bound, bound)
        p[:, in_features : self._width].uniform_(-bound / bias_scale, bound / bias_scale)
        p[:, self._width :] = 0
        self._begin(p)

    def _begin(self, p: Tensor) -> None:
        """With W = p, of the first rank."""
        with exact(p.device):
            self.factors = Factors.of(p)
        if self.process_group is not None:
            ranks.broadcast(NAME, self.factors, self.process_group)

    # --- what it is ----------------------------------------------------------------------------------------------------

    @property
    def _width(self) -> int:
        """Columns of [W, b]."""
        return self.in_features + self.bias

    def _options(self) -> tuple:
        return tuple(getattr(self.loss, name) for name in self.loss.names if name != "weight")

    def _member(self) -> Member:
        """The loss, with hyperparameters as they are now."""
        options = self._options()
        if options != self._known[1]:
            self._known = member(NAME, self.loss), options
        return self._known[0]

    def _features(self, h: Tensor) -> Tensor:
        """h of P's dtype, with a column for the biases, and zeros where the velocity is."""
        expect(isinstance(h, Tensor) and h.is_floating_point(), NAME, "h", "a floating-point tensor", h, TypeError)
        fits = h.dim() > 0 and h.shape[-1] == self.in_features
        expect(fits, NAME, "h", f"(*leading, {self.in_features})", h)
        h = h.to(self.factors.p.dtype)
        if self.bias:
            h = pad(h, (0, 1), value=self.bias_scale)
        return pad(h, (0, self._width)) if self.momentum else h

    def extra_repr(self) -> str:
        shown = f"{self.in_features}, {self.out_features}, dtype={self.factors.p.dtype}"
        bias = f", bias=True, bias_scale={self.bias_scale}" if self.bias else ""
        momentum = f", momentum={self.momentum}, nesterov={self.nesterov}" if self.momentum else ""
        return shown + bias + momentum

    # --- training ------------------------------------------------------------------------------------------------------

    @torch.compiler.disable
    def forward(self, h: Tensor, target: Tensor, row_weight: Tensor | None = None) -> Tensor:
        """Loss of features (*leading, d) of any float type; target (*leading), or (*leading, K) several to a row.

        row_weight (*leading): weights of the rows, differentiable. Returns float32 (float64 for float64 h), a number or
        (*leading) as the loss' reduction says. Raises TypeError, ValueError, IndexError for bad arguments.
        """
        loss, trains = self._member(), self.training
        rows = Rows(h.shape[:-1], self.out_features, torch.float64 if h.dtype == torch.float64 else torch.float32)

        def losses_of(h, target, share):
            return Losses.apply(h, leaf(trains), self._queue, self.factors, loss, target, share)

        with torch.autocast(h.device.type, enabled=False):
            return weighted(NAME, rows, self._features(h), target, row_weight, self.loss, losses_of)

    @torch.compiler.disable
    def rows(self, index: Tensor) -> Tensor:
        """W[index] (*index.shape, d) without biases, differentiable: its gradient is queued with that of the loss."""
        integral = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
        expect(integral, NAME, "index", "an integer tensor", getattr(index, "dtype", index), TypeError)
        index = index.long()
        inside = not index.is_cpu or bool(((index >= 0) & (index < self.out_features)).all())
        expect(
            inside,
            NAME,
            "index",
            f"0 <= index < {self.out_features}",
            index.tolist() if not inside else None,
            IndexError,
        )
        with torch.autocast(index.device.type, enabled=False):
            return PickedRows.apply(leaf(self.training), self._queue, self.factors, index)[..., : self.in_features]

    def _queued(self) -> Batch | None:
        """All that is queued, on all ranks, as one batch."""
        batches = self._queue.batches
        if self.process_group is not None:
            with exact(self.factors.p.device):
                batches[:] = ranks.gather(NAME, self.factors, batches, self.process_group, self._width)
        elif batches:
            batches[:] = [Batch.join(batches)]
        return batches[0] if batches else None

    @torch.no_grad()
    def grad_norm(self) -> Tensor:
        """‖∂L/∂W‖ (with biases: of [W, b], the latter times `bias_scale`) of what is queued: 0-dimensional float64."""
        batch = self._queued()
        if batch is None:
            return torch.zeros((), dtype=torch.float64, device=self.factors.p.device)
        with exact(batch.h.device):
            return squared_norm(self.factors, batch).sqrt()

    @torch.no_grad()
    def step(
        self, lr: float, weight_decay: float = 0.0, max_norm: float | None = None, grad_scale: float | Tensor = 1.0
    ) -> bool:
        """W ← W − lr (G + weight_decay W), where G is what is queued times `grad_scale`; then the queue is empty.

        max_norm: G is scaled down to this norm, as by `torch.nn.utils.clip_grad_norm_`, of this layer alone.
        Where G is not finite W stays, the queue is dropped, and False is returned; else True, also for an empty queue.
        """
        check_constant(NAME, "lr", lr, 0)
        check_constant(NAME, "weight_decay", weight_decay, 0)
        expect(lr * weight_decay < 1, NAME, "weight_decay", f"less than 1 / lr = 1 / {lr}", weight_decay)
        if max_norm is not None:
            check_constant(NAME, "max_norm", max_norm, 0)
        number = isinstance(grad_scale, (int, float)) or (isinstance(grad_scale, Tensor) and grad_scale.dim() == 0)
        expect(number, NAME, "grad_scale", "a number, or a 0-dimensional tensor", grad_scale, TypeError)
        batch, scale = self._queued(), float(grad_scale)
        if batch is None:
            return True
        with exact(batch.h.device):
            if max_norm is not None:
                norm = self.grad_norm().item() * abs(scale)
                scale *= min(1.0, max_norm / (norm + 1e-6)) if isfinite(norm) else norm
            parts = (batch.alpha, batch.t, batch.gamma, batch.h, batch.gh)
            finite = isfinite(scale) and isfinite(torch.stack([t.sum(dtype=torch.float64) for t in parts]).sum().item())
            if finite:
                batch = batch if scale == 1 else batch.scaled(scale)
                engine(self.factors).step(self.factors, batch, lr, weight_decay)
                self._mend()
        self._queue.changed()
        return finite

    def _mend(self) -> None:
        """Rebalance where U needs it: ill-conditioned, or grown or shrunk as a whole (decay does that for ever)."""
        size = self.factors.u.norm() / sqrt(len(self.factors.u))
        condition, size = torch.stack([self.factors.condition(), size]).tolist()
        if isfinite(condition) and (condition > self.condition_limit or not 1e-6 <= size <= 1e6):
            rebalance(self.factors)
            self.rebalances += 1

    @torch.no_grad()
    def rebalance(self) -> None:
        """Move from U to P what makes U ill-conditioned, in one pass over P. W stays, and so does what is queued."""
        batches = list(self._queue.batches)
        with exact(self.factors.p.device):
            rebalance(self.factors)
            u = self.factors.u.t().to(self.factors.p.dtype)
            batches = [replace(batch, hu=batch.h @ u) for batch in batches]
        self._queue.changed()
        self._queue.batches.extend(batches)
        self.rebalances += 1

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop what is queued."""
        super().zero_grad(set_to_none)
        self._queue.batches.clear()

    # --- the weight as a whole -----------------------------------------------------------------------------------------

    @torch.no_grad()
    def materialize(self, dtype: torch.dtype | None = None) -> torch.nn.Linear:
        """The layer as a torch.nn.Linear (n × d) of P's dtype, or `dtype`: a copy."""
        p = self.factors.p
        shape = (self.in_features, self.out_features, self.bias)
        linear = torch.nn.Linear(*shape, device="meta", dtype=dtype or p.dtype).to_empty(device=p.device)
        with exact(p.device):
            evaluation.materialize(self.factors, linear.weight, linear.bias, self.bias_scale)
        return linear

    @torch.no_grad()
    def load_dense(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take over the numbers of a dense weight (n, d), and bias (n,). Velocity and queue are emptied."""
        shape = (self.out_features, self.in_features)
        expect(isinstance(weight, Tensor) and weight.shape == shape, NAME, "weight", f"{shape}", weight)
        expect(self.bias or bias is None, NAME, "bias", "None: this layer has none", bias)
        expect(bias is None or bias.shape == shape[:1], NAME, "bias", f"{shape[:1]}", bias)
        p = self.factors.p
        p[:, : self.in_features] = weight
        p[:, self.in_features :] = 0
        if bias is not None:
            p[:, self.in_features] = bias.to(p) / self.bias_scale
        self._begin(p)
        self._queue.changed()

    @torch.no_grad()
    def logits(self, h: Tensor) -> Tensor:
        """(*leading, n) scores, of P's dtype, without gradient."""
        with exact(h.device):
            flat = self._features(h).reshape(h.shape[:-1].numel(), -1)
            return evaluation.logits(self.factors, flat).reshape(*h.shape[:-1], self.out_features)

    @torch.no_grad()
    def topk(self, h: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Scores and classes (*leading, k) of the k highest, best first, by the loss' rule: its `rank`."""
        expect(isinstance(k, int) and 1 <= k <= self.out_features, NAME, "k", f"1 <= k <= {self.out_features}", k)
        with exact(h.device):
            flat = self._features(h).reshape(h.shape[:-1].numel(), -1)
            found = evaluation.topk(self.factors, flat, k, self._member().rank)
        return tuple(t.reshape(*h.shape[:-1], k) for t in found)

    # --- moved, kept, copied -------------------------------------------------------------------------------------------

    def _apply(self, fn, recurse: bool = True):
        super()._apply(fn, recurse)
        # Asked with an integer, `fn` tells where to, and casts nothing.
        device = fn(torch.zeros(1, dtype=torch.int64, device=self.factors.p.device)).device
        expect(device.type != "meta", NAME, "device", "one that holds numbers", device)
        if device != self.factors.p.device:
            moved = [_moved(batch, device) for batch in self._queue.batches]
            self.factors = _moved(self.factors, device)
            self._queue.changed()
            self._queue.batches.extend(moved)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in KEPT:
            destination[prefix + name] = getattr(self.factors, name)

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        own = {name: state[prefix + name] for name in KEPT if prefix + name in state}
        rest = {
            key: value for key, value in state.items() if key[len(prefix) :] not in own or not key.startswith(prefix)
        }
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        missing.extend(prefix + name for name in KEPT if name not in own)
        fits = len(own) == len(KEPT)
        for name, value in own.items():
            mine = getattr(self.factors, name)
            if value.shape != mine.shape or value.dtype != mine.dtype:
                kinds = [f"{tuple(t.shape)} {t.dtype}" for t in (value, mine)]
                errors.append(
                    f"size or type mismatch for {prefix + name}: {kinds[0]} in the checkpoint, {kinds[1]} here."
                )
                fits = False
        if fits:  # all of it or none: half of the factors would be another matrix
            with torch.no_grad():
                for name, value in own.items():
                    getattr(self.factors, name).copy_(value)
                self.factors.inverse.copy_(torch.linalg.inv(self.factors.u))
            self._queue.changed()

    def __deepcopy__(self, memo):
        memo[id(self.process_group)] = self.process_group  # cannot be copied
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self):
        return {**self.__dict__, "_queue": Queue()}


def _moved(held, device: torch.device):
    return type(held)(**{field.name: getattr(held, field.name).to(device) for field in fields(held)})
