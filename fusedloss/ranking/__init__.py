"""Learning to rank: losses on lists of scores, `loss(scores, relevance, *, mask=None, offsets=None, …)`.

One file each, with formula, citation, function, `reference` (of one list, dense, plain PyTorch) and `CASES`.
"""

from importlib import import_module
from pkgutil import iter_modules
from types import ModuleType

from .adr_mse_loss import adr_mse_loss
from .approx_ndcg_loss import approx_ndcg_loss
from .gro_co_loss import gro_co_loss
from .kendall_loss import kendall_loss
from .lambda_loss import lambda_loss
from .list_mle_loss import list_mle_loss
from .listnet_loss import listnet_loss
from .listwise_point_loss import listwise_point_loss
from .listwise_poly1_loss import listwise_poly1_loss
from .listwise_softmax_loss import listwise_softmax_loss
from .neural_ndcg_loss import neural_ndcg_loss
from .p_list_mle_loss import p_list_mle_loss
from .ranknet_loss import ranknet_loss
from .spearman_loss import spearman_loss


def losses() -> tuple[ModuleType, ...]:
    """The files of the losses, by name."""
    names = sorted(m.name for m in iter_modules(__path__) if m.name.endswith("_loss") and m.name != "list_loss")
    return tuple(import_module(f"{__name__}.{name}") for name in names)
