"""Differentiable sorting and ranking."""

from .entmax import entmax15, sparsemax
