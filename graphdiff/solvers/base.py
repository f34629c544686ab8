"""Solving (I − MP) x = b, M = diag(µ): what a solver is, when it stops, and the certificate of its answer.

Everything rests on one fact (theory: the inverse of I − MP is ≥ 0). For row-stochastic P,
(I − MP) 1 = 1 − µ·rowsum, so with the residual r = b − (I − MP) x and q = r / (1 − µ·rowsum)

    min q ≤ x*_i − x_i ≤ max q                           for every node i, in each channel;

for its transpose ‖x* − x‖₁ ≤ ‖r‖₁ / (1 − max µ·rowsum), and x* − x lies between minus the sum of r's
negative part and the sum of its positive part, each divided by the same number.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphdiff.operators.base import Transition
from graphdiff.solution import Norm

# Each refinement gains several digits unless rounding has taken over; more than this never helped.
MAX_REFINEMENTS = 6


class Iterate(NamedTuple):
    """What a solver hands back; shapes [..., N, K], [..., K], [..., K]."""

    x: Tensor
    steps: Tensor
    matvecs: Tensor


@dataclass(frozen=True)
class Solver(ABC):
    """A method for (I − MP) x = b. Frozen, without tolerances: those belong to the call."""

    @abstractmethod
    def prepare(self, operator: Transition, mu: Tensor) -> Any:
        """What can be done once for many right-hand sides. `mu` is [..., 1 or N, 1 or K]."""

    @abstractmethod
    def solve(
        self, state: Any, rhs: Tensor, initial: Tensor, target: Tensor, max_steps: Tensor | None
    ) -> Iterate:
        """An x whose error bound is at most `target` [..., 1, K] where the arithmetic allows.

        Each right-hand side stops on its own, after `max_steps` [..., 1, K] at the latest. Runs without
        autograd, in the dtype of `rhs`.
        """

    def __str__(self) -> str:
        given = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))
        return f"{type(self).__name__}({given})"


class Certified(NamedTuple):
    """An answer and its evidence before the last cast; bounds are [..., 1, K], counts [..., K]."""

    x: Tensor
    lower: Tensor
    upper: Tensor
    error_bound: Tensor
    steps: Tensor
    matvecs: Tensor


def norm_of(operator: Transition) -> Norm:
    """The norm in which the operator's errors are bounded."""
    return "inf" if operator.stochastic == "rows" else "one"


def size(x: Tensor, norm: Norm) -> Tensor:
    """‖x‖ over the nodes of each right-hand side, [..., 1, K]."""
    return x.abs().amax(-2, keepdim=True) if norm == "inf" else x.abs().sum(-2, keepdim=True)


def residual_bound(operator: Transition, mu: Tensor, residual: Tensor) -> Tensor:
    """‖x* − x‖ ≤ this, were there no rounding; [..., 1, K]."""
    return _interval_norm(*_residual_interval(operator, mu, residual), norm_of(operator))


def _residual_interval(operator: Transition, mu: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    """Bounds of the entries of x* − x, both [..., 1, K]; in the 1-norm, total masses below and above 0."""
    remaining = _remaining(operator, mu)
    if norm_of(operator) == "inf":
        q = residual / remaining
        return q.amin(-2, keepdim=True), q.amax(-2, keepdim=True)
    return (
        residual.clamp(max=0).sum(-2, keepdim=True) / remaining,
        residual.clamp(min=0).sum(-2, keepdim=True) / remaining,
    )


def _remaining(operator: Transition, mu: Tensor) -> Tensor:
    """1 − µ·rowsum: node by node for rows; its smallest value, [..., 1, K], for columns."""
    sums = operator.row_sums
    if norm_of(operator) == "one":
        mu = mu.amax(-2, keepdim=True)
        sums = sums.amax(-2, keepdim=True) if isinstance(sums, Tensor) else sums
    return 1 - mu * sums


def _interval_norm(low: Tensor, high: Tensor, norm: Norm) -> Tensor:
    return torch.maximum(low.abs(), high.abs()) if norm == "inf" else high - low


def solve_certified(
    solver: Solver,
    operator: Transition,
    rhs: Tensor,
    mu: Tensor,
    *,
    initial: Tensor,
    atol: Tensor,
    max_steps: int | None,
) -> Certified:
    """Solve in the operator's dtype; certify, and refine where needed, in the dtype of `rhs`.

    Args:
        solver: The solver that does the work.
        operator: P, in the dtype to iterate in.
        rhs: b [..., N, K], in float64 where the device has it.
        mu: µ [..., 1 or N, 1 or K], dtype of `rhs`.
        initial: First guess, shaped and typed like `rhs`.
        atol: Largest error allowed, [..., 1, K], in the norm of the operator.
        max_steps: Most steps a right-hand side may take; None for as many as theory says can help.
    """
    norm = norm_of(operator)
    precise = operator.to(rhs.dtype)
    state = solver.prepare(operator, mu.to(operator.dtype))
    # The last cast to the operator's dtype must still fit.
    allowed = torch.clamp(atol - cast_error(initial, operator.dtype, norm), min=0.25 * atol)
    target = 0.9 * allowed

    x, correction = torch.zeros_like(rhs), rhs
    bound = torch.full_like(atol, torch.inf)
    low, high = -bound, bound
    pending = torch.ones_like(atol, dtype=torch.bool)
    steps = torch.zeros(*rhs.shape[:-2], rhs.shape[-1], dtype=torch.int64, device=rhs.device)
    matvecs = torch.zeros_like(steps)
    for _ in range(1 + MAX_REFINEMENTS):
        left = None if max_steps is None else max_steps - steps.unsqueeze(-2)
        b, guess, goal = (t.to(operator.dtype) for t in (correction, initial, target))
        found = solver.solve(state, b, guess, goal, left)
        refined = x + found.x.to(rhs.dtype)
        residual, new_low, new_high, new_bound = _evidence(precise, mu, rhs, refined)
        steps = steps + torch.where(pending.squeeze(-2), found.steps, 0)
        matvecs = matvecs + torch.where(pending.squeeze(-2), found.matvecs + 1, 0)

        better = pending & (new_bound < bound)
        halved = pending & (new_bound < 0.5 * bound)
        x, low, high, bound = (
            torch.where(better, new, old)
            for new, old in ((refined, x), (new_low, low), (new_high, high), (new_bound, bound))
        )
        # Where a refinement no longer halves the bound, rounding has taken over and none will.
        pending = halved & (bound > allowed)
        if max_steps is not None:
            pending = pending & (steps.unsqueeze(-2) < max_steps)
        if not bool(pending.any()):
            break
        correction = torch.where(pending, residual, 0.0)
        initial = torch.zeros_like(residual)
        # What is left above the target is the certificate's own rounding: make room for it.
        target = 0.1 * target
    return Certified(x, x + low, x + high, bound, steps, matvecs)


def cast_error(x: Tensor, dtype: torch.dtype, norm: Norm) -> Tensor:
    """What rounding x to `dtype` can cost, [..., 1, K]: half a unit in the last place of each entry."""
    return size(x, norm) * (torch.finfo(dtype).eps / 2 if dtype != x.dtype else 0.0)


def _evidence(
    operator: Transition, mu: Tensor, rhs: Tensor, x: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Residual of x, bounds of x* − x, and the bound of its norm, rounding counted."""
    norm, eps, nodes = norm_of(operator), torch.finfo(rhs.dtype).eps, rhs.shape[-2]
    residual = rhs - (x - mu * operator.matmul(x))
    slack = operator.rounding(rhs.dtype) * size(x, norm) + 2 * eps * (2 * size(x, norm) + size(rhs, norm))
    if norm == "one":
        slack = slack + nodes * eps * size(residual, norm)
    low, high = _residual_interval(operator, mu, residual)
    remaining = _remaining(operator, mu).amin(-2, keepdim=True)
    # The quotients by 1 − µ are computed too.
    bound = _interval_norm(low, high, norm)
    extra = slack / remaining + 8 * eps / remaining * bound
    return residual, low - extra, high + extra, bound + extra
