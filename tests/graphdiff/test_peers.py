"""Numbers and closed forms from the tests of other libraries, and their own programs where installed.

Numbers are quoted from the file named above each; where that library's answer stops short of its last
printed digit, the closed form beside it says by how much.
"""

import networkx as nx
import pytest
import torch

import graphdiff as gd


def ranks(G, personalization=None, mu=0.85, **options):
    """{node: rank}, nodes in the order of G."""
    P = gd.SparseTransition.from_networkx(G, dtype=torch.float64, **options)
    if personalization is not None:
        personalization = torch.tensor([float(personalization.get(node, 0)) for node in G]).double()
    sol = gd.pagerank(P, personalization, mu, tol=1e-11)
    return dict(zip(G, sol.value.tolist(), strict=True))


def symmetric(W, s, mu):
    return gd.solve_symmetric(gd.DenseTransition.from_affinity(W), s, mu).value


# --- networkx, networkx/algorithms/link_analysis/tests/test_pagerank.py (commit 04f1aba)


def langville_meyer():
    """The six-node example of Langville and Meyer's survey of eigenvector methods; node 2 is dangling."""
    G = nx.DiGraph()
    G.add_nodes_from(range(1, 7))
    G.add_edges_from([(1, 2), (1, 3), (3, 1), (3, 2), (3, 5), (4, 5), (4, 6), (5, 4), (5, 6), (6, 4)])
    return G


def test_networkx_langville_meyer():
    printed = [0.03721197, 0.05395735, 0.04150565, 0.37508082, 0.20599833, 0.28624589]
    found = ranks(langville_meyer(), mu=0.9, dangling="uniform")
    assert list(found.values()) == pytest.approx(printed, abs=5e-9)


def test_networkx_dangling_distribution():
    printed = [0.10844518, 0.18618601, 0.0710892, 0.2683668, 0.15919783, 0.20671497]
    to = torch.tensor([2.0, 3.0, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64) / 5
    found = ranks(langville_meyer(), dangling=to)
    assert list(found.values()) == pytest.approx(printed, abs=5e-9)


@pytest.mark.parametrize(
    ("weights", "printed"),
    [
        (
            {0: 1, 1: 1, 2: 4, 3: 4},
            [0.23246732615667579, 0.23246732615667579, 0.267532673843324, 0.2675326738433241],
        ),
        ({3: 1}, [0.22077931820379187, 0.22077931820379187, 0.22077931820379187, 0.3376620453886241]),
    ],
)
def test_networkx_personalization_on_four_nodes(weights, printed):
    found = list(ranks(nx.complete_graph(4), weights).values())
    # P has the eigenvalues 1 and −1/3 here, so the answer is known.
    s = [weights.get(node, 0) / sum(weights.values()) for node in range(4)]
    exact = [1 / 4 + (s_i - 1 / 4) * 0.15 / (1 + 0.85 / 3) for s_i in s]
    assert found == pytest.approx(exact, abs=1e-11)
    # The printed ones were stopped at a step below 4e-6.
    assert found == pytest.approx(printed, abs=5e-7)


def test_networkx_multigraph():
    """Parallel edges add up."""
    G = nx.MultiGraph()
    G.add_edges_from([(1, 2), (1, 2), (1, 2), (2, 3), (2, 3), ("3", 3), ("3", 3)])
    printed = {
        1: 0.21066048614468322,
        2: 0.3395308825985378,
        3: 0.28933951385531687,
        "3": 0.16046911740146227,
    }
    found = ranks(G)
    assert found == pytest.approx(printed, abs=1e-6)
    assert found == pytest.approx(nx.pagerank(G, tol=1e-15, max_iter=1000), abs=1e-11)


def test_networkx_zero_personalization():
    with pytest.raises(ZeroDivisionError):
        nx.pagerank(nx.complete_graph(4), personalization=dict.fromkeys(range(4), 0))
    with pytest.raises(ValueError, match=r"personalization: expected a positive sum"):
        ranks(nx.complete_graph(4), dict.fromkeys(range(4), 0))


@pytest.mark.parametrize("mu", [0.5, 0.85, 0.99])
def test_networkx_itself(mu):
    """Weighted edges; nodes that dangle, from where it goes anywhere or restarts."""
    weighted = nx.karate_club_graph()
    start = {node: 1.0 + node for node in weighted}
    assert ranks(weighted, start, mu) == pytest.approx(
        nx.pagerank(weighted, mu, start, tol=1e-15, max_iter=100_000), abs=1e-11
    )
    directed = nx.gn_graph(40, seed=3)  # a tree towards its root, which dangles
    assert ranks(directed, mu=mu, dangling="uniform") == pytest.approx(
        nx.pagerank(directed, mu, tol=1e-15, max_iter=100_000), abs=1e-11
    )
    # Without a word about dangling nodes, its walks go from them to where they restart.
    start = {node: 1.0 + node for node in directed}
    assert ranks(directed, start, mu, dangling="restart") == pytest.approx(
        nx.pagerank(directed, mu, start, tol=1e-15, max_iter=100_000), abs=1e-11
    )


# --- scikit-learn, sklearn/semi_supervised/tests/test_label_propagation.py (commit 0249155)


def radial(x, gamma=20.0):
    """scikit-learn's default kernel; spreading ignores its diagonal."""
    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")  # by products it is not symmetric
    return (-gamma * apart.square()).exp().fill_diagonal_(0)


@pytest.mark.parametrize(
    ("samples", "third"),
    [([[1, 0], [0, 1], [1, 1]], [0.5, 0.5]), ([[1, 0], [0, 2], [1, 3]], [0.0, 1.0])],
)
def test_sklearn_third_sample(samples, third):
    """test_distribution and test_fit_transduction: alike from both, or nearer to the second."""
    W = radial(torch.tensor(samples, dtype=torch.float64))
    s = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
    # So far apart, kernels are about e^-40: relative to ‖s‖ the answer would be nothing.
    y = symmetric(W / W.max(), s, 0.2)[2]
    assert (y / y.sum()).tolist() == pytest.approx(third, abs=5e-3)


ALPHAS = [0.1, 0.3, 0.5, 0.7, 0.9]


def two_clouds():
    """Samples, one-hot classes with every third unknown: as there, with our own numbers."""
    g = torch.Generator().manual_seed(0)
    y = torch.randint(2, (200,), generator=g)
    x = torch.randn(200, 2, generator=g, dtype=torch.float64) / 2 + y[:, None]
    Y = torch.nn.functional.one_hot(y, 2).double()
    Y[::3] = 0
    return x, Y


@pytest.mark.parametrize("alpha", ALPHAS)
def test_sklearn_closed_form(alpha):
    """test_label_spreading_closed_form: (I − αS)⁻¹Y."""
    x, Y = two_clouds()
    W = radial(x)
    degree = W.sum(-1)
    S = W / (degree[:, None] * degree).sqrt()
    spread = torch.linalg.solve(torch.eye(200, dtype=torch.float64) - alpha * S, Y)
    torch.testing.assert_close(symmetric(W, Y, alpha) / (1 - alpha), spread, rtol=0, atol=1e-8)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_sklearn_itself(alpha):
    semi_supervised = pytest.importorskip("sklearn.semi_supervised", reason="scikit-learn is in [bench] only")
    x, Y = two_clouds()
    known = torch.where(Y.sum(1) > 0, Y.argmax(1), -1).numpy()
    model = semi_supervised.LabelSpreading(alpha=alpha, max_iter=10_000, tol=1e-9).fit(x.numpy(), known)
    y = symmetric(radial(x), Y, alpha)
    likely = y.sum(1) > 1e-3 * (1 - alpha)  # an unlabelled outlier has nothing to normalise
    assert likely.sum() > 190
    found = (y / y.sum(1, keepdim=True))[likely]
    peer = torch.from_numpy(model.label_distributions_)[likely]
    torch.testing.assert_close(found, peer, rtol=0, atol=1e-6)


# --- PyG, test/transforms/test_gdc.py (commit 07020d6), test/utils/test_ppr.py (1fac353) and
# test/nn/conv/test_appnp.py (0ec5899)


def gdc_graph():
    A = torch.zeros(5, 5, dtype=torch.float64)
    A[[0, 0, 1, 1, 2, 2, 2, 3, 3, 4], [1, 2, 0, 2, 0, 1, 3, 2, 4, 3]] = 1
    return A + torch.eye(5, dtype=torch.float64)


def gdc(normalization):
    """α(I − (1 − α)T)⁻¹ with α = 0.15 and T the adjacency with self-loops so normalised."""
    A, units = gdc_graph(), torch.eye(5, dtype=torch.float64)
    P = gd.DenseTransition.from_affinity(A)
    if normalization == "sym":
        return symmetric(A, units, 0.85)
    return gd.diffuse(P if normalization == "row" else P.T, units, 0.85)


def test_pyg_gdc_properties():
    for normalization in ("sym", "row", "col"):
        assert (gdc(normalization) > 0).all()
    assert (gdc("sym") - gdc("sym").mT).abs().max() < 1e-9
    assert (gdc("row").sum(1) - 1).abs().max() < 1e-9
    assert (gdc("col").sum(0) - 1).abs().max() < 1e-9


@pytest.mark.parametrize("normalization", ["sym", "row", "col"])
def test_pyg_gdc_itself(normalization):
    transforms = pytest.importorskip("torch_geometric.transforms", reason="PyG is in [bench] only")
    A = gdc_graph()
    edges = A.nonzero().mT
    transform = transforms.GDC()
    edges, weights = transform.transition_matrix(edges, A[edges[0], edges[1]], 5, normalization)
    peer = transform.diffusion_matrix_exact(edges, weights, 5, method="ppr", alpha=0.15)
    torch.testing.assert_close(gdc(normalization), peer.double(), rtol=0, atol=1e-6)


def test_pyg_ppr_of_the_karate_club():
    """The bounds its test asks of get_ppr at α = 0.1: a weight is a probability."""
    P = gd.SparseTransition.from_networkx(nx.karate_club_graph(), weight=None, dtype=torch.float64)
    ppr = gd.pagerank(P, torch.eye(34, dtype=torch.float64)[:, [0, 4, 5, 6]], 0.9).value
    assert ppr.min() > 0
    assert ppr.max() < 1
    assert (ppr.sum(0) - 1).abs().max() < 1e-9


def appnp_graph():
    """A star of four nodes, with the self-loops APPNP adds."""
    A = torch.eye(4, dtype=torch.float64)
    A[0, 1:] = A[1:, 0] = 1
    return A


def appnp(steps, x, mu=0.9):
    """K steps z ← µSz + (1 − µ)x from z = x, as a cascade with β = 1."""
    A = appnp_graph()
    root = A.sum(-1, keepdim=True).sqrt()
    P = gd.DenseTransition.from_affinity(A)
    walk = gd.CascadedWalk(steps=1, mu=mu, beta=1.0, learn_mu=False, learn_beta=False).double().steps[0]
    z = x / root
    for _ in range(steps):
        z = walk(P, z, x / root)
    return root * z


def test_pyg_appnp_grows_into_the_exact_diffusion():
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    limit = symmetric(appnp_graph(), x, float(torch.tensor(0.9)))
    errors = [float((appnp(steps, x) - limit).norm()) for steps in (0, 10, 50, 300)]
    # S is symmetric with eigenvalues in [−1, 1]; K = 10, its example, is far from the limit.
    for steps, error in zip((10, 50, 300), errors[1:], strict=True):
        assert error <= 0.9**steps * errors[0] + 1e-8
    assert errors[1] > 1e-4 * float(limit.norm())


def test_pyg_appnp_itself():
    pyg = pytest.importorskip("torch_geometric.nn", reason="PyG is in [bench] only")
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    edges = torch.tensor([[0, 0, 0, 1, 2, 3], [1, 2, 3, 0, 0, 0]])
    for steps in (10, 300):
        peer = pyg.APPNP(K=steps, alpha=0.1)(x, edges)
        torch.testing.assert_close(appnp(steps, x), peer, rtol=0, atol=1e-6)
    torch.testing.assert_close(symmetric(appnp_graph(), x, 0.9), peer, rtol=0, atol=1e-6)


def through(filtered, normalization):
    """A filter of GDC's transition matrix as a matrix; sym is similar to row (theory 11)."""
    A, units = gdc_graph(), torch.eye(5, dtype=torch.float64)
    P, root = gd.DenseTransition.from_affinity(A), A.sum(-1, keepdim=True).sqrt()
    if normalization == "sym":
        return root * filtered(P, units / root).value
    return filtered(P if normalization == "row" else P.T, units).value


# The arguments of its tests and its documentation: t = 5 and 10, coefficients [0.8, 0.3, 0.1].
GDC_FILTERS = {
    "heat 5": (lambda P, s: gd.heat_kernel(P, s, 5.0), {"method": "heat", "t": 5}),
    "heat 10": (lambda P, s: gd.heat_kernel(P, s, 10.0), {"method": "heat", "t": 10}),
    "coeff": (
        lambda P, s: gd.polynomial(P, s, [0.8, 0.3, 0.1]),
        {"method": "coeff", "coeffs": [0.8, 0.3, 0.1]},
    ),
}


@pytest.mark.parametrize("name", GDC_FILTERS)
def test_pyg_gdc_heat_and_coefficients_properties(name):
    """test_gdc: no entry is negative, sym is symmetric, columns and rows keep their sums."""
    filtered, _ = GDC_FILTERS[name]
    total = 1.2 if name == "coeff" else 1.0
    for normalization in ("sym", "row", "col"):
        assert (through(filtered, normalization) > -1e-9).all()
    assert (through(filtered, "sym") - through(filtered, "sym").mT).abs().max() < 1e-9
    assert (through(filtered, "row").sum(1) - total).abs().max() < 1e-9
    assert (through(filtered, "col").sum(0) - total).abs().max() < 1e-9


@pytest.mark.parametrize("name", GDC_FILTERS)
@pytest.mark.parametrize("normalization", ["sym", "row", "col"])
def test_pyg_gdc_heat_and_coefficients_itself(name, normalization):
    transforms = pytest.importorskip("torch_geometric.transforms", reason="PyG is in [bench] only")
    filtered, arguments = GDC_FILTERS[name]
    A, transform = gdc_graph(), transforms.GDC()
    edges = A.nonzero().mT
    weights = A[edges[0], edges[1]].float()  # its sum of powers knows no other dtype
    edges, weights = transform.transition_matrix(edges, weights, 5, normalization)
    peer = transform.diffusion_matrix_exact(edges, weights, 5, **arguments)
    # Its column normalisation divides by in-degrees, which of this graph are the out-degrees.
    torch.testing.assert_close(through(filtered, normalization), peer.double(), rtol=0, atol=1e-5)


# --- DGL, docstrings in python/dgl/transforms/module.py (commit 4fd0a15) and
# tests/python/common/transforms/test_transform.py (commit 0092b2e). There is no wheel of DGL for this torch.


def dgl_graph(weights):
    """A[destination, source]: its five edges. Nothing is normalised."""
    A = torch.zeros(6, 6, dtype=torch.float64)
    A[[2, 3, 4, 5, 3], [0, 1, 2, 3, 4]] = torch.tensor(weights, dtype=torch.float64)
    return A


def with_a_sink(A):
    """A ≥ 0 with row sums ≤ 1 as a walk: what is missing of a row goes to one more node, and stays there."""
    n = len(A)
    P = torch.zeros(n + 1, n + 1, dtype=torch.float64)
    P[:n, :n], P[:n, n], P[n, n] = A, 1 - A.sum(1), 1
    return gd.DenseTransition(P)


def units_and_none(n):
    """Unit signals on the first n nodes, nothing on the sink."""
    return torch.eye(n + 1, n, dtype=torch.float64)


def kept(M, average_degree=2):
    """Its sparsification: the threshold is the (n · average degree)-th largest entry."""
    threshold = M.flatten().sort(descending=True).values[average_degree * len(M) - 1]
    return threshold - 1e-9 <= M


DGL_PRINTED = {
    "PPR": (
        lambda P, s: gd.solve(P, s, 0.85),
        [0.1500, 0.1500, 0.1500, 0.0255, 0.0163, 0.1500, 0.0638, 0.0383, 0.1500, 0.0510, 0.0217, 0.1500],
    ),
    "HeatKernel": (
        lambda P, s: gd.heat_kernel(P, s, 2.0),
        [0.1353, 0.1353, 0.1353, 0.0541, 0.0406, 0.1353, 0.1353, 0.0812, 0.1353, 0.1083, 0.0541, 0.1353],
    ),
    "GDC": (
        lambda P, s: gd.polynomial(P, s, [0.3, 0.2, 0.1]),
        [0.3000, 0.3000, 0.0200, 0.3000, 0.0400, 0.3000, 0.1000, 0.0600, 0.3000, 0.0800, 0.0200, 0.3000],
    ),
}


@pytest.mark.parametrize("name", DGL_PRINTED)
def test_dgl_documented_examples(name):
    """PPR(α = .15), HeatKernel(t = 2) and GDC([.3, .2, .1]), weights .1 to .5, as printed there."""
    filtered, printed = DGL_PRINTED[name]
    M = filtered(with_a_sink(dgl_graph([0.1, 0.2, 0.3, 0.4, 0.5])), units_and_none(6)).value[:6]
    assert M[kept(M)].tolist() == pytest.approx(printed, abs=5.1e-5)


def test_dgl_edges_of_unit_weights():
    """test_module_ppr: a row sums to 2. Scaled by v = (I − A)⁻¹1, A v = v − 1 ≤ v, it is that of a walk."""
    A = dgl_graph([1.0] * 5)
    v = torch.linalg.solve(torch.eye(6, dtype=torch.float64) - A, torch.ones(6, 1, dtype=torch.float64))
    assert (v >= 1).all()
    units = units_and_none(6)
    units[:6] /= v
    M = v * gd.diffuse(with_a_sink(A * v.mT / v), units, 0.85)[:6]
    edges = {(int(source), int(target)) for target, source in kept(M).nonzero()}
    assert edges == {
        *((0, 0), (0, 2), (0, 4), (1, 1), (1, 3), (1, 5), (2, 2), (2, 3), (2, 4)),
        *((3, 3), (3, 5), (4, 3), (4, 4), (4, 5), (5, 5)),
    }


def test_dgl_on_a_graph_that_it_does_not_normalise():
    """Karate with unit weights: its heat is ours at another time and scale, its PPR is no diffusion.

    exp(t(A − I)) = e^(t(c − 1)) exp(−tc(I − A/c)) for any c, and A/c with c the largest degree is a walk with
    a sink. But α(I − (1 − α)A)⁻¹ is no sum over walks where the spectral radius of (1 − α)A is above 1, here
    5.7: half of its entries are negative, and nothing that averages can reproduce them.
    """
    A = torch.from_numpy(nx.to_numpy_array(nx.karate_club_graph(), weight=None))
    c, t = float(A.sum(1).max()), 2.0
    sol = gd.heat_kernel(with_a_sink(A / c), units_and_none(34), t * c, tol=1e-15, on_failure="ignore")
    ours = torch.tensor(t * (c - 1), dtype=torch.float64).exp() * sol.value[:34]
    theirs = torch.linalg.matrix_exp(t * (A - torch.eye(34, dtype=torch.float64)))
    scale = float(torch.tensor(t * (c - 1)).double().exp() * sol.error_bound.max())
    assert (ours - theirs).abs().max() <= scale
    ppr = 0.15 * torch.linalg.inv(torch.eye(34, dtype=torch.float64) - 0.85 * A)
    assert float(0.85 * torch.linalg.eigvalsh(A).max()) == pytest.approx(5.7, abs=0.05)
    assert 0.4 < float((ppr < 0).double().mean()) < 0.6
