"""Another solver's iterations in float32 for an operator in float64, refined until float64 is reached."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphdiff.operators.base import Transition
from graphdiff.solvers.base import Iterate, Limits, Solver, bounding, remaining_of, size
from graphdiff.solvers.cg import CG

# How many times what float32's rounding hides a correction is to leave, and how much of the error at most.
MARGIN, LEAST_GAIN = 16, 0.1


class Mixed(NamedTuple):
    """The operator in its own dtype, µ [..., 1 or N, 1 or K], and what the inner solver has prepared."""

    operator: Transition
    mu: Tensor
    inner: Any


@dataclass(frozen=True)
class MixedPrecision(Solver):
    """Iterative refinement: corrections are found in float32, residuals and the certificate in float64.

    The answer is as good as any, for each residual is that of the operator as it was given, and what a
    correction leaves is corrected again; every correction gains about as many digits as float32 has above
    1/(1 − µ). For operators in other dtypes the inner solver alone is at work.

    It pays where many signals on a sparse walk are wanted on a CPU, whose product in float32 hardly takes
    longer for 32 of them than for one. For a single signal it costs more than it gains.

    Args:
        inner: The solver that finds corrections.

    Raises:
        ValueError: The inner solver does not apply to such a walk.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.grid_transition(torch.zeros(1, 30, 30, dtype=torch.float64))
        >>> s = torch.eye(900, 32, dtype=torch.float64)
        >>> sol = gd.pagerank(P, s, 0.9, solver=gd.solvers.MixedPrecision())
        >>> sol.solver, bool(sol.converged.all()), bool(sol.error_bound.max() <= 1e-10)
        ('MixedPrecision(inner=CG())', True, True)
    """

    inner: Solver = field(default_factory=CG)

    @property
    def together(self) -> bool:
        """As the inner solver."""
        return self.inner.together

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """float32 for float64."""
        return torch.float32 if dtype == torch.float64 else dtype

    def prepare(self, operator: Transition, mu: Tensor) -> Mixed:
        """What the inner solver makes of the walk in float32, and the walk itself."""
        dtype = self.working_dtype(operator.dtype)
        return Mixed(operator, mu, self.inner.prepare(operator.to(dtype), mu.to(dtype)))

    def transposed(self, state: Mixed) -> Mixed | None:
        """With the inner solver's, if it has one."""
        inner = self.inner.transposed(state.inner)
        return None if inner is None else state._replace(operator=state.operator.T, inner=inner)

    def solve(self, state: Mixed, rhs: Tensor, initial: Tensor, target: Tensor, limits: Limits) -> Iterate:
        """Correct in float32 until the residual in float64 is small enough."""
        operator, mu, inner = state
        dtype = self.working_dtype(rhs.dtype)
        if dtype == rhs.dtype:
            return self.inner.solve(inner, rhs, initial, target, limits)
        bounded, budget = bounding(operator, mu), limits.budget
        remaining = remaining_of(operator, mu).amin(-2, keepdim=True)
        # A residual in float32 is the true one to about eps, hence its error to eps / (1 − µ).
        most = (MARGIN * torch.finfo(dtype).eps / remaining).clamp(max=LEAST_GAIN)
        x, guess, residual, bound = torch.zeros_like(rhs), initial, rhs, bounded(rhs)
        steps = torch.zeros_like(bound, dtype=torch.int64)
        matvecs, pending, taken = steps, bound > 0, budget.taken
        while bool(pending.any()):
            # What one correction does not reach takes several, each as far as the others.
            ratio = target / bound
            stages = torch.ceil(ratio.log() / most.log())
            goal = torch.where(stages > 1, bound * ratio ** (1 / stages), target)
            # Divided by its largest number float32 can hold it.
            largest = torch.maximum(size(residual, "inf"), size(guess, "inf"))
            unit = torch.where(largest > 0, largest, 1.0)
            b, start, reach = ((t / unit).to(dtype) for t in (residual, guess, goal))
            budget.taken, budget.unit = taken + steps, unit
            found = self.inner.solve(inner, b, start, reach, limits.less(steps.squeeze(-2)))
            budget.taken, budget.unit = taken, 1.0
            x = torch.addcmul(x, found.x.to(rhs.dtype), unit)
            steps = steps + torch.where(pending, found.steps.unsqueeze(-2), 0)
            matvecs = matvecs + torch.where(pending, found.matvecs.unsqueeze(-2), 0)
            pending = pending & (goal > target) & (limits.within(steps + 1) > steps)
            if budget.timed_out or not bool(pending.any()):
                break
            residual = (operator.matmul(x) * mu).sub_(x).add_(rhs)
            before, bound = bound, bounded(residual)
            matvecs = matvecs + pending
            # Where no half of it goes, none will.
            pending = pending & (bound > target) & (bound < 0.5 * before)
            residual, guess = torch.where(pending, residual, 0.0), rhs.new_zeros(()).expand_as(rhs)
        return Iterate(x, steps.squeeze(-2), matvecs.squeeze(-2))
