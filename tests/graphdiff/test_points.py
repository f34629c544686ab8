"""SparseTransition.from_points: exact neighbours, and a walk between them that never underflows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import graphdiff as gd
from graphdiff.operators import neighbours
from graphdiff.operators.neighbours import nearest_pairs

from_points = gd.SparseTransition.from_points


def randn(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_sorting(x, k):
    """Pairs by sorting all distances: what is nearest, and by number where that is equal."""
    squares = (x.unsqueeze(1) - x).square().sum(-1).fill_diagonal_(torch.inf)
    near = torch.zeros(len(x), len(x), dtype=torch.bool)
    near.scatter_(1, squares.argsort(dim=-1, stable=True)[:, : min(k, len(x) - 1)], True)
    return (near | near.T).triu().nonzero()


@pytest.mark.parametrize("dimensions", [1, 3, 12, 13, 40])
@given(n=st.integers(1, 40), k=st.integers(1, 50), seed=st.integers(0, 1000))
def test_neighbours_are_exact(dimensions, n, k, seed):
    x = randn(n, dimensions, seed=seed)
    assert torch.stack(nearest_pairs(x, k), -1).equal(by_sorting(x, k))


@pytest.mark.parametrize("dimensions", [3, 30])
@pytest.mark.parametrize("size", [1e-9, 1e-3, 1.0])
def test_neighbours_that_products_cannot_tell_apart(monkeypatch, dimensions, size):
    """Clusters far smaller than their distances, far from 0, in blocks of a row or two and by tree."""
    monkeypatch.setattr(neighbours, "BLOCK_ELEMENTS", 200)
    x = randn(8, 1, dimensions) + size * randn(8, 9, dimensions, seed=4)
    x = x.reshape(72, dimensions)[torch.randperm(72, generator=torch.Generator().manual_seed(5))] + 100
    expected = by_sorting(x, 4)
    for most in (0, 100):
        monkeypatch.setattr(neighbours, "MOST_DIMENSIONS_OF_A_TREE", most)
        assert torch.stack(nearest_pairs(x, 4), -1).equal(expected)


def test_the_walk_is_reversible():
    P = from_points(3 * randn(30, 2), 4, 1.0)
    flow = (P.log_degree - P.log_degree.max()).exp().unsqueeze(-1) * P.dense()
    torch.testing.assert_close(flow, flow.T, rtol=1e-10, atol=0)
    assert P.log_degree.max() - P.log_degree.min() > 3


@pytest.mark.parametrize("dimensions", [2, 20])
@pytest.mark.parametrize("copies", [2, 9, 60])
def test_copies_of_a_point_are_its_nearest_and_no_loop(dimensions, copies):
    x = randn(4, dimensions).repeat(copies, 1)
    P = from_points(x, 3, 1.0)
    D = P.dense()
    assert (D.diagonal() == 0).all()
    assert ((D > 0).sum(-1) >= 3).all()
    if copies > 4:  # then all three are copies, at distance 0
        for node in range(4):
            assert D[node, node::4].sum() == pytest.approx(1)
    assert all(torch.stack(nearest_pairs(x, 3)).equal(torch.stack(nearest_pairs(x, 3))) for _ in range(5))


def test_ties_of_a_plain_grid_are_broken_the_same_way_every_time():
    axis = torch.arange(6.0)
    x = torch.cartesian_prod(axis, axis).double()
    for dimensions in (2, 20):
        y = torch.nn.functional.pad(x, (0, dimensions - 2))
        first = from_points(y, 3, 1.0)
        assert first.reversible
        for _ in range(3):
            assert from_points(y.clone(), 3, 1.0).dense().equal(first.dense())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_far_points_are_not_left_alone(dtype):
    """exp(−10^8/2) is nothing in any dtype; the walk leaves such a point all the same, for its nearest."""
    x = torch.tensor([[0.0], [1.0], [2.0], [10000.0], [10500.0]], dtype=dtype)
    P = from_points(x, 2, bandwidth=1.0)
    D = P.dense()
    assert D.dtype == dtype
    torch.testing.assert_close(D.sum(-1), torch.ones(5, dtype=dtype))
    assert D[3, 4] == 1
    assert D[4, 3] == 1
    assert P.log_degree.isfinite().all()
    assert from_points(x, 2, bandwidth=1e-200).dense().isfinite().all()


def test_what_it_is_good_for():
    """Two rings, one label each: the labels follow the rings."""
    angle = torch.linspace(0, 2 * torch.pi, 101).double()[:-1]
    ring = torch.stack([angle.cos(), angle.sin()], -1)
    x = torch.cat([ring, 2 * ring])
    s = torch.zeros(200, 2, dtype=torch.float64)
    s[0, 0] = s[100, 1] = 1
    y = gd.diffuse(from_points(x, 4, 0.2), s, 0.99)
    assert (y[:100].argmax(1) == 0).all()
    assert (y[100:].argmax(1) == 1).all()


def test_gradients_in_points_and_bandwidth():
    x, h = randn(7, 2).requires_grad_(), torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    s = randn(7, 2, seed=5)

    def smoothed(x, h):
        return gd.diffuse(from_points(x, 3, h), s, 0.8, tol=1e-13, on_failure="ignore")

    assert gradcheck(smoothed, (x, h))
    assert gradgradcheck(smoothed, (x, h), atol=1e-4)
    # A copy has distance 0, where the root of a square would have no gradient.
    twice = torch.cat([x.detach(), x.detach()]).requires_grad_()
    from_points(twice, 3, h).values.square().sum().backward()
    assert twice.grad.isfinite().all()


def test_a_number_and_a_tensor_are_one_bandwidth():
    x = randn(9, 3)
    assert from_points(x, 2, 0.5).dense().equal(from_points(x, 2, torch.tensor(0.5)).dense())
    torch.testing.assert_close(from_points(2 * x, 2, 1.0).dense(), from_points(x, 2, 0.5).dense())


X = torch.randn(5, 2)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": X.tolist()}, TypeError, r"x: expected a torch.Tensor, got list"),
        ({"x": X.long()}, TypeError, r"x: expected a real floating-point tensor"),
        ({"x": X[0]}, ValueError, r"x: expected points \[N, D\], not empty, got \[2\]"),
        ({"x": X[:0]}, ValueError, r"x: .* got \[0, 2\]"),
        ({"x": X[None]}, ValueError, r"x: .* got \[1, 5, 2\]"),
        ({"x": X * torch.nan}, ValueError, r"x: expected finite values"),
        ({"k": 0}, ValueError, r"k: expected an integer ≥ 1, got 0"),
        ({"k": 2.0}, ValueError, r"k: expected an integer ≥ 1, got 2.0"),
        ({"bandwidth": 0.0}, ValueError, r"bandwidth: expected a finite number > 0, got 0.0"),
        ({"bandwidth": "median"}, ValueError, r"bandwidth: .* got 'median'"),
        ({"bandwidth": torch.tensor(-1.0)}, ValueError, r"bandwidth: .* got -1.0"),
        ({"bandwidth": torch.ones(2)}, ValueError, r"bandwidth: expected shape \[\], one number, got \[2\]"),
        ({"bandwidth": torch.ones((), device="meta")}, ValueError, r"bandwidth: expected device cpu like x"),
    ],
)
def test_bad_input(change, error, message):
    with pytest.raises(error, match=message):
        from_points(**{"x": X, "k": 2, "bandwidth": 1.0} | change)
