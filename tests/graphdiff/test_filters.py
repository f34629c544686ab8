"""exp(−t(I − P)) s and polynomials of P: the promise, the certificate, what theory says, and gradients."""

import math
import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import graphdiff as gd
from tests.graphdiff.zoo import OPERATORS, problems


def norm(x, transposed):
    return x.abs().sum(-2) if transposed else x.abs().amax(-2)


def heat(D, s, t):
    eye = torch.eye(D.shape[-1], dtype=torch.float64)
    return torch.linalg.matrix_exp(-t * (eye - D)) @ s.double()


def evaluated(D, s, coefficients, basis):
    """Σ c_k B_k(D) s from the definition of each basis, by matrices."""
    n = len(coefficients) - 1
    eye = torch.eye(D.shape[-1], dtype=torch.float64).expand_as(D)
    power = torch.linalg.matrix_power
    if basis == "monomial":
        matrices = [power(D, k) for k in range(n + 1)]
    elif basis == "chebyshev":
        matrices = [eye, D]
        while len(matrices) <= n:
            matrices.append(2 * D @ matrices[-1] - matrices[-2])
    else:
        matrices = [
            math.comb(n, k) * power((eye - D) / 2, k) @ power((eye + D) / 2, n - k) for k in range(n + 1)
        ]
    return sum(c * (B @ s.double()) for c, B in zip(coefficients, matrices[: n + 1], strict=True))


def ring(nodes=200):
    node = torch.arange(nodes)
    edges = torch.stack([node, (node + 1) % nodes])
    return gd.SparseTransition.from_edge_index(edges, undirected=True, dtype=torch.float64)


def scattered(nodes=200, undirected=True):
    edges = torch.randint(nodes, (2, 4 * nodes), generator=torch.Generator().manual_seed(3))
    return gd.SparseTransition.from_edge_index(
        edges, num_nodes=nodes, undirected=undirected, dtype=torch.float64
    )


def signal(P, channels=2):
    g = torch.Generator().manual_seed(5)
    return torch.randn(P.shape[-1], channels, generator=g, dtype=torch.float64)


def check(sol, exact, s, transposed, slip=1e-13):
    slip = slip * norm(s.double(), transposed)
    assert (norm(sol.value.detach().double() - exact, transposed) <= sol.error_bound + slip).all()
    assert (sol.lower.double() <= exact + slip.unsqueeze(-2)).all()
    assert (sol.upper.double() >= exact - slip.unsqueeze(-2)).all()
    assert sol.norm == ("one" if transposed else "inf")


# --- heat: mathematics


@given(
    problem=problems(),
    t=st.sampled_from([0.0, 1e-9, 0.3, 2.5, 30.0, 400.0]),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    recorded=st.booleans(),
)
@settings(max_examples=70)
def test_heat_keeps_the_promise(problem, t, transposed, dtype, recorded):
    P = problem.P.to(dtype)
    D = P.to(torch.float64).dense()
    P, D = (P.T, D.mT) if transposed else (P, D)
    s = problem.s.to(dtype).requires_grad_(recorded)
    sol = gd.heat_kernel(P, s, t, on_failure="ignore")
    # The oracle squares a matrix about log₂ t times.
    check(sol, heat(D, s.detach(), t), s.detach(), transposed, 1e-14 * (20 + t))
    tol = 1e-5 if dtype == torch.float32 else 1e-10
    assert torch.equal(sol.converged, sol.error_bound <= tol * norm(s.detach().double(), transposed))
    reachable = (4 + 8 * t) * torch.as_tensor(P.rounding(torch.float64)) + 1e-12 <= tol
    assert (sol.converged | ~reachable.reshape(*reachable.shape[:-2], -1)).all()
    assert sol.value.dtype == dtype


@pytest.mark.parametrize("t", [0.7, 8.0, 60.0])
@pytest.mark.parametrize("transposed", [False, True])
def test_the_certificate_of_heat_holds_to_the_last_digit(t, transposed):
    """In extended precision, where all of the error is rounding."""
    g = torch.Generator().manual_seed(11)
    for name in ("directed", "star", "sparse path", "grid", "uniform jump"):
        for _ in range(4):
            P = OPERATORS[name].build(OPERATORS[name].leaf(g, (), 8))
            s = torch.randn(8, 2, generator=g, dtype=torch.float64)
            D = P.dense().numpy().astype(np.longdouble)
            D, Q = (D.T, P.T) if transposed else (D, P)
            y, term = np.zeros((8, 2), np.longdouble), s.numpy().astype(np.longdouble)
            weight = np.exp(-np.longdouble(t))
            for k in range(400):
                y = y + weight * term
                term, weight = D @ term, weight * np.longdouble(t) / (k + 1)
            sol = gd.heat_kernel(Q, s, t, tol=1e-17, on_failure="ignore")
            error = np.abs(sol.value.numpy() - y)
            error = error.sum(0) if transposed else error.max(0)
            assert (error <= sol.error_bound.numpy()).all()
            assert (sol.lower.numpy() <= y).all()
            assert (sol.upper.numpy() >= y).all()
            assert (sol.error_bound < 1e-11).all()


@dataclass(frozen=True, eq=False, repr=False)
class Drifting(gd.Transition):
    """A walk whose products are all too large by as much as it says they may be off."""

    walk: gd.Transition
    claimed: bool = True

    OFF = 1e-6

    @property
    def shape(self):
        return self.walk.shape

    @property
    def reversible(self):
        return self.claimed

    @property
    def log_degree(self):
        return self.walk.log_degree

    @property
    def positive_semidefinite(self):
        return self.walk.positive_semidefinite

    def rounding(self, dtype):
        return self.OFF + self.walk.rounding(dtype)

    def matmul(self, y):
        return self.walk.matmul(y) + self.OFF * y.abs().amax(-2, keepdim=True)


@pytest.mark.parametrize("claimed", [False, True])
@pytest.mark.parametrize("t", [3.0, 50.0])
def test_errors_of_products_add_up_in_the_bound(claimed, t):
    """On a constant they add up to t times one of them, whatever the sum is made of."""
    psi = torch.randn(40, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    s = torch.ones(40, 1, dtype=torch.float64)
    for walk in (ring(40), gd.AttentionTransition(3 * psi)):
        with torch.no_grad():
            sol = gd.heat_kernel(Drifting(walk, claimed), s, t, tol=1e-12, on_failure="ignore")
        assert sol.solver == ("Chebyshev sum" if claimed else "Poisson sum")
        error = float((sol.value - 1).abs().max())
        assert 0.9 * t * Drifting.OFF < error <= float(sol.error_bound)
        assert not sol.converged.any()
    for basis in ("monomial", "chebyshev", "bernstein"):
        sol = gd.polynomial(Drifting(ring(40), claimed), s, [0.0, 0.1, 0.2, 0.7], basis, tol=1e-3)
        exact = float(evaluated(ring(40).dense(), s, [0.0, 0.1, 0.2, 0.7], basis)[0, 0])
        assert 1e-7 < float((sol.value - exact).abs().max()) <= float(sol.error_bound) < 1e-4
    half = gd.polynomial(Drifting(ring(40), claimed), s, [0.0, 1.0], "bernstein", tol=1e-3)
    assert 0.4 * Drifting.OFF < float(half.value.abs().max()) <= float(half.error_bound)


@pytest.mark.parametrize(("t", "channel"), [(1e4, 0), (1e5, 1)])
def test_long_times_neither_overflow_nor_cancel(t, channel):
    """Cosines on a ring are eigenvectors: exp(−t(1 − cos θ)) is known to the last digit."""
    P = ring(1000)
    nodes = P.shape[-1]
    theta = 2 * math.pi * (channel + 1) / nodes
    s = torch.cos(theta * torch.arange(nodes, dtype=torch.float64))
    sol = gd.heat_kernel(P, s, t, tol=1e-8)
    exact = math.exp(-t * 2 * math.sin(theta / 2) ** 2) * s
    assert sol.converged
    assert (sol.value - exact).abs().max() <= sol.error_bound + 1e-12
    assert sol.solver == "Chebyshev sum"
    assert sol.matvecs < 9 * t**0.5


def test_long_times_on_a_directed_walk():
    """Powers alone: the sum has t + 7√t terms unless the walk has mixed."""
    P = scattered(undirected=False)
    s = signal(P)
    node = torch.arange(200)
    cycle = gd.SparseTransition.from_edge_index(torch.stack([node, (node + 1) % 200]), dtype=torch.float64)
    sol = gd.heat_kernel(cycle, s, 2e3, tol=1e-9)
    assert sol.solver == "Poisson sum"
    assert sol.converged.all()
    assert (sol.matvecs < 2e3 + 400).all()
    check(sol, heat(cycle.dense(), s, 2e3), s, False, 1e-10)
    mixed = gd.heat_kernel(P, s, 1e4, tol=1e-9)
    assert (mixed.matvecs < 3000).all()  # and not 10 700
    check(mixed, heat(P.dense(), s, 1e4), s, False, 1e-10)


@given(problems(batches=((),)), st.sampled_from([0.5, 5.0, 40.0]))
def test_heat_is_a_semigroup_of_averages(problem, t):
    """Constants stay, ranges shrink, mass stays under the transpose, and times add up."""
    P, s, size = problem.P, problem.s, float(problem.s.abs().sum())
    y = gd.heat_kernel(P, s, t).value
    assert (y <= s.amax(0) + 2e-10 * size).all()
    assert (y >= s.amin(0) - 2e-10 * size).all()
    constant = gd.heat_kernel(P, torch.full_like(s, 3.0), t).value
    torch.testing.assert_close(constant, torch.full_like(s, 3.0), rtol=2e-10, atol=0)
    torch.testing.assert_close(gd.heat_kernel(P.T, s, t).value.sum(0), s.sum(0), rtol=0, atol=2e-10 * size)
    half = gd.heat_kernel(P, gd.heat_kernel(P, s, t / 2).value, t / 2).value
    torch.testing.assert_close(half, y, rtol=0, atol=4e-10 * size)


def test_diffusion_is_heat_stopped_at_a_random_time():
    """(1 − µ)(I − µP)⁻¹ = ∫ λe^−λt exp(−t(I − P)) dt with λ = (1 − µ)/µ, by Gauss-Laguerre's nodes."""
    P = scattered()
    s, mu = signal(P, 1), 0.6
    nodes, weights = np.polynomial.laguerre.laggauss(40)
    times = torch.from_numpy(nodes * mu / (1 - mu)).reshape(-1, 1, 1)
    y = gd.heat_kernel(P, s, times).value
    assert y.shape == (40, 200, 1)
    mean = (torch.from_numpy(weights)[:, None, None] * y).sum(0)
    assert (mean - gd.diffuse(P, s, mu)).abs().max() < 1e-6


def test_fewer_products_than_powers_take():
    """Chebyshev: about 7√t to 1e-10 where t + 7√t would be needed; 1/√2 of that where P ⪰ 0."""
    P, s = ring(), signal(ring())
    psi = 2 * torch.randn(200, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    A = gd.AttentionTransition(psi)
    for t in (100.0, 1000.0):
        taken = gd.heat_kernel(P, s.clone().requires_grad_(), t)
        assert taken.solver == "Chebyshev sum"
        assert (taken.matvecs <= 7.5 * t**0.5).all()
        powers = int(re.search(r"by powers (\d+)", taken.reason)[1])
        assert t + 6 * t**0.5 < powers < t + 8 * t**0.5
        lazy = gd.heat_kernel(A, s.clone().requires_grad_(), t, tol=1e-8)
        plain = gd.heat_kernel(P, s.clone().requires_grad_(), t, tol=1e-8)
        assert (lazy.matvecs < 0.85 * plain.matvecs).all()


def test_a_walk_that_has_mixed_ends_the_sum():
    psi = 0.3 * torch.randn(200, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    P, s = gd.AttentionTransition(psi), signal(ring())
    for t in (1000.0, 5000.0):
        sol = gd.heat_kernel(P, s, t, tol=1e-8)
        assert (sol.matvecs <= 20).all()
        check(sol, heat(P.dense(), s, t), s, False, 1e-10)
        # Gradients need the whole sum: a signal that has mixed says nothing of another.
        assert (gd.heat_kernel(P, s.clone().requires_grad_(), t, tol=1e-8).matvecs > 30).all()


def test_slow_is_not_mixed():
    """Little changes in a step of a long ring, and much in three thousand."""
    node = torch.arange(400)
    edges = torch.stack([node, (node + 1) % 400])
    P = gd.SparseTransition.from_edge_index(edges, undirected=True, reversible=False, dtype=torch.float64)
    theta = 2 * math.pi / 400
    s = torch.cos(theta * node.double())
    sol = gd.heat_kernel(P, s, 3000.0, tol=2e-3)
    exact = math.exp(-3000 * 2 * math.sin(theta / 2) ** 2) * s
    assert (sol.value - exact).abs().max() <= sol.error_bound <= 2e-3


def test_each_channel_and_graph_has_its_own_time():
    P, s = scattered(), signal(scattered())
    t = torch.tensor([[0.5, 90.0]], dtype=torch.float64)
    both = gd.heat_kernel(P, s, t)
    for k in range(2):
        alone = gd.heat_kernel(P, s[:, k], float(t[0, k]))
        assert torch.equal(alone.value, both.value[:, k])
        assert torch.equal(alone.steps, both.steps[k])
        assert torch.equal(alone.error_bound, both.error_bound[k])
    psi = torch.randn(3, 20, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    graphs, s = gd.AttentionTransition(psi), signal(gd.AttentionTransition(psi[0]))
    times = torch.tensor([1.0, 9.0, 50.0], dtype=torch.float64).reshape(3, 1, 1)
    together = gd.heat_kernel(graphs, s, times)
    assert together.value.shape == (3, 20, 2)
    for b in range(3):
        alone = gd.heat_kernel(gd.AttentionTransition(psi[b]), s, float(times[b]))
        assert torch.equal(alone.value, together.value[b])


@pytest.mark.parametrize("transposed", [False, True])
def test_a_walk_wrongly_called_reversible_is_found_out(transposed):
    """Its Chebyshev polynomials grow, the defect says so, and powers do it instead."""
    node = torch.arange(60)
    cycle = gd.SparseTransition.from_edge_index(torch.stack([node, (node + 1) % 60]), dtype=torch.float64)
    liar = gd.SparseTransition(
        cycle.indptr, cycle.indices, cycle.values, log_degree=torch.zeros(60, dtype=torch.float64)
    )
    s = signal(cycle)
    for t in (10.0, 100.0):
        P, D = (liar.T, cycle.dense().T) if transposed else (liar, cycle.dense())
        for recorded in (False, True):
            sol = gd.heat_kernel(P, s.clone().requires_grad_(recorded), t)
            assert sol.converged.all()
            check(sol, heat(D, s, t), s, transposed, 1e-12)


def test_nodes_that_heat_does_not_reach_stay_at_zero():
    W = torch.zeros(9, 9, dtype=torch.float64)
    W[:5, :5] = W[5:, 5:] = 1
    s = torch.zeros(9, dtype=torch.float64)
    s[0] = 1
    for t in (1.0, 100.0):
        y = gd.heat_kernel(gd.DenseTransition.from_affinity(W), s, t).value
        assert (y[5:] == 0).all()
        assert (y[:5] > 0).all()


def test_zero_gives_zero_and_no_time_gives_the_signal():
    P, s = scattered(), signal(scattered())
    zero = gd.heat_kernel(P, 0 * s, 5.0)
    assert (zero.value == 0).all()
    assert (zero.error_bound == 0).all()
    assert torch.equal(gd.heat_kernel(P, s, 0.0).value, s)


def test_half_precision_and_float32_beyond_its_rounding():
    P, s = ring().to(torch.bfloat16), signal(ring()).to(torch.bfloat16)
    sol = gd.heat_kernel(P, s, 5.0)
    assert sol.value.dtype == torch.bfloat16
    assert sol.converged.all()
    # 500 units of time round float32 by more than 1e-5: float64 does it.
    P, s = ring().to(torch.float32), signal(ring()).float()
    sol = gd.heat_kernel(P, s, 500.0)
    assert sol.converged.all()
    check(sol, heat(P.to(torch.float64).dense(), s, 500.0), s, False, 1e-11)
    with pytest.warns(gd.ConvergenceWarning, match=r"rounding in float32 allows no more.*or use float64"):
        gd.heat_kernel(P, s, 5.0, tol=1e-9)


@pytest.mark.parametrize("P", [ring(), scattered(undirected=False)], ids=["ring", "directed"])
def test_max_steps_is_kept_and_reported(P):
    s = signal(P)
    with pytest.warns(
        gd.ConvergenceWarning, match=r"heat_kernel, .* stopped at max_steps = 9.*; raise max_st"
    ):
        sol = gd.heat_kernel(P, s, 30.0, max_steps=9)
    assert not sol.converged.any()
    assert (sol.steps <= 9).all()
    check(sol, heat(P.dense(), s, 30.0), s, False)
    with pytest.raises(gd.ConvergenceError) as raised:
        gd.heat_kernel(P, s, 30.0, max_steps=9, on_failure="raise")
    assert torch.equal(raised.value.solution.value, sol.value)


# --- heat: gradients


def leaf_of(name, n=4):
    g = torch.Generator().manual_seed(17)
    leaf = OPERATORS[name].leaf(g, (), n)
    return leaf, (leaf != 0).double(), torch.randn(n, 2, generator=g, dtype=torch.float64)


@pytest.mark.parametrize(
    ("name", "transposed"),
    [*((name, False) for name in OPERATORS), ("directed", True), ("sparse star", True)],
)
def test_gradients_of_heat(name, transposed):
    leaf, edges, s = leaf_of(name)
    symmetric = OPERATORS[name].reversible and leaf.shape[-1] == leaf.shape[-2]

    def value(leaf, s, t):
        leaf = (leaf + leaf.mT) / 2 if symmetric else leaf
        P = OPERATORS[name].build(leaf * edges)
        return gd.heat_kernel(P.T if transposed else P, s, t, tol=1e-11, on_failure="ignore").value

    # Powers for the first channel, Chebyshev polynomials for the second where the walk is reversible.
    t = torch.tensor([[0.4, 2.6]], dtype=torch.float64)
    inputs = tuple(x.detach().clone().requires_grad_() for x in (leaf, s, t))
    assert gradcheck(value, inputs, fast_mode=True)
    if "attention" not in name or name == "scaled attention":  # whose second derivatives are slow
        assert gradgradcheck(value, inputs, fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("t", [0.0, 1.5, 60.0])
def test_derivatives_in_time_are_those_of_heat(t):
    """d/dt = −(I − P), once and twice, from t = 0 on; in the sum of powers and of Chebyshev polynomials."""
    for P in (ring(30), gd.DenseTransition.from_affinity(torch.rand(30, 30).double())):
        s, time = signal(P, 1), torch.tensor(t, dtype=torch.float64, requires_grad=True)
        L = torch.eye(30, dtype=torch.float64) - P.dense()
        y = gd.heat_kernel(P, s, time).value
        exact = heat(P.dense(), s, t)
        for i in (0, 7):
            (first,) = torch.autograd.grad(y[i, 0], time, create_graph=True)
            (second,) = torch.autograd.grad(first, time, retain_graph=True)
            assert abs(first + (L @ exact)[i, 0]) < 1e-8
            assert abs(second - (L @ L @ exact)[i, 0]) < 1e-8


def test_the_gradient_of_a_constant_signal_is_that_of_heat():
    """Its own sum could end at once; that of the cotangent may not."""
    P = scattered()
    s = torch.ones(200, dtype=torch.float64, requires_grad=True)
    g = signal(P)[:, 0]
    gd.heat_kernel(P, s, 20.0).value.backward(g)
    assert (s.grad - heat(P.dense().T, g[:, None], 20.0)[:, 0]).abs().max() < 1e-8


# --- polynomials


@given(
    problem=problems(),
    degree=st.integers(0, 8),
    basis=st.sampled_from(["monomial", "chebyshev", "bernstein"]),
    transposed=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    per_channel=st.booleans(),
)
@settings(max_examples=70)
def test_polynomials_keep_the_promise(problem, degree, basis, transposed, dtype, per_channel):
    P = problem.P.to(dtype)
    D = P.to(torch.float64).dense()
    P, D = (P.T, D.mT) if transposed else (P, D)
    s = problem.s.to(dtype)
    shape = (degree + 1, s.shape[-1]) if per_channel else (degree + 1,)
    c = torch.randn(shape, generator=torch.Generator().manual_seed(degree), dtype=torch.float64)
    sol = gd.polynomial(P, s, c, basis, on_failure="ignore")
    size = c.abs().sum(0) * norm(s.double(), transposed)
    exact = evaluated(D, s, c.unsqueeze(1), basis)
    slip = 1e-13 * 2**degree * size
    assert (norm(sol.value.double() - exact, transposed) <= sol.error_bound + slip).all()
    assert (sol.lower.double() <= exact + slip.unsqueeze(-2)).all()
    assert (sol.upper.double() >= exact - slip.unsqueeze(-2)).all()
    tol = 1e-5 if dtype == torch.float32 else 1e-10
    assert torch.equal(sol.converged, sol.error_bound <= tol * size)
    reachable = 2.5**degree * (degree + 1) * torch.as_tensor(P.rounding(torch.float64)) <= tol / 20
    assert (sol.converged | ~reachable.reshape(*reachable.shape[:-2], -1)).all()
    products = degree * (2 if basis == "bernstein" else 1)
    assert (sol.steps[size > 0] == degree).all()
    assert (sol.matvecs[size > 0] % max(products, 1) == 0).all()


@pytest.mark.parametrize("basis", ["monomial", "chebyshev", "bernstein"])
def test_the_certificate_of_polynomials_holds_to_the_last_digit(basis):
    g = torch.Generator().manual_seed(13)
    for name in ("directed", "star", "sparse path", "uniform jump", "grid"):
        for transposed in (False, True):
            P = OPERATORS[name].build(OPERATORS[name].leaf(g, (), 9))
            s = torch.randn(9, 2, generator=g, dtype=torch.float64)
            c = torch.randn(8, generator=g, dtype=torch.float64)
            D = P.dense().numpy().astype(np.longdouble)
            D, Q = (D.T, P.T) if transposed else (D, P)
            exact = in_extended_precision(D, s.numpy().astype(np.longdouble), c.tolist(), basis)
            sol = gd.polynomial(Q, s, c, basis)
            error = np.abs(sol.value.numpy() - exact)
            error = error.sum(0) if transposed else error.max(0)
            assert (error <= sol.error_bound.numpy()).all()
            assert (sol.lower.numpy() <= exact).all()
            assert (sol.upper.numpy() >= exact).all()


def in_extended_precision(D, s, c, basis):
    n, wide = len(c) - 1, np.longdouble
    if basis == "bernstein":
        y = 0
        for k in range(n + 1):
            term = s
            for _ in range(k):
                term = (term - D @ term) / 2
            for _ in range(n - k):
                term = (term + D @ term) / 2
            y = y + wide(c[k]) * math.comb(n, k) * term
        return y
    before, term = np.zeros_like(s), s
    y = wide(c[0]) * term
    for k in range(1, n + 1):
        product = D @ term
        following = 2 * product - before if basis == "chebyshev" and k > 1 else product
        before, term = term, following
        y = y + wide(c[k]) * term
    return y


def test_a_long_chebyshev_sum_is_certified_on_reversible_walks():
    """In general rounding may grow 2.4-fold a degree; of these walks it is known not to."""
    P, s = ring(), signal(ring())
    c = 0.9 ** torch.arange(60, dtype=torch.float64)
    sol = gd.polynomial(P, s, c, "chebyshev")
    assert sol.converged.all()
    check(sol, evaluated(P.dense(), s, c, "chebyshev"), s, False, 1e-12)
    directed = scattered(undirected=False)
    with pytest.warns(
        gd.ConvergenceWarning, match=r"graphdiff.polynomial, chebyshev sum, rounding in float64"
    ):
        sol = gd.polynomial(directed, s, c, "chebyshev")
    check(sol, evaluated(directed.dense(), s, c, "chebyshev"), s, False, 1e-12)


def test_a_false_claim_does_not_hide_growing_rounding():
    node = torch.arange(60)
    cycle = gd.SparseTransition.from_edge_index(torch.stack([node, (node + 1) % 60]), dtype=torch.float64)
    liar = gd.SparseTransition(
        cycle.indptr, cycle.indices, cycle.values, log_degree=torch.zeros(60, dtype=torch.float64)
    )
    s, c = signal(cycle), [0.0] * 40 + [1.0]
    honest, lying = (gd.polynomial(P, s, c, "chebyshev", on_failure="ignore") for P in (cycle, liar))
    assert torch.equal(honest.value, lying.value)
    assert torch.equal(honest.error_bound, lying.error_bound)


def test_filters_that_users_know():
    P, s = scattered(), signal(scattered())
    # GDC's view: diffusion and heat are power series.
    mu, t = 0.5, 3.0
    ppr = gd.polynomial(P, s, [(1 - mu) * mu**k for k in range(50)])
    assert (ppr.value - gd.diffuse(P, s, mu)).abs().max() < 1e-9
    poisson = [math.exp(-t) * t**k / math.factorial(k) for k in range(40)]
    assert (gd.polynomial(P, s, poisson).value - gd.heat_kernel(P, s, t).value).abs().max() < 1e-9
    # BernNet's: equal coefficients are no filter, k/n the line 1 − λ falls along.
    assert (gd.polynomial(P, s, [1.0] * 9, "bernstein").value - s).abs().max() < 1e-12
    line = gd.polynomial(P, s, [k / 8 for k in range(9)], "bernstein").value
    assert (line - (s - P @ s) / 2).abs().max() < 1e-12


@pytest.mark.parametrize("name", ["directed", "sparse star", "uniform jump", "function", "flat attention"])
@pytest.mark.parametrize("basis", ["monomial", "chebyshev", "bernstein"])
def test_gradients_of_polynomials(name, basis):
    leaf, edges, s = leaf_of(name)
    symmetric = OPERATORS[name].reversible and leaf.shape[-1] == leaf.shape[-2]

    def value(leaf, s, c):
        leaf = (leaf + leaf.mT) / 2 if symmetric else leaf
        return gd.polynomial(OPERATORS[name].build(leaf * edges).T, s, c, basis, on_failure="ignore").value

    c = torch.randn(4, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs = tuple(x.detach().clone().requires_grad_() for x in (leaf, s, c))
    assert gradcheck(value, inputs, fast_mode=True)
    assert gradgradcheck(value, inputs, fast_mode=True, atol=1e-4)


def test_shapes_and_gradients_of_evidence():
    P = gd.AttentionTransition(torch.randn(3, 5, 2))
    for sol in (
        gd.heat_kernel(P, torch.randn(5, requires_grad=True), 2.0),
        gd.polynomial(P, torch.randn(5, requires_grad=True), [1.0, 2.0]),
    ):
        assert sol.value.shape == sol.lower.shape == (3, 5)
        assert sol.error_bound.shape == sol.matvecs.shape == sol.converged.shape == (3,)
        assert sol.value.requires_grad
        assert not any(x.requires_grad for x in (sol.lower, sol.upper, sol.error_bound))
    # Learned coefficients and time may be float32, like everything else in a model.
    c = torch.tensor([0.5, 0.5], requires_grad=True)
    gd.polynomial(P, torch.randn(3, 5, 2), c).value.sum().backward()
    assert c.grad.dtype == torch.float32


# --- input

P4, S4 = gd.AttentionTransition(torch.randn(4, 2)), torch.randn(4, 3)
RESTARTS = gd.SparseTransition.from_edge_index(torch.tensor([[0], [1]]), dangling="restart")


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.eye(4), S4, 1.0), {}, TypeError, r"P: expected a Transition, got Tensor; wrap a matrix"),
        ((RESTARTS, torch.ones(2), 1.0), {}, ValueError, r"P: .* restarts at a signal; bind one with P.rest"),
        ((P4, torch.randn(5), 1.0), {}, ValueError, r"s: expected shape .* N = 4"),
        ((P4, S4.double(), 1.0), {}, TypeError, r"s: expected dtype torch.float32 like P"),
        ((P4, S4 / 0, 1.0), {}, ValueError, r"s: expected finite values"),
        ((P4, S4, -1.0), {}, ValueError, r"t: expected finite times ≥ 0, got values from -1 to -1"),
        ((P4, S4, float("inf")), {}, ValueError, r"t: expected finite times ≥ 0"),
        ((P4, S4, "1"), {}, TypeError, r"t: expected a number or a tensor, got str"),
        ((P4, S4, torch.rand(3)), {}, ValueError, r"t: expected a number, .* with K = 3, got \[3\]"),
        ((P4, S4, torch.rand(4, 1)), {}, ValueError, r"got \[4, 1\]; nodes have one time"),
        ((P4, S4, torch.tensor(1)), {}, TypeError, r"t: .* got torch.int64"),
        ((P4, S4, 1.0), {"tol": -1}, ValueError, r"tol: expected a finite number > 0"),
        ((P4, S4, 1.0), {"max_steps": 0}, ValueError, r"max_steps: expected an integer ≥ 1"),
        ((P4, S4, 1.0), {"on_failure": "x"}, ValueError, r'on_failure: expected "warn", "raise" or "ignore"'),
        ((P4, S4, torch.rand(2, 1, 1), ), {"tol": 0.0}, ValueError, r"tol: "),
    ],
)  # fmt: skip
def test_bad_input_to_heat(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gd.heat_kernel(*arguments, **options)


@pytest.mark.parametrize(
    ("coefficients", "options", "error", "message"),
    [
        (0.5, {}, TypeError, r"coefficients: expected a list of numbers or a tensor, got float"),
        (["a"], {}, TypeError, r"coefficients: expected a list of numbers or a tensor, got list"),
        ([], {}, ValueError, r"coefficients: expected shape \[n \+ 1\], or .* K = 3 channels, got \[0\]"),
        (torch.rand(2, 2), {}, ValueError, r"with K = 3 channels, got \[2, 2\]"),
        (torch.tensor([1, 2]), {}, TypeError, r"coefficients: .* got torch.int64"),
        ([float("nan")], {}, ValueError, r"coefficients: expected finite values, got 1"),
        ([1.0], {"basis": "legendre"}, ValueError, r"""basis: expected "monomial", .* got 'legendre'"""),
    ],
)
def test_bad_input_to_polynomials(coefficients, options, error, message):
    with pytest.raises(error, match=message):
        gd.polynomial(P4, S4, coefficients, **options)
