"""Weights by rows into a walk, in one pass over the edges, compiled; and whether they are symmetric.

Sums go edge after edge and quotients are rounded once, as in `sparse`, so that a walk has the same bits
where numba is not installed. This file is read where it is, and compiled when it is first used.
"""

from typing import Any

import numpy as np
from numba import njit, uint64

# Colours counted apart; nodes beyond them share the last, which costs speed and no more.
COLOURS = 256
# Bytes of a cache line, where each array of a block begins.
LINE = 64


def block(*parts: tuple[int, Any]) -> list[Any]:
    """Arrays of so many numbers of a dtype each, not filled, in one piece of memory.

    A large piece numpy gets from Linux in few, huge pages; many small ones take as long as the work in them.
    """
    sizes = [-(-count * np.dtype(dtype).itemsize // LINE) * LINE for count, dtype in parts]
    memory = np.empty(sum(sizes) + LINE, np.uint8)
    first, arrays = -memory.ctypes.data % LINE, []
    for size, (count, dtype) in zip(sizes, parts, strict=True):
        arrays.append(memory[first : first + size].view(dtype)[:count])
        first += size
    return arrays


@njit(cache=True, nogil=True, error_model="numpy")
def normalised(
    starts: Any,
    nodes: Any,
    weights: Any,
    ordinary: tuple[float, float],
    begins: Any,
    into: Any,
    values: Any,
    sums: Any,
    degree: Any,
) -> bool:
    """Whether every row has an edge, every edge a node, and every weight lies between the `ordinary` ones.

    If so, `begins` and `into` are copies of `starts` [N + 1] and `nodes` [edges], `degree` [N] is a row's sum
    of weights, `values` [edges] the weights divided by it, and `sums` [N] a row's sum of those.
    """
    count, edges = uint64(len(starts) - 1), uint64(len(nodes))
    least, most = ordinary
    if starts[0] != 0 or starts[count] != len(nodes):
        return False
    begins[0] = 0
    for i in range(count):
        first, last = uint64(starts[i]), uint64(starts[i + uint64(1)])
        if not first < last <= edges:
            return False
        total, summed = 0.0, 0.0
        for e in range(first, last):
            if not least < weights[e] < most or uint64(nodes[e]) >= count:
                return False
            into[e] = nodes[e]
            total += weights[e]
        for e in range(first, last):
            values[e] = weights[e] / total
            summed += values[e]
        begins[i + uint64(1)], degree[i], sums[i] = last, total, summed
    return True


@njit(cache=True, nogil=True)
def symmetric(starts: Any, nodes: Any, weights: Any) -> bool:
    """Whether every edge has a mirror image of the very same weight, for rows in the order of their nodes.

    The mirror images of the edges out of nodes 0, 1, ... stand in each row in this order too, so one place a
    row tells which comes next.
    """
    count, edges = uint64(len(starts) - 1), uint64(len(nodes))
    place = starts[:-1].copy()
    for i in range(count):
        last = uint64(starts[i + uint64(1)])
        if uint64(place[i]) > last:
            return False
        for e in range(uint64(place[i]), last):
            j = uint64(nodes[e])
            if j < i:
                return False
            if j > i:
                mirror = uint64(place[j])
                if mirror >= edges or uint64(nodes[mirror]) != i or weights[mirror] != weights[e]:
                    return False
                place[j] = mirror + uint64(1)
    return True


@njit(cache=True, nogil=True)
def ordered(starts: Any, nodes: Any) -> Any:
    """Nodes by colour, within one the largest degrees first, [N] uint32; and whether one has a loop.

    Few neighbours share a colour, so a sweep seldom waits for the row before; rows of one length follow each
    other, so that its branches are foreseen; and the hubs, which all others read, lie together.
    """
    count = uint64(len(starts) - 1)
    longest = uint64(0)
    for i in range(count):
        longest = max(longest, uint64(starts[i + uint64(1)]) - uint64(starts[i]))
    place = np.zeros(longest + uint64(2), np.int64)
    for i in range(count):
        place[longest - (uint64(starts[i + uint64(1)]) - uint64(starts[i])) + uint64(1)] += 1
    place = np.cumsum(place)
    descending = np.empty(count, np.uint32)
    for i in range(count):
        shorter = longest - (uint64(starts[i + uint64(1)]) - uint64(starts[i]))
        descending[uint64(place[shorter])] = i
        place[shorter] += 1

    none = uint64(COLOURS)
    colour = np.full(count, none, np.uint16)
    taken = np.full(COLOURS + 1, count, np.uint64)
    many, looped = np.zeros(COLOURS + 2, np.int64), False
    for a in range(count):
        i = uint64(descending[a])
        for e in range(uint64(starts[i]), uint64(starts[i + uint64(1)])):
            looped |= uint64(nodes[e]) == i
            taken[uint64(colour[uint64(nodes[e])])] = i
        found = uint64(0)
        while found < none - uint64(1) and taken[found] == i:
            found += uint64(1)
        colour[i] = found
        many[found + uint64(1)] += 1
    many = np.cumsum(many)
    order = np.empty(count, np.uint32)
    for a in range(count):
        i = uint64(descending[a])
        order[uint64(many[uint64(colour[i])])] = i
        many[uint64(colour[i])] += 1
    return order, looped
