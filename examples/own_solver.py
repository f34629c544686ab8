"""Write your own solver: Richardson's iteration with momentum ("heavy ball"), for any reversible walk.

    x ← x + α r + γ (x − x_before),   r = b − (I − µP)x

With the spectrum of I − µP within [l, h], α = (2/(√h + √l))² and γ = ((√h − √l)/(√h + √l))² are the best
(Polyak 1964), and a step leaves about √γ of the error: as CG promises, without inner products.

A solver is a frozen dataclass with `prepare` and `solve`. It hands back an x and how many steps and products
each right-hand side took. The certificate is not its business: the library computes it from x alone.

    python examples/own_solver.py

checks it against a dense solve in float64, forward and backward, and counts products beside other solvers;
then breaks it on purpose and shows what the certificate says. Needs graphdiff alone. Takes seconds.
"""

import argparse
from dataclasses import dataclass
from typing import NamedTuple

import torch

import graphdiff as gd
from graphdiff.solvers.base import Iterate, Solver, bounding, norm_of, size, steps_to


class State(NamedTuple):
    P: gd.Transition
    mu: torch.Tensor
    alpha: torch.Tensor
    gamma: torch.Tensor


@dataclass(frozen=True)
class HeavyBall(Solver):
    """Momentum with the best constants for the spectrum that µ and the facts of P allow."""

    wrong_by: float = 1.0  # a factor on α, to break it with

    def prepare(self, operator, mu):
        """Once for many right-hand sides; mu is [..., 1 or N, 1 or K]."""
        if not operator.reversible or mu.shape[-2] != 1:
            raise ValueError("solver: HeavyBall needs a reversible walk and no µ per node; use BiCGSTAB()")
        low, high = (1 - mu).sqrt(), (1.0 if operator.positive_semidefinite else 1 + mu) ** 0.5
        alpha, gamma = (2 / (high + low)) ** 2, ((high - low) / (high + low)) ** 2
        return State(operator, mu, self.wrong_by * alpha, gamma)

    def solve(self, state, rhs, initial, target, limits):
        """Every right-hand side stops on its own: at its target, at its limit, or where it gains no more."""
        P, mu, alpha, gamma = state
        x, before = initial, initial
        r = rhs - (x - mu * P.matmul(x))
        bounded = bounding(P, mu)
        bound, steps = bounded(r), torch.zeros_like(target, dtype=torch.int64)
        # Steps that theory allows for, and as many again for its constant; never more than the call allows.
        limit = limits.within(2 * steps_to(target, bound, gamma.sqrt()) + 20)
        active, least = (bound > target) & (steps < limit), size(r, norm_of(P))
        while active.any():
            moved = x + alpha * r + gamma * (x - before)
            x, before = torch.where(active, moved, x), torch.where(active, x, before)
            steps = steps + active
            r = rhs - (x - mu * P.matmul(x))
            bound = bounded(r)
            growing = size(r, norm_of(P)) > 1e3 * least  # not what the theory says: stop and let others judge
            active = limits.going_on(active & (bound > target) & (steps < limit) & ~growing, steps, bound)
        return Iterate(x, steps.squeeze(-2), steps.squeeze(-2) + 1)

    def transposed(self, state):
        """What was prepared serves Pᵀ too; without this method the backward prepares anew."""
        return state._replace(P=state.P.T)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--side", type=int, default=20, help="side of the grid of pixels")
    parser.add_argument("--mu", type=float, nargs="+", default=[0.9, 0.99, 0.999], help="values of µ")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    image = torch.rand(1, options.side, options.side, dtype=torch.float64, requires_grad=True)
    P = gd.grid_transition(image, beta=5.0)
    s = torch.randn(options.side**2, 3, dtype=torch.float64)
    g, one = torch.randn_like(s), torch.eye(len(s), dtype=torch.float64)
    print("     µ  solver               products   error    bound  gradient off by")
    for mu in options.mu:
        exact = torch.linalg.solve(one - mu * P.dense(), (1 - mu) * s)
        (exact_gradient,) = torch.autograd.grad((g * exact).sum(), image, retain_graph=True)
        for solver in (HeavyBall(), gd.solvers.Walk(), gd.solvers.Chebyshev(), gd.solvers.CG()):
            sol = gd.solve(P, s, mu, solver=solver, tol=1e-8)
            (gradient,) = torch.autograd.grad((g * sol.value).sum(), image, retain_graph=True)
            error, bound = float((sol.value - exact).detach().abs().max()), float(sol.error_bound.max())
            off = float((gradient - exact_gradient).abs().max() / exact_gradient.abs().max())
            name = sol.solver.split("(")[0]
            print(f"{mu:6g}  {name:<20} {int(sol.matvecs.max()):8d}  {error:.1e}  {bound:.1e}  {off:.1e}")
            assert sol.converged.all()
            assert error <= bound
            assert off < 1e-4

    broken = gd.solve(P, s, 0.9, solver=HeavyBall(wrong_by=3.0), tol=1e-8, on_failure="ignore")
    exact = torch.linalg.solve(one - 0.9 * P.dense(), 0.1 * s)
    error, bound = float((broken.value - exact).detach().abs().max()), float(broken.error_bound.max())
    told = "converged" if broken.converged.all() else "not converged"
    print(f"with an α three times too large: {told}; error {error:.1e}, bound {bound:.1e}: {broken.reason}")
    assert error <= bound
    assert not broken.converged.any()


if __name__ == "__main__":
    main()
