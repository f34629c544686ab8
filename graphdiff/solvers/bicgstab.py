"""(I − MP) x = b by stabilised biconjugate gradients (van der Vorst 1992), for walks of any kind."""

from dataclasses import dataclass

import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.solvers.base import (
    InnerProduct,
    Iterate,
    Limits,
    Problem,
    Solver,
    bounding,
    carry_on,
    steps_to,
)
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
        batch = checks.broadcast_batch([operator.shape[:-2], rhs.shape[:-2]], "P and s")
        y, image, half, second, spare = (rhs.new_empty(*batch, *rhs.shape[-2:]) for _ in range(5))
        one = torch.ones((), dtype=checks.widest(rhs.device), device=rhs.device)
        # In that dtype, because products of two small or large residuals leave the range of float32.
        dot, bounded, minus = InnerProduct(one, y.shape, one.dtype), bounding(operator, mu), -mu

        def apply(x: Tensor, into: Tensor) -> Tensor:
            return torch.addcmul(x, operator.matmul(x), minus, out=into)

        # What changes at every step is changed where it stands: new memory would cost as much as the sums.
        # What stands there of a signal that is done or broken is of no use, and may be no number.
        y.copy_(initial)
        shadow = rhs - apply(y, image)
        residual, direction = shadow.clone(), shadow.clone()
        best, bound = y + residual, bounded(residual)
        best_bound = bound
        steps = torch.zeros(*rhs.shape[:-2], 1, rhs.shape[-1], dtype=torch.int64, device=rhs.device)
        walks = steps_to(target, bound, mu.amax(-2, keepdim=True))
        limit = limits.within(10 + (walks + 1) // 2)
        active = (bound > target) & (steps < limit)
        product = dot(shadow, residual)
        while bool(active.any()):
            alpha = _quotient(product, dot(shadow, apply(direction, image)))
            torch.addcmul(residual, image, -alpha.to(rhs.dtype), out=half)
            apply(half, second)
            omega = _quotient(dot(second, half), dot(second, second))
            # A vanishing product or step is a breakdown; so is what overflows.
            active = active & (alpha * omega != 0) & torch.isfinite(alpha * omega)
            across, along = alpha.to(rhs.dtype), omega.to(rhs.dtype)
            y.addcmul_(direction, across).addcmul_(half, along)
            torch.addcmul(half, second, -along, out=residual)
            steps = steps + active

            bound = bounded(residual)
            better = active & (bound < best_bound)
            torch.where(better, torch.add(y, residual, out=spare), best, out=best)
            best_bound = torch.where(better, bound, best_bound)
            active = limits.going_on(active & (bound > target) & (steps < limit), steps, bound)
            following = dot(shadow, residual)
            beta = (_quotient(following, product) * _quotient(alpha, omega)).to(rhs.dtype)
            torch.addcmul(residual, direction.addcmul_(image, -along), beta, out=direction)
            product = following

        counts = steps.squeeze(-2)
        reached = Iterate(best, counts, 2 * counts + 1)
        return carry_on(Walk(), state, rhs, reached, best_bound > target, target, limits)


def _quotient(a: Tensor, b: Tensor) -> Tensor:
    return torch.where(b == 0, 0.0, a / b)
