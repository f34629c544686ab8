"""Transitions: one file each."""

from graphdiff.operators.attention import AttentionTransition
from graphdiff.operators.base import Transition
from graphdiff.operators.dense import DenseTransition
from graphdiff.operators.sparse import SparseTransition

__all__ = ["AttentionTransition", "DenseTransition", "SparseTransition", "Transition"]
