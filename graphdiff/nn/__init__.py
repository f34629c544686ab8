"""Modules: the embedding of features, the learned cascade of walks."""

from graphdiff.nn.cascade import CascadedWalk, WalkStep
from graphdiff.nn.embedding import FeatureEmbedding

__all__ = ["CascadedWalk", "FeatureEmbedding", "WalkStep"]
