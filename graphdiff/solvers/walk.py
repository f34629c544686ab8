"""y ← MP y + b: the paper's Eq. 3, repeated until its error is known to be small enough."""

from dataclasses import dataclass

import torch
from torch import Tensor

from graphdiff.solvers.base import Iterate, Limits, Problem, Solver, bounding, steps_to


@dataclass(frozen=True)
class Walk(Solver):
    """Plain walking: one product a step, for any transition and any µ.

    A step leaves at most µ of the error, so the first residual tells how many steps can help: see `solve`.
    Where the walk is reversible, µ one number and the start s, it leaves µ·max(|λ₂|, |λ_N|).

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.AttentionTransition(torch.tensor([[1.0], [0.5], [0.0]], dtype=torch.float64))
        >>> s = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        >>> sol = gd.solve(P, s, mu=0.5, solver=gd.solvers.Walk())
        >>> bool(sol.converged), sol.solver
        (True, 'Walk()')
    """

    def solve(self, state: Problem, rhs: Tensor, initial: Tensor, target: Tensor, limits: Limits) -> Iterate:
        """Walk until the bound of each right-hand side is below its target.

        The first residual bounds the first error by B. From there t steps leave at most µᵗB, so more than
        log(target/B)/log µ of them help only against rounding, and the walk ends there in any case.
        """
        operator, mu = state
        largest = mu.amax(-2, keepdim=True)
        y, bounded = initial, bounding(operator, mu)
        steps = torch.zeros(*rhs.shape[:-2], 1, rhs.shape[-1], dtype=torch.int64, device=rhs.device)
        active = steps < limits.within(torch.ones_like(steps))
        limit: Tensor | None = None
        while True:
            walked = mu * operator.matmul(y) + rhs
            # The residual of y is walked − y, and the walked y has at most µ times its error.
            bound = largest * bounded(walked - y)
            y = torch.where(active, walked, y)
            steps = steps + active
            if limit is None:
                # The certificate may see the error, on the way down, 2/(1 − µ) times larger.
                limit = limits.within(1 + steps_to((1 - largest) / 2 * target, bound, largest))
            active = limits.going_on(active & (bound > target) & (steps < limit), steps, bound)
            if not bool(active.any()):
                counts = steps.squeeze(-2)
                return Iterate(y, counts, counts)
