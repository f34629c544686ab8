"""MixedPrecision: float32 inside, float64 outside; any inner solver, any size of signal, every digit."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphdiff as gd
from graphdiff.solvers.base import InnerProduct, Iterate
from tests.graphdiff.zoo import OPERATORS, SOLVERS, applies, oracle

CG = gd.solvers.CG()
MIXED = gd.solvers.MixedPrecision()
INNER = {
    name: solver for name, solver in SOLVERS.items() if name not in ("Auto", "MixedPrecision", "Shifted")
}


def randn(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norm(x, transposed=False):
    return x.abs().sum(-2) if transposed else x.abs().amax(-2)


@pytest.fixture(scope="module")
def grid():
    return gd.grid_transition(randn(3, 30, 30), beta=0.2)


# --- mathematics


@settings(max_examples=50)
@given(
    st.sampled_from(sorted(INNER)),
    st.sampled_from(sorted(OPERATORS)),
    st.integers(0, 2**20),
    st.sampled_from([0.0, 0.3, 0.9, 0.99]),
    st.booleans(),
)
def test_any_solver_inside_keeps_the_promise_of_float64(inner, name, seed, mu, transposed):
    g, kind = torch.Generator().manual_seed(seed), OPERATORS[name]
    P = kind.build(kind.leaf(g, (), 11))
    solver = gd.solvers.MixedPrecision(INNER[inner])
    if not applies(solver, P):
        return
    s = torch.randn(11, 3, generator=g, dtype=torch.float64)
    exact = oracle(P.dense().mT if transposed else P.dense(), s, mu)
    sol = gd.solve(P.T if transposed else P, s, mu, solver=solver, on_failure="ignore")
    slip = 1e-13 * norm(s, transposed) / (1 - mu)
    assert (norm(sol.value - exact, transposed) <= sol.error_bound + slip).all()
    reachable = 5 * torch.as_tensor(P.rounding(torch.float64)) / (1 - mu) <= 1e-10
    assert sol.converged.all() or not reachable.all()


@pytest.mark.parametrize(
    ("mu", "tol", "most"), [(0.5, 1e-12, 1.6), (0.99, 1e-4, 1.2), (0.99, 1e-12, 1.6), (0.9999, 1e-10, 3)]
)
def test_float64_is_reached_in_not_many_more_steps_than_by_the_inner_solver_alone(grid, mu, tol, most):
    s = torch.zeros(900, 3, dtype=torch.float64)
    s[[0, 400, 899], [0, 1, 2]] = 1
    mixed, alone = (gd.pagerank(grid, s, mu, tol=tol, solver=solver) for solver in (MIXED, CG))
    assert mixed.converged.all()
    assert norm(mixed.value - oracle(grid.dense().T, s, mu), True).max() <= tol
    # Each restart forgets the directions, and the nearer µ is to 1 the less a correction may bring.
    assert (mixed.steps <= most * alone.steps + 8).all()


@pytest.mark.parametrize("size", [1e-300, 1e-60, 1e60, 1e300])
def test_signals_beyond_the_range_of_float32(grid, size):
    s = randn(900, 2)
    s[:, 1] *= size
    s[100:, 0] *= 1e-30
    sol = gd.solve(grid, s, 0.9, solver=MIXED)
    exact = oracle(grid.dense(), s / norm(s), 0.9) * norm(s)
    assert sol.converged.all()
    assert (norm(sol.value / norm(s) - exact / norm(s)) <= 1e-10).all()


# --- behaviour


def test_in_float32_it_is_the_inner_solver(grid):
    P, s = grid.to(torch.float32), randn(900, 3).float()
    mixed, alone = (gd.solve(P, s, 0.95, solver=solver) for solver in (MIXED, CG))
    assert torch.equal(mixed.value, alone.value)
    assert torch.equal(mixed.matvecs, alone.matvecs)
    assert mixed.solver == "MixedPrecision(inner=CG())"


def test_products_while_it_iterates_are_in_float32(monkeypatch, grid):
    """All but those of the certificate, of which there is one to each correction."""
    s, seen = randn(900, 2), []
    matmul = gd.SparseTransition.matmul

    def watched(self, y):
        seen.append(y.dtype)
        return matmul(self, y)

    monkeypatch.setattr(gd.SparseTransition, "matmul", watched)
    sol = gd.solve(grid, s, 0.95, solver=MIXED)
    wide = seen.count(torch.float64)
    assert 2 <= wide <= 4
    assert seen.count(torch.float32) >= int(sol.steps.max())
    assert len(seen) <= int(sol.matvecs.max()) + wide


def test_signals_that_help_each_other_are_solved_together(grid):
    block = gd.solvers.MixedPrecision(gd.solvers.BlockCG())
    assert block.together
    assert not MIXED.together
    s = randn(900, 20)
    together, apart = (gd.solve(grid, s, 0.99, solver=solver) for solver in (block, MIXED))
    assert together.converged.all()
    assert together.steps.max() < 0.8 * apart.steps.max()


def test_of_a_sparse_walk_no_bit_depends_on_other_signals(grid):
    s = randn(900, 40)
    many = gd.solve(grid, s, 0.98, solver=MIXED)
    for k in (0, 31, 39):
        alone = gd.solve(grid, s[:, k], 0.98, solver=MIXED)
        assert torch.equal(alone.value, many.value[:, k])
        assert torch.equal(alone.steps, many.steps[k])


def test_a_budget_counts_the_steps_of_all_corrections(grid):
    s = randn(900, 2)
    whole = gd.solve(grid, s, 0.99, solver=MIXED)
    short = int(0.7 * whole.steps.max())
    seen = []
    sol = gd.solve(grid, s, 0.99, solver=MIXED, max_steps=short, on_failure="ignore", progress=seen.append)
    assert int(sol.steps.max()) == short
    assert not sol.converged.all()
    assert (norm(sol.value - oracle(grid.dense(), s, 0.99)) <= sol.error_bound).all()
    told = [report.steps for report in seen]
    assert told[0] == 1
    assert told[-1] == short
    assert all(after - before in (0, 1) for before, after in pairwise(told))
    # Bounds are told in units of the signal, whatever the corrections are solved in.
    assert seen[-1].error_bound < 1e-6 * seen[0].error_bound


def test_an_inner_solver_that_brings_nothing_ends_it(grid):
    @dataclass(frozen=True)
    class Idle(gd.solvers.Solver):
        def solve(self, state, rhs, initial, target, limits):
            nothing = torch.zeros(rhs.shape[-1], dtype=torch.int64)
            return Iterate(initial, nothing, nothing)

    s = randn(900, 2)
    sol = gd.solve(grid, s, 0.9, solver=gd.solvers.MixedPrecision(Idle()), on_failure="ignore")
    assert not sol.converged.any()
    assert (norm(sol.value - oracle(grid.dense(), s, 0.9)) <= sol.error_bound).all()


def test_weights_beyond_the_range_of_float32_are_summed_in_float64():
    """Degrees may differ by any orders of magnitude, and the inner product must see all nodes."""
    weight = torch.logspace(0, -30, 300, dtype=torch.float64).unsqueeze(-1)
    u, v = randn(300, 2).float(), randn(300, 2, seed=4).float()
    u[:250] = 0
    found = InnerProduct(weight, u.shape, torch.float32)(u, v)
    exact = (weight * u.double() * v.double()).sum(-2, keepdim=True)
    torch.testing.assert_close(found, exact, rtol=1e-12, atol=0)
    heavy = weight / 1e-45  # a node's µ may be as small
    found = InnerProduct(heavy, u.shape, torch.float32)(u, v)
    torch.testing.assert_close(found, exact / 1e-45, rtol=1e-12, atol=0)
    alike = InnerProduct(weight.clamp(min=0.1), u.shape, torch.float32)(u, v)
    exact = (weight.clamp(min=0.1) * u.double() * v.double()).sum(-2, keepdim=True)
    torch.testing.assert_close(alike, exact, rtol=1e-5, atol=1e-7)


def test_gradients_are_exact(grid):
    weight, s = torch.rand(7, dtype=torch.float64) + 0.1, randn(6, 2)
    edges = torch.tensor([[0, 1, 2, 3, 4, 0, 2], [1, 2, 3, 4, 5, 5, 5]])

    def value(weight, s, mu):
        P = gd.SparseTransition.from_edge_index(edges, weight, undirected=True)
        return gd.diffuse(P, s, mu, solver=MIXED, tol=1e-12)

    mu = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(value, (weight.requires_grad_(), s.requires_grad_(), mu))


def test_a_walk_that_the_inner_solver_is_not_for():
    P = gd.SparseTransition.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]), dtype=torch.float64)
    with pytest.raises(ValueError, match="solver: CG needs a walk known to be reversible"):
        gd.solve(P, randn(3, 2), 0.9, solver=MIXED)
