"""Clamped nodes against the dense oracle; the certificate, gradients, images, and what is refused."""

import importlib.util
import itertools
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import graphdiff as gd
from tests.graphdiff.zoo import OPERATORS, SOLVERS, applies

GSC = (
    Path(os.environ.get("GRAPHDIFF_DATA", Path(__file__).resolve().parents[3] / "shared" / "data")) / "gsc151"
)
# Walks that stay where they are with a chance so near to 1 that the rest is lost in the product.
STUCK = {"sharp attention", "hub attention", "scaled attention"}
# Walks that meet a clamped node after a few steps: plain walking takes many times as many.
QUICK = {"directed", "symmetric", "star", "sparse star", "sparse directed", "disconnected", "flat attention"}
# Graphs that fall apart need a clamped node in every part.
PARTS = {"disconnected", "sparse disconnected", "isolated node", "sparse directed"}
f64 = {"dtype": torch.float64}


def oracle(P, values, mask):
    """One dense system in float64: rows of clamped nodes say u = values, the others L u = 0."""
    P, clamped = P.double(), mask.unsqueeze(-1)
    L = torch.diag_embed(P.sum(-1)) - P
    A = torch.where(clamped, torch.eye(P.shape[-1], **f64), L)
    return torch.linalg.solve(A, torch.where(clamped, values.double(), 0.0))


@st.composite
def clamped(draw, names=tuple(OPERATORS), max_nodes=12):
    """An operator of the zoo, its leaf, values and a mask within reach of all."""
    name = draw(st.sampled_from(names))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    n = draw(st.integers(2, max_nodes))
    batch = draw(st.sampled_from([(), (2,)])) if OPERATORS[name].batched else ()
    leaf = OPERATORS[name].leaf(g, batch, n)
    mask = torch.rand(n, generator=g) < draw(st.sampled_from([0.1, 0.4]))
    mask[0] = mask[-1] = True
    if name in PARTS:
        mask[n // 2] = mask[-2] = True
    values = torch.randn(*batch, n, draw(st.integers(1, 3)), generator=g, **f64)
    return name, leaf, values * 10.0 ** draw(st.integers(-3, 3)), mask


def fits(solver, name, P):
    if solver in ("Walk", "BiCGSTAB") and name not in QUICK:
        return False
    return applies(SOLVERS[solver], P) and (name not in STUCK or solver in ("Direct", "Auto"))


# --- mathematics


@settings(max_examples=120)
@given(clamped(), st.sampled_from(list(SOLVERS)), st.sampled_from([torch.float64, torch.float32]))
def test_the_promise_and_the_enclosure(problem, solver, dtype):
    name, leaf, values, mask = problem
    P, values = OPERATORS[name].build(leaf.to(dtype)), values.to(dtype)
    assume(fits(solver, name, P))
    failing = "ignore" if name in STUCK else "warn"
    sol = gd.harmonic(P, values, mask, solver=SOLVERS[solver], on_failure=failing)
    exact = oracle(P.to(torch.float64).dense(), values, mask)
    size = torch.where(mask.unsqueeze(-1), values, 0.0).abs().amax(-2).double()
    tol = 1e-10 if dtype == torch.float64 else 1e-5
    slack = 1e-13 * size  # the oracle's own
    assert sol.converged.all() or name in STUCK
    assert sol.norm == "inf"
    assert sol.value.dtype == dtype
    assert ((sol.value.double() - exact).abs().amax(-2) <= sol.error_bound + slack).all()
    assert torch.equal(sol.converged, sol.error_bound <= tol * size)
    assert (sol.lower.double() <= exact + slack.unsqueeze(-2)).all()
    assert (exact <= sol.upper.double() + slack.unsqueeze(-2)).all()
    assert torch.equal(sol.value[..., mask, :], values[..., mask, :])
    # The maximum principle holds for the bounds to the bit.
    inside = values[..., mask, :]
    assert (sol.lower >= inside.amin(-2, keepdim=True)).all()
    assert (sol.upper <= inside.amax(-2, keepdim=True)).all()


@settings(max_examples=25)
@given(clamped(tuple(name for name in OPERATORS if name not in STUCK)))
def test_harmonic_functions_are_linear_keep_constants_and_obey_the_maximum_principle(problem):
    name, leaf, values, mask = problem
    P = OPERATORS[name].build(leaf)
    u, ones = gd.harmonic(P, values, mask).value, torch.ones_like(values)
    size = values[..., mask, :].abs().amax()
    torch.testing.assert_close(gd.harmonic(P, 3 * ones, mask).value, 3 * ones, rtol=0, atol=3e-10)
    shifted = gd.harmonic(P, 2 * values + size * ones, mask).value
    torch.testing.assert_close(shifted, 2 * u + size * ones, rtol=0, atol=1e-9 * float(size))
    # Averaged over the walk it is itself.
    free = ~mask
    torch.testing.assert_close((P @ u)[..., free, :], u[..., free, :], rtol=0, atol=1e-9 * float(size))


def test_gamblers_ruin():
    """Up with probability p, down else: from i one wins with (1 − q^i)/(1 − q^N), q = (1 − p)/p."""
    n, p = 30, 0.6
    i = torch.arange(1, n)
    edges = torch.cat([torch.stack([i, i + 1]), torch.stack([i, i - 1])], 1)
    weight = torch.cat([torch.full((n - 1,), p, **f64), torch.full((n - 1,), 1 - p, **f64)])
    P = gd.SparseTransition.from_edge_index(edges, weight, n + 1)
    ends = torch.zeros(n + 1, dtype=torch.bool)
    ends[[0, n]] = True
    q = (1 - p) / p
    exact = (1 - q ** torch.arange(n + 1, **f64)) / (1 - q**n)
    for solver in (None, gd.solvers.Direct(), gd.solvers.BiCGSTAB()):
        sol = gd.harmonic(P, torch.arange(n + 1, **f64) / n, ends, solver=solver)
        assert (sol.value - exact).abs().max() <= 1e-10


@pytest.mark.parametrize("bridge", [1e-6, 1e-8, 1e-10])
def test_certified_where_walks_take_very_long(bridge):
    """A clique behind a weak edge: some 1/bridge steps to a clamped node, and the exact answer is known."""
    n = 20
    W = torch.zeros(n + 2, n + 2, **f64)
    W[:n, :n] = 1 - torch.eye(n, **f64)
    W[0, n] = W[n, 0] = bridge
    W[1, n + 1] = W[n + 1, 1] = 3 * bridge
    mask = torch.arange(n + 2) >= n
    P = gd.SparseTransition.from_torch(W.to_sparse())
    values = torch.zeros(n + 2, **f64)
    values[-1] = 1
    sol = gd.harmonic(P, values, mask)
    # Resistances in series: the clique is n/2 between two nodes against 1/bridge.
    resistance = 1 / bridge + 2 / n + 1 / (3 * bridge)
    exact = (1 / bridge) / resistance
    assert sol.converged
    assert abs(sol.value[0] - exact) <= sol.error_bound
    assert "steps to a clamped node" in sol.reason


def test_a_weight_of_its_own_for_rounding():
    """Some 1e10 steps out of an island, and differences of neighbours, which are rounded, only elsewhere."""
    chain, island = torch.arange(30), torch.arange(30, 36)
    edges = torch.cat(
        [torch.stack([chain[:-1], chain[1:]]), torch.combinations(island).T, torch.tensor([[0], [30]])], 1
    )
    weight = torch.ones(edges.shape[1], **f64)
    weight[-1] = 1e-9
    P = gd.SparseTransition.from_edge_index(edges, weight, undirected=True)
    mask = torch.zeros(36, dtype=torch.bool)
    mask[[0, 29]] = True
    values = torch.linspace(0, 1, 36, **f64)
    for solver in (gd.solvers.Direct(), gd.solvers.CG()):
        sol = gd.harmonic(P, values, mask, solver=solver, tol=2e-8)
        exact = torch.cat([chain.double() / 29 * values[29], torch.zeros(6, **f64)])
        assert sol.converged
        assert (sol.value - exact).abs().max() <= sol.error_bound


@pytest.mark.parametrize("name", ["CG", "Direct"])
def test_heavy_self_loops_cost_nothing(name):
    """With the chance to stay taken out the numbers of steps are those of the walk without self-loops."""
    g = torch.Generator().manual_seed(5)
    W = torch.rand(60, 60, generator=g, **f64) * (torch.rand(60, 60, generator=g) < 0.1)
    W = W + W.T + torch.diag(torch.ones(59, **f64), 1) + torch.diag(torch.ones(59, **f64), -1)
    W.fill_diagonal_(0)
    lazy = W + torch.diag(10.0 ** (9 * torch.rand(60, generator=g, **f64)))
    mask, values = torch.arange(60) % 20 == 0, torch.randn(60, 2, generator=g, **f64)
    for build in (gd.DenseTransition.from_affinity, lambda A: gd.SparseTransition.from_torch(A.to_sparse())):
        plain, slow = (gd.harmonic(build(A), values, mask, solver=SOLVERS[name], tol=1e-9) for A in (W, lazy))
        assert (slow.value - plain.value).abs().max() < 2e-9 * values.abs().max()
        assert (slow.steps <= plain.steps + 3).all()
        assert slow.converged.all()


def test_the_first_guess_saves_steps_and_no_trust():
    P = gd.grid_transition(torch.zeros(1, 30, 30, **f64))
    mask, values = torch.zeros(900, dtype=torch.bool), torch.randn(900, **f64)
    mask[::97] = True
    cold = gd.harmonic(P, values, mask, solver=gd.solvers.CG())
    warm = gd.harmonic(P, values, mask, solver=gd.solvers.CG(), initial=cold.value)
    assert warm.converged
    assert warm.steps < cold.steps
    wrong = gd.harmonic(P, values, mask, solver=gd.solvers.CG(), initial=1e3 * torch.randn(900, **f64))
    assert (wrong.value - cold.value).abs().max() <= 2e-10 * values[mask].abs().max()


@pytest.mark.parametrize("solver", [gd.solvers.Walk(), gd.solvers.CG(), gd.solvers.BiCGSTAB()])
def test_stopped_early_it_says_so_and_the_bound_holds(solver):
    P = gd.grid_transition(torch.zeros(1, 20, 20, **f64))
    mask, values = torch.zeros(400, dtype=torch.bool), torch.arange(400, **f64)
    mask[[0, 399]] = True
    exact = oracle(P.dense(), values.unsqueeze(-1), mask).squeeze(-1)
    with pytest.warns(gd.ConvergenceWarning, match=r"graphdiff.harmonic.*max_steps = 3.*raise max_steps"):
        sol = gd.harmonic(P, values, mask, solver=solver, max_steps=3)
    assert not sol.converged
    assert (sol.value - exact).abs().max() <= sol.error_bound <= 399
    assert ((sol.lower <= exact) & (exact <= sol.upper)).all()
    with pytest.raises(gd.ConvergenceError):
        gd.harmonic(P, values, mask, solver=solver, max_steps=3, on_failure="raise")


def test_what_rounding_forbids_is_not_promised():
    """Walks of 1e11 and of 1e17 steps. However bad the answer is, it lies between the clamped values."""
    edges = torch.tensor([[0, 1, 1, 2], [1, 2, 3, 3]])
    values = torch.tensor([2.0, 0, 0, 5.0], **f64)
    mask = torch.tensor([True, False, False, True])
    for weak, by_edges in ((1e-11, True), (1e-17, False)):
        weight = torch.tensor([weak, 1.0, weak, weak], **f64)
        W = gd.SparseTransition.from_edge_index(edges, weight, undirected=True)
        blind = gd.FunctionTransition(lambda y, P: P @ y, 4, tensors=[W.dense()])
        with pytest.warns(gd.ConvergenceWarning, match=r"graphdiff.harmonic.*loosen tol"):
            sol = gd.harmonic(blind, values, mask)
        assert not sol.converged
        assert sol.error_bound <= 3
        assert (sol.lower >= 2).all()
        assert (sol.upper <= 5).all()
        # Where the entries are at hand only differences are rounded, and much more is certain.
        assert gd.harmonic(W, values, mask, tol=1e-6, on_failure="ignore").converged == by_edges


def test_batches_and_columns_do_not_change_a_bit():
    g = torch.Generator().manual_seed(9)
    P = gd.grid_transition(torch.rand(1, 12, 12, generator=g, **f64), beta=5.0)
    values = torch.randn(2, 144, 3, generator=g, **f64)
    masks = torch.rand(2, 144, generator=g) < 0.1
    for solver in (gd.solvers.CG(), gd.solvers.Direct()):
        both = gd.harmonic(P, values, masks[0], solver=solver)
        for b, k in itertools.product(range(2), range(3)):
            alone = gd.harmonic(P, values[b, :, k], masks[0], solver=solver)
            assert torch.equal(both.value[b, :, k], alone.value)
            assert both.steps[b, k] == alone.steps
    many = gd.harmonic(P, values[0], masks, solver=gd.solvers.CG())
    for b in range(2):
        alone = gd.harmonic(P, values[0], masks[b], solver=gd.solvers.CG())
        assert torch.equal(many.value[b], alone.value)
        assert torch.equal(many.steps[b], alone.steps)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_promised_before_its_last_cast(dtype):
    W = torch.rand(8, 8, generator=torch.Generator().manual_seed(4))
    P = gd.DenseTransition.from_affinity(W).to(dtype)
    values, mask = torch.linspace(-1, 2, 8).to(dtype), torch.arange(8) % 3 == 0
    sol = gd.harmonic(P, values, mask)
    exact = oracle(P.P, values.unsqueeze(-1), mask).squeeze(-1)
    assert sol.converged
    assert sol.value.dtype == dtype
    assert ((sol.lower <= exact + 1e-12) & (exact <= sol.upper + 1e-12)).all()
    assert (sol.value.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps


def test_all_clamped_none_wrong():
    P = gd.DenseTransition.from_affinity(torch.ones(3, 3, **f64))
    sol = gd.harmonic(P, torch.arange(3, **f64), torch.ones(3, dtype=torch.bool))
    assert sol.value.tolist() == [0, 1, 2]
    assert sol.error_bound == 0
    zero = gd.harmonic(P, torch.zeros(3, **f64), torch.arange(3) == 1)
    assert zero.converged
    assert not zero.value.any()


# --- gradients


@pytest.mark.parametrize("name", [n for n in OPERATORS if n not in STUCK | {"isolated node"}])
def test_gradients_of_first_and_second_order(name):
    g = torch.Generator().manual_seed(17)
    n = 5
    leaf, values = OPERATORS[name].leaf(g, (), n), torch.randn(n, 2, generator=g, **f64)
    mask = torch.tensor([True, False, name in PARTS, name in PARTS, True])
    edges = (leaf != 0).double()  # a weight of 0 is no edge

    def function(leaf, values):
        symmetric = OPERATORS[name].reversible and leaf.shape[-1] == leaf.shape[-2]
        leaf = (leaf + leaf.mT) / 2 if symmetric else leaf
        return gd.harmonic(
            OPERATORS[name].build(leaf * edges), values, mask, tol=1e-13, on_failure="ignore"
        ).value

    inputs = [x.requires_grad_() for x in (leaf, values)]
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True, atol=1e-4)


@settings(max_examples=40)
@given(clamped(tuple(name for name in OPERATORS if name not in STUCK)), st.sampled_from(list(SOLVERS)))
def test_gradients_against_autograd_through_the_dense_system(problem, solver):
    name, leaf, values, mask = problem
    leaf, values = leaf.clone().requires_grad_(), values.clone().requires_grad_()
    P = OPERATORS[name].build(leaf)
    assume(fits(solver, name, P))
    g = torch.randn(values.shape, generator=torch.Generator().manual_seed(19), **f64)
    u = gd.harmonic(P, values, mask, solver=SOLVERS[solver]).value
    exact = oracle(OPERATORS[name].dense(leaf), values, mask)
    (got_leaf, got), (exact_leaf, expected) = (
        torch.autograd.grad(out, (leaf, values), g) for out in (u, exact)
    )
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-8)
    assert not got[..., ~mask, :].any()  # only clamped values matter
    size = float(values.detach().abs().max() * exact_leaf.abs().max().clamp(min=1e-3))
    torch.testing.assert_close(got_leaf, exact_leaf, rtol=1e-6, atol=1e-7 * size)


def test_the_gradient_of_values_keeps_its_promise_where_walks_are_long():
    image = torch.zeros(1, 40, 40, **f64)
    image[:, :, 20:] = 1.0
    P = gd.grid_transition(image, beta=14.0)
    mask = torch.zeros(1600, dtype=torch.bool)
    mask[[0, 1, 39]] = True
    g = torch.randn(1600, generator=torch.Generator().manual_seed(1), **f64)
    values = torch.randn(1600, **f64)
    expected = torch.autograd.functional.vjp(
        lambda v: oracle(P.dense(), v.unsqueeze(-1), mask).squeeze(-1), values, g
    )[1]
    for solver in (gd.solvers.Direct(), gd.solvers.CG()):
        v = values.clone().requires_grad_()
        (got,) = torch.autograd.grad(gd.harmonic(P, v, mask, solver=solver, tol=1e-9).value, v, g)
        assert (got - expected).abs().sum() <= 1e-9 * g.abs().sum()


# --- multigrid


@pytest.mark.skipif(
    importlib.util.find_spec("pyamg") is None, reason="pyamg, the extra [multigrid], is absent"
)
def test_multigrid_steps_hardly_grow_with_the_grid():
    steps = []
    for side in (20, 80):
        P = gd.grid_transition(torch.zeros(1, side, side, **f64))
        s = torch.zeros(side * side, **f64)
        s[0] = 1
        sol = gd.solve(P, s, 1 - 1e-6, solver=gd.solvers.Multigrid(), tol=1e-8)
        exact = gd.solve(P, s, 1 - 1e-6, solver=gd.solvers.Direct(), tol=1e-8)
        assert sol.converged
        assert (sol.value - exact.value).abs().max() <= 2e-8
        turned = gd.solve(P.T, s, 1 - 1e-6, solver=gd.solvers.Multigrid(), tol=1e-8)
        assert turned.converged
        assert (
            turned.value - gd.diffuse(P.T, s, 1 - 1e-6, solver=gd.solvers.Direct(), tol=1e-8)
        ).abs().sum() < 2e-8
        steps.append(int(sol.steps))
    assert steps[1] <= 1.5 * steps[0] + 5


@pytest.mark.skipif(
    importlib.util.find_spec("pyamg") is None, reason="pyamg, the extra [multigrid], is absent"
)
def test_multigrid_one_cycle_for_each_mu_and_nodes_that_stay():
    P = gd.grid_transition(torch.rand(1, 9, 9, generator=torch.Generator().manual_seed(2), **f64), beta=9.0)
    s = torch.randn(2, 81, 2, generator=torch.Generator().manual_seed(3), **f64)
    node = (
        torch.rand(81, 1, generator=torch.Generator().manual_seed(4), **f64)
        * (torch.arange(81) % 3 > 0)[:, None]
    )
    for mu in (torch.tensor([[0.5, 0.999]], **f64), torch.tensor([[[0.9]], [[0.99]]], **f64), node):
        for walk in (P, P.T):
            sol = gd.solve(walk, s, mu, solver=gd.solvers.Multigrid())
            exact = gd.diffuse(walk, s, mu, solver=gd.solvers.Direct())
            torch.testing.assert_close(sol.value, exact, rtol=0, atol=1e-8)
            # So small a matrix is factorised whole: a cycle of the right one solves at once.
            assert (sol.steps <= 3).all()


def test_multigrid_refuses_and_names_what_does(monkeypatch):
    dense = gd.DenseTransition.from_affinity(torch.ones(3, 3, **f64))
    with pytest.raises(ValueError, match=r"Multigrid needs a sparse walk on the CPU, got Dense.* use CG\(\)"):
        gd.diffuse(dense, torch.ones(3, **f64), 0.5, solver=gd.solvers.Multigrid())
    directed = gd.SparseTransition.from_edge_index(torch.tensor([[0, 1, 2], [1, 2, 0]]), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"Multigrid needs a walk known to be reversible"):
        gd.diffuse(directed, torch.ones(3, **f64), 0.5, solver=gd.solvers.Multigrid())
    monkeypatch.setitem(sys.modules, "pyamg", None)
    path = gd.SparseTransition.from_edge_index(torch.tensor([[0], [1]]), undirected=True)
    with pytest.raises(ImportError, match="pip install pyamg"):
        gd.diffuse(path, torch.ones(2), 0.5, solver=gd.solvers.Multigrid())


# --- images

CASES = {
    "grey": ((9, 11), {}),
    "volume": ((4, 5, 6), {}),
    "colour": ((8, 9, 3), {"channel_axis": -1}),
    "spacing": ((6, 7), {"spacing": (1.0, 2.5)}),
    "volume of colours": ((3, 4, 5, 6), {"channel_axis": 0, "spacing": (0.5, 1.0, 2.0)}),
}


def picture(case):
    shape, options = CASES[case]
    rng = np.random.default_rng(7)
    image = rng.random(shape)
    sides = np.delete(shape, options["channel_axis"]) if "channel_axis" in options else shape
    seeds = np.zeros(sides, dtype=np.int64)
    seeds.flat[[0, 13, 29]] = 2
    seeds.flat[[-1, 20]] = 5
    seeds.flat[22] = 9
    seeds.flat[[9, 31]] = -1
    return image, seeds, options


@pytest.mark.parametrize("beta", [10.0, 130.0])
@pytest.mark.parametrize("case", CASES)
def test_random_walker_equals_scikit_image(case, beta):
    segmentation = pytest.importorskip(
        "skimage.segmentation", reason="scikit-image, extra [bench], is absent"
    )
    image, seeds, options = picture(case)
    full = segmentation.random_walker(image, seeds, beta, mode="bf", return_full_prob=True, **options)
    found = gd.random_walker(image, seeds, beta, tol=1e-9, **options)
    assert found.solution.converged.all()
    assert np.abs(full - found.probability.numpy()).max() < 1e-8
    numbers = segmentation.random_walker(image, seeds, beta, mode="bf", **options)
    ours = found.labels.numpy()
    assert (np.where(ours > 0, np.searchsorted(found.names.numpy(), ours) + 1, ours) == numbers).all()


@pytest.mark.parametrize("case", CASES)
def test_random_walker_equals_the_definition(case):
    """The weights written out pixel by pixel."""
    image, seeds, options = picture(case)
    pixels = np.moveaxis(image, options["channel_axis"], 0) if "channel_axis" in options else image[None]
    h = options.get("spacing", (1.0,) * seeds.ndim)
    W = np.zeros((seeds.size, seeds.size))
    for a in np.ndindex(*seeds.shape):
        for axis in range(seeds.ndim):
            b = tuple(x + (i == axis) for i, x in enumerate(a))
            if b[axis] < seeds.shape[axis] and seeds[a] >= 0 and seeds[b] >= 0:
                unlike = sum((c[a] - c[b]) ** 2 for c in pixels)
                w = math.exp(-130 * unlike / (10 * image.std() * len(pixels) ** 0.5 * h[axis] ** 2)) + 1e-10
                i, j = np.ravel_multi_index(a, seeds.shape), np.ravel_multi_index(b, seeds.shape)
                W[i, j] = W[j, i] = w
    out = seeds.ravel() < 0
    W[out, out] = 1
    names = np.array([2, 5, 9])
    values = torch.from_numpy((seeds.reshape(-1, 1) == names).astype(float))
    exact = oracle(
        torch.from_numpy(W / W.sum(1, keepdims=True)), values, torch.from_numpy(seeds.ravel() != 0)
    )
    found = gd.random_walker(image, seeds, tol=1e-9, **options)
    probability = found.probability.reshape(3, -1).T
    assert (probability - exact).abs().max() < 1e-8
    assert (found.names.numpy() == names).all()
    # Probabilities: they sum to 1 where a pixel was not left out.
    assert (probability.sum(1) - torch.from_numpy(~out).double()).abs().max() < 1e-8
    labels = found.labels.flatten()
    assert (labels[out] == -1).all()
    assert torch.equal(labels[~out], torch.from_numpy(names)[exact.argmax(1)][~out])
    assert found.labels.shape == seeds.shape


@pytest.mark.parametrize("connectivity", [6, 26])
def test_volumes_are_grids_too(connectivity):
    sides = (3, 2, 4)
    image = torch.rand(2, *sides, generator=torch.Generator().manual_seed(6), **f64)
    place = torch.tensor(list(np.ndindex(*sides)))
    apart = (place.unsqueeze(1) - place).abs()
    near = apart.sum(-1) == 1 if connectivity == 6 else apart.amax(-1) == 1
    pixels = image.flatten(1)
    W = torch.exp(-3.0 * (pixels.unsqueeze(-1) - pixels.unsqueeze(1)).square().sum(0)) * near
    P = gd.grid_transition(image, 3.0, connectivity)
    torch.testing.assert_close(P.dense(), W / W.sum(-1, keepdim=True))
    torch.testing.assert_close(P.log_degree, W.sum(-1).log())
    if connectivity == 6:
        assert torch.equal(P.dense(), gd.grid_transition(image, 3.0).dense())
    with pytest.raises(ValueError, match="connectivity: expected 6 or 26, got 4"):
        gd.grid_transition(image, connectivity=4)


def test_random_walker_of_a_tensor_is_differentiable():
    image, seeds, _ = picture("grey")
    seeds = torch.from_numpy(seeds)

    def probability(pixels):
        return gd.random_walker(pixels, seeds, 20.0, tol=1e-12, on_failure="ignore").probability

    pixels = torch.from_numpy(image).requires_grad_()
    assert gradcheck(probability, (pixels,), fast_mode=True)
    assert gradgradcheck(probability, (pixels,), fast_mode=True, atol=1e-4)
    # Brighter by the same factor is the same up to the scale of β, and an offset changes nothing.
    torch.testing.assert_close(probability(pixels + 3.0), probability(pixels), rtol=0, atol=1e-9)


def test_images_of_other_types():
    image, seeds, _ = picture("grey")
    eight = (255 * image).astype(np.uint8)
    exact = gd.random_walker(eight / 255, seeds).probability
    for same in (eight, torch.from_numpy(eight), eight.astype(np.float32) / 255):
        torch.testing.assert_close(gd.random_walker(same, seeds).probability, exact, rtol=0, atol=1e-5)
    flat = gd.random_walker(np.ones((1, 4)), [[1, 0, 0, 2]])
    torch.testing.assert_close(flat.probability[1], torch.arange(4, **f64)[None] / 3)
    black = torch.zeros(1, 4, requires_grad=True)
    gd.random_walker(black, torch.tensor([[1, 0, 0, 2]])).probability[0, 0, 1].backward()
    assert black.grad.isfinite().all()


@pytest.mark.skipif(not GSC.is_dir(), reason=f"no images in {GSC}")
def test_an_image_of_gsc151():
    """One photograph, reduced to a third; benchmarks/random_walker.py takes them all, as they are."""
    from PIL import Image

    name = (GSC / "list.txt").read_text().split()[0]
    image = np.asarray(Image.open(GSC / "images" / f"{name}.jpg"))[::3, ::3]
    seeds = np.asarray(Image.open(GSC / "seeds" / f"{name}.png")).astype(int)[::3, ::3]
    mask = np.asarray(Image.open(GSC / "masks" / f"{name}.png"))[::3, ::3]
    found = gd.random_walker(image, seeds, channel_axis=-1)
    assert found.solution.converged.all()
    direct, cg = (
        gd.random_walker(image, seeds, channel_axis=-1, solver=solver, tol=1e-8).probability
        for solver in (gd.solvers.Direct(), gd.solvers.CG())
    )
    assert (direct - cg).abs().max() <= 2e-8
    assert (direct - found.probability).abs().max() <= 1.1e-6
    known, object_ = mask != 255, found.labels.numpy() == 2
    iou = (known & object_ & (mask == 1)).sum() / (known & (object_ | (mask == 1))).sum()
    assert iou > 0.7


# --- input

P3 = gd.DenseTransition.from_affinity(torch.ones(3, 3, **f64))
V3, M3 = torch.ones(3, **f64), torch.tensor([True, False, False])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((torch.ones(3, 3), V3, M3), {}, TypeError, r"P: expected a Transition, got Tensor"),
        ((P3.T, V3, M3), {}, ValueError, r"P: expected a walk, whose rows sum to 1, got Transposed"),
        ((P3, V3.float(), M3), {}, TypeError, r"values: expected dtype torch.float64 like P"),
        ((P3, torch.ones(4, **f64), M3), {}, ValueError, r"values: expected shape .* N = 3 nodes"),
        ((P3, torch.tensor([torch.inf, 1, 1], **f64), M3), {}, ValueError, r"at clamped nodes: .* finite"),
        ((P3, V3, M3.double()), {}, TypeError, r"mask: expected a bool tensor, got .*; compare it"),
        ((P3, V3, [True, False, False]), {}, TypeError, r"mask: expected a torch.Tensor, got list"),
        ((P3, V3, M3[:2]), {}, ValueError, r"mask: expected shape \[\.\.\., N\] with N = 3 nodes, got \[2\]"),
        ((P3, V3, M3 & ~M3), {}, ValueError, r"mask: .* got 3 of 3 nodes \(0, 1, 2\) from which none is"),
        ((P3, V3, M3), {"tol": 0}, ValueError, r"tol: expected a finite number > 0"),
        ((P3, V3, M3), {"max_steps": 0}, ValueError, r"max_steps: expected an integer ≥ 1"),
        ((P3, V3, M3), {"solver": "CG"}, TypeError, r"solver: expected a solver"),
        ((P3, V3, M3), {"on_failure": "log"}, ValueError, r"on_failure: expected"),
        ((P3, V3, M3), {"initial": torch.ones(4, **f64)}, ValueError, r"initial: expected shape"),
    ],
)  # fmt: skip
def test_bad_input(arguments, options, error, message):
    with pytest.raises(error, match=message) as caught:
        gd.harmonic(*arguments, **options)
    assert caught.type is error


def test_only_clamped_values_are_read():
    values = torch.tensor([2.0, torch.nan, torch.inf], **f64)
    assert gd.harmonic(P3, values, M3).value.tolist() == pytest.approx([2.0, 2.0, 2.0])


def test_nodes_out_of_reach_are_named():
    """Direction counts: 0 → 1 → 2, and 3 ↔ 4 alone."""
    edges = torch.tensor([[0, 1, 3, 4], [1, 2, 4, 3]])
    P = gd.SparseTransition.from_edge_index(edges, dtype=torch.float64)
    for walk in (P, gd.DenseTransition(P.dense())):
        with pytest.raises(ValueError, match=r"got 4 of 5 nodes \(1, 2, 3, 4\) from which none is"):
            gd.harmonic(walk, torch.ones(5, **f64), torch.arange(5) == 0)
        with pytest.raises(ValueError, match=r"got 2 of 5 nodes \(3, 4\) from which none is"):
            gd.harmonic(walk, torch.ones(5, **f64), torch.arange(5) == 2)
    many = torch.arange(3000)
    P = gd.SparseTransition.from_edge_index(torch.stack([many, many]), dtype=torch.float64)
    with pytest.raises(ValueError, match=r"got 2999 of 3000 nodes \(1, 2, 3, 4, 5, …\)"):
        gd.harmonic(P, torch.ones(3000, **f64), many == 0)
    masks = torch.stack([many < 3000, many > 0])
    with pytest.raises(ValueError, match=r"got 1 of 6000 nodes \(\(1, 0\)\)"):
        gd.harmonic(P, torch.ones(3000, **f64), masks)


IMAGE = np.arange(12.0).reshape(3, 4)
SEEDS = np.array([[1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 2]])
CUT_OFF = np.array([[1, -1, 0, 0], [0, -1, -1, -1], [0, 0, 0, 2]])


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((IMAGE, 0 * SEEDS), {}, ValueError, r"seeds: expected pixels of at least two labels > 0, got \[\]"),
        ((IMAGE, SEEDS.clip(0, 1)), {}, ValueError, r"seeds: .* at least two labels > 0, got \[1\]"),
        ((IMAGE, SEEDS.T), {}, ValueError, r"seeds: expected shape \[3, 4\], that of the image"),
        ((IMAGE, SEEDS.astype(float)), {}, TypeError, r"seeds: expected integers, got torch.float64"),
        ((IMAGE, CUT_OFF), {}, ValueError, r"seeds: .* 2 of 12 pixels \(\(0, 2\), \(0, 3\)\) that"),
        ((IMAGE.astype(int), SEEDS), {}, TypeError, r"image: expected floating-point numbers, uint8, uint16"),
        ((IMAGE.ravel(), SEEDS), {}, ValueError, r"image: expected shape \[H, W\] or \[D, H, W\]"),
        ((IMAGE * np.nan, SEEDS), {}, ValueError, r"image: expected finite values"),
        ((IMAGE, SEEDS), {"channel_axis": 2}, ValueError, r"channel_axis: expected an axis of .* got 2"),
        ((IMAGE, SEEDS), {"spacing": (1.0,)}, ValueError, r"spacing: expected 2 numbers"),
        ((IMAGE, SEEDS), {"spacing": (1.0, 0.0)}, ValueError, r"spacing: expected a finite number > 0"),
        ((IMAGE, SEEDS), {"beta": -1.0}, ValueError, r"beta: expected a finite number ≥ 0"),
        ((IMAGE, SEEDS), {"on_failure": "stop"}, ValueError, r"on_failure: expected .* got 'stop'"),
    ],
)  # fmt: skip
def test_bad_images_and_seeds(arguments, options, error, message):
    with pytest.raises(error, match=message) as caught:
        gd.random_walker(*arguments, **options)
    assert caught.type is error


def test_it_says_what_it_found():
    assert repr(gd.random_walker(IMAGE, SEEDS)).startswith("RandomWalk([3, 4], labels [1, 2], Solution(")
