"""The sweeps of `DirectedSSOR`, compiled: many signals side by side, as in `sweeps`.

Stabilised biconjugate gradients on (I − L)⁻¹(I − L − U)(I − U)⁻¹, of the system I − L − U of `triangles`,
take no product (Eisenstat 1981, as in `sweeps`): with t = (I − U)⁻¹ p and w = (I − L)⁻¹(p − t) the image of p
is t + w, and t is the direction in which x moves. Each half of a step is one pass back and one forth. Of one
signal alone nodes stand beside each other, and rows as `groups` has them: then what is done to nodes, the
solve and the sums are passes of their own.

This file is read where numba is installed, and compiled when it is first used.
"""

from typing import Any

import numpy as np
from numba import uint64

from graphdiff.operators.compiled import compiled
from graphdiff.operators.lanes import (
    beside,
    larger,
    load,
    magnitude,
    narrow,
    store,
    where,
    wide,
    zeros,
)
from graphdiff.operators.rows import block, equal, mirrored, ordered
from graphdiff.solvers.groups import EIGHT, ONE, back, copied_in_groups, forth, in_groups
from graphdiff.solvers.starts import fitted, sized
from graphdiff.solvers.sweeps import four_rows, taken
from graphdiff.solvers.triangles import FOUR, of_row, split

__all__ = [
    "begun",
    "block",
    "copied_in_groups",
    "equal",
    "fitted",
    "gathered",
    "in_groups",
    "iterated",
    "left",
    "mirrored",
    "moved",
    "ordered",
    "residual",
    "sized",
    "split",
    "taken",
]


@compiled(error_model="numpy")
def begun(start: Any, unit: Any, scale: Any, y: Any, lanes: Any) -> None:
    """The start [N, W] over the scale, [N] or [1], as y, in units of 1/`unit` [1, W]."""
    size, each = load(unit, uint64(0), lanes), uint64(len(scale) > 1)
    for i in range(uint64(len(y))):
        store(y, i, wide(load(start, i, lanes)) * size * (1 / scale[i * each]))


@compiled
def gathered(place: Any, mask: Any, x: Any, best: Any, y: Any, lanes: Any) -> None:
    """y ← y + x, best ← best − x and x ← 0 where the mask is not 0."""
    chosen, nothing = load(mask, uint64(0), lanes), narrow(zeros(lanes), x)
    for i in range(uint64(len(place))):
        a = uint64(place[i])
        here = load(x, a, lanes)
        step = where(chosen, here, nothing)
        store(y, i, load(y, i, lanes) + wide(step))
        store(best, a, load(best, a, lanes) - step)
        store(x, a, where(chosen, nothing, here))


@compiled
def residual(
    rows: Any,
    place: Any,
    inverse: Any,
    lower: Any,
    given: Any,
    unit: Any,
    scale: Any,
    y: Any,
    started: bool,
    r: Any,
    shadow: Any,
    weights: Any,
    summed: bool,
    sums: Any,
    lanes: Any,
) -> None:
    """r = (I − L)⁻¹δ⁻¹ of the residual of y, in float64 from the walk itself; `sums` as of `measured`.

    y [N, W], which is 0 if not `started`, is in float64, in units of 1/`unit` [1, W]; `inverse` is 1/δ. The
    answer is the scale, [N] or [1], times y.
    """
    size, each, (starts, nodes, values, gains, _) = (
        load(unit, uint64(0), lanes),
        uint64(len(scale) > 1),
        lower,
    )
    begins, into, steps, factor = rows
    # The walk's rows as they lie in memory; in the order they would lie anywhere.
    for i in range(uint64(len(place))):
        a = uint64(place[i])
        v = wide(load(given, i, lanes)) * size
        if started:
            here = load(y, i, lanes) * scale[i * each]
            v = v - (here - of_row(begins, into, steps, y, i, lanes) * factor[i])
        store(r, a, narrow(v * inverse[i], r))
    if len(lanes) == 1:
        forth(lower, r, r)
    else:
        for a in range(uint64(len(weights))):
            store(r, a, load(r, a, lanes) + of_row(starts, nodes, values, r, a, lanes) * gains[a])
    measured(r, shadow, weights, summed, sums, lanes)


@compiled
def _turned(upper: Any, r: Any, p: Any, v: Any, turn: Any, along: Any, t: Any, lanes: Any) -> None:
    """p ← r + turn·(p − along·v) and t = (I − U)⁻¹ p."""
    starts, nodes, values, gains, _ = upper
    if len(lanes) == 1:
        eights = uint64(len(p)) // uint64(len(EIGHT))
        _turned_rows(r, p, v, turn[0, 0], along[0, 0], uint64(0), eights, EIGHT)
        _turned_rows(r, p, v, turn[0, 0], along[0, 0], eights * uint64(len(EIGHT)), uint64(len(p)), ONE)
        back(upper, p, t)
        return
    beta, omega = load(turn, uint64(0), lanes), load(along, uint64(0), lanes)
    a = uint64(len(starts) - 1)
    while a > 0:
        a -= uint64(1)
        q = load(r, a, lanes) + (load(p, a, lanes) - load(v, a, lanes) * omega) * beta
        store(p, a, q)
        q = q + of_row(starts, nodes, values, t, a, lanes) * gains[a]
        store(t, a, q)


@compiled
def _turned_rows(
    r: Any, p: Any, v: Any, turn: float, along: float, first: int, last: int, lanes: Any
) -> None:
    """p ← r + turn·(p − along·v) of one signal, whose nodes stand beside each other."""
    for i in range(first, last):
        store(p, i, load(r, i, lanes) + (load(p, i, lanes) - load(v, i, lanes) * along) * turn)


@compiled
def _seen(lower: Any, p: Any, t: Any, w: Any, shadow: Any, sums: Any, lanes: Any) -> None:
    """w = (I − L)⁻¹(p − t), and ⟨shadow, t + w⟩ into a row of `sums`."""
    (starts, nodes, values, gains, _), first, s0 = lower, uint64(0), zeros(lanes)
    s1, s2, s3 = s0, s0, s0
    if len(lanes) == 1:
        _apart(p, t, w)
        forth(lower, w, w)
        parts, s = np.empty((4, 1), np.float64), zeros(FOUR)
        while first + uint64(4) <= uint64(len(w)):
            s = s + wide(beside(w, first, FOUR) + beside(t, first, FOUR)) * beside(shadow, first, FOUR)
            first += uint64(4)
        store(parts, uint64(0), s)
        s0, s1, s2, s3 = four_rows(parts, uint64(0), lanes)
    for a in range(first, uint64(len(starts) - 1)):
        direction = load(t, a, lanes)
        q = load(w, a, lanes)
        if len(lanes) > 1:
            q = load(p, a, lanes) - direction + of_row(starts, nodes, values, w, a, lanes) * gains[a]
            store(w, a, q)
        s0, s1, s2, s3 = s1, s2, s3, s0 + wide(q + direction) * shadow[a]
    store(sums, uint64(0), (s0 + s1) + (s2 + s3))


@compiled
def _apart(a: Any, b: Any, difference: Any) -> None:
    """a − b of one signal [N, 1]."""
    eights = uint64(len(a)) // uint64(len(EIGHT))
    for i in range(eights):
        store(difference, i, load(a, i, EIGHT) - load(b, i, EIGHT))
    for i in range(eights * uint64(len(EIGHT)), uint64(len(a))):
        store(difference, i, load(a, i, ONE) - load(b, i, ONE))


@compiled
def _halfway(
    upper: Any,
    x: Any,
    best: Any,
    r: Any,
    v: Any,
    t: Any,
    w: Any,
    across: Any,
    better: Any,
    keeping: bool,
    lanes: Any,
) -> None:
    """v = t + w, x ← x + across·t, r ← r − across·v and t ← (I − U)⁻¹ r.

    Where it was better, `best` becomes x + r as they were.
    """
    starts, nodes, values, gains, _ = upper
    if len(lanes) == 1:
        eights = uint64(len(r)) // uint64(len(EIGHT))
        step = across[0, 0]
        _halfway_rows(x, best, r, v, t, w, step, keeping, uint64(0), eights, EIGHT)
        _halfway_rows(x, best, r, v, t, w, step, keeping, eights * uint64(len(EIGHT)), uint64(len(r)), ONE)
        back(upper, r, t)
        return
    alpha, mask = load(across, uint64(0), lanes), load(better, uint64(0), lanes)
    a = uint64(len(starts) - 1)
    while a > 0:
        a -= uint64(1)
        direction, here, q = load(t, a, lanes), load(x, a, lanes), load(r, a, lanes)
        if keeping:
            store(best, a, where(mask, here + q, load(best, a, lanes)))
        store(x, a, here + direction * alpha)
        image = direction + load(w, a, lanes)
        store(v, a, image)
        q = q - image * alpha
        store(r, a, q)
        q = q + of_row(starts, nodes, values, t, a, lanes) * gains[a]
        store(t, a, q)


@compiled
def _halfway_rows(
    x: Any,
    best: Any,
    r: Any,
    v: Any,
    t: Any,
    w: Any,
    across: float,
    keeping: bool,
    first: int,
    last: int,
    lanes: Any,
) -> None:
    """v = t + w, x ← x + across·t, r ← r − across·v of one signal; `best` is x + r before if that is kept."""
    for i in range(first, last):
        direction, here, q = load(t, i, lanes), load(x, i, lanes), load(r, i, lanes)
        if keeping:
            store(best, i, here + q)
        store(x, i, here + direction * across)
        image = direction + load(w, i, lanes)
        store(v, i, image)
        store(r, i, q - image * across)


@compiled
def _lessened(lower: Any, r: Any, t: Any, w: Any, sums: Any, lanes: Any) -> None:
    """w = (I − L)⁻¹(r − t); ⟨r, t + w⟩ and ⟨t + w, t + w⟩ into `sums`."""
    (starts, nodes, values, gains, _), first, a0 = lower, uint64(0), zeros(lanes)
    a1, a2, a3, b0, b1, b2, b3 = a0, a0, a0, a0, a0, a0, a0
    if len(lanes) == 1:
        _apart(r, t, w)
        forth(lower, w, w)
        parts, s, square = np.empty((8, 1), np.float64), zeros(FOUR), zeros(FOUR)
        while first + uint64(4) <= uint64(len(w)):
            image = wide(beside(w, first, FOUR) + beside(t, first, FOUR))
            s, square = s + image * wide(beside(r, first, FOUR)), square + image * image
            first += uint64(4)
        store(parts, uint64(0), s)
        store(parts, uint64(1), square)
        a0, a1, a2, a3 = four_rows(parts, uint64(0), lanes)
        b0, b1, b2, b3 = four_rows(parts, uint64(4), lanes)
    for a in range(first, uint64(len(starts) - 1)):
        direction, half = load(t, a, lanes), load(r, a, lanes)
        q = load(w, a, lanes)
        if len(lanes) > 1:
            q = half - direction + of_row(starts, nodes, values, w, a, lanes) * gains[a]
            store(w, a, q)
        image = wide(q + direction)
        a0, a1, a2, a3 = a1, a2, a3, a0 + image * wide(half)
        b0, b1, b2, b3 = b1, b2, b3, b0 + image * image
    store(sums, uint64(0), (a0 + a1) + (a2 + a3))
    store(sums, uint64(1), (b0 + b1) + (b2 + b3))


@compiled
def measured(r: Any, shadow: Any, weights: Any, summed: bool, sums: Any, lanes: Any) -> None:
    """⟨shadow, r⟩ and, with weights, if `summed` Σ |r|, else max |r|, into `sums`."""
    a0, first, count = zeros(lanes), uint64(0), uint64(len(weights))
    a1, a2, a3, b0, b1, b2, b3 = a0, a0, a0, a0, a0, a0, a0
    if len(lanes) == 1:
        # Of one signal four nodes stand beside each other.
        parts, a, b = np.empty((8, 1), np.float64), zeros(FOUR), zeros(FOUR)
        while first + uint64(4) <= count:
            y = wide(beside(r, first, FOUR))
            a = a + y * beside(shadow, first, FOUR)
            y = magnitude(y) * beside(weights, first, FOUR)
            b = b + y if summed else larger(b, y)
            first += uint64(4)
        store(parts, uint64(0), a)
        store(parts, uint64(1), b)
        a0, a1, a2, a3 = four_rows(parts, uint64(0), lanes)
        b0, b1, b2, b3 = four_rows(parts, uint64(4), lanes)
    for i in range(first, count):
        y = wide(load(r, i, lanes))
        a0, a1, a2, a3 = a1, a2, a3, a0 + y * shadow[i]
        y = magnitude(y) * weights[i]
        b0, b1, b2, b3 = b1, b2, b3, b0 + y if summed else larger(b0, y)
    store(sums, uint64(0), (a0 + a1) + (a2 + a3))
    store(sums, uint64(1), (b0 + b1) + (b2 + b3) if summed else larger(larger(b0, b1), larger(b2, b3)))


@compiled
def moved(
    x: Any,
    r: Any,
    t: Any,
    w: Any,
    along: Any,
    shadow: Any,
    weights: Any,
    summed: bool,
    sums: Any,
    lanes: Any,
) -> None:
    """x ← x + along·t, r ← r − along·(t + w); `sums` as of `measured`."""
    omega, a0, count = load(along, uint64(0), lanes), zeros(lanes), uint64(len(weights))
    if len(lanes) == 1:
        eights = count // uint64(len(EIGHT))
        _moved_rows(x, r, t, w, along[0, 0], uint64(0), eights, EIGHT)
        _moved_rows(x, r, t, w, along[0, 0], eights * uint64(len(EIGHT)), count, ONE)
        measured(r, shadow, weights, summed, sums, lanes)
        return
    a1, a2, a3, b0, b1, b2, b3 = a0, a0, a0, a0, a0, a0, a0
    for i in range(count):
        direction = load(t, i, lanes)
        store(x, i, load(x, i, lanes) + direction * omega)
        q = load(r, i, lanes) - (direction + load(w, i, lanes)) * omega
        store(r, i, q)
        y = wide(q)
        a0, a1, a2, a3 = a1, a2, a3, a0 + y * shadow[i]
        y = magnitude(y) * weights[i]
        b0, b1, b2, b3 = b1, b2, b3, b0 + y if summed else larger(b0, y)
    store(sums, uint64(0), (a0 + a1) + (a2 + a3))
    store(sums, uint64(1), (b0 + b1) + (b2 + b3) if summed else larger(larger(b0, b1), larger(b2, b3)))


@compiled
def _moved_rows(x: Any, r: Any, t: Any, w: Any, along: float, first: int, last: int, lanes: Any) -> None:
    """x ← x + along·t and r ← r − along·(t + w) of one signal, whose nodes stand beside each other."""
    for i in range(first, last):
        direction = load(t, i, lanes)
        store(x, i, load(x, i, lanes) + direction * along)
        store(r, i, load(r, i, lanes) - (direction + load(w, i, lanes)) * along)


@compiled(error_model="numpy")
def iterated(
    lower: Any,
    upper: Any,
    shadow: Any,
    weights: Any,
    summed: bool,
    factor: Any,
    vectors: Any,
    state: Any,
    most: int,
    lanes: Any,
) -> None:
    """Stabilised biconjugate gradients, at most so many steps; what changes is in `vectors` and `state`."""
    x, best, r, p, v, t, w, turn, across, along, better, sums = vectors
    active, steps, product, bound, least, peak, target, limit = state
    for _ in range(most):
        if not active.any():
            return
        _turned(upper, r, p, v, turn, along, t, lanes)
        _seen(lower, p, t, w, shadow, sums, lanes)
        for k in range(len(active)):
            # A vanishing product or step is a breakdown; so is what overflows.
            across[0, k] = product[k] / sums[0, k]
            active[k] = active[k] and across[0, k] != 0 and np.isfinite(across[0, k])
            across[0, k] = across[0, k] if active[k] else 0
        _halfway(upper, x, best, r, v, t, w, across, better, better.any(), lanes)
        better[:] = 0
        _lessened(lower, r, t, w, sums, lanes)
        for k in range(len(active)):
            # Where half a step was the whole nothing is left to be lessened.
            along[0, k] = sums[0, k] / sums[1, k] if active[k] and sums[1, k] > 0 else 0
        moved(x, r, t, w, along, shadow, weights, summed, sums, lanes)
        for k in range(len(active)):
            turn[0, k] = 0
            if not active[k]:
                continue
            steps[k] += 1
            bound[k] = sums[1, k] * factor[k]
            # One entry that is no number makes this product none.
            active[k] = np.isfinite(sums[0, k]) and np.isfinite(bound[k])
            peak[k] = max(peak[k], bound[k])
            if active[k] and bound[k] < least[k]:
                least[k], better[0, k] = bound[k], 1
            turn[0, k] = sums[0, k] / product[k] * (across[0, k] / along[0, k])
            product[k] = sums[0, k]
            goes_on = active[k] and along[0, k] != 0 and np.isfinite(turn[0, k])
            active[k] = goes_on and bound[k] > target[k] and steps[k] < limit[k]
            if not active[k]:
                turn[0, k] = 0


@compiled
def left(place: Any, scale: Any, y: Any, x: Any, r: Any, unit: Any, found: Any, lanes: Any) -> None:
    """The scale, [N] or [1], times y + x + r in the units of the right-hand sides into `found` [N, W]."""
    size, each = load(unit, uint64(0), lanes), uint64(len(scale) > 1)
    for i in range(uint64(len(place))):
        a = uint64(place[i])
        here = load(y, i, lanes) + (wide(load(x, a, lanes)) + wide(load(r, a, lanes)))
        store(found, i, narrow(here * (size * scale[i * each]), found))
