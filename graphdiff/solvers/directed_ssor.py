"""(I − MP) x = b by BiCGSTAB preconditioned by symmetric successive over-relaxation, compiled: any walk.

With δ_i = 1 − µ_i P_ii and δ⁻¹(I − MP) = I − L − U, L below and U above the diagonal, the preconditioner is
(I − L)(I − U), one sweep of Gauss and Seidel each way, as in `ssor`.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.operators.base import Transition
from graphdiff.solvers.base import (
    Iterate,
    Limits,
    Problem,
    Solver,
    carry_on,
    norm_of,
    steps_to,
)
from graphdiff.solvers.ssor import BURST, Line, Progressed, Triangles, each_mu, fits, sweep_all
from graphdiff.solvers.walk import Walk


class Swept(NamedTuple):
    """The operator, µ, a shadow [N], triangles: one for each µ, and memory to sweep in.

    Triangles are in the order of µ's leading dimensions and channels.
    """

    operator: Transition
    mu: Tensor
    shadow: Any
    triangles: list[Triangles]
    memory: dict[int, dict[Any, Any]]


@dataclass(frozen=True)
class DirectedSSOR(Solver):
    """BiCGSTAB preconditioned by SSOR with ω = 1, in the form of Eisenstat, compiled by numba.

    For sparse walks of any kind, and their transposes, on the CPU; `SSOR` is for reversible ones. A step
    costs four triangular solves, together the multiplications of two products. Several signals are swept at
    a time, more of them by other threads, each stopping on its own, with the bits that it has alone. No
    theory bounds their number, as for `BiCGSTAB`; where it breaks down or has used the products that walking
    would have needed, walking goes on.

    The first solve after an installation compiles for some seconds and keeps the code beside the package, or
    in the user's cache where that cannot be written.

    Raises:
        ImportError: numba is not installed.
        ValueError: The walk is not sparse, or not on the CPU.

    Example:
        >>> import torch, graphdiff as gd
        >>> edges = torch.randint(1000, (2, 9000), generator=torch.Generator().manual_seed(0))
        >>> P = gd.SparseTransition.from_edge_index(edges, dtype=torch.float64)
        >>> s = torch.eye(1000, dtype=torch.float64)[0]
        >>> both = gd.solvers.DirectedSSOR(), gd.solvers.BiCGSTAB()
        >>> [int(gd.pagerank(P, s, 0.99, tol=1e-6, solver=x).matvecs) for x in both]  # doctest: +SKIP
        [17, 24]
    """

    @property
    def at_once(self) -> int:
        """As many as torch has threads."""
        return torch.get_num_threads()

    @staticmethod
    def suits(operator: Transition) -> bool:
        """Whether it applies, and numba is there."""
        return fits(operator) and _sweeps() is not None

    def prepare(self, operator: Transition, mu: Tensor) -> Swept:
        """An order of the nodes, and the two triangles of the matrix in it, for each µ."""
        if not fits(operator):
            raise ValueError(
                f"solver: DirectedSSOR needs a sparse walk on the CPU with less than 2³² edges, got "
                f"{operator}; use BiCGSTAB(), Walk() or Direct()"
            )
        sweeps = _sweeps()
        if sweeps is None:
            raise ImportError("solver: DirectedSSOR needs numba; pip install numba, or use BiCGSTAB()")
        P, nodes, summed = operator.to_scipy(), operator.shape[-1], norm_of(operator) == "one"
        # That of the transpose has rows of other lengths.
        order, looped = sweeps.ordered(P.indptr, P.indices) if summed else operator.sweep_order()
        triangles = [
            Triangles(order, *sweeps.split(P.indptr, P.indices, P.data, order, looped, summed, *numbers))
            for numbers in each_mu(operator, mu)
        ]
        # One for all signals, which none is orthogonal to but by accident. Where the start is a single node,
        # its residual in this place takes up to 1.7 times as many steps.
        shadow = np.random.default_rng(0).uniform(-1.0, 1.0, nodes)
        return Swept(operator, mu, shadow, triangles, {})

    def solve(self, state: Swept, rhs: Tensor, initial: Tensor, target: Tensor, limits: Limits) -> Iterate:
        """Iterate until the bound of each right-hand side is below its target."""
        operator, mu = state[:2]
        batch = checks.broadcast_batch([operator.shape[:-2], rhs.shape[:-2], mu.shape[:-2]], "P, s and µ")
        nodes, channels = rhs.shape[-2:]
        pinned = mu == 0
        start = torch.where(pinned, rhs, initial)
        y = rhs.new_empty(*batch, nodes, channels)
        done = Progressed(target, torch.ones_like(target).expand(*batch, 1, channels), limits)

        def sweep(line: Line, memory: dict[Any, Any], b: Any, guess: Any, found: Any) -> None:
            _Block(state, line, b.dtype, memory).solve(b, guess, found, done)

        steps, unfinished = sweep_all(sweep, mu, (rhs, start, y), state.memory, done)
        if bool(pinned.any()):
            # Where µ_i = 0 the answer is b_i, to the last bit.
            y = torch.where(pinned, rhs, y)
        # The residual of the start, and a triangle at either end.
        reached = Iterate(y, steps, 2 * steps + 2)
        return carry_on(Walk(), Problem(operator, mu), rhs, reached, unfinished, target, limits)


class _Block:
    """The memory for a line of signals, and what is swept in it."""

    def __init__(self, state: Swept, line: Line, dtype: Any, memory: dict[Any, Any]) -> None:
        operator, mu, self.shadow, triangles, _ = state
        number, self.width, self.place = line.number, line.width, (line.place, line.part)
        self.triangles = found = triangles[number]
        nodes = len(found.order)
        self.most = max(1, BURST // (2 * self.width * (len(found.lower[1]) + len(found.upper[1]) + nodes)))
        self.summed = norm_of(operator) == "one"
        self.rate = mu.amax(-2).reshape(-1)[number].double()
        kind = self.width, dtype
        if kind not in memory:
            # torch's memory begins where a cache line does.
            of = getattr(torch, dtype.name)
            vectors = [torch.empty(nodes, self.width, dtype=of).numpy() for _ in range(7)]
            memory[kind] = vectors, np.ones(nodes)
        self.vectors, self.ones = memory[kind]

    def solve(self, given: Any, start: Any, found: Any, done: Progressed) -> None:
        """Put what solves for `given` in the place of `found`; all are [N, ≤ width]."""
        sweeps, triangles, place = _sweeps(), self.triangles, self.place
        entered, left = sweeps.entered, sweeps.left
        lanes, width, wanted = (0,) * self.width, given.shape[1], found
        if width < self.width:
            given, start = (np.pad(v, ((0, 0), (0, self.width - width))) for v in (given, start))
            found = np.empty(given.shape, given.dtype)
        x, best, r, p, v, t, w = self.vectors
        for vector in (p, v, t, w):
            # What is left of other signals may be no number.
            vector.fill(0)
        turn, across, along = (np.zeros((1, self.width), x.dtype) for _ in range(3))
        better = np.ones_like(turn)
        unit, sums = np.ones(self.width), np.zeros((2, self.width))
        inverse, weights = triangles.scales
        entered(triangles[:3], (inverse, self.ones), given, start, x, r, unit, lanes)
        sweeps.moved(x, r, t, w, along, self.shadow, weights, self.summed, sums, lanes)
        factor = unit * triangles.bound
        product, bound = sums[0].copy(), sums[1] * factor
        target = np.full(self.width, np.inf)
        target[:width] = done.target[place]
        walks = steps_to(torch.from_numpy(target), torch.from_numpy(bound), self.rate)
        limit = (10 + (walks + 1) // 2).numpy()
        if done.limit is not None:
            limit[:width] = np.minimum(limit[:width], done.limit[place])
        steps = np.zeros(self.width, np.int64)
        active, least = (bound > target) & (limit > 0), bound.copy()
        numbers = (active, steps, product, bound, least, target, limit)
        vectors = (x, best, r, p, v, t, w, turn, across, along, better, sums)
        most, on = 1 if done.asked else self.most, True
        while on:
            done.active[place], done.steps[place] = active[:width], steps[:width]
            done.bound[place] = bound[:width]
            on = (not done.asked or not steps.any() or done.going_on()) and bool(active.any())
            on = on and not done.limits.budget.timed_out
            if on:
                sweeps.iterated(
                    *(triangles.lower, triangles.upper, self.shadow, weights, self.summed),
                    *(factor, vectors, numbers, most, lanes),
                )
        # Bounds do not fall steadily.
        earlier = ~(bound <= least)
        if earlier.any():
            x[:, earlier] = best[:, earlier]
        done.bound[place] = least[:width]
        left(triangles.order, self.ones, x, unit.astype(x.dtype).reshape(1, -1), found, False, lanes)
        if found is not wanted:
            wanted[:] = found[:, :width]


@functools.cache
def _sweeps() -> Any:
    """The compiled sweeps, or None where numba is not installed."""
    try:
        from graphdiff.solvers import directed_sweeps
    except ImportError:
        return None
    return directed_sweeps
