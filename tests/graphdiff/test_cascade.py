"""FeatureEmbedding, WalkStep and CascadedWalk: Eq. 5, its limits, and how they behave in a network."""

import copy
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import graphdiff as gd
from graphdiff.solvers.base import Budget, Limits
from tests.graphdiff.zoo import oracle, problems

SIZES = [(48, 50), (6, 7), (3, 4)]  # finer than the seed's grid, equal to it, coarser


def maps(channels=(3, 16, 8), batch=2, seed=41, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, c, *size, generator=g, dtype=dtype)
        for c, size in zip(channels, SIZES, strict=True)
    ]


def cascade(**options):
    torch.manual_seed(43)
    return gd.CascadedWalk([3, 16, 8], 8, **options)


def seed_map(batch=2, channels=5, dtype=torch.float32):
    return torch.randn(batch, channels, 6, 7, generator=torch.Generator().manual_seed(47), dtype=dtype)


# --- mathematics


def test_equation_5_written_out():
    model, seed, features = cascade().double(), seed_map(dtype=torch.float64), maps(dtype=torch.float64)
    with torch.no_grad():
        for step in model.steps:
            step.mu_logit.normal_()
            step.beta_logit.normal_()
    model.eval()
    y, walks = model(seed, features, return_walks=True)
    s = seed.flatten(2).mT
    expected = s
    for t, P in enumerate(model.transitions(features, grid=(6, 7))):
        walked = model.mu[t] * P.dense() @ expected + (1 - model.mu[t]) * s
        expected = model.beta[t] * walked + (1 - model.beta[t]) * expected
        torch.testing.assert_close(walks[t], expected.mT.reshape(seed.shape))
    torch.testing.assert_close(y, walks[-1])
    torch.testing.assert_close(model(seed, features), y)


@settings(max_examples=40)
@given(problems(mus=(0.3, 0.85, 0.95), batches=((2,),)), st.integers(1, 6))
def test_with_one_P_fixed_mu_and_beta_1_a_cascade_is_a_walk(problem, steps):
    P, s, mu = problem.P, problem.s, problem.mu
    model = gd.CascadedWalk(steps=steps, mu=mu, beta=1.0, learn_mu=False, learn_beta=False).double()
    y = model(s, [P] * steps)
    walk, tensor = gd.solvers.Walk(), torch.full((1, 1), mu, dtype=torch.float64)
    limits = Limits(torch.full((2, 1, s.shape[-1]), steps), Budget())
    target = torch.full((2, 1, s.shape[-1]), 1e-300, dtype=torch.float64)
    walked = walk.solve(walk.prepare(P, tensor), (1 - mu) * s, s, target, limits).x
    size = float(s.abs().max())
    # The cascade's fixed µ is the float32 nearest to it.
    torch.testing.assert_close(y, walked, rtol=0, atol=2e-7 * size)
    exact = oracle(problem.dense, s, mu)
    first = (s - exact).abs().amax(-2)
    assert ((y - exact).abs().amax(-2) <= float(torch.tensor(mu)) ** steps * first + 2e-7 * size).all()


def test_a_growing_cascade_goes_to_the_exact_answer_at_the_rate_mu():
    """A plain path is bipartite, so the rate is µ itself and no better."""
    A = torch.diag(torch.ones(9, dtype=torch.float64), 1)
    P = gd.DenseTransition.from_affinity(A + A.T)
    s = (-1.0) ** torch.arange(10, dtype=torch.float64)[None, :, None]
    exact = oracle(P.P, s, 0.75)
    errors = []
    for steps in (4, 8, 16, 32):
        model = gd.CascadedWalk(steps=steps, mu=0.75, beta=1.0, learn_mu=False, learn_beta=False).double()
        errors.append(float((model(s, [P] * steps) - exact).abs().max()))
    for steps, (error, later) in zip((4, 8, 16), itertools.pairwise(errors), strict=True):
        assert later / error == pytest.approx(0.75**steps, rel=1e-6)


def test_theory_7_a_step_is_relaxed_richardson():
    W = torch.rand(6, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    P = gd.DenseTransition.from_affinity(W)
    step = gd.WalkStep(mu=0.7, beta=0.4).double()
    y, s = W[:, :2], W[:, 2:4]
    A = torch.eye(6).double() - step.mu * P.P
    torch.testing.assert_close(step(P, y, s), y + step.beta * ((1 - step.mu) * s - A @ y))


def test_theory_8_mu_1_and_beta_1_stay_equal_in_training():
    model, features, seed = cascade(), maps(), seed_map()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    target = seed_map().roll(1, 0)
    for _ in range(8):
        optimiser.zero_grad()
        (model(seed, features) - target).square().mean().backward()
        optimiser.step()
    mu, beta = model.mu.detach(), model.beta.detach()
    assert abs(mu[0] - 0.5) > 1e-3
    assert abs(mu[0] - beta[0]) < 1e-6
    assert (mu[1:] - beta[1:]).abs().min() > 1e-4


def test_theory_10_the_two_collapses_and_their_cure():
    g = torch.Generator().manual_seed(53)
    features = torch.randn(1, 32, 64, 64, generator=g)

    def median_diagonal_and_largest_column(**options):
        torch.manual_seed(59)
        with torch.no_grad():
            P = gd.FeatureEmbedding(32, 64, **options)(features, grid=grid).dense()[0]
        return float(P.diagonal().median()), float(P.mean(0).max())

    grid = (64 // 8, 64 // 8)  # pooled: norms differ, rows point at the longest node
    diagonal, hub = median_diagonal_and_largest_column()
    assert diagonal < 1e-2
    assert hub > 0.3
    _, mended = median_diagonal_and_largest_column(scale=1 / 64)
    assert mended < 0.1
    grid = (64, 64)  # not pooled: norms alike and large, every node keeps to itself
    diagonal, _ = median_diagonal_and_largest_column()
    assert diagonal > 0.9
    diagonal, _ = median_diagonal_and_largest_column(init_gain=0.3)
    assert diagonal < 0.1


# --- shapes and inputs


@pytest.mark.parametrize("channels", [1, 5])
@pytest.mark.parametrize("batch", [1, 2])
def test_maps_of_any_size(batch, channels):
    seed = seed_map(batch, channels)
    y, walks = cascade()(seed, maps(batch=batch), return_walks=True)
    assert y.shape == seed.shape
    assert [w.shape for w in walks] == [seed.shape] * 3


def test_node_features_are_maps_without_pooling():
    model, features, seed = cascade().eval(), maps(), seed_map()
    same = [torch.nn.functional.adaptive_avg_pool2d(f, (6, 7)) for f in features]
    nodes = [f.flatten(2).mT for f in same]
    y = model(seed, same)
    torch.testing.assert_close(model(seed.flatten(2).mT, nodes), y.flatten(2).mT)


def test_ready_transitions():
    model, features, seed = cascade().eval(), maps(), seed_map()
    given_ready = gd.CascadedWalk(steps=3)
    assert torch.equal(given_ready(seed, model.transitions(features, (6, 7))), model(seed, features))
    shared = gd.DenseTransition.from_affinity(torch.rand(42, 42))
    assert given_ready(seed, [shared] * 3).shape == seed.shape
    half = given_ready(seed.bfloat16(), [gd.AttentionTransition(torch.randn(42, 3).bfloat16())] * 3)
    assert half.dtype == torch.bfloat16


def test_rows_of_any_P_without_the_matrix():
    model, features = cascade().eval(), maps()
    for P in model.transitions(features, (6, 7)):
        rows = P.rows([0, 40])
        assert rows.shape == (2, 2, 42)
        torch.testing.assert_close(rows, P.dense()[:, [0, 40]])
    # Without a grid the smallest map is the grid.
    assert model.transitions(features)[0].shape == (2, 12, 12)


# --- in a network


def test_gradients_reach_everything():
    model, features, seed = cascade(), maps(), seed_map().requires_grad_()
    model(seed, features).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    assert seed.grad.abs().sum() > 0
    assert len(list(model.coefficients())) == 6


def test_fixed_coefficients_are_exact_and_not_parameters():
    model = gd.CascadedWalk(steps=2, mu=0.85, beta=1.0, learn_mu=False, learn_beta=False)
    assert list(model.parameters()) == []
    assert model.mu.tolist() == pytest.approx([0.85, 0.85])
    assert model.beta.tolist() == [1.0, 1.0]
    assert "µ=0.85 (fixed)" in repr(model)


def test_state_dict_round_trip(tmp_path):
    model, features, seed = cascade(), maps(), seed_map()
    model(seed, features)  # moves the running statistics
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = gd.CascadedWalk([3, 16, 8], 8)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other.eval()(seed, features), model.eval()(seed, features))
    fixed = gd.CascadedWalk(steps=1, mu=0.3, learn_mu=False)
    assert float(fixed.state_dict()["steps.0.mu_fixed"]) == pytest.approx(0.3)


def test_autocast_keeps_the_affinity_in_float32():
    model, features, seed = cascade().eval(), maps(), seed_map()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(P.dtype == torch.float32 for P in model.transitions(features))
        y = model(seed, features)
        low = model(seed.bfloat16(), features)
    assert y.dtype == torch.float32
    assert low.dtype == torch.bfloat16
    assert (y - model(seed, features)).abs().max() < 0.05


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # inductor compiles C++ for half a minute
def test_compiles_as_one_graph(backend):
    model, features = cascade(), maps()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend=backend)
    plain_seed, compiled_seed = (seed_map().requires_grad_() for _ in range(2))
    y, z = model(plain_seed, features), compiled(compiled_seed, features)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-5)
    y.square().sum().backward()
    z.square().sum().backward()
    torch.testing.assert_close(plain_seed.grad, compiled_seed.grad, rtol=0, atol=1e-3)
    for (name, a), b in zip(model.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-3, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(compiled(compiled_seed, features), y, rtol=0, atol=1e-5)


def test_learns_to_clean_a_noisy_seed():
    """Two regions of different colour under scores often wrong: walks inside a region average them."""
    g = torch.Generator().manual_seed(61)
    truth = (torch.arange(12) >= 5).long().expand(1, 12, 12)
    image = truth.unsqueeze(1) + 0.1 * torch.randn(1, 3, 12, 12, generator=g)
    seed = nn.functional.one_hot(truth, 2).movedim(-1, 1) + 1.5 * torch.randn(1, 2, 12, 12, generator=g)
    torch.manual_seed(67)
    model = gd.CascadedWalk([3] * 3, 8)
    optimiser = torch.optim.Adam(model.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = nn.functional.cross_entropy(model(seed, [image] * 3), truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
    right_before = (seed.argmax(1) == truth).float().mean()
    right_after = (model(seed, [image] * 3).argmax(1) == truth).float().mean()
    assert right_before < 0.8
    assert right_after > 0.95
