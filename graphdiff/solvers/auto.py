"""The choice of a solver, in one place, with its reason."""

import math
from dataclasses import dataclass

from torch import Tensor

from graphdiff.operators.base import Transition
from graphdiff.solvers.base import Solver
from graphdiff.solvers.direct import Direct
from graphdiff.solvers.walk import Walk

# Above this the matrix and its factors outgrow what a solve should take unasked (1 GB in float64).
LARGEST_DENSE = 8192


@dataclass(frozen=True)
class Auto:
    """Direct where one factorisation is cheaper than the walks µ may need, else Walk.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.AttentionTransition(torch.zeros(3, 2))
        >>> gd.solve(P, torch.ones(3), mu=0.999).reason
        'N = 3: factorising costs less than 11508 walks; reached the tolerance'
    """

    def choose(self, operator: Transition, mu: Tensor, channels: int, tol: float) -> tuple[Solver, str]:
        """The solver and why: N³/3 multiplications for each µ against 2N² for a walk of each channel."""
        nodes, largest = operator.shape[-1], float(mu.detach().max())
        walks = max(1, math.ceil(math.log(min(tol, 0.5)) / math.log(largest))) if largest > 0 else 1
        if nodes <= LARGEST_DENSE and mu.shape[-1] * nodes <= 6 * walks * channels:
            return Direct(), f"N = {nodes}: factorising costs less than {walks} walks"
        return Walk(), f"N = {nodes}: {walks} walks at most cost less than factorising"
