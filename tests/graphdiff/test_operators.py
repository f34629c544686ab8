"""Transitions: products, transposes, rows and facts against the dense matrix."""

import pytest
import torch
from hypothesis import given
from torch.autograd import gradgradcheck

import graphdiff as gd
from graphdiff.operators import held as held_module
from graphdiff.operators.held import HeldTransition
from tests.graphdiff.zoo import OPERATORS, Problem, problems


def randn(*shape, seed=3, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@given(problems())
def test_products_and_rows_equal_the_dense_matrix(problem: Problem):
    P, D, y = problem.P, problem.dense, problem.s
    size = y.abs().max()
    torch.testing.assert_close(P @ y, D @ y, rtol=0, atol=float(1e-12 * size))
    torch.testing.assert_close(P.T @ y, D.mT @ y, rtol=0, atol=float(1e-11 * size))
    torch.testing.assert_close(P.dense(), D, rtol=0, atol=1e-12)
    torch.testing.assert_close(P.T.dense(), D.mT, rtol=0, atol=1e-12)
    index = torch.arange(P.shape[-1]).flip(0)[:2]
    torch.testing.assert_close(P.rows(index), D[..., index, :], rtol=0, atol=1e-12)
    torch.testing.assert_close(P.T.rows(index), D.mT[..., index, :], rtol=0, atol=1e-12)
    assert P.T.T is P
    assert P.T.shape == P.shape


@given(problems())
def test_rows_sum_to_one_and_the_transpose_conserves_mass(problem: Problem):
    ones = torch.ones_like(problem.s)
    torch.testing.assert_close(problem.P @ ones, ones, rtol=1e-13, atol=0)
    size = float(problem.s.abs().sum())
    torch.testing.assert_close(
        (problem.P.T @ problem.s).sum(-2), problem.s.sum(-2), rtol=0, atol=1e-12 * size
    )


@given(problems())
def test_adjoint_identity(problem: Problem):
    x, y = problem.s, problem.s.flip(-2)
    left, right = ((problem.P @ x) * y).sum(), (x * (problem.P.T @ y)).sum()
    torch.testing.assert_close(left, right, rtol=0, atol=float(1e-12 * x.abs().max() ** 2 * x.numel()))


@given(problems(tuple(name for name, kind in OPERATORS.items() if kind.relabelled)))
def test_relabelling_nodes_relabels_products(problem: Problem):
    n = problem.s.shape[-2]
    order = torch.randperm(n, generator=torch.Generator().manual_seed(7))
    leaf = problem.leaf
    for dimension in OPERATORS[problem.name].relabelled:
        leaf = leaf.index_select(dimension, order)
    relabelled = OPERATORS[problem.name].build(leaf)
    torch.testing.assert_close(
        relabelled @ problem.s[..., order, :],
        (problem.P @ problem.s)[..., order, :],
        rtol=0,
        atol=float(1e-12 * problem.s.abs().max()),
    )


@given(problems())
def test_stated_facts_are_true(problem: Problem):
    P, D = problem.P, problem.dense
    if P.reversible:
        flow = (P.log_degree - P.log_degree.amax(-1, keepdim=True)).exp().unsqueeze(-1) * D
        torch.testing.assert_close(flow, flow.mT, rtol=1e-9, atol=1e-12)
    if P.positive_semidefinite:
        eigenvalues = torch.linalg.eigvals(D).real
        assert eigenvalues.min() > -1e-9
        assert eigenvalues.max() < 1 + 1e-9
    if P.shape[-1] > 2:
        assert P.reversible == OPERATORS[problem.name].reversible


def test_default_transpose_and_rows_come_from_the_product_alone():
    class Bare(gd.DenseTransition):
        rmatmul = gd.Transition.rmatmul
        rows = gd.Transition.rows
        dense = gd.Transition.dense

    D = torch.softmax(randn(5, 5), -1)
    P, y = Bare(D), randn(5, 2).requires_grad_()
    torch.testing.assert_close(P.T @ y, D.T @ y)
    torch.testing.assert_close(P.rows([3, 1]), D[[3, 1]])
    torch.testing.assert_close(P.dense(), D)
    assert gradgradcheck(lambda v: P.T @ v.sin(), (y,))


def test_one_signal_comes_back_as_it_was_given():
    P = gd.AttentionTransition(randn(4, 2))
    assert (P @ randn(4)).shape == (4,)
    assert (P @ randn(4, 1)).shape == (4, 1)
    assert (gd.AttentionTransition(randn(3, 4, 2)) @ randn(4)).shape == (3, 4)


def test_to_changes_dtype_and_keeps_everything_else():
    P = gd.AttentionTransition(randn(4, 2), scale=0.5)
    Q = P.T.to(torch.float32)
    assert Q.dtype == torch.float32
    assert Q.T.scale == 0.5
    assert P.to(torch.float64) is P
    W = randn(4, 4).abs()
    assert gd.DenseTransition.from_affinity(W + W.T).to(torch.float32).reversible
    with pytest.raises(TypeError, match="floating-point dtype"):
        P.to(torch.int64)


def test_affinities_of_any_size_are_normalised():
    W = torch.tensor([[1e-320, 1e-320], [1e308, 1e308]], dtype=torch.float64)
    torch.testing.assert_close(gd.DenseTransition.from_affinity(W).P, torch.full_like(W, 0.5))


@pytest.fixture(params=[1, 2])
def threads(request):
    """With several threads they share the work, and without numba attention builds small matrices."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("padded", [False, True])
def test_a_held_walk_is_the_walk_itself(monkeypatch, padded):
    psi, y = randn(2, 21, 4), randn(2, 21, 3, seed=4)
    mask = torch.arange(21).expand(2, 21) < torch.tensor([[21], [9]]) if padded else None
    P = gd.AttentionTransition(psi, scale=0.7, mask=mask)
    held = P.held()
    assert isinstance(held, HeldTransition)
    for walk, same in ((P, held), (P.T, P.T.held()), (P.T, held.T)):
        torch.testing.assert_close(same.matmul(y), walk.matmul(y), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(same.log_degree, walk.log_degree, rtol=1e-13, atol=1e-13)
        assert (same.reversible, same.positive_semidefinite, same.stochastic, same.mask is walk.mask) == (
            *(True, True, walk.stochastic),
            True,
        )
        for rounding in ("rounding", "transposed_rounding", "degree_rounding"):
            assert torch.equal(getattr(same, rounding)(torch.float64), getattr(walk, rounding)(torch.float64))
    assert repr(held) == repr(P)
    monkeypatch.setattr(held_module, "LARGEST", 2 * 21 * 21 * 8 - 1)
    assert P.held() is P
    assert P.T.held().T is P


# --- batches


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [5, 13, 33, 64, 131])
def test_batch_mates_do_not_change_a_bit_of_a_product(n, dtype, threads):
    """Sizes that are and are not whole lines of memory: that is where kernels begin to round differently."""
    for channels, d in ((1, 5), (5, 20), (21, 64)):
        psi, y = randn(3, n, d, dtype=dtype), randn(3, n, channels, dtype=dtype)
        W = randn(3, n, n, dtype=dtype).abs()
        for build, leaf in ((gd.AttentionTransition, psi), (gd.DenseTransition.from_affinity, W)):
            for product in (lambda P, y: P @ y, lambda P, y: P.T @ y):
                together = product(build(leaf), y)
                for i in range(3):
                    assert torch.equal(together[i], product(build(leaf[i].clone()), y[i].clone()))
