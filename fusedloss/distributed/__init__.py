"""Scores between the features of all ranks of a process group; docs/distributed.md says what it costs."""

from .scores import DistributedScores, similarity_scores

__all__ = ["DistributedScores", "similarity_scores"]
