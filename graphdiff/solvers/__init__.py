"""Solvers of (I − MP) x = b: one file each."""

from graphdiff.solvers.auto import Auto
from graphdiff.solvers.base import Solver
from graphdiff.solvers.bicgstab import BiCGSTAB
from graphdiff.solvers.block_cg import BlockCG
from graphdiff.solvers.cg import CG
from graphdiff.solvers.chebyshev import Chebyshev
from graphdiff.solvers.direct import Direct
from graphdiff.solvers.directed_ssor import DirectedSSOR
from graphdiff.solvers.mixed_precision import MixedPrecision
from graphdiff.solvers.multigrid import Multigrid
from graphdiff.solvers.push import Push
from graphdiff.solvers.shifted import Shifted
from graphdiff.solvers.ssor import SSOR
from graphdiff.solvers.walk import Walk

__all__ = [
    "CG",
    "SSOR",
    "Auto",
    "BiCGSTAB",
    "BlockCG",
    "Chebyshev",
    "Direct",
    "DirectedSSOR",
    "MixedPrecision",
    "Multigrid",
    "Push",
    "Shifted",
    "Solver",
    "Walk",
]
