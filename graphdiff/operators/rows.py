"""Weights by rows into a walk, in one pass over the edges, compiled; and whether they are symmetric.

Sums go edge after edge and quotients are rounded once, as in `sparse`, so that a walk has the same bits
where numba is not installed. This file is read where it is, and compiled when it is first used.
"""

import itertools
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types, uint64
from numba.extending import intrinsic

from graphdiff.memory import LENT, lent
from graphdiff.operators.compiled import compiled
from graphdiff.operators.lanes import LINE, ahead, fill, single

# Colours counted apart; nodes beyond them share the last, which costs speed and no more.
COLOURS = 256
# The bits of a word are colours below `OTHER`, and this is all others or none yet.
OTHER = 63
# A node and where its row starts are the halves of a word.
NODE, HALF = 2**32 - 1, 32
# Fewer nodes of one colour and one degree than are swept at once stand as they are.
FEW = 8
# So many rows ahead a row is asked for that lies anywhere in memory.
SOON = 12
# Edges that are looked at before it is asked whether to go on.
PART = 1024
# Equal numbers that are written at once.
SIXTEEN = (0,) * 16


def block(*parts: tuple[int, Any]) -> list[Any]:
    """Arrays of so many numbers of a dtype each, not filled, in one piece of memory.

    To touch a large piece takes few, huge pages; many small ones take as long as the work in them.
    """
    sizes = [-(-count * np.dtype(dtype).itemsize // LINE) * LINE for count, dtype in parts]
    length = sum(sizes) + LINE
    memory = lent(length)
    # Longer ones begin where a page does; to ask numpy where takes as long as to get them.
    first = 0 if length >= LENT else -memory.__array_interface__["data"][0] % LINE
    begins = itertools.accumulate(sizes, initial=first)
    return [np.ndarray(count, dtype, memory, at) for (count, dtype), at in zip(parts, begins, strict=False)]


@compiled
def _copied(starts: Any, nodes: Any, begins: Any, into: Any) -> tuple[int, int]:
    """How many edges the shortest row and the longest have, if every edge has a node; else 0 and 0.

    `begins` and `into` become copies of both.
    """
    count, edges = uint64(len(starts) - 1), uint64(len(nodes))
    if starts[0] != 0 or starts[count] != len(nodes):
        return 0, 0
    longest, shortest = 0, len(nodes)
    for i in range(count):
        length = starts[i + uint64(1)] - starts[i]
        longest, shortest = max(longest, length), min(shortest, length)
        begins[i] = starts[i]
    begins[count] = starts[count]
    # A negative one is the largest of all.
    largest = uint64(0)
    for e in range(edges):
        largest = max(largest, uint64(nodes[e]))
        into[e] = nodes[e]
    return (shortest, longest) if shortest > 0 and largest < count else (0, 0)


@compiled
def _alike(weights: Any) -> bool:
    """Whether all weights are the same.

    It reads faster than memory answers, which takes half as long where it is asked ahead.
    """
    count, first, same = uint64(len(weights)), uint64(0), True
    while same and first < count:
        last = min(first + uint64(PART), count)
        for e in range(first, last, uint64(LINE // weights.itemsize)):
            ahead(weights, min(e + uint64(PART), count - uint64(1)))
        for e in range(first, last):
            same &= weights[e] == weights[0]
        first = last
    return same


@compiled(error_model="numpy")
def _shared(begins: Any, weight: float, longest: int, values: Any, sums: Any) -> tuple[Any, float]:
    """What `normalised` finds where all edges have one weight: rows of one length are alike.

    The degrees of rows by their lengths, [longest + 1], and the largest of `sums`.
    """
    count, edges = uint64(len(begins) - 1), uint64(len(values))
    there = np.zeros(longest + 1, np.bool_)
    for i in range(count):
        there[uint64(begins[i + uint64(1)]) - uint64(begins[i])] = True
    degree, share = np.zeros(longest + 1), np.zeros(longest + 1, values.dtype)
    for added in range(uint64(longest)):
        degree[added + uint64(1)] = degree[added] + weight
    # Sums edge after edge, those of all lengths that there are beside each other, the longest first.
    lengths, left = np.zeros(longest, np.uint64), uint64(0)
    each, so_far, summed = np.zeros(longest), np.zeros(longest), np.zeros(longest + 1)
    for shorter in range(uint64(longest)):
        length = uint64(longest) - shorter
        if there[length]:
            share[length] = weight / degree[length]
            lengths[left], each[left] = length, share[length]
            left += uint64(1)
    for added in range(uint64(1), uint64(longest) + uint64(1)):
        for k in range(left):
            so_far[k] += each[k]
        if lengths[left - uint64(1)] == added:
            left -= uint64(1)
            summed[added] = so_far[left]
    e = uint64(0)
    for i in range(count):
        last = uint64(begins[i + uint64(1)])
        value, sums[i] = share[last - e], summed[last - e]
        # A bit more than the row, which the next one writes over: most rows end without a surprise.
        while e < last and e + uint64(len(SIXTEEN)) <= edges:
            fill(values, e, value, SIXTEEN)
            e += uint64(len(SIXTEEN))
        for k in range(e, last):
            values[k] = value
        e = last
    return degree, summed.max()


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
) -> tuple[tuple[int, int], bool, Any, float]:
    """The fewest and the most edges of a row; whether all weights are the same; their sums; a largest sum.

    0 and 0 unless every row has an edge, every edge a node, and every weight lies between the `ordinary`
    ones. Then `begins` and `into` are copies of `starts` [N + 1] and `nodes` [edges], `values` [edges] the
    weights divided by their row's sum, and `sums` [N] a row's sum of those, of which the largest is the last.
    The sums of weights are [N], but where all are the same [longest + 1], for each number of edges.
    """
    least, most = ordinary
    lengths = _copied(starts, nodes, begins, into)
    if lengths[0] == 0:
        return (0, 0), False, np.empty(0), 0.0
    if _alike(weights):
        if not least < weights[0] < most:
            return (0, 0), True, np.empty(0), 0.0
        degree, largest = _shared(begins, weights[0], lengths[1], values, sums)
        return lengths, True, degree, largest
    degree, largest = np.empty(len(begins) - 1), 0.0
    for i in range(uint64(len(degree))):
        first, last = uint64(begins[i]), uint64(begins[i + uint64(1)])
        total, summed = 0.0, 0.0
        for e in range(first, last):
            if not least < weights[e] < most:
                return (0, 0), False, degree, 0.0
            total += weights[e]
        for e in range(first, last):
            values[e] = weights[e] / total
            summed += values[e]
        degree[i], sums[i], largest = total, summed, max(largest, summed)
    return lengths, False, degree, largest


def by_length(begins: Any, table: Any) -> Any:
    """What a table says of each row by its number of edges."""
    (found,) = block((len(begins) - 1, table.dtype))
    _by_length(begins, table, found)
    return found


@compiled
def _by_length(begins: Any, table: Any, found: Any) -> None:
    """Fills `found` with it."""
    for i in range(uint64(len(found))):
        found[i] = table[uint64(begins[i + uint64(1)]) - uint64(begins[i])]


@compiled
def equal(starts: Any, values: Any) -> bool:
    """Whether the values of each row are one number."""
    for i in range(uint64(len(starts) - 1)):
        first, last, alike = uint64(starts[i]), uint64(starts[i + uint64(1)]), True
        for e in range(first, last):
            alike &= values[e] == values[first]
        if not alike:
            return False
    return True


def mirrored(starts: Any, nodes: Any, values: Any) -> tuple[Any, Any, Any] | None:
    """The mirror images of all edges by rows, starts and nodes, uint32; and the inverse of a row's values.

    For less than 2³² edges, where the values of a row are one number. That is [N] float64, 1 where a row is
    empty; None where it is 0.
    """
    count = len(starts) - 1
    begins, place, into, divisor = block(
        (count + 1, np.uint32), (count, np.uint32), (len(nodes), np.uint32), (count, np.float64)
    )
    fine = _mirrored(starts, nodes, values, begins, place, into, divisor)
    return (begins, into, divisor) if fine else None


@compiled
def _mirrored(starts: Any, nodes: Any, values: Any, begins: Any, place: Any, into: Any, divisor: Any) -> bool:
    """Fills what `mirrored` returns; whether no value is 0."""
    count, one = uint64(len(divisor)), uint64(1)
    begins[:] = 0
    for e in range(uint64(len(nodes))):
        begins[uint64(nodes[e]) + one] += np.uint32(1)
    for i in range(count):
        place[i] = begins[i]
        begins[i + one] += begins[i]
    for i in range(count):
        first, last = uint64(starts[i]), uint64(starts[i + one])
        divisor[i] = 1.0
        if first < last:
            if values[first] == 0:
                return False
            divisor[i] = 1 / float(values[first])
        for e in range(first, last):
            j = uint64(nodes[e])
            into[uint64(place[j])] = i
            place[j] += np.uint32(1)
    return True


def symmetric(starts: Any, nodes: Any, weights: Any) -> bool:
    """Whether every edge has a mirror image of the very same weight, for rows in the order of their nodes.

    Without weights, None, whether it has one. The mirror images of the edges out of nodes 0, 1, ... stand in
    each row in this order too, so one place a row tells which comes next. Where these places end with their
    rows, every edge is the image of one; and those that are the image of their own image mirror each other.
    """
    place, image = block((len(starts) - 1, starts.dtype), (len(nodes), starts.dtype))
    return bool(_symmetric(starts, nodes, weights, place, image))


@compiled
def _symmetric(starts: Any, nodes: Any, weights: Any, place: Any, image: Any) -> bool:
    """`symmetric`, in memory for these places, [N], and for the images, [edges]."""
    count, edges, first = uint64(len(place)), uint64(len(nodes)), uint64(0)
    for i in range(count):
        place[i] = starts[i]
    while first < edges:
        last, wrong = min(first + uint64(PART), edges), False
        for e in range(first, last):
            j = uint64(nodes[e])
            image[e] = place[j]
            place[j] += 1
        for e in range(first, last):
            # Only from the later of both. That is enough: a way from image to image that is longer than there
            # and back leads to an earlier edge somewhere, and is found wrong there.
            earlier, later = min(uint64(image[e]), e), max(uint64(image[e]), e)
            wrong |= uint64(image[earlier]) != later
            if weights is not None:
                wrong |= weights[earlier] != weights[e]
        if wrong:
            return False
        first = last
    ended = True
    for i in range(count):
        ended &= place[i] == starts[i + uint64(1)]
    return ended


@intrinsic
def _lowest(typing: Any, bits: Any) -> Any:
    """The number of the lowest bit that is set; one must be."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.cttz(args[0], ir.Constant(ir.IntType(1), 1))

    return types.uint64(types.uint64), code


@compiled
def _by_degree(starts: Any, found: Any) -> Any:
    """Fills `found` with the words of nodes, largest degrees first, those of one degree as they stand.

    Where they end that have as many edges as any has, one less, ..., none.
    """
    count, longest = uint64(len(starts) - 1), uint64(0)
    for i in range(count):
        longest = max(longest, uint64(starts[i + uint64(1)]) - uint64(starts[i]))
    place = np.zeros(longest + uint64(2), np.uint32)
    for i in range(count):
        place[longest + uint64(1) + uint64(starts[i]) - uint64(starts[i + uint64(1)])] += np.uint32(1)
    for shorter in range(longest):
        place[shorter + uint64(1)] += place[shorter]
    for i in range(count):
        shorter = longest + uint64(starts[i]) - uint64(starts[i + uint64(1)])
        found[uint64(place[shorter])] = uint64(starts[i]) << uint64(HALF) | i
        place[shorter] += np.uint32(1)
    return place[:-1]


@compiled
def _coloured(nodes: Any, order: Any, ends: Any, colours: Any, bit: Any, beyond: Any) -> Any:
    """Fills the colours of nodes by their order, uint8 [N]: the first that no neighbour before has.

    And by node, colours below `OTHER`, else `OTHER`, into `bit`; colours from there on, else 0, into
    `beyond`. How many have each.
    """
    count, longest = uint64(len(order)), uint64(len(ends)) - uint64(1)
    numbers, taken = np.zeros(COLOURS, np.uint64), np.empty(COLOURS, np.bool_)
    bit[:], beyond[:] = OTHER, 0
    a = uint64(0)
    for shorter in range(longest + uint64(1)):
        degree, end = longest - shorter, uint64(ends[shorter])
        while a < end:
            i, begin = order[a] & uint64(NODE), order[a] >> uint64(HALF)
            ahead(nodes, order[min(a + uint64(SOON), count - uint64(1))] >> uint64(HALF))
            bits = uint64(1) << uint64(OTHER)
            for e in range(begin, begin + degree):
                bits |= uint64(1) << (uint64(single(bit, uint64(nodes[e]))) & uint64(63))
            if ~bits != uint64(0):
                found = _lowest(~bits)
                bit[i] = found
            else:
                taken[:] = False
                for e in range(begin, begin + degree):
                    taken[uint64(beyond[uint64(nodes[e])])] = True
                found = uint64(OTHER)
                while found < uint64(COLOURS - 1) and taken[found]:
                    found += uint64(1)
                bit[i], beyond[i] = OTHER, found
            colours[a] = found
            numbers[found] += uint64(1)
            a += uint64(1)
    return numbers


def ordered(starts: Any, nodes: Any) -> Any:
    """Nodes by colour, within one the largest degrees first, of these those with most edges back; [N] uint32.

    For less than 2³² edges.

    Few neighbours share a colour, so a sweep seldom waits for the row before; rows of one length in both
    triangles follow each other, so that its branches are foreseen, which is worth up to half of its time; and
    the hubs, which all others read, lie together.
    """
    count, words, colours = len(starts) - 1, np.uint64, np.uint8
    (found,) = block((count, np.uint32))
    room = block(*((count, kind) for kind in (words, words, np.uint32, colours, colours, colours)))
    _ordered(starts, nodes, found, *room)
    return found


@compiled
def _ordered(
    starts: Any,
    nodes: Any,
    found: Any,
    order: Any,
    lined: Any,
    onward: Any,
    colours: Any,
    bit: Any,
    beyond: Any,
) -> None:
    """Fills `found` with the nodes in order; all others are memory, [N]."""
    ends = _by_degree(starts, order)
    numbers = _coloured(nodes, order, ends, colours, bit, beyond)
    longest, most = uint64(len(ends)) - uint64(1), uint64(colours.max())
    # Of each colour, where the next goes, and where those of one degree begin.
    places = np.cumsum(numbers) - numbers
    begins = places.copy()
    # By how many edges to later colours there are: 0 before and after.
    place = np.zeros(longest + uint64(2), np.uint32)
    a = uint64(0)
    for shorter in range(longest + uint64(1)):
        degree, end = longest - shorter, uint64(ends[shorter])
        if a == end:
            continue
        while a < end:
            k = places[uint64(colours[a])]
            found[k], lined[k] = order[a] & uint64(NODE), order[a]
            places[uint64(colours[a])] += uint64(1)
            a += uint64(1)
        # All edges of the first colour lead to later ones.
        for own in range(uint64(1), most + uint64(1)):
            first, last = begins[own], places[own]
            begins[own] = last
            if last - first < uint64(FEW):
                continue
            known = bit if own < uint64(OTHER) else beyond
            for b in range(first, last):
                ahead(nodes, lined[min(b + uint64(SOON), last - uint64(1))] >> uint64(HALF))
                begin, later = lined[b] >> uint64(HALF), uint64(0)
                for e in range(begin, begin + degree):
                    later += uint64(uint64(single(known, uint64(nodes[e]))) >= own)
                onward[b] = later
                place[later + uint64(1)] += np.uint32(1)
            place[0] = first
            for k in range(degree):
                place[k + uint64(1)] += place[k]
            for b in range(first, last):
                k = uint64(onward[b])
                found[uint64(place[k])] = lined[b] & uint64(NODE)
                place[k] += np.uint32(1)
            for k in range(degree + uint64(2)):
                place[k] = 0
