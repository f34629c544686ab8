"""Solvers of (I − MP) x = b: one file each."""

from graphdiff.solvers.auto import Auto
from graphdiff.solvers.base import Solver
from graphdiff.solvers.direct import Direct
from graphdiff.solvers.walk import Walk

__all__ = ["Auto", "Direct", "Solver", "Walk"]
