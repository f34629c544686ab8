"""The choice of a solver, in one place, with its reason."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from graphdiff.operators.base import Transition
from graphdiff.solvers.base import Iterate, Limits, Problem, Solver, carry_on, norm_of, size
from graphdiff.solvers.bicgstab import BiCGSTAB
from graphdiff.solvers.cg import CG
from graphdiff.solvers.direct import Direct
from graphdiff.solvers.directed_ssor import DirectedSSOR
from graphdiff.solvers.ssor import SSOR
from graphdiff.solvers.walk import Walk

# Below this a factorisation takes milliseconds, whatever the rest.
SMALL = 256
# Above this the matrix and its factors outgrow what a solve should take unasked (1 GB in float64).
LARGEST_DENSE = 8192
# How many walks are watched at a time, and the rate a step above which BiCGSTAB needs fewer products.
WATCHED_STEPS = 4
SLOW = 0.5


@dataclass(frozen=True)
class Auto:
    """Direct for small problems, SSOR, DirectedSSOR or CG for large ones; else walks, or BiCGSTAB if slow.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.AttentionTransition(torch.zeros(3, 2))
        >>> gd.solve(P, torch.ones(3), mu=0.999).reason
        'N = 3: a factorisation costs next to nothing; reached the tolerance'
    """

    def choose(self, operator: Transition, mu: Tensor, channels: int, tol: float) -> tuple[Solver, str]:
        """The solver and why."""
        nodes = operator.shape[-1]
        if nodes * mu.shape[-1] <= SMALL:
            return Direct(), f"N = {nodes}: a factorisation costs next to nothing"
        products = _products(operator, mu, tol)
        # N³/3 multiplications for each µ against N² for a product with each channel.
        if not operator.sparse and nodes <= LARGEST_DENSE and mu.shape[-1] * nodes <= 3 * products * channels:
            return Direct(), f"N = {nodes}: factorising costs less than at most about {products} products"
        if SSOR.suits(operator) and mu.numel() == mu.shape[-2]:
            return (
                SSOR(),
                f"sparse and reversible: at most about {products} products, and usually half of that",
            )
        if operator.reversible:
            return CG(), f"reversible: at most about {products} products"
        if DirectedSSOR.suits(operator) and mu.numel() == mu.shape[-2]:
            return (
                DirectedSSOR(),
                f"sparse, not reversible: walks would take at most about {products} products, and this "
                "usually far fewer",
            )
        return WatchedWalk(), f"not reversible: walks, at most about {products}, unless they turn out slow"


def chosen(
    solver: Solver | Auto | None, operator: Transition, mu: Tensor, channels: int, tol: float
) -> tuple[Solver, str]:
    """The solver that does the work, and why; None leaves it to `Auto`."""
    if solver is None or isinstance(solver, Auto):
        return Auto().choose(operator, mu, channels, tol)
    return solver, "as asked"


def _products(operator: Transition, mu: Tensor, tol: float) -> int:
    """How many products theory promises to be enough for a tolerance."""
    mu = mu.detach()
    largest = rate = float(mu if mu.numel() == 1 else mu.amax())
    if operator.reversible:
        # `rate_of`, without a dozen calls of torch for one number.
        root = math.sqrt((1 if operator.positive_semidefinite else 1 + largest) / (1 - largest))
        rate = (root - 1) / (root + 1)
    return max(1, math.ceil(math.log(min(tol, 0.5) / 2) / math.log(rate))) if rate > 0 else 1


@dataclass(frozen=True)
class WatchedWalk(Solver):
    """Walks, and hands over to BiCGSTAB what shrinks by a factor above `SLOW` a step."""

    def solve(self, state: Problem, rhs: Tensor, initial: Tensor, target: Tensor, limits: Limits) -> Iterate:
        """Walk and watch, and go on with BiCGSTAB where that is faster."""
        walk, norm = Walk(), norm_of(state.operator)
        before = torch.full_like(size(rhs, norm), torch.inf)
        reached = Iterate(initial, *(torch.zeros_like(before.squeeze(-2), dtype=torch.int64),) * 2)
        walking = torch.ones_like(before, dtype=torch.bool)
        slow, watched = torch.zeros_like(walking), 0
        while bool(walking.any()):
            watched += WATCHED_STEPS
            limit = limits.within(torch.full_like(target, watched, dtype=torch.int64))
            further = carry_on(walk, state, rhs, reached, walking, target, limits._replace(steps=limit))
            # Consecutive changes differ by as many walks, so their ratio is the rate of that many.
            change = size(further.x - reached.x, norm)
            goes_on = walking & (further.steps == watched).unsqueeze(-2)
            slow = slow | (goes_on & (change > SLOW**WATCHED_STEPS * before))
            walking, before, reached = goes_on & ~slow, change, further
        return carry_on(BiCGSTAB(), state, rhs, reached, slow, target, limits)

    def __str__(self) -> str:
        return "Walk() or BiCGSTAB()"
