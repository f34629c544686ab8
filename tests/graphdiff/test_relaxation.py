"""Free relaxation: a cascade whose β_t are 1 / (Chebyshev nodes) is the best polynomial of its length."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphdiff as gd
from tests.graphdiff.zoo import OPERATORS, oracle, problems

g = torch.Generator().manual_seed(5)
REVERSIBLE = tuple(name for name, kind in OPERATORS.items() if kind.build(kind.leaf(g, (), 4)).reversible)


@pytest.fixture(autouse=True)
def _in_float64():
    """Coefficients are born in the default dtype; rounded to float32 they belong to another interval."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def contraction(steps, mu, positive_semidefinite):
    """Theory 7: 2ρ^T / (1 + ρ^2T)."""
    kappa = (1 if positive_semidefinite else 1 + mu) / (1 - mu)
    rho = (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1)
    return 2 * rho**steps / (1 + rho ** (2 * steps))


def degrees(P):
    return (P.log_degree - P.log_degree.amax(-1, keepdim=True)).exp().unsqueeze(-1)


def fixed(steps, mu, positive_semidefinite):
    return gd.CascadedWalk.chebyshev(
        steps=steps, mu=mu, positive_semidefinite=positive_semidefinite, learn_mu=False, learn_beta=False
    )


# --- mathematics


@settings(max_examples=150)
@given(
    problems(REVERSIBLE, mus=(0.1, 0.5, 0.9, 0.99, 0.999)),
    st.integers(1, 60),
    st.booleans(),
)
def test_theory_7_the_error_is_at_most_the_chebyshev_bound(problem, steps, use_the_fact):
    P, mu = problem.P, problem.mu
    s = problem.s.reshape(-1, *problem.s.shape[-2:])
    semidefinite = P.positive_semidefinite and use_the_fact
    y = fixed(steps, mu, semidefinite)(s, [P] * steps)
    exact = oracle(problem.dense, s, mu)
    d = degrees(P)

    def size(x):
        return (d * x.square()).sum(-2).sqrt()

    rounding = 1e-13 / (1 - mu) * s.abs().amax(-2) * d.sum(-2).sqrt()
    bound = contraction(steps, mu, semidefinite) * size(s - exact)
    assert (size(y - exact) <= (1 + 1e-9) * bound + rounding).all()


def test_the_bound_is_attained():
    """At an extremum of the polynomial it is an equality, so no bound of this kind is smaller."""
    P = gd.DenseTransition.from_affinity(torch.ones(3, 3))  # 1 and 0: both ends of the interval
    s = torch.tensor([2.0, -1.0, -1.0])[None, :, None]  # an eigenvector of 0
    for steps in (1, 2, 5, 9):
        y = fixed(steps, 0.9, True)(s, [P] * steps)
        exact = oracle(P.P, s, 0.9)
        ratio = float((y - exact).norm() / (s - exact).norm())
        assert ratio == pytest.approx(contraction(steps, 0.9, True), rel=1e-9)


def test_five_steps_at_mu_09_leave_at_most_76_thousandths():
    assert contraction(5, 0.9, True) == pytest.approx(0.076, abs=5e-4)
    assert 0.9**5 > 0.59
    psi = torch.randn(200, 3, generator=torch.Generator().manual_seed(7)) * 3
    P = gd.AttentionTransition(psi)
    s = torch.randn(1, 200, 8, generator=torch.Generator().manual_seed(8))
    exact, d = oracle(P.dense(), s, 0.9), degrees(P)
    left = ((d * (fixed(5, 0.9, True)(s, [P] * 5) - exact).square()).sum(-2)).sqrt()
    assert (left <= 0.076 * (d * (s - exact).square()).sum(-2).sqrt()).all()


def test_the_order_keeps_long_cascades_stable():
    """On the way, no product of factors grows; in sorted order it grows beyond what doubles can hold."""
    mu, steps = 0.999, 60
    beta = fixed(steps, mu, True).beta
    spectrum = torch.linspace(1 - mu, 1, 500)
    ways = (1 - beta[:, None] * spectrum).cumprod(0).abs()
    assert ways.amax() < 2000
    assert (1 - beta.sort(descending=True).values[:, None] * spectrum).cumprod(0).abs().amax() > 1e16
    assert ways[-1].amax() <= contraction(steps, mu, True) * (1 + 1e-6)


def test_ready_transitions_are_not_taken_as_semidefinite():
    """A bipartite walk has the eigenvalue −1: the narrower interval makes its error grow."""
    P = gd.DenseTransition.from_affinity(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    s = torch.tensor([[[1.0], [-1.0]]])
    exact = oracle(P.P, s, 0.9)
    safe = gd.CascadedWalk.chebyshev(steps=8, mu=0.9)
    ratio = float((safe(s, [P] * 8).detach() - exact).norm() / (s - exact).norm())
    assert ratio == pytest.approx(contraction(8, 0.9, False), rel=1e-9)
    narrow = gd.CascadedWalk.chebyshev(steps=8, mu=0.9, positive_semidefinite=True)
    assert (narrow(s, [P] * 8) - exact).abs().max() > (s - exact).abs().max()
    assert gd.CascadedWalk.chebyshev([3] * 8, 4, mu=0.9).beta.tolist() == pytest.approx(narrow.beta.tolist())


@pytest.mark.parametrize("learn_beta", [False, True])
def test_free_and_sigmoid_are_the_same_step(learn_beta):
    P = gd.AttentionTransition(torch.randn(6, 2))
    s = torch.randn(1, 6, 3)
    steps = [
        gd.CascadedWalk(steps=3, mu=0.8, beta=0.6, learn_beta=learn_beta, relaxation=relaxation)
        for relaxation in ("sigmoid", "free")
    ]
    torch.testing.assert_close(*(step(s, [P] * 3) for step in steps))


def test_with_all_beta_1_it_stays_the_plain_walk():
    P, s = gd.AttentionTransition(torch.randn(6, 2)), torch.randn(1, 6, 3)
    plain = s
    for _ in range(4):
        plain = 0.8 * P.matmul(plain) + 0.2 * s
    for relaxation in ("sigmoid", "free"):
        model = gd.CascadedWalk(
            steps=4, mu=0.8, beta=1.0, learn_mu=False, learn_beta=False, relaxation=relaxation
        )
        assert (model(s, [P] * 4) - plain).abs().max() <= 1e-15


def test_mu_0_is_the_seed():
    P, s = gd.AttentionTransition(torch.randn(6, 2)), torch.randn(1, 6, 3)
    assert torch.equal(fixed(3, 0.0, True)(s, [P] * 3), s)


# --- in training


def test_what_is_free_learns():
    """From values no sigmoid reaches, to values nearer what one P of unknown spectrum needs."""
    A = torch.diag(torch.ones(19), 1)
    P = gd.DenseTransition.from_affinity(A + A.T)
    s = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(11))
    exact = oracle(P.P, s, 0.9)
    model = gd.CascadedWalk.chebyshev(steps=4, mu=0.9, learn_mu=False)
    assert len(list(model.coefficients())) == 4
    before = model.beta.detach().clone()
    optimiser = torch.optim.Adam(model.coefficients(), lr=0.02)
    losses = []
    for _ in range(80):
        loss = (model(s, [P] * 4) - exact).square().mean()
        optimiser.zero_grad()
        loss.backward()
        assert all(parameter.grad.abs() > 0 for parameter in model.coefficients())
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert (model.beta - before).abs().min() > 1e-3
    assert model.beta.max() > 1


def test_gradients_of_the_coefficients():
    P, s = gd.AttentionTransition(torch.randn(4, 2)), torch.randn(1, 4, 2)
    model = gd.CascadedWalk.chebyshev(steps=3, mu=0.7)
    names = [name for name, _ in model.named_parameters()]
    assert [name for name in names if "beta" in name] == [f"steps.{t}.beta_free" for t in range(3)]

    def output(*values):
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (s, [P] * 3))

    values = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    assert torch.autograd.gradcheck(output, values)


@pytest.mark.parametrize("learn_beta", [False, True])
def test_state_dict_round_trip(learn_beta, tmp_path):
    model = gd.CascadedWalk.chebyshev([3, 5], 4, mu=0.9, learn_beta=learn_beta)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    other = gd.CascadedWalk([3, 5], 4, relaxation="free", learn_beta=learn_beta)
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(other.beta, model.beta)
    assert torch.equal(other.mu, model.mu)


def test_keys_of_sigmoid_cascades_are_what_they_were():
    learned = gd.CascadedWalk(steps=1).state_dict()
    assert list(learned) == ["steps.0.mu_logit", "steps.0.beta_logit"]
    fixed = gd.CascadedWalk(steps=1, learn_mu=False, learn_beta=False).state_dict()
    assert list(fixed) == ["steps.0.mu_fixed", "steps.0.beta_fixed"]


def test_values_are_shown():
    step = gd.WalkStep(mu=0.5, beta=7.9, relaxation="free")
    assert repr(step) == "WalkStep(µ=0.5 (learned), β=7.9 (learned), relaxation='free')"
    with torch.no_grad():
        step.beta_free.fill_(3.25)
    assert "β=3.25 (learned)" in repr(step)
    assert "β=2 (fixed)" in repr(gd.WalkStep(beta=2, learn_beta=False, relaxation="free"))
    assert repr(gd.WalkStep()) == "WalkStep(µ=0.5 (learned), β=0.5 (learned))"


# --- input


def test_one_value_for_each_walk():
    model = gd.CascadedWalk(steps=3, mu=[0.1, 0.2, 0.3], beta=(0.4, 0.5, 0.6))
    assert model.mu.tolist() == pytest.approx([0.1, 0.2, 0.3])
    assert model.beta.tolist() == pytest.approx([0.4, 0.5, 0.6])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"relaxation": "none"}, r"""relaxation: expected "sigmoid" or "free", got 'none'"""),
        ({"beta": 1.5}, r"beta: expected a number between 0 and 1"),
        ({"beta": 1.5, "learn_beta": False}, r"beta: expected 0 ≤ number ≤ 1, got 1.5"),
        ({"beta": [0.5, 1.5]}, r"beta: expected a number between 0 and 1, both excluded, got 1.5"),
        ({"beta": 0.0, "relaxation": "free"}, r"beta: expected a finite number > 0, got 0.0"),
        ({"beta": math.inf, "relaxation": "free", "learn_beta": False}, r"finite number > 0, got inf"),
        ({"beta": [0.5]}, r"beta: expected one number for all walks or 2, one for each, got 1"),
        ({"mu": [0.5, 0.5, 0.5]}, r"mu: expected one number for all walks or 2, one for each, got 3"),
        ({"mu": [0.5, 1.0]}, r"mu: .* got 1.0"),
    ],
)
def test_bad_input(options, message):
    with pytest.raises(ValueError, match=message):
        gd.CascadedWalk(steps=2, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 2, "mu": 1.0}, r"mu: expected 0 ≤ number < 1, got 1.0"),
        ({"steps": 2, "mu": 0.0}, r"mu: expected a number between 0 and 1, both excluded, got 0.0"),
        ({"steps": 0}, r"number of walks: expected an integer ≥ 1, got 0"),
        ({}, r"expected either feature_channels, .* or steps"),
        ({"steps": 2, "feature_channels": [3, 3]}, r"expected either feature_channels, .* or steps"),
    ],
)
def test_bad_input_of_chebyshev(options, message):
    with pytest.raises(ValueError, match=message):
        gd.CascadedWalk.chebyshev(**options)
