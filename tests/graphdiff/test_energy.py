"""Eq. 1: its energy, its exact minimiser, and diffusion by the symmetric normalisation (theory 11)."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import graphdiff as gd
from graphdiff.energy import _scaling
from tests.graphdiff.zoo import OPERATORS, SOLVERS, applies, oracle, problems, to_the_last_digit

REVERSIBLE = tuple(name for name, kind in OPERATORS.items() if kind.reversible)
# Those whose degrees differ by little.
EVEN = tuple(name for name in REVERSIBLE if name not in ("sharp attention", "hub attention"))


def randn(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def symmetric_matrix(D):
    """S_ij = √(P_ij P_ji) for a reversible P: no degrees needed."""
    return D.sqrt() * D.mT.sqrt()


def written_out(S, y, x, mu, M=1.0):
    """Eq. 1 as it stands, pair by pair, with ordered pairs of D^-1/2 y: W_ij/√(d_i d_j) = S_ij."""
    root = largest_eigenvector(S)
    u = y / root
    pairs = (u.unsqueeze(-2) - u.unsqueeze(-3)).square()  # [..., i, j, K]
    W = root * S * root.mT
    smooth = (W.unsqueeze(-1) * pairs).sum((-2, -3))
    return (mu * smooth + (1 - mu) * (M * (y - x).square()).sum(-2)) / 2


def largest_eigenvector(S):
    """√d > 0 with S√d = √d, one component of the graph after another."""
    root = torch.ones(S.shape[:-1], dtype=torch.float64).unsqueeze(-1)
    lazy = (S + torch.eye(S.shape[-1], dtype=torch.float64)) / 2
    return torch.linalg.matrix_power(lazy, 2**24) @ root


def importances(problem, low=0.05):
    n = problem.s.shape[-2]
    return low + (1 - low) * torch.rand(n, 1, generator=torch.Generator().manual_seed(n), dtype=torch.float64)


def minimiser(S, x, mu, M):
    """The normal equations of Eq. 1, dense."""
    eye = torch.eye(S.shape[-1], dtype=torch.float64)
    M = torch.ones(S.shape[-1], 1, dtype=torch.float64) if M is None else M
    A = 2 * mu * (eye - S) + (1 - mu) * M * eye
    return torch.linalg.solve(A, (1 - mu) * M * x)


def biggest(x):
    return x.abs().amax(-2)


# --- the energy


@given(problems(EVEN, mus=(0.0, 0.3, 0.85), max_nodes=8))
def test_the_energy_is_eq_1_written_out(problem):
    S, y, x, M = symmetric_matrix(problem.dense), problem.s, problem.s.flip(-2) ** 2, importances(problem, 0)
    for importance, weights in ((None, 1.0), (M, M), (M.squeeze(-1), M)):
        found = gd.energy(problem.P, y, x, problem.mu, importance)
        expected = written_out(S, y, x, problem.mu, weights)
        assert found.shape == expected.shape
        scale = float((y.square().sum(-2) + x.square().sum(-2)).max())
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9 * scale)
        assert (found >= 0).all()


@given(problems(REVERSIBLE))
def test_what_is_smooth_has_no_energy_and_a_scale_of_the_degrees_does_not_matter(problem):
    """y = √d, up to the rounding of the walk: E = 0 where x = y, and E ≥ 0 whatever rounding does."""
    log_degree = problem.P.log_degree
    root = ((log_degree - log_degree.amax(-1, keepdim=True)) / 2).exp().unsqueeze(-1)
    E = gd.energy(problem.P, root, root, problem.mu)
    assert (E >= 0).all()
    assert (E / root.square().sum(-2) <= 1e-20).all()


@given(problems(EVEN, mus=(0.3, 0.85, 0.99)), st.booleans())
def test_the_minimiser_is_where_the_energy_is_least(problem, weighted):
    P, x, mu = problem.P, problem.s, problem.mu
    M = importances(problem) if weighted else None
    y = gd.minimize_energy(P, x, mu, M, tol=1e-13, on_failure="ignore").value.requires_grad_()
    least = gd.energy(P, y, x, mu, M)
    (slope,) = torch.autograd.grad(least.sum(), y)
    size = float(x.abs().max())
    assert slope.abs().max() <= 1e-10 * size
    for step in (1e-3, 1.0):
        other = y.detach() + step * size * randn(*y.shape)
        assert (gd.energy(P, other, x, mu, M) > least.detach()).all()


@settings(max_examples=12)
@given(problems(EVEN, mus=(0.3, 0.85), batches=((),), max_nodes=8), st.booleans())
def test_numerical_minimisation_ends_at_the_minimiser(problem, weighted):
    P, x, mu = problem.P, problem.s / problem.s.abs().max(), problem.mu
    M = importances(problem) if weighted else None
    y = torch.zeros_like(x).requires_grad_()
    optimiser = torch.optim.LBFGS(
        [y], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        E = gd.energy(P, y, x, mu, M).sum()
        E.backward()
        return E

    optimiser.step(closure)
    torch.testing.assert_close(y.detach(), gd.minimize_energy(P, x, mu, M).value, rtol=0, atol=1e-6)


def test_energy_of_every_dtype():
    W = randn(6, 6).abs()
    y, x = randn(6, 2), randn(6, 2, seed=4)
    P = gd.DenseTransition.from_affinity(W + W.mT)
    exact = gd.energy(P, y, x, 0.7)
    single = gd.energy(P.to(torch.float32), y.float(), x.float(), 0.7)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), exact, rtol=1e-5, atol=0)
    half = gd.energy(P.to(torch.bfloat16), y.bfloat16(), x.bfloat16(), 0.7)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=0.05, atol=0)
    assert gd.energy(P, y[:, 0], x[:, 0], 0.7).shape == ()
    assert gd.energy(P, y[:, 0], x, 0.7).shape == (2,)
    assert gd.energy(P.T, y, x, 0.7).equal(exact)
    torch.testing.assert_close(
        gd.energy(P, y, x, torch.tensor([[0.2, 0.7]], dtype=torch.float64))[1], exact[1], rtol=1e-14, atol=0
    )


def test_rounding_makes_no_energy_negative():
    """Two components, each smooth on its own at another level: no shift makes both small."""
    g = torch.Generator().manual_seed(3)
    for _ in range(40):
        W = torch.block_diag(*(torch.rand(5, 5, generator=g, dtype=torch.float64) for _ in range(2)))
        P = gd.DenseTransition.from_affinity(W + W.mT)
        y = (P.log_degree / 2).exp() * torch.tensor([1.0, 1000.0]).double().repeat_interleave(5)
        assert 0 <= float(gd.energy(P, y, y, 0.5)) < 1e-7


# --- the symmetric normalisation and the minimiser: promise and certificate


def check(sol, exact, s, tol, reachable, condition):
    """The true error is within the bound, and the bound within the promise where that can be kept."""
    error = biggest(sol.value.double() - exact)
    # What the oracle itself may be wrong by.
    slip = 1e-15 * biggest(s.double()) * condition
    assert (error <= sol.error_bound + slip).all()
    assert (sol.lower.double() <= exact + slip.unsqueeze(-2)).all()
    assert (sol.upper.double() >= exact - slip.unsqueeze(-2)).all()
    assert torch.equal(sol.converged, sol.error_bound <= tol * biggest(s.double()))
    assert sol.converged.all() or not reachable
    assert sol.norm == "inf"


@given(
    problems(REVERSIBLE),
    st.sampled_from([torch.float64, torch.float32]),
    st.sampled_from(["symmetric", "minimiser", "weighted minimiser"]),
)
def test_the_promise_over_the_zoo(problem, dtype, kind):
    P, s = problem.P.to(dtype), problem.s.to(dtype)
    M = importances(problem).to(dtype) if kind == "weighted minimiser" else None
    wide = P.to(torch.float64)
    # S of the given values: degrees as the operator states them.
    log_root = wide.log_degree.unsqueeze(-1) / 2
    S = wide.dense() * (log_root - log_root.mT).exp()
    tol = {torch.float32: 1e-5, torch.float64: 1e-10}[dtype]
    if kind == "symmetric":
        sol, exact = gd.solve_symmetric(P, s, problem.mu, on_failure="ignore"), oracle(S, s, problem.mu)
    else:
        sol = gd.minimize_energy(P, s, problem.mu, M, on_failure="ignore")
        exact = minimiser(S, s.double(), problem.mu, None if M is None else M.double())
    # Logits of several hundred are themselves rounded by more than some tolerances allow at µ near 1.
    rounded = float(torch.as_tensor(wide.rounding(torch.float64)).max())
    reachable = problem.name in EVEN or 50 * len(s[0]) * rounded / (1 - problem.mu) <= tol
    check(sol, exact, s, tol, reachable, 100 / (1 - problem.mu))
    assert sol.value.dtype == dtype


@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@settings(max_examples=15)
@given(problem=problems(EVEN, batches=((),)))
def test_every_solver(solver, problem):
    assume(applies(solver, problem.P))
    S = symmetric_matrix(problem.dense)
    for s in (problem.s, problem.s[:, 0]):
        sol = gd.solve_symmetric(problem.P, s, problem.mu, solver=solver)
        exact = oracle(S, s.reshape(len(s), -1), problem.mu).reshape(s.shape)
        assert sol.value.shape == s.shape
        assert sol.converged.all()
        assert (sol.value - exact).abs().max() <= 1.01e-10 * s.abs().max()


@settings(max_examples=40)
@given(problems(REVERSIBLE, batches=((),), mus=(0.3, 0.85, 0.99)), st.booleans())
def test_the_certificate_holds_to_the_last_digit(problem, minimise):
    """Rounding of the degrees, of their roots and of µ′ are in the bound."""
    wide = np.longdouble
    if "attention" in problem.name:
        psi = problem.leaf.numpy().astype(wide)
        logits = wide(problem.P.scale) * psi @ psi.T
        log_degree = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
        S = np.exp(logits - (log_degree[:, None] + log_degree) / 2)
    else:
        log_degree = problem.P.log_degree.numpy().astype(wide)
        S = problem.P.dense().numpy().astype(wide) * np.exp((log_degree[:, None] - log_degree) / 2)
    s, mu = problem.s, wide(problem.mu)
    if minimise:
        sol = gd.minimize_energy(problem.P, s, problem.mu, tol=1e-17, on_failure="ignore")
        mu = 2 * mu / (1 + mu)
    else:
        sol = gd.solve_symmetric(problem.P, s, problem.mu, tol=1e-17, on_failure="ignore")
    exact = to_the_last_digit(S, s, mu)
    error = np.abs(sol.value.numpy() - exact).max(0)
    assert (error <= sol.error_bound.numpy()).all()
    assert (sol.lower.numpy() <= exact).all()
    assert (sol.upper.numpy() >= exact).all()


def in_longdouble(psi):
    """S, log d of softmax(ψψᵀ)."""
    psi = psi.double().numpy().astype(np.longdouble)
    logits = psi @ psi.T
    shift = logits.max(-1, keepdims=True)
    log_degree = (np.log(np.exp(logits - shift).sum(-1, keepdims=True)) + shift)[:, 0]
    return np.exp(logits - (log_degree[:, None] + log_degree) / 2), log_degree


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_of_large_logits_is_in_the_bounds(dtype):
    """Logits of thousands, rows far from one node alone: digits are lost in every entry and degree."""
    g = torch.Generator().manual_seed(3)
    for _ in range(20):
        psi = (30 + 0.03 * torch.randn(12, 3, generator=g, dtype=torch.float64)).to(dtype)
        P, s = gd.AttentionTransition(psi), torch.randn(12, 2, generator=g, dtype=torch.float64).to(dtype)
        S, log_degree = in_longdouble(psi)
        off = np.abs(P.log_degree.double().numpy() - log_degree).max()
        assert 0 < off <= P.degree_rounding(dtype)
        assert P.T.degree_rounding(dtype) == P.degree_rounding(dtype)
        exact = to_the_last_digit(S, s.double(), 0.5)
        sol = gd.solve_symmetric(P, s, 0.5, tol=1e-17, on_failure="ignore")
        assert (np.abs(sol.value.double().numpy() - exact).max(0) <= sol.error_bound.numpy()).all()
        error = np.abs(sol.value.double().numpy() - exact)
        wide = P.to(torch.float64)
        closer = _scaling(wide).closer(s.double(), torch.full((1, 1), 0.5).double(), sol.value.double(), None)
        assert (error <= closer[0].numpy()).all()


def test_the_closer_bound_holds_whatever_it_is_made_of():
    """With a v that is no use it bounds nothing, above all not where A v < 0 and all of the residual is."""

    class Dented(gd.solvers.Direct):
        def solve(self, state, rhs, initial, target, limits):
            found = super().solve(state, rhs, initial, target, limits)
            found.x[..., 39, :] *= 0.2  # of the largest degree: the bound of z hardly sees it
            return found

    psi = randn(40, 8)
    psi = psi / psi.norm(dim=1, keepdim=True) * torch.linspace(1, 60, 40).double().sqrt()[:, None]
    psi[38] = psi[39]
    P, s, mu = gd.AttentionTransition(psi), randn(40, 1, seed=4), torch.full((1, 1), 0.97).double()
    S = torch.from_numpy(in_longdouble(psi)[0].astype(float))
    e = torch.linalg.inv(torch.eye(40).double() - mu * S)[:, 39:]
    for solver in (gd.solvers.Direct(), Dented()):
        bound, _ = _scaling(P, solver).closer(s, mu, oracle(S, s, 0.97) + e, None)
        assert (e <= bound).all()
        assert (bound < 100 * e.max()).all() == (type(solver) is gd.solvers.Direct)
    exact = to_the_last_digit(in_longdouble(psi)[0], s, 0.97)
    for steps in (1, 20):
        limited = {"solver": gd.solvers.Walk(), "max_steps": steps}
        sol = gd.solve_symmetric(gd.AttentionTransition(psi), s, 0.97, on_failure="ignore", **limited)
        assert (np.abs(sol.value.numpy() - exact).max(0) <= sol.error_bound.numpy()).all()
        assert not sol.converged.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [10, 40, 70, 150, 600])
@pytest.mark.parametrize("solver", [gd.solvers.CG(), gd.solvers.Direct()], ids=str)
def test_degrees_many_orders_apart(dtype, spread, solver):
    """Entries of s/√d may be e^300 times those of s; the answer is as good as ever, and is known to be."""
    psi = randn(60, 8)
    psi = psi / psi.norm(dim=1, keepdim=True) * torch.linspace(1, spread, 60).double().sqrt()[:, None]
    P, s = gd.AttentionTransition(psi.to(dtype)), randn(60, 2, seed=4).to(dtype)
    logits = P.psi.double() @ P.psi.double().T
    lse = logits.logsumexp(-1)
    exact = oracle((logits - (lse[:, None] + lse) / 2).exp(), s, 0.9)
    sol = gd.solve_symmetric(P, s, 0.9, solver=solver, on_failure="ignore")
    assert (biggest(sol.value.double() - exact) <= sol.error_bound + 1e-11).all()
    assert ((sol.lower - 1e-11 <= exact) & (exact <= sol.upper + 1e-11)).all()
    # e^150 is beyond float32, in which the walk's steps are taken.
    assert sol.converged.all() == (dtype == torch.float64 or spread < 600)
    assert (sol.error_bound <= 1.1 * biggest(s)).all()
    assert (gd.energy(P, sol.value, s, 0.9) < gd.energy(P, s, s, 0.9)).all()
    if not sol.converged.any():
        with pytest.warns(gd.ConvergenceWarning, match="the error is known to be at most"):
            gd.solve_symmetric(P, s, 0.9, solver=solver)


def test_the_closer_bound_is_taken_where_it_is_needed_and_changes_no_batch_mate():
    mild, steep = randn(2, 60, 3) / 4
    steep = steep * 12
    s = randn(60, 2, seed=4)
    together = gd.solve_symmetric(gd.AttentionTransition(torch.stack([mild, steep])), s, 0.9)
    assert together.converged.all()
    for i, psi in enumerate((mild, steep)):
        alone = gd.solve_symmetric(gd.AttentionTransition(psi), s, 0.9)
        assert alone.error_bound.equal(together.error_bound[i])
        assert alone.matvecs.equal(together.matvecs[i])
    assert (together.matvecs[1] > together.matvecs[0] + 1).all()
    # So are the bounds that come with it.
    width = torch.maximum(together.upper - together.value, together.value - together.lower)
    assert (biggest(width) <= 1.01 * together.error_bound).all()


def test_a_false_degree_gives_no_answer_that_is_not_of_that_degree():
    """The certificate knows nothing of symmetry: S is D^1/2 P D^-1/2 for the degrees stated."""
    W, false = randn(6, 6).abs(), 20 * randn(6, seed=9)
    P = gd.DenseTransition(gd.DenseTransition.from_affinity(W + W.mT).P, log_degree=false)
    s = randn(6, 2)
    S = P.P * ((false[:, None] - false) / 2).exp()
    sol = gd.solve_symmetric(P, s, 0.5, on_failure="ignore")
    assert (biggest(sol.value - oracle(S, s, 0.5)) <= sol.error_bound).all()


def test_roots_that_no_dtype_holds_are_refused():
    P = gd.DenseTransition(torch.eye(2).double(), log_degree=torch.tensor([0.0, 4000.0]).double())
    with pytest.raises(ValueError, match=r"P: expected degrees that differ by a factor .* 4000 apart"):
        gd.solve_symmetric(P, torch.ones(2).double(), 0.5)


# --- theory 11: what Eq. 1 and Eq. 2 have to do with one another


@given(problems(EVEN, mus=(0.0, 0.3, 0.85)))
def test_theory_11_eq_2_with_another_mu_and_another_normalisation(problem):
    P, x, mu = problem.P, problem.s, problem.mu
    size = float(x.abs().max())
    y, prime = gd.minimize_energy(P, x, mu).value, 2 * mu / (1 + mu)
    torch.testing.assert_close(y, gd.solve_symmetric(P, x, prime).value, rtol=0, atol=1e-9 * size)
    # S is similar to P: Eq. 2 on a signal divided by √d.
    root = (P.log_degree / 2).exp().unsqueeze(-1)
    torch.testing.assert_close(y, root * gd.diffuse(P, x / root, prime), rtol=0, atol=1e-7 * size)
    # An importance is not a factor of the seed, but a weight of the node's own datum: µ′ node by node.
    M = importances(problem)
    each = gd.solve_symmetric(P, x, 2 * mu / (2 * mu + (1 - mu) * M)).value
    torch.testing.assert_close(gd.minimize_energy(P, x, mu, M).value, each, rtol=0, atol=1e-9 * size)


def test_theory_11_where_degrees_are_equal_only_mu_differs():
    ring = torch.eye(7).double().roll(1, 0)
    P, x = gd.DenseTransition.from_affinity(ring + ring.T), randn(7, 2)
    torch.testing.assert_close(gd.minimize_energy(P, x, 0.6).value, gd.diffuse(P, x, 1.2 / 1.6))
    assert (gd.minimize_energy(P, x, 0.6).value - gd.diffuse(P, x, 0.6)).abs().max() > 0.05


def test_importance_says_whom_to_believe():
    """Where M is small the datum gives way to the neighbours; a common factor trades against µ."""
    P, x = gd.AttentionTransition(randn(8, 2)), randn(8, 3, seed=5)
    M = torch.full((8,), 1.0).double()
    M[2] = 1e-6
    moved = x.clone()
    moved[2] += 100
    torch.testing.assert_close(
        *(gd.minimize_energy(P, z, 0.5, M, tol=1e-7).value for z in (x, moved)), rtol=0, atol=1e-2
    )
    mu, factor = 0.3, 0.2
    scaled = mu / (mu + factor * (1 - mu))
    torch.testing.assert_close(
        gd.minimize_energy(P, x, mu, factor * torch.ones(8).double()).value,
        gd.minimize_energy(P, x, scaled).value,
    )


def test_solutions_of_batches_transposes_and_first_guesses():
    psi, s, M = randn(3, 300, 4), randn(300, 2, seed=5), randn(3, 300, 1, seed=6).abs() + 0.1
    P = gd.AttentionTransition(psi)
    together = gd.minimize_energy(P, s, 0.9, M, solver=gd.solvers.CG())
    assert together.value.shape == (3, 300, 2)
    assert together.error_bound.shape == (3, 2)
    for i in range(3):
        alone = gd.minimize_energy(gd.AttentionTransition(psi[i]), s, 0.9, M[i], solver=gd.solvers.CG())
        assert alone.value.equal(together.value[i])
        assert alone.error_bound.equal(together.error_bound[i])
    again = gd.minimize_energy(P, s, 0.9, M, solver=gd.solvers.CG(), initial=together.value)
    assert (again.steps < together.steps).all()
    assert gd.solve_symmetric(P.T, s, 0.9).value.equal(gd.solve_symmetric(P, s, 0.9).value)
    zero = gd.minimize_energy(P, torch.zeros_like(s), 0.9, M)
    assert (zero.value == 0).all()
    assert (zero.error_bound == 0).all()
    per_channel = torch.tensor([[0.2, 0.9]]).double()
    each = gd.minimize_energy(P, s, per_channel).value
    for k in range(2):
        alone = gd.minimize_energy(P, s[:, k], float(per_channel[0, k])).value
        torch.testing.assert_close(each[..., k], alone, rtol=0, atol=2e-10 * float(s.abs().max()))


def test_max_steps_and_failures_are_those_of_solve():
    ring = torch.eye(40).double().roll(1, 0)
    P, s = gd.DenseTransition.from_affinity(ring + ring.T), randn(40, 2)
    options = {"solver": gd.solvers.Walk(), "max_steps": 3}
    with pytest.raises(gd.ConvergenceError):
        gd.solve_symmetric(P, s, 0.99, on_failure="raise", **options)
    with pytest.warns(gd.ConvergenceWarning, match="max_steps = 3"):
        sol = gd.minimize_energy(P, s, 0.99, **options)
    assert (biggest(sol.value - minimiser(P.P, s, 0.99, None)) <= sol.error_bound).all()
    assert not sol.converged.any()


# --- gradients


def instance(name, n=4):
    g = torch.Generator().manual_seed(17)
    leaf = OPERATORS[name].leaf(g, (), n)
    x, y = (torch.randn(n, 2, generator=g, dtype=torch.float64) for _ in range(2))
    M = 0.3 + torch.rand(n, 1, generator=g, dtype=torch.float64)
    mu = torch.tensor(0.6, dtype=torch.float64)
    return tuple(t.requires_grad_() for t in (leaf, x, mu, M, y))


def built(name):
    """From a leaf that may be perturbed: matrices stay symmetric, edges that are not there stay away."""
    edges = (instance(name)[0].detach() != 0).double()
    square = edges.shape[-1] == edges.shape[-2]
    return lambda leaf: OPERATORS[name].build(edges * ((leaf + leaf.mT) / 2 if square else leaf))


@pytest.mark.parametrize("name", REVERSIBLE)
def test_gradients_of_first_and_second_order(name):
    """In the affinity through P and through √d alike, in x, µ and the importance."""
    leaf, x, mu, M, y = instance(name)
    build = built(name)

    def minimised(leaf, x, mu, M):
        return gd.minimize_energy(build(leaf), x, mu, M, tol=1e-13, on_failure="ignore").value

    def valued(leaf, y, x, mu, M):
        return gd.energy(build(leaf), y, x, mu, M)

    assert gradcheck(minimised, (leaf, x, mu, M), fast_mode=True)
    assert gradgradcheck(minimised, (leaf, x, mu, M), fast_mode=True, atol=1e-4)
    assert gradcheck(valued, (leaf, y, x, mu, M), fast_mode=True)
    assert gradgradcheck(valued, (leaf, y, x, mu, M), fast_mode=True, atol=1e-4)


def test_the_gradient_of_the_score_is_the_same_diffusion():
    """S is symmetric, so the transposed solve is the solve."""
    P, g = gd.AttentionTransition(randn(9, 2)), randn(9, 2, seed=8)
    s = randn(9, 2, seed=9).requires_grad_()
    gd.solve_symmetric(P, s, 0.8).value.backward(g)
    torch.testing.assert_close(s.grad, gd.solve_symmetric(P, g, 0.8).value)


# --- input

W = randn(5, 5).abs()
P5, X5 = gd.DenseTransition.from_affinity(W + W.mT), randn(5, 2)


@pytest.mark.parametrize("name", ["solve_symmetric", "minimize_energy", "energy"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"P": W}, TypeError, r"P: expected a Transition, got Tensor; .*from_affinity\(W\)"),
        (
            {"P": gd.DenseTransition.from_affinity(W)},
            ValueError,
            r"P: expected a walk known to be reversible, got DenseTransition.*; only a symmetric affinity",
        ),
        ({"x": X5.float()}, TypeError, r"expected dtype torch.float64 like P, got torch.float32"),
        ({"x": X5[:4]}, ValueError, r"expected shape \[..., N, K\] or \[N\] with N = 5"),
        ({"x": X5 * torch.nan}, ValueError, r"expected finite values, got 10"),
        ({"mu": 1.0}, ValueError, r"mu: expected 0 ≤ µ < 1"),
        ({"mu": torch.ones(5) / 2}, ValueError, r"mu: a bare shape \[5\] is ambiguous"),
    ],
)
def test_bad_input(name, change, error, message):
    given = {"P": P5, "x": X5, "mu": 0.5} | change
    arguments = [given["P"], *([X5] if name == "energy" else []), given["x"], given["mu"]]
    with pytest.raises(error, match=message):
        getattr(gd, name)(*arguments)


@pytest.mark.parametrize("name", ["minimize_energy", "energy"])
@pytest.mark.parametrize(
    ("mu", "importance", "error", "message"),
    [
        (torch.full((5, 1), 0.5), None, ValueError, r"mu: expected one µ for all nodes, got \[5, 1\]"),
        (0.5, torch.ones(4).double(), ValueError, r"importance: expected shape \[N\] .* N = 5, got \[4\]"),
        (0.5, torch.ones(5, 2).double(), ValueError, r"importance: .* got \[5, 2\]"),
        (0.5, torch.ones(5), TypeError, r"importance: expected dtype torch.float64 like P"),
        (0.5, -torch.ones(5).double(), ValueError, r"importance: expected values ≥ 0, .* of -1"),
        (0.5, torch.full((5,), torch.inf).double(), ValueError, r"importance: expected finite values"),
        (0.5, [1.0] * 5, TypeError, r"importance: expected a torch.Tensor, got list"),
    ],
)
def test_bad_importance(name, mu, importance, error, message):
    signals = [X5, X5] if name == "energy" else [X5]
    with pytest.raises(error, match=message):
        getattr(gd, name)(P5, *signals, mu, importance)


def test_what_only_the_minimiser_refuses():
    some = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0]).double()
    with pytest.raises(ValueError, match=r"importance: expected values > 0, got 2 of 5 that are 0; .* 1e-3"):
        gd.minimize_energy(P5, X5, 0.5, some)
    assert gd.energy(P5, X5, X5, 0.5, some).shape == (2,)
    with pytest.raises(ValueError, match=r"importance: expected values that count beside 2µ/\(1 − µ\), got"):
        gd.minimize_energy(P5, X5, 0.5, some + 1e-20)
    with pytest.raises(ValueError, match=r"mu: expected one µ beside an importance, got \[1, 2\]"):
        gd.minimize_energy(P5, X5, torch.tensor([[0.1, 0.5]]), some + 1)
    with pytest.raises(TypeError, match=r"y: expected dtype torch.float64 like P"):
        gd.energy(P5, X5.float(), X5, 0.5)
