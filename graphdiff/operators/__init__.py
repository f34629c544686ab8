"""Transitions: one file each."""

from graphdiff.operators.attention import AttentionTransition
from graphdiff.operators.base import Transition
from graphdiff.operators.dense import DenseTransition
from graphdiff.operators.function import FunctionTransition
from graphdiff.operators.grid import grid_transition
from graphdiff.operators.sparse import SparseTransition

__all__ = [
    "AttentionTransition",
    "DenseTransition",
    "FunctionTransition",
    "SparseTransition",
    "Transition",
    "grid_transition",
]
