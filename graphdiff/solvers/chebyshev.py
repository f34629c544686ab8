"""(I − MP) x = b by Chebyshev's semi-iteration, with bounds of the spectrum that cost nothing."""

from dataclasses import dataclass

import torch
from torch import Tensor

from graphdiff.operators.base import Transition
from graphdiff.solvers.base import (
    Iterate,
    Limits,
    Problem,
    Solver,
    bounding,
    check_reversible,
    rate_of,
    spectrum,
    steps_to,
)


@dataclass(frozen=True)
class Chebyshev(Solver):
    """The polynomial in I − MP that is smallest on its whole spectrum; one product a step, no inner products.

    For reversible walks: [1 − µ, 1 + µ] holds the spectrum, [1 − µ, 1] where the affinity is positive
    semi-definite (theory 5). With κ the ratio of the ends the D-norm of the error falls as
    2ρᵗ/(1 + ρ²ᵗ), ρ = (√κ − 1)/(√κ + 1); unlike `CG` it gains nothing from gaps in the spectrum.

    Raises:
        ValueError: The walk is not known to be reversible.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.AttentionTransition(torch.tensor([[2.0], [1.0], [0.0]], dtype=torch.float64))
        >>> s = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        >>> bool(gd.solve(P, s, mu=0.99, solver=gd.solvers.Chebyshev()).converged)
        True
    """

    def prepare(self, operator: Transition, mu: Tensor) -> Problem:
        """Check that the walk is reversible."""
        held = operator.held()
        check_reversible(held, "Chebyshev")
        return Problem(held, mu)

    def solve(self, state: Problem, rhs: Tensor, initial: Tensor, target: Tensor, limits: Limits) -> Iterate:
        """Iterate until the bound of each right-hand side is below its target."""
        operator, mu = state
        low, high = spectrum(operator, mu)
        center = (high + low) / 2
        # At µ = 0 the interval is a point; any small width serves.
        radius = ((high - low) / 2).clamp(min=1e-6)
        sigma = center / radius

        y = initial
        residual = rhs - (y - mu * operator.matmul(y))
        bounded = bounding(operator, mu)
        bound = bounded(residual)
        steps = torch.zeros(*rhs.shape[:-2], 1, rhs.shape[-1], dtype=torch.int64, device=rhs.device)
        # The certificate's norm is not the one that theory bounds: twice the steps leave room for that.
        limit = limits.within(10 + 2 * steps_to(target / 2, bound, rate_of(operator, mu)))
        active = (bound > target) & (steps < limit)
        ratio = 1 / sigma
        direction = residual / center
        while bool(active.any()):
            y = torch.where(active, y + direction, y)
            residual = torch.where(active, residual - (direction - mu * operator.matmul(direction)), residual)
            steps = steps + active
            bound = bounded(residual)
            active = limits.going_on(active & (bound > target) & (steps < limit), steps, bound)
            following = 1 / (2 * sigma - ratio)
            direction = following * ratio * direction + 2 * following / radius * residual
            ratio = following
        # One step of walking more: its product is the one that the certificate computes.
        return Iterate(y + residual, steps.squeeze(-2), steps.squeeze(-2) + 1)
