"""How a solve ends: cut short it gives what it has; bad solvers and rounding are told apart."""

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graphdiff as gd
from graphdiff.solvers.base import Iterate, Solver
from tests.graphdiff.zoo import oracle

SHORT = "the solver stopped short of the tolerance, above what rounding in float64 hides"


@dataclass(frozen=True)
class Broken(Solver):
    """Answers with noise of a given size, whatever was asked."""

    size: float

    def solve(self, state, rhs, initial, target, limits):
        counts = torch.ones_like(rhs[..., 0, :], dtype=torch.int64)
        noise = torch.randn(rhs.shape, dtype=rhs.dtype, generator=torch.Generator().manual_seed(5))
        return Iterate(self.size * noise, counts, counts)


def walk(seed, nodes=12, channels=2):
    g = torch.Generator().manual_seed(seed)
    P = gd.DenseTransition(torch.softmax(3 * torch.randn(nodes, nodes, generator=g, dtype=torch.float64), -1))
    return P, torch.randn(nodes, channels, generator=g, dtype=torch.float64)


@given(
    seed=st.integers(0, 10**6),
    steps=st.integers(1, 4),
    mu=st.sampled_from([0.3, 0.9, 0.99]),
    transposed=st.booleans(),
)
def test_walks_cut_short_are_walks_with_an_honest_bound(seed, steps, mu, transposed):
    """Eq. 3 so many times, although nothing known of it may be better than the bound of 0."""
    P, s = walk(seed)
    P = P.T if transposed else P
    y = s
    for _ in range(steps):
        y = mu * (P @ y) + (1 - mu) * s
    sol = gd.solve(P, s, mu, solver=gd.solvers.Walk(), max_steps=steps, on_failure="ignore")
    assert torch.allclose(sol.value, y, rtol=1e-12, atol=1e-13)
    exact = oracle(P.dense(), s, mu)
    error = (sol.value - exact).abs()
    assert ((error.sum(0) if transposed else error.amax(0)) <= sol.error_bound).all()
    assert (sol.lower <= exact).all()
    assert (exact <= sol.upper).all()
    if not transposed:  # y and y* both lie within the range of s
        assert (sol.error_bound <= (1 + 1e-9) * (s.amax(0) - s.amin(0))).all()
    assert not sol.converged.any()


def test_a_walk_cut_short_has_the_gradient_in_reach():
    P, s = walk(3)
    s.requires_grad_()
    with pytest.warns(gd.ConvergenceWarning, match=r"max_steps = 1.*raise max_steps or loosen tol"):
        sol = gd.solve(P, s, 0.9, solver=gd.solvers.Walk(), max_steps=1)
    with pytest.warns(gd.ConvergenceWarning, match=r"gradient of a solve.*raise max_steps or loosen tol"):
        sol.value.sum().backward()
    assert bool(s.grad.abs().max() > 0)


def test_where_0_is_good_enough_it_may_be_the_answer():
    P, s = walk(3)
    sol = gd.solve(P, s, 0.9, solver=gd.solvers.Walk(), max_steps=1, tol=1.5)
    assert sol.converged.all()
    assert (sol.error_bound <= 1.5 * s.abs().amax(0)).all()


def test_a_first_guess_of_0_is_left_only_for_a_better_answer():
    P, s = walk(3)
    sol = gd.solve(P, s, 0.9, solver=Broken(1.0), initial=torch.zeros_like(s), on_failure="ignore")
    assert not sol.value.any()
    assert torch.allclose(sol.error_bound, s.abs().amax(0))


@pytest.mark.parametrize("transposed", [False, True])
def test_an_answer_that_must_be_worse_than_0_is_not_given(transposed):
    P, s = walk(3)
    P = P.T if transposed else P
    sol = gd.solve(P, s, 0.9, solver=Broken(1e6), on_failure="ignore")
    assert not sol.value.any()
    assert torch.allclose(sol.error_bound, s.abs().sum(0) if transposed else s.abs().amax(0))
    sol = gd.solve(P, s, 0.9, solver=Broken(torch.nan), on_failure="ignore")
    assert not sol.value.any()
    assert sol.error_bound.isfinite().all()
    assert not sol.converged.any()


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_a_broken_solver_is_not_excused_by_rounding(size):
    P, s = walk(3)
    s.requires_grad_()
    with pytest.warns(gd.ConvergenceWarning, match=f"{SHORT}.*; try another solver or loosen tol"):
        sol = gd.solve(P, s, 0.9, solver=Broken(size))
    assert sol.reason == f"as asked; {SHORT}"
    with pytest.warns(
        gd.ConvergenceWarning, match=r"gradient of a solve.*; try another solver or loosen tol"
    ):
        sol.value.sum().backward()


def test_a_broken_solver_is_not_excused_by_rounding_in_float32():
    P, s = walk(3)
    sol = gd.solve(P.to(torch.float32), s.float(), 0.9, solver=Broken(1.0), on_failure="ignore")
    assert sol.reason == f"as asked; {SHORT.replace('float64', 'float32')}"


@pytest.mark.parametrize(
    ("solver", "mu"),
    [
        (gd.solvers.Walk(), 0.9),
        *((s, mu) for s in (gd.solvers.Direct(), gd.solvers.BiCGSTAB()) for mu in (0.5, 1 - 1e-9)),
    ],
)
def test_rounding_is_not_blamed_on_a_solver(solver, mu):
    P, s = walk(3, nodes=40)
    with pytest.warns(gd.ConvergenceWarning, match="rounding in float64 allows no more.*; loosen tol"):
        sol = gd.solve(P, s, mu, solver=solver, tol=1e-18)
    assert sol.reason == "as asked; rounding in float64 allows no more"


def line(nodes=8):
    path = torch.stack([torch.arange(nodes - 1), torch.arange(1, nodes)])
    P = gd.SparseTransition.from_edge_index(path, undirected=True, dtype=torch.float64)
    ends = torch.zeros(nodes, dtype=torch.bool)
    ends[[0, -1]] = True
    return P, torch.arange(nodes, dtype=torch.float64), ends


@pytest.mark.parametrize("size", [1e-3, 1e6, torch.nan])
def test_harmonic_does_not_excuse_a_broken_solver(size):
    with pytest.warns(gd.ConvergenceWarning, match=f"{SHORT}.*; try another solver or loosen tol"):
        sol = gd.harmonic(*line(), solver=Broken(size))
    assert sol.reason.endswith(f"; {SHORT}")
    assert ((sol.value - torch.arange(8.0)).abs() <= sol.error_bound).all()
    assert bool(((sol.value >= 0) & (sol.value <= 7)).all())


def test_harmonic_does_not_blame_a_solver_for_rounding():
    with pytest.warns(gd.ConvergenceWarning, match="rounding in float64 allows no more.*; loosen tol"):
        sol = gd.harmonic(*line(100), tol=1e-18, solver=gd.solvers.Direct())
    assert sol.reason.endswith("; rounding in float64 allows no more")
    # A drift away from the clamped node, so strong that walks take more steps than float64 can tell.
    nodes = torch.arange(60)
    edges = torch.cat([torch.stack([nodes[:-1], nodes[1:]]), torch.stack([nodes[1:], nodes[:-1]])], 1)
    weight = torch.cat([torch.full((59,), 4.0), torch.ones(59)]).double()
    P = gd.SparseTransition.from_edge_index(edges, weight)
    with pytest.warns(gd.ConvergenceWarning, match="no more"):
        sol = gd.harmonic(P, nodes.double(), nodes < 2, solver=gd.solvers.Direct())
    assert "no bound of the steps to a clamped node was found; rounding in float64 allows" in sol.reason
