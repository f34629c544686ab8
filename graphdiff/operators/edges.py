"""P y and Pᵀ v of a walk held as its edges, in float64, compiled.

Libraries add each edge's share to sums in memory. Here the sums of a row, for up to 32 signals beside each
other, stand in registers while its edges pass by; for the transpose its signals do, and the sums are in
memory. They are added edge after edge all the same, in scipy's order, so that they have its bits. Of a signal
alone scipy's products are as fast, but that what they return is in memory never touched before.

This file is read where numba is installed, and compiled when it is first used.
"""

from typing import Any

from numba import uint64
from torch import Tensor

from graphdiff.memory import empty
from graphdiff.operators.compiled import compiled
from graphdiff.operators.lanes import columns, load, soon, store, zeros
from graphdiff.operators.threads import in_team, shared, taken, worthwhile

# So many edges ahead a row is asked for: rows lie anywhere in memory.
SOON = 32
# Rows that a thread takes at a time.
TAKEN = 256


@compiled
def _product(
    starts: Any, nodes: Any, values: Any, y: Any, found: Any, first: int, lanes: Any, counter: Any
) -> None:
    """Columns of P y from the `first` on; of its rows those that nobody else has taken."""
    signals, into = y[:, first : first + len(lanes)], found[:, first : first + len(lanes)]
    count, some, last = uint64(len(starts) - 1), uint64(TAKEN), uint64(len(nodes) - 1)
    begin = some * uint64(taken(counter))
    while begin < count:
        for i in range(begin, min(begin + some, count)):
            total = zeros(lanes)
            for e in range(uint64(starts[i]), uint64(starts[i + uint64(1)])):
                soon(signals, nodes, min(e + uint64(SOON), last), lanes)
                total = total + load(signals, uint64(nodes[e]), lanes) * values[e]
            store(into, i, total)
        begin = some * uint64(taken(counter))


@compiled
def _product_by_team(address: int, threads: int, arguments: Any) -> Any:
    return in_team(address, threads, _product, arguments)


@compiled
def _transposed(starts: Any, nodes: Any, values: Any, v: Any, found: Any, first: int, lanes: Any) -> None:
    """Columns of Pᵀ v from the `first` on."""
    signals, into = v[:, first : first + len(lanes)], found[:, first : first + len(lanes)]
    nothing, last = zeros(lanes), uint64(len(nodes) - 1)
    for j in range(uint64(len(into))):
        store(into, j, nothing)
    for i in range(uint64(len(signals))):
        leaving = load(signals, i, lanes)
        for e in range(uint64(starts[i]), uint64(starts[i + uint64(1)])):
            j = uint64(nodes[e])
            soon(into, nodes, min(e + uint64(SOON), last), lanes)
            store(into, j, load(into, j, lanes) + leaving * values[e])


def product(starts: Tensor, nodes: Tensor, values: Tensor, y: Tensor) -> Tensor:
    """P y [rows, K] for y [M, K], by torch's threads; P in compressed rows."""
    found = empty((len(starts) - 1, y.shape[1]), y)
    arrays = [x.detach().contiguous().numpy() for x in (starts, nodes, values, y, found)]
    for first, lanes in columns(y.shape[1]):
        threads = worthwhile(len(values) * len(lanes))
        shared(_product, _product_by_team, threads, *arrays, first, lanes)
    return found


def transposed(starts: Tensor, nodes: Tensor, values: Tensor, v: Tensor) -> Tensor:
    """Pᵀ v [N, K] for v [N, K], by one thread; P [N, N] in compressed rows."""
    found = empty(v.shape, v)
    arrays = [x.detach().contiguous().numpy() for x in (starts, nodes, values, v, found)]
    for first, lanes in columns(v.shape[1]):
        _transposed(*arrays, first, lanes)
    return found


@compiled
def _along(starts: Any, nodes: Any, values: Any, y: Any, found: Any) -> None:
    """P y of one signal."""
    e = uint64(0)
    for i in range(uint64(len(found))):
        total, last = 0.0, uint64(starts[i + uint64(1)])
        while e < last:
            total += values[e] * y[uint64(nodes[e])]
            e += uint64(1)
        found[i] = total


@compiled
def _across(starts: Any, nodes: Any, values: Any, v: Any, found: Any) -> None:
    """Pᵀ v of one signal."""
    e, found[:] = uint64(0), 0
    for i in range(uint64(len(found))):
        leaving, last = v[i], uint64(starts[i + uint64(1)])
        while e < last:
            found[uint64(nodes[e])] += values[e] * leaving
            e += uint64(1)


def alone(P: Any, y: Tensor, across: bool) -> Tensor:
    """P y [N, 1] for y [N, 1], or Pᵀ y `across`, by one thread; P [N, N] is one of scipy's, in rows."""
    found = empty(y.shape, y)
    signal, into = y.contiguous().numpy().reshape(-1), found.numpy().reshape(-1)
    (_across if across else _along)(P.indptr, P.indices, P.data, signal, into)
    return found
