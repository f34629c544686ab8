"""The attention walk against the dense softmax, by compiled tiles and by torch's strips; all gradients."""

import importlib.util

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

import graphdiff as gd
from graphdiff.operators import attention as attention_module
from graphdiff.operators import strips
from graphdiff.operators.attention import (
    _attention,
    _attention_backward,
    _attention_transposed,
    attention,
    attention_transposed,
)
from graphdiff.operators.held import whole_lines
from tests.graphdiff.zoo import check_that_no_number_stays_none

with_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="numba, the extra [compiled], is absent"
)
# Bytes of their vectors, nodes of a panel and channels of a sum: with AVX-512, and with none that is known.
PROCESSORS = ((64, 12, 8), (16, 6, 4))


def randn(*shape, seed=3, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.fixture(params=["tiles", "strips"])
def by(request, monkeypatch):
    """By compiled code, and as it is where numba is not installed."""
    if request.param == "strips":
        monkeypatch.setattr(attention_module, "_tiles", lambda: None)
    elif importlib.util.find_spec("numba") is None:
        pytest.skip("numba, the extra [compiled], is absent")
    return request.param


@pytest.fixture(params=[1, 2])
def threads(request):
    """With several threads strips are not used for small matrices, which are built."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def dense_attention(psi, weight, y):
    logits = psi @ psi.mT + weight.log().mT
    P = torch.softmax(logits, -1)
    return P @ y, logits.logsumexp(-1), P.mT @ y


@given(
    nodes=st.integers(1, 110),
    d=st.integers(1, 9),
    channels=st.integers(0, 9),
    size=st.sampled_from([0.1, 1.0, 3.0, 12.0]),
    rising=st.booleans(),
    rows=st.sampled_from(["tiles", 1, 4, 128, "whole"]),
    processor=st.sampled_from(PROCESSORS),
    hidden=st.integers(0, 5),
)
def test_attention_equals_the_dense_softmax_in_value_and_all_gradients(
    nodes, d, channels, size, rising, rows, processor, hidden
):
    """In tiles of every processor, in strips of every length, as a whole.

    Logits range over thousands, some nodes do not count, the largest of a row may come last.
    """
    if rows == "tiles" and importlib.util.find_spec("numba") is None:
        rows = 1
    weight = (torch.arange(nodes) >= min(hidden, nodes - 1)).double().unsqueeze(-1)
    lengths = torch.rand(2, nodes, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    lengths = lengths.sort(-2).values if rising else lengths
    psi = weight * size * lengths * randn(2, nodes, d)
    leaves = [psi.requires_grad_(), randn(2, nodes, channels, seed=5).requires_grad_()]
    with pytest.MonkeyPatch.context() as patch:
        if rows == "tiles":
            patch.setattr(attention_module._tiles(), "registers", lambda: processor)
        else:
            patch.setattr(attention_module, "_tiles", lambda: None)
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


def test_attention_where_the_largest_logit_of_a_row_is_not_found_in_the_sample(threads, by):
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


def test_attention_derivatives_of_every_order(threads, by):
    psi, y = randn(2, 5, 2).requires_grad_(), randn(2, 5, 3).requires_grad_()

    def both(psi, y):
        P = gd.AttentionTransition(psi, scale=0.8)
        return P.matmul(y), P.rmatmul(y), P.log_degree

    assert gradcheck(both, (psi, y))
    assert gradgradcheck(both, (psi, y))
    assert gradcheck(lambda psi: gd.AttentionTransition(psi).rows([0, 3]), (psi,))


@pytest.mark.parametrize("whole", [False, True])
def test_attention_is_a_well_behaved_operator_of_torch(whole, by):
    psi, y = randn(2, 6, 3).requires_grad_(), randn(2, 6, 4).requires_grad_()
    weight = torch.ones(2, 6, 1, dtype=torch.float64)
    value, lse, P = _attention(psi, weight, y, whole)
    torch.library.opcheck(_attention, (psi, weight, y, whole))
    torch.library.opcheck(_attention_transposed, (psi, weight, lse.detach().unsqueeze(-1), y))
    y, value, lse = (x.detach().requires_grad_() for x in (y, value, lse))
    torch.library.opcheck(_attention_backward, (psi, weight, y, value, lse, P, value, lse))


def test_the_matrix_is_kept_where_it_is_small_and_threads_share_the_work(monkeypatch):
    """And there alone, for it is the memory of the backward; and not where numba is installed."""
    monkeypatch.setattr(attention_module, "_tiles", lambda: None)
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
    monkeypatch.undo()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    psi = randn(2, 40, 3).requires_grad_()
    assert kept() is (importlib.util.find_spec("numba") is None)


def test_attention_in_half_precision_multiplies_in_float32(by):
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


def test_degrees_that_were_found_belong_to_the_features_they_were_found_for(by):
    """Copies in as many digits share them; those of rounded features have their own."""
    P = gd.AttentionTransition(randn(20, 6, dtype=torch.float32))
    P @ randn(20, 2, dtype=torch.float32)
    narrow = P.to(torch.bfloat16)
    for other in (P.to(torch.float64), narrow.to(torch.float32), narrow.to(torch.float64), P):
        fresh = gd.AttentionTransition(other.psi.clone())
        torch.testing.assert_close(other.log_degree, fresh.log_degree, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(other.log_degree, (other.psi @ other.psi.mT).logsumexp(-1))


def test_hub_attention_is_stable_where_degrees_span_hundreds_of_orders(threads, by):
    psi = randn(30, 4) * torch.linspace(1, 12, 30, dtype=torch.float64).unsqueeze(-1)
    spread = gd.AttentionTransition(psi).log_degree
    assert spread.max() - spread.min() > 400
    for dtype, close in ((torch.float64, 1e-10), (torch.float32, 1e-3)):
        P = gd.AttentionTransition(psi.to(dtype))
        D = torch.softmax(psi @ psi.mT, -1)
        s = randn(30, 2)
        assert ((P.T @ s.to(dtype)).double() - D.mT @ s).abs().max() < close


@pytest.mark.slow
def test_memory_of_attention_does_not_grow_with_the_square_of_nodes():
    resource = pytest.importorskip("resource")
    psi = randn(20_000, 16).requires_grad_()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (gd.AttentionTransition(psi) @ randn(20_000, 4)).sum().backward()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < 100e6  # the matrix alone is 3.2e9 bytes


# --- tiles


@with_numba
def test_no_threads_and_no_neighbour_change_a_bit_of_tiles(monkeypatch):
    """Threads are torch's team, or Python's where that is not to be had, or one."""
    from graphdiff.operators import threads as threads_module

    psi, y, g = (randn(301, c, dtype=torch.float32, seed=c).requires_grad_() for c in (7, 11, 11))

    def everything(y, g):
        P = gd.AttentionTransition(psi)
        value, back = P @ y, P.T @ g
        return value, back, *torch.autograd.grad(value, (psi, y), g.detach())

    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    alone = everything(y, g)
    for count, team in ((2, None), (3, None), (2, 0), (5, 0)):
        monkeypatch.setattr(torch, "get_num_threads", lambda count=count: count)
        if team is not None:
            monkeypatch.setattr(threads_module, "team", lambda: 0)
        for one, many in zip(alone, everything(y, g), strict=True):
            assert torch.equal(one, many)
    for k in range(11):
        few = everything(y[:, k : k + 1], g[:, k : k + 1])
        assert torch.equal(few[0], alone[0][:, k : k + 1])
        assert torch.equal(few[1], alone[1][:, k : k + 1])


@with_numba
@given(
    nodes=st.integers(1, 150),
    size=st.sampled_from([0.1, 3.0, 12.0]),
    processor=st.sampled_from(PROCESSORS),
    hidden=st.integers(0, 5),
)
def test_the_matrix_that_is_held_is_the_softmax_filled_up_with_0(nodes, size, processor, hidden):
    weight = (torch.arange(nodes) >= min(hidden, nodes - 1)).double().unsqueeze(-1)
    psi, tiles = weight * size * randn(nodes, 4), attention_module._tiles()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiles, "registers", lambda: processor)
        width = whole_lines(nodes, psi.dtype)
        P, lse = tiles.matrix(psi, weight, width)
    logits = psi @ psi.mT + weight.log().mT
    torch.testing.assert_close(P[:nodes, :nodes], torch.softmax(logits, -1), rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, logits.logsumexp(-1), rtol=1e-13, atol=1e-13)
    assert P.shape == (width, width)
    assert P[nodes:].count_nonzero() == P[:, nodes:].count_nonzero() == 0
    # A row that is a little too heavy everywhere would weigh on the slowest mode of a solve.
    assert (P[:nodes].sum(-1) - 1).abs().max() < 4e-15 * nodes**0.5


@with_numba
@pytest.mark.parametrize(("dtype", "floor"), [(torch.float32, -70.0), (torch.float64, -680.0)])
def test_exponentials_are_right_to_two_units_in_the_last_place(dtype, floor):
    """With ψ = 0 and one signal for each node, Pᵀ is made of exp(−lse)."""
    x = torch.cat([torch.linspace(floor, 0, 400), torch.linspace(-1, 0, 200), torch.tensor([1.01 * floor])])
    x, nodes = x.to(dtype), 601
    given = torch.zeros(nodes, 2, dtype=dtype), torch.ones(nodes, 1, dtype=dtype), -x.unsqueeze(-1)
    (found,) = attention_module._tiles().transposed(*given, torch.eye(nodes, dtype=dtype))
    assert (found == found[0]).all()
    exact = np.exp(x.numpy().astype(np.longdouble))
    off = np.abs(found[0].numpy() / exact - 1)[:-1].max()
    assert off <= 2 * torch.finfo(dtype).eps
    assert found[0, 399] == found[0, -2] == 1
    assert found[0, -1] == 0


@with_numba
def test_torchs_own_team_of_threads_is_found_where_torch_brings_it_along():
    from pathlib import Path

    from graphdiff.operators import threads

    brought = (Path(torch.__file__).parent / "lib" / "libgomp.so.1").exists()
    assert bool(threads.team()) is brought


def test_what_is_no_number_stays_none(by):
    check_that_no_number_stays_none(torch.device("cpu"))


def test_many_small_terms_count_beside_a_large_one(by):
    """Each of 30,000 is a quarter of what float32 can tell from 1; together they are a thousandth."""
    psi, y = torch.full((30_000, 2), 0.0), torch.zeros(30_000, 1)
    psi[:, 0], psi[0, 0], y[0] = -0.2, 4.06, 1
    exact = torch.softmax((psi.double() @ psi[0].double()), 0) @ y.double()
    assert 0.998 < exact < 0.9995
    # Lost, they would make this 1, off by 9e-4. Tiles round once for each few panels: up to 8e-5 in all.
    assert ((gd.AttentionTransition(psi) @ y)[0].double() - exact).abs() < 1e-4
