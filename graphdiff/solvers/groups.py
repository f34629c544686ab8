"""Rows of one length beside each other that do not depend on each other, of a triangle, compiled.

A processor foresees where the rows of such a group end, and solves for one signal eight of them at a time.

This file is read where numba is installed, and compiled when it is first used.
"""

from typing import Any

import numpy as np
from numba import uint64

from graphdiff.operators.compiled import compiled
from graphdiff.operators.lanes import (
    any_in,
    beside,
    load,
    narrow,
    picked,
    put,
    store,
    times_beside,
    wide,
    zeros,
)
from graphdiff.operators.rows import block
from graphdiff.solvers.triangles import of_row

# Rows of a group, and the number of edges with which a row belongs to none.
GROUP, LONG = 8, 16
EIGHT, ONE = (0,) * GROUP, (0,)


def in_groups(triangle: Any) -> Any:
    """A triangle, whose edges change their places, and its runs, as `grouped` has them."""
    # Between two runs of groups stands a row at least.
    runs = np.empty(2 * (len(triangle[0]) // (GROUP + 1) + 3), np.uint32)
    return *triangle, runs[: grouped(*triangle[:3], runs)]


@compiled
def grouped(starts: Any, nodes: Any, values: Any, runs: Any) -> Any:
    """How many `runs` there are: in turn rows one after the other and groups, from row 0 on; each one's end.

    A group is of `GROUP` rows that follow each other, none of which depends on another, with as many edges,
    less than `LONG`. Where their edges stand the first of each row come first, then the second.
    """
    group, longest = uint64(GROUP), uint64(LONG - 1)
    numbers, weights = np.empty(GROUP * LONG, nodes.dtype), np.empty(GROUP * LONG)
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
            if values is not None:
                put(weights, e, wide(beside(values, first + e, EIGHT)))
        if inside:
            continue
        # One edge a row is in order as it is.
        for e in range(length if length > uint64(1) else uint64(0)):
            for k in range(group):
                into, of = first + e * group + k, k * length + e
                nodes[into] = numbers[of]
                if values is not None:
                    values[into] = weights[of]
        if ends and runs[ends - uint64(1)] == row:
            runs[ends - uint64(1)] = a
        else:
            runs[ends], runs[ends + uint64(1)] = row, a
            ends += uint64(2)
    if not ends or runs[ends - uint64(1)] < count:
        runs[ends] = runs[ends + uint64(1)] = count
        ends += uint64(2)
    return ends


def copied_in_groups(triangle: Any) -> Any:
    """`in_groups` of a copy of a triangle's edges."""
    starts, nodes, values, gains = triangle
    size = len(nodes), 0 if values is None else len(values)
    into, of = block((size[0], nodes.dtype), (size[1], gains.dtype))
    into[:] = nodes
    if values is not None:
        of[:] = values
    return in_groups((starts, into, None if values is None else of, gains))


# --- one signal, whose sums are those of `of_row` to the bit


# A call would count references to the arrays for every group.
@compiled(inline="always")
def _of_rows(starts: Any, nodes: Any, values: Any, z: Any, a: int) -> Any:
    """The rows of a group, from row a on, times z [N, 1], in four sums each that take turns."""
    e, last, group = uint64(starts[a]), uint64(starts[a + uint64(GROUP)]), uint64(GROUP)
    c0 = narrow(zeros(EIGHT), z)
    c1, c2, c3 = c0, c0, c0
    while e < last:
        c0, c1, c2, c3 = c1, c2, c3, c0 + times_beside(picked(z, nodes, e, EIGHT), values, e)
        e += group
    return (c0 + c2) + (c1 + c3)


@compiled
def forth(lower: Any, b: Any, z: Any) -> None:
    """z = (I − L)⁻¹ b, [N, 1] each, of a triangle in groups; b may be z."""
    starts, nodes, values, gains, runs = lower
    a, one, two, group = uint64(0), uint64(1), uint64(2), uint64(GROUP)
    for i in range(uint64(len(runs)) // two):
        while a < uint64(runs[two * i]):
            store(z, a, load(b, a, ONE) + of_row(starts, nodes, values, z, a, ONE) * gains[a])
            a += one
        while a < uint64(runs[two * i + one]):
            put(z, a, beside(b, a, EIGHT) + times_beside(_of_rows(starts, nodes, values, z, a), gains, a))
            a += group


@compiled
def back(upper: Any, b: Any, z: Any) -> None:
    """z = (I − U)⁻¹ b, [N, 1] each, of a triangle in groups; b may be z."""
    starts, nodes, values, gains, runs = upper
    a, i, one, group = uint64(len(starts) - 1), uint64(len(runs)), uint64(1), uint64(GROUP)
    while i > 0:
        i -= uint64(2)
        while a > uint64(runs[i]):
            a -= group
            put(z, a, beside(b, a, EIGHT) + times_beside(_of_rows(starts, nodes, values, z, a), gains, a))
        while a > (uint64(runs[i - one]) if i > 0 else uint64(0)):
            a -= one
            store(z, a, load(b, a, ONE) + of_row(starts, nodes, values, z, a, ONE) * gains[a])
