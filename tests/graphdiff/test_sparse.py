"""Walks given by their edges, by an image or by a product: every constructor against the dense matrix."""

import collections
import dataclasses
import importlib.util
import itertools
import subprocess
import sys
import textwrap
from unittest.mock import patch

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import graphdiff as gd
from graphdiff.operators import sparse as sparse_module

EDGES = torch.tensor([[0, 0, 1, 3, 0, 4], [1, 2, 0, 3, 1, 0]])  # 0 → 1 twice, a self-loop at 3, none out of 2
WEIGHT = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
WHERE = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.0], dtype=torch.float64)
from_edges = gd.SparseTransition.from_edge_index


def randn(*shape, seed=3, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def affinity(edge_index=EDGES, weight=WEIGHT, n=5):
    return torch.zeros(n, n, dtype=weight.dtype).index_put(tuple(edge_index), weight, accumulate=True)


def landing(n, dangling):
    """The rows of nodes without an edge out."""
    if dangling == "self":
        return torch.eye(n, dtype=torch.float64)
    return (WHERE if isinstance(dangling, torch.Tensor) else torch.full((n,), 1 / n).double()).expand(n, n)


def walk(W, dangling="self"):
    degree = W.sum(-1, keepdim=True)
    return torch.where(degree > 0, W / degree, landing(len(W), dangling))


# --- direction, duplicates, mirror images


def test_directions():
    P = from_edges(torch.tensor([[0], [1]]), num_nodes=2)
    torch.testing.assert_close(P.dense(), torch.tensor([[0.0, 1.0], [0.0, 1.0]]))
    # A signal at node 1 is what node 0 sees; a mass at node 0 is what node 1 gets.
    torch.testing.assert_close(P @ torch.tensor([0.0, 1.0]), torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(P.T @ torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]))


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
def test_duplicates_are_added_and_nodes_without_edges_kept(integers):
    P = from_edges(EDGES.to(integers), WEIGHT, 6)
    torch.testing.assert_close(P.dense(), walk(affinity(n=6)))
    assert len(P.indices) == 5 + 2
    assert from_edges(EDGES, WEIGHT).shape == (5, 5)


def test_undirected_mirrors_every_edge_and_self_loops_once():
    W = affinity()
    expected = W + W.T - torch.diag(W.diag())
    P = from_edges(EDGES, WEIGHT, undirected=True)
    torch.testing.assert_close(P.dense(), walk(expected))
    torch.testing.assert_close(P.log_degree, expected.sum(-1).log())


def test_reversible_is_found_declared_or_denied():
    path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    symmetric = torch.tensor([2.0, 2.0, 7.0, 7.0])
    assert from_edges(path, symmetric).reversible
    assert not from_edges(path, symmetric + torch.tensor([0.0, 1e-6, 0.0, 0.0])).reversible
    assert from_edges(path, symmetric + torch.tensor([0.0, 1e-6, 0.0, 0.0]), reversible=True).reversible
    assert not from_edges(path, symmetric, reversible=False).reversible
    assert not from_edges(path[:, :2], undirected=True, reversible=False).reversible
    # Declared by undirected, even where the sums .2 + .3 + .1 and .1 + .2 + .3 round differently.
    thrice = torch.tensor([[0, 0, 1], [1, 1, 0]])
    assert from_edges(thrice, torch.tensor([0.2, 0.3, 0.1], dtype=torch.float64), undirected=True).reversible
    # Found on the sums: 0 → 1 in two halves; and an edge of weight 0 is none.
    halves = torch.tensor([[0, 0, 1, 2], [1, 1, 0, 0]])
    assert from_edges(halves, torch.tensor([1.0, 1.0, 2.0, 0.0])).reversible
    assert not from_edges(halves, torch.tensor([1.0, 1.0, 2.0, 1.0])).reversible


def test_weights_of_any_size_are_normalised():
    edges = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])
    weight = torch.tensor([1e-320, 1e-320, 1e308, 1e308], dtype=torch.float64)
    torch.testing.assert_close(from_edges(edges, weight).values, torch.full_like(weight, 0.5))
    P = from_edges(torch.tensor([[0, 0], [1, 1]]), torch.tensor([3e38, 3e38]), undirected=True)
    torch.testing.assert_close(P.dense(), torch.tensor([[0.0, 1.0], [1.0, 0.0]]))


def test_a_hub_of_many_edges_is_summed_in_float64():
    n = 200_000
    star = torch.stack([torch.zeros(n - 1, dtype=torch.int64), torch.arange(1, n)])
    P = from_edges(star, torch.rand(n - 1, generator=torch.Generator().manual_seed(2)), n, undirected=True)
    assert float((P.row_sums - 1).abs().max()) < 1e-7


def test_degrees_of_nodes_on_their_own_hide_no_others():
    P = from_edges(torch.tensor([[1], [2]]), torch.tensor([1e-30]), 4, undirected=True)
    torch.testing.assert_close(
        P.log_degree.double().exp(), torch.full((4,), 1e-30).double(), rtol=1e-5, atol=0
    )
    assert torch.equal(
        from_edges(torch.zeros(2, 0, dtype=torch.int64), num_nodes=3).log_degree, torch.zeros(3)
    )


# --- nodes without an edge out


@pytest.mark.parametrize("dangling", ["self", "uniform", WHERE], ids=str)
@pytest.mark.parametrize("weight", [WEIGHT, WEIGHT * (EDGES[0] != 1)], ids=["no edge", "weight zero"])
def test_dangling_policies(dangling, weight):
    P = from_edges(EDGES, weight, dangling=dangling)
    D = walk(affinity(weight=weight), dangling)
    y = randn(2, 5, 3)
    torch.testing.assert_close(P.dense(), D)
    torch.testing.assert_close(P @ y, D @ y)
    torch.testing.assert_close(P.T @ y, D.T @ y)
    torch.testing.assert_close(P.rows([2, 0]), D[[2, 0]])
    torch.testing.assert_close(P.row_sums, torch.ones(5, 1, dtype=torch.float64))
    assert P.sparse == (isinstance(dangling, str) and dangling == "self")
    assert not P.restarts


@pytest.mark.parametrize("dangling", ["self", "uniform", "restart", "error", WHERE], ids=str)
def test_an_isolated_node_under_each_policy(dangling):
    edges = torch.tensor([[0, 1, 3], [1, 3, 4]])
    if isinstance(dangling, str) and dangling == "error":
        with pytest.raises(ValueError, match=r"got 1 of 5 nodes without, for example \[2\]; choose"):
            from_edges(edges, dangling=dangling, undirected=True)
        assert from_edges(edges[:, :1], undirected=True, dangling="error").sparse
        return
    P = from_edges(edges, dangling=dangling, undirected=True, dtype=torch.float64)
    stays = isinstance(dangling, str) and dangling == "self"
    assert P.reversible == P.sparse == stays
    if P.restarts:
        P = P.restarting_at(WHERE)
        dangling = WHERE
    A = affinity(edges, torch.ones(3).double())
    torch.testing.assert_close(P.dense(), walk(A + A.T, dangling))


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Weighed(gd.SparseTransition):
    """A user's own walk, with a tensor more."""

    weight: torch.Tensor | None = None


@pytest.mark.parametrize("kind", [gd.SparseTransition, Weighed])
@pytest.mark.parametrize("dangling", ["self", "uniform"])
def test_its_tensors_are_those_of_all_fields(kind, dangling):
    edges = torch.tensor([[0, 1], [1, 0]])
    P = from_edges(edges, torch.ones(2, dtype=torch.float64), 3, undirected=True, dangling=dangling)
    fields = {field.name: getattr(P, field.name) for field in dataclasses.fields(P) if field.init}
    P = kind(**fields) if kind is gd.SparseTransition else kind(**fields, weight=torch.ones(3).double())
    every = (getattr(P, field.name) for field in dataclasses.fields(P))
    floating = [x for x in every if isinstance(x, torch.Tensor) and x.is_floating_point()]
    assert len(floating) == 2 + (kind is Weighed)
    assert {id(x) for x in P.tensors()} == {id(x) for x in floating}
    narrow = P.to(torch.float32)
    assert all(x.dtype == torch.float32 for x in narrow.tensors())
    torch.testing.assert_close(narrow.dense(), P.dense().float())


def test_a_policy_that_no_node_needs_changes_nothing():
    ring = torch.tensor([[0, 1, 2], [1, 2, 0]])
    for dangling in ("uniform", "restart", "error", torch.full((3,), 1 / 3)):
        P = from_edges(ring, dangling=dangling)
        assert P.sparse
        assert not P.restarts
        assert not P.reversible


def test_walks_that_restart_wait_for_the_signal():
    P = from_edges(EDGES, WEIGHT, dangling="restart")
    assert P.restarts
    for use in (lambda: P @ randn(5), lambda: P.T @ randn(5), P.dense, lambda: P.rows([0])):
        with pytest.raises(ValueError, match=r"restart at the signal.* solve, diffuse and pagerank bind it"):
            use()
    starts = torch.stack([WHERE, WHERE.flip(0)])
    bound = P.restarting_at(starts)
    assert bound.shape == (2, 5, 5)
    y = randn(2, 5, 3)
    for i in range(2):
        alone = P.restarting_at(starts[i])
        assert torch.equal((bound @ y)[i], alone @ y[i])
        assert torch.equal((bound.T @ y)[i], alone.T @ y[i])
        torch.testing.assert_close(bound.dense()[i], alone.dense())
    with pytest.raises(TypeError, match="no open ends"):
        from_edges(EDGES, WEIGHT).restarting_at(WHERE)


@pytest.mark.parametrize("dangling", ["uniform", WHERE, "restart"], ids=str)
def test_diffusion_where_nodes_dangle(dangling):
    P, s = from_edges(EDGES, WEIGHT, dangling=dangling), randn(5, 2).abs()
    for k in range(2):
        D = P.restarting_at(s[:, k] / s[:, k].sum()).dense() if P.restarts else P.dense()
        exact = 0.15 * torch.linalg.solve(torch.eye(5) - 0.85 * D.T, s[:, k])
        torch.testing.assert_close(gd.diffuse(P.T, s, 0.85)[:, k], exact, rtol=0, atol=1e-9)


# --- one graph, every constructor


def test_every_constructor_makes_the_same_matrix():
    networkx, scipy = pytest.importorskip("networkx"), pytest.importorskip("scipy.sparse")
    W = affinity()
    G = networkx.MultiDiGraph()
    G.add_nodes_from(range(5))
    for (i, j), w in zip(EDGES.T.tolist(), WEIGHT.tolist(), strict=True):
        G.add_edge(i, j, weight=w)
    unsorted = torch.sparse_coo_tensor(EDGES, WEIGHT, (5, 5), check_invariants=True)
    made = [
        from_edges(EDGES, WEIGHT),
        gd.SparseTransition.from_networkx(G, dtype=torch.float64),
        gd.SparseTransition.from_torch(unsorted),
        gd.SparseTransition.from_torch(W.to_sparse_csr()),
    ]
    coo = scipy.coo_array((WEIGHT.numpy(), tuple(EDGES.numpy())), shape=(5, 5))
    made += [gd.SparseTransition.from_scipy(coo.asformat(f)) for f in ("coo", "csr", "csc", "lil", "dok")]
    made.append(gd.SparseTransition.from_scipy(scipy.csr_matrix(W.numpy())))
    for P in made:
        torch.testing.assert_close(P.dense(), made[0].dense())
        assert torch.equal(P.indices, made[0].indices)
        assert P.indices.dtype == torch.int32


def test_scipy_numbers_of_every_kind():
    scipy = pytest.importorskip("scipy.sparse")
    A = scipy.csr_array(affinity().numpy())
    for kind, dtype in (("i4", "f4"), ("u1", "f4"), ("?", "f4"), ("f4", "f4"), ("f8", "f8"), ("g", "f8")):
        P = gd.SparseTransition.from_scipy(A.astype(kind))
        assert P.dtype == {"f4": torch.float32, "f8": torch.float64}[dtype]
        torch.testing.assert_close(
            P.dense().double(), walk(torch.tensor(A.astype(kind).todense().astype("f8")))
        )
    assert gd.SparseTransition.from_scipy(A, dtype=torch.float16).dtype == torch.float16


@st.composite
def matrices(draw):
    """Weights on few nodes, in any format, some 0, some huge, stored twice or out of order."""
    nodes = draw(st.integers(1, 6))
    number = st.integers(0, nodes - 1)
    weight = st.sampled_from([0.0, 0.5, 1.0, 3.0, 1e-300, 1e300])
    edges = draw(st.lists(st.tuples(number, number, weight), max_size=20))
    if draw(st.booleans()):
        edges += [(j, i, w) for i, j, w in edges if i != j]
    if draw(st.booleans()):
        edges += [(i, i, 1.0) for i in range(nodes)]
    rows, columns, weights = (np.array([e[k] for e in edges], dtype=t) for k, t in enumerate("iid"))
    return sp.coo_array((weights, (rows, columns)), (nodes, nodes))


@settings(max_examples=150)
@given(matrices(), st.sampled_from(["self", "uniform"]))
def test_rows_that_are_ready_make_the_walk_that_loose_edges_make(A, dangling):
    loose = gd.SparseTransition.from_scipy(A, dangling=dangling)
    for ready in (A.tocsr(), A.tocsc(), A.tolil()):
        P = gd.SparseTransition.from_scipy(ready, dangling=dangling)
        assert P.reversible == loose.reversible
        torch.testing.assert_close(P.dense(), loose.dense(), rtol=1e-14, atol=0)
        if P.reversible:
            torch.testing.assert_close(P.log_degree, loose.log_degree, rtol=1e-14, atol=1e-14)


def without_numba(make):
    """What is made where the compiled code cannot be imported."""
    sparse_module._compiled.cache_clear()
    with patch.dict(sys.modules, {"graphdiff.operators.rows": None}), pytest.MonkeyPatch.context() as patched:
        patched.delattr(gd.operators, "rows", raising=False)
        assert sparse_module._compiled() is None
        made = make()
    sparse_module._compiled.cache_clear()
    return made


@st.composite
def rows_of_numbers(draw):
    """Most ready to be a walk: few nodes, some with loops, symmetric or nearly so."""
    nodes = draw(st.integers(1, 7))
    number = st.integers(0, nodes - 1)
    weight = st.sampled_from([1.0, 1.0, 0.1, 0.3, 7.0, 1e-9, 1e14, 0.0, 1e-15, 1e15])
    edges = draw(st.lists(st.tuples(number, number, weight), max_size=25))
    W = np.zeros((nodes, nodes))
    for i, j, w in edges:
        W[i, j] = w
    if draw(st.booleans()):
        W = np.maximum(W, W.T)
    W[~W.any(1), ~W.any(1)] = 1.0 if draw(st.booleans()) else 0.0
    A = sp.csr_array(W)
    if A.nnz and draw(st.booleans()):
        A.data[draw(st.integers(0, A.nnz - 1))] = draw(st.sampled_from([0.0, 0.1 + 2**-56, 2.0]))
    A = A.astype(draw(st.sampled_from(["f8", "f8", "f4", "i8", "?"])))
    integers = draw(st.sampled_from(["i4", "i8"]))
    A.indptr, A.indices = A.indptr.astype(integers), A.indices.astype(integers)
    return A


@settings(max_examples=300)
@given(
    rows_of_numbers(),
    st.sampled_from([None, torch.float16, torch.float32, torch.float64]),
    st.sampled_from([None, None, True, False]),
)
def test_walks_have_the_same_bits_with_numba_and_without(A, dtype, reversible):
    # Once it is loaded, few edges are passed over by it too.
    pytest.importorskip("graphdiff.operators.rows")

    def make():
        return gd.SparseTransition.from_scipy(A, dtype=dtype, reversible=reversible)

    P, plain = make(), without_numba(make)
    for name in ("indptr", "indices", "values", "log_degree", "row_sums"):
        found, expected = getattr(P, name), getattr(plain, name)
        assert (found is None) == (expected is None), name
        if found is not None:
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), name
    assert P.rounding(P.dtype) == plain.rounding(P.dtype)
    matrix, expected = P.to_scipy(), plain.to_scipy()
    assert type(matrix) is type(expected)
    assert matrix.dtype == expected.dtype
    assert (matrix.todense() == expected.todense()).all()
    assert (P._transposed_matrix.todense() == expected.todense().T).all()
    assert np.shares_memory(P._transposed_matrix.data, matrix.data)
    assert not any(np.shares_memory(getattr(matrix, x), getattr(A, x)) for x in ("data", "indices", "indptr"))
    if reversible is None:
        W = torch.from_numpy(A.astype("f8").toarray())
        stuck = W.sum(1) == 0
        W[stuck, stuck] = 1.0
        assert P.reversible == torch.equal(W, W.T)
    assert repr(P) == repr(plain)
    gd.SparseTransition(P.indptr, P.indices, P.values)  # every check that was left out


@pytest.mark.parametrize("weight", [1.0, 0.1, 1e-14, 0.7e15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_weights_have_the_same_bits_with_numba_and_without(weight, dtype):
    """Rows of all lengths up to 60 in any order, and of some that are longer."""
    pytest.importorskip("graphdiff.operators.rows")
    lengths = np.r_[np.arange(1, 61), np.arange(1, 61), 199, 997, 1000, 3]
    W = (np.arange(1000) < np.random.default_rng(0).permutation(lengths)[:, None]) * weight
    square = np.pad(W, ((0, 1000 - len(W)), (0, 0)))
    square[len(W) :, 0] = weight
    for A in (sp.csr_array(square), sp.csr_array(np.maximum(square, square.T))):
        P = gd.SparseTransition.from_scipy(A, dtype=dtype)
        plain = without_numba(lambda A=A: gd.SparseTransition.from_scipy(A, dtype=dtype))
        assert P.reversible == plain.reversible == ((A != A.T).nnz == 0)
        assert torch.equal(P.indptr, plain.indptr)
        assert torch.equal(P.indices, plain.indices)
        assert torch.equal(P.values, plain.values)
        assert torch.equal(P.row_sums, plain.row_sums)
        assert not P.reversible or torch.equal(P.log_degree, plain.log_degree)


def test_a_small_walk_does_not_wait_for_numba_and_a_large_one_does_not_do_without():
    script = f"""
        import sys
        import numpy as np, scipy.sparse as sp, graphdiff as gd
        small, large = sp.csr_array(np.ones((4, 4))), sp.csr_array(np.ones((257, 257)))
        assert large.nnz >= {sparse_module.FEW_EDGES} > 256
        for A in (small, large):
            assert gd.SparseTransition.from_scipy(A).reversible
            print("numba" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=120
    )
    there = importlib.util.find_spec("numba") is not None
    assert done.stdout.split() == ["False", str(there)], done.stderr


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_weights_that_are_none_are_refused_with_numba_and_without(value):
    A = sp.csr_array(np.eye(3))
    A.data[1] = value
    for make in (
        gd.SparseTransition.from_scipy,
        lambda A: without_numba(lambda: gd.SparseTransition.from_scipy(A)),
    ):
        with pytest.raises(ValueError, match=r"A: expected (finite )?values"):
            make(A)


@given(st.integers(1, 6), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5), st.sampled_from([1, 2]))))
def test_symmetry_is_that_of_the_dense_matrix(nodes, edges):
    """Of rows in any order as well: whoever broke them is not told that they mirror each other."""
    rows = pytest.importorskip("graphdiff.operators.rows")
    W = np.zeros((nodes, nodes))
    for i, j, w in edges:
        W[i % nodes, j % nodes] = W[j % nodes, i % nodes] = w
    for i, j, w in [*edges[:1], (0, 0, 0)]:
        A = sp.csr_array(W)
        assert rows.symmetric(A.indptr, A.indices, A.data) == np.array_equal(W, W.T)
        assert rows.symmetric(A.indptr, A.indices, None) == np.array_equal(W > 0, W.T > 0)
        turned = A.indptr, A.indices[::-1].copy(), A.data[::-1].copy()
        if rows.symmetric(*turned):
            dense = sp.csr_array((turned[2], turned[1], turned[0]), A.shape).toarray()
            assert np.array_equal(dense, dense.T)
        W[i % nodes, j % nodes] = 3 - w


def test_symmetry_of_more_edges_than_are_looked_at_at_once():
    rows = pytest.importorskip("graphdiff.operators.rows")
    random = np.random.default_rng(0)
    W = np.triu(random.random((200, 200)) * (random.random((200, 200)) < 0.2))
    W += np.triu(W, 1).T
    A = sp.csr_array(W)
    assert A.nnz > 4 * rows.PART
    assert rows.symmetric(A.indptr, A.indices, A.data)
    for e in random.permutation(A.nnz)[:100]:
        i = np.searchsorted(A.indptr, e, side="right") - 1
        if A.indices[e] != i:
            A.data[e] += 1
            assert not rows.symmetric(A.indptr, A.indices, A.data)
            A.data[e] -= 1
            B = A.copy()
            B.data[e] = 0
            B.eliminate_zeros()
            assert not rows.symmetric(B.indptr, B.indices, None)


def test_the_last_edge_of_a_row_has_no_mirror_image_in_the_next_row():
    W = torch.zeros(4, 4)
    W[0, 2] = W[2, 0] = W[1, 3] = W[3, 1] = W[1, 2] = 1.0
    assert not gd.SparseTransition.from_scipy(sp.csr_array(W.numpy())).reversible
    assert gd.SparseTransition.from_scipy(sp.csr_array((W + W.T).numpy())).reversible


def test_an_edge_into_a_last_row_that_is_used_up_has_no_mirror_image_behind_all_edges():
    rows = pytest.importorskip("graphdiff.operators.rows")
    A = sp.csr_array([[0.0, 0.0, 1.0], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]])
    # What lies behind them looks like one.
    nodes, weights = np.append(A.indices, 1), np.append(A.data, 1.0)
    assert not rows.symmetric(A.indptr, nodes[:-1], weights[:-1])


def order_of(A):
    """The order to sweep in, by sorting."""
    neighbours = [A.indices[a:b].tolist() for a, b in itertools.pairwise(A.indptr)]
    nodes, colour = range(A.shape[0]), {}
    for i in sorted(nodes, key=lambda i: -len(neighbours[i])):
        taken = {colour[j] for j in neighbours[i] if j in colour}
        # Those beyond the last share it.
        colour[i] = next((c for c in range(255) if c not in taken), 255)
    ahead = [sum(colour[j] >= colour[i] for j in neighbours[i]) for i in nodes]
    alike = collections.Counter((colour[i], len(neighbours[i])) for i in nodes)
    # Fewer than eight stand as they are.
    told = [ahead[i] if alike[colour[i], len(neighbours[i])] >= 8 else 0 for i in nodes]
    return sorted(nodes, key=lambda i: (colour[i], -len(neighbours[i]), told[i]))


@st.composite
def sparse_or_crowded(draw):
    """Directed or not, with loops and empty rows; some with more colours than a word has bits."""
    nodes = draw(st.sampled_from([1, 2, 5, 20, 80, 300]))
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    # Some crowds in which all know each other, but for a few.
    crowd = random.integers(0, draw(st.integers(1, 40)), nodes)
    W = random.random((nodes, nodes)) < draw(st.sampled_from([0.0, 0.02, 0.3]))
    W |= (crowd[:, None] == crowd) & (random.random((nodes, nodes)) < draw(st.sampled_from([0.5, 1.0])))
    if draw(st.booleans()):
        np.fill_diagonal(W, False)
    if draw(st.booleans()):
        W[random.random(nodes) < 0.2] = False
    return sp.csr_array(W | W.T if draw(st.booleans()) else W)


@st.composite
def rows_of_few_numbers(draw):
    """Rows of one number each, or of two."""
    rows = draw(st.lists(st.tuples(st.sampled_from([0.25, 0.5]), st.integers(0, 3)), min_size=1, max_size=30))
    values = np.concatenate([np.full(length, value) for value, length in rows])
    if draw(st.booleans()) and len(values):
        values[draw(st.integers(0, len(values) - 1))] = 0.75
    return np.concatenate([[0], np.cumsum([length for _, length in rows])]), values


@given(rows_of_few_numbers())
def test_steps_are_equal_where_each_row_is_one_number(given):
    rows = pytest.importorskip("graphdiff.operators.rows")
    starts, values = given
    wanted = all(len(set(values[a:b].tolist())) < 2 for a, b in itertools.pairwise(starts))
    assert rows.equal(starts, values) == wanted


@pytest.mark.parametrize("integers", ["i4", "i8"])
@given(st.integers(1, 40), st.integers(0, 2**20), st.booleans())
def test_mirror_images_are_those_of_the_transpose(integers, nodes, seed, nothing):
    rows = pytest.importorskip("graphdiff.operators.rows")
    random = np.random.default_rng(seed)
    A = sp.csr_array(random.random((nodes, nodes)) < random.choice([0.0, 0.1, 0.6])).astype("f8")
    starts, numbers, value = A.indptr.astype(integers), A.indices.astype(integers), random.random(nodes) + 0.1
    values = np.repeat(value, np.diff(starts))
    if nothing and len(values):
        # A row of zeros has no inverse.
        row = int(np.flatnonzero(np.diff(starts))[0])
        values[starts[row] : starts[row + 1]] = 0
        assert rows.mirrored(starts, numbers, values) is None
        return
    begins, images, inverse = rows.mirrored(starts, numbers, values)
    wanted = A.T.tocsr()
    assert np.array_equal(begins, wanted.indptr)
    assert np.array_equal(images, wanted.indices)
    assert np.array_equal(inverse, np.where(np.diff(starts) > 0, 1 / value, 1))


def test_steps_of_graphs_without_weights_are_equal_and_of_others_are_looked_at():
    pytest.importorskip("numba")
    A = sp.random_array((40, 40), density=0.1, rng=np.random.default_rng(0)).tocsr()
    A = A + A.T + sp.eye_array(40).tocsr()
    weighted = gd.SparseTransition.from_scipy(A)
    plain = gd.SparseTransition.from_scipy((A != 0).astype("f8"))
    again = gd.SparseTransition(plain.indptr, plain.indices, plain.values, log_degree=plain.log_degree)
    found = [P.equal_steps() for P in (weighted, plain, again, plain.to(torch.float32), plain.T)]
    assert found == [False, True, True, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("least", [-600.0, -0.5])
def test_degrees_of_graphs_without_weights_have_the_bits_of_others(dtype, least):
    pytest.importorskip("graphdiff.operators.rows")
    A = sp.random_array((80, 80), density=0.05, rng=np.random.default_rng(0)).tocsr()
    A = ((A + A.T + sp.eye_array(80)) != 0).astype("f8").tocsr() * 3
    plain = gd.SparseTransition.from_scipy(A, dtype=dtype)
    again = gd.SparseTransition(plain.indptr, plain.indices, plain.values, log_degree=plain.log_degree)
    (degree, lowest), expected = plain.relative_degrees(least), again.relative_degrees(least)
    assert np.array_equal(degree, expected[0])
    assert lowest == expected[1]
    exact = A.sum(1) / A.sum(1).max()
    np.testing.assert_allclose(degree, exact.clip(min=np.exp(least)), rtol=1e-6)
    np.testing.assert_allclose(lowest, np.log(exact).min(), rtol=1e-6)
    np.testing.assert_allclose(plain.T.relative_degrees(-600.0)[0], exact.min() / exact, rtol=1e-5)


def test_what_is_written_into_a_walk_of_ordinary_weights_is_seen():
    pytest.importorskip("graphdiff.operators.rows")
    A = sp.csr_array(np.ones((6, 6)))
    P = gd.SparseTransition.from_scipy(A)
    assert (P.relative_degrees(-600.0)[0] == 1).all()
    P.log_degree[1] -= 1
    np.testing.assert_allclose(P.relative_degrees(-600.0)[0], np.where(np.arange(6) == 1, np.exp(-1), 1))
    P.check_finite()
    P.values[3] = torch.nan
    with pytest.raises(ValueError, match=r"the tensors of SparseTransition: expected finite values"):
        gd.diffuse(P.T, torch.ones(6, dtype=torch.float64), 0.5)


def test_degrees_of_a_walk_that_is_not_reversible_are_refused():
    with pytest.raises(TypeError, match=r"not known to be reversible"):
        from_edges(EDGES, WEIGHT).relative_degrees(-600.0)


@given(sparse_or_crowded(), st.sampled_from(["i4", "i8"]))
def test_the_order_to_sweep_in_is_by_colour_degree_and_edges_ahead(A, integers):
    rows = pytest.importorskip("graphdiff.operators.rows")
    order = rows.ordered(A.indptr.astype(integers), A.indices.astype(integers))
    assert order.dtype == np.uint32
    assert order.tolist() == order_of(A)


@pytest.mark.parametrize("nodes", [61, 62, 63, 64, 255, 256, 257, 300])
def test_an_order_of_as_many_colours_as_nodes_or_as_there_are(nodes):
    rows = pytest.importorskip("graphdiff.operators.rows")
    A = sp.csr_array(1 - np.eye(nodes))
    A.data[5] = 0
    A.eliminate_zeros()
    order = rows.ordered(A.indptr, A.indices)
    assert order.tolist() == order_of(A)


def test_an_order_among_many_nodes_of_each_of_many_colours():
    """In crowds all know each other, and one of each crowd beside."""
    rows = pytest.importorskip("graphdiff.operators.rows")
    crowds, size = 24, 70
    i = np.arange(crowds * size)
    W = (i[:, None] // size == i // size) & (i[:, None] != i)
    random = np.random.default_rng(0)
    for crowd in range(crowds):
        beside = (crowd + 1) % crowds * size + random.permutation(size)
        W[crowd * size + np.arange(size), beside] = True
    A = sp.csr_array(W | W.T)
    order = rows.ordered(A.indptr, A.indices)
    assert order.tolist() == order_of(A)


def test_an_order_to_sweep_in_is_found_once_for_all_walks_along_the_same_edges():
    pytest.importorskip("numba")
    path = from_edges(torch.tensor([[0, 1, 2], [1, 2, 3]]), undirected=True)
    order = path.sweep_order()
    assert sorted(order.tolist()) == [0, 1, 2, 3]
    assert path.to(torch.float64).sweep_order() is order
    # Of two colours: the neighbours of each half are in the other.
    half = torch.isin(torch.arange(4), torch.from_numpy(order[:2].astype("i8")))
    assert not path.dense()[half][:, half].any()


def test_what_becomes_of_a_matrix_later_is_no_concern_of_its_walk():
    A = sp.csr_array(np.array([[0.0, 1.0, 2.0], [1.0, 0.0, 0.0], [2.0, 0.0, 5.0]]))
    P = gd.SparseTransition.from_scipy(A)
    before = P.dense().clone()
    A.data[:], A.indices[:] = 7, 0
    assert torch.equal(P.dense(), before)
    assert torch.equal(P @ torch.ones(3, dtype=torch.float64), before.sum(1))


def test_a_matrix_that_names_no_node_is_refused():
    A = sp.csr_array(np.eye(3))
    A.indices[1] = 10**6
    with pytest.raises(ValueError, match="expected node numbers from 0 to 2 for N = 3 nodes, got 1000000"):
        gd.SparseTransition.from_scipy(A)


def test_networkx_graphs():
    networkx = pytest.importorskip("networkx")
    G = networkx.Graph()
    G.add_edge("b", "a", weight=3)
    G.add_edge("b", "c")  # weighs 1
    G.add_edge("c", "c", weight=0.5, length=7.0)
    W = torch.tensor([[0.0, 3.0, 1.0], [3.0, 0.0, 0.0], [1.0, 0.0, 0.5]])
    P = gd.SparseTransition.from_networkx(G)
    torch.testing.assert_close(P.dense(), W / W.sum(-1, keepdim=True))
    assert P.reversible
    torch.testing.assert_close(
        gd.SparseTransition.from_networkx(G, weight=None).dense()[2], torch.tensor([0.5, 0.0, 0.5])
    )
    torch.testing.assert_close(
        gd.SparseTransition.from_networkx(G, weight="length").dense()[2], torch.tensor([0.125, 0.0, 0.875])
    )
    for wrong in (None, "3", [1.0]):
        G["b"]["c"]["weight"] = wrong
        with pytest.raises(TypeError, match=r"weight: expected a number .* for the edge from 'b' to 'c'"):
            gd.SparseTransition.from_networkx(G)


def test_a_csr_matrix_that_is_ready_is_not_copied():
    D = from_edges(EDGES, WEIGHT)
    P = gd.SparseTransition(D.indptr, D.indices, D.values)
    for name in ("indptr", "indices", "values"):
        assert getattr(P, name).data_ptr() == getattr(D, name).data_ptr()
    shared = P.to_scipy()
    assert shared.data.ctypes.data == P.values.data_ptr()
    assert shared.indices.ctypes.data == P.indices.data_ptr()


def test_scipy_gets_back_what_it_gave():
    scipy = pytest.importorskip("scipy.sparse")
    P = from_edges(EDGES, WEIGHT)
    assert isinstance(P.to_scipy(), scipy.csr_array)
    assert P.to_scipy().dtype == "f8"
    assert P.to(torch.bfloat16).to_scipy().dtype == "f4"
    assert (P.to_scipy().todense() == P.dense().numpy()).all()
    with pytest.raises(TypeError, match=r"to_scipy: .* is not sparse"):
        from_edges(EDGES, WEIGHT, dangling="uniform").to_scipy()


def test_neighbours():
    P = from_edges(EDGES, WEIGHT)
    index = torch.tensor([4, 0, 0, 2])
    position, node, probability = P.neighbours(index)
    found = torch.zeros(4, 5, dtype=torch.float64).index_put((position, node), probability)
    torch.testing.assert_close(found, P.dense()[index])
    assert len(node) == 1 + 2 + 2 + 1
    assert all(len(x) == 0 for x in P.neighbours(torch.arange(0)))
    with pytest.raises(TypeError, match=r"neighbours: .* is not sparse"):
        from_edges(EDGES, WEIGHT, dangling="uniform").neighbours([0])


# --- products


def spread(n, edges, dtype):
    """A random graph whose weights differ by orders of magnitude."""
    g = torch.Generator().manual_seed(n)
    edge_index = torch.randint(n, (2, edges), generator=g)
    edge_index[0, : edges // 4] = 0  # a hub
    weight = 10 ** (12 * torch.rand(edges, generator=g, dtype=torch.float64) - 6)
    return from_edges(edge_index, weight.to(dtype), n, dangling="uniform")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("n", "edges"), [(7, 12), (500, 3000), (20_000, 100_000)])
def test_the_bits_of_a_signal_depend_on_no_other(n, edges, dtype):
    P, y = spread(n, edges, dtype), randn(n, 33, dtype=dtype)
    assert P.jump is not None
    for product in (P.matmul, P.rmatmul):
        together = product(y)
        assert torch.equal(product(y), together)
        for channels in (1, 2, 7):
            for start in (0, 5, 33 - channels):
                some = y[:, start : start + channels]
                assert torch.equal(product(some.contiguous()), together[:, start : start + channels])
                assert torch.equal(product(some), together[:, start : start + channels])
        batched = product(y[:, :32].reshape(n, 4, 8).movedim(1, 0))
        assert batched.is_contiguous()
        assert torch.equal(batched.movedim(0, 1).reshape(n, 32), together[:, :32])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_both_ways_to_a_product_are_within_the_stated_rounding(dtype):
    P = spread(500, 3000, dtype)
    y, D = randn(500, 3, dtype=dtype), P.dense().double()
    for P_or_T, matrix, order in ((P, D, torch.inf), (P.T, D.T, 1)):
        exact, eps = matrix @ y.double(), P.rounding(dtype)
        size = torch.linalg.vector_norm(y.double(), order, 0)
        recorded = P_or_T.matmul(y.clone().requires_grad_()).detach()
        for product in (P_or_T.matmul(y), recorded):
            error = torch.linalg.vector_norm(product.double() - exact, order, 0)
            assert (error <= eps * size).all()


def test_rounding_counts_the_longest_row_column_or_jump():
    eps = torch.finfo(torch.float64).eps
    star = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0]])
    assert from_edges(star).rounding(torch.float64) == (5 + 4) * eps  # with its self-loop
    assert from_edges(star.flip(0)).rounding(torch.float64) == (4 + 4) * eps
    assert from_edges(star[:, :1], num_nodes=9, dangling="uniform").rounding(torch.float64) == (9 + 4) * eps


def test_half_precision_and_autocast_multiply_in_float32():
    P, y = spread(500, 3000, torch.float32), randn(500, 3, dtype=torch.float32)
    half = P.to(torch.bfloat16)
    for product in (half @ y.bfloat16(), half @ y.bfloat16().requires_grad_()):
        assert product.dtype == torch.bfloat16
        assert (product.double() - P.dense().double() @ y.double()).abs().max() < 0.03
    for signal in (y, y.clone().requires_grad_()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            product, transposed = P @ signal, P.T @ signal
        assert product.dtype == transposed.dtype == torch.float32
        assert torch.equal(product.detach(), (P @ signal).detach())


def test_dtypes_and_tensors_change_while_the_sorted_edges_are_kept(monkeypatch):
    P = from_edges(EDGES, WEIGHT, dangling="uniform")
    P.T @ randn(5)
    monkeypatch.setattr(sparse_module._Pattern, "transpose", P._pattern.transpose)
    for Q in (P.to(torch.float32), P.with_tensors([x.clone() for x in P.tensors()]), P.restarting_at(WHERE)):
        assert Q._pattern is P._pattern
        assert Q.T.dense().dtype == Q.dtype
        assert Q.shape == P.shape
    assert P.to("meta")._pattern is not P._pattern
    assert P.to("meta").jump.device.type == P.to("meta").dangling.device.type == "meta"
    undirected = from_edges(EDGES, WEIGHT, undirected=True)
    assert undirected.to(torch.float32).log_degree.dtype == torch.float32


def test_other_values_give_other_products():
    P = from_edges(EDGES, WEIGHT)
    P.row_sums, P.T.dense()
    Q = P.with_tensors([P.values.flip(0)])
    torch.testing.assert_close(Q.T.dense(), Q.dense().T)
    torch.testing.assert_close(Q.row_sums, Q.dense().sum(-1, keepdim=True))


def test_a_representation_tells_size_edges_and_facts():
    assert repr(from_edges(EDGES, WEIGHT)) == "SparseTransition([5, 5], float64, cpu, 6 edges)"
    assert "reversible, 7 edges" in repr(from_edges(EDGES, WEIGHT, undirected=True))
    assert "1 jumping" in repr(from_edges(EDGES, WEIGHT, dangling="uniform"))
    assert "1 restarting" in repr(from_edges(EDGES, WEIGHT, dangling="restart"))


# --- gradients


@pytest.mark.parametrize("dangling", ["self", "uniform"])
def test_derivatives_of_every_order_in_weights_and_signal(dangling):
    def both(weight, y):
        P = from_edges(EDGES, weight, dangling=dangling)
        return P.matmul(y), P.rmatmul(y), P.rows([0, 2])

    inputs = (WEIGHT.clone().requires_grad_(), randn(2, 5, 2).requires_grad_())
    assert gradcheck(both, inputs)
    assert gradgradcheck(both, inputs)


def test_derivatives_of_every_order_in_values_and_jump():
    P = from_edges(EDGES, WEIGHT, dangling="uniform")
    jump = torch.stack([WHERE, WHERE.flip(0)])

    def both(values, jump, y):
        Q = P.restarting_at(torch.stack([WHERE, WHERE])).with_tensors([values, jump])
        return Q.matmul(y), Q.rmatmul(y), Q.dense()

    inputs = tuple(x.clone().requires_grad_() for x in (P.values, jump, randn(5, 2)))
    assert gradcheck(both, inputs)
    assert gradgradcheck(both, inputs)
    probability = from_edges(EDGES, inputs[0].detach().new_ones(6).requires_grad_()).neighbours([0, 1])[2]
    assert probability.requires_grad


def test_a_weight_that_makes_no_difference_has_no_gradient():
    weight = torch.tensor(
        [0.0, 2.0], dtype=torch.float64, requires_grad=True
    )  # out of a node left with nothing
    for dangling in ("self", "uniform"):
        P = from_edges(torch.tensor([[0, 1], [1, 0]]), weight, dangling=dangling)
        (gradient,) = torch.autograd.grad((P @ randn(2)).sum(), weight)
        assert torch.equal(gradient, torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_gradients_reach_sparse_tensors_sparse(layout):
    W = affinity()
    A = W.to_sparse(layout=layout).requires_grad_()
    y = randn(5, 2)
    P = gd.SparseTransition.from_torch(A)
    gd.diffuse(P, y, 0.7).square().sum().backward()
    assert A.grad.layout == layout
    gradient = A.grad.coalesce() if layout == torch.sparse_coo else A.grad
    assert gradient.values().shape == (5,)

    dense = W.clone().requires_grad_()
    D = torch.where(
        W.sum(-1, keepdim=True) > 0, dense / dense.sum(-1, keepdim=True).clamp(min=1e-9), torch.eye(5)
    )
    (0.3 * torch.linalg.solve(torch.eye(5).double() - 0.7 * D, y)).square().sum().backward()
    torch.testing.assert_close(A.grad.to_dense(), dense.grad * (W > 0), rtol=1e-7, atol=1e-9)


@pytest.mark.slow
def test_memory_of_a_backward_is_that_of_the_edges():
    resource = pytest.importorskip("resource")
    n = 100_000
    edges = torch.randint(n, (2, 4 * n), generator=torch.Generator().manual_seed(1))
    weight = torch.rand(4 * n, dtype=torch.float64, requires_grad=True)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    P = from_edges(edges, weight, n)
    (P @ randn(n, 8)).square().sum().backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 1e9  # the matrix alone is 8e10 bytes


# --- images


@given(st.integers(1, 5), st.integers(1, 5), st.sampled_from([4, 8]), st.sampled_from([0.0, 1.0, 90.0]))
def test_grids_equal_the_definition(height, width, connectivity, beta):
    image = randn(2, height, width, seed=height)
    place = torch.cartesian_prod(torch.arange(height), torch.arange(width)).reshape(-1, 2)
    apart = (place.unsqueeze(1) - place).abs()
    near = apart.sum(-1) == 1 if connectivity == 4 else apart.amax(-1) == 1
    if len(place) == 1:
        near = torch.ones(1, 1, dtype=torch.bool)
    unlike = (image.flatten(1).unsqueeze(2) - image.flatten(1).unsqueeze(1)).square().sum(0)
    W = torch.where(near, torch.exp(-beta * unlike), 0.0)
    P = gd.grid_transition(image, beta, connectivity)
    # Where all weights of a pixel underflow, the log domain still knows the walk.
    whole = W.sum(-1) > 1e-280
    torch.testing.assert_close(P.dense()[whole], (W / W.sum(-1, keepdim=True))[whole], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(P.log_degree[whole], W.sum(-1)[whole].log(), rtol=1e-9, atol=1e-9)
    assert P.reversible
    assert P.sparse


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float32, 1e30), (torch.float64, 1e200), (torch.float16, 6e4)]
)
def test_pixels_like_none_of_their_neighbours_are_left_all_the_same(dtype, size):
    image = (size * torch.tensor([[[0.0, 1.0, 0.0], [0.5, 0.0, 1.0]]], dtype=torch.float64)).to(dtype)
    P = gd.grid_transition(image)
    torch.testing.assert_close(P.row_sums, torch.ones(6, 1, dtype=torch.float64), rtol=0, atol=1e-3)
    assert P.log_degree.isfinite().all()
    assert gd.diffuse(P, image.flatten(1).T.clamp(max=1), 0.5).isfinite().all()


def test_derivatives_of_every_order_in_an_image():
    y = randn(6, 2)

    def both(image):
        P = gd.grid_transition(image, 0.5, 8)
        return P.matmul(y), P.rmatmul(y)

    image = randn(3, 2, 3).requires_grad_()
    assert gradcheck(both, (image,))
    assert gradgradcheck(both, (image,))


# --- products alone


def test_functions_have_every_product_and_gradient():
    D = torch.softmax(randn(3, 3), -1).requires_grad_()
    calls = []

    def matmul(y, D, order):
        calls.append(y.dtype)
        return D @ y[..., order, :][..., order.argsort(), :]

    order = torch.tensor([2, 0, 1], dtype=torch.int32).long()
    P = gd.FunctionTransition(matmul, (3, 3), tensors=[D, order])
    y = randn(2, 3, 4)
    torch.testing.assert_close(P @ y, D @ y)
    torch.testing.assert_close(P.T @ y, D.mT @ y)
    torch.testing.assert_close(P.rows([1]), D[[1]])
    torch.testing.assert_close(P.row_sums, torch.ones(3, 1, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(gd.diffuse(P, y[0], 0.5).square().sum(), D)
    exact = 0.5 * torch.linalg.solve(torch.eye(3).double() - 0.5 * D, y[0])
    torch.testing.assert_close(gradient, torch.autograd.grad(exact.square().sum(), D)[0])
    Q = P.to(torch.float32)
    assert (Q @ y.float()).dtype == torch.float32
    assert calls[-1] == torch.float32
    assert Q.arguments[1].dtype == torch.int64
    assert not P.reversible


def test_functions_without_tensors_take_dtype_and_device():
    P = gd.FunctionTransition(lambda y: y, 2)
    assert P.dtype == torch.get_default_dtype()
    assert P.to(torch.float64).dtype == torch.float64
    assert P.shape == (2, 2)
    assert gd.FunctionTransition(lambda y: y, (4, 2, 2), dtype=torch.float64).shape == (4, 2, 2)
    Q = gd.FunctionTransition(
        lambda y: y.roll(1, -2), 3, rmatmul=lambda v: v.roll(-1, -2), dtype=torch.float64
    )
    torch.testing.assert_close(Q.T.dense(), Q.dense().T)
    # Written out, the transpose is taken as written.
    wrong = gd.FunctionTransition(lambda y: y, 2, rmatmul=lambda v: 3 * v)
    assert torch.equal(wrong.T @ torch.ones(2), torch.full((2,), 3.0))
    assert gd.solve(Q.T, torch.tensor([1.0, 0.0, 0.0]).double(), 0.9).converged
    facts = {"log_degree": torch.zeros(2), "positive_semidefinite": True}
    assert "reversible, positive semidefinite" in repr(gd.FunctionTransition(lambda y: y, 2, **facts))


def test_a_function_of_rounded_rows_is_certified_as_it_is():
    D = torch.softmax(randn(40, 40, dtype=torch.float32), -1)
    P = gd.FunctionTransition(lambda y, D: D @ y, 40, tensors=[D])
    torch.testing.assert_close(P.row_sums, D.double().sum(-1, keepdim=True), rtol=1e-14, atol=0)
    s = torch.ones(40)
    sol = gd.solve(P, s, 0.999, tol=1e-4)
    exact = 0.001 * torch.linalg.solve(torch.eye(40).double() - 0.999 * D.double(), s.double())
    assert sol.converged
    assert (sol.value.double() - exact).abs().max() <= sol.error_bound


@pytest.mark.parametrize("leaves", [9457, 20001, 100003])
def test_a_hub_of_many_equal_edges(leaves):
    """Their sum, edge after edge, is off by far more than its entries are."""
    star = torch.stack([torch.zeros(leaves, dtype=torch.int64), torch.arange(1, leaves + 1)])
    P = gd.SparseTransition.from_edge_index(star, undirected=True, dtype=torch.float64)
    assert abs(P.values[:leaves].numpy().astype(np.longdouble).sum() - 1) < 1e-15


def test_neighbours_of_the_transpose():
    """Every step into some nodes, at the price of these alone, and differentiable."""
    P = from_edges(EDGES, WEIGHT)
    index = torch.tensor([2, 0, 2])
    position, node, probability = P.T.neighbours(index)
    rows = torch.zeros(3, P.shape[-1], dtype=P.dtype)
    rows.index_put_((position, node), probability, accumulate=True)
    assert torch.equal(rows, P.dense().T[index])
    assert (position[1:] >= position[:-1]).all()
    weight = WEIGHT.detach().clone().requires_grad_()
    from_edges(EDGES, weight).T.neighbours([1])[2].sum().backward()
    assert weight.grad.abs().sum() > 0


# --- how products are computed


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("integers", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_are_right_on_any_number_of_threads(threads, dtype, integers):
    P = from_edges(torch.randint(300, (2, 2000), generator=torch.Generator().manual_seed(1)), dtype=dtype)
    P = gd.SparseTransition(P.indptr.to(integers), P.indices.to(integers), P.values)
    y, dense = randn(2, 300, 5, dtype=dtype), P.dense().double()
    for Q, matrix in ((P, dense), (P.T, dense.mT)):
        product = Q @ y
        assert (product.double() - matrix @ y.double()).abs().max() < 64 * torch.finfo(dtype).eps
        assert torch.equal(Q @ y[0, :, 2], product[0, :, 2])
        assert torch.equal(Q @ y[..., 1:3], product[..., 1:3])
        assert torch.equal(Q @ y.mT.contiguous().mT, product)


@given(st.lists(st.integers(0, 6), max_size=40))
def test_numbers_are_sorted_and_equal_ones_keep_their_order(numbers):
    order = sparse_module._stable_order(torch.tensor(numbers, dtype=torch.int64), 7)
    assert order.tolist() == sorted(range(len(numbers)), key=numbers.__getitem__)


def test_weights_so_large_that_their_sum_overflows_are_finite():
    path = torch.tensor([[0, 1, 1, 2], [1, 0, 2, 1]])
    P = from_edges(path, torch.full((4,), 1.5e308, dtype=torch.float64))
    torch.testing.assert_close(P.rows([1]), torch.tensor([[0.5, 0.0, 0.5]], dtype=torch.float64))
    ready = sp.csr_array((np.full(4, 1.5e308), path.numpy()))
    torch.testing.assert_close(gd.SparseTransition.from_scipy(ready).dense(), P.dense())
