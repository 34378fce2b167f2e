"""Differentiable sorting and ranking."""

from .entmax import entmax15, sparsemax
from .soft_sort import soft_rank, soft_sort
