"""Learning to rank: losses on lists of scores, `loss(scores, relevance, *, mask=None, offsets=None, …)`."""

from .listnet_loss import listnet_loss
from .spearman_loss import spearman_loss
