"""DirectedSSOR: its triangles and bounds, bits no neighbour changes, what goes on after it, no numba."""

import importlib.util
import itertools
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import sparse

import graphdiff as gd
from tests.graphdiff.zoo import oracle

f64 = {"dtype": torch.float64}
with_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba, the extra [compiled], is absent"
)
DirectedSSOR = gd.solvers.DirectedSSOR()


def one_way(nodes, seed, loops=True, share=0.3, **options):
    """A graph of random weights, few of whose edges go both ways, and its walk."""
    g = torch.Generator().manual_seed(seed)
    W = torch.rand(nodes, nodes, generator=g, **f64) * (torch.rand(nodes, nodes, generator=g) < share)
    W = W + torch.diag(torch.ones(nodes - 1, **f64), 1)
    W = W if loops else W - torch.diag(W.diagonal())
    return gd.SparseTransition.from_scipy(sparse.csr_array(W.numpy()), **options)


def triangles(P, mu, narrow=False):
    """L, U and the order, and what the solver keeps beside; in float32 as it sweeps, or in float64."""
    from graphdiff.solvers import directed_ssor

    nodes = P.shape[-1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(directed_ssor, "NEAR", 0.0 if narrow else 2.0)
        (found,) = DirectedSSOR.prepare(P, torch.as_tensor(mu, **f64).reshape(-1, 1)).triangles
    assert (found.lower[3].dtype == "float32") == narrow

    def dense(triangle):
        starts, numbers, values, gains = triangle
        values = np.ones(len(numbers)) if values is None else values
        starts, numbers, values, gains = (
            torch.from_numpy(x.astype("f8")) for x in (starts, numbers, values, gains)
        )
        T = torch.zeros(nodes, nodes, **f64)
        for a in range(nodes):
            some = slice(int(starts[a]), int(starts[a + 1]))
            T[a, numbers[some].long()] = values[some]
        return gains[:, None] * T

    order = torch.from_numpy(found.place.astype("i8")).argsort()
    return dense(found.lower), dense(found.upper), order, found


@with_numba
@settings(max_examples=60)
@given(
    st.integers(3, 30),
    st.integers(0, 2**20),
    st.sampled_from([0.3, 0.85, 0.99]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_the_triangles_are_those_of_the_system_and_what_bounds_the_residual_does(
    nodes, seed, mu, each, transposed, loops, equal
):
    P = one_way(nodes, seed, loops)
    if equal:
        P = gd.SparseTransition.from_scipy((P.to_scipy() != 0).astype("f8"))
    # As on a path.
    equal = P.equal_steps()
    scale = P.to_scipy().count_nonzero(axis=1) if equal and transposed else np.ones(1)
    P = P.T if transposed else P
    g = torch.Generator().manual_seed(seed)
    m = mu * torch.rand(nodes, generator=g, **f64) if each else torch.full((nodes,), mu, **f64)
    L, U, order, found = triangles(P, m if each else mu)
    assert sorted(order.tolist()) == list(range(nodes))
    assert (L.triu() == 0).all()
    assert (U.tril() == 0).all()
    assert found.scale == pytest.approx(scale, rel=1e-15)
    assert not equal or found.lower[2] is None
    # In the answer over the scale.
    system = (torch.eye(nodes, **f64) - m[:, None] * P.dense()) * torch.from_numpy(found.scale)
    system = system[order][:, order]
    diagonal = system.diagonal()
    torch.testing.assert_close(system / diagonal[:, None], torch.eye(nodes, **f64) - L - U)
    for rough, exact in zip(triangles(P, m if each else mu, narrow=True), (L, U), strict=False):
        torch.testing.assert_close(rough, exact, rtol=1.25e-7, atol=1e-13)
    inverse, weights = map(torch.from_numpy, (found.inverse, found.weights))
    torch.testing.assert_close(inverse[order], 1 / diagonal)
    # Some entries large, as where one node's row decides.
    rho = torch.randn(nodes, generator=g, **f64) ** 3

    def swept(rho):
        """The residual of x + ρ."""
        return diagonal.diag() @ (rho - L @ rho) - system @ rho

    residual, rest = swept(rho), 1 - m[order]
    if transposed:
        error, bound = residual.abs().sum() / rest.min(), found.bound * (rho.abs() * weights).sum()
    else:
        error, bound = (residual.abs() / rest).max(), found.bound * (rho.abs() * weights).max()
    assert error <= bound * (1 + 1e-12)
    # And is reached: by a ρ whose terms do not cancel.
    if transposed:
        sums = swept(torch.eye(nodes, **f64)).abs().sum(0)
        torch.testing.assert_close(sums / rest.min(), found.bound * weights, rtol=1e-10, atol=1e-13)
    else:
        reached = (swept(torch.ones(nodes, **f64)) / rest).max()
        torch.testing.assert_close(reached, torch.tensor(found.bound, **f64), rtol=1e-10, atol=1e-13)


@with_numba
@settings(max_examples=40, deadline=None)
@given(st.integers(2, 60), st.integers(0, 2**20), st.booleans(), st.booleans(), st.booleans(), st.booleans())
def test_answers_on_a_graph_without_weights_are_those_of_the_dense_system(
    nodes, seed, each, narrow, started, transposed
):
    g, random = torch.Generator().manual_seed(seed), np.random.default_rng(seed)
    W = random.random((nodes, nodes)) < random.choice([0.02, 0.1, 0.5])
    dtype = torch.float32 if narrow else torch.float64
    # Nodes without an edge out stay where they are.
    P = gd.SparseTransition.from_scipy(sparse.csr_array(W.astype("f8")), dangling="self").to(dtype)
    P = P.T if transposed else P
    mu = torch.rand(nodes, 1, generator=g, **f64).mul(0.95) if each else torch.tensor([[0.9]], **f64)
    mu = torch.where(torch.rand(mu.shape, generator=g) < 0.2, 0.0, mu).to(dtype) if each else mu.to(dtype)
    s = torch.randn(nodes, 5, generator=g, **f64).to(dtype)
    s[:, 1], s[:, 2] = torch.eye(nodes, dtype=dtype)[:, 0], 1.0
    start = torch.randn(nodes, 5, generator=g, **f64).to(dtype) if started else None
    sol = gd.solve(P, s, mu, solver=DirectedSSOR, initial=start)
    assert sol.converged.all()
    exact = torch.linalg.solve(
        torch.eye(nodes, **f64) - mu.double() * P.dense().double(), (1 - mu.double()) * s.double()
    )
    apart = (sol.value.double() - exact).abs()
    error = apart.sum(0) if transposed else apart.amax(0)
    assert (error <= sol.error_bound.squeeze() + 1e-12).all()
    for k in (0, 2):
        guess = None if start is None else start[:, k]
        alone = gd.solve(P, s[:, k], mu, solver=DirectedSSOR, initial=guess)
        assert torch.equal(alone.value, sol.value[:, k])
        assert torch.equal(alone.matvecs, sol.matvecs[k])


@with_numba
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_signal_has_its_bits_and_steps_in_any_company_and_by_any_threads(dtype, transposed, monkeypatch):
    P = one_way(300, 2, share=0.02).to(dtype)
    P = P.T if transposed else P
    # More than two lines of lanes, and of one signal alone, two, a line, and a line and one.
    s = torch.randn(300, 37, generator=torch.Generator().manual_seed(1), **f64)
    s[:, ::3] = torch.eye(300, 13, **f64)
    s = s.to(dtype)
    together = gd.solve(P, s, 0.95, solver=DirectedSSOR)
    assert together.converged.all()
    assert len(set(together.steps.tolist())) > 1
    for some in ([0], [36], [3, 11], list(range(8)), list(range(9)), list(range(36, -1, -1))):
        alone = gd.solve(P, s[:, some], 0.95, solver=DirectedSSOR)
        assert torch.equal(alone.value, together.value[:, some])
        assert torch.equal(alone.steps, together.steps[some])
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        again = gd.solve(P, s.expand(2, 300, 37), 0.95, solver=DirectedSSOR)
        for mate in (0, 1):
            assert torch.equal(again.value[mate], together.value)
            assert torch.equal(again.steps[mate], together.steps)


def renewals(sol):
    """How often the solver computed each residual anew in float64, of a solve that took one certificate."""
    return (2 * (sol.matvecs - 2 * sol.steps - 1) - 4 + 1) // 3


@with_numba
@pytest.mark.parametrize("transposed", [False, True])
def test_a_signal_has_its_bits_and_renewals_beside_others_that_began_nearer(transposed):
    P = one_way(300, 2, share=0.02)
    P = P.T if transposed else P
    s = torch.randn(300, 20, generator=torch.Generator().manual_seed(1), **f64)
    s[:, ::3] = torch.eye(300, 7, **f64)
    exact = gd.diffuse(P, s, 0.95, tol=1e-12, solver=gd.solvers.Direct())
    g = torch.Generator().manual_seed(5)
    off = 10.0 ** -torch.arange(20.0, **f64).remainder(9)
    start = exact + off * s.abs().sum(0) * torch.randn(300, 20, generator=g, **f64) / 300
    together = gd.solve(P, s, 0.95, tol=1e-9, solver=DirectedSSOR, initial=start)
    assert together.converged.all()
    assert {0, 1, 2} <= set(renewals(together).tolist())
    for some in (*([k] for k in range(20)), [3, 11, 7], list(range(19, -1, -1))):
        alone = gd.solve(P, s[:, some], 0.95, tol=1e-9, solver=DirectedSSOR, initial=start[:, some])
        assert torch.equal(alone.value, together.value[:, some])
        assert torch.equal(alone.steps, together.steps[some])
        assert torch.equal(alone.matvecs, together.matvecs[some])


@with_numba
@pytest.mark.parametrize("mu", [0.5, 0.95, 0.995, 0.9999])
@pytest.mark.parametrize("transposed", [False, True])
def test_float32_sweeps_reach_what_float64_can_be_asked_for(mu, transposed):
    """And in one go: nobody starts again because what was claimed did not hold."""
    P = one_way(300, 2, share=0.02)
    s = torch.randn(300, 5, generator=torch.Generator().manual_seed(1), **f64)
    Q = P.T if transposed else P
    narrow = DirectedSSOR.prepare(Q, torch.full((1, 1), mu, **f64)).triangles[0].lower[3].dtype == "float32"
    assert narrow == (mu < 0.999)
    solved = []
    with pytest.MonkeyPatch.context() as patched:
        solve = type(DirectedSSOR).solve
        patched.setattr(type(DirectedSSOR), "solve", lambda *a: solved.append(1) or solve(*a))
        tol = 1e-12 / (1 - mu)
        sol = gd.solve(Q, s, mu, tol=tol, solver=DirectedSSOR)
    assert sol.converged.all()
    assert len(solved) == 1
    error = (sol.value - oracle(Q.dense(), s, mu)).abs()
    size = s.abs().sum(0) if transposed else s.abs().amax(0)
    assert ((error.sum(0) if transposed else error.amax(0)) <= tol * size).all()


@with_numba
def test_a_start_is_kept_to_its_last_digit():
    """It goes into float64 as it is: what is not better than float32 would have it is not touched."""
    P = one_way(300, 2, share=0.02)
    s = torch.randn(300, 3, generator=torch.Generator().manual_seed(1), **f64)
    for Q in (P, P.T):
        exact = gd.diffuse(Q, s, 0.9, solver=gd.solvers.Direct())
        sol = gd.solve(Q, s, 0.9, tol=1e-11, solver=DirectedSSOR, initial=exact)
        assert sol.steps.tolist() == [0, 0, 0]
        nearly = exact * (1 + 1e-9 * torch.randn(300, 3, generator=torch.Generator().manual_seed(2), **f64))
        sol = gd.solve(Q, s, 0.9, tol=1e-11, solver=DirectedSSOR, initial=nearly)
        assert (sol.steps > 0).all()
        assert (sol.steps <= 4).all()
        assert (renewals(sol) == 0).all()
        torch.testing.assert_close(sol.value, exact, rtol=0, atol=1e-10)


def of_equal_rows(nodes, seed):
    """A walk most of whose ways are one way, many of whose nodes have as many edges as others."""
    random = np.random.default_rng(seed)
    length = np.repeat(random.integers(1, 2 + seed % 20, 1 + nodes // 20), 20)[:nodes]
    rows = np.repeat(np.arange(nodes), length)
    columns = random.integers(0, np.where(random.random(len(rows)) < 0.5, 1 + nodes // 8, nodes))
    weights = random.choice([0.5, 1.0, 2.0], len(rows)) if seed % 2 else np.ones(len(rows))
    W = sparse.coo_array((weights, (rows, columns)), (nodes, nodes)).tocsr()
    if not seed % 2:
        W.data[:] = 1
    return gd.SparseTransition.from_scipy(W)


@with_numba
@settings(max_examples=40, deadline=None)
@given(
    st.integers(20, 300), st.integers(0, 2**20), st.booleans(), st.booleans(), st.booleans(), st.booleans()
)
def test_steps_of_one_signal_have_the_bits_they_have_in_company(
    nodes, seed, narrow, summed, kept, transposed
):
    from graphdiff.solvers import directed_sweeps as sweeps

    P, random = of_equal_rows(nodes, seed), np.random.default_rng(seed)
    P = P.T if transposed else P
    L, U, _, found = triangles(P, 0.9, narrow)
    dtype = "f4" if narrow else "f8"
    vectors = random.standard_normal((7, nodes, 8)).astype(dtype)
    scales, shadow = random.random((3, 1, 8)).astype(dtype), random.standard_normal(nodes)
    weights, none = random.random(nodes), np.empty(0, "u4")

    def swept(some):
        lanes = (0,) * len(some)
        x, best, r, p, v, t, w = (np.ascontiguousarray(vector[:, some]) for vector in vectors)
        turn, along, across = (np.ascontiguousarray(scale[:, some]) for scale in scales)
        better, sums = np.full_like(turn, float(kept)), np.zeros((5, 2, len(some)))
        lower, upper = ((*half, none) for half in (found.lower, found.upper))
        if len(some) == 1:
            lower, upper = map(sweeps.copied_in_groups, (found.lower, found.upper))
        seen = [(x, best, r)]
        sweeps._turned(upper, r, p, v, turn, along, t, lanes)
        seen.append((p, t))
        sweeps._seen(lower, p, t, w, shadow, sums[0], lanes)
        seen.append((w,))
        seen = [tuple(y.copy() for y in some) for some in seen]
        sweeps._halfway(upper, x, best, r, v, t, w, across, better, kept, lanes)
        seen.append(tuple(y.copy() for y in (x, best, r, v, t)))
        sweeps._lessened(lower, r, t, w, sums[1], lanes)
        seen.append((w.copy(),))
        sweeps.moved(x, r, t, w, along, shadow, weights, summed, sums[2], lanes)
        seen.append((x, r))
        sweeps.measured(v, shadow, weights, summed, sums[3], lanes)
        return [y for some in seen for y in some], sums

    together, sums = swept(range(8))
    for k in (0, 7):
        alone, its_sums = swept([k])
        for ours, wanted in zip(alone, together, strict=True):
            assert np.array_equal(ours, wanted[:, [k]])
        assert np.array_equal(its_sums, sums[..., [k]])
    x, best, r, p, t, w, x1, best1, r1, v1, t1, w1, x2, r2 = (
        torch.from_numpy(y.astype("f8")) for y in together
    )
    turn, along, across = (torch.from_numpy(scale.astype("f8")) for scale in scales)
    near = {"rtol": 1e-3 if narrow else 1e-11, "atol": 1e-3 if narrow else 1e-11}
    given_p, given_v = (torch.from_numpy(vectors[k].astype("f8")) for k in (3, 4))
    torch.testing.assert_close(p, r + turn * (given_p - along * given_v), **near)
    torch.testing.assert_close(t - U @ t, p, **near)
    torch.testing.assert_close(w - L @ w, p - t, **near)
    torch.testing.assert_close(best1, x + r if kept else best, **near)
    torch.testing.assert_close(x1, x + across * t, **near)
    torch.testing.assert_close(v1, t + w, **near)
    torch.testing.assert_close(r1, r - across * v1, **near)
    torch.testing.assert_close(t1 - U @ t1, r1, **near)
    torch.testing.assert_close(w1 - L @ w1, r1 - t1, **near)
    torch.testing.assert_close(x2, x1 + along * t1, **near)
    torch.testing.assert_close(r2, r1 - along * (t1 + w1), **near)
    near = {"rtol": 1e-3 if narrow else 1e-9, "atol": 1e-3 if narrow else 1e-9}
    for y, found_sums in ((r2, sums[2]), (v1, sums[3])):
        most = (y.abs() * torch.from_numpy(weights)[:, None]).sum(0)
        most = most if summed else (y.abs() * torch.from_numpy(weights)[:, None]).amax(0)
        wanted = torch.stack([torch.from_numpy(shadow) @ y, most])
        torch.testing.assert_close(torch.from_numpy(found_sums), wanted, **near)
    torch.testing.assert_close(torch.from_numpy(sums[0, 0]), torch.from_numpy(shadow) @ (t + w), **near)
    wanted = torch.stack([(r1 * (t1 + w1)).sum(0), (t1 + w1).square().sum(0)])
    torch.testing.assert_close(torch.from_numpy(sums[1]), wanted, **near)


@with_numba
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 10, 101])
def test_a_move_of_one_signal_has_the_bits_it_has_in_company(nodes, dtype, summed):
    from graphdiff.solvers import directed_sweeps

    g = torch.Generator().manual_seed(nodes)
    vectors = torch.randn(4, nodes, 8, generator=g, dtype=dtype)
    along, scales = torch.rand(1, 8, generator=g, dtype=dtype), torch.rand(2, nodes, generator=g, **f64)

    def move(some):
        x, r, t, w = (v[:, some].clone() for v in vectors)
        arrays = [v.contiguous().numpy() for v in (x, r, t, w, along[:, some])]
        sums = torch.zeros(2, len(some), **f64)
        directed_sweeps.moved(*arrays, *scales.numpy(), summed, sums.numpy(), (0,) * len(some))
        return *(torch.from_numpy(v) for v in arrays[:2]), sums

    together = move(range(8))
    for k in (0, 7):
        for alone, found in zip(move([k]), together, strict=True):
            assert torch.equal(alone, found[:, k : k + 1])
    x, r, t, w = vectors
    torch.testing.assert_close(together[0], x + along * t)
    torch.testing.assert_close(together[1], r - along * (t + w))
    r, (shadow, weights) = together[1].double(), scales.unsqueeze(-1)
    torch.testing.assert_close(together[2][0], (r * shadow).sum(0))
    size = r.abs() * weights
    torch.testing.assert_close(together[2][1], size.sum(0) if summed else size.amax(0))


@with_numba
def test_signals_of_all_sizes_side_by_side():
    P = one_way(200, 5)
    s = torch.randn(200, 6, generator=torch.Generator().manual_seed(2), **f64)
    size = torch.tensor([1.0, 1e-200, 1e200, 0.0, 1e-30, 1e30], **f64)
    for Q, wanted in ((P, P.dense()), (P.T, P.dense().T)):
        sol = gd.solve(Q, s * size, 0.9, solver=DirectedSSOR)
        assert sol.converged.all()
        exact = oracle(wanted, s, 0.9)
        scaled = sol.value / size.where(size > 0, torch.tensor(1.0, **f64))
        assert ((scaled - exact)[:, size > 0].abs() < 1e-7).all()
        assert (sol.value[:, 3] == 0).all()


@with_numba
@settings(max_examples=60)
@given(
    st.integers(1, 25),
    st.integers(0, 2**20),
    st.sampled_from([0.2, 0.9, 0.999]),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_bounds_hold_on_any_walk(nodes, seed, mu, transposed, dtype):
    """Chains, absorbing nodes and whole classes that are left for good among them."""
    P = one_way(nodes, seed, share=0.1).to(dtype)
    s = torch.randn(nodes, 3, generator=torch.Generator().manual_seed(seed), **f64).to(dtype)
    Q = P.T if transposed else P
    sol = gd.solve(Q, s, mu, solver=DirectedSSOR)
    error = (sol.value.double() - oracle(Q.dense(), s, mu)).abs()
    error = error.sum(0) if transposed else error.amax(0)
    assert sol.converged.all()
    assert (error <= sol.error_bound.squeeze().double() + 1e-11 * s.abs().sum()).all()


@with_numba
def test_each_mu_of_a_batch_and_nodes_that_stay():
    P = one_way(81, 4, share=0.1)
    s = torch.randn(2, 81, 2, generator=torch.Generator().manual_seed(3), **f64)
    node = torch.rand(81, 1, generator=torch.Generator().manual_seed(4), **f64)
    node = node * (torch.arange(81) % 3 > 0)[:, None]
    for mu in (torch.tensor([[0.5, 0.999]], **f64), torch.tensor([[[0.9]], [[0.99]]], **f64), node):
        for walk in (P, P.T):
            sol = gd.solve(walk, s, mu, solver=DirectedSSOR, initial=torch.ones_like(s))
            exact = gd.diffuse(walk, s, mu, solver=gd.solvers.Direct())
            torch.testing.assert_close(sol.value, exact, rtol=0, atol=1e-8)
            if mu is node:
                assert torch.equal(sol.value[:, ::3], s[:, ::3])


@with_numba
def test_nodes_that_a_signal_does_not_reach_stay_at_zero():
    edges = torch.tensor([[0, 1, 2, 2, 4, 5, 6], [1, 2, 3, 0, 5, 6, 7]])
    P = gd.SparseTransition.from_edge_index(edges, **f64)
    s = torch.eye(8, **f64)[:, [1, 6]]
    forth, back = (gd.solve(Q, s, 0.9, solver=DirectedSSOR).value for Q in (P.T, P))
    assert (forth == 0).T.tolist() == [[False] * 4 + [True] * 4, [True] * 6 + [False] * 2]
    assert (back == 0).T.tolist() == [[False] * 3 + [True] * 5, [True] * 4 + [False] * 3 + [True]]


@with_numba
def test_far_fewer_products_than_bicgstab_from_single_nodes_and_few_from_a_good_first_guess():
    P = one_way(600, 9, share=0.01)
    s = torch.eye(600, 8, **f64)
    for Q in (P, P.T):
        ours, plain = (
            gd.solve(Q, s, 0.99, tol=1e-8, solver=x) for x in (DirectedSSOR, gd.solvers.BiCGSTAB())
        )
        assert ours.converged.all()
        # Residuals in float64 are counted, of which one signal may need more than another.
        assert (ours.matvecs <= plain.matvecs).all()
        assert ours.matvecs.sum() < 0.8 * plain.matvecs.sum()
        assert (gd.solve(Q, s, 0.99, tol=1e-8, solver=DirectedSSOR, initial=ours.value).steps <= 1).all()


@with_numba
def test_steps_are_limited_signal_by_signal():
    P = one_way(400, 3, share=0.01)
    s = torch.randn(400, 9, generator=torch.Generator().manual_seed(4), **f64)
    s[:, 4] = 1.0
    for asked in (5, 1):
        sol = gd.solve(P, s, 0.99, solver=DirectedSSOR, max_steps=asked, on_failure="ignore")
        assert sol.steps.tolist() == [0 if k == 4 else asked for k in range(9)]
        assert sol.converged.squeeze().tolist() == [k == 4 for k in range(9)]
        error = (sol.value - oracle(P.dense(), s, 0.99)).abs().amax(0)
        assert (error <= sol.error_bound.squeeze() + 1e-12).all()


@with_numba
@pytest.mark.parametrize(("nodes", "seed", "share", "mu"), [(400, 3, 0.004, 0.999), (300, 7, 0.005, 0.99)])
def test_one_step_more_never_makes_the_answer_worse(nodes, seed, share, mu):
    """Residuals do not fall steadily: what is handed back is the best x so far."""
    P, s = one_way(nodes, seed, share=share), torch.eye(nodes, 1, **f64)
    for Q in (P, P.T):
        bounds = [
            float(gd.solve(Q, s, mu, solver=DirectedSSOR, max_steps=k, on_failure="ignore").error_bound)
            for k in range(1, 20)
        ]
        assert bounds[-1] < 0.1 * bounds[0]
        # The best by the solver's own bound, of which the certificate's is a little different.
        assert all(later <= 1.1 * earlier for earlier, later in itertools.pairwise(bounds))


@with_numba
def test_what_is_added_up_changes_neither_the_answer_nor_the_best_one():
    from graphdiff.solvers import directed_sweeps

    g = torch.Generator().manual_seed(3)
    x, best = torch.randn(2, 50, 8, generator=g)
    y, place = torch.randn(50, 8, generator=g, **f64), torch.randperm(50, generator=g)
    mask = torch.tensor([[1.0, 0.0] * 4])
    # Small integers, which no dtype rounds.
    before = [v.mul_(8).round_().clone() for v in (x, best, y)]
    arrays = (v.numpy() for v in (mask, x, best, y))
    directed_sweeps.gathered(place.numpy().astype("u4"), *arrays, (0,) * 8)
    assert (x[:, ::2] == 0).all()
    for now, then in zip((x, best, y), before, strict=True):
        assert torch.equal(now[:, 1::2], then[:, 1::2])
    for k in (0, 1):
        assert torch.equal(y + (x, best)[k][place], before[2] + before[k][place])


@with_numba
def test_no_line_of_signals_begins_after_the_time_is_up():
    P = one_way(400, 3, share=0.01)
    s = torch.randn(400, 17, generator=torch.Generator().manual_seed(4), **f64)
    sol = gd.solve(P, s, 0.99, solver=DirectedSSOR, max_seconds=1e-9, on_failure="ignore")
    assert sol.steps.tolist() == [1] * 16 + [0]


@with_numba
@pytest.mark.parametrize("transposed", [False, True])
def test_walks_go_on_from_the_best_where_it_breaks_down(transposed, monkeypatch):
    """A shadow that what is left is orthogonal to after some steps: the product with it vanishes."""
    P = one_way(300, 7, share=0.02)
    Q, s = P.T if transposed else P, torch.eye(300, 2, **f64)
    sound = DirectedSSOR.prepare(Q, torch.full((1, 1), 0.9, **f64))
    assert len(sound.shadow) == 300
    blind = sound._replace(shadow=np.zeros(300))
    monkeypatch.setattr(type(DirectedSSOR), "prepare", lambda *_: blind)
    sol = gd.solve(Q, s, 0.9, solver=DirectedSSOR)
    assert sol.converged.all()
    torch.testing.assert_close(sol.value, oracle(Q.dense(), s, 0.9), rtol=0, atol=1e-9)
    walked = gd.solve(Q, s, 0.9, solver=gd.solvers.Walk())
    assert (sol.steps - walked.steps).abs().max() <= 1


@with_numba
def test_auto_takes_it_and_says_why_and_others_are_named_where_it_does_not_apply():
    P = one_way(400, 3, share=0.01)
    s = torch.randn(400, 2, generator=torch.Generator().manual_seed(4), **f64)
    for Q in (P, P.T):
        sol = gd.solve(Q, s, 0.9)
        assert sol.solver == "DirectedSSOR()"
        assert sol.reason.startswith("sparse, not reversible: walks would take at most about")
        # A matrix for each µ would be kept.
        assert gd.solve(Q, s, torch.tensor([[0.5, 0.9]], **f64)).solver == "Walk() or BiCGSTAB()"
    dense = gd.DenseTransition.from_affinity(torch.ones(3, 3, **f64))
    with pytest.raises(
        ValueError, match=r"DirectedSSOR needs a sparse walk .*, got Dense.* use BiCGSTAB\(\)"
    ):
        gd.diffuse(dense, torch.ones(3, **f64), 0.5, solver=DirectedSSOR)


@with_numba
def test_reversible_walks_too():
    P = gd.grid_transition(torch.rand(1, 12, 12, generator=torch.Generator().manual_seed(2), **f64), beta=9.0)
    s = torch.randn(144, 3, generator=torch.Generator().manual_seed(4), **f64)
    for Q in (P, P.T):
        sol = gd.solve(Q, s, 0.99, solver=DirectedSSOR)
        torch.testing.assert_close(sol.value, oracle(Q.dense(), s, 0.99), rtol=0, atol=1e-8)


def test_without_numba_auto_walks_and_the_error_says_what_to_install():
    script = """
        import sys
        sys.modules["numba"] = None
        import torch, graphdiff as gd
        edges = torch.stack([torch.arange(400), (torch.arange(400) * 7 + 1) % 400])
        P = gd.SparseTransition.from_edge_index(edges)
        s = torch.eye(400)[0]
        print(gd.solve(P, s, 0.9).solver)
        try:
            gd.solve(P, s, 0.9, solver=gd.solvers.DirectedSSOR())
        except ImportError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "Walk() or BiCGSTAB()",
        "solver: DirectedSSOR needs numba; pip install numba, or use BiCGSTAB()",
    ]
