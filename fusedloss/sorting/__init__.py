"""Differentiable sorting and ranking."""

from .soft_sort import soft_rank, soft_sort
