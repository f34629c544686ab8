"""Graphs of different sizes in one batch: what stands at padded nodes, garbage or nan, changes nothing."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import graphdiff as gd
from graphdiff.nn.diffusion import _diffuse_attention
from tests.graphdiff.zoo import OPERATORS, SOLVERS, applies, oracle

DENSE = ("directed", "symmetric", "path", "star", "disconnected")
ATTENTION = ("flat attention", "scaled attention", "sharp attention", "hub attention")
GARBAGE = (0.0, 1e6, float("nan"), float("inf"))


def randn(*shape, seed=3, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def build(name, leaf, mask=None):
    if name in DENSE:
        return gd.DenseTransition.from_affinity(leaf, mask)
    return gd.AttentionTransition(leaf, scale=OPERATORS[name].build(leaf[..., :1, :]).scale, mask=mask)


class Padded:
    """Two graphs of the zoo of different sizes, alone and in one padded batch, nodes anywhere in it."""

    def __init__(self, name, sizes, garbage, seed=3, dtype=torch.float64):
        g = torch.Generator().manual_seed(seed)
        self.name, width = name, max(sizes) + 2
        self.leaves = [OPERATORS[name].leaf(g, (), n).to(dtype) for n in sizes]
        self.signals = [torch.randn(n, 2, generator=g, dtype=torch.float64).to(dtype) for n in sizes]
        self.places = [torch.randperm(width, generator=g)[:n].sort().values for n in sizes]
        self.mask = torch.stack([torch.isin(torch.arange(width), place) for place in self.places])
        shape = (width, width) if name in DENSE else (width, 3)
        self.leaf = torch.full((len(sizes), *shape), garbage, dtype=dtype)
        self.s = torch.full((len(sizes), width, 2), garbage, dtype=dtype)
        for i, place in enumerate(self.places):
            at = (place[:, None], place) if name in DENSE else (place,)
            self.leaf[(i, *at)] = self.leaves[i]
            self.s[i, place] = self.signals[i]

    @property
    def P(self):
        return build(self.name, self.leaf, self.mask)

    def alone(self):
        """(index in the batch, places of the nodes, the walk alone, its signal)."""
        for i, (place, leaf, s) in enumerate(zip(self.places, self.leaves, self.signals, strict=True)):
            yield i, place, build(self.name, leaf), s


def padded(name, garbage=float("nan"), sizes=(7, 4), **options):
    return Padded(name, sizes, garbage, **options)


names = pytest.mark.parametrize("name", DENSE + ATTENTION)


# --- the operators


@names
@settings(max_examples=12)
@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    garbage=st.sampled_from(GARBAGE),
    seed=st.integers(0, 999),
)
def test_a_padded_walk_is_the_walk_and_nodes_that_stay(name, sizes, garbage, seed):
    case = Padded(name, sizes, garbage, seed)
    P, width = case.P, case.mask.shape[1]
    y = randn(2, width, 3, seed=seed)
    assert P.T.mask is case.mask
    eye = torch.eye(width).double()
    D = P.dense()
    torch.testing.assert_close(D.sum(-1), torch.ones(2, width).double())
    for i, place, Q, _ in case.alone():
        away = (~case.mask[i]).nonzero().squeeze(-1)
        torch.testing.assert_close(D[i][place][:, place], Q.dense(), rtol=1e-12, atol=1e-14)
        assert D[i][away].equal(eye[away])
        assert (D[i][place][:, away] == 0).all()
        for walk, alone in ((P, Q), (P.T, Q.T)):
            product = (walk @ y)[i]
            torch.testing.assert_close(product[place], alone @ y[i, place], rtol=1e-11, atol=1e-11)
            assert product[away].equal(y[i, away])
            torch.testing.assert_close(walk.rows([1, 0])[i], walk.dense()[i, [1, 0]])
        assert Q.reversible or not P.reversible
        if P.reversible:
            degree = P.log_degree[i]
            torch.testing.assert_close(degree[place], Q.log_degree, rtol=1e-12, atol=1e-12)
            # Nothing that a weight by degrees could hide the others behind.
            assert (degree[away] <= Q.log_degree.max() + 1e-9).all()
            flow = (degree - degree.max()).exp().unsqueeze(-1) * D[i]
            torch.testing.assert_close(flow, flow.T, rtol=1e-9, atol=1e-12)
    if P.positive_semidefinite:
        assert torch.linalg.eigvals(D).real.min() > -1e-9


@names
def test_a_signal_with_garbage_at_padded_nodes_keeps_it_there(name):
    case = padded(name)
    for walk in (case.P, case.P.T):
        product = walk @ case.s
        assert product[~case.mask].isnan().all()
        assert product[case.mask].isfinite().all()
    P = case.P.with_tensors([x.requires_grad_() for x in case.P.tensors()])
    product, gradients = P.vjp(case.s, case.s)
    assert product[case.mask].isfinite().all()
    assert gradients[0].isfinite().all()


def test_to_and_rebuilding_keep_the_mask():
    case = padded("flat attention")
    P = case.P.T.to(torch.float32)
    assert P.mask is not None
    assert P.T.psi.isfinite().all()
    assert P.T.with_tensors(P.tensors()).mask.equal(case.mask)
    assert gd.DenseTransition(case.P.dense(), mask=case.mask).mask is case.mask


def test_a_graph_without_nodes_and_a_mask_without_padding():
    psi, mask = randn(3, 5, 2), torch.tensor([[True] * 5, [False] * 5, [True] * 5])
    P = gd.AttentionTransition(psi, mask=mask)
    assert P.dense()[1].equal(torch.eye(5).double())
    y = gd.diffuse(P, randn(3, 5, 2), 0.9)
    assert (y[1] == 0).all()
    torch.testing.assert_close(y[2], gd.diffuse(gd.AttentionTransition(psi[2]), randn(3, 5, 2)[2], 0.9))
    full = gd.DenseTransition.from_affinity(randn(5, 5).abs(), torch.ones(5, dtype=torch.bool))
    assert full.dense().equal(gd.DenseTransition.from_affinity(randn(5, 5).abs()).dense())


# --- solves


@names
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("transposed", [False, True])
def test_solves_are_those_of_each_graph_alone(name, solver, transposed):
    """The promise is relative to the real nodes, garbage of 1e6 beside signals of 1 or not."""
    for garbage, dtype in ((float("nan"), torch.float64), (1e6, torch.float32)):
        case = padded(name, garbage, dtype=dtype)
        if not applies(solver, case.P):
            return
        sol = gd.solve(
            case.P.T if transposed else case.P,
            case.s,
            0.9,
            solver=solver,
            initial=case.s + 1,
        )
        for i, place, _, s in case.alone():
            # Its entries as they were rounded in the batch.
            D = case.P.to(torch.float64).dense()[i][place][:, place]
            exact = oracle(D.mT if transposed else D, s, 0.9)
            tol = 1e-10 if dtype == torch.float64 else 1e-5
            error, size = sol.value[i, place].double() - exact, s.double()
            norm = (lambda x: x.abs().sum(0)) if transposed else (lambda x: x.abs().amax(0))
            assert (norm(error) <= sol.error_bound[i] + 1e-12 * norm(size)).all()
            assert (sol.error_bound[i] <= tol * norm(size)).all()
            away = ~case.mask[i]
            assert (sol.value[i, away] == 0).all()
            assert (sol.lower[i, away] == 0).all()
            assert (sol.upper[i, away] == 0).all()


@names
def test_garbage_changes_no_bit(name):
    first, *others = (gd.solve(case.P, case.s, 0.9) for case in (padded(name, x) for x in GARBAGE))
    for other in others:
        assert other.value.equal(first.value)
        assert other.error_bound.equal(first.error_bound)
        assert other.steps.equal(first.steps)


def test_a_first_guess_and_degrees_at_padded_nodes_cost_cg_nothing():
    psi, s = 0.5 * randn(300, 4), randn(300, 2, seed=5)
    padding = torch.nn.functional.pad
    mask = padding(torch.ones(300, dtype=torch.bool), (0, 500))
    alone = gd.solve(gd.AttentionTransition(psi), s, 0.99, solver=gd.solvers.CG())
    wide_psi, wide_s = (padding(x, (0, 0, 0, 500), value=7.0) for x in (psi, s))
    P = gd.AttentionTransition(wide_psi, mask=mask)
    for start in (None, wide_s + 3):
        sol = gd.solve(P, wide_s, 0.99, solver=gd.solvers.CG(), initial=start)
        assert (sol.steps - alone.steps).abs().max() <= 2


def test_pagerank_restarts_at_real_nodes_graph_by_graph():
    for name in ("directed", "flat attention"):
        case = padded(name)
        weights = case.s.abs()
        uniform, weighted = gd.pagerank(case.P), gd.pagerank(case.P, weights)
        shared = gd.pagerank(case.P, torch.arange(9).double() + 1)
        assert uniform.value.shape == (2, 9)
        assert uniform.error_bound.shape == (2,)
        for i, place, Q, s in case.alone():
            for found, personal in ((uniform, None), (weighted, s.abs()), (shared, place + 1.0)):
                alone = gd.pagerank(Q, None if personal is None else personal.double()).value
                assert (found.value[i, place] - alone).abs().sum(0).max() < 3e-10
                assert (found.value[i, ~case.mask[i]] == 0).all()
    one = gd.AttentionTransition(case.leaf[0], mask=case.mask[0])
    assert gd.pagerank(one).value.shape == (9,)
    assert gd.pagerank(one).value.sum() == pytest.approx(1)


def test_what_is_padded_is_not_in_the_spectrum():
    for name in ("directed", "flat attention"):
        case = padded(name, sizes=(30, 20))
        together = gd.estimate(case.P, 0.9)
        for i, _, Q, _ in case.alone():
            assert together.lambda_2[i] == pytest.approx(float(gd.estimate(Q, 0.9).lambda_2), abs=0.02)
            assert together.lambda_2[i] < 0.9


@pytest.mark.parametrize("name", ["symmetric", "star", "flat attention", "hub attention"])
def test_energy_and_minimiser_of_padded_graphs(name):
    case = padded(name)
    importance = torch.where(case.mask, 0.5, torch.nan).double().unsqueeze(-1)
    sol = gd.minimize_energy(case.P, case.s, 0.8, importance)
    E = gd.energy(case.P, case.s, case.s.flip(-1), 0.8, importance)
    spread = gd.solve_symmetric(case.P, case.s, 0.8)
    assert sol.converged.all()
    assert spread.converged.all()
    for i, place, Q, s in case.alone():
        half = torch.full((len(s),), 0.5).double()
        alone = gd.minimize_energy(Q, s, 0.8, half).value
        torch.testing.assert_close(sol.value[i, place], alone, rtol=0, atol=1e-9)
        torch.testing.assert_close(E[i], gd.energy(Q, s, s.flip(-1), 0.8, half), rtol=1e-9, atol=1e-12)
        alone = gd.solve_symmetric(Q, s, 0.8).value
        torch.testing.assert_close(spread.value[i, place], alone, rtol=0, atol=1e-9)
    assert (sol.value[~case.mask] == 0).all()


# --- gradients


@names
def test_gradients_at_padded_entries_are_zero_and_elsewhere_those_of_each_graph(name):
    case = padded(name)
    leaf, s = case.leaf.requires_grad_(), case.s.requires_grad_()
    mu = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    y = gd.diffuse(build(name, leaf, case.mask), s, mu, tol=1e-13, on_failure="ignore")
    y.square().sum().backward()
    total = torch.zeros_like(mu)
    for i, place, _, signal in case.alone():
        own, seed = case.leaves[i].requires_grad_(), signal.requires_grad_()
        m = mu.detach().clone().requires_grad_()
        gd.diffuse(build(name, own), seed, m, tol=1e-13, on_failure="ignore").square().sum().backward()
        at = (place[:, None], place) if name in DENSE else (place,)
        torch.testing.assert_close(leaf.grad[(i, *at)], own.grad, rtol=1e-8, atol=1e-9)
        torch.testing.assert_close(s.grad[i, place], seed.grad, rtol=1e-8, atol=1e-9)
        total += m.grad
        leaf.grad[(i, *at)] = 0
        s.grad[i, place] = 0
    torch.testing.assert_close(mu.grad, total, rtol=1e-8, atol=1e-9)
    assert (leaf.grad == 0).all()
    assert (s.grad == 0).all()


@pytest.mark.parametrize("name", ["directed", "star", "scaled attention"])
@pytest.mark.parametrize("transposed", [False, True])
def test_first_and_second_order(name, transposed):
    case = padded(name, garbage=1.0, sizes=(4, 2))
    edges = (case.leaf != 0).double()

    def function(leaf, s):
        leaf = edges * ((leaf + leaf.mT) / 2 if name == "star" else leaf)
        P = build(name, leaf, case.mask)
        return gd.diffuse(P.T if transposed else P, s, 0.7, tol=1e-13, on_failure="ignore")

    inputs = (case.leaf.requires_grad_(), case.s.requires_grad_())
    assert gradcheck(function, inputs, fast_mode=True)
    assert gradgradcheck(function, inputs, fast_mode=True, atol=1e-4)


def test_derivatives_of_masked_attention_of_every_order():
    case = padded("scaled attention", garbage=1.0, sizes=(4, 2))

    def both(psi, y):
        P = gd.AttentionTransition(psi, mask=case.mask)
        return P.matmul(y), P.rmatmul(y), P.log_degree, P.rows([0, 3])

    inputs = (case.leaf.requires_grad_(), randn(2, 6, 2).requires_grad_())
    assert gradcheck(both, inputs)
    assert gradgradcheck(both, inputs)


# --- modules


def modules(**options):
    torch.manual_seed(5)
    cascade = gd.CascadedWalk([3, 8], 4, init_gain=0.5, **options)
    torch.manual_seed(5)
    return cascade, gd.Diffusion([3, 8], 4, init_gain=0.5, tol=1e-5, **options)


SIZES = (6, 1, 9)


def graphs():
    """Seeds and features of each graph, one after another, and padded with nan."""
    batch = torch.repeat_interleave(torch.arange(3), torch.tensor(SIZES))
    flat = [randn(16, c, seed=c, dtype=torch.float32) for c in (2, 3, 8)]
    mask = torch.arange(9) < torch.tensor(SIZES).unsqueeze(-1)
    full = []
    for x in flat:
        wide = torch.full((3, 9, x.shape[-1]), torch.nan)
        wide[mask] = x
        full.append(wide)
    return batch, flat, mask, full


@pytest.mark.parametrize("which", [0, 1], ids=["cascade", "diffusion"])
def test_modules_treat_each_graph_as_if_alone(which):
    """By mask and by batch vector, after steps of training that moved the statistics."""
    module = modules()[which]
    batch, (seed, *features), mask, (wide_seed, *wide_features) = graphs()
    for _ in range(3):
        module(seed, features, batch=batch)
    module.eval()
    y, walks = module(seed, features, batch=batch, return_walks=True)
    z, wide_walks = module(wide_seed, wide_features, mask=mask, return_walks=True)
    assert y.shape == seed.shape
    assert z.shape == wide_seed.shape
    assert len(walks) == len(wide_walks) == (2 if which == 0 else 1)
    assert walks[-1].equal(y)
    assert z[mask].equal(y)
    assert (z[~mask] == 0).all()
    assert z.equal(module(wide_seed, wide_features, mask=mask))
    for i in range(3):
        own = batch == i
        alone = module(seed[own].unsqueeze(0), [f[own].unsqueeze(0) for f in features]).squeeze(0)
        torch.testing.assert_close(y[own], alone, rtol=0, atol=3e-5)
    (P, *_) = module.transitions(wide_features, mask=mask)
    assert P.mask is mask


@pytest.mark.parametrize("which", [0, 1], ids=["cascade", "diffusion"])
def test_statistics_of_batch_norm_are_those_of_real_nodes(which):
    module = modules()[which]
    other = copy.deepcopy(module)
    _, (seed, *features), mask, (wide_seed, *wide_features) = graphs()
    module(wide_seed, wide_features, mask=mask)
    other(seed.unsqueeze(0), [f.unsqueeze(0) for f in features])  # all nodes in one graph: the same nodes
    for a, b in zip(module.embeddings, other.embeddings, strict=True):
        torch.testing.assert_close(a.norm.running_mean, b.norm.running_mean)
        torch.testing.assert_close(a.norm.running_var, b.norm.running_var)
        assert a.norm.num_batches_tracked == 1


@pytest.mark.parametrize("which", [0, 1], ids=["cascade", "diffusion"])
def test_modules_train_beside_garbage(which):
    module = modules()[which]
    _, _, mask, (wide_seed, *wide_features) = graphs()
    wide_seed.requires_grad_()
    wide_features[0].requires_grad_()
    target = randn(16, 2, seed=9, dtype=torch.float32)
    optimiser = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(25):
        y = module(wide_seed, wide_features, mask=mask)
        loss = (y[mask] - target).square().mean() + y.sum() * 0  # zeros there, so nothing spreads from them
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    for x in (wide_seed, wide_features[0]):
        assert (x.grad[~mask] == 0).all()
        assert x.grad[mask].abs().sum() > 0
    assert all(p.grad.isfinite().all() for p in module.parameters())


def test_ready_walks_bring_their_own_mask():
    case = padded("flat attention", dtype=torch.float32)
    layer, cascade = gd.Diffusion(mu=0.7, learn_mu=False), gd.CascadedWalk(steps=2)
    for module, walks in ((layer, [case.P]), (cascade, [case.P] * 2)):
        y = module(case.s, walks)
        assert y[case.mask].isfinite().all()
        assert (y[~case.mask] == 0).all()
        with pytest.raises(ValueError, match="mask: expected none beside ready transitions"):
            module(case.s, walks, mask=case.mask)


def test_the_compiled_solve_knows_the_mask():
    case = padded("flat attention", garbage=0.0, dtype=torch.float32)
    mu = torch.tensor(0.6, requires_grad=True)
    psi, s = case.leaf.requires_grad_(), case.s.requires_grad_()
    arguments = (psi, 1.0, case.mask, s, mu, 1e-6, "CG()")
    torch.library.opcheck(_diffuse_attention, arguments)
    g = randn(2, 9, 2, dtype=torch.float32)
    found = torch.autograd.grad(_diffuse_attention(*arguments), (psi, s, mu), g)
    y = gd.diffuse(gd.AttentionTransition(psi, mask=case.mask), s, mu, tol=1e-6, solver=gd.solvers.CG())
    for a, b in zip(found, torch.autograd.grad(y, (psi, s, mu), g), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


# --- input


@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        ([True] * 5, TypeError, r"mask: expected a torch.bool tensor, True at real nodes, got list"),
        (torch.ones(5), TypeError, r"mask: .* got torch.float32"),
        (torch.ones(4, dtype=torch.bool), ValueError, r"mask: expected shape \[5\], one value per node, got"),
        (torch.ones(5, dtype=torch.bool, device="meta"), ValueError, r"mask: expected device cpu"),
    ],
)
def test_bad_masks(mask, error, message):
    for function in (
        lambda: gd.AttentionTransition(randn(5, 2), mask=mask),
        lambda: gd.DenseTransition.from_affinity(randn(5, 5).abs(), mask),
        lambda: gd.DenseTransition(torch.eye(5), mask=mask),
    ):
        with pytest.raises(error, match=message):
            function()


def test_a_real_node_without_a_weight_is_refused():
    W, mask = torch.ones(3, 3), torch.tensor([True, True, False])
    W[0, :2] = 0
    with pytest.raises(ValueError, match="W: row 0 is all zero"):
        gd.DenseTransition.from_affinity(W, mask)


@pytest.mark.parametrize("which", [0, 1], ids=["cascade", "diffusion"])
def test_bad_batches(which):
    module = modules()[which]
    batch, (seed, *features), mask, _ = graphs()
    maps = [randn(1, 3, 4, 4, dtype=torch.float32), randn(1, 8, 4, 4, dtype=torch.float32)]
    for change, error, message in (
        ({"batch": batch, "mask": mask}, ValueError, "mask, batch: expected one of them, got both"),
        ({"batch": batch.flip(0)}, ValueError, "batch: expected graph numbers ≥ 0 in ascending order"),
        ({"batch": batch - 1}, ValueError, "batch: .* smallest one of -1"),
        ({"batch": batch[1:]}, ValueError, r"batch: expected shape \[16\], the graph of every node, got"),
        ({"batch": batch.float()}, TypeError, "batch: expected an int32 or int64 tensor"),
        ({"batch": batch, "seed": seed[None]}, ValueError, r"seed: expected node values \[total, K\]"),
        ({"batch": batch, "features": maps}, ValueError, r"features: expected node features \[total, C\]"),
        ({"mask": mask, "seed": randn(1, 2, 4, 4).float(), "features": maps}, ValueError, "with a mask, got"),
    ):
        with pytest.raises(error, match=message):
            module(**{"seed": seed, "features": features} | change)
