"""Diffusion on graphs for PyTorch: exact solves with certified errors, and learned cascades of walks.

    y = (1 − µ)(I − µP)⁻¹ s

`diffuse` and `solve` compute it for any transition P; `CascadedWalk` learns to approximate it.
"""

from graphdiff import nn, operators, solvers
from graphdiff.boundary import harmonic, random_walker
from graphdiff.diffusion import diffuse, solve, solve_path
from graphdiff.energy import energy, minimize_energy, solve_symmetric
from graphdiff.estimate import Estimate, estimate
from graphdiff.filters import heat_kernel, polynomial
from graphdiff.nn import CascadedWalk, Diffusion, FeatureEmbedding, WalkStep
from graphdiff.operators import (
    AttentionTransition,
    DenseTransition,
    FunctionTransition,
    GaussianTransition,
    PermutohedralLattice,
    SparseTransition,
    Transition,
    gaussian_transition,
    grid_transition,
)
from graphdiff.ranking import pagerank
from graphdiff.solution import ConvergenceError, ConvergenceWarning, Progress, Solution
from graphdiff.topk import TopK, top_k

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
    "GaussianTransition",
    "PermutohedralLattice",
    "Progress",
    "Solution",
    "SparseTransition",
    "TopK",
    "Transition",
    "WalkStep",
    "diffuse",
    "energy",
    "estimate",
    "gaussian_transition",
    "grid_transition",
    "harmonic",
    "heat_kernel",
    "minimize_energy",
    "nn",
    "operators",
    "pagerank",
    "polynomial",
    "random_walker",
    "solve",
    "solve_path",
    "solve_symmetric",
    "solvers",
    "top_k",
]
