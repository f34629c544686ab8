"""Transitions: one file each."""

from graphdiff.operators.attention import AttentionTransition
from graphdiff.operators.base import Transition
from graphdiff.operators.dense import DenseTransition

__all__ = ["AttentionTransition", "DenseTransition", "Transition"]
