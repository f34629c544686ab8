"""The sweeps of `SSOR`, compiled: many signals side by side in the lanes of a processor's vectors.

With B the weights of a reversible walk, symmetric, the system is (I − L − Lᵀ) x = b after scaling, L strictly
lower triangular. One step of conjugate gradients on (I − L)⁻¹(I − L − Lᵀ)(I − Lᵀ)⁻¹ takes two triangular
solves and no product besides (Eisenstat, "Efficient implementation of a class of preconditioned conjugate
gradient methods", SIAM J. Sci. Stat. Comput. 2, 1981): with t = (I − Lᵀ)⁻¹ p and w = (I − L)⁻¹(p − t) its
image of p is t + w, and t is the direction in which x moves.

Vectors are [N, W]: W signals, each added up in one order whatever W is, so that a signal's bits do not depend
on those beside it. Of one signal alone it is rows that stand side by side, so many of one length that do not
depend on each other; or four edges of one row. This file is read where numba is installed, and compiled when
it is first used.
"""

from typing import Any

import numpy as np
from numba import int64, uint64

from graphdiff.operators.compiled import compiled
from graphdiff.operators.lanes import (
    ahead,
    any_in,
    any_of,
    beside,
    increased,
    larger,
    load,
    magnitude,
    narrow,
    picked,
    put,
    soon,
    store,
    total,
    where,
    wide,
    zeros,
)
from graphdiff.operators.rows import block

# So many rows ahead a row is asked for: rows in the order lie anywhere in memory.
SOON = 12
# So many edges ahead a row of many signals is asked for.
FAR = 32
# Nodes of which it is asked what a start is worth, and what share of it is as good as all.
SAMPLED, NEARLY = 4096, 0.9
# Rows of a group, and the number of edges with which a row belongs to none.
GROUP, LONG = 8, 16
EIGHT, FOUR = (0,) * GROUP, (0,) * 4

# --- the triangles


def split(
    starts: Any,
    nodes: Any,
    values: Any,
    order: Any,
    looped: bool,
    degree: Any,
    mu: Any,
    remaining: Any,
    dtype: Any,
) -> Any:
    """L and Lᵀ by rows, in a dtype; 1/√ω and the place of each node [N, 2]; weights [2, N]; and a bound.

    Of P with weights d, ω = d(1 − µP_ii)/µ scales D(M⁻¹ − P) to I − L − Lᵀ; `looped` says whether any P_ii
    may not be 0. With ρ = (I − L)⁻¹ times the residual in the symmetric system, a row of the true one divided
    by `remaining`, 1 − µ·rowsum, is at most the bound times max |ρ| times the first weights, which are 1/√ω;
    and in the transposed system its 1-norm is at most Σ |ρ| times the second. Triangles and weights are in
    the order, the rest is not. Nodes where µ = 0 belong to neither triangle.

    A triangle is where its rows start, its numbers and values, and its runs, as `grouped` has them.
    """
    count, edges, most = len(order), len(nodes), 2 * (len(order) // (GROUP + 1)) + 5
    ends, runs = (2 * count + 2, np.uint32), (2 * most, np.uint32)
    # Where a triangle has less than all edges, the rest of its memory is never touched.
    scales = [(2 * count, np.float64)] * 2
    parts = block(ends, runs, *scales, (2 * edges + 2, np.uint32), (2 * edges + 2, dtype))
    ends, runs, into, of = (part.reshape(2, -1) for part in (*parts[:2], *parts[4:]))
    node, weights = parts[2].reshape(count, 2), parts[3].reshape(2, count)
    bound = _split(
        starts, nodes, values, order, looped, degree, mu, remaining, ends, node, weights, *parts[4:]
    )
    lower, upper = (_triangle(*found) for found in zip(ends, into, of, runs, strict=True))
    return lower, upper, node, weights, bound


def _triangle(starts: Any, nodes: Any, values: Any, runs: Any) -> Any:
    """A triangle of memory that is filled, with its groups."""
    found = starts, nodes[: starts[-1]], values[: starts[-1]]
    return *found, runs[: grouped(*found, runs)]


@compiled(error_model="numpy")
def _split(
    starts: Any,
    nodes: Any,
    values: Any,
    order: Any,
    looped: bool,
    degree: Any,
    mu: Any,
    remaining: Any,
    ends: Any,
    node: Any,
    weights: Any,
    into: Any,
    of: Any,
) -> Any:
    """The bound; L and Lᵀ, each in a half of `into` and `of`."""
    count, one = uint64(len(order)), uint64(1)
    loop, alike = np.zeros(count, np.float64), True
    for i in range(count):
        alike = alike and mu[i] == mu[0]
        if looped:
            for e in range(uint64(starts[i]), uint64(starts[i + one])):
                if uint64(nodes[e]) == i:
                    loop[i] += values[e]
    # What is read of a neighbour stands in one line: 1/√ω and its place, which float64 holds exactly.
    for a in range(count):
        i = uint64(order[a])
        node[i, 0], node[i, 1] = np.sqrt(mu[i] / (degree[i] * (1 - mu[i] * loop[i]))), a
    half = uint64(len(into)) // uint64(2)
    first, second, bound = uint64(0), half, 0.0
    ends[0, 0] = ends[1, 0] = 0
    for a in range(count):
        if a + SOON < count:
            soon = uint64(starts[uint64(order[a + SOON])])
            ahead(nodes, soon)
            ahead(values, soon)
        i = uint64(order[a])
        inverse, before, after = node[i, 0], 0.0, 0.0
        scale = degree[i] * inverse
        for e in range(uint64(starts[i]), uint64(starts[i + one])):
            j = uint64(nodes[e])
            x = scale * values[e] * node[j, 0]
            b = uint64(int64(node[j, 1]))
            if b == a or x == 0.0:
                continue
            # Which triangle is a matter of chance, so no branch: half of them would be foreseen wrongly.
            earlier = uint64(b < a)
            place = first if earlier else second
            into[place], of[place] = b, x
            first, second, share = first + earlier, second + (one - earlier), float(earlier)
            before += share * values[e]
            after += (1 - share) * ((mu[i] if alike else mu[j]) * values[e])
        ends[0, a + one], ends[1, a + one] = first, second - half
        there = mu[i] > 0
        bound = max(bound, (1 - mu[i] * (loop[i] - before)) / remaining[i] if there else 0.0)
        weights[0, a], weights[1, a] = inverse, mu[i] / inverse + scale * after if there else 0.0
    return bound


@compiled
def grouped(starts: Any, nodes: Any, values: Any, runs: Any) -> Any:
    """How many `runs` there are: in turn rows one after the other and groups, from row 0 on; each one's end.

    A group is of `GROUP` rows that follow each other, none of which depends on another, with as many edges,
    less than `LONG`. Where their edges stand the first of each row come first, then the second.
    """
    group, longest = uint64(GROUP), uint64(LONG - 1)
    numbers, weights = np.empty(GROUP * LONG, nodes.dtype), np.empty(GROUP * LONG, values.dtype)
    count, alike, length, ends = uint64(len(starts) - 1), uint64(0), uint64(0), uint64(0)
    for a in range(uint64(1), count + uint64(1)):
        edges = uint64(starts[a]) - uint64(starts[a - uint64(1)])
        alike = alike + uint64(1) if edges == length else uint64(1)
        length = edges
        if alike < group or length > longest:
            continue
        alike = uint64(0)
        row, first = a - group, uint64(starts[a - group])
        inside = False
        for e in range(uint64(0), length * group, group):
            some = beside(nodes, first + e, EIGHT)
            inside |= any_in(some, row, group)
            put(numbers, e, some)
            put(weights, e, beside(values, first + e, EIGHT))
        if inside:
            continue
        # One edge a row is in order as it is.
        for e in range(length if length > uint64(1) else uint64(0)):
            for k in range(group):
                into, of = first + e * group + k, k * length + e
                nodes[into], values[into] = numbers[of], weights[of]
        if ends and runs[ends - uint64(1)] == row:
            runs[ends - uint64(1)] = a
        else:
            runs[ends], runs[ends + uint64(1)] = row, a
            ends += uint64(2)
    if not ends or runs[ends - uint64(1)] < count:
        runs[ends] = runs[ends + uint64(1)] = count
        ends += uint64(2)
    return ends


# A call would count references to the arrays for every row, which takes three times as long.
@compiled(inline="always")
def of_row(starts: Any, nodes: Any, values: Any, x: Any, a: int, lanes: Any) -> Any:
    """What row a, which is in no group, takes of x [N, W], in four sums that take turns.

    Of x [N, 1] four edges are read at a time, if need be of the next row too, unless all end before.
    """
    e, last, four = uint64(starts[a]), uint64(starts[a + uint64(1)]), uint64(len(FOUR))
    end = uint64(len(nodes)) - uint64(1)
    if len(lanes) == 1 and last + four <= uint64(len(nodes)):
        sums = narrow(zeros(FOUR), x)
        while e < last:
            weights = narrow(wide(beside(values, e, FOUR)), x)
            sums = increased(sums, picked(x, nodes, e, FOUR) * weights, last - e)
            e += four
        return total(sums, lanes)
    c0 = narrow(zeros(lanes), x)
    c1, c2, c3 = c0, c0, c0
    while e + four <= last:
        for k in range(four):
            soon(x, nodes, min(e + k + uint64(FAR), end), lanes)
        c0 = c0 + load(x, uint64(nodes[e]), lanes) * values[e]
        c1 = c1 + load(x, uint64(nodes[e + uint64(1)]), lanes) * values[e + uint64(1)]
        c2 = c2 + load(x, uint64(nodes[e + uint64(2)]), lanes) * values[e + uint64(2)]
        c3 = c3 + load(x, uint64(nodes[e + uint64(3)]), lanes) * values[e + uint64(3)]
        e += four
    while e < last:
        soon(x, nodes, min(e + uint64(FAR), end), lanes)
        c0, c1, c2, c3 = c1, c2, c3, c0 + load(x, uint64(nodes[e]), lanes) * values[e]
        e += uint64(1)
    return (c0 + c2) + (c1 + c3)


# --- a block of signals


@compiled
def sized(given: Any, start: Any, unit: Any, lanes: Any) -> Any:
    """The largest number of each signal's `given` and `start` [N, W] into `unit`; whether any start is not 0.

    1 where all are 0, and never so small that its inverse is infinite.
    """
    most, guess = magnitude(load(given, uint64(0), lanes)), magnitude(load(start, uint64(0), lanes))
    for i in range(uint64(len(given))):
        most = larger(most, magnitude(load(given, i, lanes)))
        guess = larger(guess, magnitude(load(start, i, lanes)))
    found = np.empty((2, len(unit)), given.dtype)
    store(found, uint64(0), most)
    store(found, uint64(1), guess)
    for k in range(uint64(len(unit))):
        unit[k] = max(found[0, k], found[1, k])
        unit[k] = max(unit[k], np.finfo(given.dtype).tiny) if unit[k] > 0 else 1.0
    return found[1].any()


@compiled
def lowered(lower: Any, r: Any, weights: Any, summed: bool, sums: Any, lanes: Any) -> None:
    """r ← (I − L)⁻¹ r; Σ r² and Σ or max of |r| with weights into `sums`, added up as `moved` does."""
    (starts, nodes, values, runs), a0 = lower, zeros(lanes)
    a1, a2, a3, b0, b1, b2, b3 = a0, a0, a0, a0, a0, a0, a0
    a, one, group = uint64(0), uint64(1), uint64(GROUP)
    for i in range(uint64(len(runs)) // uint64(2)):
        while a < uint64(runs[uint64(2) * i]):
            store(r, a, load(r, a, lanes) + of_row(starts, nodes, values, r, a, lanes))
            a += one
        while a < uint64(runs[uint64(2) * i + one]):
            e, last = uint64(starts[a]), uint64(starts[a + group])
            if len(lanes) == 1:
                eight = beside(r, a, EIGHT)
                while e < last:
                    eight = eight + picked(r, nodes, e, EIGHT) * beside(values, e, EIGHT)
                    e += group
                put(r, a, eight)
            else:
                for k in range(group):
                    q = load(r, a + k, lanes)
                    for f in range(e + k, last, group):
                        q = q + load(r, uint64(nodes[f]), lanes) * values[f]
                    store(r, a + k, q)
            a += group
    for a in range(uint64(len(weights))):
        v = wide(load(r, a, lanes))
        a0, a1, a2, a3 = a1, a2, a3, a0 + v * v
        y = magnitude(v) * weights[a]
        b0, b1, b2, b3 = b1, b2, b3, b0 + y if summed else larger(b0, y)
    store(sums, uint64(0), (a0 + a1) + (a2 + a3))
    store(sums, uint64(1), (b0 + b1) + (b2 + b3) if summed else larger(larger(b0, b1), larger(b2, b3)))


@compiled
def begun(nodes: Any, start: Any, unit: Any, y: Any, summed: bool, lanes: Any) -> None:
    """The start [N, W] as y, in units of 1/`unit` [1, W]."""
    (degree, _, _), scale = nodes, load(unit, uint64(0), lanes)
    for i in range(uint64(len(degree))):
        store(y, i, wide(load(start, i, lanes)) * scale * (1 / degree[i] if summed else 1.0))


@compiled(error_model="numpy")
def fitted(
    rows: Any, nodes: Any, given: Any, unit: Any, y: Any, summed: bool, share: Any, lanes: Any
) -> None:
    """What of y [N, W], the start, to begin with, its `share` [1, W]: ⟨y, b⟩ / ⟨y, Ay⟩, for Ax = b symmetric.

    No other multiple of y is nearer to the answer in the energy's norm. Of a signal that is its own start it
    is 1 where the walk leaves it as it is, and 1 − µ where the walk carries it elsewhere. `SAMPLED` nodes are
    asked, or all where a signal is 0 at these; and it is 1 unless it comes out well below.
    """
    (degree, mu, _), (starts, into, values), scale = nodes, rows, load(unit, uint64(0), lanes)
    count, width = uint64(len(degree)), uint64(len(lanes))
    every, found = max(count // uint64(SAMPLED), uint64(1)), np.zeros((4, len(lanes)))
    for part in range(uint64(2)):
        above = below = zeros(lanes)
        for i in range(uint64(0), count, every):
            here = load(y, i, lanes)
            if mu[i] == 0 or not any_of(here):
                continue
            left = here - of_row(starts, into, values, y, i, lanes) * mu[i]
            here = here * ((1.0 if summed else degree[i]) / mu[i])
            above = above + here * (wide(load(given, i, lanes)) * scale)
            below = below + here * (left * (degree[i] if summed else 1.0))
        store(found, uint64(2) * part, above)
        store(found, uint64(2) * part + uint64(1), below)
        if every == uint64(1) or found[1].all():
            break
        every = uint64(1)
    for k in range(width):
        row = uint64(0) if found[1, k] != 0 else uint64(2)
        ratio = found[row, k] / found[row + uint64(1), k]
        share[0, k] = ratio if 0 <= ratio < NEARLY else 1.0


@compiled
def gathered(nodes: Any, mask: Any, share: Any, x: Any, y: Any, lanes: Any) -> None:
    """y ← its share + x and x ← 0 where the mask is not 0."""
    (degree, _, node), chosen, nothing = nodes, load(mask, uint64(0), lanes), narrow(zeros(lanes), x)
    own, which = load(share, uint64(0), lanes), wide(chosen)
    for i in range(uint64(len(degree))):
        a = uint64(int64(node[i, 1]))
        here, before = load(x, a, lanes), load(y, i, lanes)
        store(y, i, where(which, before * own + wide(here) * node[i, 0], before))
        store(x, a, where(chosen, nothing, here))


@compiled(error_model="numpy")
def residual(
    rows: Any,
    nodes: Any,
    given: Any,
    unit: Any,
    y: Any,
    share: Any,
    started: bool,
    w: Any,
    summed: bool,
    lanes: Any,
) -> None:
    """w, in the symmetric system, the residual of y's share, in float64 from the walk itself.

    y [N, W], which is 0 if not `started`, is in float64, in units of 1/`unit` [1, W], and its `share` [1, W]
    solves with the walk that is stochastic by rows; `summed` says that `given` [N, W] is not for this but for
    its transpose, which solves with D y.
    """
    (degree, mu, node), (starts, into, values) = nodes, rows
    scale, own = load(unit, uint64(0), lanes), load(share, uint64(0), lanes)
    for i in range(uint64(len(degree))):
        gain = degree[i] if summed else 1.0
        v = wide(load(given, i, lanes)) * scale
        if started:
            v = v - (load(y, i, lanes) - of_row(starts, into, values, y, i, lanes) * mu[i]) * own * gain
        scaled = node[i, 0] / (mu[i] * gain) * degree[i] if mu[i] > 0 else 0.0
        store(w, uint64(int64(node[i, 1])), narrow(v * scaled, w))


@compiled
def taken(mask: Any, w: Any, r: Any, lanes: Any) -> None:
    """r ← w where the mask is not 0."""
    chosen = load(mask, uint64(0), lanes)
    for a in range(uint64(len(r))):
        store(r, a, where(chosen, load(w, a, lanes), load(r, a, lanes)))


@compiled
def _back(upper: Any, r: Any, p: Any, turn: Any, t: Any, lanes: Any) -> None:
    """p ← r + turn·p and t = (I − Lᵀ)⁻¹ p."""
    (starts, nodes, values, runs), beta = upper, load(turn, uint64(0), lanes)
    a, i, one, group = uint64(len(starts) - 1), uint64(len(runs)), uint64(1), uint64(GROUP)
    while i > 0:
        i -= uint64(2)
        while a > uint64(runs[i]):
            e, last = uint64(starts[a - group]), uint64(starts[a])
            if len(lanes) == 1:
                a -= group
                eight = beside(r, a, EIGHT) + beside(p, a, EIGHT) * turn[0, 0]
                put(p, a, eight)
                while e < last:
                    eight = eight + picked(t, nodes, e, EIGHT) * beside(values, e, EIGHT)
                    e += group
                put(t, a, eight)
            else:
                for k in range(group):
                    a -= one
                    q = load(r, a, lanes) + load(p, a, lanes) * beta
                    store(p, a, q)
                    for f in range(e + (group - one - k), last, group):
                        q = q + load(t, uint64(nodes[f]), lanes) * values[f]
                    store(t, a, q)
        while a > (uint64(runs[i - one]) if i > 0 else uint64(0)):
            a -= one
            q = load(r, a, lanes) + load(p, a, lanes) * beta
            store(p, a, q)
            store(t, a, q + of_row(starts, nodes, values, t, a, lanes))


@compiled
def _along_by_fours(p: Any, t: Any, w: Any, parts: Any, four: Any) -> None:
    """⟨p, t + w⟩ over all nodes but the last three at most, its four sums into `parts`."""
    s = zeros(four)
    for i in range(uint64(len(p)) // uint64(4)):
        s = s + wide(load(p, i, four)) * wide(load(w, i, four) + load(t, i, four))
    store(parts, uint64(0), s)


@compiled
def _forth(lower: Any, p: Any, t: Any, w: Any, sums: Any, lanes: Any) -> None:
    """w = (I − L)⁻¹(p − t), and ⟨p, t + w⟩ into a row of `sums`."""
    (starts, nodes, values, runs), s0 = lower, zeros(lanes)
    s1, s2, s3 = s0, s0, s0
    a, one, group = uint64(0), uint64(1), uint64(GROUP)
    for i in range(uint64(len(runs)) // uint64(2)):
        while a < uint64(runs[uint64(2) * i]):
            moved, direction = load(t, a, lanes), load(p, a, lanes)
            q = (direction - moved) + of_row(starts, nodes, values, w, a, lanes)
            store(w, a, q)
            if len(lanes) > 1:
                s0, s1, s2, s3 = s1, s2, s3, s0 + wide(direction) * wide(q + moved)
            a += one
        while a < uint64(runs[uint64(2) * i + one]):
            e, last = uint64(starts[a]), uint64(starts[a + group])
            if len(lanes) == 1:
                eight = beside(p, a, EIGHT) - beside(t, a, EIGHT)
                while e < last:
                    eight = eight + picked(w, nodes, e, EIGHT) * beside(values, e, EIGHT)
                    e += group
                put(w, a, eight)
            else:
                for k in range(group):
                    moved, direction = load(t, a + k, lanes), load(p, a + k, lanes)
                    q = direction - moved
                    for f in range(e + k, last, group):
                        q = q + load(w, uint64(nodes[f]), lanes) * values[f]
                    store(w, a + k, q)
                    s0, s1, s2, s3 = s1, s2, s3, s0 + wide(direction) * wide(q + moved)
            a += group
    if len(lanes) == 1:
        # Of one signal four nodes stand beside each other.
        parts = np.empty((4, 1), np.float64)
        _along_by_fours(p, t, w, parts, (0, 0, 0, 0))
        s0, s1, s2, s3 = four_rows(parts, uint64(0), lanes)
        for a in range(uint64(len(p)) // uint64(4) * uint64(4), uint64(len(p))):
            s0, s1, s2, s3 = (
                s1,
                s2,
                s3,
                s0 + wide(load(p, a, lanes)) * wide(load(w, a, lanes) + load(t, a, lanes)),
            )
    store(sums, uint64(0), (s0 + s1) + (s2 + s3))


@compiled
def _moved_by_fours(
    x: Any, r: Any, t: Any, w: Any, alpha: Any, weights: Any, summed: bool, parts: Any, four: Any
) -> None:
    """What `moved` does, for all nodes but the last three at most; its eight sums so far into `parts`."""
    a = b = zeros(four)
    for i in range(uint64(len(weights)) // uint64(4)):
        direction = load(t, i, four)
        store(x, i, load(x, i, four) + direction * alpha)
        q = load(r, i, four) - (direction + load(w, i, four)) * alpha
        store(r, i, q)
        v = wide(q)
        a = a + v * v
        y = magnitude(v) * load(weights, i, four)
        b = b + y if summed else larger(b, y)
    store(parts, uint64(0), a)
    store(parts, uint64(1), b)


@compiled
def four_rows(x: Any, first: int, lanes: Any) -> Any:
    """Four rows."""
    one = uint64(1)
    second, third, last = first + one, first + one + one, first + one + one + one
    return load(x, first, lanes), load(x, second, lanes), load(x, third, lanes), load(x, last, lanes)


@compiled
def moved(
    x: Any, r: Any, t: Any, w: Any, step: Any, weights: Any, summed: bool, sums: Any, lanes: Any
) -> None:
    """x ← x + step·t, r ← r − step·(t + w); Σ r² and Σ or max of |r| with weights into `sums`."""
    alpha, a0, first = load(step, uint64(0), lanes), zeros(lanes), uint64(0)
    a1, a2, a3, b0, b1, b2, b3 = a0, a0, a0, a0, a0, a0, a0
    if len(lanes) == 1:
        # Of one signal four nodes stand beside each other.
        parts = np.empty((8, 1), np.float64)
        _moved_by_fours(x, r, t, w, step[0, 0], weights, summed, parts, (0, 0, 0, 0))
        first = uint64(len(weights)) // uint64(4) * uint64(4)
        a0, a1, a2, a3 = four_rows(parts, uint64(0), lanes)
        b0, b1, b2, b3 = four_rows(parts, uint64(4), lanes)
    for i in range(first, uint64(len(weights))):
        direction = load(t, i, lanes)
        store(x, i, load(x, i, lanes) + direction * alpha)
        q = load(r, i, lanes) - (direction + load(w, i, lanes)) * alpha
        store(r, i, q)
        v = wide(q)
        a0, a1, a2, a3 = a1, a2, a3, a0 + v * v
        y = magnitude(v) * weights[i]
        b0, b1, b2, b3 = b1, b2, b3, b0 + y if summed else larger(b0, y)
    store(sums, uint64(0), (a0 + a1) + (a2 + a3))
    store(sums, uint64(1), (b0 + b1) + (b2 + b3) if summed else larger(larger(b0, b1), larger(b2, b3)))


@compiled(error_model="numpy")
def iterated(
    lower: Any,
    upper: Any,
    weights: Any,
    summed: bool,
    vectors: Any,
    state: Any,
    most: int,
    lanes: Any,
) -> None:
    """Conjugate gradients, at most so many steps; what changes is in `vectors` and `state`."""
    x, r, p, t, w, turn, step, sums = vectors
    active, steps, square, bound, halved, halved_at, target, factor, largest, limit, patience = state
    for _ in range(most):
        if not active.any():
            return
        _back(upper, r, p, turn, t, lanes)
        _forth(lower, p, t, w, sums, lanes)
        for k in range(len(active)):
            # No curvature, no step: that is rounding, or an operator that is not what it says.
            active[k] = active[k] and sums[0, k] > 0
            step[0, k] = square[k] / sums[0, k] if active[k] else 0.0
        moved(x, r, t, w, step, weights, summed, sums, lanes)
        for k in range(len(active)):
            turn[0, k] = 0.0
            if not active[k]:
                continue
            steps[k] += 1
            turn[0, k], square[k] = sums[0, k] / square[k], sums[0, k]
            bound[k] = sums[1, k] * factor[k]
            if bound[k] < 0.5 * halved[k]:
                halved[k], halved_at[k] = bound[k], steps[k]
            goes_on = bound[k] > target[k] and bound[k] < largest[k] and steps[k] < limit[k]
            active[k] = goes_on and steps[k] - halved_at[k] < patience[k]


@compiled
def left(
    nodes: Any,
    y: Any,
    share: Any,
    x: Any,
    unit: Any,
    found: Any,
    summed: bool,
    added: bool,
    lanes: Any,
) -> None:
    """y's share + x in the units of the right-hand sides, added to `found` [N, W] or in its place."""
    (degree, _, node), scale, own = nodes, load(unit, uint64(0), lanes), load(share, uint64(0), lanes)
    for i in range(uint64(len(degree))):
        here = load(y, i, lanes) * own + wide(load(x, uint64(int64(node[i, 1])), lanes)) * node[i, 0]
        value = here * (degree[i] if summed else 1.0) * scale
        store(found, i, narrow(wide(load(found, i, lanes)) + value if added else value, found))
