"""Differentiable sorting and ranking."""

from .relaxed_permutation import NeuralSort, RelaxedPermutation, SoftSort
