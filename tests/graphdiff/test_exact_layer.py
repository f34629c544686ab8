"""Diffusion, the exact layer: what it computes, that it swaps with the cascade, trains and compiles."""

import copy

import pytest
import torch
from torch.nn import functional as F

import graphdiff as gd
from graphdiff.nn.diffusion import _diffuse_attention
from tests.graphdiff.zoo import oracle


def randn(*shape, seed=3, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def layer(**options):
    torch.manual_seed(5)
    return gd.Diffusion([3, 8], embedding_channels=4, init_gain=0.5, **options)


def maps(batch=2):
    return randn(batch, 5, 6, 7), [randn(batch, 3, 24, 28, seed=4), randn(batch, 8, 6, 7, seed=5)]


def test_one_exact_diffusion_on_the_product_of_the_kernels():
    seed, features = (maps()[0].double(), [f.double() for f in maps()[1]])
    module = layer(mu=0.8, tol=1e-10).double()
    y = module(seed, features)
    logits = sum(
        P.psi @ P.psi.mT for P in (e(f, (6, 7)) for e, f in zip(module.embeddings, features, strict=True))
    )
    s = seed.flatten(2).mT
    exact = oracle(torch.softmax(logits, -1).detach(), s, float(module.mu.detach()))
    torch.testing.assert_close(y, exact.mT.reshape(seed.shape), rtol=0, atol=1e-9)
    (P,) = module.transitions(features, (6, 7))
    assert P.shape == (2, 42, 42)
    assert P.psi.shape[-1] == 8


def test_the_tolerance_is_the_layers():
    seed, features = maps()
    loose, tight = layer(tol=1e-1), layer(tol=1e-5)
    exact = layer(tol=1e-12).double()(seed.double(), [f.double() for f in features])
    size = seed.abs().amax()
    assert (tight(seed, features) - exact).abs().max() <= 2e-5 * size
    assert (loose(seed, features) - exact).abs().max() <= 1e-1 * size


@pytest.mark.parametrize("kind", [gd.CascadedWalk, gd.Diffusion])
@pytest.mark.parametrize("ready", [False, True])
@pytest.mark.parametrize("alone", ["seed", "features"])
def test_one_seed_or_one_image_serves_a_whole_batch(kind, ready, alone):
    """Forward and backward as if it had been repeated, whose gradients then are sums."""
    torch.manual_seed(7)
    options = {"tol": 1e-12} if kind is gd.Diffusion else {}
    module = kind([3, 8], 4, **options).double().eval()
    seed, features = maps()
    leaves = {"seed": [seed.double()], "features": [f.double() for f in features]}
    leaves[alone] = [x[:1] for x in leaves[alone]]
    for x in (*leaves["seed"], *leaves["features"]):
        x.requires_grad_()
    once = [*leaves["seed"], *leaves["features"]]
    repeated = [x.expand(2, -1, -1, -1) for x in once]
    found, expected = [], []
    for results, (s, *f) in ((found, once), (expected, repeated)):
        walks = module.transitions(f, (6, 7)) if ready else f
        if ready and kind is gd.Diffusion:
            walks = [gd.AttentionTransition(walks[0].psi)]
        y, each = module(s, walks, return_walks=True)
        assert {x.shape for x in each} == {y.shape} == {(2, 5, 6, 7)}
        results += [y, *torch.autograd.grad((y * randn(2, 5, 6, 7, seed=9)).sum(), once)]
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", [gd.CascadedWalk, gd.Diffusion])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("nodes", [False, True])
def test_gradients_of_one_image_are_those_of_two_like_it(kind, training, nodes):
    """Half of them, and with batch norm on every side, whose backward by torch minds strides of size 1."""
    torch.manual_seed(7)
    options = {"tol": 1e-12} if kind is gd.Diffusion else {}
    refine = kind([3, 8], 4, init_gain=0.5, **options)
    before, behind = torch.nn.BatchNorm2d(5), torch.nn.BatchNorm2d(5)
    model = torch.nn.ModuleList([refine, before, behind]).double().train(training)
    given = [randn(1, c, 6, 7, seed=c).double() for c in (5, 3, 8)]
    shape = (42, 1) if nodes else (6, 7)
    weight = randn(1, 5, *shape, seed=9).double()

    def gradients(copies):
        inputs = [x.clone().requires_grad_() for x in given]
        seed, *features = (x.repeat(copies, 1, 1, 1) for x in inputs)
        seed = before(seed)
        if nodes:
            seed, features = seed.flatten(2).mT, [f.flatten(2).mT for f in features]
        y = refine(seed, features)
        y = behind(y.mT.unsqueeze(-1).contiguous() if nodes else y)
        return torch.autograd.grad((weight * y).sum() / copies, [*inputs, *model.parameters()])

    for one, two in zip(gradients(1), gradients(2), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)


def test_maps_that_do_not_go_together():
    seed, features = maps()
    three = maps(3)
    for module in (layer(), gd.CascadedWalk([3, 8], 4)):
        message = r"features and seed: expected leading dimensions that broadcast, got \[2\] and \[3\]"
        with pytest.raises(ValueError, match=message):
            module(three[0], features)
    with pytest.raises(ValueError, match=r"features: expected leading dimensions .* \[2\] and \[3\]"):
        layer()(seed, [features[0], three[1][1]])
    with pytest.raises(ValueError, match="features: expected one value per node in each, got 5, 4 nodes"):
        layer()(randn(2, 5, 2), [randn(2, 5, 3), randn(2, 4, 8)])
    mixed = layer().eval()
    one, other = features[0][:1], features[1]
    whole = [one.expand(2, -1, -1, -1), other]
    torch.testing.assert_close(mixed(seed, [one, other]), mixed(seed, whole), rtol=0, atol=1e-5)


def test_swaps_with_the_cascade():
    seed, features = maps()
    for module in (layer(), gd.CascadedWalk([3, 8], 4)):
        y, walks = module(seed, features, return_walks=True)
        assert y.shape == seed.shape
        assert torch.equal(walks[-1], y)
        assert module.mu.shape == (len(walks),)
        learned = {parameter for parameter in module.parameters() if parameter.ndim == 0}
        assert set(module.coefficients()) == learned != set()
        assert len(module.transitions(features, (6, 7))) == len(walks)
        nodes = [f.flatten(2).mT for f in maps()[1][1:]] * 2
        assert module.eval().embeddings[0].conv.in_channels == 3
        with pytest.raises(ValueError, match="features: expected maps"):
            module(seed, nodes)
    nodes = [randn(2, 10, 3), randn(2, 10, 8)]
    assert layer()(randn(2, 10, 4), nodes).shape == (2, 10, 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ready_transitions(dtype):
    W = randn(9, 9, dtype=dtype).abs()
    P, s = gd.DenseTransition.from_affinity(W + W.T), randn(1, 9, 2, dtype=dtype)
    module = gd.Diffusion(mu=0.9, learn_mu=False, tol=1e-5).to(dtype)
    torch.testing.assert_close(module(s, [P]), gd.diffuse(P, s, module.mu[0], tol=1e-5))
    with pytest.raises(ValueError, match="expected one ready transition, got 2"):
        module(s, [P, P])
    with pytest.raises(ValueError, match="without feature_channels"):
        module(s, [randn(1, 9, 3, dtype=dtype)])


def test_mu_and_features_are_learned():
    """µ and ψ that made a target are found again from it."""
    torch.manual_seed(0)
    seed, features = maps(1)
    target = layer(mu=0.9)(seed, features).detach()
    module = layer(mu=0.5)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.05)
    losses = []
    for _ in range(60):
        loss = F.mse_loss(module(seed, features), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.02 * losses[0]
    assert float(module.mu.detach()) > 0.75


def test_second_derivatives_in_eager_mode():
    module = gd.Diffusion(mu=0.7, tol=1e-11).double()
    psi, s = randn(1, 6, 2, dtype=torch.float64).requires_grad_(), randn(1, 6, 2, seed=8, dtype=torch.float64)

    def energy(psi, logit):
        return torch.func.functional_call(module, {"mu_logit": logit}, (s, [gd.AttentionTransition(psi)]))

    assert torch.autograd.gradgradcheck(energy, (psi, module.mu_logit.detach().requires_grad_()), atol=1e-4)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
)  # inductor compiles C++ for half a minute
@pytest.mark.parametrize("solver", [None, gd.solvers.CG()])
def test_compiles_as_one_graph(backend, solver):
    seed, features = maps()
    module = layer(tol=1e-4, solver=solver)
    compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend=backend)
    plain_seed, compiled_seed = (seed.clone().requires_grad_() for _ in range(2))
    y, z = module(plain_seed, features), compiled(compiled_seed, features)
    torch.testing.assert_close(y, z, rtol=0, atol=1e-3)
    for out in (y, z):
        out.square().sum().backward()
    torch.testing.assert_close(plain_seed.grad, compiled_seed.grad, rtol=0, atol=2e-3)
    for (name, a), b in zip(module.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(
            a.grad,
            b.grad,
            rtol=2e-2,
            atol=1e-2 * float(a.grad.abs().max()) + 1e-4,
            msg=lambda m, n=name: f"{n}: {m}",
        )
    with torch.no_grad():
        torch.testing.assert_close(compiled(compiled_seed, features), y, rtol=0, atol=1e-3)


def test_the_solve_is_a_well_behaved_operator_of_torch():
    psi, mu = randn(2, 3, 6).mT.requires_grad_(), torch.tensor(0.6, requires_grad=True)
    # Signals of maps come with nodes last in memory.
    for s in (randn(2, 6, 2), randn(2, 2, 6).mT, randn(6, 2), randn(2, 1, 6).mT):
        torch.library.opcheck(_diffuse_attention, (psi, 1.0, None, s.requires_grad_(), mu, 1e-5, "CG()"))


def test_half_precision_is_solved_in_float32():
    seed, features = maps()
    module = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = module(seed.bfloat16(), features)
    assert y.dtype == torch.bfloat16
    assert (y.float() - module(seed, features)).abs().max() < 0.1 * seed.abs().max()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mu": 1.0}, ValueError, "mu: expected a number between 0 and 1"),
        ({"tol": 0}, ValueError, "tol: expected a finite number > 0"),
        ({"solver": "cg"}, TypeError, r"solver: expected a solver such as solvers.CG\(\), got 'cg'"),
        ({"feature_channels": []}, ValueError, "number of features: expected an integer ≥ 1, got 0"),
    ],
)
def test_bad_input(options, error, message):
    with pytest.raises(error, match=message):
        gd.Diffusion(**{"feature_channels": [3], **options})


def test_bad_features():
    seed, features = maps()
    with pytest.raises(ValueError, match="features: expected 2, got 1"):
        layer()(seed, features[:1])
    with pytest.raises(TypeError, match="seed: expected dtype"):
        layer().double()(seed, [f.double() for f in features])
