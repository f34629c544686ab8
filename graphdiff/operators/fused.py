"""The products behind the attention walk on a GPU, in Triton: A = ψψᵀ tile by tile, none of which is stored.

With weights w of the nodes, 0 or 1, P_ij = w_j exp(A_ij − lse_i) and lse_i = log Σ_j w_j exp(A_ij):

    value = P y,      Pᵀv,
    ∂ψ = (G + Gᵀ) ψ,  G_ij = P_ij (g_i·y_j + h_i),  h_i = g_lse_i − g_i·value_i,      ∂y = Pᵀg.

A program has some nodes of its own, whose rows of the result it makes, and meets all nodes in their order. No
sum is shared by two programs, so the bits are the same in every run, and those of a graph in any batch. A is
symmetric, so the tile of A from its own nodes to the others serves both terms of ∂ψ.

Float32 is multiplied by tensor cores: each number is the sum of two with TF32's 11 bits, and of four products
the smallest is left out. What that costs is in `ROUNDING`. Sums over tiles are made outside of the tensor
cores, which cut off where others round, always towards 0.
"""

import functools
import sys
import warnings
from typing import Any

import torch
import triton
from torch import Tensor
from triton import language as tl

from graphdiff.operators import strips

# As many features and signals as a program has room for, of signals all but one.
FEATURES, SIGNALS = 128, 64
# A sum of n products is off by at most (ROUNDING[0] n + ROUNDING[1]) eps of the sum of their sizes. Of each
# factor 2⁻²⁰, 8 eps, is lost, and as much by the product left out. Groups of 8 products with the sum so far
# are cut at the largest one's last place, an eps for each, and that three times (M. Fasi, N. J. Higham,
# M. Mikaitis, S. Pranesh: Numerical behavior of NVIDIA tensor cores, PeerJ Computer Science 7, 2021). The
# rest is for the exponential.
ROUNDING = 4, 32


def suits(device: torch.device, dtype: torch.dtype, features: int) -> bool:
    """Whether these kernels take such features: of float32, not too many, on a GPU with TF32."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and dtype == torch.float32
        and features <= FEATURES
        and torch.cuda.get_device_capability(device) >= (8, 0)
        and works(device)
    )


@functools.cache
def works(device: torch.device) -> bool:
    """Whether the kernels compile for a device and agree with `strips` there; if not, a warning says so."""
    # As many features and signals as DifNet has, so what is compiled is not compiled for this alone.
    psi, y, g, g_lse = (
        torch.randn(1, 100, *width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for width in ((64,), (21,), (21,), ())
    )
    weight = torch.ones_like(psi[..., :1])
    weight[:, -1] = psi[:, -1] = 0
    given = psi / 2, weight, y, g, g_lse
    exact = _everything(strips, *(x[0] for x in given))
    try:
        found = _everything(sys.modules[__name__], *(x.float().to(device) for x in given))
        off = max(
            float((a[0].cpu() - b).abs().max() / b.abs().max()) for a, b in zip(found, exact, strict=True)
        )
        if off < 1e-4:
            return True
        told = f"are off by {off:.0e}"
    except Exception as fault:  # compilers, drivers and devices each have faults of their own
        told = f"failed ({(str(fault).splitlines() or [type(fault).__name__])[0]})"
    warnings.warn(
        f"attention: kernels in Triton {told} on {device}; plain torch is used there, which is slower",
        RuntimeWarning,
        stacklevel=2,
    )
    return False


def _everything(
    kernels: Any, psi: Tensor, weight: Tensor, y: Tensor, g: Tensor, g_lse: Tensor
) -> tuple[Tensor, ...]:
    value, lse = kernels.forward(psi, weight, y)
    (back,) = kernels.transposed(psi, weight, lse.unsqueeze(-1), g)
    return value, lse, back, *kernels.backward(psi, weight, y, value, lse, g, g_lse)


def forward(psi: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """P y [B, N, K] and lse [B, N], for psi [B, N, d], weight [B, N, 1], y [B, N, K]."""
    value, lse, signals = torch.empty_like(y), y.new_empty(y.shape[:-1]), y.shape[-1]
    # A column of ones makes the sums that the others are divided by, so that constants stay what they are.
    width = _width(signals + 1)
    parts = max(1, triton.cdiv(signals, width - 1))
    met = 32 if psi.shape[-1] <= 64 else 16
    _launch(_forward, (psi, weight, y, value, lse), signals, parts, K=width, OWN=64, MET=met)
    return value, lse


def transposed(psi: Tensor, weight: Tensor, lse: Tensor, v: Tensor) -> tuple[Tensor]:
    """Pᵀv [B, N, K], for lse [B, N, 1]."""
    product, signals = torch.empty_like(v), v.shape[-1]
    width = _width(signals)
    parts = triton.cdiv(signals, width)
    met = 32 if psi.shape[-1] <= 64 else 16
    _launch(_transposed, (psi, weight, lse, v, product), signals, parts, K=width, OWN=64, MET=met)
    return (product,)


def backward(
    psi: Tensor, weight: Tensor, y: Tensor, value: Tensor, lse: Tensor, g_value: Tensor, g_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """∂ψ [B, N, d] and ∂y [B, N, K]."""
    h = g_lse - (g_value * value).sum(-1)
    g_psi, g_y = torch.zeros_like(psi), []
    # G is a sum over signals: of more than a program has room for, of some after the others.
    for some in zip(y.split(SIGNALS, -1), g_value.split(SIGNALS, -1), strict=True):
        part_y, part_g = (x.contiguous() for x in some)
        signals, found = part_y.shape[-1], (torch.empty_like(psi), torch.empty_like(part_y))
        given, K = (psi, weight, part_y, lse, part_g, h, *found), _width(signals)
        own = 64 if _power(psi.shape[-1]) + K <= 96 else 32
        _launch(_backward, given, signals, 1, K=K, OWN=own, MET=16)
        g_psi += found[0]
        g_y.append(found[1])
        h = torch.zeros_like(h)
    return g_psi, torch.cat(g_y, -1)


def _width(signals: int) -> int:
    """Signals that a program takes."""
    return min(_power(signals), SIGNALS)


def _power(width: int) -> int:
    """The power of 2 that it fits into, and 16 at least, as tensor cores want it."""
    return max(16, 1 << (width - 1).bit_length())


def _launch(
    kernel: Any, tensors: tuple[Tensor, ...], signals: int, parts: int, K: int, OWN: int, MET: int
) -> None:
    """A program for each part of the signals, of each graph, for each `OWN` of its nodes.

    It meets `MET` nodes at a time. Both are such that what a program keeps fits into registers, and its tiles
    into the 99 KB of shared memory that every GPU has since compute capability 8.0.
    """
    psi = tensors[0]
    graphs, nodes, features = psi.shape
    programs = graphs * triton.cdiv(nodes, OWN), parts
    shape = {"D": _power(features), "K": K, "OWN": OWN, "MET": MET}
    if parts:
        with torch.cuda.device_of(psi):
            kernel[programs](
                *(*tensors, nodes, features, signals),
                **(shape | {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}),
            )


@triton.jit
def _forward(
    psi,
    weight,
    y,
    value,
    lse,
    nodes,
    features,
    signals,
    D: tl.constexpr,
    K: tl.constexpr,
    OWN: tl.constexpr,
    MET: tl.constexpr,
):
    graph, own = _own(nodes, OWN)
    psi += graph * nodes * features
    weight, lse = weight + graph * nodes, lse + graph * nodes
    k, ones = tl.arange(0, K), K - 1
    column = tl.program_id(1) * ones + k
    width = tl.where(k < ones, signals, 0)
    y += graph * nodes * signals
    value += graph * nodes * signals
    d = tl.arange(0, D)
    rows = _read(psi, own, nodes, d, features, features)
    largest = tl.full([OWN], float("-inf"), tl.float32)
    sums = tl.zeros([OWN, K], tl.float32)
    for first in range(0, nodes, MET):
        met = first + tl.arange(0, MET)
        counts = tl.load(weight + met, met < nodes, 0.0) > 0
        A = _product(rows, tl.trans(_read(psi, met, nodes, d, features, features)))
        A = tl.where(counts[None, :], A, float("-inf"))
        higher = tl.maximum(largest, tl.max(A, 1))
        # Before a node that counts is met there is nothing to shift.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        E = tl.exp(A - shift[:, None])
        signal = tl.where(k[None, :] == ones, 1.0, _read(y, met, nodes, column, width, signals))
        sums = tl.fma(sums, tl.exp(largest - shift)[:, None], _product(E, signal))
        largest = higher
    total = tl.sum(tl.where(k[None, :] == ones, sums, 0.0), 1)
    _write(value, own, nodes, column, width, signals, sums / total[:, None])
    if tl.program_id(1) == 0:
        tl.store(lse + own, largest + tl.log(total), own < nodes)


@triton.jit
def _transposed(
    psi,
    weight,
    lse,
    v,
    product,
    nodes,
    features,
    signals,
    D: tl.constexpr,
    K: tl.constexpr,
    OWN: tl.constexpr,
    MET: tl.constexpr,
):
    graph, own = _own(nodes, OWN)
    psi += graph * nodes * features
    weight, lse = weight + graph * nodes, lse + graph * nodes
    column = tl.program_id(1) * K + tl.arange(0, K)
    v += graph * nodes * signals
    product += graph * nodes * signals
    d = tl.arange(0, D)
    rows = _read(psi, own, nodes, d, features, features)
    sums = tl.zeros([OWN, K], tl.float32)
    for first in range(0, nodes, MET):
        met = first + tl.arange(0, MET)
        A = _product(rows, tl.trans(_read(psi, met, nodes, d, features, features)))
        level = tl.load(lse + met, met < nodes, 0.0)
        E = tl.exp(A - level[None, :])
        sums = _added(sums, _product(E, _read(v, met, nodes, column, signals, signals)))
    counted = tl.load(weight + own, own < nodes, 0.0)
    _write(product, own, nodes, column, signals, signals, counted[:, None] * sums)


@triton.jit
def _backward(
    psi,
    weight,
    y,
    lse,
    g,
    h,
    g_psi,
    g_y,
    nodes,
    features,
    signals,
    D: tl.constexpr,
    K: tl.constexpr,
    OWN: tl.constexpr,
    MET: tl.constexpr,
):
    graph, own = _own(nodes, OWN)
    psi, g_psi = psi + graph * nodes * features, g_psi + graph * nodes * features
    weight, lse, h = weight + graph * nodes, lse + graph * nodes, h + graph * nodes
    y, g, g_y = y + graph * nodes * signals, g + graph * nodes * signals, g_y + graph * nodes * signals
    d, k = tl.arange(0, D), tl.arange(0, K)
    rows = _read(psi, own, nodes, d, features, features)
    own_y = _read(y, own, nodes, k, signals, signals)
    own_g = _read(g, own, nodes, k, signals, signals)
    own_lse = tl.load(lse + own, own < nodes, 0.0)
    own_h = tl.load(h + own, own < nodes, 0.0)
    own_weight = tl.load(weight + own, own < nodes, 0.0)
    sums = tl.zeros([OWN, D], tl.float32)
    sums_y = tl.zeros([OWN, K], tl.float32)
    for first in range(0, nodes, MET):
        met = first + tl.arange(0, MET)
        columns = _read(psi, met, nodes, d, features, features)
        A = _product(rows, tl.trans(columns))
        counted = tl.load(weight + met, met < nodes, 0.0)[None, :]
        to = tl.where(counted > 0, tl.exp(A - own_lse[:, None]), 0.0)
        level = tl.load(lse + met, met < nodes, 0.0)
        back = own_weight[:, None] * tl.exp(A - level[None, :])
        signal = _read(y, met, nodes, k, signals, signals)
        cotangent = _read(g, met, nodes, k, signals, signals)
        G = to * (_product(own_g, tl.trans(signal)) + own_h[:, None])
        met_h = tl.load(h + met, met < nodes, 0.0)
        G += back * (_product(own_y, tl.trans(cotangent)) + met_h[None, :])
        sums = _added(sums, _product(G, columns))
        sums_y = _added(sums_y, _product(back, cotangent))
    _write(g_psi, own, nodes, d, features, features, sums)
    _write(g_y, own, nodes, k, signals, signals, sums_y)


@triton.jit
def _own(nodes, OWN: tl.constexpr):
    """The graph of a program, and the nodes whose results it makes."""
    blocks = tl.cdiv(nodes, OWN)
    graph = (tl.program_id(0) // blocks).to(tl.int64)
    return graph, tl.program_id(0) % blocks * OWN + tl.arange(0, OWN)


@triton.jit
def _read(matrix, row, rows, column, columns, stride):
    """Some rows and columns of a matrix, 0 beyond it."""
    there = (row < rows)[:, None] & (column < columns)[None, :]
    return tl.load(matrix + row[:, None] * stride + column[None, :], there, 0.0)


@triton.jit
def _write(matrix, row, rows, column, columns, stride, values):
    there = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(matrix + row[:, None] * stride + column[None, :], values, there)


@triton.jit
def _product(a, b):
    return tl.dot(a, b, input_precision="tf32x3")


@triton.jit
def _added(sums, product):
    """The sum, which the compiler does not take into the tensor cores."""
    return tl.fma(sums, 1.0, product)
