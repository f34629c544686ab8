"""The products behind the attention walk, from one half of exp(ψψᵀ), a strip of it at a time.

With A = ψψᵀ and weights w ≥ 0 of the nodes, P_ij = w_j exp(A_ij − lse_i),  lse_i = log Σ_j w_j exp(A_ij):

    value = P y                              y [N, K]
    Pᵀv,  (Pᵀv)_j = w_j Σ_i exp(A_ij − lse_i) v_i
    ∂ψ = (G + Gᵀ) ψ,  G_ij = P_ij (g_i·y_j + h_i)      for the cotangents g of value and g_lse of lse,
    ∂y = Pᵀg,         h_i = g_lse_i − g_i·value_i.

A is symmetric, and so is G + Gᵀ, so the rows I of a strip need its entries from the diagonal on alone:
E = exp(A_I − c) serves the rows I as it is, and all later rows as Eᵀ. That is half of the products and of
the exponentials, and no N×N matrix.

One shift c per strip must suit its rows and all later ones. Nodes are taken in rising order of their
largest logits m_i = max_j A_ij: what counts for row i lies within 30 of m_i, no A_ij is above m_i or m_j, so
with m_i ≤ m_j for all later nodes j what counts for either lies just below m_i. Strips end where m has risen
by `RISE`, and no shift is ever far off, whatever the range of the logits over the whole matrix.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import threshold

# A strip has at least so many rows, at which matrix products run at full speed, and as many as fill so many
# elements: on a CPU E then stays in the cache.
ROWS = 80
CACHED_ELEMENTS, DEVICE_ELEMENTS = 300_000, 2**22
# Exponents below which an entry counts as 0, well above those that underflow.
FLOOR = {torch.float32: -70.0, torch.float64: -680.0}
# How far logits may rise within a strip: what is lost of a row is less than N·exp(FLOOR + RISE) of it.
RISE = 30.0
# The largest logit of a row is looked for among so many nodes of largest norm.
SAMPLE = 64


class Strip(NamedTuple):
    """Rows [start, stop) of the ordered nodes, E [stop − start, N − start], and its shift c, 0-d."""

    start: int
    stop: int
    E: Tensor
    shift: Tensor


def forward(psi: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """P y [N, K] and lse [N], for psi [N, d], weight [N, 1], y [N, K]."""
    level = _levels(psi)
    order = level.argsort()
    columns = torch.cat([weight * y, weight], -1)[order]
    level = level[order]
    cuts = _cuts(level)
    # Of every node, the shift of its strip: what its sums are in units of.
    ends = torch.tensor(cuts[1:], device=psi.device)
    shifts = level[ends - 1].repeat_interleave(ends.diff(prepend=ends.new_zeros(1)))
    sums, later = torch.zeros_like(columns), torch.empty_like(columns)
    for start, stop, E, shift in _strips(psi[order], level, cuts):
        sums[start:stop].addmm_(E, columns[start:])
        torch.mm(E[:, stop - start :].mT, columns[start:stop], out=later[stop:])
        sums[stop:].addcmul_(later[stop:], _times(shift - shifts[stop:]))
    degree = sums[:, -1]
    value, lse = sums[:, :-1] / degree.unsqueeze(-1), degree.log() + shifts
    # A row whose largest logit was not found in the sample, and is far above what was, has overflowed.
    failed = ~torch.cat([value, lse.unsqueeze(-1)], -1).isfinite().all(-1)
    if bool(failed.any()):
        value[failed], lse[failed] = rows_forward(psi[order[failed]], psi, weight, y)
    return _unordered(value, order), _unordered(lse, order)


def transposed(psi: Tensor, weight: Tensor, lse: Tensor, v: Tensor) -> tuple[Tensor]:
    """Pᵀv [N, K], for lse [N, 1]."""
    lse = lse.squeeze(-1)
    order = lse.argsort()
    level, v = lse[order], v[order]
    product = torch.zeros_like(v)
    for start, stop, E, shift in _strips(psi[order], level, _cuts(level)):
        scaled = _times(shift - level[start:]) * v[start:]
        product[start:stop].addmm_(E, scaled)
        product[stop:].addmm_(E[:, stop - start :].mT, scaled[: stop - start])
    return (weight * _unordered(product, order),)


def backward(
    psi: Tensor, weight: Tensor, y: Tensor, value: Tensor, lse: Tensor, g_value: Tensor, g_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """∂ψ [N, d] and ∂y [N, K]."""
    order = lse.argsort()
    level, channels = lse[order], y.shape[-1]
    h = g_lse - (g_value * value).sum(-1)
    given = torch.cat([g_value, h.unsqueeze(-1)], -1)[order]
    # G_ij + G_ji is E_ij times the inner product of [ĝ, ĥ, wy, w]_i and [wy, w, ĝ, ĥ]_j, where ĝ and ĥ are in
    # units of the strip's shift.
    right = torch.cat([weight * y, weight], -1)[order]
    right = torch.cat([right, torch.zeros_like(right)], -1)
    held, scaled = right[:, : channels + 1], right[:, channels + 1 :]
    psi = psi[order]
    g_psi, g_y, cuts = torch.zeros_like(psi), torch.zeros_like(y), _cuts(level)
    # New memory for every strip would cost as much as filling it.
    memory = psi.new_empty(_largest(cuts))
    for start, stop, E, shift in _strips(psi, level, cuts):
        torch.mul(given[start:], _times(shift - level[start:]), out=scaled[start:])
        later = slice(stop - start, None)
        g_y[start:stop].addmm_(E, scaled[start:, :channels])
        g_y[stop:].addmm_(E[:, later].mT, scaled[start:stop, :channels])
        left = torch.cat([scaled[start:stop], held[start:stop]], -1)
        E *= torch.mm(left, right[start:].mT, out=memory[: E.numel()].view(E.shape))
        g_psi[start:stop].addmm_(E, psi[start:])
        g_psi[stop:].addmm_(E[:, later].mT, psi[start:stop])
    return _unordered(g_psi, order), weight * _unordered(g_y, order)


def whole_forward(psi: Tensor, weight: Tensor, y: Tensor, P: Tensor) -> tuple[Tensor, Tensor]:
    """P y [N, K] and lse [N], all of P at once, which is written into P [N, N]."""
    # ψψᵀ + log w by one product: adding a row to every row would take memory for all of them first.
    torch.mm(torch.cat([psi, torch.ones_like(weight)], -1), torch.cat([psi, weight.log()], -1).mT, out=P)
    largest = P.amax(-1)
    torch.softmax(P, -1, out=P)
    # Any entry of a row tells its lse, and the largest is never lost.
    return P @ y, largest - P.amax(-1).log()


def whole_backward(
    psi: Tensor, y: Tensor, value: Tensor, P: Tensor, g_value: Tensor, g_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """∂ψ [N, d] and ∂y [N, K] from P."""
    h = g_lse - (g_value * value).sum(-1)
    G = torch.addmm(h.unsqueeze(-1), g_value, y.mT).mul_(P)
    return torch.addmm(G @ psi, G.mT, psi), P.mT @ g_value


def matrix(psi: Tensor, weight: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """P, filled up with 0 to [width, width], and lse [N]."""
    nodes, log_weight = len(psi), weight.log().mT
    P, lse = psi.new_empty(width, width), psi.new_empty(nodes)
    P[nodes:], P[:, nodes:] = 0, 0
    for start in range(0, nodes, ROWS):
        rows = slice(start, min(start + ROWS, nodes))
        logits = torch.addmm(log_weight, psi[rows], psi.mT)
        torch.softmax(logits, -1, out=P[rows, :nodes])
        lse[rows] = logits.amax(-1) - P[rows, :nodes].amax(-1).log()
    return P, lse


def rows_forward(query: Tensor, psi: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Value and log-sum-exp of the rows with features `query` [R, d], from whole rows, a block at a time."""
    blocks = [
        _softmax_rows(block @ psi.mT + weight.log().mT, y)
        for block in torch.split(query, max(1, DEVICE_ELEMENTS // len(psi)))
    ]
    values, sums = zip(*blocks, strict=True)
    return torch.cat(values), torch.cat(sums)


def _softmax_rows(logits: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    lse = logits.logsumexp(-1)
    return (logits - lse.unsqueeze(-1)).exp() @ y, lse


def _levels(psi: Tensor) -> Tensor:
    """For every node a lower bound of the largest logit of its row, [N], as good as a sample finds it."""
    squares = psi.square().sum(-1)
    longest = squares.topk(min(SAMPLE, len(psi)), sorted=False).indices
    return torch.maximum(squares, (psi @ psi[longest].mT).amax(-1))


def _cuts(level: Tensor) -> list[int]:
    """Where the strips of nodes with rising levels begin, and N."""
    nodes = len(level)
    elements = CACHED_ELEMENTS if level.device.type == "cpu" else DEVICE_ELEMENTS
    rows = max(ROWS, elements // nodes)
    risen = ((level - level[0]) / RISE).floor()
    rises = (1 + (risen[1:] > risen[:-1]).nonzero().squeeze(-1)).tolist()
    return [*sorted({*range(0, nodes, rows), *rises}), nodes]


def _strips(psi: Tensor, level: Tensor, cuts: list[int]) -> Iterator[Strip]:
    """The strips of nodes with rising levels, one after another in the same memory."""
    floor, nodes = FLOOR[psi.dtype], len(psi)
    memory = psi.new_empty(_largest(cuts))
    for start, stop in pairwise(cuts):
        shift, size = level[stop - 1], (stop - start, nodes - start)
        E = memory[: size[0] * size[1]].view(size)
        torch.mm(psi[start:stop], psi[start:].mT, out=E).sub_(shift)
        # Far below it exponentials, and products with what underflows, are several times slower.
        threshold(E.clamp_(min=floor).exp_(), 2 * math.exp(floor), 0.0, inplace=True)
        yield Strip(start, stop, E, shift)


def _largest(cuts: list[int]) -> int:
    """Entries of the largest strip."""
    return max((stop - start) * (cuts[-1] - start) for start, stop in pairwise(cuts))


def _times(exponent: Tensor) -> Tensor:
    """exp of it as a column; 0 where no entry of P below that counts."""
    return threshold(exponent.exp(), math.exp(FLOOR[exponent.dtype] + RISE), 0.0).unsqueeze(-1)


def _unordered(x: Tensor, order: Tensor) -> Tensor:
    """x, whose rows are those of nodes in some order, in the nodes' own."""
    return torch.empty_like(x).index_copy_(0, order, x)
