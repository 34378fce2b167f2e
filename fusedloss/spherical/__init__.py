"""Output layers with a loss of the spherical family: their training cost does not grow with the number of classes."""

from .factored import FactoredLinear
