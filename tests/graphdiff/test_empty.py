"""A batch of no graphs: answers of the right shape and gradients, or an error that says so."""

import pytest
import torch

import graphdiff as gd

N, K = 6, 2
D = torch.float64


def ring(weight):
    nodes = torch.arange(N)
    return gd.SparseTransition.from_edge_index(torch.stack([nodes, nodes.roll(1)]), weight, undirected=True)


def mixture(x):
    return gd.FunctionTransition(lambda y, x: torch.softmax(x, -1) @ y, N, tensors=[x])


# Shape of the leaf, and the walk made of it: batches of walks, and walks that a batch of signals meets.
WALKS = {
    "attention": ((0, N, 3), gd.AttentionTransition),
    "masked": ((0, N, 3), lambda x: gd.AttentionTransition(x, mask=torch.ones(0, N, dtype=torch.bool))),
    "two batches": ((3, 0, N, 3), gd.AttentionTransition),
    "one attention": ((N, 3), gd.AttentionTransition),
    "affinity": ((0, N, N), gd.DenseTransition.from_affinity),
    "matrix": ((0, N, N), gd.DenseTransition),
    "one affinity": ((N, N), gd.DenseTransition.from_affinity),
    "sparse": ((N,), ring),
    "grid": ((1, 2, 3), gd.grid_transition),
    "function": ((N, N), mixture),
    "Gaussian": ((N, 2), gd.gaussian_transition),
}
walks = pytest.mark.parametrize(("shape", "build"), WALKS.values(), ids=WALKS)


def calls(P, s):
    yield lambda: P @ s
    yield lambda: P.T @ s
    yield lambda: gd.diffuse(P, s, 0.9)
    yield lambda: gd.diffuse(P.T, s, 0.9)
    yield lambda: gd.diffuse(P.T, s, torch.full((1, K), 0.5, dtype=D), solver=gd.solvers.Walk())
    yield lambda: gd.diffuse(P.to(torch.float32), s.float(), 0.9)
    yield lambda: gd.pagerank(P, s.abs()).value
    if s.ndim == 3:
        yield lambda: gd.CascadedWalk(steps=2).double()(s, [P, P])
        yield lambda: gd.Diffusion().double()(s, [P])
    if P.reversible:
        yield lambda: gd.solve_symmetric(P, s, 0.9).value
        yield lambda: gd.minimize_energy(P, s, 0.9).value


@walks
def test_products_solves_and_modules_give_as_many_answers(shape, build):
    leaf = torch.rand(shape, dtype=D, requires_grad=True)
    P = build(leaf)
    lead = P.shape[:-2] if 0 in shape else torch.Size([0])
    s = torch.rand(*lead, N, K, dtype=D, requires_grad=True)
    for call in calls(P, s):
        y = call()
        assert y.shape == s.shape
        # The graph is kept: P is a function of the leaf once.
        of_s, of_leaf = torch.autograd.grad(y.sum(), (s, leaf), retain_graph=True)
        assert of_s.shape == s.shape
        assert of_leaf.shape == leaf.shape
        assert not of_leaf.any()


@walks
def test_a_solution_of_nothing(shape, build):
    P = build(torch.rand(shape, dtype=D))
    lead = P.shape[:-2] if 0 in shape else torch.Size([0])
    s, mu = torch.rand(*lead, N, K, dtype=D), torch.tensor(0.9, requires_grad=True)
    sol = gd.solve(P, s, mu, on_failure="raise")
    for name in ("value", "lower", "upper"):
        assert getattr(sol, name).shape == s.shape
    for name in ("error_bound", "converged", "steps", "matvecs"):
        assert getattr(sol, name).shape == (*lead, K)
    assert sol.converged.dtype == torch.bool
    assert sol.reason == "nothing to solve; the batch is empty"
    assert "empty" in repr(sol)
    sol.value.sum().backward()
    assert mu.grad == 0
    assert gd.solve_path(P, s, [0.5, 0.9]).value.shape == (2, *s.shape)


def test_second_derivatives_of_nothing():
    psi = torch.rand(0, N, 3, dtype=D, requires_grad=True)
    y = gd.AttentionTransition(psi) @ torch.rand(0, N, K, dtype=D)
    (first,) = torch.autograd.grad(y.square().sum(), psi, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), psi)
    assert second.shape == psi.shape


def test_the_log_degrees_rows_and_matrix_of_nothing():
    P = gd.AttentionTransition(torch.rand(0, N, 3))
    assert P.log_degree.shape == (0, N)
    assert P.rows([1, 2]).shape == (0, 2, N)
    assert P.dense().shape == (0, N, N)


@pytest.mark.parametrize("module", [gd.CascadedWalk, gd.Diffusion])
def test_modules_on_maps(module):
    refine = module(feature_channels=[3, 5], embedding_channels=4).eval()
    seed = torch.rand(0, K, 2, 3, requires_grad=True)
    features = [torch.rand(0, 3, 9, 9), torch.rand(0, 5, 2, 3)]
    y, walks = refine(seed, features, return_walks=True)
    assert y.shape == walks[0].shape == seed.shape
    y.sum().backward()
    assert seed.grad.shape == seed.shape


def test_what_has_no_answer_says_so():
    P, s = gd.AttentionTransition(torch.rand(0, N, 3)), torch.rand(0, N, K)
    message = r"expected at least one graph, got leading dimensions \[0\]"
    with pytest.raises(ValueError, match=message):
        gd.heat_kernel(P, s, 1.0)
    with pytest.raises(ValueError, match=message):
        gd.polynomial(P, s, [0.5, 0.5])
    with pytest.raises(ValueError, match=message):
        gd.harmonic(P, s, torch.arange(N) == 0)
    with pytest.raises(ValueError, match=message):
        gd.estimate(P, 0.9)


def test_no_node_and_no_channel_are_refused():
    with pytest.raises(ValueError, match=r"psi: expected shape .* N ≥ 1 and d ≥ 1, got \[2, 0, 3\]"):
        gd.AttentionTransition(torch.rand(2, 0, 3))
    with pytest.raises(ValueError, match=r"K ≥ 1, got \[6, 0\]"):
        gd.AttentionTransition(torch.rand(N, 3)) @ torch.rand(N, 0)
    with pytest.raises(ValueError, match=r"of which only B may be 0, got \[1, 0, 2, 3\]"):
        gd.CascadedWalk(steps=1)(torch.rand(1, 0, 2, 3), [gd.AttentionTransition(torch.rand(N, 3))])
