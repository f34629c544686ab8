"""δ⁻¹(I − MP) = I − L − U of a walk in an order of its nodes, δ_i = 1 − µ_i P_ii: L and U by rows, compiled.

L is strictly lower and U strictly upper triangular. A row of either is a gain, µ_i/δ_i, times what is there
of a row of P. Where all steps from a node are equally likely, as on a graph without weights, it is a gain
times ones, and of these the numbers alone are kept: half the memory.

This file is read where numba is installed, and compiled when it is first used.
"""

from typing import Any

import numpy as np
from numba import uint64

from graphdiff.operators.compiled import compiled
from graphdiff.operators.lanes import (
    ahead,
    increased,
    load,
    narrow,
    picked,
    soon,
    times,
    times_beside,
    total,
    zeros,
)
from graphdiff.operators.rows import block

# So many rows ahead a row is asked for: rows in the order lie anywhere in memory.
SOON = 12
# So many edges ahead a row of many signals is asked for.
FAR = 32
# The largest ω.
HEAVY = 1e300
FOUR = (0,) * 4


def split(
    starts: Any,
    nodes: Any,
    values: Any,
    order: Any,
    equal: bool,
    mu: Any,
    remaining: Any,
    dtype: Any,
    degree: Any = None,
    across: Any = None,
    scale: Any = None,
) -> Any:
    """The places of the nodes, [N] uint32; L and U, in a dtype; MP by rows; 1/δ; weights; and a bound.

    P is given by its rows; µ and `remaining`, which is 1 − µ·rowsum or less, are [N] or [1], the weights d of
    a reversible walk [N]; `equal` says that all steps from a node are equally likely. Let ρ be (I − L)⁻¹δ⁻¹
    times the residual of an x. One of x + ρ, to which a sweep of Gauss and Seidel brings it, is r = δUρ. So
    max |r| / `remaining` is at most the bound times max |ρ|; Σ |r| at most Σ |ρ| times what is added to
    `across` [N], if given; and Σ d |r| at most Σ |ρ| times the second of the weights [2, N], the first of
    which are ω = dδ/µ. Both are 0 where µ is, and so is 1/δ: there the answer is known.

    Values may be None where all are 1. With a `scale` [N] that stands in the place of I, δ = scale − µ P_ii.

    A triangle is where its rows start, its numbers and their weights, or None where these all are 1, and the
    gains of its rows. MP is likewise the rows of P with a factor [N]. Of what is [N] weights and `across` are
    in the order.
    """
    count, edges = len(order), len(nodes)
    # Where a triangle has less than all edges, the rest of its memory is never touched.
    half, weighted = 2 * edges + 2, 0 if degree is None else 2 * count
    ends, place, inverse, factor, weights, gains, into, of = block(
        *((2 * count + 2, np.uint32), (count, np.uint32), (count, np.float64), (count, np.float64)),
        *((weighted, np.float64), (count, dtype), (half, np.uint32), (0 if equal else half, dtype)),
    )
    weights = weights.reshape(2, -1)
    bound = _split(
        *(starts, nodes, values, order, mu, remaining),
        *(ends.reshape(2, -1), place, factor, inverse, gains, into, None if equal else of),
        *(degree, weights, across, scale),
    )
    triangles = []
    for first, begins in zip((0, edges + 1), ends.reshape(2, -1), strict=True):
        some = slice(first, first + int(begins[-1]))
        triangles.append((begins, into[some], None if equal else of[some], gains))
    by_rows = starts, nodes, None if equal else values, factor
    return place, *triangles, by_rows, inverse, weights, bound


@compiled(error_model="numpy")
def _split(
    starts: Any,
    nodes: Any,
    values: Any,
    order: Any,
    mu: Any,
    remaining: Any,
    ends: Any,
    place: Any,
    factor: Any,
    inverse: Any,
    gains: Any,
    into: Any,
    of: Any,
    degree: Any,
    weights: Any,
    across: Any,
    scale: Any,
) -> float:
    """The bound; L and U, each in a half of `into` and of `of`, which is None if steps are equal."""
    count, one = uint64(len(order)), uint64(1)
    # What is one number for all nodes is asked for at place 0.
    each, every = uint64(len(mu) > 1), uint64(len(remaining) > 1)
    for a in range(count):
        place[uint64(order[a])] = a
    half = uint64(len(into)) // uint64(2)
    first, second, bound = uint64(0), half, 0.0
    ends[0, 0] = ends[1, 0] = 0
    for a in range(count):
        if a + SOON < count:
            soon = uint64(starts[uint64(order[a + SOON])])
            ahead(nodes, soon)
            if values is not None:
                ahead(values, soon)
        i, loop, before, later = uint64(order[a]), 0.0, 0.0, 0.0
        begin, last, left, right = uint64(starts[i]), uint64(starts[i + one]), first, second
        for e in range(begin, last):
            b = uint64(place[uint64(nodes[e])])
            # Which triangle is a matter of chance, and half of all branches would be foreseen wrongly. So it
            # is put into both, and where it is not to stay the next one is written over it.
            sooner, further = uint64(b < a), uint64(b > a)
            into[first] = into[second] = b
            if of is not None:
                of[first] = of[second] = values[e]
                before += float(sooner) * values[e]
                later += float(further) * values[e]
                loop += float(one - sooner - further) * values[e]
            first, second = first + sooner, second + further
        share = 1.0
        if values is not None:
            share = values[begin] if begin < last else 0.0
        if of is None:
            before, later = share * float(first - left), share * float(second - right)
            loop = share * float((last - begin) - (first - left) - (second - right))
        ends[0, a + one], ends[1, a + one] = first, second - half
        rate = mu[i * each]
        diagonal = (1.0 if scale is None else scale[i]) - rate * loop
        inverse[i], factor[i] = 1 / diagonal if rate > 0 else 0.0, rate * (share if of is None else 1.0)
        gains[a] = factor[i] / diagonal
        bound = max(bound, rate * later / remaining[i * every])
        if degree is not None:
            before *= rate
            if each > 0:
                before = 0.0
                for e in range(begin, last):
                    j = uint64(nodes[e])
                    if uint64(place[j]) < a:
                        before += mu[j] * values[e]
            # A tiny µ weighs so much that nothing else counts, but not infinitely.
            weights[0, a] = min(degree[i] * diagonal / rate, HEAVY) if rate > 0 else 0.0
            weights[1, a] = degree[i] * before if rate > 0 else 0.0
        if across is not None:
            for e in range(begin, last):
                b = uint64(place[uint64(nodes[e])])
                more = rate * float(uint64(b > a))
                if values is not None:
                    more *= values[e]
                across[b] += more
    return bound


# A call would count references to the arrays for every row, which takes three times as long.
@compiled(inline="always")
def of_row(starts: Any, nodes: Any, values: Any, x: Any, a: int, lanes: Any) -> Any:
    """A row's weights, or ones if None, times x [N, W], in four sums that take turns.

    Of x [N, 1] four edges are read at a time, if need be of the next row too, unless all end before.
    """
    e, last, four = uint64(starts[a]), uint64(starts[a + uint64(1)]), uint64(len(FOUR))
    end = uint64(len(nodes)) - uint64(1)
    if len(lanes) == 1 and last + four <= uint64(len(nodes)):
        sums = narrow(zeros(FOUR), x)
        while e < last:
            sums = increased(sums, times_beside(picked(x, nodes, e, FOUR), values, e), last - e)
            e += four
        return total(sums, lanes)
    c0 = narrow(zeros(lanes), x)
    c1, c2, c3 = c0, c0, c0
    while e + four <= last:
        for k in range(four):
            soon(x, nodes, min(e + k + uint64(FAR), end), lanes)
        c0 = c0 + times(load(x, uint64(nodes[e]), lanes), values, e)
        c1 = c1 + times(load(x, uint64(nodes[e + uint64(1)]), lanes), values, e + uint64(1))
        c2 = c2 + times(load(x, uint64(nodes[e + uint64(2)]), lanes), values, e + uint64(2))
        c3 = c3 + times(load(x, uint64(nodes[e + uint64(3)]), lanes), values, e + uint64(3))
        e += four
    while e < last:
        soon(x, nodes, min(e + uint64(FAR), end), lanes)
        c0, c1, c2, c3 = c1, c2, c3, c0 + times(load(x, uint64(nodes[e]), lanes), values, e)
        e += uint64(1)
    return (c0 + c2) + (c1 + c3)
