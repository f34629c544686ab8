"""The permutohedral lattice: its mathematics, how near the Gaussian it is, and what it refuses."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck

import graphdiff as gd
from graphdiff.operators import permutohedral
from tests.graphdiff.zoo import lattice_filter

f64 = {"dtype": torch.float64}


@st.composite
def clouds(draw, most=6):
    """Points in one to `most` dimensions, from dense to far apart, some of them twice."""
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    n, d = draw(st.integers(1, 14)), draw(st.integers(1, most))
    p = draw(st.sampled_from([0.1, 1.0, 4.0])) * torch.randn(n, d, generator=g, **f64)
    return torch.cat([p, p[:2]]) if draw(st.booleans()) else p


def randn(*shape, seed=3, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --- mathematics


@given(clouds())
def test_the_filter_equals_the_dense_lattice_in_every_order(p):
    lattice, G = gd.PermutohedralLattice(p), lattice_filter(p)
    eye = torch.eye(len(p), **f64)
    for order, expected in (("up", G), ("down", G.T), ("both", (G + G.T) / 2)):
        torch.testing.assert_close(lattice.filter(eye, order), expected, rtol=0, atol=1e-12)


@given(clouds())
def test_barycentric_weights_lie_between_0_and_1_and_sum_to_1(p):
    lattice = gd.PermutohedralLattice(p)
    assert lattice.weights.shape == lattice.corners.shape == (len(p), p.shape[1] + 1)
    assert lattice.weights.min() >= 0
    torch.testing.assert_close(lattice.weights.sum(-1), torch.ones(len(p), **f64))
    # A simplex has as many corners as weights.
    assert all(len(set(corners.tolist())) == p.shape[1] + 1 for corners in lattice.corners)


@given(clouds())
def test_neighbours_are_mutual(p):
    lattice = gd.PermutohedralLattice(p)
    number = torch.arange(lattice.points)
    for before, after in lattice.neighbours.long():
        there = after < lattice.points
        assert torch.equal(before[after[there]], number[there])
        assert int((before < lattice.points).sum()) == int(there.sum())


@given(clouds())
def test_the_walk_is_reversible_with_positive_weights_and_a_diagonal(p):
    P = gd.gaussian_transition(p)
    D = P.dense()
    assert D.min() >= 0
    assert D.diagonal().min() > 0
    torch.testing.assert_close(D.sum(-1), torch.ones(len(p), **f64))
    flow = P.log_degree.exp().unsqueeze(-1) * D
    torch.testing.assert_close(flow, flow.T, rtol=1e-12, atol=1e-14)
    assert P.reversible
    assert not P.positive_semidefinite


def test_moving_all_points_by_a_step_of_the_lattice_changes_nothing():
    """(1, …, 1, −d) on the lattice, carried back to the points' space, leaves every simplex as it is."""
    d = 3
    index = torch.arange(1, d + 1, **f64)
    basis = torch.zeros(d + 1, d, **f64)
    for i in range(1, d + 1):
        basis[:i, i - 1], basis[i, i - 1] = 1.0, -float(i)
    basis = basis / (index * (index + 1)).sqrt()
    step = torch.ones(d + 1, **f64) - (d + 1) * torch.eye(d + 1, **f64)[0]
    shift = step @ basis / (math.sqrt(2 / 3) * (d + 1))
    p = randn(30, d)
    here, there = (gd.gaussian_transition(x).dense() for x in (p, p + shift))
    torch.testing.assert_close(here, there, rtol=0, atol=1e-12)


@settings(max_examples=20)
@given(clouds())
def test_relabelled_points_relabel_the_filter(p):
    order = torch.randperm(len(p), generator=torch.Generator().manual_seed(7))
    y = randn(len(p), 2)
    one = gd.PermutohedralLattice(p).filter(y)[order]
    torch.testing.assert_close(gd.PermutohedralLattice(p[order]).filter(y[order]), one, rtol=0, atol=1e-12)


def test_the_gaussian_within_the_tolerance_that_the_page_tells():
    """docs/gaussian.md: of a row's probabilities, the share that stands elsewhere than the Gaussian's."""
    for d, mean, most in ((1, 0.03, 0.15), (2, 0.05, 0.2), (3, 0.075, 0.35), (5, 0.13, 0.85)):
        p = randn(1500, d, seed=d)
        exact = torch.softmax(-torch.cdist(p, p).square() / 2, -1)
        share = (gd.gaussian_transition(p).dense() - exact).abs().sum(-1) / 2
        assert share.mean() < mean, d
        assert share.max() < most, d
    # And not by being something else altogether: a Gaussian half as wide is far away.
    p = randn(1500, 2, seed=2)
    narrow = torch.softmax(-2 * torch.cdist(p, p).square(), -1)
    assert ((gd.gaussian_transition(p).dense() - narrow).abs().sum(-1) / 2).mean() > 0.3


# --- numbering


@given(clouds(most=5))
def test_corners_numbered_by_random_multiples_make_the_same_filter(p):
    y = randn(len(p), 2)
    exact = gd.PermutohedralLattice(p).filter(y)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(permutohedral, "KEY_BITS", 0)
        torch.testing.assert_close(gd.PermutohedralLattice(p).filter(y), exact, rtol=0, atol=1e-12)


def test_many_dimensions_do_not_fit_into_a_key_and_are_still_told_apart():
    p = randn(40, 24)
    lattice = gd.PermutohedralLattice(p)
    assert (lattice.filter(torch.eye(40, **f64)).diagonal() > 0).all()
    torch.testing.assert_close(gd.gaussian_transition(p).dense().sum(-1), torch.ones(40, **f64))


def test_keys_that_coincide_are_seen_and_drawn_anew(monkeypatch):
    p, y = randn(50, 3), randn(50, 2)
    exact = gd.PermutohedralLattice(p).filter(y)
    attempts = []

    def factors(spans, attempt):
        attempts.append(attempt)
        return ([1, 1, 1], False) if attempt == 0 else drawn(spans, attempt)

    drawn = permutohedral._factors
    monkeypatch.setattr(permutohedral, "_factors", factors)
    torch.testing.assert_close(gd.PermutohedralLattice(p).filter(y), exact, rtol=0, atol=1e-12)
    assert attempts == [0, 1]


# --- what a user sees


def test_gradients_are_those_of_the_weights_within_the_simplices():
    p, y = randn(6, 2).requires_grad_(), randn(6, 2).requires_grad_()

    def filtered(p, y):
        lattice = gd.PermutohedralLattice(p)
        return lattice.filter(y), lattice.filter(y, "down"), gd.gaussian_transition(p).log_degree

    assert gradcheck(filtered, (p, y))
    with torch.no_grad():
        assert not gd.gaussian_transition(p).log_degree.requires_grad


def test_both_ways_to_a_product_agree_in_either_precision():
    for dtype, close in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
        p, y = randn(200, 3).to(dtype), randn(2, 200, 5, dtype=dtype)
        P = gd.gaussian_transition(p)
        plain, recorded = P @ y, P @ y.clone().requires_grad_()
        assert plain.dtype == recorded.dtype == dtype
        torch.testing.assert_close(plain, recorded.detach(), rtol=0, atol=close)
        torch.testing.assert_close(P.T @ y, (P.T @ y.clone().requires_grad_()).detach(), rtol=0, atol=close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_batch_mates_do_not_change_a_bit(dtype):
    P, y = gd.gaussian_transition(randn(300, 3).to(dtype)), randn(3, 300, 7, dtype=dtype)
    for walk in (P, P.T):
        together = walk @ y
        for i in range(3):
            assert torch.equal(together[i], walk @ y[i].clone())


def test_half_precision_is_multiplied_in_float32():
    p, y = randn(50, 2).bfloat16(), randn(50, 2).bfloat16()
    P = gd.gaussian_transition(p)
    exact = P.to(torch.float64) @ y.double()
    assert (P @ y).dtype == P.log_degree.dtype == torch.bfloat16
    assert ((P @ y).double() - exact).abs().max() < 0.01


def test_float32_is_certified_and_the_bound_holds():
    P, s = gd.gaussian_transition(randn(400, 2, dtype=torch.float32)), randn(400, 3, dtype=torch.float32)
    sol = gd.solve(P, s, mu=0.9)
    assert sol.converged.all()
    D = P.to(torch.float64).dense()
    exact = torch.linalg.solve(torch.eye(400, **f64) - 0.9 * D, 0.1 * s.double())
    assert ((sol.value.double() - exact).abs().amax(0) <= sol.error_bound).all()


def test_on_a_gpu_it_is_the_same_walk():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    p, y = randn(500, 5), randn(500, 4)
    P = gd.gaussian_transition(p.cuda())
    torch.testing.assert_close((P @ y.cuda()).cpu(), gd.gaussian_transition(p) @ y, rtol=0, atol=1e-12)
    torch.testing.assert_close((gd.gaussian_transition(p).to("cuda") @ y.cuda()).cpu(), (P @ y.cuda()).cpu())


@pytest.mark.parametrize(
    ("positions", "error", "message"),
    [
        ([[0.0]], TypeError, r"positions: expected a torch.Tensor, got list"),
        (torch.zeros(3, 2, dtype=torch.int64), TypeError, r"positions: expected a real floating-point"),
        (torch.zeros(3), ValueError, r"positions: expected points \[N, D\], not empty, got \[3\]"),
        (torch.zeros(0, 2), ValueError, r"positions: .* got \[0, 2\]"),
        (torch.tensor([[torch.nan]]), ValueError, r"positions: expected finite values, got 1"),
        (torch.tensor([[1e10]]), ValueError, r"within ±1e\+09 standard deviations, got 1e\+10; divide by"),
    ],
)
def test_bad_positions(positions, error, message):
    with pytest.raises(error, match=message):
        gd.gaussian_transition(positions)


def test_bad_signals():
    lattice = gd.PermutohedralLattice(torch.zeros(3, 2))
    with pytest.raises(TypeError, match=r"y: expected dtype torch.float32 like the positions"):
        lattice.filter(torch.zeros(3, 1, **f64))
    with pytest.raises(ValueError, match=r"y: .*3"):
        lattice.filter(torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"""order: expected "up", "down" or "both", got 'sideways'"""):
        lattice.filter(torch.zeros(3), "sideways")
    assert lattice.filter(torch.ones(3)).shape == (3,)
