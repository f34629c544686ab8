"""The first ranks and what is certain of them, compiled: as `topk` finds them, in two passes over the nodes.

The first sums what bounds the errors and finds k nodes whose y is least bounded from below; the second looks
at those alone whose y may be as large. This file is read where numba is installed.
"""

import math
from typing import Any

import numpy as np
from numba import njit, uint64

from graphdiff.operators.compiled import compiled
from graphdiff.operators.lanes import any_of, beside, larger, magnitude, store, zeros

EPS = float(np.finfo(np.float64).eps)
# More places than k, so that the largest are parted from the others seldom.
SPARE = 64
# As many nodes are looked at at once as these are.
BLOCK = (0,) * 16


# Numba compiles numpy's partition and argsort for longer than all else here together: both are written out.
@compiled
def kth(values: Any, k: int) -> Any:
    """The k-th largest, by Hoare's selection; values change places."""
    low, high = 0, len(values) - 1
    while low < high:
        pivot, i, j = values[(low + high) // 2], low, high
        while i <= j:
            while values[i] > pivot:
                i += 1
            while values[j] < pivot:
                j -= 1
            if i <= j:
                values[i], values[j] = values[j], values[i]
                i, j = i + 1, j - 1
        if k - 1 <= j:
            high = j
        elif k - 1 >= i:
            low = i
        else:
            break
    return values[k - 1]


@compiled
def parted(values: Any, places: Any, lower: Any, upper: Any, count: int, k: int) -> Any:
    """The k largest of so many values come first, of equals the earlier; all four arrays alike.

    Returns:
        The least of them, and the largest of `upper` of the others.
    """
    bar, rest = kth(values[:count].copy(), k), 0.0
    equal, a = k, uint64(0)
    for b in range(uint64(count)):
        equal -= values[b] > bar
    for b in range(uint64(count)):
        same = values[b] == bar
        if values[b] > bar or (same and equal > 0):
            equal -= same
            values[a], places[a], lower[a], upper[a] = values[b], places[b], lower[b], upper[b]
            a += uint64(1)
        else:
            rest = max(rest, upper[b])
    return bar, rest


@compiled
def lined(values: Any, nodes: Any) -> Any:
    """The order of values, the largest first, of equals that of the smaller node; by Shell's sort."""
    count = len(values)
    order, gap = np.arange(count), count // 2
    while gap > 0:
        for i in range(gap, count):
            a, j = order[i], i
            while j >= gap:
                b = order[j - gap]
                if values[b] > values[a] or (values[b] == values[a] and nodes[b] < nodes[a]):
                    break
                order[j], j = b, j - gap
            order[j] = a
        gap = 1 if gap == 2 else gap * 5 // 11
    return order


@njit(inline="always")
def within(side: Any, column: float, weight: float) -> float:
    """One side of a reach, at a node; what is no number bounds nothing."""
    bound, constant, rooted, linear = math.inf, side[0], side[1] * column, side[2] * weight
    if constant < bound:
        bound = constant
    if rooted < bound:
        bound = rooted
    if linear < bound:
        bound = linear
    return bound


@compiled
def reached(x: Any, r: Any, b: Any, weight: Any, bounds: Any) -> Any:
    """The two sides of the `Reach` of a residual, what rounding may hide of it, and Σ|r|.

    No sum is off by more than N·EPS/2 of what it sums, which is counted.
    """
    by_sum, by_root, by_most, _, _, rounding = bounds
    sizes = totals = slacks = squares = lows = highs = most = zeros(BLOCK)
    first, block = uint64(0), uint64(len(BLOCK))
    while first + block <= len(x):
        left, w = beside(r, first, BLOCK), beside(weight, first, BLOCK)
        much, quotient = magnitude(left), left / w
        slack = (beside(x, first, BLOCK) * 2.0 + much + beside(b, first, BLOCK) * 2.0) * rounding
        sizes, totals, slacks = sizes + much, totals + left, slacks + slack
        squares = squares + quotient * left
        lows, highs, most = larger(lows, quotient * -1.0), larger(highs, quotient), larger(most, slack / w)
        first += block
    lanes = np.empty((7, len(BLOCK)))
    for k, each in enumerate((sizes, totals, slacks, squares, lows, highs, most)):
        store(lanes, uint64(k), each)
    size, total, hidden, square = 0.0, 0.0, 0.0, 0.0
    low, high, largest = 0.0, 0.0, 0.0
    for k in range(block):
        size, total = size + lanes[0, k], total + lanes[1, k]
        hidden, square = hidden + lanes[2, k], square + lanes[3, k]
        low, high, largest = max(low, lanes[4, k]), max(high, lanes[5, k]), max(largest, lanes[6, k])
    for a in range(first, uint64(len(x))):
        much, quotient = abs(r[a]), r[a] / weight[a]
        slack = rounding * (2 * x[a] + much + 2 * b[a])
        size, total, hidden, square = size + much, total + r[a], hidden + slack, square + quotient * r[a]
        low, high, largest = max(low, -quotient), max(high, quotient), max(largest, slack / weight[a])
    count = len(x) * EPS
    mass = hidden * (1 + count) + 4 * count * size
    largest += 4 * EPS * max(low, high)
    energy = math.sqrt(square) + math.sqrt(mass * largest) + count * math.sqrt(square)
    below = by_sum * ((size - total) / 2 + mass), by_root * energy, by_most * (low + largest)
    above = by_sum * ((size + total) / 2 + mass), by_root * energy, by_most * (high + largest)
    return below, above, hidden, size


@njit(inline="always")
def blur(x: Any, r: Any, b: Any, rounding: float) -> Any:
    """What rounding may hide of a node, that of x + r included."""
    return rounding * (2 * x + abs(r) + 2 * b) + 4 * EPS * x


@compiled
def ranked(
    x: Any,
    r: Any,
    b: Any,
    weight: Any,
    nodes: Any,
    columns: Any,
    bounds: Any,
    closed: bool,
    k: int,
    tol: float,
) -> Any:
    """The first k ranks among the known nodes.

    Args:
        x: Answer, [known].
        r: Residual, alike.
        b: Right-hand side, alike.
        weight: w, alike.
        nodes: Their numbers, alike.
        columns: c of all nodes, by their numbers.
        bounds: What the sum, the root and the largest quotient of a residual are multiplied by in a `Reach`,
            the largest c and w of any node, and what rounding may hide at a node, by what is there.
        closed: Whether no node can be reached but those.
        k: How many ranks.
        tol: As in `top_k`.

    Returns:
        The fields of `_Ranks`; what rounding may hide of the residual; and Σ|r|.
    """
    below, above, hidden, size = reached(x, r, b, weight, bounds)
    rounding = bounds[5]
    count, block, room, full, bar = uint64(len(x)), uint64(len(BLOCK)), 2 * k + SPARE, 0, -math.inf
    values, places = np.empty(room), np.empty(room, np.uint64)
    lower, upper = np.zeros(room), np.zeros(room)
    for first in range(uint64(0), count, block):
        last = min(first + block, count)
        if first + block == last:
            middles = beside(x, first, BLOCK) + beside(r, first, BLOCK)
            if not any_of(larger(middles - bar, zeros(BLOCK))):
                continue
        for a in range(first, last):
            if x[a] + r[a] > bar:
                values[full], places[full] = x[a] + r[a], a
                full += 1
                if full == room:
                    bar, full = parted(values, places, lower, upper, full, k)[0], k
    # No node without more than this is one of k: the least of k nodes has it for certain. Nor does any such
    # node count beside these: each of the k is either ranked, with more, or itself left over.
    least = 0.0
    if full > k:
        parted(values, places, lower, upper, full, k)
        full = k
    if full == k:
        least = math.inf
        for j in range(k):
            a = places[j]
            bound = within(below, columns[uint64(nodes[a])], weight[a])
            bound += blur(x[a], r[a], b[a], rounding)
            least = min(least, max(x[a] + r[a] - bound, 0.0))
        least *= 1 - 1e-9
    rest = 0.0 if closed else within(above, bounds[3], bounds[4])
    if not hidden + size < math.inf:
        # Nothing is known of what is no number.
        rest = math.inf
    full, bar = 0, -math.inf
    for first in range(uint64(0), count, block):
        last = min(first + block, count)
        # Cheap, and most nodes are out of the question by this alone.
        if first + block == last and least > 0:
            here, left = beside(x, first, BLOCK), beside(r, first, BLOCK)
            slacks = (here * 2.0 + magnitude(left) + beside(b, first, BLOCK) * 2.0) * rounding
            short = larger(zeros(BLOCK) - above[0], beside(weight, first, BLOCK) * -above[2])
            if not any_of(larger(here * (1 + 4 * EPS) + left + slacks - short - least, zeros(BLOCK))):
                continue
        for a in range(first, last):
            middle, slack = x[a] + r[a], blur(x[a], r[a], b[a], rounding)
            # No less than `high`.
            most = middle + (min(above[0], above[2] * weight[a]) + slack)
            if most < least or (most <= rest and (most + max(middle, 0.0)) / 2 <= bar):
                continue
            column = columns[uint64(nodes[a])]
            high = max(middle + (within(above, column, weight[a]) + slack), 0.0)
            if high < least:
                continue
            low = max(middle - (within(below, column, weight[a]) + slack), 0.0)
            value = (low + high) / 2
            if not value > bar:
                rest = max(rest, high)
                continue
            values[full], places[full], lower[full], upper[full] = value, a, low, high
            full += 1
            if full == room:
                bar, left = parted(values, places, lower, upper, full, k)
                full, rest = k, max(rest, left)
    if full > k:
        bar, left = parted(values, places, lower, upper, full, k)
        full, rest = k, max(rest, left)
    found, told = np.full(k, -1), np.zeros((4, k))
    certified = np.full(k, rest == 0)
    chosen = np.empty(full, np.int64)
    for j in range(full):
        chosen[j] = nodes[places[j]]
    order = lined(values[:full], chosen)
    floor, before, apart, widest, certain = math.inf, True, 1.0, 0.0, full == k or rest == 0
    for j in range(full):
        a = order[j]
        found[j], told[0, j], told[1, j], told[2, j] = chosen[a], values[a], lower[a], upper[a]
        if j > 0:
            # By how much both must narrow for it to be known which is larger.
            width = told[2, j - 1] - told[1, j - 1] + told[2, j] - told[1, j]
            gap = told[1, j - 1] + told[2, j - 1] - told[1, j] - told[2, j] + 2 * tol
            apart = max(apart, width / gap)
    later = rest
    for j in range(full - 1, -1, -1):
        # The most that any later node can have.
        told[3, j] = later
        later = max(later, told[2, j])
    for j in range(full):
        # Everyone up to here is larger than everyone after.
        floor = min(floor, told[1, j])
        cut = floor > told[3, j]
        certified[j], before = cut and before, cut
        told[3, j] = max(told[3, j] - told[1, j], 0.0)
        widest, certain = max(widest, told[3, j]), certain and cut
    return (found, told, certified, apart, widest <= tol, certain), hidden, size
