"""A weight in factors as a module: made, moved, kept, copied, and turned into a dense one and back."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import fields, replace
from math import sqrt
from operator import attrgetter

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..checks import check_constant, expect
from . import evaluation, ranks
from . import momentum as moving
from .exact import exact
from .factors import Factors, rebalance
from .gradients import PickedRows, Queue

NAME = "FactoredLinear"
# In a state_dict. torch.distributed.checkpoint looks for attributes of these names.
KEPT = tuple("factors." + field.name for field in fields(Factors))


class FactoredWeight(torch.nn.Module):
    """[W, b] of n classes in factors of P's dtype, and as many columns again for its velocity if there is momentum."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        bias_scale: float,
        momentum: float,
        process_group: torch.distributed.ProcessGroup | None,
        device: torch.device | str | None,
        dtype: torch.dtype,
    ):
        super().__init__()
        for argument, value, least in (("in_features", in_features, 1), ("out_features", out_features, 2)):
            expect(isinstance(value, int) and value >= least, NAME, argument, f"an integer ≥ {least}", value)
        check_constant(NAME, "bias_scale", bias_scale, 0, above=True)
        expect(dtype in (torch.float32, torch.float64), NAME, "dtype", "float32 or float64", dtype, TypeError)
        self.in_features, self.out_features = in_features, out_features
        self.has_bias, self.bias_scale = bias, bias_scale
        self.momentum, self.process_group = momentum, process_group
        self.rebalances, self._lr = 0, 0.0  # the last step's
        self.width = in_features + bias
        # Plain attributes: a buffer or Parameter as large as P would be sent around by DistributedDataParallel.
        self._queue = Queue()
        p = torch.empty(out_features, self.width * (2 if momentum else 1), device=device, dtype=dtype)
        expect(not p.is_meta, NAME, "device", "one that holds numbers", p.device)
        bound = 1 / sqrt(in_features)
        p[:, :in_features].uniform_(-bound, bound)
        p[:, in_features : self.width].uniform_(-bound / bias_scale, bound / bias_scale)
        p[:, self.width :] = 0
        self._start(p)

    def _start(self, p: Tensor) -> None:
        """The factors of [W, b, velocity] = p, which is taken over; on all ranks those of the first."""
        with exact(p.device):
            made = Factors.of(p)
        if hasattr(self, "factors"):  # in place, as a state_dict holds them
            for field in fields(made):
                getattr(self.factors, field.name).copy_(getattr(made, field.name))
        else:
            self.factors = made
        if self.process_group is not None:
            ranks.broadcast(NAME, self.factors, self.process_group)
        self._queue.changed()

    def _features(self, h: Tensor) -> Tensor:
        """h of P's dtype, with a column for the biases, and zeros where the velocity is."""
        expect(isinstance(h, Tensor) and h.is_floating_point(), NAME, "h", "a floating-point tensor", h, TypeError)
        fits = h.dim() > 0 and h.shape[-1] == self.in_features
        expect(fits, NAME, "h", f"(*leading, {self.in_features})", h)
        h = h.to(self.factors.p.dtype)
        if self.has_bias:
            h = pad(h, (0, 1), value=self.bias_scale)
        return pad(h, (0, self.width)) if self.momentum else h

    def _flat(self, h: Tensor) -> Tensor:
        """The same, (m, width)."""
        h = self._features(h)
        return h.reshape(h.shape[:-1].numel(), h.shape[-1])

    @torch.compiler.disable
    def rows(self, index: Tensor) -> Tensor:
        """W[index] (*index.shape, d) of P's dtype, without biases. Differentiable: its gradient is queued, too."""
        integral = isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8)
        expect(integral, NAME, "index", "an integer tensor", getattr(index, "dtype", index), TypeError)
        index, n = index.long(), self.out_features
        if index.is_cpu and index.numel():  # a device complains by itself, later
            low, high = (t.item() for t in index.aminmax())
            expect(0 <= low and high < n, NAME, "index", f"0 <= index < {n}", f"{low} … {high}", IndexError)
        with torch.autocast(index.device.type, enabled=False):
            picked = PickedRows.apply(*self._queue.place(self.training), self._queue, self.factors, index)
        return picked[..., : self.in_features]

    @torch.no_grad()
    def rebalance(self) -> None:
        """Move from U to P what makes U ill-conditioned, in one pass over P. W stays, and so does what is queued."""
        with exact(self.factors.p.device):
            self._rebalance()
            u = self.factors.u.t().to(self.factors.p.dtype)
            self._queue.changed(lambda batch: replace(batch, hu=batch.h @ u))

    def _rebalance(self) -> None:
        if self.momentum:
            moving.rebalance(self.factors, self._lr, self.momentum)
        else:
            rebalance(self.factors)
        self.rebalances += 1

    # --- dense, and back ---------------------------------------------------------------------------------------------

    @torch.no_grad()
    def materialize(self, dtype: torch.dtype | None = None) -> torch.nn.Linear:
        """The layer as a torch.nn.Linear (n × d), a copy; of P's dtype if none is given."""
        p = self.factors.p
        shape = (self.in_features, self.out_features, self.has_bias)
        linear = torch.nn.Linear(*shape, device="meta", dtype=dtype or p.dtype).to_empty(device=p.device)
        with exact(p.device):
            evaluation.materialize(self.factors, linear.weight, linear.bias, self.bias_scale)
        return linear

    @torch.no_grad()
    def load_dense(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """Take over the numbers of a dense weight (n, d), and of biases (n,). Velocity and queue are emptied.

        With a process_group all ranks have to call it, and get the first one's numbers.
        """
        n, d = self.out_features, self.in_features
        expect(isinstance(weight, Tensor) and weight.shape == (n, d), NAME, "weight", f"({n}, {d})", weight)
        expect(self.has_bias or bias is None, NAME, "bias", "None, for this layer has no biases", bias)
        expect(bias is None or bias.shape == (n,), NAME, "bias", f"({n},)", bias)
        p = self.factors.p
        p[:, :d] = weight
        p[:, d:] = 0
        if bias is not None:
            p[:, d] = bias.to(p) / self.bias_scale
        self._start(p)

    # --- moved, kept, copied -----------------------------------------------------------------------------------------

    def _apply(self, fn, recurse: bool = True):
        # Asked with an integer, `fn` tells where to, and casts nothing.
        device = fn(torch.zeros(1, dtype=torch.int64, device=self.factors.p.device)).device
        expect(device.type != "meta", NAME, "device", "one that holds numbers", device)
        super()._apply(fn, recurse)
        if device != self.factors.p.device:
            self.factors = _moved(self.factors, device)
            self._queue.changed(lambda batch: _moved(batch, device))
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: attrgetter(name)(self) for name in KEPT})

    def _load_from_state_dict(self, state, prefix, metadata, strict, missing, unexpected, errors):
        mine = {prefix + name: attrgetter(name)(self) for name in KEPT}
        rest = {key: value for key, value in state.items() if key not in mine}
        super()._load_from_state_dict(rest, prefix, metadata, strict, missing, unexpected, errors)
        lacking, wrong = [key for key in mine if key not in state], []
        for key in mine.keys() & state.keys():
            kinds = [(tuple(t.shape), t.dtype) for t in (state[key], mine[key])]
            if kinds[0] != kinds[1]:
                wrong.append(f"size mismatch for {key}: {kinds[0]} in the checkpoint, {kinds[1]} in this layer.")
        missing.extend(lacking)
        errors.extend(sorted(wrong))
        if not lacking and not wrong:  # all of them or none: half of the factors would be another matrix
            with torch.no_grad():
                for key, tensor in mine.items():
                    tensor.copy_(state[key])
            self._queue.changed()

    def __deepcopy__(self, memo):
        memo[id(self.process_group)] = self.process_group  # it cannot be copied
        copied = memo[id(self)] = type(self).__new__(type(self))
        copied.__setstate__(deepcopy(self.__getstate__(), memo))
        return copied

    def __getstate__(self):
        return {**self.__dict__, "_queue": Queue()}


def _moved(held, device: torch.device):
    return type(held)(**{field.name: getattr(held, field.name).to(device) for field in fields(held)})
