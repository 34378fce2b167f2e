"""Output layers of the spherical family of losses, whose cost does not grow with the number of classes."""

from .dense import linear_loss
from .factored import FactoredLinear
from .linear import Linear
