"""(I − µPᵀ) x = b by push, compiled: over-relaxed near a source, preconditioned on the whole graph.

Near the source a push takes ω times what a node holds of the residual and leaves 1 − ω times it there,

    x_u += ω r_u,   r −= ω r_u (I − µPᵀ) e_u,

nodes waiting in a queue while |r_v| > θ w_v: successive over-relaxation of the nodes that matter alone (Bai,
Zhou, Yang and Xiao, "Faster local solvers for graph diffusion equations", NeurIPS 2024). Where the walk is
reversible, ω = 2/(1 + √(1 − µ²)), and a round over the region leaves about ω − 1 of the error; else ω = 1.

Where that comes to the whole graph and the walk is reversible, it goes on as conjugate gradients with SSOR as
`ssor` has them, for one signal and in float32: with S = D^(1/2) P D^(−1/2), L what S has below the diagonal
and ∆ the diagonal of I − µS, the preconditioner is (∆ − µL) ∆⁻¹ (∆ − µLᵀ). The triangles of S fit every µ.
What float32 leaves is seen in the residual, computed in float64 by P itself, from which it starts anew.

This file is read where numba is installed, and compiled when it is first used.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numba import float32, njit, uint8, uint64

from graphdiff.operators.compiled import compiled
from graphdiff.operators.lanes import load, store, wide, zeros
from graphdiff.operators.rows import ordered
from graphdiff.solvers.push import EDGES, PART, Array, Columns

TOUCHED, OPENED, QUEUED = uint8(1), uint8(2), uint8(4)
# How a stage of pushing ends.
SETTLED, LIMITED, SLOW, WHOLE = range(4)
# In units of this times the largest residual float32 has no numbers too small for it.
UNIT = 2.0**-60
# So many numbers are worked on at once where each is for itself.
LANES = 16


class Halves(NamedTuple):
    """S by its triangles in float32, 8 bytes an edge, the nodes in the order of `rows.ordered`.

    Attributes:
        nodes: The node at each place, [N].
        weight: d, [N] in the order.
        root: √d, alike.
        place: The place of each node, [N].
        lower: Row starts, columns and values of what is below the diagonal.
        upper: What is above it.
        loop: The diagonal, [N] in the order.
    """

    nodes: Array
    weight: Array
    root: Array
    place: Array
    lower: tuple[Array, Array, Array]
    upper: tuple[Array, Array, Array]
    loop: Array


def halved(columns: Columns, weight: Array) -> Halves:
    """The triangles of a walk, by the weights that make it self-adjoint."""
    order, root = ordered(columns.indptr, columns.indices), np.sqrt(weight)
    found = triangles(columns.indptr, columns.indices, columns.values, order, root)
    return Halves(order.astype(np.int64), weight[order], root[order], *found)


class Local:
    """What a push has reached of the graph, from one source; float64, on the CPU. As `Region`, but compiled.

    Args:
        columns: The columns of Pᵀ.
        mu: µ.
        source: Where b is 1 − µ; it is 0 elsewhere.
        weight: What residuals are measured by, [N], > 0.
        of_halves: What gives the triangles, where the walk is said to be reversible.
        max_work: Most edges to go along.

    Attributes:
        nodes: The known nodes, [known].
        b: Right-hand side, [known]; 0 elsewhere.
        x: Answer, [known]; 0 elsewhere.
        residual: b − (I − µPᵀ) x, [known]; 0 elsewhere.
        weight: That of the known nodes, [known].
        whole: Whether every node is known.
        lost: Whether it goes no further here: `Region` goes on from x.
    """

    def __init__(
        self,
        columns: Columns,
        mu: float,
        source: int,
        weight: Array,
        of_halves: Callable[[], Halves] | None,
        max_work: float,
    ) -> None:
        count = len(weight)
        self.mu, self.source, self.max_work = mu, source, max_work
        self._columns, self._weights, self._of_halves = columns, weight, of_halves
        self._omega = 1.0 if of_halves is None else 2 / (1 + math.sqrt(1 - mu * mu))
        # Pages of zeros never touched cost nothing.
        self._x, self._r, self._state = np.zeros(count), np.zeros(count), np.zeros(count, np.uint8)
        self._known, self._queue = np.empty(count, np.uint32), np.empty(count, np.uint32)
        # Known and opened nodes, edges of the opened, rounds, work.
        self._counts = np.array([1, 0, 0, 0, 0])
        self._known[0], self._state[source], self._r[source] = source, TOUCHED, 1 - mu
        # More rounds than this are no push.
        self._patience = 10 + math.ceil(8 / math.sqrt(1 - mu))
        self.whole = self.lost = False
        self._view()

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
        """Whether every known node is opened, so that no other can be reached."""
        return self.whole or bool(self._counts[0] == self._counts[1])

    def _view(self) -> None:
        """What is known, after a stage."""
        self.nodes = self._known[: self._counts[0]].astype(np.int64)
        self.x, self.residual = self._x[self.nodes], self._r[self.nodes]
        self.weight, self.b = self._weights[self.nodes], np.zeros(len(self.nodes))
        self.b[0] = 1 - self.mu

    def places(self, nodes: Array) -> Array:
        """Where nodes stand among the known, which are all."""
        return self._halves.place[nodes]

    def open_border(self) -> None:
        """Push all known nodes once."""
        self._push(-1.0, 1)

    def grow(self, threshold: float) -> bool:
        """Push until no |residual| is above threshold·weight.

        Where that comes to the whole graph, `settle` has to follow.

        Returns:
            False if a limit stands against it.
        """
        return self._push(threshold, self._patience) != LIMITED

    def _push(self, threshold: float, rounds: int) -> int:
        columns = self._columns
        end = pushed(
            *(columns.indptr, columns.indices, columns.values, self.mu, self._omega, self._weights),
            *(threshold, rounds, self.max_work, EDGES, PART),
            *(self._x, self._r, self._state, self._known, self._queue, self._counts),
        )
        refreshed(
            *(columns.indptr, columns.indices, columns.values, self.mu, self.source),
            *(self._x, self._r, self._known, self._counts),
        )
        self._view()
        if end == WHOLE and self._of_halves is not None:
            self._take_all()
        elif end == WHOLE or (end == SLOW and rounds > 1):
            self.lost = True
        return int(end)

    def _take_all(self) -> None:
        """Every node becomes known."""
        assert self._of_halves is not None
        self._halves = found = self._of_halves()
        self.nodes, self.weight = found.nodes, found.weight
        self.x, self.residual = self._x[self.nodes], self._r[self.nodes]
        self.b = np.zeros(len(self.nodes))
        self.b[found.place[self.source]] = 1 - self.mu
        self.whole = True

    def settle(self, look: Callable[[Array, Array], int]) -> bool:
        """Conjugate gradients on the whole graph; then x and residual anew.

        Args:
            look: From x and residual after a step to how many steps it may take until it wants to see them
                again; 0 for enough.

        Returns:
            False where a limit stands against it. Where something else does it is `lost`.
        """
        found, columns, count = self._halves, self._columns, len(self.nodes)
        diagonal = 1 - self.mu * found.loop
        scales = (self.mu / diagonal).astype(np.float32), diagonal, found.root
        # Seven vectors, to whole blocks.
        rows = tuple(np.zeros((7, -(-count // LANES), LANES), np.float32))
        vectors = tuple(row.reshape(-1)[:count] for row in rows[:6])
        rows[6].reshape(-1)[:count] = diagonal
        numbers = np.zeros(2)
        x, residual, edges = self.x.copy(), self.residual.copy(), len(found.lower[1]) + len(found.upper[1])
        before = least = left = float(np.abs(residual).sum())
        if before == 0:
            return not self.exhausted
        unit = UNIT * float(np.max(np.abs(residual) / found.root))
        entered(found.lower, scales, unit, residual, vectors[1])
        waited, most, halves = 0, look(x, residual), (found.lower, found.upper)
        while most > 0 and waited < self._patience and not self.exhausted:
            most = math.ceil(min(most, self._patience, 1 + (self.max_work - self.work) / max(edges, 1)))
            steps = stepped(*halves, scales[0], vectors, rows, numbers, most, (0,) * LANES)
            # A look multiplies by one triangle.
            self._counts[3:] += steps, steps * edges + len(found.lower[1])
            looked(found.lower, self.mu, scales, unit, self.x, vectors, numbers, x, residual)
            left = float(np.abs(residual).sum())
            waited, least = (0, left) if left < 0.5 * least else (waited + most, least)
            most = look(x, residual) if steps == most and left < math.inf else 0
        self._x[self.nodes] = np.maximum(x, 0)
        multiplied(columns.indptr, columns.indices, columns.values, self.mu, self._x, self._r)
        self._counts[4] += len(columns.indices)
        x = self._x[self.nodes]
        residual = self._r[self.nodes] + self.b - x
        left = float(np.abs(residual).sum())
        if left <= before:
            self.x, self.residual = x, residual
        # Weights that are not the walk's, or rounding.
        self.lost = not (waited < self._patience and left <= 0.5 * before)
        return not self.exhausted


@compiled
def triangles(starts: Any, nodes: Any, values: Any, order: Any, roots: Any) -> Any:
    """The place of each node, the triangles of S, and its diagonal, by the rows of P; see `Halves`."""
    count, edges = uint64(len(order)), len(nodes)
    place = np.empty(count, np.int64)
    for a in range(count):
        place[uint64(order[a])] = a
    below, above = np.zeros(count + uint64(1), np.uint32), np.zeros(count + uint64(1), np.uint32)
    into_below, into_above = np.empty(edges, np.uint32), np.empty(edges, np.uint32)
    of_below, of_above = np.empty(edges, np.float32), np.empty(edges, np.float32)
    loop = np.zeros(count, np.float64)
    first, second = uint64(0), uint64(0)
    for a in range(count):
        i = uint64(order[a])
        for e in range(uint64(starts[i]), uint64(starts[i + uint64(1)])):
            j = uint64(nodes[e])
            b, value = uint64(place[j]), roots[i] * values[e] / roots[j]
            if b < a:
                into_below[first], of_below[first] = b, value
                first += uint64(1)
            elif b > a:
                into_above[second], of_above[second] = b, value
                second += uint64(1)
            else:
                loop[a] += values[e]
        below[a + uint64(1)], above[a + uint64(1)] = first, second
    lower = below, into_below[:first].copy(), of_below[:first].copy()
    return place, lower, (above, into_above[:second].copy(), of_above[:second].copy()), loop


@compiled
def pushed(
    starts: Any,
    nodes: Any,
    values: Any,
    mu: float,
    omega: float,
    weight: Any,
    threshold: float,
    rounds: int,
    max_work: float,
    edges: float,
    part: float,
    x: Any,
    r: Any,
    state: Any,
    known: Any,
    queue: Any,
    counts: Any,
) -> Any:
    """Push until no |r| is above threshold·weight; what changes is in the last six."""
    size = uint64(len(known))
    found, opened, within = uint64(counts[0]), uint64(counts[1]), uint64(counts[2])
    steps, work = counts[3], uint64(counts[4])
    head, tail, waiting, end = uint64(0), uint64(0), uint64(0), SETTLED
    for a in range(found):
        u = uint64(known[a])
        if abs(r[u]) > threshold * weight[u]:
            queue[tail] = u
            state[u] |= QUEUED
            tail += uint64(1)
    waiting = tail
    tail = uint64(0) if tail == size else tail
    while waiting > 0 and end == SETTLED:
        more, a = uint64(0), head
        for _ in range(waiting):
            u = uint64(queue[a])
            if not state[u] & OPENED:
                more += uint64(starts[u + uint64(1)]) - uint64(starts[u])
            a = uint64(0) if a + uint64(1) == size else a + uint64(1)
        if more > within and within + more > edges * len(nodes):
            end = WHOLE
            break
        for _ in range(waiting):
            u = uint64(queue[head])
            head = uint64(0) if head + uint64(1) == size else head + uint64(1)
            waiting -= uint64(1)
            state[u] &= ~QUEUED
            if not abs(r[u]) > threshold * weight[u]:
                continue
            first, last = uint64(starts[u]), uint64(starts[u + uint64(1)])
            if not state[u] & OPENED:
                state[u] |= OPENED
                opened += uint64(1)
                within += last - first
            moved = omega * r[u]
            x[u] += moved
            r[u] -= moved
            moved *= mu
            work += last - first
            # Of what is left of its own, too, there may be too much.
            for e in range(first, last + uint64(1)):
                v = u
                if e < last:
                    v = uint64(nodes[e])
                    r[v] += moved * values[e]
                if not state[v] & TOUCHED:
                    state[v] |= TOUCHED
                    known[found] = v
                    found += uint64(1)
                if not state[v] & QUEUED and abs(r[v]) > threshold * weight[v]:
                    state[v] |= QUEUED
                    queue[tail] = v
                    tail = uint64(0) if tail + uint64(1) == size else tail + uint64(1)
                    waiting += uint64(1)
        steps += 1
        rounds -= 1
        if found > part * size:
            end = WHOLE
        elif waiting > 0 and work >= max_work:
            end = LIMITED
        elif waiting > 0 and rounds == 0:
            end = SLOW
    for _ in range(waiting):
        state[uint64(queue[head])] &= ~QUEUED
        head = uint64(0) if head + uint64(1) == size else head + uint64(1)
    counts[0], counts[1], counts[2], counts[3], counts[4] = found, opened, within, steps, work
    return end


@compiled
def refreshed(
    starts: Any, nodes: Any, values: Any, mu: float, source: int, x: Any, r: Any, known: Any, counts: Any
) -> None:
    """x ≥ 0, and the residual of it anew."""
    found = uint64(counts[0])
    for a in range(found):
        r[uint64(known[a])] = 0.0
    for a in range(found):
        u = uint64(known[a])
        x[u] = max(x[u], 0.0)
        moved = x[u]
        if moved > 0.0:
            for e in range(uint64(starts[u]), uint64(starts[u + uint64(1)])):
                r[uint64(nodes[e])] += moved * values[e]
    for a in range(found):
        u = uint64(known[a])
        r[u] = mu * r[u] - x[u]
    r[uint64(source)] += 1 - mu
    counts[4] += counts[2]


@compiled
def multiplied(starts: Any, nodes: Any, values: Any, mu: float, x: Any, y: Any) -> None:
    """y = µPᵀx."""
    y[:] = 0.0
    for u in range(uint64(len(x))):
        moved = mu * x[u]
        if moved != 0.0:
            for e in range(uint64(starts[u]), uint64(starts[u + uint64(1)])):
                y[uint64(nodes[e])] += moved * values[e]


@njit(inline="always")
def summed(nodes: Any, values: Any, x: Any, first: Any, last: Any) -> Any:
    """A row times x: four sums, for a sum waits for the one before."""
    e = uint64(first)
    s0, s1, s2, s3 = float32(0.0), float32(0.0), float32(0.0), float32(0.0)
    while e + uint64(3) < last:
        s0 += values[e] * x[uint64(nodes[e])]
        s1 += values[e + uint64(1)] * x[uint64(nodes[e + uint64(1)])]
        s2 += values[e + uint64(2)] * x[uint64(nodes[e + uint64(2)])]
        s3 += values[e + uint64(3)] * x[uint64(nodes[e + uint64(3)])]
        e += uint64(4)
    while e < last:
        s0 += values[e] * x[uint64(nodes[e])]
        e += uint64(1)
    return (s0 + s1) + (s2 + s3)


@compiled
def entered(lower: Any, scales: Any, unit: float, residual: Any, rho: Any) -> None:
    """ρ = (∆ − µL)⁻¹ times a residual."""
    starts, nodes, values = lower
    rate, diagonal, root = scales
    for a in range(uint64(len(rho))):
        total = summed(nodes, values, rho, starts[a], uint64(starts[a + uint64(1)]))
        rho[a] = float32(residual[a] / (unit * root[a] * diagonal[a])) + rate[a] * total


@compiled
def stepped(
    lower: Any, upper: Any, rate: Any, vectors: Any, rows: Any, numbers: Any, most: int, lanes: Any
) -> int:
    """So many steps of conjugate gradients, and how many there were: fewer without curvature.

    What a step adds to x and ρ is added at the start of the next. Numbers are its length, and ‖ρ‖² before.
    `rows` are the vectors and ∆ once more, so many numbers side by side as there are lanes.
    """
    _, rho, _, s, _, w = vectors
    into, residual, direction, solved, way, image, diagonal = rows
    starts, below, values = lower
    ends, above, weights = upper
    count, blocks, sums = uint64(len(rate)), uint64(len(into)), np.zeros((1, len(lanes)))
    for step in range(most):
        length, total = float32(numbers[0]), zeros(lanes)
        for b in range(blocks):
            t = load(way, b, lanes)
            store(into, b, load(into, b, lanes) + t * length)
            q = load(residual, b, lanes) - (t + load(image, b, lanes)) * length
            store(residual, b, q)
            total = total + wide(q * load(diagonal, b, lanes)) * wide(q)
        store(sums, uint64(0), total)
        square = sums.sum()
        a = count
        while a > uint64(0):
            a -= uint64(1)
            s[a] = rho[a] + rate[a] * summed(above, weights, s, ends[a], uint64(ends[a + uint64(1)]))
        turn = float32(square / numbers[1] if numbers[1] > 0.0 else 0.0)
        for b in range(blocks):
            p = load(residual, b, lanes) + load(direction, b, lanes) * turn
            t = load(solved, b, lanes) + load(way, b, lanes) * turn
            store(direction, b, p)
            store(way, b, t)
            store(image, b, p - t)
        for a in range(count):
            w[a] += rate[a] * summed(below, values, w, starts[a], uint64(starts[a + uint64(1)]))
        total = zeros(lanes)
        for b in range(blocks):
            moved = load(way, b, lanes) + load(image, b, lanes)
            total = total + wide(load(direction, b, lanes) * load(diagonal, b, lanes)) * wide(moved)
        store(sums, uint64(0), total)
        curvature = sums.sum()
        # No curvature, no step: that is rounding, or weights that are not the walk's.
        numbers[0], numbers[1] = square / curvature if curvature > 0.0 else 0.0, square
        if not curvature > 0.0:
            return step
    return most


@compiled
def looked(
    lower: Any, mu: float, scales: Any, unit: float, start: Any, vectors: Any, numbers: Any, y: Any, r: Any
) -> None:
    """The answer, and its residual (∆ − µL)ρ."""
    x, rho, _, _, t, w = vectors
    starts, nodes, values = lower
    _, diagonal, root = scales
    length = float32(numbers[0])
    numbers[0] = 0.0
    for a in range(uint64(len(x))):
        rho[a] -= length * (t[a] + w[a])
        x[a] += length * t[a]
        total = summed(nodes, values, rho, starts[a], uint64(starts[a + uint64(1)]))
        r[a] = (diagonal[a] * rho[a] - mu * total) * (unit * root[a])
        y[a] = start[a] + unit * root[a] * x[a]
