"""Transitions: one file each."""

from graphdiff.operators.attention import AttentionTransition
from graphdiff.operators.base import Transition
from graphdiff.operators.dense import DenseTransition
from graphdiff.operators.function import FunctionTransition
from graphdiff.operators.grid import grid_transition
from graphdiff.operators.permutohedral import GaussianTransition, PermutohedralLattice, gaussian_transition
from graphdiff.operators.sparse import SparseTransition

__all__ = [
    "AttentionTransition",
    "DenseTransition",
    "FunctionTransition",
    "GaussianTransition",
    "PermutohedralLattice",
    "SparseTransition",
    "Transition",
    "gaussian_transition",
    "grid_transition",
]
