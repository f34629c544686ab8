"""Diffusion on graphs for PyTorch: exact solves with certified errors, and learned cascades of walks.

    y = (1 − µ)(I − µP)⁻¹ s

`diffuse` and `solve` compute it for any transition P; `CascadedWalk` learns to approximate it.
"""

from graphdiff import nn, operators, solvers
from graphdiff.boundary import harmonic, random_walker
from graphdiff.diffusion import diffuse, solve
from graphdiff.estimate import Estimate, estimate
from graphdiff.nn import CascadedWalk, Diffusion, FeatureEmbedding, WalkStep
from graphdiff.operators import (
    AttentionTransition,
    DenseTransition,
    FunctionTransition,
    SparseTransition,
    Transition,
    grid_transition,
)
from graphdiff.ranking import pagerank
from graphdiff.solution import ConvergenceError, ConvergenceWarning, Solution

__all__ = [
    "AttentionTransition",
    "CascadedWalk",
    "ConvergenceError",
    "ConvergenceWarning",
    "DenseTransition",
    "Diffusion",
    "Estimate",
    "FeatureEmbedding",
    "FunctionTransition",
    "Solution",
    "SparseTransition",
    "Transition",
    "WalkStep",
    "diffuse",
    "estimate",
    "grid_transition",
    "harmonic",
    "nn",
    "operators",
    "pagerank",
    "random_walker",
    "solve",
    "solvers",
]
