"""Learning to rank: losses on lists of scores, `loss(scores, relevance, *, mask=None, offsets=None, …)`."""

from .adr_mse_loss import adr_mse_loss
from .approx_ndcg_loss import approx_ndcg_loss
from .kendall_loss import kendall_loss
from .lambda_loss import lambda_loss
from .listnet_loss import listnet_loss
from .ranknet_loss import ranknet_loss
from .spearman_loss import spearman_loss
