"""The attention walk's kernels for a GPU; where there is none, by Triton's interpreter, which has no TF32."""

import importlib.util
import math
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graphdiff as gd
from graphdiff.operators import attention as attention_module
from graphdiff.operators import base
from tests.graphdiff.zoo import check_that_no_number_stays_none

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

import triton
from triton import language as tl

from graphdiff.operators import fused

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if GPU else torch.device("cpu")


@triton.jit
def _counting(into, last):
    total = 0
    for k in range(0, last):
        total += k
    tl.store(into, total)


def counts():
    """Whether kernels run here at all: the interpreter of Triton 3.6 fails with numpy 2.5."""
    found = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    try:
        _counting[(1,)](found, 4)
    except Exception:
        return False
    return int(found) == 6


runs = pytest.mark.skipif(
    not GPU and not counts(), reason="Triton's interpreter does not run in this environment"
)


def randn(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture
def everywhere(monkeypatch):
    """Attention walks of float32 go by these kernels on any device."""
    monkeypatch.setattr(
        attention_module, "_fused", lambda device, dtype, features: fused if dtype == torch.float32 else None
    )


def dense(psi, weight, y, g):
    P = torch.softmax(psi @ psi.mT + weight.log().mT, -1)
    return P @ y, (psi @ psi.mT + weight.log().mT).logsumexp(-1), P.mT @ g


@runs
@settings(max_examples=20)
@given(
    graphs=st.integers(1, 2),
    nodes=st.integers(1, 140),
    d=st.sampled_from([1, 2, 15, 16, 17, 64, 65, 128]),
    channels=st.sampled_from([0, 1, 15, 16, 21, 63, 64, 70]),
    size=st.sampled_from([0.1, 1.0, 6.0]),
    hidden=st.integers(0, 40),
)
def test_products_and_gradients_are_those_of_the_dense_softmax(graphs, nodes, d, channels, size, hidden):
    """Where nodes, features and signals fill what a program takes and where not; up to the stated bound."""
    weight = (torch.arange(nodes) >= min(hidden, nodes - 1)).double().expand(graphs, -1).unsqueeze(-1)
    psi = weight * size * randn(graphs, nodes, d) / d**0.5
    y, g = randn(graphs, nodes, channels, seed=5), randn(graphs, nodes, channels, seed=6)
    psi, y, g = (x.float().double() for x in (psi, y, g))
    leaves = psi.requires_grad_(), y.requires_grad_()
    exact = dense(*leaves[:1], weight, leaves[1], g)
    g_lse = randn(graphs, nodes, seed=7)
    g_psi, g_y = torch.autograd.grad(exact[:2], leaves, (g, g_lse))
    single = [x.detach().float().to(DEVICE).contiguous() for x in (psi, weight, y, g, g_lse)]
    value, lse, back, found_psi, found_y = fused._everything(fused, *single)
    # ψ of nodes that do not count is 0 by contract, and its gradient nobody's.
    found = value, lse, back, weight.to(DEVICE) * found_psi, found_y
    each, besides = fused.ROUNDING
    largest = float(psi.detach().square().sum(-1).max())
    off = (each * (nodes + (d + 3) * largest) + besides * (1 + largest)) * torch.finfo(torch.float32).eps
    sizes = [1.0, max(1.0, largest), 1.0, max(1.0, size) * (1 + channels), 1.0]
    for a, b, scale in zip(found, (*exact, weight * g_psi, g_y), sizes, strict=True):
        most = float(b.detach().abs().max()) if b.numel() else 0.0
        torch.testing.assert_close(a.double().cpu(), b, rtol=0, atol=2 * off * scale * (5 + most))


@runs
def test_a_graph_has_its_bits_in_any_batch_and_in_every_run():
    psi, y, g = (randn(3, 130, c, seed=c).float().to(DEVICE) for c in (5, 21, 22))
    g, g_lse, weight = g[..., :21].contiguous(), y[..., 0].contiguous(), torch.ones_like(psi[..., :1])
    together = fused._everything(fused, psi, weight, y, g, g_lse)
    for one in (1, 1, 2):
        alone = fused._everything(fused, *(x[one : one + 1].contiguous() for x in (psi, weight, y, g, g_lse)))
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a[0], b[one])


@runs
def test_constants_stay_what_they_are():
    """To the bit, for a sum is divided by one that is made alike."""
    psi, y = randn(1, 500, 8).float().to(DEVICE), torch.ones(1, 500, 3, device=DEVICE)
    value, _ = fused.forward(psi, torch.ones_like(psi[..., :1]), y)
    assert (value == 1).all()


@runs
def test_a_walk_by_these_kernels_is_one_as_any_other(everywhere):
    psi = (randn(2, 70, 6) / 2).float().to(DEVICE)
    mask = (torch.arange(70) < torch.tensor([[70], [50]])).to(DEVICE)
    leaf, s = psi.clone().requires_grad_(), randn(2, 70, 3).float().to(DEVICE).requires_grad_()
    P = gd.AttentionTransition(leaf, scale=0.9, mask=mask)
    exact = gd.AttentionTransition(psi.double().cpu(), scale=0.9, mask=mask.cpu())
    wide = s.detach().double().cpu()
    for found, wanted in ((P @ s, exact @ wide), (P.T @ s, exact.T @ wide)):
        torch.testing.assert_close(found.double().cpu(), wanted, rtol=1e-4, atol=1e-5)
    solution = gd.solve(P, s, 0.9)
    assert solution.converged.all()
    off = (solution.value.double().cpu() - gd.diffuse(exact, wide, 0.9)).abs().amax(-2)
    assert (off <= solution.error_bound.cpu() + 1e-9).all()
    gradients = torch.autograd.grad(gd.diffuse(P, s, 0.9).square().sum(), (leaf, s))
    wide_leaf, wide_s = psi.double().cpu().requires_grad_(), wide.clone().requires_grad_()
    wide_P = gd.AttentionTransition(wide_leaf, scale=0.9, mask=mask.cpu())
    expected = torch.autograd.grad(gd.diffuse(wide_P, wide_s, 0.9).square().sum(), (wide_leaf, wide_s))
    for a, b in zip(gradients, expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-3, atol=1e-3)


@runs
def test_second_derivatives_go_through_these_kernels_too(everywhere):
    psi, y = (randn(1, 9, c, seed=c).float().to(DEVICE).requires_grad_() for c in (2, 3))

    def curvature(psi, y):
        first = torch.autograd.grad(
            (gd.AttentionTransition(psi) @ y).square().sum(), (psi, y), create_graph=True
        )
        return torch.autograd.grad(sum(x.square().sum() for x in first), (psi, y))

    found = curvature(psi, y)
    expected = curvature(*(x.detach().double().cpu().requires_grad_() for x in (psi, y)))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-3, atol=1e-3)


@runs
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_what_is_no_number_stays_none(everywhere):
    """The interpreter warns of such numbers."""
    check_that_no_number_stays_none(DEVICE)


def test_certificates_count_what_tensor_cores_lose(everywhere):
    P = gd.AttentionTransition(randn(40, 6).float().to(DEVICE))
    counted, wide = P.rounding(torch.float32), P.rounding(torch.float64)
    each = fused.ROUNDING[0]
    unit = torch.finfo(torch.float32).eps / torch.finfo(torch.float64).eps
    assert (counted > each * unit * wide).all()
    assert P.degree_rounding(torch.float32) > each * unit * P.degree_rounding(torch.float64)


def cut(x, unit):
    """Towards 0, to a multiple of the unit."""
    return np.trunc(x / unit) * unit


def by_tensor_cores(a, b):
    """Σ a b as three sums of TF32 products, each cutting off as ROUNDING takes it to; of float64 [m, n]."""
    halves = []
    for x in (a, b):
        upper = cut(x, np.spacing(np.abs(x).astype(np.float32)).astype(np.float64) * 2**13)
        rest = x - upper
        halves.append(
            (upper, cut(rest, np.spacing(np.abs(rest).astype(np.float32)).astype(np.float64) * 2**13))
        )
    (a_upper, a_lower), (b_upper, b_lower) = halves
    total = np.zeros(len(a))
    for left, right in ((a_lower, b_upper), (a_upper, b_lower), (a_upper, b_upper)):
        for k in range(0, a.shape[1], 8):
            terms = np.concatenate([total[:, None], left[:, k : k + 8] * right[:, k : k + 8]], 1)
            largest = np.abs(terms).max(1).astype(np.float32)
            last_place = np.spacing(largest).astype(np.float64)[:, None]
            total = cut(cut(terms, last_place).sum(1), last_place[:, 0])
    return total


@given(n=st.integers(1, 200), spread=st.sampled_from([0.0, 1.0, 6.0]), seed=st.integers(0, 99))
def test_the_bound_of_a_sum_holds_for_products_in_parts_that_are_cut_off(n, spread, seed):
    draw = np.random.default_rng(seed)
    a, b = (
        (draw.normal(size=(50, n)) * 10 ** (spread * draw.normal(size=(50, n)) / 2)).astype(np.float32)
        for _ in range(2)
    )
    a, b = (np.abs(x).astype(np.float64) if seed % 2 else x.astype(np.float64) for x in (a, b))
    each, besides = fused.ROUNDING
    allowed = (each * n + besides) * np.finfo(np.float32).eps * (np.abs(a) * np.abs(b)).sum(1)
    assert (np.abs(by_tensor_cores(a, b) - (a * b).sum(1)) <= allowed).all()


@runs
@pytest.mark.parametrize("fault", ["a mistake", "no compiler"])
def test_where_kernels_fail_torch_takes_their_place_and_that_is_told(fault, monkeypatch):
    def failing(*arguments):
        raise RuntimeError("Failed to find C compiler\nmore")

    def wrong(*arguments, right=fused.forward):
        value, lse = right(*arguments)
        return value + 0.01, lse

    assert fused.works.__wrapped__(DEVICE)
    monkeypatch.setattr(fused, "forward", wrong if fault == "a mistake" else failing)
    told = r"are off by \de-0[23] on" if fault == "a mistake" else r"failed \(Failed to find C compiler\) on"
    with pytest.warns(RuntimeWarning, match=told):
        assert not fused.works.__wrapped__(DEVICE)


def test_they_are_for_float32_on_a_gpu_and_not_too_many_features():
    assert not fused.suits(torch.device("cpu"), torch.float32, 64)
    if not GPU:
        assert attention_module._fused(torch.device("cpu"), torch.float32, 64) is None
        pytest.skip("no CUDA device")
    assert fused.suits(DEVICE, torch.float32, 128) is (torch.cuda.get_device_capability() >= (8, 0))
    assert not fused.suits(DEVICE, torch.float32, 129)
    assert not fused.suits(DEVICE, torch.float64, 64)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_where_torch_may_multiply_in_less_no_bound_is_claimed_in_float32(precision):
    """And so answers are certified in float64."""
    P = gd.AttentionTransition(randn(30, 4).float())
    before = torch.get_float32_matmul_precision()
    assert math.isfinite(P.rounding(torch.float32))
    torch.set_float32_matmul_precision(precision)
    try:
        assert not base.multiplied_in_full(torch.device("cuda"))
        assert not base.multiplied_in_full(torch.device("cpu"))
        assert P.rounding(torch.float32) == math.inf
        assert gd.DenseTransition(P.dense()).rounding(torch.float32) == math.inf
        assert math.isfinite(P.rounding(torch.float64))
        assert gd.solve(P, randn(30).float(), 0.9).converged.all()
    finally:
        torch.set_float32_matmul_precision(before)


COMPILED = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from graphdiff.operators import fused

launched = []

class Recorder:
    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, programs):
        return lambda *given, **options: launched.append((self.kernel, given, options))

for name in ("_forward", "_transposed", "_backward"):
    setattr(fused, name, Recorder(getattr(fused, name)))
import torch
features, signals, arch = {case}
psi, y, g_lse = torch.zeros(1, 70, features), torch.zeros(1, 70, signals), torch.zeros(1, 70)
fused._everything(fused, psi, psi[..., :1], y, y, g_lse)
for kernel, given, options in launched:
    shape = {{k: v for k, v in options.items() if k in ("D", "K", "OWN", "MET")}}
    names = kernel.arg_names
    types = ["*fp32" if isinstance(x, torch.Tensor) else "i32" for x in given] + ["constexpr"] * len(shape)
    aligned = {{(i,): [["tt.divisibility", 16]] for i, x in enumerate(given) if isinstance(x, torch.Tensor)}}
    source = ASTSource(kernel, dict(zip(names, types, strict=True)), shape, aligned)
    rest = {{k: v for k, v in options.items() if k not in shape}}
    made = compile(source, target=GPUTarget("cuda", arch, 32), options=rest)
    print(made.metadata.shared, made.asm["ttgir"].count("math.fma"), len(made.asm["cubin"]))
"""


@pytest.mark.parametrize(
    "case",
    [
        (64, 21, 90),
        *(
            pytest.param((*shape, arch), marks=pytest.mark.slow)
            for shape in ((3, 1), (64, 21), (64, 64), (128, 21), (128, 64))
            for arch in (80, 86, 89, 90, 100, 120)
        ),
    ],
)
def test_they_compile_fit_and_add_outside_of_tensor_cores(case):
    """For GPUs that need not be there; each sum over nodes is one fused multiply-add of its own."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = partial(subprocess.run, capture_output=True, text=True, env=environment, timeout=280)
    done = run([sys.executable, "-c", COMPILED.format(case=case)])
    assert done.returncode == 0, done.stderr
    found = [tuple(map(int, line.split())) for line in done.stdout.splitlines()]
    assert len(found) == 3
    for shared, _, cubin in found:
        assert shared <= 99 * 1024
        assert cubin > 0
    assert [sums for _, sums, _ in found] == [1, 1, 2]
