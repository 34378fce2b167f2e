"""Modules of the losses between embeddings: they make the scores themselves, and keep what is learned with them."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable

import torch
from torch import Tensor

from ..checks import check_number
from ..losses.auc_loss import auc_loss
from ..losses.bixse_loss import bixse_loss
from ..losses.bpr_loss import bpr_loss
from ..losses.circle_loss import circle_loss
from ..losses.clip_loss import clip_loss
from ..losses.cosine_contrastive_loss import cosine_contrastive_loss
from ..losses.cwcl_loss import cwcl_loss
from ..losses.info_nce_loss import info_nce_loss
from ..losses.margin_softmax_loss import margin_softmax_loss
from ..losses.multi_similarity_loss import multi_similarity_loss
from ..losses.nt_xent_loss import nt_xent_loss
from ..losses.orthogonal_projection_loss import orthogonal_projection_loss
from ..losses.pairwise_softmax_loss import pairwise_softmax_loss
from ..losses.sigmoid_loss import sigmoid_loss
from ..losses.soft_info_nce_loss import soft_info_nce_loss
from ..losses.supcon_loss import supcon_loss
from ..losses.triplet_loss import triplet_loss
from ..scores import Scores
from ..similarity import similarity_scores
from .loss import Loss

# What a batch brings; all other parameters of a loss are its module's.
OF_BATCH = ("scores", "target", "label", "column_label", "row_group", "column_group", "row_weight", "grade", "teacher")
WALK = ("memory_budget", "schedule", "backend")


class PairLoss(Loss):
    """Base of the modules on pairs of embeddings.

    Constructor, by name: the function's hyperparameters; ``score_scale`` or ``temperature``, and ``normalize``: how the
    scores are made of embeddings; memory_budget, schedule and backend of `similarity_scores`. What belongs to a batch
    is given in the call, by name: target, row_weight and the like.
    """

    call = "forward(x, y, **of_batch)"

    def __init_subclass__(
        cls,
        of: Callable[..., Tensor] | None = None,
        without: tuple[str, ...] = (),
        normalize: bool = True,
        **scale: float | None,
    ):
        super().__init_subclass__()
        if of is None:
            return
        cls.function, cls.own = staticmethod(of), ("normalize", *WALK, *(scale or {"score_scale": 1.0}))
        walk = {n: p.default for n, p in inspect.signature(similarity_scores).parameters.items() if n in WALK}
        made = {**(scale or {"score_scale": 1.0}), "normalize": normalize, **walk}
        keyword = inspect.Parameter.KEYWORD_ONLY
        given = [p for n, p in inspect.signature(of).parameters.items() if n not in (*OF_BATCH, *without)]
        given += [inspect.Parameter(n, keyword, default=value) for n, value in made.items() if n not in without]
        cls.__signature__ = inspect.Signature([p.replace(kind=keyword) for p in given])
        said = cls.__dict__.get("__doc__") or f"`fusedloss.{of.__name__}` as a module: {cls.call}."
        cls.__doc__ = f"{inspect.cleandoc(said)}\n\n{inspect.getdoc(of)}"

    def __init__(self, *arguments: object, **options: object):
        super().__init__(*arguments, **options)
        if "temperature" in self.own:
            check_number(type(self).__name__, "temperature", self.temperature, 0, above=True)

    def _scalars(self) -> dict[str, Tensor]:
        held = {**dict(self.named_parameters(recurse=False)), **dict(self.named_buffers(recurse=False))}
        return {name: t for name, t in held.items() if t.dim() == 0}

    def _apply(self, function, recurse=True):
        """`.half()` and `.bfloat16()` leave single numbers (log_scale, running means) in float32, or they stand still."""
        before = {name: t.detach().clone() for name, t in self._scalars().items()}
        super()._apply(function, recurse)
        for name, t in self._scalars().items():
            if t.dtype in (torch.float16, torch.bfloat16):
                t.data = before[name].to(t.device)
        return self

    def scores(self, x: Tensor, y: Tensor | None = None, **made: object) -> Scores:
        scale = 1 / self.temperature if "temperature" in self.own else getattr(self, "score_scale", 1.0)
        walk = {name: getattr(self, name) for name in WALK}
        return similarity_scores(x, y, **{"scale": scale, "normalize": self.normalize, **walk, **made})

    def options(self) -> dict[str, object]:
        """The function's hyperparameters."""
        return {name: getattr(self, name) for name in self.names if name not in self.own}

    def forward(self, x: Tensor, y: Tensor, **of_batch: object) -> Tensor:
        return self.function(self.scores(x, y), **self.options(), **of_batch)


class LabelLoss(PairLoss):
    """Base of the modules on labelled embeddings; with ``y`` and a column_label where the columns are not the rows."""

    call = "forward(x, label, y=None, **of_batch)"

    def forward(self, x: Tensor, label: Tensor, y: Tensor | None = None, **of_batch: object) -> Tensor:
        return self.function(self.scores(x, y), label, **self.options(), **of_batch)


class LearnedScale(PairLoss):
    """Base of the modules that learn the scale of their scores, as its logarithm ``log_scale``, and some a ``bias``."""

    def __init__(self, *arguments: object, **options: object):
        super().__init__(*arguments, **options)
        for name in ("log_scale", "bias"):
            if name in self.own and not isinstance(getattr(self, name), torch.nn.Parameter):  # one may be shared
                value = torch.as_tensor(getattr(self, name), dtype=torch.float32).detach().clone()
                delattr(self, name)
                setattr(self, name, torch.nn.Parameter(value))


    def scores(self, x: Tensor, y: Tensor | None = None, **made: object) -> Scores:
        bias = {"bias": self.bias} if "bias" in self.own else {}
        return super().scores(x, y, **{"scale": self.log_scale.exp(), **bias, **made})

    @torch.no_grad()
    def clamp_(self, low: float = 0.0, high: float = math.log(100)) -> None:
        """Bring log_scale back between these, as open_clip does after every step of the optimiser."""
        self.log_scale.clamp_(low, high)


class SigmoidLoss(LearnedScale, of=sigmoid_loss, log_scale=math.log(10), bias=-10.0):
    pass


class BiXSELoss(LearnedScale, of=bixse_loss, log_scale=math.log(10), bias=-10.0):
    pass


class ClipLoss(LearnedScale, of=clip_loss, log_scale=math.log(1 / 0.07)):
    pass


class CWCLLoss(LearnedScale, of=cwcl_loss, log_scale=math.log(1 / 0.07)):
    pass


class InfoNCELoss(PairLoss, of=info_nce_loss, temperature=0.07):
    pass


class SoftInfoNCELoss(PairLoss, of=soft_info_nce_loss, normalize=False):
    pass


class NTXentLoss(PairLoss, of=nt_xent_loss, temperature=0.1):
    """`fusedloss.nt_xent_loss` of two views x, y of each sample: forward(x, y); or of all views in x: forward(x)."""

    def forward(self, x: Tensor, y: Tensor | None = None, **of_batch: object) -> Tensor:
        views = x if y is None else torch.cat([x, y])
        return self.function(self.scores(views), **self.options(), **of_batch)


class SupConLoss(LabelLoss, of=supcon_loss, without=("temperature_ratio",), temperature=0.07, temperature_base=None):
    """`fusedloss.supcon_loss` as a module: forward(x, label); times temperature / temperature_base (None: 1)."""

    def options(self) -> dict[str, object]:
        base = self.temperature if self.temperature_base is None else self.temperature_base
        return {**super().options(), "temperature_ratio": self.temperature / base}


class OrthogonalProjectionLoss(LabelLoss, of=orthogonal_projection_loss):
    pass


class AUCLoss(PairLoss, of=auc_loss):
    pass


class BPRLoss(PairLoss, of=bpr_loss, normalize=False):
    pass


class CosineContrastiveLoss(PairLoss, of=cosine_contrastive_loss):
    pass


class PairwiseSoftmaxLoss(PairLoss, of=pairwise_softmax_loss, score_scale=None):
    """`fusedloss.pairwise_softmax_loss` as a module: forward(x, y); score_scale None: 1 for form="sl", else 1/2."""

    def scores(self, x: Tensor, y: Tensor | None = None, **made: object) -> Scores:
        scale = self.score_scale if self.score_scale is not None else 1.0 if self.form == "sl" else 0.5
        return super().scores(x, y, **{"scale": scale, **made})


class CircleLoss(LabelLoss, of=circle_loss):
    pass


class MultiSimilarityLoss(LabelLoss, of=multi_similarity_loss):
    pass


class TripletLoss(LabelLoss, of=triplet_loss):
    pass


class MarginSoftmaxLoss(PairLoss, of=margin_softmax_loss, without=("weight", "norm", "norm_mean", "norm_deviation")):
    """`fusedloss.margin_softmax_loss` with its class vectors, ``weight`` (classes, width): forward(x, target).

    For AdaFace it keeps the running mean and deviation of the lengths of x, from 20 and 100 on: while it trains, every
    batch enters with the share ``momentum`` before they are used, 0.01 as in the official training (the deviation only
    where a batch has two rows). ``class_weight`` (classes,) is the function's weight.
    """

    def __init__(
        self,
        classes: int,
        width: int,
        *,
        momentum: float = 0.01,
        class_weight: Tensor | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: object,
    ):
        super().__init__(**options)
        self.momentum = momentum
        self.weight = torch.nn.Parameter(0.01 * torch.randn(classes, width, device=device, dtype=dtype))
        self.register_buffer("class_weight", class_weight)
        if self.margin == "adaface":
            self.register_buffer("norm_mean", torch.tensor(20.0, device=device))
            self.register_buffer("norm_deviation", torch.tensor(100.0, device=device))

    def forward(self, x: Tensor, target: Tensor, *, row_weight: Tensor | None = None) -> Tensor:
        of_batch = self._lengths(x) if self.margin == "adaface" else {}
        options = dict(weight=self.class_weight, row_weight=row_weight, **of_batch, **self.options())
        return self.function(self.scores(x, self.weight), target, **options)

    @torch.no_grad()
    def _lengths(self, x: Tensor) -> dict[str, Tensor]:
        norm = x.to(torch.promote_types(x.dtype, torch.float32)).norm(dim=1).clamp(0.001, 100)
        if self.training and len(x):
            self.norm_mean.lerp_(norm.mean().to(self.norm_mean.dtype), self.momentum)
        if self.training and len(x) > 1:
            self.norm_deviation.lerp_(norm.std().to(self.norm_deviation.dtype), self.momentum)
        return dict(norm=norm, norm_mean=self.norm_mean.clone(), norm_deviation=self.norm_deviation.clone())

    def extra_repr(self) -> str:
        return ", ".join(filter(None, ["{}, {}".format(*self.weight.shape), super().extra_repr()]))
