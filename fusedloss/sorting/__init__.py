"""Differentiable sorting and ranking."""

from .lapsum import lapsum_rank, lapsum_sort, lapsum_top_k
from .networks import SortingNetwork
