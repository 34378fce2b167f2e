"""Modules of the ranking losses: lists of scores, their relevance, and which of them count."""

from __future__ import annotations

import inspect
from collections.abc import Callable

from torch import Tensor

from ..ranking import (
    adr_mse_loss,
    approx_ndcg_loss,
    gro_co_loss,
    kendall_loss,
    lambda_loss,
    list_mle_loss,
    listnet_loss,
    listwise_point_loss,
    listwise_poly1_loss,
    listwise_softmax_loss,
    neural_ndcg_loss,
    p_list_mle_loss,
    ranknet_loss,
    spearman_loss,
)
from .loss import Loss

# What a batch brings; all other parameters of a loss are its module's.
OF_BATCH = ("scores", "relevance", "mask", "offsets", "list_weight")


class ListLoss(Loss):
    """Base of the modules on lists: ``class ListNetLoss(ListLoss, of=listnet_loss)``.

    Constructor, by name: the function's parameters but those of a batch, which are given in the call.
    """

    def __init_subclass__(cls, of: Callable[..., Tensor] | None = None, **more: object):
        super().__init_subclass__(**more)
        if of is None:
            return
        cls.function = staticmethod(of)
        kept = [p for p in inspect.signature(of).parameters.values() if p.name not in OF_BATCH]
        cls.__signature__ = inspect.Signature(kept)
        call = "forward(scores, relevance, *, mask=None, offsets=None, list_weight=None)"
        cls.__doc__ = f"`fusedloss.ranking.{of.__name__}` as a module: {call}.\n\n{inspect.getdoc(of)}"

    def forward(
        self,
        scores: Tensor,
        relevance: Tensor,
        *,
        mask: Tensor | None = None,
        offsets: Tensor | None = None,
        list_weight: Tensor | None = None,
    ) -> Tensor:
        options = {name: getattr(self, name) for name in self.names}
        return self.function(scores, relevance, mask=mask, offsets=offsets, list_weight=list_weight, **options)


class ListNetLoss(ListLoss, of=listnet_loss):
    pass


class ListMLELoss(ListLoss, of=list_mle_loss):
    pass


class PListMLELoss(ListLoss, of=p_list_mle_loss):
    pass


class ListwiseSoftmaxLoss(ListLoss, of=listwise_softmax_loss):
    pass


class ListwisePoly1Loss(ListLoss, of=listwise_poly1_loss):
    pass


class ListwisePointLoss(ListLoss, of=listwise_point_loss):
    pass


class NeuralNDCGLoss(ListLoss, of=neural_ndcg_loss):
    pass


class ADRMSELoss(ListLoss, of=adr_mse_loss):
    pass


class ApproxNDCGLoss(ListLoss, of=approx_ndcg_loss):
    pass


class GroCoLoss(ListLoss, of=gro_co_loss):
    pass


class KendallLoss(ListLoss, of=kendall_loss):
    pass


class LambdaLoss(ListLoss, of=lambda_loss):
    pass


class RankNetLoss(ListLoss, of=ranknet_loss):
    pass


class SpearmanLoss(ListLoss, of=spearman_loss):
    pass
