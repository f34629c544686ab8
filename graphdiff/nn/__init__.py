"""Modules: the embedding of features, the learned cascade of walks, the exact layer."""

from graphdiff.nn.cascade import CascadedWalk, WalkStep
from graphdiff.nn.diffusion import Diffusion
from graphdiff.nn.embedding import FeatureEmbedding

__all__ = ["CascadedWalk", "Diffusion", "FeatureEmbedding", "WalkStep"]
