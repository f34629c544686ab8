"""(I − µPᵀ) x = b by push, compiled: over-relaxed near a source, preconditioned on the whole graph.

Near the source a push takes ω times what a node holds of the residual and leaves 1 − ω times it there,

    x_u += ω r_u,   r −= ω r_u (I − µPᵀ) e_u,

in rounds over the nodes with |r_u| > θ w_u, in the order in which they are found, while θ falls: successive
over-relaxation of the nodes that matter alone (Bai, Zhou, Yang and Xiao, "Faster local solvers for graph
diffusion equations", NeurIPS 2024). Where the walk is reversible, ω = 2/(1 + √(1 − µ²)), and a round over the
region leaves about ω − 1 of the error; else ω = 1. What is found is numbered anew, so that it lies together
and no memory is as large as the graph.

Where that comes to the whole graph it goes on by the steps of `SSOR`, or of `DirectedSSOR` where the walk is
not reversible. What these leave is seen in the residual, computed in float64 by P itself, from which they
start anew.

This file is read where numba is installed, and compiled when it is first used.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numba import njit, uint64

from graphdiff.operators.base import Transition
from graphdiff.operators.compiled import compiled
from graphdiff.operators.lanes import ahead, any_of, beside, larger, magnitude, zeros
from graphdiff.operators.rows import block
from graphdiff.solvers import directed_sweeps, sweeps
from graphdiff.solvers.directed_ssor import DirectedSSOR
from graphdiff.solvers.groups import in_groups
from graphdiff.solvers.push import EDGES, PART, Array, Columns
from graphdiff.solvers.ranks import ranked
from graphdiff.solvers.ssor import SSOR, swept_dtype

# How a stage of pushing ends.
SETTLED, LIMITED, SLOW, WHOLE, FULL = range(5)
# Where the edges of a node begin that are not loaded.
CLOSED = np.uint32(2**32 - 1)
# A row takes room for a multiple of so many edges; what is left over leads to the node itself, with 0.
FOUR = uint64(4)
# A word of the table without its lower half.
NAME = uint64(2**64 - 2**32)
# A region has room for so many nodes at first.
FEW = 2**12
# Within a stage thresholds fall by this from round to round: what is little waits and is joined by more.
SINK = 0.4
# As many nodes are looked at at once as these are.
BLOCK = (0,) * 16
# One signal.
ALONE = (0,)


class Whole(NamedTuple):
    """What is made of a walk for one µ, as its solver prepares it.

    Attributes:
        triangles: The solver's.
        degree: What the answer is to be multiplied by, [N], or None.
        shadow: That of `DirectedSSOR`, [N], else None.
    """

    triangles: Any
    degree: Array | None = None
    shadow: Array | None = None


def prepared(P: Transition, mu: float, reversible: bool) -> Whole:
    """The triangles of I − µPᵀ, by the degrees of the walk if it is to be taken as reversible."""
    walk = P.to("cpu", torch.promote_types(P.dtype, torch.float32))
    number, matrix = torch.full((1, 1), mu, dtype=torch.float64), walk.to_scipy()
    if reversible:
        by_degrees = SSOR().prepare(walk, number)
        return Whole(by_degrees.triangles[0], degree=by_degrees.degree)
    directed = DirectedSSOR().prepare(walk.T, number)
    # No residual is computed by the rows of Pᵀ, so they need not be kept: P's stand in their place.
    (found,) = directed.triangles
    rows = matrix.indptr, matrix.indices, matrix.data, found.rows[-1]
    lower, upper = map(in_groups, (found.lower, found.upper))
    degree = found.scale if len(found.scale) > 1 else None
    return Whole(found._replace(rows=rows, lower=lower, upper=upper), degree, directed.shadow)


class Local:
    """What a push has reached of the graph, from one source; float64, on the CPU.

    Compiled code searches near the source. Where that is not enough it goes on as a `Region` does.

    Args:
        columns: The columns of Pᵀ.
        mu: µ.
        source: Where b is 1 − µ; it is 0 elsewhere.
        weight: What residuals are measured by, [N], > 0.
        of_whole: What gives the triangles.
        reversible: Whether the weights are degrees that make the walk reversible.
        max_work: Most edges to go along.

    Attributes:
        nodes: The known nodes, [known].
        b: Right-hand side, [known]; 0 elsewhere.
        x: Answer, [known]; 0 elsewhere.
        residual: b − (I − µPᵀ) x, [known]; 0 elsewhere.
        weight: That of the known nodes, [known].
        whole: Whether every node is known. Before, and unless it is lost, there is nothing of the above.
        lost: Whether it goes no further here: `Region` goes on from x.
    """

    def __init__(
        self,
        columns: Columns,
        mu: float,
        source: int,
        weight: Array,
        of_whole: Callable[[], Whole],
        reversible: bool,
        max_work: float,
    ) -> None:
        self.mu, self.source, self.max_work = mu, source, max_work
        self._columns, self._weights, self._of_whole = columns, weight, of_whole
        self._omega = 2 / (1 + math.sqrt(1 - mu * mu)) if reversible else 1.0
        # Known and opened nodes, edges of the opened, rounds, work.
        self._counts = np.array([1, 0, 0, 0, 0])
        # More rounds than this are no push.
        self._patience = 10 + math.ceil(8 / math.sqrt(1 - mu))
        self.whole = self.lost = False

    @property
    def steps(self) -> int:
        """Rounds of pushing."""
        return int(self._counts[3])

    @property
    def work(self) -> int:
        """Edges that these went along."""
        return int(self._counts[4])

    @property
    def exhausted(self) -> bool:
        """Whether the limit is reached."""
        return self.work >= self.max_work

    @property
    def closed(self) -> bool:
        """Whether no other node can be reached."""
        return self.whole

    def places(self, nodes: Array) -> Array:
        """Where nodes stand among the known, which are all."""
        return nodes

    def search(self, k: int, tol: float, bounds: Any, columns: Array, falls: tuple[float, float]) -> Any:
        """Push outwards until the first ranks are known, rounding allows no more or a limit is reached.

        Args:
            k: How many ranks.
            tol: As in `top_k`.
            bounds: As for `ranks.ranked`.
            columns: Alike.
            falls: Thresholds fall by the second from stage to stage, or by as much as must be, down to the
                first.

        Returns:
            The fields of `_Ranks` and the last threshold. It is `whole` or `lost` where it came too far; then
            `settle` or another region has to follow.
        """
        of, edges, nodes = self._columns, len(self._columns.indices), len(self._weights)
        walk = of.indptr, of.indices, of.values
        limits = self._patience, float(self.max_work), EDGES * edges, PART * nodes
        end, threshold, found, reached = searched(
            *(walk, self._weights, columns, self.source, self.mu, self._omega, limits, k, tol, bounds, falls),
            self._counts,
        )
        if end in (WHOLE, SLOW):
            self.nodes, self.weight, self.x, self.residual = reached
            self.whole, self.lost = end == WHOLE, end == SLOW
        if self.whole:
            self._take_all()
        return found, threshold

    def _take_all(self) -> None:
        """Every node becomes known."""
        x, residual, self.b = np.zeros((3, len(self._weights)))
        x[self.nodes], residual[self.nodes], self.b[self.source] = self.x, self.residual, 1 - self.mu
        self.nodes, self.weight, self.x, self.residual = np.arange(len(x)), self._weights, x, residual

    def settle(self, look: Callable[[Array, Array], int]) -> bool:
        """A solver's steps on the whole graph; then x and residual anew.

        Args:
            look: From x and residual to how many products it may take until it wants to see them again; 0
                for enough.

        Returns:
            False where a limit stands against it. Where something else does it is `lost`.
        """
        x, residual = self.x.copy(), self.residual.copy()
        before = least = left = float(np.abs(residual).sum())
        if before == 0:
            return not self.exhausted
        rows, whole = (self._columns.indptr, self._columns.indices, self._columns.values), self._of_whole()
        steps = (_ByDegrees if whole.shadow is None else _Directed)(whole, residual)
        waited, most = 0, look(x, residual)
        while most > 0 and waited < self._patience and not self.exhausted:
            affordable = 1 + (self.max_work - self.work) / max(steps.edges, 1)
            most = math.ceil(min(most, self._patience, affordable) / steps.products)
            steps.enter(residual)
            taken = steps.advance(most)
            steps.move(x)
            balanced(*rows, self.mu, self.b, x, residual)
            products = taken * steps.products
            self._counts[3:] += products, products * steps.edges + len(rows[1])
            left = float(np.abs(residual).sum())
            waited, least = (0, left) if left < 0.5 * least else (waited + products, least)
            most = look(x, residual) if taken == most and left < math.inf else 0
        if left <= before:
            self.x, self.residual = x, residual
        # Weights that are not the walk's, or rounding.
        self.lost = not (waited < self._patience and left <= 0.5 * before)
        return not self.exhausted


class _Steps(ABC):
    """Steps of a solver on the whole graph, for one residual after another; they keep their direction.

    Args:
        whole: The triangles.
        residual: The first, [N]; it says in what units numbers are.

    Attributes:
        edges: How many a product goes along.
    """

    products: int
    """How many a step is worth."""
    held: int
    """Vectors that it takes, the first three x, r and the direction."""

    def __init__(self, whole: Whole, residual: Array) -> None:
        self._whole, found, most = whole, whole.triangles, float(np.abs(residual).max())
        self._halves, self._weights = (found.lower, found.upper), found.weights
        self.edges = sum(len(half[1]) for half in self._halves)
        self._unit, self._size = np.full((1, 1), 1 / most), most
        self._dtype = swept_dtype(found.lower)
        parts = block(*[(len(residual), self._dtype)] * self.held)
        self._vectors = [part.reshape(-1, 1) for part in parts]
        for vector in self._vectors:
            # What is left of others may be no number.
            vector.fill(0)
        self._turn, self._sums, self._product = self._one(), np.zeros((2, 1)), np.zeros(1)
        self._active, self._taken = np.ones(1, bool), np.zeros(1, np.int64)

    def _one(self) -> Array:
        return np.zeros((1, 1), self._dtype)

    def enter(self, residual: Array) -> None:
        """Go on from a residual [N]."""
        self._enter(residual.reshape(-1, 1))
        with np.errstate(all="ignore"):
            ratio = self._sums[0] / self._product
        # Where rounding had gone far astray the direction is worth nothing.
        self._turn *= np.where((ratio > 0.5) & (ratio < 2), ratio, 0)
        self._product[:], self._active[:] = self._sums[0], self._sums[0] != 0

    def advance(self, most: int) -> int:
        """So many steps, and how many there were: fewer where one has no length."""
        before = int(self._taken[0])
        self._iterate(most)
        return int(self._taken[0]) - before

    def move(self, x: Array) -> None:
        """Add to x [N] what was found since it was last moved."""
        added(self._whole.triangles.place, self._vectors[0], self._size, x, self._whole.degree)

    @abstractmethod
    def _enter(self, given: Array) -> None: ...

    @abstractmethod
    def _iterate(self, most: int) -> None: ...


class _ByDegrees(_Steps):
    """Those of `SSOR`."""

    products, held = 1, 4

    def _enter(self, given: Array) -> None:
        found, r, share = self._whole.triangles, self._vectors[1], np.ones((1, 1))
        nodes = self._whole.degree, found.mu, found.place, found.inverse
        sweeps.residual(found.rows, nodes, given, self._unit, given, share, False, r, True, ALONE)
        sweeps.lowered(found.lower, r, self._weights, True, self._sums, ALONE)

    def _iterate(self, most: int) -> None:
        x, r, p, t = self._vectors
        vectors = x, r, p, t, self._turn, self._one(), self._sums
        # Bound, when it was half, target, factor, largest, limit, patience: nothing but the looks ends it.
        far, never = np.full(1, np.inf), np.full(1, 2**62)
        rest = np.ones(1), far, self._taken.copy(), np.zeros(1), np.ones(1), far.copy(), never, never
        state = self._active, self._taken, self._product, *rest
        sweeps.iterated(*self._halves, self._weights, True, vectors, state, most, ALONE)


class _Directed(_Steps):
    """Those of `DirectedSSOR`."""

    products, held = 2, 6

    def __init__(self, whole: Whole, residual: Array) -> None:
        super().__init__(whole, residual)
        # How far a step goes in each of its halves.
        self._lengths = self._one(), self._one()

    def _enter(self, given: Array) -> None:
        found, r = self._whole.triangles, self._vectors[1]
        directed_sweeps.residual(
            *(
                found.rows,
                found.place,
                found.inverse,
                found.lower,
                given,
                self._unit,
                found.scale,
                given,
                False,
            ),
            *(r, self._whole.shadow, self._weights, True, self._sums, ALONE),
        )

    def _iterate(self, most: int) -> None:
        x, r, p, v, t, w = self._vectors
        vectors = x, x, r, p, v, t, w, self._turn, *self._lengths, self._one(), self._sums
        # Bound, the least, the peak, target and limit: no x is kept as the best.
        rest = np.ones(1), np.zeros(1), np.zeros(1), np.zeros(1), np.full(1, 2**62)
        state = self._active, self._taken, self._product, *rest
        directed_sweeps.iterated(
            *(*self._halves, self._whole.shadow, self._weights, True, np.ones(1)),
            *(vectors, state, most, ALONE),
        )


@compiled
def added(place: Any, found: Any, size: float, x: Any, degree: Any) -> None:
    """x += what was found [N, 1], by place, times size and, if there are, degrees; which then is 0."""
    for i in range(uint64(len(x))):
        a = uint64(place[i])
        more = size * float(found[a, 0])
        if degree is not None:
            more *= degree[i]
        x[i] += more
        found[a, 0] = 0.0


@compiled
def room_for(count: int) -> Any:
    """Room for so many nodes, known in the order in which they are found, and four times as many edges.

    By node its number, weight, x and residual, and where its edges begin and end; a table of who is known;
    and by edge the place of the node that it leads to, and its value.
    """
    weight, x, r = np.empty(count), np.empty(count), np.empty(count)
    first, last = np.empty(count, np.uint32), np.empty(count, np.uint32)
    table = np.zeros(2 * count, np.uint64)
    into, shares = np.empty(4 * count, np.uint32), np.empty(4 * count)
    return np.empty(count, np.int64), weight, x, r, first, last, table, into, shares


@compiled
def widened(narrow: Any) -> Any:
    """Room for four times as much, with the same in it."""
    known, weight, x, r, first, last, _, into, shares = narrow
    wider = room_for(4 * len(known))
    for a in range(uint64(len(known))):
        wider[0][a], wider[1][a], wider[2][a], wider[3][a] = known[a], weight[a], x[a], r[a]
        wider[4][a], wider[5][a] = first[a], last[a]
    for e in range(uint64(len(into))):
        wider[7][e], wider[8][e] = into[e], shares[e]
    return wider


@compiled
def searched(
    walk: Any,
    weights: Any,
    columns: Any,
    source: int,
    mu: float,
    omega: float,
    limits: Any,
    k: int,
    tol: float,
    bounds: Any,
    falls: Any,
    so_far: Any,
) -> Any:
    """How `Local.search` ends; its last threshold; the ranks; and number, weight, x and residual of nodes.

    The walk is row starts, nodes and values; the limits are those of rounds in a stage, work, and edges and
    nodes at which it is a matter of the whole graph.
    """
    room = room_for(FEW)
    room[0][0], room[1][0], room[2][0], room[3][0] = source, weights[source], 0.0, 1 - mu
    room[4][0] = CLOSED
    tabled(room, 1)
    # As in `Local`, and the room that edges take.
    counts = np.zeros(6, np.int64)
    counts[0] = 1
    level = threshold = (1 - mu) / weights[source]
    # Nothing is known.
    found = np.empty(0, np.int64), np.empty((0, 0)), np.empty(0, np.bool_), math.inf, False, False
    while True:
        threshold *= max(falls[0], min(falls[1], 1 / found[3]))
        goal, rounds = threshold, limits[0]
        while True:
            end = pushed(walk, weights, mu, omega, level, goal, rounds, limits, room, counts)
            if end == FULL:
                room = widened(room)
                tabled(room, counts[0])
                continue
            end, level = SETTLED if goal < 0 and end == SLOW else end, threshold
            if end in (WHOLE, SLOW) or counts[0] >= k or counts[0] == counts[1]:
                break
            # Nodes with next to nothing rank too: all that are known are pushed, once.
            goal, rounds = -1.0, 1
        refreshed(mu, room, counts)
        nodes, weight = room[0][: counts[0]], room[1][: counts[0]]
        x, r = room[2][: counts[0]], room[3][: counts[0]]
        if end in (WHOLE, SLOW):
            break
        b = np.zeros(len(x))
        b[0] = 1 - mu
        closed = counts[0] == counts[1]
        found, hidden, left = ranked(x, r, b, weight, nodes, columns, bounds, closed, k, tol)
        # What is left to push is less than what rounding may hide.
        if end == LIMITED or found[4] or not left > hidden:
            break
    for j in range(len(so_far)):
        so_far[j] = counts[j]
    return end, threshold, found, (nodes, weight, x, r)


@njit(inline="always")
def along(r: Any, moved: Any, into: Any, shares: Any, first: Any, last: Any) -> None:
    """Move what goes along the edges of a node, four at once: so few rows end unforeseen."""
    e = first
    while e < last:
        r[uint64(into[e])] += moved * shares[e]
        r[uint64(into[e + uint64(1)])] += moved * shares[e + uint64(1)]
        r[uint64(into[e + uint64(2)])] += moved * shares[e + uint64(2)]
        r[uint64(into[e + uint64(3)])] += moved * shares[e + uint64(3)]
        e += FOUR


@compiled
def pushed(
    walk: Any,
    weights: Any,
    mu: float,
    omega: float,
    level: float,
    threshold: float,
    rounds: int,
    limits: Any,
    room: Any,
    counts: Any,
) -> int:
    """Push until no |r| is above threshold·weight, by a level that falls so far; the last two change."""
    starts, nodes, values = walk
    known, weight, x, r, first, last, table, into, shares = room
    mask, most, space = uint64(len(table) - 1), uint64(len(known)), uint64(len(into))
    _, max_work, most_edges, most_nodes = limits
    block = uint64(len(BLOCK))
    found, opened, within = uint64(counts[0]), uint64(counts[1]), uint64(counts[2])
    steps, work, used = counts[3], uint64(counts[4]), uint64(counts[5])
    chosen, end, going = np.empty(len(BLOCK), np.uint64), SETTLED, True
    level = threshold if rounds == 1 else max(threshold, SINK * level)
    while going:
        b, count, before, going = uint64(0), found, within, level > threshold
        while b < count and end == SETTLED:
            above = magnitude(beside(r, b, BLOCK)) - beside(weight, b, BLOCK) * level
            b += block
            if not any_of(larger(above, zeros(BLOCK))):
                continue
            picked = uint64(0)
            for a in range(b - block, min(b, count)):
                chosen[picked] = a
                picked += uint64(abs(r[a]) > level * weight[a])
            for k in range(picked):
                a = chosen[k]
                if first[a] == CLOSED:
                    # Its edges are loaded, and the nodes that they lead to found.
                    u = uint64(known[a])
                    e, stop = uint64(starts[u]), uint64(starts[u + uint64(1)])
                    more = stop - e
                    if within + more > uint64(2) * before and within + more > most_edges:
                        end = WHOLE
                        break
                    if used + more + FOUR > space or found + more >= most:
                        end = FULL
                        break
                    first[a], last[a] = used, used + more
                    opened, within = opened + uint64(1), within + more
                    while e < stop:
                        v = uint64(nodes[e])
                        slot, name = slot_of(v) & mask, (v + uint64(1)) << uint64(32)
                        entry = table[slot]
                        while (entry != uint64(0)) & (entry & NAME != name):
                            slot = (slot + uint64(1)) & mask
                            entry = table[slot]
                        # Written in any case, for whether it is new nobody foresees.
                        known[found], weight[found], x[found], r[found] = v, weights[v], 0.0, 0.0
                        # And it may be pushed soon.
                        first[found], begin = CLOSED, uint64(starts[v])
                        ahead(nodes, begin)
                        ahead(values, begin)
                        entry = entry if entry != uint64(0) else name | found
                        found += uint64(entry == name | found)
                        table[slot] = entry
                        into[used], shares[used] = entry, values[e]
                        used, e = used + uint64(1), e + uint64(1)
                    while used & (FOUR - uint64(1)):
                        into[used], shares[used] = a, 0.0
                        used += uint64(1)
                going, moved = True, omega * r[a]
                x[a] += moved
                r[a] -= moved
                moved *= mu
                e, stop = uint64(first[a]), uint64(last[a])
                work += stop - e
                along(r, moved, into, shares, e, stop)
        steps += 1
        rounds -= 1
        level = max(threshold, SINK * level)
        if end == SETTLED and found > most_nodes:
            end = WHOLE
        elif end == SETTLED and going and work >= max_work:
            end = LIMITED
        elif end == SETTLED and going and rounds == 0:
            end = SLOW
        going &= end == SETTLED
    counts[0], counts[1], counts[2] = found, opened, within
    counts[3], counts[4], counts[5] = steps, work, used
    return end


@njit(inline="always")
def slot_of(node: Any) -> Any:
    """Where to look first for a node in a table of up to 2³² slots."""
    return (node * uint64(0x9E3779B97F4A7C15)) >> uint64(32)


@compiled
def tabled(room: Any, count: int) -> None:
    """Enter so many nodes into an empty table: 1 + a node, and its place, are the halves of a word."""
    known, table = room[0], room[6]
    mask = uint64(len(table) - 1)
    for a in range(uint64(count)):
        v = uint64(known[a])
        slot = slot_of(v) & mask
        while table[slot] != uint64(0):
            slot = (slot + uint64(1)) & mask
        table[slot] = (v + uint64(1)) << uint64(32) | a


@compiled
def refreshed(mu: float, room: Any, counts: Any) -> None:
    """x ≥ 0, and the residual of it anew."""
    _, _, x, r, first, last, _, into, shares = room
    found = uint64(counts[0])
    for a in range(found):
        r[a] = 0.0
    for a in range(found):
        x[a] = max(x[a], 0.0)
        if x[a] > 0.0:
            moved, e, stop = x[a], uint64(first[a]), uint64(last[a])
            along(r, moved, into, shares, e, stop)
    for a in range(found):
        r[a] = mu * r[a] - x[a]
    r[0] += 1 - mu
    counts[4] += counts[2]


@compiled
def balanced(starts: Any, nodes: Any, values: Any, mu: float, b: Any, x: Any, r: Any) -> None:
    """x ≥ 0, and r = b − (I − µPᵀ) x."""
    r[:] = 0.0
    for u in range(uint64(len(x))):
        x[u] = max(x[u], 0.0)
        moved = mu * x[u]
        if moved != 0.0:
            for e in range(uint64(starts[u]), uint64(starts[u + uint64(1)])):
                r[uint64(nodes[e])] += moved * values[e]
    for u in range(uint64(len(x))):
        r[u] = r[u] + b[u] - x[u]
