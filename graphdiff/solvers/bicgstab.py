"""(I − MP) x = b by stabilised biconjugate gradients (van der Vorst 1992), for walks of any kind."""

from dataclasses import dataclass

import torch
from torch import Tensor

from graphdiff.solvers.base import Iterate, Limits, Problem, Solver, bounding, carry_on, inner, steps_to
from graphdiff.solvers.walk import Walk


@dataclass(frozen=True)
class BiCGSTAB(Solver):
    """A Krylov method for directed walks: two products a step, and in all usually far fewer than walking.

    Its residuals do not fall steadily and no theory bounds their number. Where it breaks down or has used
    the products that walking would have needed, walking goes on from the best answer so far, and that
    cannot fail.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.DenseTransition(torch.tensor([[0.0, 1.0, 0.0], [0.5, 0.0, 0.5], [0.9, 0.1, 0.0]]))
        >>> gd.solve(P, torch.tensor([1.0, 0.0, 0.0]), mu=0.9, solver=gd.solvers.BiCGSTAB()).solver
        'BiCGSTAB()'
    """

    def solve(self, state: Problem, rhs: Tensor, initial: Tensor, target: Tensor, limits: Limits) -> Iterate:
        """Iterate until the bound of each right-hand side is below its target."""
        operator, mu = state
        one = torch.ones((), dtype=torch.float32 if rhs.device.type == "mps" else torch.float64)
        one = one.to(rhs.device)

        def apply(y: Tensor) -> Tensor:
            return y - mu * operator.matmul(y)

        def dot(u: Tensor, v: Tensor) -> Tensor:
            return inner(one, u, v)

        y, bounded = initial, bounding(operator, mu)
        residual = shadow = direction = rhs - apply(y)
        best, bound = y + residual, bounded(residual)
        best_bound = bound
        steps = torch.zeros(*rhs.shape[:-2], 1, rhs.shape[-1], dtype=torch.int64, device=rhs.device)
        walks = steps_to(target, bound, mu.amax(-2, keepdim=True))
        limit = limits.within(10 + (walks + 1) // 2)
        active = (bound > target) & (steps < limit)
        product = dot(shadow, residual)
        while bool(active.any()):
            image = apply(direction)
            alpha = _quotient(product, dot(shadow, image))
            half = residual - alpha.to(rhs.dtype) * image
            second = apply(half)
            omega = _quotient(dot(second, half), dot(second, second))
            # A vanishing product or step is a breakdown; so is what overflows.
            broken = active & ((alpha * omega == 0) | ~torch.isfinite(alpha * omega))
            active = active & ~broken
            alpha, omega = (torch.where(active, q, 0.0) for q in (alpha, omega))
            narrow = alpha.to(rhs.dtype), omega.to(rhs.dtype)
            y = torch.where(active, y + narrow[0] * direction + narrow[1] * half, y)
            residual = torch.where(active, half - narrow[1] * second, residual)
            steps = steps + active

            bound = bounded(residual)
            better = active & (bound < best_bound)
            best = torch.where(better, y + residual, best)
            best_bound = torch.where(better, bound, best_bound)
            active = limits.going_on(active & (bound > target) & (steps < limit), steps, bound)
            following = dot(shadow, residual)
            beta = (_quotient(following, product) * _quotient(alpha, omega)).to(rhs.dtype)
            direction = torch.where(active, residual + beta * (direction - narrow[1] * image), direction)
            product = following

        counts = steps.squeeze(-2)
        reached = Iterate(best, counts, 2 * counts + 1)
        return carry_on(Walk(), state, rhs, reached, best_bound > target, target, limits)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0.0, a / b)
