"""SSOR: its condition number, its triangles and bounds, bits no neighbour changes, life without numba."""

import dataclasses
import importlib.util
import math
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
SSOR = gd.solvers.SSOR()


def weighted(nodes, seed, loops=True, zeros=False, spread=1.0):
    """A connected graph of random weights, some nodes far heavier than others, and its walk."""
    g = torch.Generator().manual_seed(seed)
    scale = (spread * torch.randn(nodes, generator=g, **f64)).exp()
    W = torch.rand(nodes, nodes, generator=g, **f64) * (torch.rand(nodes, nodes, generator=g) < 0.3)
    W = W + torch.diag(torch.ones(nodes - 1, **f64), 1)
    W = scale[:, None] * W * scale
    W = W + W.T
    W = W if loops else W - torch.diag(W.diagonal())
    if zeros and bool((W == 0).any()):
        # An edge of weight 0 each way, which is stored all the same.
        i, j = (W == 0).nonzero()[0].tolist()
        edges = torch.cat([W.nonzero().T, torch.tensor([[i, j], [j, i]])], 1)
        return gd.SparseTransition.from_edge_index(edges, W[tuple(edges)], nodes)
    return gd.SparseTransition.from_scipy(sparse.csr_array(W.numpy()))


def unweighted(nodes, seed, loops=True):
    """A connected graph without weights, and its walk."""
    g = torch.Generator().manual_seed(seed)
    W = (torch.rand(nodes, nodes, generator=g, **f64) < 0.2).double()
    W = W + torch.diag(torch.ones(nodes - 1, **f64), 1)
    W = ((W + W.T) != 0).double()
    W = W if loops else W - torch.diag(W.diagonal())
    return gd.SparseTransition.from_scipy(sparse.csr_array(W.numpy()))


def rows_of(triangle):
    """The numbers and weights of each row of a triangle, in their order."""
    from graphdiff.solvers.groups import GROUP

    starts, numbers, values, _, runs = triangle
    values = np.ones(len(numbers)) if values is None else values
    rows, nodes = [], len(starts) - 1
    alone = np.ones(nodes, bool)
    for first, last in zip(runs[::2], runs[1::2], strict=True):
        alone[first:last] = False
    while len(rows) < nodes:
        a = len(rows)
        count = 1 if alone[a] else GROUP
        some = slice(starts[a], starts[a + count])
        rows += zip(*(x[some].reshape(-1, count).T for x in (numbers, values)), strict=True)
    return rows


def triangles(P, mu, narrow=False):
    """L, U dense, the order, and what the solver keeps beside; in float32 as it sweeps, or in float64."""
    from graphdiff.solvers import ssor

    mu = torch.as_tensor(mu, **f64).reshape(-1, 1)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(ssor, "NEAR", 0.0 if narrow else 2.0)
        (found,) = SSOR.prepare(P, mu).triangles
    for _, _, values, gains, _ in (found.lower, found.upper):
        assert (gains.dtype == "float32") == narrow
        assert values is None or values.dtype == gains.dtype
    nodes = P.shape[-1]

    def dense(triangle):
        L = torch.zeros(nodes, nodes, **f64)
        for a, (numbers, values) in enumerate(rows_of(triangle)):
            L[a, torch.from_numpy(numbers.astype("i8"))] = torch.from_numpy(values.astype("f8"))
        return torch.from_numpy(triangle[3].astype("f8"))[:, None] * L

    # The place of each node the other way round.
    order = torch.from_numpy(found.place.astype("i8")).argsort()
    return dense(found.lower), dense(found.upper), order, found


@with_numba
@settings(max_examples=40)
@given(
    st.integers(3, 30),
    st.integers(0, 2**20),
    st.sampled_from([0.3, 0.85, 0.99]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_the_triangles_are_those_of_the_system(nodes, seed, mu, each, loops, equal):
    P = unweighted(nodes, seed, loops) if equal else weighted(nodes, seed, loops)
    m = torch.full((nodes,), mu, **f64)
    if each:
        # Some stay.
        g = torch.Generator().manual_seed(seed)
        m = m * torch.rand(nodes, generator=g, **f64) * (torch.rand(nodes, generator=g) < 0.8)
    L, U, order, found = triangles(P, m if each else mu)
    # Two nodes have an edge, whatever it weighs.
    assert (found.lower[2] is None) == (found.upper[2] is None) == equal or nodes == 2
    assert sorted(order.tolist()) == list(range(nodes))
    assert (L.triu() == 0).all()
    assert (U.tril() == 0).all()
    system = (torch.eye(nodes, **f64) - m[:, None] * P.dense())[order][:, order]
    diagonal, moves = system.diagonal(), m[order] > 0
    torch.testing.assert_close(system / diagonal[:, None], torch.eye(nodes, **f64) - L - U)
    # It is symmetric under the weights, up to nodes that stay, where the residual is 0.
    degree = (P.log_degree - P.log_degree.max()).exp()[order]
    omega = torch.from_numpy(found.weights[0])
    torch.testing.assert_close(omega, torch.where(moves, degree * diagonal / m[order], 0))
    torch.testing.assert_close(torch.from_numpy(found.inverse)[order], torch.where(moves, 1 / diagonal, 0))
    scaled = (omega[:, None] * (L + U))[moves][:, moves]
    torch.testing.assert_close(scaled, scaled.T)
    for rough, exact in zip(triangles(P, m if each else mu, narrow=True), (L, U), strict=False):
        torch.testing.assert_close(rough, exact, rtol=1.25e-7, atol=1e-13)


@with_numba
@settings(max_examples=40)
@given(st.integers(3, 30), st.integers(0, 2**20), st.sampled_from([0.3, 0.85, 0.99]))
def test_the_condition_number_is_at_most_what_the_file_says(nodes, seed, mu):
    L, _, _, found = triangles(weighted(nodes, seed), mu)
    root = torch.from_numpy(found.weights[0]).sqrt()
    L = root[:, None] * L / root
    eye = torch.eye(nodes, **f64)
    left = torch.linalg.inv(eye - L)
    values = torch.linalg.eigvalsh(left @ (eye - L - L.T) @ left.T)
    assert values.max() <= 1 + 1e-10
    assert values.min() >= 1 / (1 + mu**2 / (1 - mu)) - 1e-10


@with_numba
@settings(max_examples=60)
@given(st.integers(3, 30), st.integers(0, 2**20), st.sampled_from([0.3, 0.85, 0.99]), st.booleans())
def test_what_bounds_the_residual_does(nodes, seed, mu, each):
    P = weighted(nodes, seed)
    g = torch.Generator().manual_seed(seed)
    m = mu * torch.rand(nodes, generator=g, **f64) if each else torch.full((nodes,), mu, **f64)
    L, _, order, found = triangles(P, m if each else mu)
    weights, diagonal = torch.from_numpy(found.weights), 1 / torch.from_numpy(found.inverse)[order]
    system = (torch.eye(nodes, **f64) - m[:, None] * P.dense())[order][:, order]
    # Some entries large, as where one node's row decides.
    rho = torch.randn(nodes, generator=g, **f64) ** 3
    # Of an x and of x + ρ.
    residual = diagonal * (rho - L @ rho)
    residual = residual - system @ rho
    error = (residual / (1 - m[order])).abs().max()
    assert error <= found.bound * rho.abs().max() * (1 + 1e-12)
    # And is reached, by a ρ whose terms do not cancel.
    alike = diagonal - diagonal * L.sum(1) - system.sum(1)
    torch.testing.assert_close((alike / (1 - m[order])).max(), torch.tensor(found.bound, **f64))
    # The transposed system's, of which d times its answer is that of the rows.
    columns = (residual * (P.log_degree - P.log_degree.max()).exp()[order]).abs().sum()
    assert columns <= (rho.abs() * weights[1]).sum() * (1 + 1e-12)


@with_numba
@pytest.mark.parametrize("solver", [SSOR, gd.solvers.DirectedSSOR()], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("channels", [1, 5])
def test_an_answer_comes_from_a_sweep(solver, transposed, channels):
    """After a sweep of Gauss and Seidel nodes without a neighbour later in the order have no residual."""
    g = torch.Generator().manual_seed(2)
    P = gd.grid_transition(torch.rand(1, 15, 20, generator=g, **f64), beta=9.0)
    P = P.T if transposed else P
    s = torch.randn(300, channels, generator=g, **f64)
    y = gd.solve(P, s, 0.95, solver=solver, max_steps=4, on_failure="ignore").value
    residual = (0.05 * s + 0.95 * (P @ y) - y).abs()
    # Sweeps are in float32.
    assert ((residual < 1e-4 * residual.amax(0)).sum(0) >= 300 // 4).all()


@with_numba
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_signal_has_its_bits_and_steps_in_any_company_and_by_any_threads(dtype, transposed, monkeypatch):
    image = torch.rand(1, 15, 20, generator=torch.Generator().manual_seed(2), **f64)
    P = gd.grid_transition(image, beta=9.0).to(dtype)
    P = P.T if transposed else P
    # More than two lines of lanes, and of one signal alone, two, a line, and a line and one.
    s = torch.randn(300, 37, generator=torch.Generator().manual_seed(1), **f64)
    s[:, ::3] = torch.eye(300, 13, **f64)
    s = s.to(dtype)
    together = gd.solve(P, s, 0.95, solver=SSOR)
    assert together.converged.all()
    assert len(set(together.steps.tolist())) > 1
    for some in ([0], [36], [3, 11], list(range(8)), list(range(9)), list(range(36, -1, -1))):
        alone = gd.solve(P, s[:, some], 0.95, solver=SSOR)
        assert torch.equal(alone.value, together.value[:, some])
        assert torch.equal(alone.steps, together.steps[some])
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        again = gd.solve(P, s.expand(2, 300, 37), 0.95, solver=SSOR)
        for mate in (0, 1):
            assert torch.equal(again.value[mate], together.value)
            assert torch.equal(again.steps[mate], together.steps)


@with_numba
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("nodes", [1, 2, 3, 4, 5, 10, 101])
def test_norms_of_one_signal_have_the_bits_they_have_in_company(nodes, dtype, summed):
    from graphdiff.solvers import sweeps

    g = torch.Generator().manual_seed(nodes)
    r, weights = torch.randn(nodes, 8, generator=g, dtype=dtype), torch.rand(2, nodes, generator=g, **f64)

    def norms(some):
        sums = torch.zeros(2, len(some), **f64)
        numbers = r[:, some].contiguous().numpy()
        sweeps.norms(numbers, weights.numpy(), summed, sums.numpy(), (0,) * len(some))
        return sums

    together, wide = norms(range(8)), r.double()
    for k in (0, 7):
        assert torch.equal(norms([k]), together[:, k : k + 1])
    torch.testing.assert_close(together[0], weights[0] @ wide.square())
    torch.testing.assert_close(together[1], weights[1] @ wide.abs() if summed else wide.abs().amax(0))


def of_equal_rows(kind, nodes, seed):
    """A walk many of whose rows are as long as others: those of a ring, of stars, or of both."""
    random = np.random.default_rng(seed)
    each = np.arange(nodes)
    ring = np.stack([np.concatenate([each, each]), np.concatenate([each + 1, each + 1 + seed % 5]) % nodes])
    hubs = random.integers(0, 1 + nodes // 20, (1 + seed % 3, nodes))
    stars = np.stack([np.tile(each, len(hubs)), hubs.ravel()])
    edges = {"ring": ring, "stars": stars}.get(kind, np.concatenate([ring, stars[:, ::3]], 1))
    if seed % 2:
        edges = np.concatenate([edges, np.stack([each[::7], each[::7]])], 1)
    W = sparse.coo_array((random.choice([0.5, 1.0, 2.0], edges.shape[1]), edges), (nodes, nodes)).tocsr()
    W = W + W.T
    return gd.SparseTransition.from_scipy((W != 0).astype("f8") if seed % 4 > 1 else W)


def of_too_many_colours():
    """255 nodes that all are linked to all, and 70 linked to all of them and, in a ring, to each other.

    Those of the ring share the last colour, though each depends on the one before.
    """
    W = np.ones((325, 325)) - np.eye(325)
    ring = np.arange(70)
    W[255:, 255:] = 0
    W[255 + ring, 255 + (ring + 1) % 70] = W[255 + (ring + 1) % 70, 255 + ring] = 1
    return gd.SparseTransition.from_scipy(sparse.csr_array(W))


@with_numba
@settings(max_examples=60)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.integers(1, 30)), min_size=1, max_size=8), st.integers(0, 2**20)
)
def test_groups_are_of_independent_rows_of_one_length_and_lose_no_edge(lengths, seed):
    from graphdiff.solvers import groups

    random = np.random.default_rng(seed)
    length = np.concatenate([[edges] * rows for edges, rows in lengths])
    nodes, starts = len(length), np.concatenate([[0], np.cumsum(length)]).astype("u4")
    # Dependent on rows far back, or on any, one of them seldom.
    back = random.integers(1, 400, starts[-1]) + 40 * (random.random(starts[-1]) < 0.98)
    numbers = np.maximum(np.repeat(np.arange(nodes), length) + 440 - back, 0).astype("u4")
    values, runs = np.arange(len(numbers), dtype="f4"), np.zeros(2 * (nodes // 9) + 5, "u4")
    found = numbers.copy(), values.copy()
    runs = runs[: groups.grouped(starts, *found, runs)].astype("i8")
    assert runs[-1] == nodes
    # As of rows without weights.
    without, again = numbers.copy(), np.zeros_like(runs, "u4")
    assert groups.grouped(starts, without, None, again) == len(runs)
    assert np.array_equal(without, found[0])
    assert np.array_equal(again, runs)
    assert (np.diff(runs) >= 0).all()
    rows = rows_of((starts, *found, None, runs))
    for a, (some, weights) in enumerate(rows):
        assert np.array_equal(some, numbers[starts[a] : starts[a + 1]])
        assert np.array_equal(weights, values[starts[a] : starts[a + 1]])
    alone = np.ones(nodes, bool)
    for first, last in zip(runs[::2], runs[1::2], strict=True):
        assert (last - first) % groups.GROUP == 0
        alone[first:last] = False
        for a in range(first, last, groups.GROUP):
            group = range(a, a + groups.GROUP)
            assert length[a] < groups.LONG
            assert len({length[b] for b in group}) == 1
            assert not any(n in group for b in group for n in rows[b][0])
    # Of rows that could be in a group few are not.
    for a in range(nodes - 2 * groups.GROUP):
        some = slice(a, a + 2 * groups.GROUP)
        if len(set(length[some])) == 1 and length[a] < groups.LONG:
            numbers_of = numbers[starts[a] : starts[a + 2 * groups.GROUP]].astype("i8")
            if not ((numbers_of >= a) & (numbers_of < a + 2 * groups.GROUP)).any():
                assert not alone[some].all()


@with_numba
@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["ring", "stars", "mix", "colours"]),
    st.integers(20, 300),
    st.integers(0, 2**20),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_sweeps_of_one_signal_have_the_bits_they_have_in_company(
    kind, nodes, seed, narrow, pinned, strange, first
):
    from graphdiff.solvers import sweeps

    P = of_too_many_colours() if kind == "colours" else of_equal_rows(kind, nodes, seed)
    nodes, random = P.shape[-1], np.random.default_rng(seed)
    mu = np.where(random.random(nodes) < 0.2, 0.0, 0.9) if pinned else np.full(nodes, 0.9)
    L, U, _, found = triangles(P, mu, narrow)
    dtype = "f4" if narrow else "f8"
    vectors = random.standard_normal((4, nodes, 16)).astype(dtype)
    turn, step = random.random((2, 1, 16)).astype(dtype)
    summed = seed % 3 == 0
    # Where the answer is known nothing is left of the residual.
    vectors[:, found.place[mu == 0]] = 0
    if strange:
        where = random.random(vectors.shape) < 0.02
        vectors[where] = random.choice([0.0, -0.0, np.inf, np.nan], where.sum())
    if first:
        # What is left of others.
        vectors[[0, 2]] = np.nan

    def swept(some):
        x, r, p, t = (np.ascontiguousarray(v[:, some]) for v in vectors)
        ratio, length = (np.ascontiguousarray(v[:, some]) for v in (turn, step))
        (curved, sums, before), lanes = np.zeros((3, 2, len(some))), (0,) * len(some)
        sweeps._back(found.upper, r, p, ratio, first, t, found.weights, curved, lanes)
        way, lowered = t.copy(), r.copy()
        sweeps._forth(found.lower, x, r, p, t, length, first, found.weights, summed, sums, lanes)
        sweeps.lowered(found.lower, lowered, found.weights, summed, before, lanes)
        return p, way, t, x, r, lowered, curved[0], sums, before

    together = swept(range(16))
    for some in ([0], [15], range(4, 8)):
        for alone, wanted in zip(swept(some), together, strict=True):
            assert np.array_equal(alone, wanted[..., list(some)], equal_nan=True)
    if not strange:
        before = (torch.from_numpy(v.astype("f8")) for v in (*vectors[:3], turn, step))
        start, given, direction, ratio, length = before
        if first:
            start, direction = torch.zeros_like(start), torch.zeros_like(direction)
        p, t, w, x, r, lowered, curved = (torch.from_numpy(v.astype("f8")) for v in together[:7])
        near = {"rtol": 0, "atol": 1e-4 if narrow else 1e-12}
        torch.testing.assert_close(p, given + ratio * direction, **near)
        torch.testing.assert_close(t - U @ t, p, **near)
        torch.testing.assert_close(w - L @ w, p - t, **near)
        torch.testing.assert_close(x, start + length * t, **near)
        torch.testing.assert_close(r, given - length * (t + w), **near)
        torch.testing.assert_close(lowered - L @ lowered, given, **near)
        weights = torch.from_numpy(found.weights)
        torch.testing.assert_close(curved, weights[0] @ (p * (t + w)), rtol=1e-5, atol=1e-4)
        for numbers, sums in ((r, together[7]), (lowered, together[8])):
            most = weights[1] @ numbers.abs() if summed else numbers.abs().amax(0)
            wanted = torch.stack([weights[0] @ numbers.square(), most])
            torch.testing.assert_close(torch.from_numpy(sums), wanted, rtol=1e-12, atol=0)


@with_numba
@pytest.mark.parametrize("mu", [0.9, 0.999])
@pytest.mark.parametrize("kind", ["ring", "stars", "mix", "colours"])
def test_one_signal_on_equal_rows_is_solved_as_among_others(kind, mu):
    P = of_too_many_colours() if kind == "colours" else of_equal_rows(kind, 500, 3)
    s = torch.randn(P.shape[-1], 16, generator=torch.Generator().manual_seed(1), **f64)
    for walk, wanted in ((P, P.dense()), (P.T, P.dense().T)):
        together = gd.solve(walk, s, mu, solver=SSOR)
        assert together.converged.all()
        assert (together.value - oracle(wanted, s, mu)).abs().max() < 1e-6
        for k in (0, 9):
            alone = gd.solve(walk, s[:, k : k + 1], mu, solver=SSOR)
            assert torch.equal(alone.value, together.value[:, k : k + 1])
            assert torch.equal(alone.steps, together.steps[k : k + 1])


@with_numba
def test_signals_of_all_sizes_side_by_side():
    P = weighted(200, 5)
    s = torch.randn(200, 6, generator=torch.Generator().manual_seed(2), **f64)
    size = torch.tensor([1.0, 1e-200, 1e200, 0.0, 1e-30, 1e30], **f64)
    for Q, wanted in ((P, P.dense()), (P.T, P.dense().T)):
        sol = gd.solve(Q, s * size, 0.9, solver=SSOR)
        assert sol.converged.all()
        exact = oracle(wanted, s, 0.9)
        assert (
            (sol.value / size.where(size > 0, torch.tensor(1.0, **f64)) - exact)[:, size > 0].abs() < 1e-7
        ).all()
        assert (sol.value[:, 3] == 0).all()


@with_numba
@pytest.mark.parametrize("spread", [3.0, 12.0])
def test_weights_of_very_different_size(spread):
    P = weighted(60, 7, spread=spread)
    s = torch.randn(60, 3, generator=torch.Generator().manual_seed(2), **f64)
    for Q, wanted in ((P, P.dense()), (P.T, P.dense().T)):
        sol = gd.solve(Q, s, 0.99, solver=SSOR)
        assert sol.converged.all()
        error = (sol.value - oracle(wanted, s, 0.99)).abs()
        assert ((error.sum(0) if Q is not P else error.amax(0)) <= sol.error_bound.squeeze() + 1e-12).all()


@with_numba
def test_loops_and_edges_of_weight_zero():
    for loops, zeros in ((True, True), (False, True), (False, False)):
        P = weighted(50, 11, loops=loops, zeros=zeros)
        s = torch.randn(50, 2, generator=torch.Generator().manual_seed(2), **f64)
        sol = gd.solve(P, s, 0.95, solver=SSOR)
        torch.testing.assert_close(sol.value, oracle(P.dense(), s, 0.95), rtol=0, atol=1e-9)


@with_numba
def test_each_mu_of_a_batch_and_nodes_that_stay():
    P = gd.grid_transition(torch.rand(1, 9, 9, generator=torch.Generator().manual_seed(2), **f64), beta=9.0)
    s = torch.randn(2, 81, 2, generator=torch.Generator().manual_seed(3), **f64)
    node = torch.rand(81, 1, generator=torch.Generator().manual_seed(4), **f64)
    node = node * (torch.arange(81) % 3 > 0)[:, None]
    for mu in (torch.tensor([[0.5, 0.999]], **f64), torch.tensor([[[0.9]], [[0.99]]], **f64), node):
        for walk in (P, P.T):
            sol = gd.solve(walk, s, mu, solver=SSOR)
            exact = gd.diffuse(walk, s, mu, solver=gd.solvers.Direct())
            torch.testing.assert_close(sol.value, exact, rtol=0, atol=1e-8)
            if mu is node:
                assert torch.equal(sol.value[:, ::3], s[:, ::3])


@with_numba
@pytest.mark.parametrize("transposed", [False, True])
def test_a_mu_next_to_nothing_weighs_much_but_not_infinitely(transposed):
    P, g = weighted(40, 3), torch.Generator().manual_seed(0)
    mu = torch.where(torch.rand(40, 1, generator=g) < 0.3, 1e-310, 0.9).double()
    assert np.isfinite(triangles(P, mu)[-1].weights).all()
    s = torch.randn(40, 3, generator=g, **f64)
    walk, matrix = (P.T, P.dense().T) if transposed else (P, P.dense())
    found = gd.solve(walk, s, mu, tol=1e-9, solver=SSOR)
    assert found.converged.all()
    wanted = torch.linalg.solve(torch.eye(40, **f64) - mu * matrix, (1 - mu) * s)
    assert (found.value - wanted).abs().max() < 1e-9


@with_numba
def test_nodes_that_a_signal_does_not_reach_stay_at_zero():
    edges = torch.tensor([[0, 1, 2, 4, 5, 6], [1, 2, 3, 5, 6, 7]])
    P = gd.SparseTransition.from_edge_index(edges, undirected=True, **f64)
    s = torch.eye(8, **f64)[:, [1, 6]]
    for Q in (P, P.T):
        sol = gd.solve(Q, s, 0.9, solver=SSOR)
        assert (sol.value[4:, 0] == 0).all()
        assert (sol.value[:4, 1] == 0).all()
        assert (sol.value[:4, 0] > 0).all()


@with_numba
def test_about_half_the_steps_of_cg_and_a_first_guess_off_by_a_constant_takes_few_more():
    P = gd.grid_transition(torch.zeros(1, 40, 40, **f64))
    s = torch.randn(1600, generator=torch.Generator().manual_seed(4), **f64)
    for Q, mode in ((P, torch.ones(1600, **f64)), (P.T, P.log_degree.exp())):
        ours = gd.solve(Q, s, 0.99, tol=1e-8, solver=SSOR)
        cg = gd.solve(Q, s, 0.99, tol=1e-8, solver=gd.solvers.CG())
        assert ours.steps <= 0.6 * cg.steps
        shifted = gd.solve(Q, s, 0.99, tol=1e-8, solver=SSOR, initial=s + 100 * mode)
        # Float32 begins with errors of a hundred times the size.
        assert shifted.steps <= 1.1 * ours.steps
        warm = gd.solve(Q, s, 0.99, tol=1e-8, solver=SSOR, initial=ours.value)
        assert warm.steps <= 2


def claimed(P, mu, s, start, tol):
    """What `SSOR` returns by itself, and how large the bound of its true residual is beside the target's."""
    from graphdiff.solvers.base import Budget, Limits

    m = torch.as_tensor(mu, **f64).reshape(1, 1)
    target = torch.full((1, s.shape[-1]), tol, **f64)
    b, limits = (1 - m) * s, Limits(None, Budget())
    found = SSOR.solve(SSOR.prepare(P, m), b, start, target, limits)
    residual = b - found.x + m * P.matmul(found.x)
    size = residual.abs().sum(0) if P.stochastic == "columns" else residual.abs().amax(0)
    return found, size / (1 - mu) / tol


@with_numba
@settings(max_examples=60)
@given(
    st.integers(3, 60),
    st.integers(0, 2**20),
    st.sampled_from([0.3, 0.85, 0.99, 0.999, 0.99995]),
    st.sampled_from([1e-2, 1e-6, 1e-9]),
    st.booleans(),
)
def test_float32_is_renewed_before_it_is_wrong(nodes, seed, mu, tol, transposed):
    walk = weighted(nodes, seed)
    P = walk.T if transposed else walk
    s = torch.randn(nodes, 5, generator=torch.Generator().manual_seed(seed), **f64)
    # Signals that are known at once beside others.
    s[:, 1], s[:, 2] = torch.eye(nodes, **f64)[0], walk.log_degree.exp() if transposed else 1.0
    size = s.abs().sum(0) if transposed else s.abs().amax(0)
    s = s / size
    found, ratio = claimed(P, mu, s, s, tol)
    assert (ratio <= 1.2).all()
    # A product and a half at each renewal, and at the start where that is not 0.
    products = found.matvecs - found.steps
    assert (products >= 1).all()
    assert products[2] >= 2
    assert (products <= 4 + found.steps).all()


@with_numba
def test_what_float32_adds_up_alone_is_wrong(monkeypatch):
    from graphdiff.solvers import ssor

    P = gd.grid_transition(torch.zeros(1, 20, 20, **f64))
    s = torch.randn(400, 3, generator=torch.Generator().manual_seed(5), **f64)
    assert (claimed(P, 0.99, s, s, 1e-9)[1] <= 1.2).all()
    monkeypatch.setattr(ssor, "FAR", math.inf)
    assert (claimed(P, 0.99, s, s, 1e-9)[1] > 100).all()


def crowded(nodes=400, links=4, seed=0):
    """Nodes that link to earlier ones as often as these are linked to, and twenty single edges beside."""
    random = np.random.default_rng(seed)
    ends, edges = [0, 1], [(0, 1)]
    for node in range(2, nodes):
        for other in set(random.choice(ends, links)):
            edges.append((node, int(other)))
            ends += [node, int(other)]
    edges += [(nodes + 2 * k, nodes + 2 * k + 1) for k in range(20)]
    return gd.SparseTransition.from_edge_index(torch.tensor(edges).T, undirected=True, **f64)


@with_numba
@pytest.mark.parametrize("transposed", [False, True])
def test_signals_that_are_renewed_at_different_times_have_the_bits_they_have_alone(transposed):
    P = crowded()
    P = P.T if transposed else P
    nodes = P.shape[-1]
    # Of single edges, which are done at once, of hubs and of others.
    s = torch.eye(nodes, **f64)[:, [401, 0, 399, 430, 200, 7, 439, 1]]
    s[:, 1] += 1
    for mu, tol in ((0.5, 1e-6), (0.99, 1e-6), (0.99, 1e-11)):
        together, ratio = claimed(P, mu, s, s, tol)
        assert (ratio <= 1.2).all()
        assert len(set(together.steps.tolist())) > 1
        for k in range(8):
            alone, _ = claimed(P, mu, s[:, k : k + 1], s[:, k : k + 1], tol)
            for ours, wanted in zip(alone, together, strict=True):
                assert torch.equal(ours, wanted[..., k : k + 1])


@with_numba
def test_where_float32_would_take_many_more_steps_sweeps_are_in_float64():
    for spread, mu, dtype in ((1.0, 0.99, "float32"), (12.0, 0.99, "float64"), (1.0, 0.999, "float64")):
        (found,) = SSOR.prepare(weighted(60, 7, spread=spread), torch.tensor([[mu]], **f64)).triangles
        assert found.lower[3].dtype == dtype


@with_numba
def test_who_is_told_of_every_step_is_told_the_same_bits():
    P = crowded()
    s = torch.eye(P.shape[-1], **f64)[:, [401, 0, 399]]
    for walk in (P, P.T):
        told = []
        quiet = gd.solve(walk, s, 0.99, solver=SSOR, tol=1e-6)
        loud = gd.solve(walk, s, 0.99, solver=SSOR, tol=1e-6, progress=told.append)
        assert torch.equal(loud.value, quiet.value)
        assert torch.equal(loud.matvecs, quiet.matvecs)
        assert len(told) >= int(quiet.steps.max()) - 1


@with_numba
@pytest.mark.parametrize("mu", [0.85, 0.99])
def test_float32_takes_few_steps_more_than_float64(mu, monkeypatch):
    from graphdiff.solvers import ssor

    P = crowded(3000)
    s = torch.eye(P.shape[-1], **f64)[:, :2000:100]
    for walk in (P, P.T):
        narrow, _ = claimed(walk, mu, s, s, 1e-6)
        with monkeypatch.context() as patched:
            patched.setattr(ssor, "NEAR", 2.0)
            wide, _ = claimed(walk, mu, s, s, 1e-6)
        assert (wide.matvecs == wide.steps + 1).all()
        assert (narrow.steps <= 1.7 * wide.steps + 1).all()


@with_numba
def test_a_start_that_is_the_answer_is_believed_to_the_last_digits():
    P = gd.grid_transition(torch.rand(1, 20, 20, generator=torch.Generator().manual_seed(2), **f64), beta=9.0)
    s = torch.randn(400, 20, generator=torch.Generator().manual_seed(5), **f64)
    for walk in (P, P.T):
        exact = gd.diffuse(walk, s, 0.99, solver=gd.solvers.Direct())
        sol = gd.solve(walk, s, 0.99, solver=SSOR, initial=exact, tol=1e-10)
        assert (sol.steps == 0).all()
        assert (sol.value - exact).abs().max() < 1e-13


@with_numba
@pytest.mark.parametrize("count", [1, 7, 16, 20])
def test_a_start_may_be_one_number_for_all(count):
    P = gd.grid_transition(torch.zeros(1, 20, 20, **f64))
    s = torch.randn(400, count, generator=torch.Generator().manual_seed(5), **f64)
    for number in (0.0, 3.0):
        start = torch.tensor(number, **f64)
        spread = claimed(P, 0.9, s, start.expand_as(s), 1e-8)[0]
        filled = claimed(P, 0.9, s, torch.full_like(s, number), 1e-8)[0]
        for ours, wanted in zip(spread, filled, strict=True):
            assert torch.equal(ours, wanted)


@with_numba
def test_where_residuals_only_grow_the_start_is_left_in_place(monkeypatch):
    from graphdiff.solvers import ssor
    from graphdiff.solvers.base import Budget, Limits

    # Chebyshev would go on from there.
    monkeypatch.setattr(ssor, "carry_on", lambda solver, state, rhs, reached, *_: reached)
    g = torch.Generator().manual_seed(256)
    grid = gd.grid_transition(torch.zeros(1, 5, 5, **f64))
    # Degrees that are not those of the walk: what is then swept is far from symmetric.
    P = dataclasses.replace(grid, log_degree=8 * torch.randn(25, generator=g, **f64)).T
    b, start = torch.randn(2, 25, 3, generator=g, **f64)
    target, limits = torch.full((1, 3), 1e-8, **f64), Limits(None, Budget())
    stays = (torch.arange(25) == 4)[:, None]
    for mu in (torch.tensor([[0.99]], **f64), torch.where(stays, 0.0, 0.99).double()):
        reached = SSOR.solve(SSOR.prepare(P, mu), b, start, target, limits)
        assert (reached.steps > 0).all()
        assert torch.equal(reached.x, torch.where(mu == 0, b, start))


@with_numba
@pytest.mark.parametrize("width", [1, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_signal_is_its_own_start_where_b_is_1_less_mu_of_it_and_no_mu_is_0(dtype, width):
    from graphdiff.solvers import starts

    g, lanes = torch.Generator().manual_seed(2), (0,) * width
    start, mu = torch.randn(50, width, generator=g, **f64), torch.rand(50, 1, generator=g, **f64)
    given = (1 - mu) * start
    start[:, -1] = 0
    off = given.clone()
    off[17] *= 1 + 1e-4
    pinned = torch.where(torch.arange(50)[:, None] == 4, 0.0, mu)

    def found(b, x, m):
        unit, (own, share) = np.ones(width), np.zeros((2, 1, width))
        arrays = (v.to(dtype).numpy() for v in (b, x))
        starts.sized(*arrays, m.numpy().ravel(), unit, own, share, lanes)
        return torch.from_numpy(own[0]), torch.from_numpy(share[0]), torch.from_numpy(unit)

    own, share, unit = found(given, start, mu)
    assert own.tolist() == share.tolist() == [1.0] * (width - 1) + [0.0]
    sizes = torch.maximum(given.to(dtype).abs().amax(0), start.to(dtype).abs().amax(0))
    assert torch.equal(unit, sizes.double())
    assert (found(off, start, mu)[0] == 0).all()
    # There the start is the answer.
    assert (found((1 - pinned) * start, start, pinned)[0] == 0).all()


@with_numba
@pytest.mark.parametrize("solver", [gd.solvers.SSOR(), gd.solvers.DirectedSSOR()])
def test_signals_that_the_walk_carries_elsewhere_start_from_nothing_each_by_itself(solver):
    P = gd.grid_transition(torch.zeros(1, 30, 30, **f64))
    s = torch.randn(900, 20, generator=torch.Generator().manual_seed(5), **f64)
    s[:, 3], s[:, 7], s[:, 11] = 1.0, torch.eye(900, **f64)[40], 0.0
    for Q in (P, P.T):
        s[:, 3] = P.log_degree.exp() if Q is not P else 1.0
        found, cold = (gd.solve(Q, s, 0.9, tol=1e-8, solver=solver, initial=x) for x in (None, 0 * s))
        assert found.converged.all()
        carried = torch.arange(20) != 3
        torch.testing.assert_close(found.value, cold.value, rtol=0, atol=1e-6)
        # They are scaled by s, if only before it is found to be no start.
        products = [int(x.matvecs[carried].sum()) for x in (found, cold)]
        assert products[0] == pytest.approx(products[1], rel=0.05)
        # What the walk leaves as it is is its own answer.
        assert found.steps[3] == 0
        for k in (3, 7, 0):
            alone = gd.solve(Q, s[:, k], 0.9, tol=1e-8, solver=solver)
            assert torch.equal(alone.value, found.value[:, k])
            assert torch.equal(alone.matvecs, found.matvecs[k])


@with_numba
@pytest.mark.parametrize("solver", [gd.solvers.SSOR(), gd.solvers.DirectedSSOR()])
@pytest.mark.parametrize("transposed", [False, True])
def test_only_a_start_that_is_not_0_takes_a_product(solver, transposed, monkeypatch):
    from graphdiff.solvers import directed_ssor, ssor
    from graphdiff.solvers.base import Budget, Limits

    # In float64 no residual is computed but the first.
    for module in (ssor, directed_ssor):
        monkeypatch.setattr(module, "NEAR", 2.0)
    walk = gd.grid_transition(torch.zeros(1, 30, 30, **f64))
    P, mu = walk.T if transposed else walk, torch.tensor([[0.9]], **f64)
    s = torch.randn(900, 3, generator=torch.Generator().manual_seed(5), **f64)
    s[:, 1], s[:, 2] = torch.eye(900, **f64)[40], walk.log_degree.exp() if transposed else 1.0
    limits, target = Limits(None, Budget()), torch.full((1, 3), 1e-8, **f64)
    each = 2 if solver == gd.solvers.DirectedSSOR() else 1
    for start, products in ((s, [1, 1, 2]), (0 * s, [1, 1, 1]), (s + 1e-3, [2, 2, 2])):
        found = solver.solve(solver.prepare(P, mu), (1 - mu) * s, start, target, limits)
        assert (found.matvecs - each * found.steps).tolist() == products


@with_numba
def test_steps_are_limited_signal_by_signal():
    P = gd.grid_transition(torch.zeros(1, 40, 40, **f64))
    s = torch.randn(1600, 9, generator=torch.Generator().manual_seed(4), **f64)
    s[:, 4] = 1.0
    for asked in (5, 1):
        sol = gd.solve(P, s, 0.99, solver=SSOR, max_steps=asked, on_failure="ignore")
        assert sol.steps.tolist() == [0 if k == 4 else asked for k in range(9)]
        assert sol.converged.squeeze().tolist() == [k == 4 for k in range(9)]
        error = (sol.value - oracle(P.dense(), s, 0.99)).abs().amax(0)
        assert (error <= sol.error_bound.squeeze() + 1e-12).all()


@with_numba
@pytest.mark.parametrize("transposed", [False, True])
def test_who_is_doubted_at_the_limit_takes_no_step_more(transposed):
    P = crowded()
    P = P.T if transposed else P
    # Done, as float32 has it, before the residual is computed anew.
    s = torch.eye(P.shape[-1], **f64)[:, [401, 0, 399, 200, 7]]
    for asked in range(1, 16):
        sol = gd.solve(P, s, 0.99, solver=SSOR, tol=1e-9, max_steps=asked, on_failure="ignore")
        assert (sol.steps <= asked).all()


@with_numba
def test_no_line_of_signals_begins_after_the_time_is_up():
    P = gd.grid_transition(torch.zeros(1, 40, 40, **f64))
    s = torch.randn(1600, 17, generator=torch.Generator().manual_seed(4), **f64)
    sol = gd.solve(P, s, 0.99, solver=SSOR, max_seconds=1e-9, on_failure="ignore")
    assert sol.steps.tolist() == [1] * 16 + [0] * 1


@with_numba
def test_auto_takes_it_and_says_why_and_others_are_named_where_it_does_not_apply():
    grid = gd.grid_transition(torch.zeros(1, 20, 20, **f64))
    s = torch.randn(400, 2, generator=torch.Generator().manual_seed(4), **f64)
    sol = gd.solve(grid, s, 0.9)
    assert sol.solver == "SSOR()"
    assert sol.reason.startswith("sparse and reversible: at most about")
    # A matrix for each µ would be kept.
    assert gd.solve(grid, s, torch.tensor([[0.5, 0.9]], **f64)).solver == "CG()"
    dense = gd.DenseTransition.from_affinity(torch.ones(3, 3, **f64))
    with pytest.raises(ValueError, match=r"SSOR needs a sparse walk on the CPU .*, got Dense.* use CG\(\)"):
        gd.diffuse(dense, torch.ones(3, **f64), 0.5, solver=SSOR)
    directed = gd.SparseTransition.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]), **f64)
    with pytest.raises(ValueError, match=r"SSOR needs a walk known to be reversible"):
        gd.diffuse(directed, torch.ones(3, **f64), 0.5, solver=SSOR)


def test_without_numba_auto_takes_cg_and_the_error_says_what_to_install():
    script = """
        import sys
        sys.modules["numba"] = None
        import torch, graphdiff as gd
        P = gd.grid_transition(torch.zeros(1, 20, 20))
        s = torch.eye(400)[0]
        print(gd.solve(P, s, 0.9).solver)
        try:
            gd.solve(P, s, 0.9, solver=gd.solvers.SSOR())
        except ImportError as error:
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["CG()", "solver: SSOR needs numba; pip install numba, or use CG()"]


def begun(P, mu, start, transposed=False, width=1, itself=False):
    """The share of a start that SSOR begins with, if it is taken for the signal itself and if not."""
    from graphdiff.solvers import starts

    _, _, _, found = triangles(P, mu)
    state = SSOR.prepare(P, torch.as_tensor(mu, **f64).reshape(-1, 1))
    lanes, first = (0,) * width, start.expand(-1, width).numpy().copy()
    given, unit, (own, share) = (1 - found.mu[:, None]) * first, np.ones(width), np.zeros((2, 1, width))
    assert starts.sized(given, first, found.mu, unit, own, share, lanes)
    assert (own == 1).all()
    assert (share == 1).all()
    own[:], unit = itself, (1 / unit).reshape(1, width)
    system = found.rows, state.degree, found.mu, given, first, unit, transposed
    assert starts.fitted(*system, own, share, lanes) == share.any()
    return torch.from_numpy(share[0])


@with_numba
@settings(max_examples=40)
@given(
    st.integers(3, 30),
    st.integers(0, 2**20),
    st.sampled_from([0.3, 0.85, 0.99]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([1, 8]),
)
def test_no_other_multiple_of_the_start_is_nearer_in_energy(nodes, seed, mu, each, transposed, width):
    P, generator = weighted(nodes, seed), torch.Generator().manual_seed(seed)
    mu = (
        (0.1 + 0.9 * torch.rand(nodes, 1, generator=generator, **f64)) * mu
        if each
        else torch.tensor(mu, **f64)
    )
    s = torch.rand(nodes, 1, generator=generator, **f64)
    b, matrix = (1 - mu) * s, (P.T if transposed else P).dense()
    M = mu.expand(nodes, 1)
    D = P.log_degree.double().exp().unsqueeze(-1)
    # DM⁻¹(I − MP) is symmetric; for Pᵀ = DPD⁻¹ M⁻¹(I − MPᵀ)D is, which acts on D⁻¹y.
    weight = (1 / (D * M)) if transposed else D / M
    A = torch.eye(nodes, **f64) - M * matrix
    exact = (s * weight * b).sum() / (s * weight * (A @ s)).sum()
    exact = exact if 0 <= exact < 0.9 else torch.ones_like(exact)
    torch.testing.assert_close(begun(P, mu, s, transposed, width), exact.expand(width), rtol=1e-9, atol=0)
    itself = exact if exact >= 0.5 else torch.zeros_like(exact)
    found = begun(P, mu, s, transposed, width, itself=True)
    torch.testing.assert_close(found, itself.expand(width), rtol=1e-9, atol=0)


@with_numba
def test_a_start_is_worth_what_a_sample_says_and_a_seed_1_less_mu(monkeypatch):
    nodes, mu = 9000, 0.9
    rng = np.random.default_rng(0)
    ends = rng.integers(nodes, size=(2, 4 * nodes))
    A = sparse.csr_array((np.ones(4 * nodes), ends), shape=(nodes, nodes))
    A = A - sparse.diags_array(A.diagonal())
    P = gd.SparseTransition.from_scipy(((A + A.T) != 0).astype(float).tocsr())
    flat, noise, seed = (
        torch.ones(nodes, 1, **f64),
        torch.from_numpy(rng.normal(size=(nodes, 1))),
        torch.zeros(nodes, 1, **f64),
    )
    seed[4321] = 2
    for transposed in (False, True):
        assert begun(P, mu, seed, transposed).item() == pytest.approx(1 - mu)
        assert begun(P, mu, noise, transposed).item() == pytest.approx(1 - mu, rel=0.2)
        # Signals that the walk carries elsewhere are no start for themselves.
        assert begun(P, mu, seed, transposed, itself=True).item() == 0
        assert begun(P, mu, noise, transposed, itself=True).item() == 0
    for itself in (False, True):
        assert begun(P, mu, flat, itself=itself).item() == 1
    assert int(gd.solve(P, flat, mu, solver=SSOR).steps) == 0
    # An answer that is there already is not spoilt.
    y = gd.solve(P, noise, mu, tol=1e-12, solver=SSOR).value
    assert int(gd.solve(P, noise, mu, tol=1e-9, initial=y, solver=SSOR).steps) == 0
