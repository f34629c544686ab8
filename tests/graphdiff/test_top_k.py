"""The first ranks by push, and `solvers.Push`: bounds, ranks, locality and refusals."""

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphdiff as gd
from graphdiff import topk
from graphdiff.topk import _largest_places
from tests.graphdiff.zoo import oracle, problems, to_the_last_digit

SPARSE = (
    "sparse directed",
    "sparse path",
    "sparse star",
    "isolated node",
    "sparse disconnected",
    "grid",
    "grid of 8",
)
EDGES = torch.tensor([[0, 0, 1, 2, 3], [1, 2, 2, 0, 4]])
DIRECTED = gd.SparseTransition.from_edge_index(EDGES, dtype=torch.float64)


@pytest.fixture(scope="module", params=["compiled", "plain"], autouse=True)
def by(request):
    """Everything by compiled code, and as it is where numba is not installed."""
    patch = pytest.MonkeyPatch()
    if request.param == "plain":
        patch.setattr(topk, "_compiled", lambda: None)
    elif importlib.util.find_spec("numba") is None:
        pytest.skip("numba is not installed")
    yield request.param
    patch.undo()


def ring(nodes, **options):
    i = torch.arange(nodes)
    return gd.SparseTransition.from_edge_index(torch.stack([i, (i + 1) % nodes]), undirected=True, **options)


def square_grid(side):
    return gd.grid_transition(torch.zeros(1, side, side, dtype=torch.float64))


def scale_free(nodes, directed, seed=3):
    """Each node points at five before it, rather at early ones: hubs, leaves and a short diameter."""
    g = torch.Generator().manual_seed(seed)
    i = torch.arange(1, nodes).repeat(5)
    j = (torch.rand(len(i), generator=g, dtype=torch.float64) ** 2 * i).long()
    weight = 0.1 + torch.rand(len(i), generator=g, dtype=torch.float64)
    if directed:
        # Every third edge goes back, so walks do not all end at node 0.
        back = torch.arange(len(i)) % 3 == 0
        edges = torch.cat([torch.stack([i, j]), torch.stack([j, i])[:, back]], 1)
        return gd.SparseTransition.from_edge_index(edges, torch.cat([weight, weight[back]]), nodes)
    return gd.SparseTransition.from_edge_index(torch.stack([i, j]), weight, nodes, undirected=True)


def pagerank_of(P, source, mu):
    e = torch.zeros(P.shape[-1], 1, dtype=torch.float64)
    e[source] = 1
    return oracle(P.to(torch.float64).dense().mT, e, mu).squeeze(-1)


def check(found, exact, tol, slip):
    """All that a TopK says of one query, against the exact y [N] which is right to `slip`."""
    there = found.indices >= 0
    index = found.indices[there]
    assert len(set(index.tolist())) == len(index)
    assert (found.lower[there] <= exact[index] + slip).all()
    assert (found.upper[there] >= exact[index] - slip).all()
    assert (found.lower <= found.values).all()
    assert (found.values <= found.upper).all()
    assert ((found.values[there] - exact[index]).abs() <= found.error_bound[there] + slip).all()
    assert (found.error_bound >= torch.maximum(found.upper - found.values, found.values - found.lower)).all()
    # Half of the width, but that the middle is rounded.
    assert (found.error_bound <= (found.upper - found.lower) / 2 * (1 + 1e-9) + np.finfo(float).eps).all()
    assert (found.values[:-1] >= found.values[1:]).all()
    for j, node in enumerate(index.tolist()):
        rest = exact.clone()
        rest[index[: j + 1]] = -1
        assert rest.max() <= exact[node] + found.gap[j] + slip
        if found.certified[j]:
            assert rest.max() < exact[node] + slip
            assert (exact[index[:j]] > exact[node] - slip).all()
    assert bool(found.converged) == bool((found.gap <= tol).all())
    if not there.all():
        # Those left out cannot be reached; those at hand can.
        missing = torch.ones(len(exact), dtype=torch.bool)
        missing[index] = False
        assert (exact[missing].abs() <= slip).all()
        assert not there[len(index) :].any()
        assert (found.values[~there] == 0).all()


# --- mathematics


@settings(max_examples=150)
@given(
    problems(names=SPARSE, mus=(0.0, 0.3, 0.85, 0.99), batches=((),)),
    st.integers(1, 14),
    st.sampled_from([1e-2, 1e-6, 1e-12]),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_bounds_gaps_and_ranks_hold(problem, k, tol, dtype):
    P = problem.P.to(dtype)
    source = k % P.shape[-1]
    found = gd.top_k(P, source, k, problem.mu, tol=tol, on_failure="ignore")
    slip = 1e-13 / (1 - problem.mu)
    check(found, pagerank_of(P, source, problem.mu), tol, slip)
    assert found.converged or tol == 1e-12
    assert found.indices.shape == (k,)
    assert found.values.dtype == torch.float64


@settings(max_examples=60)
@given(problems(names=SPARSE, mus=(0.3, 0.85, 0.99, 0.9999), batches=((),)))
def test_bounds_hold_to_the_last_digit(problem):
    """Where rounding is all that is left, the bounds still cover it."""
    P, n = problem.P, problem.s.shape[-2]
    e = torch.zeros(n, 1, dtype=torch.float64)
    e[n // 2] = 1
    exact = to_the_last_digit(P.dense().numpy().astype(np.longdouble).T, e, problem.mu)[:, 0]
    found = gd.top_k(P, n // 2, n, problem.mu, tol=1e-300, on_failure="ignore")
    there = (found.indices >= 0).numpy()
    index = found.indices.numpy()[there]
    assert (found.lower.numpy()[there] <= exact[index]).all()
    assert (found.upper.numpy()[there] >= exact[index]).all()


def test_rounding_is_counted_where_nothing_seems_left():
    """With µ near 1 a residual that comes out as next to nothing still may hide errors 1/(1 − µ) as large."""
    e, g = torch.eye(3, dtype=torch.float64)[:, :1], torch.Generator().manual_seed(3)
    for _ in range(150):
        W = torch.rand(3, 3, generator=g, dtype=torch.float64)
        P = gd.SparseTransition.from_torch((W + W.T).to_sparse())
        found = gd.top_k(P, 0, 3, 0.99999, tol=1e-300, on_failure="ignore")
        exact = to_the_last_digit(P.dense().numpy().astype(np.longdouble).T, e, 0.99999)[:, 0]
        index = found.indices.numpy()
        assert (found.lower.numpy() <= exact[index]).all()
        assert (found.upper.numpy() >= exact[index]).all()


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("mu", [0.5, 0.85, 0.99])
@pytest.mark.parametrize("tol", [1e-4, 1e-6, 1e-10])
def test_graphs_on_which_everything_is_near(directed, mu, tol):
    """The region becomes the whole graph, with hubs and leaves, along conjugate gradients or without."""
    P = scale_free(400, directed)
    for source in (0, 57, 399):
        found = gd.top_k(P, source, 30, mu, tol=tol)
        check(found, pagerank_of(P, source, mu), tol, 1e-13 / (1 - mu))
    assert found.work > len(P.indices)


@settings(max_examples=60)
@given(
    st.integers(0, 10**6),
    st.integers(2, 60),
    st.sampled_from([0.0, 1.0, 4.0, 30.0]),
    st.sampled_from([0.3, 0.85, 0.99]),
    st.booleans(),
    st.sampled_from([1e-1, 1e-2, 1e-4]),
)
def test_bounds_hold_early_whatever_the_weights(seed, nodes, spread, mu, reversible, tol):
    """A coarse tolerance ends the search where each of the three bounds is all that is known."""
    g = torch.Generator().manual_seed(seed)
    edges = torch.randint(0, nodes, (2, 3 * nodes), generator=g)
    weight = (spread * torch.randn(3 * nodes, generator=g, dtype=torch.float64)).exp()
    P = gd.SparseTransition.from_edge_index(edges, weight, nodes, undirected=reversible)
    source, k = seed % nodes, 1 + seed % 7
    found = gd.top_k(P, source, k, mu, tol=tol, on_failure="ignore")
    check(found, pagerank_of(P, source, mu), tol, 1e-13 / (1 - mu))
    for work in (1, 3 * nodes):
        found = gd.top_k(P, source, k, mu, tol=tol, max_work=work, on_failure="ignore")
        check(found, pagerank_of(P, source, mu), tol, 1e-13 / (1 - mu))


@pytest.mark.parametrize("directed", [False, True])
def test_many_nodes_of_which_few_can_matter(directed):
    """On a graph too large to sort whole, as on a small one."""
    P = scale_free(6000, directed)
    for source, k in ((0, 5), (57, 100), (5999, 700)):
        e = torch.zeros(6000, dtype=torch.float64)
        e[source] = 1
        sol = gd.pagerank(P, e, tol=1e-11)
        found = gd.top_k(P, source, k, tol=1e-5)
        assert found.converged
        check(found, sol.value, 1e-5, float(sol.error_bound))


@given(st.integers(0, 10**6), st.sampled_from([5000, 9999]), st.integers(1, 700), st.booleans())
def test_the_largest_are_found_wherever_they_stand(seed, size, count, hidden):
    """All but every sixteenth are looked at last, and the largest may all be among those, or none."""
    values = np.random.default_rng(seed).exponential(size=size)
    values[::16] += 10 if hidden else -10
    found = _largest_places(values, count)
    assert len(set(found.tolist())) == count
    assert np.array_equal(np.sort(values[found]), np.sort(values)[size - count :])


@pytest.mark.parametrize("mu", [0.5, 0.85, 0.95])
def test_graphs_on_which_little_is_near(mu):
    P = square_grid(32)
    for source in (0, 16 * 33, 700):
        found = gd.top_k(P, source, 12, mu)
        check(found, pagerank_of(P, source, mu), 1e-6, 1e-13)
    P = square_grid(100)
    assert gd.top_k(P, 50 * 101, 12, mu, tol=1e-4).work < 2 * len(P.indices)


def test_nodes_never_seen_may_be_larger_than_those_that_are():
    """A hub a few steps away along a path: how soon it is found depends on k and tol."""
    i = torch.arange(200)
    path = torch.stack([i, i + 1])
    leaves = torch.stack([torch.full((60,), 7), torch.arange(201, 261)])
    P = gd.SparseTransition.from_edge_index(
        torch.cat([path, leaves], 1), undirected=True, dtype=torch.float64
    )
    exact = pagerank_of(P, 0, 0.85)
    for k in range(1, 12):
        for tol in (0.3, 0.1, 0.03, 0.01, 0.003):
            check(gd.top_k(P, 0, k, tol=tol), exact, tol, 1e-13)


@pytest.mark.parametrize("directed", [False, True])
@pytest.mark.parametrize("k", [1, 10, 60])
def test_nodes_out_of_the_question_count_as_if_they_were_looked_at(directed, k):
    """Whoever cannot be one of k is left out before ranks are compared: every gap is as with all nodes."""
    P = scale_free(400, directed)
    query = topk._Query(P, 57, k, 0.85, 1e-6, topk._measure(P), np.inf)
    query.region = query._region()
    for threshold in (1e-2, 1e-3, 1e-4):
        query.region.grow(threshold)
        while not query.region.closed:
            query.region.open_border()
        region, scales = query.region, query._known()
        x, r, every = region.x, region.residual, np.arange(len(region.nodes))
        slack = 1e-16 * x
        # Wide intervals as well as narrow ones, and lopsided.
        for factor in (0.01, 0.3, 1.0, 5.0):
            below, above = query._reach(r, scales, slack)
            reach = topk.Reach(tuple(factor * part for part in below), above)
            few, all_nodes = (
                topk._ranked(
                    *query._interval(x, r, scales, reach, slack, places), region.nodes[places], k, 0.0, 1e-6
                )
                for places in (query._likely(x, r, scales, reach, slack), every)
            )
            for name in ("lower", "upper", "certified", "gap"):
                assert np.array_equal(getattr(few, name), getattr(all_nodes, name))


@settings(max_examples=100)
@given(
    st.integers(0, 10**6),
    st.sampled_from([5, 33, 1000]),
    st.sampled_from([1, 7, 60, 500]),
    st.sampled_from([1e-12, 1e-5, 1e-4, 1.0]),
    st.sampled_from([0.0, 1e-4, 1.0]),
    st.booleans(),
    st.booleans(),
)
def test_compiled_ranks_are_those_of_numpy(seed, known, k, left, spread, reversible, closed):
    """Bound by bound, within rounding, whatever is known of whom, be many nodes alike."""
    ranked = pytest.importorskip("graphdiff.solvers.ranks").ranked
    rng, nodes = np.random.default_rng(seed), 1500
    weight, column, x = np.exp([[1.0], [2.0], [spread]] * rng.normal(size=(3, nodes)))
    scales = topk.Scales(weight, 1 / weight, column, (float(column.max()), float(weight.max())))
    query = topk._Query(P := ring(nodes), 0, k, 0.85, 1e-6, topk._measure(P), np.inf)
    query._rates, query._scales = (0.3, 0.1, 0.4), scales if reversible else None
    x, r = x[:known], left * x[:known] * rng.uniform(-0.5, 0.5, known)
    if spread == 0:
        r = np.zeros(known)
    places = rng.permutation(nodes)[:known]
    query.region = SimpleNamespace(
        b=rng.random(known), weight=weight[places], nodes=places, closed=closed, whole=False
    )
    arrays = x, r, query.region.b, query.region.weight, places
    rates = (0.3, 0.1, 0.4) if reversible else (0.3, np.inf, np.inf)
    bounds = *rates, *(scales.most if reversible else (0.0, 0.0)), query._rounding
    (indices, told, certified, *what), hidden, size = ranked(
        *arrays, column if reversible else np.ones(nodes), bounds, closed, k, 1e-6
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(topk, "_compiled", lambda: None)
        plain = query._first(x, r, 1e-6)
    for ours, theirs in zip(told, plain[1:5], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10)
    expected = plain.too_wide, plain.converged, plain.certain, query._hidden, query._left
    np.testing.assert_allclose([*what, hidden, size], expected, rtol=1e-6)
    assert np.array_equal(certified, plain.certified)
    # Of equals any may be the last.
    ties = plain.values == plain.values[-1]
    assert np.array_equal(indices[~ties], plain.indices[~ties])
    # What is no number bounds nothing.
    x[-1] = np.nan
    (_, told, certified, *_), *_ = ranked(*arrays, column, bounds, closed, k, 1e-6)
    assert not certified.any()
    assert (told[3] == np.inf)[: min(k, known - 1)].all()


def test_a_region_outgrows_the_room_that_it_starts_with():
    P, e = square_grid(240), torch.zeros(240**2, dtype=torch.float64)
    e[120 * 241] = 1
    found, sol = gd.top_k(P, 120 * 241, 40, 0.97, tol=1e-8), gd.pagerank(P, e, 0.97, tol=1e-11)
    check(found, sol.value, 1e-8, float(sol.error_bound))
    assert found.converged


def test_every_node_is_listed_once():
    """Many nodes opened at once have neighbours in common."""
    P = square_grid(30)
    exact = pagerank_of(P, 465, 0.85)
    for k in range(5, 70, 4):
        check(gd.top_k(P, 465, k, tol=0.2), exact, 0.2, 1e-13)


def test_work_does_not_know_how_large_the_graph_is():
    """A region that does not come to the border of the grid is the same in any grid."""
    small, large = ((square_grid(side), side * (side // 2) + side // 2) for side in (120, 240))
    a, b = (gd.top_k(P, centre, 40, 0.85) for P, centre in (small, large))
    assert a.work == b.work
    assert torch.equal(a.values, b.values)
    assert torch.equal(a.certified, b.certified)
    # The pixel (row, column) has another number in a wider grid.
    row, column = a.indices // 120 - 60, a.indices % 120 - 60
    assert torch.equal(b.indices, (row + 120) * 240 + column + 120)


def test_a_large_tolerance_is_cheap():
    P = square_grid(60)
    work = [int(gd.top_k(P, 1830, 20, tol=tol).work) for tol in (1e-2, 1e-4, 1e-6, 1e-9)]
    assert work == sorted(work)
    assert work[0] < 0.2 * work[-1]


def test_ties_end_the_search_and_are_not_decided():
    star = gd.SparseTransition.from_edge_index(
        torch.stack([torch.zeros(30, dtype=torch.int64), torch.arange(1, 31)]),
        undirected=True,
        dtype=torch.float64,
    )
    found = gd.top_k(star, 0, 5)
    assert found.converged
    assert found.certified.tolist() == [True, False, False, False, False]
    assert (found.gap <= 1e-6).all()
    assert "ties" in found.reason
    # From a leaf that leaf, too, stands out.
    assert gd.top_k(star, 7, 3).certified.tolist() == [True, True, False]
    assert set(gd.top_k(star, 7, 2).indices.tolist()) == {0, 7}
    assert gd.top_k(star, 7, 2).reason == "every rank is certain"


@pytest.mark.parametrize("seed", range(5))
def test_a_walk_wrongly_called_reversible_gives_no_wrong_bound(seed):
    g = torch.Generator().manual_seed(seed)
    edges = torch.randint(0, 40, (2, 160), generator=g)
    weight = torch.rand(160, generator=g, dtype=torch.float64) ** 3
    P = gd.SparseTransition.from_edge_index(edges, weight, 40, reversible=True)
    found = gd.top_k(P, 0, 10, tol=1e-8, on_failure="ignore")
    check(found, pagerank_of(P, 0, 0.85), 1e-8, 1e-12)
    assert found.converged
    # Nor do degrees that are those of another walk.
    P = gd.SparseTransition(
        P.indptr, P.indices, P.values, log_degree=9 * torch.rand(40, generator=g).double()
    )
    check(gd.top_k(P, 0, 10, tol=1e-8), pagerank_of(P, 0, 0.85), 1e-8, 1e-12)


@pytest.mark.parametrize("error", [1e-9, 1e-3, 0.1])
@pytest.mark.parametrize("mu", [0.5, 0.85])
def test_degrees_a_little_wrong_cost_no_more_than_time(error, mu):
    """Near enough to be a measure, too far to make the walk self-adjoint: the residual tells."""
    P = scale_free(400, False)
    noise = torch.rand(400, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    Q = gd.SparseTransition(P.indptr, P.indices, P.values, log_degree=P.log_degree + error * noise)
    for source in (0, 57, 399):
        found = gd.top_k(Q, source, 30, mu, tol=1e-9)
        check(found, pagerank_of(P, source, mu), 1e-9, 1e-13)
        assert found.converged


@pytest.mark.parametrize("wrong", [np.nan, 1e30, -5.0])
def test_what_compiled_code_spoils_is_not_used(by, wrong):
    """Triangles that are not the walk's cost a detour: the certificate is computed without them."""
    if by == "plain":
        pytest.skip("compiled code alone")
    P = scale_free(400, False)
    topk._measure(P).whole(P, 0.85, True).triangles.lower[3][::7] = wrong
    found = gd.top_k(P, 57, 30)
    check(found, pagerank_of(P, 57, 0.85), 1e-6, 1e-13)
    assert found.converged


def test_a_region_takes_over_what_is_nearer_than_nothing():
    P = scale_free(400, False)
    query = topk._Query(P, 57, 30, 0.85, 1e-6, topk._measure(P), np.inf)
    ones = np.ones(400)
    for size, kept in ((1e-6, True), (1e6, False), (np.nan, False)):
        known = SimpleNamespace(steps=5, work=7, nodes=np.arange(400), x=ones, residual=size * ones)
        region = query._region(known)
        assert region.steps == 5
        assert bool((region.x == 1).any()) is kept


def test_one_walk_under_many_mu():
    """What is kept of a walk fits every µ, with loops and without."""
    i = torch.arange(400)
    P = scale_free(400, False)
    loops = torch.stack([i, i])[:, ::3]
    edges = torch.cat([torch.stack([i.repeat_interleave(P.indptr.diff()), P.indices.long()]), loops], 1)
    lazy = gd.SparseTransition.from_edge_index(edges, reversible=True, dtype=torch.float64)
    for Q in (P, lazy):
        for mu in (0.3, 0.99, 0.85, 0.3):
            found = gd.top_k(Q, 57, 30, mu, tol=1e-8)
            check(found, pagerank_of(Q, 57, mu), 1e-8, 1e-13 / (1 - mu))
            assert found.converged


@pytest.mark.parametrize("kind", ["hubs", "directed", "directed, no weights", "grid"])
@pytest.mark.parametrize("mu", [0.5, 0.85, 0.99])
def test_a_solver_goes_on_where_a_look_left_it(by, kind, mu):
    """Looks in between cost next to no steps, and what they see is the residual."""
    if by == "plain":
        pytest.skip("compiled code alone")
    P = square_grid(20) if kind == "grid" else scale_free(400, kind.startswith("directed"))
    if kind == "directed, no weights":
        P = gd.SparseTransition.from_scipy((P.to_scipy() != 0).astype("f8"))
    exact, dense = pagerank_of(P, 57, mu).numpy(), P.dense().double().numpy()
    taken = []
    for pace in (1, 3, 100):
        query = topk._Query(P, 57, 30, mu, 1e-6, topk._measure(P), np.inf)
        region = query.region
        region.search(300, 1e-12, query._bounds, query._columns, (0.1, 0.5))
        assert region.whole

        def look(x, r, region=region, pace=pace):
            assert (x >= 0).all()
            assert np.abs(region.b - x + mu * dense.T @ x - r).max() < 1e-14
            assert np.abs(x - exact).sum() <= np.abs(r).sum() / (1 - mu) + 1e-12
            return pace if np.abs(r).sum() > 1e-8 * (1 - mu) else 0

        before = region.steps
        assert region.settle(look)
        assert not region.lost
        taken.append(region.steps - before)
    assert taken[0] <= taken[1] <= taken[0] + 4
    if kind.startswith("directed"):
        assert taken[0] % 2 == 0


def test_triangles_are_kept_for_one_mu(by):
    if by == "plain":
        pytest.skip("compiled code alone")
    P, kept = scale_free(400, True), []
    for mu in (0.5, 0.85, 0.85):
        gd.top_k(P, 57, 30, mu)
        (found,) = topk._measure(P).wholes.values()
        kept.append(found)
    assert kept[1] is kept[2] is not kept[0]


@pytest.mark.parametrize("spread", [40.0, 400.0, 2000.0])
def test_degrees_of_any_size(spread):
    """Weights along a path that span many orders of magnitude, up to more than numbers do."""
    log_weight = torch.linspace(0, spread, 59, dtype=torch.float64)
    degree = torch.logaddexp(log_weight[1:], log_weight[:-1])
    right = torch.cat([torch.ones(1).double(), (log_weight[1:] - degree).exp()])
    left = torch.cat([(log_weight[:-1] - degree).exp(), torch.ones(1).double()])
    i = torch.arange(59)
    edges = torch.cat([torch.stack([i, i + 1]), torch.stack([i + 1, i])], 1)
    P = gd.SparseTransition.from_edge_index(edges, torch.cat([right, left]))
    log_degree = torch.cat([log_weight[:1], degree, log_weight[-1:]])
    P = gd.SparseTransition(P.indptr, P.indices, P.values, log_degree=log_degree)
    for source in (0, 30, 59):
        check(gd.top_k(P, source, 10), pagerank_of(P, source, 0.85), 1e-6, 1e-13)


# --- as users see it


def test_it_agrees_with_pagerank():
    P, e = DIRECTED, torch.zeros(5, dtype=torch.float64)
    e[0] = 1
    ranks = gd.pagerank(P, e, 0.7).value
    found = gd.top_k(P, 0, 3, 0.7, tol=1e-11)
    assert found.indices.tolist() == ranks.argsort(descending=True)[:3].tolist()
    assert ((found.values - ranks[found.indices]).abs() <= found.error_bound + 1e-10).all()
    assert (found.error_bound < 1e-6).all()
    assert found.certified.all()


def test_many_sources_are_many_queries():
    P = scale_free(200, True)
    alone = [gd.top_k(P, source, 7) for source in (3, 150)]
    for sources in ([3, 150], torch.tensor([3, 150]), torch.tensor([3, 150], dtype=torch.int32)):
        both = gd.top_k(P, sources, 7)
        for name in ("indices", "values", "lower", "upper", "certified", "gap", "converged", "work"):
            assert torch.equal(getattr(both, name), torch.stack([getattr(one, name) for one in alone]))
    assert both.indices.shape == (2, 7)
    assert both.work.shape == both.converged.shape == (2,)
    assert gd.top_k(P, np.int64(3), 7, torch.tensor(0.85)).indices.shape == (7,)
    assert "2, 7" in repr(both)
    assert "converged" in repr(both)


def test_nodes_that_cannot_be_reached_are_not_listed():
    found = gd.top_k(DIRECTED, 3, 4)
    assert found.indices.tolist() == [4, 3, -1, -1]
    assert found.certified.all()
    assert found.converged
    assert found.values[2:].tolist() == [0, 0]
    # As many as there are, and more.
    assert sorted(gd.top_k(DIRECTED, 0, 3).indices.tolist()) == [0, 1, 2]
    assert gd.top_k(DIRECTED, 0, 50).indices[3:].tolist() == [-1] * 47
    # Where the graph is large beside what is reached, and where it is not.
    apart = torch.tensor([[0, 1, 7, 8], [1, 2, 8, 9]])
    for nodes in (10, 1000):
        P = gd.SparseTransition.from_edge_index(apart, None, nodes, undirected=True, dtype=torch.float64)
        assert gd.top_k(P, 0, 5).indices.tolist() == [1, 0, 2, -1, -1]
    # All that is reached counts, be it next to nothing.
    assert sorted(gd.top_k(ring(400), 0, 41, 0.01).indices.tolist()) == sorted({*range(21), *range(380, 400)})


def test_a_limit_on_work_leaves_what_is_known():
    P = square_grid(50)
    exact = pagerank_of(P, 1275, 0.85)
    with pytest.warns(gd.ConvergenceWarning, match=r"top_k: ranks are known up to a gap of .*raise max_work"):
        found = gd.top_k(P, 1275, 20, max_work=300)
    assert not found.converged
    assert found.reason == "stopped at max_work = 300"
    assert 300 <= found.work < 3000
    check(found, exact, 1e-6, 1e-13)
    assert "NOT converged" in repr(found)
    with pytest.raises(gd.ConvergenceError, match="top_k"):
        gd.top_k(P, 1275, 20, max_work=300, on_failure="raise")
    hubs = scale_free(400, True)
    early = gd.top_k(hubs, 5, 20, max_work=5000, on_failure="ignore")
    check(early, pagerank_of(hubs, 5, 0.85), 1e-6, 1e-13)
    assert early.work < 5000 + 4 * len(hubs.indices)


def test_where_rounding_ends_it():
    with pytest.warns(gd.ConvergenceWarning, match="rounding allows no more"):
        found = gd.top_k(ring(30, dtype=torch.float64), 0, 5, tol=1e-30)
    assert found.certified.tolist() == [True, False, False, False, False]


def test_values_written_over_are_seen():
    """What is kept of a walk between queries is that of the values it has now."""
    P = scale_free(300, False)
    check(gd.top_k(P, 9, 20), pagerank_of(P, 9, 0.85), 1e-6, 1e-13)
    for start, end in zip(P.indptr[:-1].tolist(), P.indptr[1:].tolist(), strict=True):
        P.values[start:end] = P.values[start:end].flip(0)
    check(gd.top_k(P, 9, 20), pagerank_of(P, 9, 0.85), 1e-6, 1e-13)
    with torch.inference_mode():
        Q = scale_free(300, True)
        check(gd.top_k(Q, 9, 20), pagerank_of(Q, 9, 0.85), 1e-6, 1e-13)


def test_a_walk_in_float32_is_taken_as_it_is():
    P = scale_free(300, False).to(torch.float32)
    found = gd.top_k(P, 9, 20, tol=1e-9)
    check(found, pagerank_of(P, 9, 0.85), 1e-9, 1e-13)


def shared_graph(name):
    folder = Path(os.environ.get("GRAPHDIFF_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
    path = folder / "graphs" / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"no {name}.npz in {path.parent}; GRAPHDIFF_DATA names the folder above it")
    with np.load(path) as data:
        edges = torch.from_numpy(np.stack([data["src"], data["dst"]]).astype(np.int64))
        nodes, directed = int(data["num_nodes"]), bool(data["directed"])
    return gd.SparseTransition.from_edge_index(
        edges, None, nodes, undirected=not directed, dtype=torch.float64
    )


@pytest.mark.parametrize("name", ["email-Enron", "soc-Slashdot0902"])
def test_a_hundred_ranks_of_a_social_graph(name):
    P = shared_graph(name)
    degree = P.indptr.diff()
    typical = (degree == degree.median()).nonzero().flatten()
    for source in (int(typical[0]), int(typical[len(typical) // 2]), int(degree.argmax())):
        e = torch.zeros(P.shape[-1], dtype=torch.float64)
        e[source] = 1
        sol = gd.pagerank(P, e, tol=1e-11)
        found = gd.top_k(P, source, 100)
        exact = sol.value[found.indices]
        assert found.converged
        assert (found.lower <= exact + sol.error_bound).all()
        assert (found.upper >= exact - sol.error_bound).all()
        best = sol.value.sort(descending=True, stable=True)
        # Ties aside the same nodes in the same order.
        assert (best.values[:100] - exact).abs().max() <= 1e-6 + 2 * sol.error_bound
        assert torch.equal(best.indices[:100][found.certified], found.indices[found.certified])


# --- solvers.Push


def test_push_stays_near_the_signal():
    P = ring(5000, dtype=torch.float64)
    s = torch.zeros(5000, 2, dtype=torch.float64)
    s[100, 0], s[2000, 1], s[2003, 1] = 1, -3, 1
    for Q in (P, P.T):
        sol = gd.solve(Q, s, 0.5, solver=gd.solvers.Push())
        assert sol.converged.all()
        assert ((sol.value != 0).sum(0) < 200).all()
        # A few products of the certificate, and of push less than one.
        assert (sol.matvecs <= 4).all()
        assert (sol.value - gd.diffuse(Q, s, 0.5, solver=gd.solvers.CG())).abs().max() < 3e-10


def test_push_takes_a_dense_signal_and_a_first_guess():
    P = scale_free(300, True)
    s = torch.randn(300, 2, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    sol = gd.solve(P, s, 0.9, solver=gd.solvers.Push())
    exact = oracle(P.dense(), s, 0.9)
    assert ((sol.value - exact).abs().amax(0) <= sol.error_bound + 1e-13).all()
    again = gd.solve(P, s, 0.9, solver=gd.solvers.Push(), initial=sol.value)
    assert (again.steps <= 1).all()
    assert again.converged.all()


def test_push_stops_at_max_steps():
    P, s = square_grid(20), torch.zeros(400, dtype=torch.float64)
    s[190] = 1
    sol = gd.solve(P, s, 0.99, solver=gd.solvers.Push(), max_steps=3, on_failure="ignore")
    assert sol.steps <= 4
    assert not sol.converged
    assert (sol.value - oracle(P.dense(), s.unsqueeze(-1), 0.99).squeeze(-1)).abs().max() <= sol.error_bound


def test_push_differentiates_like_any_solver():
    edges = EDGES
    leaves = [
        torch.rand(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).requires_grad_()
        for shape in ((5,), (5, 2), ())
    ]

    def function(weight, s, mu):
        P = gd.SparseTransition.from_edge_index(edges, weight, 5)
        return gd.diffuse(P.T, s, mu, solver=gd.solvers.Push(), tol=1e-13, on_failure="ignore")

    assert torch.autograd.gradcheck(function, leaves)


# --- input


JUMPING = gd.SparseTransition.from_edge_index(EDGES, dangling="uniform")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.eye(3), 0, 1), TypeError, r"P: expected a Transition, got Tensor; .*from_edge_index"),
        ((DIRECTED.T, 0, 1), ValueError, r"P: expected a walk, whose rows sum to 1, got Transposed"),
        ((JUMPING, 0, 1), TypeError, r'P: expected a sparse walk.*dangling="self", or rank .* pagerank'),
        ((gd.AttentionTransition(torch.eye(3)), 0, 1), TypeError, r"sparse walk.*definite\); rank the"),
        ((DIRECTED, 5, 1), ValueError, r"source: expected node numbers from 0 to 4 for N = 5 nodes, got 5"),
        ((DIRECTED, [0, -1], 1), ValueError, r"source: expected node numbers .* got -1"),
        ((DIRECTED, 0.0, 1), TypeError, r"source: expected a node number or a list .* got float"),
        ((DIRECTED, torch.ones(2), 1), ValueError, r"source: .* got torch.float32 of shape \[2\]"),
        ((DIRECTED, torch.zeros(1, 1).long(), 1), ValueError, r"source: .* of shape \[1, 1\]"),
        ((DIRECTED, [], 1), ValueError, r"source: .* of shape \[0\]"),
        ((DIRECTED, True, 1), TypeError, r"source: .* got bool"),
        ((DIRECTED, 0, 0), ValueError, r"k: expected an integer ≥ 1, got 0"),
        ((DIRECTED, 0, 1, 1.0), ValueError, r"mu: expected 0 ≤ µ < 1"),
        ((DIRECTED, 0, 1, torch.full((1, 2), 0.5)), ValueError, r"mu: .* a 0-d tensor, got \[1, 2\]"),
        ((DIRECTED, 0, 1, "0.5"), TypeError, r"mu: expected a number or a tensor, got str"),
    ],
)  # fmt: skip
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        gd.top_k(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tol": 0.0}, r"tol: expected a finite number > 0, got 0.0"),
        ({"max_work": 0}, r"max_work: expected an integer ≥ 1, got 0"),
        ({"on_failure": "shout"}, r'on_failure: expected "warn", "raise" or "ignore"'),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        gd.top_k(DIRECTED, 0, 1, **options)


def test_push_refuses_walks_that_are_not_sparse():
    for P in (gd.AttentionTransition(torch.zeros(3, 2)), JUMPING):
        with pytest.raises(ValueError, match=r"solver: Push needs a sparse walk.* use CG\(\), BiCGSTAB\(\)"):
            gd.diffuse(P, torch.ones(P.shape[-1]), 0.5, solver=gd.solvers.Push())


def test_ranks_are_certain_before_values_are_known():
    """`tol` is of ranks: y is off by more than it here, which `error_bound` says."""
    P = scale_free(300, directed=False)
    found = gd.top_k(P, source=7, k=1, tol=1e-12)
    exact = pagerank_of(P, 7, 0.85)
    assert found.certified.all()
    assert found.converged
    error = (found.values - exact[found.indices]).abs()
    assert (error <= found.error_bound).all()
    assert float(error) > 1e-9
    assert float(found.error_bound) > 1e3 * 1e-12
