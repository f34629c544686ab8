"""estimate: λ₂ and λ_N against dense eigenvalues, counts of products against solves."""

import pytest
import torch
from hypothesis import given

import graphdiff as gd
from tests.graphdiff.zoo import problems


def others(D):
    """The eigenvalues of a dense walk but one 1."""
    values = torch.linalg.eigvals(D)
    keep = (values - 1).abs().argsort(-1)[..., 1:]
    return values.gather(-1, keep)


@given(problems())
def test_the_ends_of_the_spectrum_of_small_walks(problem):
    found = gd.estimate(problem.P, 0.9)
    values = others(problem.dense)
    assert found.lambda_2.shape == problem.P.shape[:-2]
    if problem.P.shape[-1] == 1:
        assert (found.lambda_2 == 0).all()
    elif problem.P.reversible:
        torch.testing.assert_close(found.lambda_2, values.real.amax(-1), rtol=0, atol=2e-2)
        torch.testing.assert_close(found.lambda_n, values.real.amin(-1), rtol=0, atol=2e-2)
    else:
        torch.testing.assert_close(found.lambda_2, values.abs().amax(-1), rtol=0, atol=1e-6)
    transposed = gd.estimate(problem.P.T, 0.9)
    assert torch.equal(transposed.lambda_2, found.lambda_2)


@pytest.mark.parametrize("mu", [0.85, 0.99])
@pytest.mark.parametrize("size", [0.3, 1.5])
def test_the_products_are_about_what_a_solve_takes(mu, size):
    g = torch.Generator().manual_seed(3)
    P = gd.AttentionTransition(size * torch.randn(400, 3, generator=g, dtype=torch.float64))
    s = torch.randn(400, 4, generator=g, dtype=torch.float64)
    found = gd.estimate(P, mu, tol=1e-8)
    for solver in (gd.solvers.Walk(), gd.solvers.CG(), gd.solvers.Chebyshev()):
        taken = int(gd.solve(P, s, mu, solver=solver, tol=1e-8).matvecs.max())
        expected = found.products[type(solver).__name__]
        assert taken <= 1.5 * expected + 2
        assert expected <= 3 * taken + 2
    assert found.measured_with <= 64


def test_with_a_mu_per_node_the_second_eigenvalue_does_not_help():
    P = gd.DenseTransition.from_affinity(torch.ones(200, 200, dtype=torch.float64))
    g = torch.Generator().manual_seed(3)
    mu = 0.9 + 0.09 * torch.rand(200, 1, generator=g, dtype=torch.float64)
    s = torch.randn(200, 1, generator=g, dtype=torch.float64)
    assert gd.estimate(P, 0.99, 1e-6).products["Walk"] < 5
    found = gd.estimate(P, mu, 1e-6).products
    taken = int(gd.solve(P, s, mu, solver=gd.solvers.Walk(), tol=1e-6).matvecs)
    assert 50 < taken <= found["Walk"]


def test_large_graphs_take_a_bounded_number_of_products():
    P = gd.grid_transition(torch.zeros(1, 100, 100, dtype=torch.float64))
    found = gd.estimate(P, torch.tensor([[0.5, 0.999]]))
    assert found.measured_with <= 64
    exact = (1 + torch.cos(torch.tensor(torch.pi / 100))) / 2  # of the path, about that of the grid
    assert float(found.lambda_2) == pytest.approx(float(exact), abs=2e-3)
    assert torch.equal(found.lambda_2, gd.estimate(P, 0.999).lambda_2)


def test_bad_input():
    P = gd.AttentionTransition(torch.randn(4, 2))
    with pytest.raises(TypeError, match="P: expected a Transition, got Tensor"):
        gd.estimate(torch.eye(3), 0.5)
    with pytest.raises(ValueError, match="expected 0 ≤ µ < 1"):
        gd.estimate(P, 1.0)
    with pytest.raises(ValueError, match="tol: expected a finite number > 0"):
        gd.estimate(P, 0.5, tol=-1)
    waiting = gd.SparseTransition.from_edge_index(torch.tensor([[0], [1]]), dangling="restart")
    with pytest.raises(ValueError, match="restarts at a signal"):
        gd.estimate(waiting, 0.5)
