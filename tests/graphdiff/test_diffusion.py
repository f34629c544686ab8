"""y = (1 − µ)(I − µP)⁻¹ s: the promise, the certificate, and what theory says of y (theory 1-5)."""

import copy
import itertools
import math
import pickle
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import graphdiff as gd
from graphdiff.solvers import base
from graphdiff.solvers.auto import WatchedWalk
from graphdiff.solvers.base import Budget, Limits
from tests.graphdiff.zoo import OPERATORS, SOLVERS, Problem, applies, oracle, problems, to_the_last_digit

solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
# Reversible walks whose degrees do not differ beyond what the D-norm can see.
WELL_WEIGHTED = (
    "symmetric",
    "path",
    "star",
    "disconnected",
    "sparse path",
    "isolated node",
    "grid",
    "function",
    "flat attention",
    "scaled attention",
)


def norm(x, transposed):
    return x.abs().sum(-2) if transposed else x.abs().amax(-2)


def check_promise(problem: Problem, solver, transposed, dtype, tol=None):
    """The true error against the oracle is within error_bound, and that within tol·‖s‖."""
    assume(applies(solver, problem.P))
    P = problem.P.to(dtype)
    # The promise is for the problem of the given, rounded, input values.
    D = P.to(torch.float64).dense()
    P, D = (P.T, D.mT) if transposed else (P, D)
    s = problem.s.to(dtype)
    exact = oracle(D, s, problem.mu)
    tol = tol or {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    sol = gd.solve(P, s, problem.mu, solver=solver, tol=tol, on_failure="ignore")
    error = norm(sol.value.double() - exact, transposed)
    # Logits of several hundred are themselves rounded by more than some tolerances allow at µ near 1.
    reachable = 5 * torch.as_tensor(P.rounding(torch.float64)) / (1 - problem.mu) <= tol
    assert (sol.converged | ~reachable.reshape(*reachable.shape[:-2], -1)).all()
    assert torch.equal(sol.converged, sol.error_bound <= tol * norm(s.double(), transposed))
    # The oracle itself is right to about 1e-13.
    slip = 1e-13 * norm(s.double(), transposed) / (1 - problem.mu)
    assert (error <= sol.error_bound + slip).all()
    assert (sol.lower.double() <= exact + slip.unsqueeze(-2)).all()
    assert (sol.upper.double() >= exact - slip.unsqueeze(-2)).all()
    assert sol.value.dtype == dtype
    assert sol.norm == ("one" if transposed else "inf")


@solvers
@given(problem=problems(), transposed=st.booleans())
def test_true_error_is_within_the_bound_and_the_bound_within_tol(solver, problem, transposed):
    check_promise(problem, solver, transposed, torch.float64)


@solvers
@given(problem=problems(), transposed=st.booleans())
def test_float32_keeps_the_same_promise(solver, problem, transposed):
    check_promise(problem, solver, transposed, torch.float32)


def random_instances(name, dtype, transposed, g):
    """Graphs in a batch, or one after another, with several signals and µ between 0 and .99."""
    kind, n = OPERATORS[name], int(torch.randint(1, 13, (), generator=g))
    graphs = [kind.leaf(g, (4,), n)] if kind.batched else [kind.leaf(g, (), n) for _ in range(2)]
    for leaf in graphs:
        P = kind.build(leaf).to(dtype)
        s = torch.randn(*(P.shape[:-2] or (2,)), n, 3, generator=g, dtype=torch.float64)
        mu = 1 - 10.0 ** (-2 * torch.rand(1, 3, generator=g, dtype=torch.float64))
        yield (P.T if transposed else P), (s * 10.0 ** torch.randint(-3, 4, (3,), generator=g)).to(dtype), mu


def test_thousands_of_random_problems_keep_the_promise():
    """Operators × solvers × precisions × both directions; no certificate is below the true error."""
    g, count = torch.Generator().manual_seed(3), 0
    for name, solver, dtype, transposed in itertools.product(
        OPERATORS, SOLVERS.values(), (torch.float32, torch.float64), (False, True)
    ):
        for P, s, mu in random_instances(name, dtype, transposed, g):
            if not applies(solver, P):
                continue
            mu = mu if applies(solver, P, mus=3) else mu[..., :1]
            exact = oracle(P.to(torch.float64).dense(), s, mu)
            tol = 1e-4 if dtype == torch.float32 else 1e-7
            sol = gd.solve(P, s, mu, solver=solver, tol=tol)
            size = norm(s.double(), transposed)
            slip = 1e-12 * size / (1 - mu).amax(-2)
            assert sol.converged.all(), (name, solver, dtype, transposed)
            assert (sol.error_bound <= tol * size).all(), (name, solver, dtype, transposed)
            error = norm(sol.value.double() - exact, transposed)
            assert (error <= sol.error_bound + slip).all(), (name, solver, dtype, transposed)
            count += error.numel()
    assert count >= 2000


@solvers
@given(problem=problems(batches=((),), mus=(0.3, 0.85, 0.99)), transposed=st.booleans())
def test_the_certificate_holds_to_the_last_digit(solver, problem, transposed):
    """Where rounding is all that is left of the error, the bound still covers it."""
    assume(applies(solver, problem.P))
    if "attention" in problem.name:
        psi = problem.leaf.numpy().astype(np.longdouble)
        logits = np.longdouble(problem.P.scale) * psi @ psi.T
        D = np.exp(logits - logits.max(-1, keepdims=True))
        D = D / D.sum(-1, keepdims=True)
    else:
        D = problem.P.dense().numpy().astype(np.longdouble)
    P, D = (problem.P.T, D.T) if transposed else (problem.P, D)
    sol = gd.solve(P, problem.s, problem.mu, solver=solver, tol=1e-17, on_failure="ignore")
    exact = to_the_last_digit(D, problem.s, problem.mu)
    error = np.abs(sol.value.numpy() - exact)
    error = error.sum(0) if transposed else error.max(0)
    assert (error <= sol.error_bound.numpy()).all()
    assert (sol.lower.numpy() <= exact).all()
    assert (sol.upper.numpy() >= exact).all()


@given(problem=problems(mus=(0.3, 0.9)), tol=st.sampled_from([1e-2, 1e-4, 1e-8]), transposed=st.booleans())
def test_the_promise_follows_tol(problem, tol, transposed):
    check_promise(problem, gd.solvers.Walk(), transposed, torch.float64, tol)


@given(problems(mus=(0.3, 0.99, 0.999999)))
def test_theory_1_the_inverse_exists_and_has_norm_one_over_one_minus_mu(problem):
    n = problem.s.shape[-2]
    inverse = torch.linalg.inv(torch.eye(n, dtype=torch.float64) - problem.mu * problem.P.dense())
    norms = inverse.abs().sum(-1).amax(-1)
    torch.testing.assert_close(norms * (1 - problem.mu), torch.ones_like(norms), rtol=1e-9, atol=0)


@given(problems(mus=(0.3, 0.85)))
def test_theory_2_a_walk_from_s_needs_no_more_steps_than_known_beforehand(problem):
    tol, s = 1e-6, problem.s
    sol = gd.solve(problem.P, s, problem.mu, solver=gd.solvers.Walk(), tol=tol)
    spread = s.amax(-2) - s.amin(-2)
    known = torch.log(tol * norm(s, False) / spread.clamp(min=1e-300)) / math.log(problem.mu)
    # The certificate sees the residual, which a priori bounds the error twice over, and keeps a tenth.
    late = math.ceil(math.log(2.5 / (1 - problem.mu)) / -math.log(problem.mu))
    assert (sol.steps <= known.clamp(min=0).ceil() + late + 1).all()
    first = norm(s - oracle(problem.dense, s, problem.mu), False)
    assert (first <= problem.mu * spread + 1e-12 * norm(s, False)).all()


@given(problems(mus=(0.3, 0.85)))
def test_theory_2_the_error_shrinks_by_mu_a_step(problem):
    exact = oracle(problem.dense, problem.s, problem.mu)
    y = problem.s
    for t in range(8):
        error = norm(y - exact, False)
        allowed = problem.mu**t * norm(problem.s - exact, False) + 1e-12 * norm(problem.s, False)
        assert (error <= allowed).all()
        y = problem.mu * (problem.P @ y) + (1 - problem.mu) * problem.s


@solvers
@given(problem=problems())
def test_theory_4_maximum_principle_and_constants(solver, problem):
    assume(applies(solver, problem.P))
    s = problem.s
    y = gd.diffuse(problem.P, s, problem.mu, solver=solver)
    slack = 1e-10 * norm(s, False).unsqueeze(-2)
    assert (y >= s.amin(-2, keepdim=True) - slack).all()
    assert (y <= s.amax(-2, keepdim=True) + slack).all()
    constant = torch.full_like(s, 3.0)
    torch.testing.assert_close(
        gd.diffuse(problem.P, constant, problem.mu, solver=solver), constant, rtol=1e-10, atol=0
    )


@solvers
@given(problem=problems())
def test_theory_4_transpose_conserves_mass(solver, problem):
    assume(applies(solver, problem.P))
    y = gd.diffuse(problem.P.T, problem.s, problem.mu, solver=solver)
    size = float(norm(problem.s, True).max())
    torch.testing.assert_close(y.sum(-2), problem.s.sum(-2), rtol=0, atol=1e-10 * size)


@given(problems(batches=((),)))
def test_theory_4_linear_in_s_and_equivariant_under_relabelling(problem):
    s, other = problem.s, problem.s.flip(-1) ** 2
    P, mu, size = problem.P, problem.mu, float(problem.s.abs().max() + (problem.s**2).max())
    close = {"rtol": 0, "atol": 1e-9 * size}
    y, z = gd.diffuse(P, s, mu), gd.diffuse(P, other, mu)
    torch.testing.assert_close(gd.diffuse(P, 2 * s - other, mu), 2 * y - z, **close)
    order = torch.randperm(s.shape[-2], generator=torch.Generator().manual_seed(11))
    relabelled = gd.DenseTransition(P.dense()[order][:, order])
    torch.testing.assert_close(gd.diffuse(relabelled, s[order], mu), y[order], **close)


def test_theory_4_limits_in_mu():
    W = torch.rand(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    P = gd.DenseTransition.from_affinity(W + W.T)
    s = torch.arange(6, dtype=torch.float64)
    torch.testing.assert_close(gd.diffuse(P, s, 0.0), s)
    torch.testing.assert_close(gd.diffuse(P, s, 1e-9), s, rtol=0, atol=1e-7)
    stationary = P.log_degree.exp() / P.log_degree.exp().sum()
    near_one = gd.diffuse(P, s, 1 - 1e-5, tol=1e-8)
    torch.testing.assert_close(near_one, (stationary @ s).expand(6), rtol=0, atol=1e-3)


def test_theory_4_the_transpose_is_another_world():
    """On a star the inverse of I − µPᵀ is 95 times larger in the ∞-norm than in the 1-norm."""
    A = torch.zeros(201, 201, dtype=torch.float64)
    A[0, 1:] = A[1:, 0] = 1
    P = gd.DenseTransition.from_affinity(A)
    inverse = torch.linalg.inv(torch.eye(201, dtype=torch.float64) - 0.9 * P.P.T)
    assert float(inverse.abs().sum(0).max()) == pytest.approx(10)
    assert float(inverse.abs().sum(1).max()) == pytest.approx(953, abs=0.5)
    s = torch.zeros(201, dtype=torch.float64)
    s[3] = 1
    sol = gd.solve(P.T, s, 0.9)
    assert (sol.value - oracle(P.P.T, s[:, None], 0.9)[:, 0]).abs().sum() <= sol.error_bound <= 1e-10


@given(problems(names=("symmetric", "path", "flat attention", "sharp attention"), mus=(0.3, 0.99)))
def test_theory_5_spectrum_of_reversible_walks(problem):
    D = problem.dense
    eigenvalues = torch.linalg.eigvals(torch.eye(D.shape[-1], dtype=torch.float64) - problem.mu * D)
    assert eigenvalues.imag.abs().max() < 1e-6
    upper = 1 if problem.P.positive_semidefinite else 1 + problem.mu
    assert eigenvalues.real.min() > 1 - problem.mu - 1e-9
    assert eigenvalues.real.max() < upper + 1e-9


@pytest.mark.parametrize("solver", [gd.solvers.Chebyshev(), gd.solvers.CG(), gd.solvers.BlockCG()], ids=str)
@given(problem=problems(names=WELL_WEIGHTED, mus=(0.3, 0.9, 0.99)), steps=st.integers(1, 12))
def test_theory_5_krylov_methods_converge_as_proved(solver, problem, steps):
    """2ρᵗ/(1 + ρ²ᵗ) of the first error, in the D-norm for Chebyshev, in the energy norm for CG."""
    P, s, mu = problem.P, problem.s, torch.full((1, 1), problem.mu, dtype=torch.float64)
    for Q, D in ((P, problem.dense), (P.T, problem.dense.mT)):
        weight = (Q.log_degree - Q.log_degree.amax(-1, keepdim=True)).exp().unsqueeze(-1)
        exact = oracle(D, s, problem.mu)

        def size(e, weight=weight, D=D):
            other = e if isinstance(solver, gd.solvers.Chebyshev) else e - mu * (D @ e)
            return (weight * e * other).sum(-2).clamp(min=0).sqrt()

        never = torch.full((*exact.shape[:-2], 1, exact.shape[-1]), 1e-300, dtype=torch.float64)
        budget = torch.full_like(never, steps, dtype=torch.int64)
        start = s.expand_as(exact)
        found = solver.solve(solver.prepare(Q, mu), (1 - mu) * start, start, never, Limits(budget, Budget()))
        condition = (1 if P.positive_semidefinite else 1 + problem.mu) / (1 - problem.mu)
        rho = (condition**0.5 - 1) / (condition**0.5 + 1)
        allowed = 2 * rho**steps / (1 + rho ** (2 * steps))
        first = size(start - exact)
        assert (size(found.x - exact) <= allowed * first * (1 + 1e-6) + 1e-11 * size(start)).all()


# --- µ of every shape


@solvers
@given(problem=problems(), kind=st.sampled_from(["channel", "node", "batch"]), transposed=st.booleans())
def test_mu_per_channel_per_node_and_per_graph(solver, problem, kind, transposed):
    n, k = problem.s.shape[-2:]
    assume(applies(solver, problem.P, mus=k if kind == "channel" else 1))
    g = torch.Generator().manual_seed(5)
    shape = {"channel": (1, k), "node": (n, 1), "batch": (2, 1, 1)}[kind]
    mu = 0.95 * torch.rand(shape, generator=g, dtype=torch.float64)
    P, D = (problem.P.T, problem.dense.mT) if transposed else (problem.P, problem.dense)
    sol = gd.solve(P, problem.s, mu, solver=solver)
    exact = oracle(D, problem.s, mu)
    assert sol.value.shape == exact.shape
    assert (
        norm(sol.value - exact, transposed) <= sol.error_bound + 1e-12 * norm(problem.s, transposed)
    ).all()
    assert sol.converged.all()


def test_a_python_mu_means_itself_in_float32():
    """1 − µ = 1e-5 is 1.0014e-5 for the nearest float32, and so is the answer of a bipartite pair off."""
    P = gd.DenseTransition(torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    s = torch.tensor([0.0, 1.0])
    sol = gd.solve(P, s, 0.99999, tol=1e-11, on_failure="ignore")
    assert sol.value[1] == pytest.approx(1e-5, rel=1e-6)
    assert float(1 - torch.tensor(0.99999)) != pytest.approx(1e-5, rel=1e-4)


# --- what an answer says of itself


@solvers
def test_zero_gives_zero(solver):
    sol = gd.solve(gd.grid_transition(torch.randn(3, 1, 5)), torch.zeros(5, 2), 0.9, solver=solver)
    assert (sol.value == 0).all()
    assert (sol.error_bound == 0).all()
    assert sol.converged.all()


def test_shapes_follow_the_signal():
    P = gd.AttentionTransition(torch.randn(3, 5, 2))
    assert gd.solve(P, torch.randn(5), 0.5).value.shape == (3, 5)
    assert gd.solve(P, torch.randn(5), 0.5).error_bound.shape == (3,)
    sol = gd.solve(P, torch.randn(2, 1, 5, 4), 0.5)
    assert sol.value.shape == sol.lower.shape == sol.upper.shape == (2, 3, 5, 4)
    for evidence in (sol.error_bound, sol.converged, sol.steps, sol.matvecs):
        assert evidence.shape == (2, 3, 4)


def test_only_the_value_carries_gradients():
    sol = gd.solve(gd.AttentionTransition(torch.randn(5, 2)), torch.randn(5, requires_grad=True), 0.5)
    assert sol.value.requires_grad
    assert not any(t.requires_grad for t in (sol.lower, sol.upper, sol.error_bound))


@solvers
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("nodes", [60, base.LONG])
def test_bounds_are_of_what_was_solved_whoever_writes_to_it_before_they_are_asked_for(
    solver, dtype, transposed, nodes
):
    g = torch.Generator().manual_seed(1)
    edges = torch.stack([torch.arange(nodes), (torch.arange(nodes) + 1) % nodes])
    edges = torch.cat([edges, torch.randint(0, nodes, (2, nodes), generator=g)], 1)
    P = gd.SparseTransition.from_edge_index(torch.cat([edges, edges.flip(0)], 1), dtype=dtype)
    if not applies(solver, P):
        pytest.skip(f"{solver} is not for sparse walks")
    s = torch.randn(nodes, 2, generator=g, dtype=torch.float64).to(dtype)
    mu = torch.full((1, 1) if transposed else (nodes, 1), 0.7, dtype=dtype)
    wanted, sol = (gd.solve(P.T if transposed else P, s, mu, solver=solver) for _ in range(2))
    lower, upper = wanted.lower.clone(), wanted.upper.clone()
    for tensor in (s, mu, sol.value, sol.error_bound, *P.tensors()):
        tensor.fill_(3)
    assert torch.equal(sol.lower, lower)
    assert torch.equal(sol.upper, upper)
    # They are found once.
    assert sol.lower is sol.lower


def test_a_copy_or_a_file_holds_the_bounds_too():
    sol = gd.solve(gd.AttentionTransition(torch.randn(5, 2)), torch.randn(5), 0.5)
    for other in (copy.deepcopy(sol), pickle.loads(pickle.dumps(sol))):
        for name in ("value", "lower", "upper", "error_bound"):
            assert torch.equal(getattr(other, name), getattr(sol, name))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_solved_in_float32(dtype):
    psi, s = torch.randn(8, 3).to(dtype), torch.randn(8, 2).to(dtype)
    half = gd.solve(gd.AttentionTransition(psi), s, 0.9)
    single = gd.solve(gd.AttentionTransition(psi.float()), s.float(), 0.9)
    assert half.converged.all()
    assert half.value.dtype == dtype
    assert torch.equal(half.value, single.value.to(dtype))


def test_float32_is_certified_in_float32_where_its_rounding_allows():
    """float64 products are for what float32 cannot promise: they are slow on many devices."""
    used = set()

    class Watched(gd.DenseTransition):
        def matmul(self, y):
            used.add(y.dtype)
            return super().matmul(y)

        def rmatmul(self, v):
            used.add(v.dtype)
            return super().rmatmul(v)

    g = torch.Generator().manual_seed(3)
    P, s = Watched(torch.softmax(torch.randn(30, 30, generator=g), -1)), torch.randn(30, 2, generator=g)
    for tol, dtypes in ((1e-3, {torch.float32}), (1e-7, {torch.float32, torch.float64})):
        seed = s.clone().requires_grad_()
        used.clear()
        sol = gd.solve(P, seed, 0.8, tol=tol, solver=gd.solvers.Walk())
        sol.value.sum().backward()
        assert used == dtypes
        exact = oracle(P.P, s, 0.8)
        assert (norm(sol.value.detach().double() - exact, False) <= sol.error_bound).all()
        assert sol.converged.all()


def test_an_operator_that_does_not_tell_its_rounding_is_certified_in_float64():
    """Entries that are computed may be off by far more than their sum; the bound must not be."""
    g = torch.Generator().manual_seed(3)
    for _ in range(100):
        psi, s = 20 * torch.randn(4, 2, generator=g), torch.randn(4, 1, generator=g)
        P = gd.FunctionTransition(lambda y, x: torch.softmax(x @ x.mT, -1) @ y, 4, tensors=[psi])
        sol = gd.solve(P, s, 0.8, tol=1e-4, on_failure="ignore")
        error = norm(sol.value.double() - oracle(P.to(torch.float64).dense(), s, 0.8), False)
        assert (error <= sol.error_bound).all()


def test_float32_asked_for_more_than_it_holds_says_what_was_reached():
    P = gd.AttentionTransition(torch.randn(9, 3, generator=torch.Generator().manual_seed(3)))
    s = torch.randn(9, generator=torch.Generator().manual_seed(4))
    with pytest.warns(gd.ConvergenceWarning, match="; loosen tol or use float64") as warned:
        sol = gd.solve(P, s, 0.9, tol=1e-12)
    assert warned[0].filename == __file__
    assert not sol.converged
    assert "rounding in float32 allows no more" in sol.reason
    exact = oracle(P.psi.double().matmul(P.psi.double().T).softmax(-1), s[:, None], 0.9)[:, 0]
    assert (sol.value.double() - exact).abs().max() <= sol.error_bound < 1e-6


def test_max_steps_is_kept_and_reported():
    P = gd.DenseTransition(torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64))
    s = torch.tensor([0.0, 1.0], dtype=torch.float64)
    arguments = {"solver": gd.solvers.Walk(), "max_steps": 5}
    with pytest.warns(
        gd.ConvergenceWarning, match=r"stopped at max_steps = 5.*; raise max_steps or loosen tol"
    ):
        sol = gd.solve(P, s, 0.9, **arguments)
    assert sol.steps == 5
    assert not sol.converged
    assert (sol.value - oracle(P.P, s[:, None], 0.9)[:, 0]).abs().max() <= sol.error_bound
    gd.solve(P, s, 0.9, on_failure="ignore", **arguments)
    with pytest.raises(gd.ConvergenceError) as raised:
        gd.solve(P, s, 0.9, on_failure="raise", **arguments)
    assert torch.equal(raised.value.solution.value, sol.value)


@solvers
def test_the_enclosure_is_narrower_than_the_bound_where_a_walk_moves_little(solver):
    """Theory 3 with j = 1, which costs no product: e_i = r_i + µ_i (Pe)_i, Pe within the bounds of e."""
    g = torch.Generator().manual_seed(3)
    P = gd.AttentionTransition(torch.randn(40, 3, generator=g, dtype=torch.float64))
    if not applies(solver, P):
        pytest.skip(f"{solver} is not for attention")
    s = torch.randn(40, 2, generator=g, dtype=torch.float64)
    mu = torch.linspace(0.05, 0.95, 40, dtype=torch.float64).unsqueeze(-1)
    sol = gd.solve(P, s, mu, solver=solver, tol=1e-3)
    width, exact = sol.upper - sol.lower, oracle(P.dense(), s, mu)
    assert (sol.lower <= exact).all()
    assert (exact <= sol.upper).all()
    assert (width <= 2 * sol.error_bound * (1 + 1e-9)).all()
    # What a factorisation leaves is rounding, which is alike everywhere.
    assert (width[0] <= 0.2 * sol.error_bound).all() or sol.solver == "Direct()"


@solvers
def test_nodes_that_a_signal_does_not_reach_stay_at_zero(solver):
    """Else the largest class of an unlabelled component would be noise."""
    W = torch.zeros(9, 9, dtype=torch.float64)
    W[:5, :5] = torch.rand(5, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    W[5:, 5:] = 1
    s = torch.zeros(9, 2, dtype=torch.float64)
    s[0, 0] = s[1, 1] = 1
    for P in (
        gd.DenseTransition.from_affinity(W + W.T),
        gd.SparseTransition.from_torch((W + W.T).to_sparse()),
    ):
        for Q in (P, P.T) if applies(solver, P) else ():
            y = gd.diffuse(Q, s, 0.9, solver=solver)
            assert (y[5:] == 0).all()
            assert (y[:5] != 0).all()


@solvers
def test_the_same_input_gives_the_same_bits(solver):
    problem = OPERATORS["sparse path"].leaf(torch.Generator().manual_seed(3), (), 50)
    P = OPERATORS["sparse path"].build(problem)
    s = torch.randn(50, 4, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    together = gd.solve(P, s, 0.95, solver=solver)
    for _ in range(3):
        assert torch.equal(gd.solve(P, s, 0.95, solver=solver).value, together.value)
    # Of a sparse walk no column depends on its neighbours either, unless they are to help each other.
    for k in () if isinstance(solver, gd.solvers.BlockCG) else range(4):
        alone = gd.solve(P, s[:, k], 0.95, solver=solver)
        assert torch.equal(alone.value, together.value[:, k])
        assert torch.equal(alone.steps, together.steps[k])


def test_direct_is_right_whatever_was_said_of_threads():
    """torch's own factors of several matrices are not, once it was told of two (its issue 142815)."""
    script = """
        import torch, graphdiff as gd
        torch.set_num_threads(2)
        g = torch.Generator().manual_seed(0)
        psi = torch.randn(2, 200, 4, generator=g, dtype=torch.float64)
        P, s = gd.AttentionTransition(psi), torch.randn(2, 200, 2, generator=g, dtype=torch.float64)
        mu = torch.tensor([[0.2, 0.9]], dtype=torch.float64)
        for walk in (P, P.T):
            sol = gd.solve(walk, s, mu, solver=gd.solvers.Direct())
            assert sol.converged.all() and (sol.steps == 1).all()
    """
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [40, 70, 150])
@pytest.mark.parametrize("transposed", [False, True])
def test_cg_where_degrees_differ_by_many_orders(dtype, spread, transposed):
    g = torch.Generator().manual_seed(3)
    psi = torch.randn(200, 8, generator=g, dtype=torch.float64)
    psi = psi / psi.norm(dim=1, keepdim=True) * torch.linspace(1, spread, 200).double().sqrt()[:, None]
    P = gd.AttentionTransition(psi.to(dtype))
    assert P.log_degree.max() - P.log_degree.min() > 0.9 * spread - 8
    s = torch.randn(200, 2, generator=g, dtype=torch.float64).to(dtype)
    P = P.T if transposed else P
    for mu in (0.85, 0.99):
        exact = oracle(P.to(torch.float64).dense(), s, mu)
        cg = gd.solve(P, s, mu, solver=gd.solvers.CG(), tol=1e-6)
        other = gd.solve(P, s, mu, solver=gd.solvers.Chebyshev(), tol=1e-6)
        assert cg.converged.all()
        assert (norm(cg.value.double() - exact, transposed) <= cg.error_bound).all()
        assert (cg.matvecs <= 2 * other.matvecs).all()


def test_what_is_nearly_there_gets_there_by_walking():
    """An answer whose bound falls short by little costs a product or two, not another solve (theory 3)."""

    class Noisy(gd.solvers.Direct):
        def solve(self, state, rhs, initial, target, limits):
            exact = super().solve(state, rhs, initial, target, limits)
            noise = torch.randn(rhs.shape, generator=torch.Generator().manual_seed(4), dtype=rhs.dtype)
            return exact._replace(x=exact.x + 0.05 * target * noise)

    psi = torch.randn(300, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    P, s = gd.AttentionTransition(0.3 * psi), psi[:, :2] ** 3
    sol = gd.solve(P, s, 0.9, solver=Noisy(), tol=1e-9)
    assert sol.converged.all()
    assert (sol.steps == 1).all()
    assert (sol.matvecs == 2).all()


def test_solvers_are_handed_vectors_whose_numbers_lie_beside_each_other():
    """In a refinement too, which starts from 0: compiled code reads several signals at a time."""
    handed = []

    class Short(gd.solvers.Walk):
        """Leaves a tenth of the way."""

        def solve(self, state, rhs, initial, target, limits):
            handed.extend([rhs, initial])
            found = super().solve(state, rhs, initial, target, limits)
            return found._replace(x=0.9 * found.x)

    P = gd.DenseTransition.from_affinity(
        torch.rand(6, 6, generator=torch.Generator().manual_seed(0)).double()
    )
    sol = gd.solve(P, torch.eye(6, dtype=torch.float64)[:4].T, 0.5, solver=Short(), tol=1e-3)
    assert sol.converged.all()
    assert len(handed) > 2
    assert all(x.is_contiguous() for x in handed)


def test_cg_weighs_nodes_by_their_own_mu():
    """Self-adjoint in D/M (theory 9), nodes with µ = 0 and any first guess included."""
    g = torch.Generator().manual_seed(3)
    P = gd.AttentionTransition(1.5 * torch.randn(300, 3, generator=g, dtype=torch.float64))
    s, guess = (torch.randn(300, 2, generator=g, dtype=torch.float64) for _ in range(2))
    mu = 1 - 10.0 ** (-3 * torch.rand(300, 1, generator=g, dtype=torch.float64))
    for zeros in (0, 20):
        mu[:zeros] = 0
        for start in (None, guess):
            cg, other = (
                gd.solve(P, s, mu, solver=solver, tol=1e-8, initial=start)
                for solver in (gd.solvers.CG(), gd.solvers.Chebyshev())
            )
            assert (norm(cg.value - oracle(P.dense(), s, mu), False) <= cg.error_bound).all()
            assert (cg.matvecs < 0.15 * other.matvecs).all()


def test_cg_hands_over_where_the_weights_hide_a_node():
    """Log-degrees spread by 196: residuals of the smallest nodes grow unseen, until Chebyshev goes on."""
    psi = [[3.7381, 9.5675, -4.0876], [2.1727, 3.4036, -2.9709], [-4.4623, -6.4946, 6.0420]]
    psi = torch.tensor([*psi, [12.4339, 7.0851, 6.6108], [-1.2829, 12.7904, 0.1082]])
    s = torch.tensor([2.0486, -8.3209, 26.4969, -10.7995, 4.5691])
    sol = gd.solve(gd.AttentionTransition(psi), s, 0.99, solver=gd.solvers.CG())
    assert sol.converged
    assert sol.matvecs < 60


def test_a_warm_start_saves_steps_of_krylov_methods_too():
    psi = torch.randn(300, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    s = psi[:, :3] ** 3
    before = gd.diffuse(gd.AttentionTransition(psi), s, 0.99, tol=1e-8)
    P = gd.AttentionTransition(psi + 1e-6 * psi.flip(0))
    for solver in (gd.solvers.CG(), gd.solvers.BiCGSTAB(), gd.solvers.Chebyshev()):
        cold, warm = (
            gd.solve(P, s, 0.99, tol=1e-8, solver=solver, initial=start) for start in (None, before)
        )
        assert (warm.matvecs < 0.95 * cold.matvecs).all()


def test_a_constant_in_the_first_guess_costs_cg_nothing():
    """The mode of the eigenvalue 1 is known, and taken out before the first step."""
    psi = torch.randn(300, 4, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    P, s = gd.AttentionTransition(0.5 * psi), psi[:, :3] ** 3
    degree = (P.log_degree - P.log_degree.max()).exp().unsqueeze(-1)
    for Q, mode in ((P, torch.ones_like(s)), (P.T, degree.expand_as(s))):
        plain = gd.solve(Q, s, 0.99, tol=1e-8, solver=gd.solvers.CG())
        for size in (1e-3, 1.0, 1e3):
            shifted = gd.solve(Q, s, 0.99, tol=1e-8, solver=gd.solvers.CG(), initial=s + size * mode)
            assert (shifted.matvecs == plain.matvecs).all()


def test_a_warm_start_saves_steps():
    P = gd.AttentionTransition(2 * torch.randn(60, 4, generator=torch.Generator().manual_seed(3)).double())
    s = torch.randn(60, 3, generator=torch.Generator().manual_seed(4)).double()
    cold = gd.solve(P, s, 0.95, solver=gd.solvers.Walk())
    warm = gd.solve(P, s, 0.95, solver=gd.solvers.Walk(), initial=cold.value)
    assert (warm.steps <= 2).all()
    assert (cold.steps > 20).all()
    assert warm.converged.all()


def test_a_false_fact_or_a_wrong_solver_cannot_give_a_wrong_answer_unnoticed():
    """A solver that lies is found out by the certificate, which uses products alone."""

    class Liar(gd.solvers.Direct):
        def solve(self, state, rhs, initial, target, limits):
            honest = super().solve(state, rhs, initial, target, limits)
            return honest._replace(x=honest.x * 1.001)

    P = gd.AttentionTransition(torch.randn(6, 2, dtype=torch.float64))
    s = torch.ones(6, dtype=torch.float64)
    sol = gd.solve(P, s, 0.5, solver=Liar(), tol=1e-30, on_failure="ignore")
    assert not sol.converged
    assert (sol.value - 1).abs().max() <= sol.error_bound
    # With a tolerance within reach, refinement takes the lie out again.
    assert (gd.diffuse(P, s, 0.5, solver=Liar()) - 1).abs().max() <= 1e-10


@pytest.mark.parametrize("nodes", [1, 31, 32, 33, 200])
@pytest.mark.parametrize("channels", [1, 3])
def test_sizes_are_the_largest_entries_and_the_sums(nodes, channels):
    x = torch.randn(2, nodes, channels, generator=torch.Generator().manual_seed(nodes), dtype=torch.float64)
    for at in range(0, nodes, 7):
        x[1, at, 0] = -9.0 - at
        assert torch.equal(base.size(x, "inf"), x.abs().amax(-2, keepdim=True))
    torch.testing.assert_close(base.size(x, "one"), x.abs().sum(-2, keepdim=True))
    x[0, nodes // 2, 0] = torch.nan
    assert base.size(x, "inf")[0, 0, 0].isnan()


@pytest.mark.parametrize("solver", [gd.solvers.CG(), gd.solvers.BiCGSTAB()], ids=str)
@pytest.mark.parametrize("power", [-80, 70])
def test_neither_small_nor_large_signals_take_more_steps(solver, power):
    """Squares of theirs are 0, or infinite, in float32."""
    P = gd.AttentionTransition(torch.randn(60, 3, generator=torch.Generator().manual_seed(5)))
    s = torch.randn(60, 2, generator=torch.Generator().manual_seed(6))
    near_one, far = (gd.solve(P, 2.0**scale * s, 0.9, tol=1e-4, solver=solver) for scale in (0, power))
    assert torch.equal(far.steps, near_one.steps)
    assert torch.equal(far.value, 2.0**power * near_one.value)


@pytest.mark.parametrize("nodes", [1, 127, 128, 129, 8191, 20000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inner_products_are_exact_and_depend_on_no_neighbour(nodes, dtype):
    g = torch.Generator().manual_seed(nodes)
    u, v = (torch.randn(2, nodes, 5, generator=g, dtype=torch.float64).to(dtype) for _ in range(2))
    weight = torch.rand(2, nodes, 1, generator=g, dtype=torch.float64) + 0.1
    for w in (weight, torch.tensor(3.0, dtype=torch.float64)):
        together = base.InnerProduct(w, u.shape, dtype)(u, v)
        assert together.dtype == torch.float64
        exact = (w * u.double() * v.double()).sum(-2, keepdim=True)
        length = (w * (u * v).double().abs()).sum(-2, keepdim=True)
        assert ((together - exact).abs() <= 64 * torch.finfo(dtype).eps * length).all()
        for b, k in itertools.product(range(2), range(5)):
            alone = (x[b, :, k : k + 1].contiguous() for x in (u, v))
            own = w if w.ndim == 0 else w[b]
            assert torch.equal(base.InnerProduct(own, (nodes, 1), dtype)(*alone), together[b, :, k : k + 1])


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("per_node", [False, True])
def test_what_bounds_an_error_by_its_residual(transposed, per_node):
    """|(I − MP)⁻¹ r| against it: never less, and equal where all that is left is the slowest mode."""
    g = torch.Generator().manual_seed(3)
    P = gd.DenseTransition.from_affinity(torch.rand(40, 40, generator=g, dtype=torch.float64))
    P = P.T if transposed else P
    mu = torch.rand(40, 1, generator=g, dtype=torch.float64) if per_node else torch.full((1, 1), 0.9).double()
    A = torch.eye(40, dtype=torch.float64) - mu * P.dense()
    bounded = base.bounding(P, mu)
    r = torch.randn(40, 4, generator=g, dtype=torch.float64)
    assert (norm(torch.linalg.solve(A, r), transposed) <= bounded(r) * (1 + 1e-12)).all()
    if not transposed:
        slowest = A.sum(1, keepdim=True)
        torch.testing.assert_close(bounded(slowest), torch.ones(1, 1, dtype=torch.float64))


# --- batch mates


def working_dtype(solver, dtype):
    return dtype if isinstance(solver, gd.solvers.Auto) else solver.working_dtype(dtype)


@pytest.mark.parametrize(
    ("name", "solver"),
    [
        (name, solver)
        for name in ("directed", "star", "sharp attention")
        for solver in SOLVERS.values()
        if applies(solver, OPERATORS[name].build(OPERATORS[name].leaf(torch.Generator(), (), 7)))
    ],
    ids=str,
)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_mates_change_neither_bits_nor_steps(solver, transposed, dtype, name):
    g = torch.Generator().manual_seed(13)
    leaf = OPERATORS[name].leaf(g, (3,), 7)
    s = torch.randn(3, 7, 2, generator=g, dtype=torch.float64).to(dtype)
    s[1] *= 1e4
    s[2] = 1.0

    def run(leaf, s):
        P = OPERATORS[name].build(leaf).to(dtype)
        return gd.solve(P.T if transposed else P, s, 0.95, solver=solver)

    together = run(leaf, s)
    for i in range(3):
        alone = run(leaf[i], s[i])
        assert torch.equal(alone.value, together.value[i])
        assert torch.equal(alone.steps, together.steps[i])
        for field in ("error_bound", "lower", "upper"):
            assert torch.equal(getattr(alone, field), getattr(together, field)[i])
        # The channels of a block share their directions: alone each takes another way to the same answer.
        for k in () if isinstance(solver, gd.solvers.BlockCG) else range(2):
            single = run(leaf[i], s[i, :, k])
            # As close as the dtype in which it was found allows.
            eps = torch.finfo(working_dtype(solver, dtype)).eps
            close = 8 * eps / (1 - 0.95) * norm(s[i, :, k : k + 1], transposed)
            assert (norm((single.value - alone.value[:, k]).unsqueeze(-1), transposed) <= close).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_a_first_guess_beside_none_changes_no_bit(transposed):
    """CG takes the slowest mode out of the error of a first guess, of that one alone."""
    P = OPERATORS["sparse path"].build(
        OPERATORS["sparse path"].leaf(torch.Generator().manual_seed(3), (), 50)
    )
    P = P.T if transposed else P
    s = torch.randn(50, 2, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    guess = torch.stack([torch.zeros(50, dtype=torch.float64), 1 + s[:, 1]], -1)
    options = {"mu": 0.95, "solver": gd.solvers.CG()}
    together = gd.solve(P, s, initial=guess, **options)
    for k in range(2):
        alone = gd.solve(P, s[:, k], initial=guess[:, k], **options)
        assert torch.equal(alone.value, together.value[:, k])
        assert torch.equal(alone.steps, together.steps[k])


def test_max_steps_is_a_budget_of_each_signal():
    """float32 needs refinement here; what one signal spends, another does not miss."""
    psi = 1.5 * torch.randn(30, 3, generator=torch.Generator().manual_seed(71))
    s = torch.randn(30, 2, generator=torch.Generator().manual_seed(73))
    s[:, 0] = s[:, 0].abs() + 100
    options = {"solver": gd.solvers.Walk(), "tol": 3e-7, "on_failure": "ignore", "max_steps": 150}
    together = gd.solve(gd.AttentionTransition(psi), s, 0.95, **options)
    for k in range(2):
        alone = gd.solve(gd.AttentionTransition(psi), s[:, k], 0.95, **options)
        assert alone.steps == together.steps[k]
        assert alone.steps <= 150


def test_each_signal_stops_on_its_own():
    P = gd.DenseTransition.from_affinity(torch.eye(4, dtype=torch.float64).roll(1, 0) + torch.eye(4).double())
    s = torch.stack([torch.ones(4), torch.arange(4.0)], -1).double()
    sol = gd.solve(P, s, 0.9, solver=gd.solvers.Walk())
    assert sol.steps[0] == 1  # a constant is its own answer
    assert sol.steps[1] > 20


def test_auto_says_why():
    def choice(P, mu=0.9, channels=1):
        sol = gd.solve(P, torch.randn(P.shape[-1], channels), mu)
        assert sol.converged.all()
        return sol.solver, sol.reason

    features = torch.randn(600, 3, generator=torch.Generator().manual_seed(3))
    W = torch.rand(600, 600)
    assert choice(gd.AttentionTransition(features[:50])) == (
        "Direct()",
        "N = 50: a factorisation costs next to nothing; reached the tolerance",
    )
    solver, reason = choice(gd.AttentionTransition(features), mu=0.99, channels=6)
    assert solver == "Direct()"
    assert reason.startswith("N = 600: factorising costs less than at most about 61 products")
    solver, reason = choice(gd.AttentionTransition(features), mu=0.5)
    assert solver == "CG()"
    assert reason == "reversible: at most about 7 products; reached the tolerance"
    solver, reason = choice(gd.DenseTransition.from_affinity(W), mu=0.5)
    assert solver == "Walk() or BiCGSTAB()"
    assert reason.startswith("not reversible: walks, at most about 18, unless they turn out slow")


@pytest.mark.parametrize("crossing", [0.5, 0.01])
def test_watched_walks_take_the_faster_way_through_directed_graphs(crossing):
    """Two communities: well connected, where walks are quick, and hardly, where they are not."""
    g = torch.Generator().manual_seed(3)
    nodes, out = 600, 8
    side = torch.arange(nodes) < nodes // 2
    source = torch.arange(nodes).repeat_interleave(out)
    across = torch.rand(nodes * out, generator=g) < crossing
    target = torch.randint(nodes // 2, (nodes * out,), generator=g)
    target = torch.where(side[source] ^ across, target, target + nodes // 2)
    P = gd.SparseTransition.from_edge_index(torch.stack([source, target]), dtype=torch.float64)
    s = side.double()
    for Q in (P, P.T):
        auto, walk, krylov = (
            gd.solve(Q, s, 0.99, solver=solver, tol=1e-8)
            for solver in (WatchedWalk(), gd.solvers.Walk(), gd.solvers.BiCGSTAB())
        )
        assert auto.solver == "Walk() or BiCGSTAB()"
        assert auto.matvecs <= 1.2 * min(walk.matvecs, krylov.matvecs) + 2
        assert (walk.matvecs > 3 * krylov.matvecs) == (crossing < 0.1)
