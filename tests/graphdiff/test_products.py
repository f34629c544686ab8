"""Compiled products of a stored matrix: against float64, as on several processors, by any threads."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import graphdiff as gd
from graphdiff.operators.held import whole_lines

products = pytest.importorskip(
    "graphdiff.operators.products", reason="numba, the extra [compiled], is absent", exc_type=ImportError
)


def matrix(nodes, dtype, seed=3):
    """A walk, and the same filled up to whole lines."""
    W = torch.rand(nodes, nodes, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    P, filled = W / W.sum(-1, keepdim=True), torch.zeros((whole_lines(nodes, dtype),) * 2, dtype=dtype)
    filled[:nodes, :nodes] = P
    return P, filled


@given(
    nodes=st.integers(1, 300),
    channels=st.sampled_from([2, 11, 21]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    processor=st.sampled_from([(64, 12, 8), (16, 6, 4)]),
)
def test_both_products_are_those_of_float64(nodes, channels, dtype, processor):
    P, filled = matrix(nodes, dtype)
    y = torch.randn(nodes, 2 * channels, generator=torch.Generator().manual_seed(4), dtype=dtype)[:, ::2]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "registers", lambda: processor)
        if not products.suits(P, channels):
            return
        for found, expected in (
            (products.product(filled, y), P.double() @ y.double()),
            (products.transposed(filled, y), P.double().mT @ y.double()),
        ):
            bound = (nodes + 4) * torch.finfo(dtype).eps * y.double().abs().max() * (P.double().sum(-2).max())
            assert (found.double() - expected).abs().max() <= bound


def test_no_threads_and_no_neighbour_change_a_bit(monkeypatch):
    from graphdiff.operators import threads

    _, P = matrix(700, torch.float32)
    # A solve is of no interest to autograd, whatever its signals are.
    y = torch.randn(700, 8, generator=torch.Generator().manual_seed(5)).requires_grad_()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = products.product(P, y), products.transposed(P, y)
    for count, team in ((2, True), (3, True), (3, False)):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        if not team:
            monkeypatch.setattr(threads, "team", lambda: 0)
        for one, many in zip(alone, (products.product(P, y), products.transposed(P, y)), strict=True):
            assert torch.equal(one, many)
    some = y[:, 2:5]
    for one, few in zip(alone, (products.product(P, some), products.transposed(P, some)), strict=True):
        assert torch.equal(one[:, 2:5], few)


def test_many_small_terms_count_beside_a_large_one():
    """Each of 4,000 is a quarter of what float32 can tell from 1; together they are a ten-thousandth."""
    P = torch.zeros(4000, 4000)
    P[0], P[:, 0] = 3e-8, 3e-8
    P[0, 0] = 1
    y = torch.ones(4000, 2)
    for found in (products.product(P, y), products.transposed(P, y)):
        assert (found[0].double() - (1 + 3999 * 3e-8)).abs().max() < 1e-5


def test_a_subclass_of_dense_walks_multiplies_in_its_own_way():
    """In a solve too, where other dense walks have compiled products."""

    class Twice(gd.DenseTransition):
        asked = 0

        def matmul(self, y):
            type(self).asked += 1
            return super().matmul(y)

    P, _ = matrix(300, torch.float64)
    gd.solve(Twice(P), torch.eye(300, dtype=torch.float64)[:, :3], 0.9, solver=gd.solvers.Walk())
    assert Twice.asked > 2
    assert isinstance(gd.DenseTransition(P).held(), type(gd.AttentionTransition(P).held()))
