"""Weights by rows into a walk, in one pass over the edges, compiled; and whether they are symmetric.

Sums go edge after edge and quotients are rounded once, as in `sparse`, so that a walk has the same bits
where numba is not installed. This file is read where it is, and compiled when it is first used.
"""

from typing import Any

import numpy as np
from numba import uint64

from graphdiff.memory import HUGE, lent
from graphdiff.operators.compiled import compiled

# Colours counted apart; nodes beyond them share the last, which costs speed and no more.
COLOURS = 256
# Bytes of a cache line, where each array of a block begins.
LINE = 64


def block(*parts: tuple[int, Any]) -> list[Any]:
    """Arrays of so many numbers of a dtype each, not filled, in one piece of memory.

    To touch a large piece takes few, huge pages; many small ones take as long as the work in them.
    """
    sizes = [-(-count * np.dtype(dtype).itemsize // LINE) * LINE for count, dtype in parts]
    length = sum(sizes) + LINE
    memory = lent(length) if length >= 2 * HUGE else np.empty(length, np.uint8)
    first, arrays = -memory.ctypes.data % LINE, []
    for size, (count, dtype) in zip(sizes, parts, strict=True):
        arrays.append(memory[first : first + size].view(dtype)[:count])
        first += size
    return arrays


@compiled(error_model="numpy")
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


@compiled
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


@compiled
def _sorted(order: Any, key: Any, keys: int) -> Any:
    """The nodes of an order by their keys below `keys`, those of one key in the order they stand in."""
    place, found = np.zeros(keys + 1, np.int64), np.empty(len(order), np.uint32)
    for a in range(uint64(len(order))):
        place[uint64(key[uint64(order[a])]) + uint64(1)] += 1
    place = np.cumsum(place)
    for a in range(uint64(len(order))):
        k = uint64(key[uint64(order[a])])
        found[uint64(place[k])] = order[a]
        place[k] += 1
    return found


@compiled
def ordered(starts: Any, nodes: Any) -> Any:
    """Nodes by colour, within one the largest degrees first, of these those with most edges back; [N] uint32.

    And whether a node has a loop.

    Few neighbours share a colour, so a sweep seldom waits for the row before; rows of one length in both
    triangles follow each other, so that its branches are foreseen, which is worth up to half of its time; and
    the hubs, which all others read, lie together.
    """
    count, none = uint64(len(starts) - 1), uint64(COLOURS)
    # How much shorter than the longest row.
    longest, shorter = uint64(0), np.empty(count, np.uint32)
    for i in range(count):
        longest = max(longest, uint64(starts[i + uint64(1)]) - uint64(starts[i]))
    for i in range(count):
        shorter[i] = longest - (uint64(starts[i + uint64(1)]) - uint64(starts[i]))
    natural = np.arange(len(shorter)).astype(np.uint32)

    colour = np.full(count, none, np.uint16)
    taken, looped = np.full(COLOURS + 1, count, np.uint64), False
    for i in _sorted(natural, shorter, longest + 1):
        for e in range(uint64(starts[uint64(i)]), uint64(starts[uint64(i) + uint64(1)])):
            looped |= uint64(nodes[e]) == uint64(i)
            taken[uint64(colour[uint64(nodes[e])])] = i
        found = uint64(0)
        while found < none - uint64(1) and taken[found] == i:
            found += uint64(1)
        colour[uint64(i)] = found

    ahead = np.zeros(count, np.uint32)
    for i in range(count):
        for e in range(uint64(starts[i]), uint64(starts[i + uint64(1)])):
            ahead[i] += colour[uint64(nodes[e])] >= colour[i]
    order = _sorted(_sorted(natural, ahead, longest + 1), shorter, longest + 1)
    return _sorted(order, colour, COLOURS), looped
