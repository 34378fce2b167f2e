"""Differentiable sorting and ranking."""

from .entmax import entmax15, sparsemax
from .lapsum import lapsum_rank, lapsum_sort, lapsum_top_k
from .networks import SortingNetwork
from .neural_sort import NeuralSort, SoftSort
from .relaxed_permutation import RelaxedPermutation
from .soft_sort import soft_rank, soft_sort
