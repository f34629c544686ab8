"""Diffusion on graphs for PyTorch: exact solves with certified errors, and learned cascades of walks.

    y = (1 − µ)(I − µP)⁻¹ s

`diffuse` and `solve` compute it for any transition P; `CascadedWalk` learns to approximate it.
"""

from graphdiff import nn, operators, solvers
from graphdiff.diffusion import diffuse, solve
from graphdiff.nn import CascadedWalk, FeatureEmbedding, WalkStep
from graphdiff.operators import AttentionTransition, DenseTransition, SparseTransition, Transition
from graphdiff.ranking import pagerank
from graphdiff.solution import ConvergenceError, ConvergenceWarning, Solution

__all__ = [
    "AttentionTransition",
    "CascadedWalk",
    "ConvergenceError",
    "ConvergenceWarning",
    "DenseTransition",
    "FeatureEmbedding",
    "Solution",
    "SparseTransition",
    "Transition",
    "WalkStep",
    "diffuse",
    "nn",
    "operators",
    "pagerank",
    "solve",
    "solvers",
]
