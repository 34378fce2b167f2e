"""Learning to rank: losses on lists of scores, `loss(scores, relevance, *, mask=None, offsets=None, …)`."""

from .gro_co_loss import gro_co_loss
from .listnet_loss import listnet_loss
