"""The sweeps of `SSOR`, compiled: many signals side by side in the lanes of a processor's vectors.

With ω = dδ/µ, d the weights that make the walk reversible, the system I − L − U of `triangles` is symmetric
in the inner product ⟨x, y⟩ = Σ ω x y. One step of conjugate gradients on (I − L)⁻¹(I − L − U)(I − U)⁻¹ takes
two triangular solves and no product besides (Eisenstat, "Efficient implementation of a class of
preconditioned conjugate gradient methods", SIAM J. Sci. Stat. Comput. 2, 1981): with t = (I − U)⁻¹ p and
w = (I − L)⁻¹(p − t) its image of p is t + w, and t is the direction in which x moves.

Vectors are [N, W]: W signals, each added up in one order whatever W is, so that a signal's bits do not depend
on those beside it. Of one signal alone it is rows that stand side by side, so many of one length that do not
depend on each other; or four edges of one row. This file is read where numba is installed, and compiled when
it is first used.
"""

from typing import Any

import numpy as np
from numba import njit, uint64

from graphdiff.operators.compiled import compiled
from graphdiff.operators.lanes import (
    beside,
    larger,
    load,
    magnitude,
    narrow,
    picked,
    put,
    store,
    times,
    times_beside,
    where,
    wide,
    zeros,
)
from graphdiff.operators.rows import block
from graphdiff.solvers.groups import EIGHT, GROUP, in_groups
from graphdiff.solvers.starts import fitted, sized
from graphdiff.solvers.triangles import FOUR, of_row, split

__all__ = [
    "block",
    "in_groups",
    "iterated",
    "left",
    "looked",
    "lowered",
    "opened",
    "renewed",
    "residual",
    "split",
    "taken",
    "told",
]


# --- a block of signals


@compiled
def lowered(lower: Any, r: Any, weights: Any, summed: bool, sums: Any, lanes: Any) -> None:
    """r ← (I − L)⁻¹ r; `sums` as `norms` has them."""
    starts, nodes, values, gains, runs = lower
    a, one, group = uint64(0), uint64(1), uint64(GROUP)
    for i in range(uint64(len(runs)) // uint64(2)):
        while a < uint64(runs[uint64(2) * i]):
            store(r, a, load(r, a, lanes) + of_row(starts, nodes, values, r, a, lanes) * gains[a])
            a += one
        while a < uint64(runs[uint64(2) * i + one]):
            e, last = uint64(starts[a]), uint64(starts[a + group])
            if len(lanes) == 1:
                eight = narrow(zeros(EIGHT), r)
                while e < last:
                    eight = eight + times_beside(picked(r, nodes, e, EIGHT), values, e)
                    e += group
                put(r, a, beside(r, a, EIGHT) + times_beside(eight, gains, a))
            else:
                for k in range(group):
                    q = narrow(zeros(lanes), r)
                    for f in range(e + k, last, group):
                        q = q + times(load(r, uint64(nodes[f]), lanes), values, f)
                    store(r, a + k, load(r, a + k, lanes) + q * gains[a + k])
            a += group
    norms(r, weights, summed, sums, lanes)


@compiled(error_model="numpy")
def begun(nodes: Any, start: Any, unit: Any, y: Any, summed: bool, lanes: Any) -> None:
    """The start [N, W] as y, in units of 1/`unit` [1, W]."""
    degree, scale = nodes[0], load(unit, uint64(0), lanes)
    if len(lanes) == 1 and summed:
        # Compilers put nodes beside each other of themselves, and divisions take long.
        for i in range(uint64(len(degree))):
            y[i, 0] = start[i, 0] * unit[0, 0] * (1 / degree[i])
        return
    for i in range(uint64(len(degree))):
        store(y, i, wide(load(start, i, lanes)) * scale * (1 / degree[i] if summed else 1.0))


@compiled
def gathered(nodes: Any, mask: Any, share: Any, x: Any, y: Any, lanes: Any) -> None:
    """y ← its share + x and x ← 0 where the mask is not 0."""
    place, chosen, nothing = nodes[2], load(mask, uint64(0), lanes), narrow(zeros(lanes), x)
    own, which, none, shared = load(share, uint64(0), lanes), wide(chosen), zeros(lanes), share.any()
    for i in range(uint64(len(place))):
        a, before = uint64(place[i]), none
        # Of which there is no share may be what others have left, no number perhaps.
        if shared:
            before = where(own, load(y, i, lanes), none)
        here = load(x, a, lanes)
        store(y, i, where(which, before * own + wide(here), before))
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
    """w, in the order, 1/δ times the residual of y's share, in float64 from the walk itself.

    y [N, W], which is 0 if not `started`, is in float64, in units of 1/`unit` [1, W], and its `share` [1, W]
    solves with the walk that is stochastic by rows; `summed` says that `given` [N, W] is not for this but for
    its transpose, which solves with D y.
    """
    (degree, _, place, inverse), (starts, into, values, factor) = nodes, rows
    scale, own = load(unit, uint64(0), lanes), load(share, uint64(0), lanes)
    for i in range(uint64(len(degree))):
        v = wide(load(given, i, lanes)) * scale
        if summed:
            v = v * (1 / degree[i])
        if started:
            v = v - (load(y, i, lanes) - of_row(starts, into, values, y, i, lanes) * factor[i]) * own
        store(w, uint64(place[i]), narrow(v * inverse[i], w))


@compiled
def taken(mask: Any, w: Any, r: Any, lanes: Any) -> None:
    """r ← w where the mask is not 0."""
    chosen = load(mask, uint64(0), lanes)
    for a in range(uint64(len(r))):
        store(r, a, where(chosen, load(w, a, lanes), load(r, a, lanes)))


@compiled(error_model="numpy")
def opened(
    rows: Any,
    nodes: Any,
    lower: Any,
    weights: Any,
    summed: bool,
    given: Any,
    start: Any,
    size: Any,
    unit: Any,
    y: Any,
    share: Any,
    r: Any,
    sums: Any,
    lanes: Any,
) -> None:
    """Where a line begins: its size and unit, y and its share, and r with its `sums`."""
    (degree, mu, _, _), itself = nodes, np.empty((1, len(lanes)))
    begins = sized(given, start, mu, size, itself, share, lanes)
    for k in range(len(size)):
        unit[0, k] = 1 / size[k]
    begins = begins and fitted(rows, degree, mu, given, start, unit, summed, itself, share, lanes)
    if begins:
        begun(nodes, start, unit, y, summed, lanes)
    residual(rows, nodes, given, unit, y, share, begins, r, summed, lanes)
    lowered(lower, r, weights, summed, sums, lanes)


@compiled
def renewed(
    rows: Any,
    nodes: Any,
    lower: Any,
    weights: Any,
    summed: bool,
    given: Any,
    unit: Any,
    y: Any,
    share: Any,
    mask: Any,
    x: Any,
    w: Any,
    r: Any,
    sums: Any,
    lanes: Any,
) -> None:
    """The residual in float64 of all that was found, with its `sums`, into r where the mask is not 0."""
    gathered(nodes, mask, share, x, y, lanes)
    for k in range(len(lanes)):
        if mask[0, k] != 0:
            share[0, k] = 1.0
    everywhere = mask.all()
    into = r if everywhere else w
    residual(rows, nodes, given, unit, y, share, True, into, summed, lanes)
    lowered(lower, into, weights, summed, sums, lanes)
    if not everywhere:
        taken(mask, w, r, lanes)


# --- how far signals are, each with a place in arrays [W]


@compiled
def looked(
    active: Any, bound: Any, known: Any, target: Any, far: float, less: float, going: Any, anew: Any
) -> tuple[bool, bool, bool]:
    """Fills who is `going` on and whose residual is due `anew`; whether anybody goes on, is active, is due.

    Who came to the target from too `far` away is only believed to be there.
    """
    on = moving = due = False
    for k in range(len(active)):
        distant = known[k] > far * target[k]
        doubted = not active[k] and bound[k] <= target[k] and distant
        going[k] = active[k] or doubted
        anew[k] = doubted or (active[k] and bound[k] < less * known[k] and distant)
        on, moving, due = on or going[k], moving or active[k], due or anew[k]
    return on, moving, due


@compiled(error_model="numpy")
def told(anew: Any, found: Any, size: Any, watched: Any, renewals: Any) -> bool:
    """Takes the products and bounds that were found `anew`; whether anybody is active then."""
    active, steps, product, bound, known, target, limit, turn = watched
    moving = False
    for k in range(len(active)):
        if anew[k]:
            ratio = found[k] / product[k]
            # Where float32 had gone far astray the direction is worth nothing; who stopped has lost it.
            turn[0, k] *= ratio if active[k] and 0.5 < ratio < 2 else 0.0
            product[k], bound[k], known[k] = found[k], size[k], size[k]
            renewals[k] += 1
            active[k] = bound[k] > target[k] and steps[k] < limit[k]
        moving = moving or active[k]
    return moving


@compiled
def _back(
    upper: Any, r: Any, p: Any, turn: Any, first: bool, t: Any, weights: Any, sums: Any, lanes: Any
) -> None:
    """p ← r + turn·p, or r at the `first` step, and t = (I − U)⁻¹ p; ⟨t, 2p − t⟩ into a row of `sums`.

    This is the curvature ⟨t, (I − L − U) t⟩, for of p = (I − U) t the adjoint of I − U is I − L.
    """
    (starts, nodes, values, gains, runs), beta = upper, load(turn, uint64(0), lanes)
    a, i, one, group, s0 = uint64(len(starts) - 1), uint64(len(runs)), uint64(1), uint64(GROUP), zeros(lanes)
    s1, s2, s3, last = s0, s0, s0, uint64(0)
    while i > 0:
        i -= uint64(2)
        while a > uint64(runs[i]):
            e, last = uint64(starts[a - group]), uint64(starts[a])
            if len(lanes) == 1:
                a -= group
                direction = beside(r, a, EIGHT)
                if not first:
                    direction = direction + beside(p, a, EIGHT) * turn[0, 0]
                put(p, a, direction)
                eight = narrow(zeros(EIGHT), t)
                while e < last:
                    eight = eight + times_beside(picked(t, nodes, e, EIGHT), values, e)
                    e += group
                put(t, a, direction + times_beside(eight, gains, a))
            else:
                for k in range(group):
                    a -= one
                    here = load(r, a, lanes)
                    if not first:
                        here = here + load(p, a, lanes) * beta
                    store(p, a, here)
                    q = narrow(zeros(lanes), t)
                    for f in range(e + (group - one - k), last, group):
                        q = q + times(load(t, uint64(nodes[f]), lanes), values, f)
                    q = here + q * gains[a]
                    store(t, a, q)
                    s0, s1, s2, s3 = s1, s2, s3, s0 + _curved(wide(here), wide(q)) * weights[0, a]
        while a > (uint64(runs[i - one]) if i > 0 else uint64(0)):
            a -= one
            here = load(r, a, lanes)
            if not first:
                here = here + load(p, a, lanes) * beta
            store(p, a, here)
            q = here + of_row(starts, nodes, values, t, a, lanes) * gains[a]
            store(t, a, q)
            if len(lanes) > 1:
                s0, s1, s2, s3 = s1, s2, s3, s0 + _curved(wide(here), wide(q)) * weights[0, a]
    if len(lanes) == 1:
        # Of one signal four nodes stand beside each other.
        a, s = uint64(len(p)), zeros(FOUR)
        while a >= uint64(4):
            a -= uint64(4)
            s = s + _curved(wide(beside(p, a, FOUR)), wide(beside(t, a, FOUR))) * beside(weights, a, FOUR)
        parts = np.empty((4, 1), np.float64)
        store(parts, uint64(0), s)
        s3, s2, s1, s0 = four_rows(parts, uint64(0), lanes)
        while a > uint64(0):
            a -= one
            curved = _curved(wide(load(p, a, lanes)), wide(load(t, a, lanes)))
            s0, s1, s2, s3 = s1, s2, s3, s0 + curved * weights[0, a]
    store(sums, uint64(0), (s0 + s1) + (s2 + s3))


@njit(inline="always")
def _curved(p: Any, t: Any) -> Any:
    """t (2p − t)."""
    return (p + (p - t)) * t


@compiled
def _forth(
    lower: Any,
    x: Any,
    r: Any,
    p: Any,
    t: Any,
    step: Any,
    first: bool,
    weights: Any,
    summed: bool,
    sums: Any,
    lanes: Any,
) -> None:
    """With w = (I − L)⁻¹(p − t), x ← x + step·t and r ← r − step·(t + w); `sums` as `norms` has them.

    At the `first` step x is 0, whatever stands there. In the place of t comes w.
    """
    (starts, nodes, values, gains, runs), alpha, a0 = lower, load(step, uint64(0), lanes), zeros(lanes)
    a1, a2, a3, b0, b1, b2, b3 = a0, a0, a0, a0, a0, a0, a0
    a, one, group = uint64(0), uint64(1), uint64(GROUP)
    for i in range(uint64(len(runs)) // uint64(2)):
        while a < uint64(runs[uint64(2) * i]):
            direction = load(t, a, lanes)
            q = load(p, a, lanes) - direction + of_row(starts, nodes, values, t, a, lanes) * gains[a]
            store(t, a, q)
            way = direction * alpha
            store(x, a, way if first else load(x, a, lanes) + way)
            q = load(r, a, lanes) - (direction + q) * alpha
            store(r, a, q)
            if len(lanes) > 1:
                v = wide(q)
                a0, a1, a2, a3 = a1, a2, a3, a0 + v * v * weights[0, a]
                v = magnitude(v)
                b0, b1, b2, b3 = b1, b2, b3, b0 + v * weights[1, a] if summed else larger(b0, v)
            a += one
        while a < uint64(runs[uint64(2) * i + one]):
            e, last = uint64(starts[a]), uint64(starts[a + group])
            if len(lanes) == 1:
                eight = narrow(zeros(EIGHT), t)
                while e < last:
                    eight = eight + times_beside(picked(t, nodes, e, EIGHT), values, e)
                    e += group
                ways = beside(t, a, EIGHT)
                eight = beside(p, a, EIGHT) - ways + times_beside(eight, gains, a)
                put(t, a, eight)
                way = ways * step[0, 0]
                put(x, a, way if first else beside(x, a, EIGHT) + way)
                put(r, a, beside(r, a, EIGHT) - (ways + eight) * step[0, 0])
            else:
                for k in range(group):
                    direction = load(t, a + k, lanes)
                    q = narrow(zeros(lanes), t)
                    for f in range(e + k, last, group):
                        q = q + times(load(t, uint64(nodes[f]), lanes), values, f)
                    q = load(p, a + k, lanes) - direction + q * gains[a + k]
                    store(t, a + k, q)
                    way = direction * alpha
                    store(x, a + k, way if first else load(x, a + k, lanes) + way)
                    q = load(r, a + k, lanes) - (direction + q) * alpha
                    store(r, a + k, q)
                    v = wide(q)
                    a0, a1, a2, a3 = a1, a2, a3, a0 + v * v * weights[0, a + k]
                    v = magnitude(v)
                    b0, b1, b2, b3 = b1, b2, b3, b0 + v * weights[1, a + k] if summed else larger(b0, v)
            a += group
    if len(lanes) == 1:
        norms(r, weights, summed, sums, lanes)
        return
    store(sums, uint64(0), (a0 + a1) + (a2 + a3))
    store(sums, uint64(1), (b0 + b1) + (b2 + b3) if summed else larger(larger(b0, b1), larger(b2, b3)))


@compiled
def norms(r: Any, weights: Any, summed: bool, sums: Any, lanes: Any) -> None:
    """Σ r² with the first weights into `sums`, and if `summed` Σ |r| with the second, else max |r|."""
    a0, first, count = zeros(lanes), uint64(0), uint64(len(r))
    a1, a2, a3, b0, b1, b2, b3 = a0, a0, a0, a0, a0, a0, a0
    if len(lanes) == 1:
        # Of one signal four nodes stand beside each other.
        a = b = zeros(FOUR)
        while first + uint64(4) <= count:
            v = wide(beside(r, first, FOUR))
            a = a + v * v * beside(weights, first, FOUR)
            v = magnitude(v)
            b = b + v * beside(weights, count + first, FOUR) if summed else larger(b, v)
            first += uint64(4)
        parts = np.empty((8, 1), np.float64)
        store(parts, uint64(0), a)
        store(parts, uint64(1), b)
        a0, a1, a2, a3 = four_rows(parts, uint64(0), lanes)
        b0, b1, b2, b3 = four_rows(parts, uint64(4), lanes)
    for i in range(first, count):
        v = wide(load(r, i, lanes))
        a0, a1, a2, a3 = a1, a2, a3, a0 + v * v * weights[0, i]
        v = magnitude(v)
        b0, b1, b2, b3 = b1, b2, b3, b0 + v * weights[1, i] if summed else larger(b0, v)
    store(sums, uint64(0), (a0 + a1) + (a2 + a3))
    store(sums, uint64(1), (b0 + b1) + (b2 + b3) if summed else larger(larger(b0, b1), larger(b2, b3)))


@compiled
def four_rows(x: Any, first: int, lanes: Any) -> Any:
    """Four rows."""
    one = uint64(1)
    second, third, last = first + one, first + one + one, first + one + one + one
    return load(x, first, lanes), load(x, second, lanes), load(x, third, lanes), load(x, last, lanes)


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
    """Conjugate gradients, at most so many steps; what changes is in `vectors` and `state`.

    Before the first step of all x and p may hold anything.
    """
    x, r, p, t, turn, step, sums = vectors
    active, steps, square, bound, halved, halved_at, target, factor, largest, limit, patience = state
    first = not steps.any()
    for _ in range(most):
        if not active.any():
            return
        _back(upper, r, p, turn, first, t, weights, sums, lanes)
        for k in range(len(active)):
            # No curvature, no step: that is rounding, or an operator that is not what it says.
            active[k] = active[k] and sums[0, k] > 0
            step[0, k] = square[k] / sums[0, k] if active[k] else 0.0
        _forth(lower, x, r, p, t, step, first, weights, summed, sums, lanes)
        first = False
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
    r: Any,
    unit: Any,
    found: Any,
    summed: bool,
    added: bool,
    lanes: Any,
) -> None:
    """y's share + x + r in the units of the right-hand sides, added to `found` [N, W] or in its place."""
    degree, _, place, _ = nodes
    scale, own, none = load(unit, uint64(0), lanes), load(share, uint64(0), lanes), zeros(lanes)
    for i in range(uint64(len(degree))):
        a, here = uint64(place[i]), where(own, load(y, i, lanes), none) * own
        here = here + (wide(load(x, a, lanes)) + wide(load(r, a, lanes)))
        value = here * (degree[i] if summed else 1.0) * scale
        store(found, i, narrow(wide(load(found, i, lanes)) + value if added else value, found))
