"""Transitions: products, transposes, rows and facts against the dense matrix."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import graphdiff as gd
from graphdiff.operators import attention as attention_module
from graphdiff.operators import held as held_module
from graphdiff.operators import strips
from graphdiff.operators.attention import (
    _attention,
    _attention_backward,
    _attention_transposed,
    attention,
    attention_transposed,
)
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


# --- attention: value, log-sum-exp, transposed product, every gradient


@pytest.fixture(params=[1, 2])
def threads(request):
    """With several threads small matrices are built."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def dense_attention(psi, weight, y):
    logits = psi @ psi.mT + weight.log().mT
    P = torch.softmax(logits, -1)
    return P @ y, logits.logsumexp(-1), P.mT @ y


@given(
    nodes=st.integers(1, 40),
    d=st.integers(1, 5),
    channels=st.integers(0, 7),
    size=st.sampled_from([0.1, 1.0, 3.0, 12.0]),
    rows=st.sampled_from([1, 4, 128, "whole"]),
    hidden=st.integers(0, 5),
)
def test_attention_equals_the_dense_softmax_in_value_and_all_gradients(
    nodes, d, channels, size, rows, hidden
):
    """Strips of every length or the whole matrix, logits ranging over thousands, nodes that do not count."""
    weight = (torch.arange(nodes) >= min(hidden, nodes - 1)).double().unsqueeze(-1)
    lengths = torch.rand(2, nodes, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    psi = weight * size * lengths * randn(2, nodes, d)
    leaves = [psi.requires_grad_(), randn(2, nodes, channels, seed=5).requires_grad_()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 2 if rows == "whole" else 1)
        patch.setattr(strips, "ROWS", 1 if rows == "whole" else rows)
        patch.setattr(strips, "CACHED_ELEMENTS", 0)

        def found(psi, y):
            value, lse = attention(psi, weight, y)
            return value, lse, attention_transposed(psi, weight, lse.detach(), y)

        got, expected = found(*leaves), dense_attention(leaves[0], weight, leaves[1])
        cotangents = [randn(*out.shape, seed=6 + i) for i, out in enumerate(expected)]
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
        scale = max(1.0, size * size)
        g_psi, g_y = torch.autograd.grad(got, leaves, cotangents)
        expected_psi, expected_y = torch.autograd.grad(expected, leaves, cotangents)
        # ψ of nodes that do not count is 0 by contract, and its gradient nobody's.
        torch.testing.assert_close(weight * g_psi, weight * expected_psi, rtol=1e-10, atol=1e-10 * scale)
        torch.testing.assert_close(g_y, expected_y, rtol=1e-10, atol=1e-10 * scale)


def test_attention_where_the_largest_logit_of_a_row_is_not_found_in_the_sample(threads):
    """Short nodes along e₁, whose best partners are hidden behind longer ones that they do not see."""
    psi = torch.zeros(200, 3)
    psi[:5, 0], psi[5:100, 0], psi[100:, 1] = 1.0, 200.0, 201.0
    psi[:, 2] = randn(200, dtype=torch.float32)
    y = randn(200, 3, dtype=torch.float32)
    exact = dense_attention(psi.double(), torch.ones(200, 1, dtype=torch.float64), y.double())
    P = gd.AttentionTransition(psi)
    assert (strips._levels(psi)[:5] < psi[:5] @ psi.mT.amax(-1) - 100).all()
    for got, expected in zip((P @ y, P.log_degree, P.T @ y), exact, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-2)


def test_attention_derivatives_of_every_order(threads):
    psi, y = randn(2, 5, 2).requires_grad_(), randn(2, 5, 3).requires_grad_()

    def both(psi, y):
        P = gd.AttentionTransition(psi, scale=0.8)
        return P.matmul(y), P.rmatmul(y), P.log_degree

    assert gradcheck(both, (psi, y))
    assert gradgradcheck(both, (psi, y))
    assert gradcheck(lambda psi: gd.AttentionTransition(psi).rows([0, 3]), (psi,))


@pytest.mark.parametrize("whole", [False, True])
def test_attention_is_a_well_behaved_operator_of_torch(whole):
    psi, y = randn(2, 6, 3).requires_grad_(), randn(2, 6, 4).requires_grad_()
    weight = torch.ones(2, 6, 1, dtype=torch.float64)
    value, lse, P = _attention(psi, weight, y, whole)
    torch.library.opcheck(_attention, (psi, weight, y, whole))
    torch.library.opcheck(_attention_transposed, (psi, weight, lse.detach().unsqueeze(-1), y))
    y, value, lse = (x.detach().requires_grad_() for x in (y, value, lse))
    torch.library.opcheck(_attention_backward, (psi, weight, y, value, lse, P, value, lse))


def test_the_matrix_is_kept_where_it_is_small_and_threads_share_the_work(monkeypatch):
    """And there alone, for it is the memory of the backward."""
    psi = randn(2, 40, 3).requires_grad_()

    def kept():
        y, saved = randn(len(psi), 40, 2), []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.shape) or x, lambda x: x):
            gd.AttentionTransition(psi) @ y
        return (len(psi), 40 * 40) in saved

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert not kept()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert kept()
    monkeypatch.setattr(attention_module, "WHOLE", 40 * 40 * 8 - 1)
    assert not kept()
    monkeypatch.setattr(attention_module, "WHOLE", 40 * 40 * 8)
    assert kept()
    psi = randn(3, 40, 3).requires_grad_()
    assert not kept()


def test_attention_in_half_precision_multiplies_in_float32():
    # Norms near 64, where neighbouring bfloat16 numbers differ by 0.5 and softmax by a factor 1.6.
    psi = (randn(50, 64, dtype=torch.float32)).bfloat16()
    y = randn(50, 2, dtype=torch.float32).bfloat16()
    exact = torch.softmax(psi.double() @ psi.double().mT, -1) @ y.double()
    P = gd.AttentionTransition(psi)
    assert (P @ y).dtype == torch.bfloat16
    assert ((P @ y).double() - exact).abs().max() < 0.01
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = gd.AttentionTransition(psi.float()) @ y.float()
    assert product.dtype == torch.float32
    assert (product.double() - exact).abs().max() < 1e-5


def test_hub_attention_is_stable_where_degrees_span_hundreds_of_orders(threads):
    psi = randn(30, 4) * torch.linspace(1, 12, 30, dtype=torch.float64).unsqueeze(-1)
    spread = gd.AttentionTransition(psi).log_degree
    assert spread.max() - spread.min() > 400
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        P = gd.AttentionTransition(psi.to(dtype))
        D = torch.softmax(psi @ psi.mT, -1)
        s = randn(30, 2)
        assert ((P.T @ s.to(dtype)).double() - D.mT @ s).abs().max() < close


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


@pytest.mark.slow
def test_memory_of_attention_does_not_grow_with_the_square_of_nodes():
    resource = pytest.importorskip("resource")
    psi = randn(20_000, 16).requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (gd.AttentionTransition(psi) @ randn(20_000, 4)).sum().backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 100e6  # the matrix alone is 3.2e9 bytes


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
