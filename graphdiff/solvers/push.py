"""(I − MP) x = b by push: only the nodes that hold residual worth moving are ever looked at.

A push at node u moves what u holds of the residual into the answer, and what follows from it to the nodes
that read u:

    x_u += r_u,   r −= r_u (I − MP) e_u,     so that  x* = x + Σ_u r_u (I − MP)⁻¹ e_u  throughout

(Andersen, Chung and Lang 2006). One node at a time that is slow without a compiler, and neighbours undo each
other's pushes. Here a region of the graph grows by the nodes of largest residual, and within it everything is
pushed at once: by walking while it grows, then by conjugate gradients where the walk is reversible and by
BiCGSTAB where it is not. What crosses the border waits as residual on the nodes just outside. The work is the
edges of the region times the rounds; the size of the graph does not enter.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from graphdiff.operators.base import Transition
from graphdiff.solution import Norm
from graphdiff.solvers.base import Iterate, Limits, Solver, norm_of, remaining_of

Array = np.ndarray[Any, np.dtype[Any]]

# Thresholds fall by this from stage to stage: a smaller factor opens nodes that need not be, a larger one
# starts the inner solver more often.
FALL = 0.1
# When a residual is above the threshold, all are opened that are above this part of it: a border that creeps
# outwards node by node costs a round for each of them.
AHEAD = 0.3
# Inside, residuals are brought this far below the threshold.
SETTLED = 0.5
# A region that knows this part of all nodes becomes the whole graph, without the price of finding its way.
PART = 0.25
# And so does one that would more than double its edges at once and then have this part of all of them, where
# the whole is at hand.
EDGES = 0.02


class Whole(NamedTuple):
    """P in float64 with its nodes in another order, and where they stand in it.

    Attributes:
        matrix: P, rows and columns alike in this order.
        order: The node at each place, [N].
        place: 1 + the place of each node, [N].
    """

    matrix: Any
    order: Array
    place: Array


class Columns:
    """The columns of P, kept by who makes many regions in one graph.

    Args:
        columns: Pᵀ as a `scipy.sparse.csr_array`. Its arrays are used as they are.
    """

    def __init__(self, columns: Any) -> None:
        self.indptr, self.indices, self.values = columns.indptr, columns.indices, columns.data

    @cached_property
    def whole(self) -> Whole:
        """All of P, the nodes of longest rows first; held from the first call on, 12 or 16 bytes an edge.

        Rows of one length beside each other are summed up to twice as fast: a processor then foresees where
        a row ends. The nodes that most edges come from are near each other, too.
        """
        from scipy import sparse

        nodes = len(self.indptr) - 1
        rows = sparse.csr_array((self.values, self.indices, self.indptr), shape=(nodes, nodes)).T.tocsr()
        order = np.argsort(-np.diff(rows.indptr), kind="stable")
        place = np.empty_like(order)
        place[order] = np.arange(1, nodes + 1)
        rows = rows[order].astype(np.float64, copy=False)
        rows.indices = (place - 1).astype(rows.indices.dtype)[rows.indices]
        return Whole(rows, order, place)


class Pushed(NamedTuple):
    """The operator, µ [..., 1 or N, 1 or K], and how many edges there are."""

    operator: Transition
    mu: Tensor
    edges: int


@dataclass(frozen=True)
class Push(Solver):
    """Push outwards from where a signal is, for sparse walks and signals that are 0 almost everywhere.

    For ``diffuse(P.T, s)`` it is the push of personalised PageRank, for ``diffuse(P, s)`` its reverse; b may
    have either sign. Only edges near enough to matter at the tolerance are gone along: `Solution.matvecs`
    counts them in products with the whole of P, rounded up. Where that is most of the graph, it becomes CG or
    BiCGSTAB on all of it. One right-hand side after the other, in float64 on the CPU.

    Raises:
        ValueError: The walk is not sparse.

    Example:
        >>> import torch, graphdiff as gd
        >>> ring = torch.stack([torch.arange(1000), (torch.arange(1000) + 1) % 1000])
        >>> P = gd.SparseTransition.from_edge_index(ring, undirected=True, dtype=torch.float64)
        >>> s = torch.zeros(1000, dtype=torch.float64)
        >>> s[0] = 1
        >>> sol = gd.solve(P.T, s, mu=0.5, solver=gd.solvers.Push())
        >>> bool(sol.converged), int((sol.value > 0).sum()) < 100
        (True, True)
    """

    def prepare(self, operator: Transition, mu: Tensor) -> Pushed:
        """A count of the edges."""
        if not operator.sparse:
            raise ValueError(
                f"solver: Push needs a sparse walk, whose rows are short lists, got {operator}; use CG(), "
                "BiCGSTAB(), Walk() or Auto()"
            )
        walk = operator if operator.stochastic == "rows" else operator.T
        return Pushed(operator, mu, walk.to_scipy().nnz)

    def transposed(self, state: Pushed) -> Pushed:
        """The same with Pᵀ."""
        return state._replace(operator=state.operator.T)

    def solve(self, state: Pushed, rhs: Tensor, initial: Tensor, target: Tensor, limits: Limits) -> Iterate:
        """Push each right-hand side until its bound is below its target."""
        operator, mu, edges = state
        remaining = remaining_of(operator, mu.double().cpu()).expand(*rhs.shape[:-2], -1, rhs.shape[-1])
        mu = mu.double().cpu().expand(*rhs.shape[:-2], -1, rhs.shape[-1])
        b, x, goal = (t.double().cpu() for t in (rhs, initial, target))
        found, norm = torch.zeros_like(b), norm_of(operator)
        steps = torch.zeros_like(goal, dtype=torch.int64)
        matvecs = torch.zeros_like(steps)
        most = None if limits.steps is None else limits.steps.cpu()
        waiting, bounds = torch.ones_like(goal, dtype=torch.bool), torch.full_like(goal, math.inf)
        for *batch, channel in np.ndindex(*b.shape[:-2], b.shape[-1]):
            at, one = (*batch, slice(None), channel), (*batch, 0, channel)

            def going_on(region: Region, one: tuple[int, ...] = one) -> bool:
                steps[one] = region.steps
                if limits.budget.progress is not None:
                    bounds[one] = _bound(region, norm)
                    waiting[one] = bool(bounds[one] > goal[one])
                asked = limits._replace(steps=None).going_on(waiting, steps, bounds)
                return bool(asked[one]) or not bool(waiting[one])

            region = Region(
                operator,
                _number_or_array(mu[at]),
                _number_or_array(remaining[at]),
                max_steps=math.inf if most is None else int(most[one]),
                going_on=going_on,
            )
            if limits.budget.timed_out:
                region.max_steps = 0
            _run(region, b[at].numpy(), x[at].numpy(), float(goal[one]), norm)
            # One step of walking more: its product is the one that the certificate computes.
            found[at][torch.from_numpy(region.nodes)] = torch.from_numpy(region.x + region.residual)
            steps[one], waiting[one] = region.steps, False
            matvecs[one] = -(-region.work // max(edges, 1))
        counts = (steps.squeeze(-2), matvecs.squeeze(-2))
        return Iterate(*(t.to(rhs.device) for t in (found.to(rhs.dtype), *counts)))


def _number_or_array(x: Tensor) -> float | Array:
    return float(x) if x.numel() == 1 else x.numpy()


def _run(region: "Region", b: Array, x: Array, target: float, norm: Norm) -> None:
    """Push until the bound of the error is at most the target, or nothing helps."""
    nodes = np.flatnonzero((b != 0) | (x != 0))
    region.start(nodes, b[nodes], x[nodes])

    def enough(_: Array, r: Array) -> bool:
        return region.whole and _size(r, region.weight, norm) <= target

    threshold, going = float(np.max(np.abs(region.residual) / region.weight, initial=0.0)), True
    while going and _bound(region, norm) > target:
        threshold = max(FALL * threshold, target) if norm == "inf" else FALL * threshold
        going = region.settle(0.0, enough) if region.whole else region.grow(threshold)


def _bound(region: "Region", norm: Norm) -> float:
    """‖x* − x‖ is at most this; within a round of the inner solver, as of before it."""
    return _size(region.residual, region.weight, norm)


def _size(residual: Array, weight: Array, norm: Norm) -> float:
    size = np.abs(residual) / weight
    return float(size.max(initial=0.0) if norm == "inf" else size.sum())


class Region:
    """What a push has reached of the graph, for one right-hand side; float64, on the CPU.

    Nodes are numbered in order of discovery. *Known* nodes may hold residual; *opened* ones besides have
    their column of P loaded and can be pushed.

    Args:
        operator: P, sparse.
        mu: µ, one number or [N].
        weight: What residuals are measured by, one number or [N], > 0.
        nonnegative: Whether b and so the exact answer is ≥ 0. Then x is kept so.
        max_steps: Most rounds of pushing.
        max_work: Most edges to go along.
        going_on: Asked after every round; False ends the pushing.
        columns: The columns of P, where they are at hand; else the operator is asked for them.

    Attributes:
        nodes: The known nodes, [known].
        b: Right-hand side, [known]; 0 elsewhere.
        x: Answer, [known]; 0 elsewhere.
        residual: b − (I − MP) x, [known]; 0 elsewhere.
        weight: That of the known nodes, [known].
        opened: Places of the opened nodes among the known.
        whole: Whether every node is known and opened.
        steps: Rounds of pushing.
        work: Edges that these went along.
    """

    def __init__(
        self,
        operator: Transition,
        mu: float | Array,
        weight: float | Array,
        *,
        nonnegative: bool = False,
        max_steps: float = math.inf,
        max_work: float = math.inf,
        going_on: "Callable[[Region], bool] | None" = None,
        columns: Columns | None = None,
    ) -> None:
        nodes = operator.shape[-1]
        self.operator, self.mu, self.weights, self.nonnegative = operator, mu, weight, nonnegative
        self._columns = columns
        self.max_steps, self.max_work, self._going_on = max_steps, max_work, going_on
        self._log_degree = _log_degree(operator) if isinstance(mu, float) and mu > 0 else None
        # Halving what is left takes no more steps than this, if steps help at all; and no more walks.
        left = 1 - float(np.max(mu))
        self._patience, self._walks = 10 + math.ceil(4 / math.sqrt(left)), 10 + math.ceil(1 / left)
        # 1 + the place of a node among the known, 0 if it is not; pages of zeros never touched cost nothing.
        self._place = np.zeros(nodes, np.int32 if nodes < 2**31 else np.int64)
        self.nodes = np.empty(0, np.int64)
        self.b = self.x = self.residual = self.weight = np.empty(0)
        self.opened: Any = np.empty(0, np.int64)
        self._is_open = np.empty(0, bool)
        self._starts = np.zeros(1, self._place.dtype)
        self._ends, self._values = np.empty(0, self._place.dtype), np.empty(0)
        self._matrix: Any = None
        self._fresh = True
        self.whole = False
        self.steps = self.work = 0

    @property
    def exhausted(self) -> bool:
        """Whether a limit is reached."""
        return self.steps >= self.max_steps or self.work >= self.max_work

    def _stepped(self, rounds: int) -> None:
        """Count them, and let whoever asked for it end the pushing."""
        self.steps += rounds
        if self._going_on is not None and not self._going_on(self):
            self.max_steps = self.steps

    @property
    def closed(self) -> bool:
        """Whether every known node is opened, so that no other can be reached."""
        return self.whole or len(self.opened) == len(self.nodes)

    def open_border(self) -> None:
        """Open all known nodes, push those that are new, and refresh."""
        self._advance(np.flatnonzero(~self._is_open))
        self.refresh()

    def start(self, nodes: Array, b: Array, x: Array) -> None:
        """Right-hand side and first guess on some nodes, each named once; both are 0 on all others."""
        self._know(nodes)
        places = self.places(nodes)
        self.b[places], self.x[places] = b, x
        self.open(places[x != 0])
        self.refresh()

    def places(self, nodes: Array) -> Array:
        """Where nodes stand among the known, −1 for others."""
        return self._place[nodes].astype(np.int64) - 1

    def _know(self, nodes: Array) -> None:
        """Nodes, some of them perhaps twice or known already, become known."""
        place = self._place
        new = nodes[place[nodes] == 0]
        if len(new) == 0:
            return
        # Of equal nodes the last one to leave its number stays.
        numbers = np.arange(1, len(new) + 1)
        place[new] = numbers
        new = new[place[new] == numbers]
        place[new] = np.arange(len(self.nodes) + 1, len(self.nodes) + len(new) + 1)
        nothing = np.zeros(len(new))
        self.nodes = np.concatenate([self.nodes, new])
        self.b, self.x = np.concatenate([self.b, nothing]), np.concatenate([self.x, nothing])
        self.residual = np.concatenate([self.residual, nothing])
        self._is_open = np.concatenate([self._is_open, np.zeros(len(new), bool)])
        self.weight = np.concatenate([self.weight, _at(self.weights, new)])

    def open(self, places: Array) -> None:
        """Load the columns of some known nodes that are not opened yet."""
        if len(places) == 0:
            return
        found = self._entries(self.nodes[places])
        if found is None:
            self._take_all()
            return
        counts, node, value = found
        self._know(node)
        used, more = int(self._starts[-1]), len(node)
        self._ends, self._values = _room(self._ends, used, more), _room(self._values, used, more)
        self._ends[used : used + more] = self._place[node]
        self._ends[used : used + more] -= 1
        self._values[used : used + more] = value
        ends = (used + counts.cumsum()).astype(self._starts.dtype)
        self._starts = np.concatenate([self._starts, ends])
        self.opened = np.concatenate([self.opened, places])
        self._is_open[places] = True
        self._matrix = None
        if len(self.nodes) > PART * len(self._place):
            self._take_all()

    def _entries(self, nodes: Array) -> tuple[Array, Array, Array] | None:
        """How many entries the columns of some nodes have, and their rows and values; None if too many."""
        if self._columns is not None:
            indptr, indices, values = self._columns.indptr, self._columns.indices, self._columns.values
            first = indptr[nodes].astype(np.int64)
            counts = indptr[nodes + 1] - first
            last = counts.cumsum()
            used, more = int(self._starts[-1]), int(last[-1])
            if more > used and used + more > EDGES * len(indices):
                return None
            edge = np.repeat(first - last + counts, counts)
            edge += np.arange(len(edge))
            return counts, indices[edge], values[edge]
        with torch.no_grad():
            found = self.operator.T.neighbours(torch.from_numpy(nodes).to(self.operator.device))
        position, node, value = (t.cpu().numpy() for t in found)
        return np.bincount(position, minlength=len(nodes)), node, value

    def _advance(self, places: Array) -> None:
        """Open some known nodes and push.

        Those alone where opening is cheap; else all, which takes longer and opens less often.
        """
        self.open(places)
        if self._columns is None:
            self.walk()
            return
        if self.whole:
            # A solver does better from here.
            return
        # They were opened last.
        starts = self._starts[len(self._starts) - 1 - len(places) :]
        edges = slice(int(starts[0]), int(starts[-1]))
        moved = self.residual[places]
        self.x[places] += moved
        self.residual[places] = 0
        flow = np.repeat(moved, np.diff(starts))
        flow *= self._values[edges]
        arrived = np.bincount(self._ends[edges], flow, len(self.nodes))
        self.residual += _at(self.mu, self.nodes) * arrived
        self.work += len(flow)
        self._fresh = False
        self._stepped(1)

    def _take_all(self) -> None:
        """Every node becomes known and opened."""
        if self._columns is not None:
            self._matrix, order, place = self._columns.whole
        else:
            rows = self.operator.stochastic == "rows"
            matrix = self.operator.to_scipy() if rows else self.operator.T.to_scipy().T
            self._matrix, order = matrix.astype(np.float64, copy=False), np.arange(len(self._place))
            place = order + 1
        places = place[self.nodes] - 1

        def spread(x: Array) -> Array:
            full = np.zeros(len(order))
            full[places] = x
            return full

        self.b, self.x, self.residual = spread(self.b), spread(self.x), spread(self.residual)
        self.nodes, self._place = order, place
        self.weight = _at(self.weights, order)
        self.opened, self._is_open = slice(None), np.ones(len(order), bool)
        self.whole = True

    def product(self, x: Array) -> Array:
        """MP x on the known nodes, for an x on the opened ones."""
        if self._matrix is None:
            from scipy import sparse

            edges = int(self._starts[-1])
            columns = self._values[:edges], self._ends[:edges], self._starts
            self._matrix = sparse.csc_array(columns, shape=(len(self.nodes), len(self._starts) - 1))
        self.work += self._matrix.nnz
        walked: Array = self._matrix @ x
        walked *= self.mu if isinstance(self.mu, float) else self.mu[self.nodes]
        return walked

    def refresh(self) -> None:
        """The residual anew, so that it holds no more rounding than one product has."""
        if self.nonnegative:
            np.maximum(self.x, 0, out=self.x)
        self.residual = self.product(self.x[self.opened])
        self.residual += self.b
        self.residual -= self.x
        self._fresh = True

    def walk(self) -> None:
        """Push every opened node once."""
        self.x[self.opened] += self.residual[self.opened]
        self.refresh()
        self._stepped(1)

    def size(self) -> float:
        """The largest residual by weight of the opened nodes."""
        return _largest(self.residual[self.opened], self.weight[self.opened])

    def grow(self, threshold: float) -> bool:
        """Open nodes and push until no |residual| is above threshold·weight, or nothing is left to open.

        Where that comes to the whole graph, `settle` has to follow.

        Returns:
            False if a limit, or rounding, stands against it.
        """
        done = self._grow(threshold)
        if not self._fresh and not self.whole:
            self.refresh()
        return done

    def _grow(self, threshold: float) -> bool:
        while not self.whole:
            size = np.abs(self.residual)
            size /= self.weight
            size[self._is_open] = 0
            beyond = bool((size > threshold).any())
            if not beyond and self.size() <= threshold:
                return True
            if self.exhausted:
                return False
            if beyond:
                self._advance(np.flatnonzero(size > AHEAD * threshold))
            elif not self.settle(SETTLED * threshold, lambda _, residual: False):
                return False
        return True

    def settle(self, threshold: float, enough: Callable[[Array, Array], bool]) -> bool:
        """Push the opened nodes alone until |residual| ≤ threshold·weight there, or `enough` says so.

        Args:
            threshold: Where to stop.
            enough: From x and residual of the opened nodes after a step to whether to stop.

        Returns:
            False where a limit, or rounding, stands against it.
        """
        before = self.size()

        def done() -> bool:
            # What is computed anew need not be quite as small as the solver thinks.
            if self.size() <= max(threshold / SETTLED, 0.5 * before):
                return True
            return enough(self.x[self.opened], self.residual[self.opened])

        if self._log_degree is not None:
            start = self.x.copy()
            self._conjugate(threshold, enough)
            self.refresh()
            if done():
                return True
            # Degrees that are not the walk's, or differ too much: from here on without them.
            self._log_degree = None
            if self.size() > before:
                self.x = start
                self.refresh()
        self._bicgstab(threshold, enough)
        self.refresh()
        for _ in range(self._walks):
            if done():
                return True
            if self.exhausted:
                return False
            # Walking leaves less at every step; what it cannot halve is rounding.
            self.walk()
        return done()

    def _conjugate(self, threshold: float, enough: Callable[[Array, Array], bool]) -> None:
        """Conjugate gradients on the opened nodes, in the product in which P is self-adjoint."""
        assert self._log_degree is not None
        sign, log_degree = self._log_degree
        log_weight = sign * log_degree[self.nodes[self.opened]]
        # Any weights > 0 will do where they differ beyond all numbers: the residual is computed anew.
        weight = np.exp(np.maximum(log_weight - log_weight.max(), -600))
        measure = self.weight[self.opened]
        x, r = self.x[self.opened].copy(), self.residual[self.opened].copy()
        direction, weighted = r.copy(), weight * r
        square, least, waited = float(weighted @ r), math.inf, 0
        while waited < self._patience and not self.exhausted:
            image = self.product(direction)[self.opened]
            np.subtract(direction, image, out=image)
            np.multiply(weight, direction, out=weighted)
            curvature = float(weighted @ image)
            if not curvature > 0:
                break
            _add(direction, square / curvature, x)
            _add(image, -square / curvature, r)
            np.multiply(weight, r, out=weighted)
            following = float(weighted @ r)
            # With nothing to fall below, this is at hand and does as well to see whether it goes on.
            size = _largest(r, measure) if threshold > 0 else math.sqrt(following)
            self._stepped(1)
            if size <= threshold or enough(x, r):
                break
            least, waited = (size, 0) if size < 0.5 * least else (least, waited + 1)
            direction *= following / square
            direction += r
            square = following
        self.x[self.opened] = x

    def _bicgstab(self, threshold: float, enough: Callable[[Array, Array], bool]) -> None:
        """Stabilised biconjugate gradients on the opened nodes."""
        measure = self.weight[self.opened]
        x, r = self.x[self.opened].copy(), self.residual[self.opened].copy()
        shadow, direction = r.copy(), r.copy()
        product = float(shadow @ r)
        best, least, waited = x.copy(), math.inf, 0
        while waited < self._patience and not self.exhausted:
            image = self.product(direction)[self.opened]
            np.subtract(direction, image, out=image)
            alpha = _quotient(product, float(shadow @ image))
            _add(image, -alpha, r)
            second = self.product(r)[self.opened]
            np.subtract(r, second, out=second)
            omega = _quotient(float(second @ r), float(second @ second))
            self._stepped(2)
            if alpha * omega == 0 or not math.isfinite(alpha * omega):
                break
            _add(direction, alpha, x)
            _add(r, omega, x)
            _add(second, -omega, r)
            size = _largest(r, measure)
            waited = 0 if size < 0.5 * least else waited + 1
            if size < least:
                np.copyto(best, x)
                least = size
            if size <= threshold:
                break
            if enough(x, r):
                best = x
                break
            following = float(shadow @ r)
            _add(image, -omega, direction)
            direction *= following / product * alpha / omega
            direction += r
            product = following
        self.x[self.opened] = best


def _at(x: float | Array, nodes: Array) -> Array:
    return x[nodes] if isinstance(x, np.ndarray) else np.full(len(nodes), x)


def _add(x: Array, factor: float, y: Array) -> None:
    """y += factor · x, without a third array."""
    torch.from_numpy(y).add_(torch.from_numpy(x), alpha=factor)


def _largest(residual: Array, weight: Array) -> float:
    return float(np.max(np.abs(residual) / weight, initial=0.0))


def _log_degree(operator: Transition) -> tuple[int, Array] | None:
    """log d, and its sign in the weights that make P self-adjoint: d for a walk, 1/d for its transpose."""
    rows = operator.stochastic == "rows"
    found = (operator if rows else operator.T).log_degree if operator.reversible else None
    return None if found is None else (1 if rows else -1, found.detach().cpu().numpy())


def _quotient(a: float, b: float) -> float:
    return a / b if b else 0.0


def _room(buffer: Array, used: int, more: int) -> Array:
    """The buffer, or a larger one with the same beginning, for `more` entries after those used."""
    if used + more <= len(buffer):
        return buffer
    larger = np.empty(max(2 * len(buffer), used + more), buffer.dtype)
    larger[:used] = buffer[:used]
    return larger
