"""PageRank against the dense oracle; its mass, gradients and refusals."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import graphdiff as gd
from tests.graphdiff.zoo import oracle, problems

W = torch.rand(7, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
P = gd.DenseTransition.from_affinity(W)


def distributions(x):
    return x / x.sum(-2, keepdim=True)


# --- mathematics


@settings(max_examples=80)
@given(problems(mus=(0.0, 0.3, 0.85, 0.99)), st.sampled_from([torch.float32, torch.float64]))
def test_the_promise_in_the_1_norm(problem, dtype):
    P, weights = problem.P.to(dtype), problem.s.abs().to(dtype)
    sol = gd.pagerank(P, weights, problem.mu)
    exact = oracle(P.dense().double().mT, distributions(weights.double()), problem.mu)
    assert sol.norm == "one"
    assert sol.converged.all()
    tol = 1e-10 if dtype == torch.float64 else 1e-5
    # The softmax of float32 features is dense() only up to rounding; so is the distribution.
    slack = 100 * torch.finfo(dtype).eps / (1 - problem.mu)
    assert ((sol.value.double() - exact).abs().sum(-2) <= tol + slack).all()
    assert ((sol.value.double().sum(-2) - 1).abs() <= tol + slack).all()
    assert (sol.value > -tol).all()


def test_uniform_unless_told():
    uniform = gd.pagerank(P).value
    exact = oracle(P.P.mT, torch.full((7, 1), 1 / 7, dtype=torch.float64), 0.85).squeeze(-1)
    assert uniform.shape == (7,)
    assert (uniform - exact).abs().sum() <= 1e-10
    assert (
        uniform - gd.pagerank(P, 3 * torch.ones(7, 2, dtype=torch.float64)).value[:, 1]
    ).abs().sum() < 2e-10
    many = gd.DenseTransition.from_affinity(torch.stack([W, W.mT]))
    assert gd.pagerank(many).value.shape == (2, 7)
    assert (gd.pagerank(many).value[0] - uniform).abs().sum() < 2e-10


def test_theory_4_where_a_reversible_walk_hardly_restarts_degrees_rank():
    S = W + W.mT
    degree = S.sum(-1) / S.sum()
    rare = gd.pagerank(gd.DenseTransition.from_affinity(S), mu=1 - 1e-6, tol=1e-6).value
    assert (rare - degree).abs().sum() < 5e-6
    # Restarted at the stationary distribution it stays there, whatever µ is.
    assert (gd.pagerank(gd.DenseTransition.from_affinity(S), degree).value - degree).abs().sum() < 1e-10


def test_one_solve_ranks_for_many():
    units = torch.eye(7, dtype=torch.float64)
    alone = [gd.pagerank(P, units[i], 0.7).value for i in range(7)]
    assert (gd.pagerank(P, units, 0.7).value - torch.stack(alone, -1)).abs().sum(-2).max() < 2e-10
    mus = torch.tensor([[0.1, 0.5, 0.9]], dtype=torch.float64)
    each = gd.pagerank(P, units[:, :3], mus).value
    for k in range(3):
        assert (each[:, k] - gd.pagerank(P, units[k], float(mus[0, k])).value).abs().sum() < 2e-10


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 1e38), (torch.float32, 1e-38), (torch.float64, 1e307)]
)
def test_only_ratios_of_weights_matter(dtype, scale):
    weights = torch.arange(7, dtype=dtype)
    scaled = gd.pagerank(P.to(dtype), scale / 2 * weights).value
    assert (scaled - gd.pagerank(P.to(dtype), weights).value).abs().sum() < 1e-6


def test_arguments_reach_the_solver():
    sol = gd.pagerank(P, solver=gd.solvers.Walk(), max_steps=2, on_failure="ignore")
    assert not sol.converged
    assert sol.steps == 2
    exact = gd.pagerank(P, tol=1e-13, solver=gd.solvers.Direct())
    assert exact.error_bound <= 1e-13
    started = gd.pagerank(P, solver=gd.solvers.Walk(), initial=exact.value)
    assert started.steps <= 1
    with pytest.raises(gd.ConvergenceError):
        gd.pagerank(P, solver=gd.solvers.Walk(), max_steps=1, on_failure="raise")


# --- gradients


def test_gradients_in_weights_mu_and_P():
    weights = torch.rand(
        7, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64
    ).requires_grad_()
    mu = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    affinity = W.clone().requires_grad_()

    def ranked(affinity, weights, mu):
        return gd.pagerank(gd.DenseTransition.from_affinity(affinity), weights, mu, tol=1e-13).value

    assert torch.autograd.gradcheck(ranked, (affinity, weights, mu))
    (g,) = torch.autograd.grad(ranked(affinity, weights, mu)[3].sum(), weights)
    # Only ratios matter, so nothing is to be gained along the weights themselves.
    assert ((g * weights).sum(-2).abs() < 1e-10).all()
    (g,) = torch.autograd.grad(ranked(affinity, weights, mu).sum(), mu)
    assert abs(g) < 1e-10


def test_gradients_of_a_walk_that_restarts_where_it_is_stuck():
    """The signal is in P too: both paths reach the personalization, the weights and µ."""
    edges = torch.tensor([[0, 0, 1, 2, 3], [1, 2, 2, 0, 4]])
    g = torch.Generator().manual_seed(3)
    weight, restart = (0.2 + torch.rand(shape, generator=g, dtype=torch.float64) for shape in ((5,), (5, 2)))
    mu = torch.tensor([[0.6, 0.85]], dtype=torch.float64)

    def ranked(weight, restart, mu):
        walk = gd.SparseTransition.from_edge_index(edges, weight, 5, dangling="restart")
        return gd.pagerank(walk, restart, mu, tol=1e-13, on_failure="ignore").value

    leaves = [x.requires_grad_() for x in (weight, restart, mu)]
    assert gradcheck(ranked, leaves)
    assert gradgradcheck(ranked, leaves, atol=1e-4)


# --- input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((W,), TypeError, r"P: expected a Transition, got Tensor; .*from_affinity\(W\)"),
        ((P.T,), ValueError, r"P: expected a walk, whose rows sum to 1, got TransposedTransition"),
        ((P, torch.zeros(7).double()), ValueError, r"personalization: .* positive sum .* got 1 of 1 that"),
        ((P, torch.eye(7)[:, :2].double() * torch.tensor([0.0, 1.0])), ValueError, r"got 1 of 2 that"),
        ((P, -torch.ones(7).double()), ValueError, r"personalization: expected weights ≥ 0, .* of -1"),
        ((P, torch.full((7,), torch.inf).double()), ValueError, r"personalization: expected finite values"),
        ((P, torch.ones(6).double()), ValueError, r"personalization: expected shape .* N = 7"),
        ((P, torch.ones(7)), TypeError, r"personalization: expected dtype torch.float64 like P"),
        ((P, torch.ones(7, dtype=torch.int64)), TypeError, r"personalization: .* got torch.int64"),
        ((P, torch.ones(7, device="meta").double()), ValueError, r"personalization: expected device cpu"),
        ((P, {0: 1.0}), TypeError, r"personalization: expected a torch.Tensor, got dict"),
        ((P, None, 1.0), ValueError, r"mu: expected 0 ≤ µ < 1"),
        ((P, None, torch.full((7, 1), 0.5)), ValueError, r"mu: .* one µ per ranking, got \[7, 1\]"),
    ],
)  # fmt: skip
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        gd.pagerank(*arguments)
