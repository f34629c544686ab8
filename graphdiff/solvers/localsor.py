"""(I − µPᵀ) x = b by push, compiled: over-relaxed near a source, preconditioned on the whole graph.

Near the source a push takes ω times what a node holds of the residual and leaves 1 − ω times it there,

    x_u += ω r_u,   r −= ω r_u (I − µPᵀ) e_u,

nodes waiting in a queue while |r_v| > θ w_v: successive over-relaxation of the nodes that matter alone (Bai,
Zhou, Yang and Xiao, "Faster local solvers for graph diffusion equations", NeurIPS 2024). Where the walk is
reversible, ω = 2/(1 + √(1 − µ²)), and a round over the region leaves about ω − 1 of the error; else ω = 1.

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
from numba import uint8, uint64

from graphdiff.operators.base import Transition
from graphdiff.operators.compiled import compiled
from graphdiff.operators.rows import block
from graphdiff.solvers import directed_sweeps, sweeps
from graphdiff.solvers.directed_ssor import DirectedSSOR
from graphdiff.solvers.push import EDGES, PART, Array, Columns
from graphdiff.solvers.ssor import SSOR, swept_dtype

TOUCHED, OPENED, QUEUED = uint8(1), uint8(2), uint8(4)
# How a stage of pushing ends.
SETTLED, LIMITED, SLOW, WHOLE = range(4)
# One signal.
ALONE = (0,)


class Whole(NamedTuple):
    """What is made of a walk for one µ, as its solver prepares it.

    Attributes:
        triangles: The solver's.
        degree: d of a reversible walk, [N], else None.
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
    return Whole(found._replace(rows=rows), shadow=directed.shadow)


class Local:
    """What a push has reached of the graph, from one source; float64, on the CPU. As `Region`, but compiled.

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
        whole: Whether every node is known.
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
        count = len(weight)
        self.mu, self.source, self.max_work = mu, source, max_work
        self._columns, self._weights, self._of_whole = columns, weight, of_whole
        self._omega = 2 / (1 + math.sqrt(1 - mu * mu)) if reversible else 1.0
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
        return nodes

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
        if end == WHOLE:
            self._take_all()
        elif end == SLOW and rounds > 1:
            self.lost = True
        return int(end)

    def _take_all(self) -> None:
        """Every node becomes known."""
        self.nodes, self.weight = np.arange(len(self._x)), self._weights
        self.x, self.residual = self._x, self._r
        self.b = np.zeros(len(self.nodes))
        self.b[self.source] = 1 - self.mu
        self.whole = True

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

    def __init__(self, whole: Whole, residual: Array) -> None:
        self._whole, found, most = whole, whole.triangles, float(np.abs(residual).max())
        self._halves, self._weights = (found.lower, found.upper), found.weights
        self.edges = sum(len(half[1]) for half in self._halves)
        self._unit, self._size = np.full((1, 1), 1 / most), most
        self._dtype = swept_dtype(found.lower)
        parts = block(*[(len(residual), self._dtype)] * 6)
        self._vectors = [part.reshape(-1, 1) for part in parts]
        # x, and directions: what is left of others may be no number.
        for vector in (self._vectors[0], *self._vectors[2:4]):
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
        self._product[:], self._active[:] = self._sums[0], self._sums[1] > 0

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

    products = 1

    def _enter(self, given: Array) -> None:
        found, r, share = self._whole.triangles, self._vectors[1], np.ones((1, 1))
        nodes = self._whole.degree, found.mu, found.place, found.inverse
        sweeps.residual(found.rows, nodes, given, self._unit, given, share, False, r, True, ALONE)
        sweeps.lowered(found.lower, r, self._weights, True, self._sums, ALONE)

    def _iterate(self, most: int) -> None:
        x, r, p, _, t, w = self._vectors
        vectors = x, r, p, t, w, self._turn, self._one(), self._sums
        # Bound, when it was half, target, factor, largest, limit, patience: nothing but the looks ends it.
        far, never = np.full(1, np.inf), np.full(1, 2**62)
        rest = np.ones(1), far, self._taken.copy(), np.zeros(1), np.ones(1), far.copy(), never, never
        state = self._active, self._taken, self._product, *rest
        sweeps.iterated(*self._halves, self._weights, True, vectors, state, most, ALONE)


class _Directed(_Steps):
    """Those of `DirectedSSOR`."""

    products = 2

    def __init__(self, whole: Whole, residual: Array) -> None:
        super().__init__(whole, residual)
        # How far a step goes in each of its halves.
        self._lengths = self._one(), self._one()

    def _enter(self, given: Array) -> None:
        found, r = self._whole.triangles, self._vectors[1]
        directed_sweeps.residual(
            *(found.rows, found.place, found.inverse, found.lower, given, self._unit, given, False),
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
