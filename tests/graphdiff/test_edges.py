"""Compiled products along edges, and evidence: bits of libraries, and bounds that no neighbour changes."""

import functools

import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

import graphdiff as gd
from graphdiff.operators import sparse, threads
from graphdiff.solvers import base

edges = pytest.importorskip(
    "graphdiff.operators.edges", reason="numba, the extra [compiled], is absent", exc_type=ImportError
)
evidence = pytest.importorskip("graphdiff.solvers.evidence", exc_type=ImportError)


def walk(nodes, degree=4, seed=0, symmetric=True):
    """On random edges with random weights, some of them loops."""
    rng = np.random.default_rng(seed)
    ends = rng.integers(nodes, size=(2, nodes * degree))
    A = scipy.sparse.csr_array((rng.uniform(0.5, 2, nodes * degree), ends), shape=(nodes, nodes))
    return gd.SparseTransition.from_scipy((A + A.T if symmetric else A).tocsr())


def signals(nodes, channels, seed=1):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(nodes, channels)))


@given(
    nodes=st.integers(1, 60),
    degree=st.integers(0, 5),
    channels=st.sampled_from([1, 2, 5, 21, 33]),
    number=st.sampled_from([torch.int32, torch.int64]),
)
def test_products_have_the_bits_of_scipys(nodes, degree, channels, number):
    P, y = walk(nodes, degree, symmetric=False), signals(nodes, 2 * channels)[:, ::2]
    rows = P.indptr.to(number), P.indices.to(number), P.values
    matrix = P.to_scipy()
    assert np.array_equal(edges.product(*rows, y), matrix @ y.numpy())
    assert np.array_equal(edges.transposed(*rows, y), matrix.T @ y.numpy())


@given(nodes=st.integers(1, 60), degree=st.integers(0, 5), number=st.sampled_from([torch.int32, torch.int64]))
def test_products_of_a_signal_alone_have_the_bits_of_scipys(nodes, degree, number):
    pytest.importorskip("graphdiff.operators.rows")
    P, y = walk(nodes, degree, symmetric=False), signals(nodes, 1)
    again = gd.SparseTransition(P.indptr.to(number), P.indices.to(number), P.values)
    matrix, count = P.to_scipy(), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for operator in (P, again):
            assert np.array_equal(operator @ y, matrix @ y.numpy())
            assert np.array_equal(operator.T @ y, matrix.T @ y.numpy())
    finally:
        torch.set_num_threads(count)


@given(nodes=st.integers(1, 200), each=st.booleans(), seed=st.integers(0, 99))
def test_what_a_walk_passes_on_is_what_torch_finds_in_more_passes(nodes, each, seed):
    numbers = torch.Generator().manual_seed(seed)
    sums = 1 + 1e-12 * torch.rand(nodes, 1, generator=numbers, dtype=torch.float64)
    mu = 0.99 * torch.rand(nodes if each else 1, 1, generator=numbers, dtype=torch.float64)
    reach, inverse, least = evidence.reached(mu, sums)
    assert torch.equal(reach, mu * sums)
    assert torch.equal(inverse, (1 - mu * sums).reciprocal())
    assert torch.equal(least, (1 - mu * sums).amin(0, keepdim=True))


@pytest.mark.parametrize(("count", "team"), [(1, True), (2, True), (3, False)])
def test_a_walk_takes_them_and_no_threads_change_a_bit(count, team, monkeypatch):
    P, y = walk(3000), signals(3000, 11)
    expected = P.to_scipy() @ y.numpy(), P.to_scipy().T @ y.numpy()
    asked = []
    for name in ("product", "transposed"):
        compiled = getattr(edges, name)
        monkeypatch.setattr(edges, name, lambda *a, f=compiled: asked.append(1) or f(*a))
    monkeypatch.setattr(torch, "get_num_threads", lambda: count)
    if not team:
        monkeypatch.setattr(threads, "team", lambda: 0)
    assert np.array_equal(P @ y, expected[0])
    assert np.array_equal(P.T @ y, expected[1])
    assert len(asked) == 2


def test_without_numba_products_have_the_same_bits(monkeypatch):
    P, y = walk(3000), signals(3000, 11)
    compiled = P @ y, P.T @ y
    monkeypatch.setattr(sparse, "_edges", lambda: None)
    assert torch.equal(P @ y, compiled[0])
    assert torch.equal(P.T @ y, compiled[1])


LONG = base.LONG


@pytest.fixture(scope="module")
def long():
    return walk(LONG, 3)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("mu", [0.9, "per node", "per channel"])
def test_evidence_is_what_it_is_without_numba(long, transposed, mu, monkeypatch):
    P, s = long.T if transposed else long, signals(LONG, 5)
    shape = {"per node": [LONG, 1], "per channel": [1, 5]}.get(mu)
    if shape:
        mu = 0.5 + 0.4 * torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    asked, taken = [], evidence.judged

    def counted(*arguments):
        asked.append(taken(*arguments))
        return asked[-1]

    monkeypatch.setattr(evidence, "judged", counted)
    found = gd.solve(P, s, mu, tol=1e-8, solver=gd.solvers.Chebyshev())
    assert len(asked) >= 2
    assert all(x is not None for x in asked)
    monkeypatch.setattr(base, "_compiled", lambda: None)
    plain = gd.solve(P, s, mu, tol=1e-8, solver=gd.solvers.Chebyshev())
    assert torch.equal(found.steps, plain.steps)
    assert (found.value - plain.value).abs().max() < 1e-12
    for name in ("error_bound", "lower", "upper"):
        torch.testing.assert_close(getattr(found, name), getattr(plain, name), rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize("transposed", [False, True])
def test_what_is_measured_depends_on_the_signal_alone(long, transposed):
    P, s = long.T if transposed else long, signals(LONG, 6)
    solve = functools.partial(gd.solve, P, tol=1e-8, solver=gd.solvers.CG())
    together, fields = solve(s, 0.9), ("value", "lower", "upper", "error_bound", "steps")
    for k in (0, 4):
        for mu in (0.9, torch.tensor([[0.9]], dtype=torch.float64)):
            alone = solve(s[:, k : k + 1], mu)
            for name in fields:
                assert torch.equal(getattr(alone, name)[..., 0], getattr(together, name)[..., k])
    batch = solve(torch.stack([s, 3 * s]), torch.tensor([[[0.5]], [[0.9]]], dtype=torch.float64))
    alone = solve(3 * s, 0.9)
    for name in fields:
        assert torch.equal(getattr(batch, name)[1], getattr(alone, name))


SHAPES = {
    "plain": (75, 5),
    "channels": (75, 5),
    "nodes": (75, 5),
    "batch": (2, 75, 5),
    "one signal": (75, 1),
    "one of a batch": (2, 75, 1),
}
FACTORS = {"channels": (1, 5), "nodes": (75, 1), "batch": (2, 1, 1), "one of a batch": (2, 75, 1)}


def evidence_of(norm, vectors, mu, inverse, started):
    """As found compiled, and by the passes of torch; the residual and the middle besides."""
    least, into = (1 / inverse).amin(-2, keepdim=True), torch.empty_like(vectors["b"])
    b_size = vectors["b"].abs().amax(-2, keepdim=True) if norm == "inf" else vectors["b"].abs().sum(-2, True)
    known, units = (
        (least, b_size if started else None),
        (1e-12, 1e-13, 1e-14) if started else (1e-12, 0.0, 0.0),
    )
    given = (mu, vectors["walked"], vectors["x"], into) if started else None
    found = evidence.judged(vectors["b"], inverse, known, norm == "one", units, given)
    r, x = (vectors["b"], vectors["b"])
    if started:
        r, x = vectors["b"] + mu * vectors["walked"] - vectors["x"], vectors["x"]
    q = r * inverse
    if norm == "inf":
        low, high, size = q.amin(-2, True), q.amax(-2, True), x.abs().amax(-2, True)
        apart = torch.maximum(low.abs(), high.abs())
    else:
        low, high, size = q.clamp(max=0).sum(-2, True), q.clamp(min=0).sum(-2, True), x.abs().sum(-2, True)
        apart = high - low
    extra = (units[1] * size + units[2] * (2 * size + b_size)) / least + units[0] / least * apart
    bound, rounding = apart + extra * (1 + (norm == "one")), extra * (1 + (norm == "one"))
    return found, (low, high, extra, size, bound, rounding), (into, vectors["b"] + mu * vectors["walked"])


@pytest.mark.parametrize("norm", ["inf", "one"])
@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("kind", SHAPES)
def test_evidence_is_what_torch_finds_in_more_passes(norm, started, kind):
    g = torch.Generator().manual_seed(1)
    shape = SHAPES[kind]
    vectors = {k: torch.randn(*shape, generator=g, dtype=torch.float64) for k in ("b", "walked", "x")}
    shape = FACTORS.get(kind, (1, 1))
    mu = 0.2 + 0.7 * torch.rand(shape, generator=g, dtype=torch.float64)
    inverse = 1 / (1 - (mu if norm == "inf" else mu.amax(-2, keepdim=True)))
    found, expected, (into, middle) = evidence_of(norm, vectors, mu, inverse, started)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=0)
    if started:
        assert torch.equal(into, middle)


@pytest.mark.parametrize("norm", ["inf", "one"])
@pytest.mark.parametrize("kind", SHAPES)
def test_a_signal_is_scaled_and_measured_at_once(norm, kind):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(*SHAPES[kind], generator=g, dtype=torch.float64)
    factor = torch.rand(FACTORS.get(kind, (1, 1)), generator=g, dtype=torch.float64)
    into = torch.empty_like(x)
    found = evidence.sized(x, norm == "one", factor, into)
    assert torch.equal(into, factor * x)
    assert torch.equal(found, evidence.sized(x, norm == "one"))
    expected = x.abs().amax(-2, keepdim=True) if norm == "inf" else x.abs().sum(-2, keepdim=True)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize("norm", ["inf", "one"])
@pytest.mark.parametrize("odd", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["b", "x", "walked"])
@pytest.mark.parametrize("channels", [1, 3])
def test_what_is_no_number_is_left_to_torch(norm, odd, where, channels):
    vectors = {name: signals(LONG, channels, seed) for seed, name in enumerate(("b", "walked", "x"))}
    inverse = torch.full((1, 1), 2.0, dtype=torch.float64)
    mu = torch.full((1, 1), 0.5, dtype=torch.float64)
    assert evidence_of(norm, vectors, mu, inverse, True)[0] is not None
    vectors[where][5, -1] = odd
    assert evidence_of(norm, vectors, mu, inverse, True)[0] is None
    if where == "b":
        assert evidence_of(norm, vectors, mu, inverse, False)[0] is None
        assert evidence.sized(vectors["b"], norm == "one") is None
        assert not base.size(vectors["b"], norm).isfinite().all()


def test_a_bound_that_overflows_is_left_to_torch():
    # Sums of finite numbers may be infinite.
    vectors = {name: torch.full((LONG, 2), 1e305, dtype=torch.float64) for name in ("b", "walked", "x")}
    one = torch.ones(1, 1, dtype=torch.float64)
    assert evidence_of("one", vectors, 0.5 * one, 2 * one, True)[0] is None


@pytest.mark.parametrize("kind", SHAPES)
def test_bounds_are_narrowed_to_the_bit_as_by_torch(kind):
    g = torch.Generator().manual_seed(2)
    *batch, nodes, channels = SHAPES[kind]

    def numbers(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    middle, before, after = (numbers(*batch, nodes, channels) for _ in range(3))
    reach, extra = numbers(*FACTORS.get(kind, (1, 1))).abs(), numbers(*batch, 1, channels).abs()
    low, high = -numbers(*batch, 1, channels).abs(), numbers(*batch, 1, channels).abs()
    wanted = middle + (reach * low - extra), middle + (reach * high + extra)
    ends = [x[..., :1, :].expand_as(x) for x in (before, after)]
    # Bounds of one number a signal, and of one a node.
    for best in ((before[..., :1, :], after[..., :1, :]), ends, (before, after)):
        expected = torch.maximum(wanted[0], best[0]), torch.minimum(wanted[1], best[1])
        found = evidence.narrowed(middle, reach, (low, high, extra), best)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_an_answer_never_lies_in_the_memory_of_what_was_given():
    class Lazy(gd.solvers.Walk):
        def solve(self, state, rhs, initial, target, limits):
            zero = torch.zeros(rhs.shape[-1:], dtype=torch.int64)
            return base.Iterate(initial, zero, zero)

    P, s = walk(300), torch.ones(300, 1, dtype=torch.float64)
    found = gd.solve(P, s, 0.9, solver=Lazy(), on_failure="ignore")
    found.value.fill_(7)
    assert (s == 1).all()


@pytest.mark.parametrize("transposed", [False, True])
def test_threads_share_the_evidence_and_change_no_bit(long, transposed, monkeypatch):
    from graphdiff.solvers import evidence

    P, s = long.T if transposed else long, signals(LONG, 21)
    solve = functools.partial(gd.solve, P, s, 0.9, tol=1e-8, solver=gd.solvers.Chebyshev())
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = solve()
    monkeypatch.setattr(evidence, "MANY", 1)
    for count in (2, 3, 40):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        shared = solve()
        for name in ("value", "lower", "upper", "error_bound", "steps"):
            assert torch.equal(getattr(shared, name), getattr(alone, name))
