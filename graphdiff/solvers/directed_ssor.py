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
from graphdiff.memory import empty
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
from graphdiff.solvers.ssor import (
    BURST,
    NEAR,
    Line,
    Progressed,
    Watched,
    advanced,
    each_mu,
    fits,
    moved,
    sweep_all,
    swept_dtype,
)
from graphdiff.solvers.walk import Walk

# From s on, float32 adds 1e-6 to 2e-5 of the largest bound so far, and what it adds disturbs the directions:
# where residuals are computed anew more seldom than every OFTEN steps, more steps are needed; computing them
# more often takes longer than the steps that it saves.
OFTEN = 4


class Triangles(NamedTuple):
    """µ, [N] or [1], and what is made of a walk for it: as `split` returns it, but weights sum a residual up.

    The answer is the scale, [N] or [1], times what the triangles solve for.

    With ρ = (I − L)⁻¹δ⁻¹ times the residual the bound times max |ρ|, or Σ |ρ| with the weights where norms
    are sums, bounds the error.
    """

    mu: Any
    scale: Any
    place: Any
    lower: Any
    upper: Any
    rows: Any
    inverse: Any
    weights: Any
    bound: float


class Swept(NamedTuple):
    """The operator, µ, a shadow [N], triangles, those for signals alone, and memory to sweep in.

    Triangles are one for each µ, in the order of its leading dimensions and channels; those for signals that
    are swept alone are copies, whose edges stand as `groups` has them, made where there is such a signal.
    """

    operator: Transition
    mu: Tensor
    shadow: Any
    triangles: list[Triangles]
    alone: dict[int, Triangles]
    memory: dict[int, dict[Any, Any]]


@dataclass(frozen=True)
class DirectedSSOR(Solver):
    """BiCGSTAB preconditioned by SSOR with ω = 1, in the form of Eisenstat, compiled by numba.

    For sparse walks of any kind, and their transposes, on the CPU; `SSOR` is for reversible ones. A step
    costs four triangular solves, together the multiplications of two products. Several signals are swept at
    a time, more of them by other threads, each stopping on its own, with the bits that it has alone. No
    theory bounds their number, as for `BiCGSTAB`; where it breaks down or has used the products that walking
    would have needed, walking goes on.

    Whatever the dtype, the answer is added up and its residual computed in float64, now and then, and what
    lies between is swept in float32; in float64 too where 1 − µ < 4e-3.

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
        >>> [int(gd.pagerank(P, s, 0.9, tol=1e-6, solver=x).matvecs) for x in both]  # doctest: +SKIP
        [13, 20]
    """

    @property
    def at_once(self) -> int:
        """As many as torch has threads."""
        return torch.get_num_threads()

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Float32, as a rule."""
        return torch.float32

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
        nodes, summed = operator.shape[-1], norm_of(operator) == "one"
        rows, equal, scale = _rows(operator, summed)
        # That of the transpose has rows of other lengths.
        order, triangles = sweeps.ordered(*rows[:2]) if summed else operator.sweep_order(), []
        for m, remaining in each_mu(operator, mu):
            dtype = np.float32 if 1 - m.max() >= NEAR else np.float64
            across = np.zeros(nodes) if summed else None
            place, lower, upper, by_rows, inverse, _, bound = sweeps.split(
                *rows, order, equal, m, remaining, dtype, across=across, scale=scale
            )
            weights = np.ones(nodes) if across is None else across
            bound = bound if across is None else 1 / remaining.min()
            each = np.ones(1) if scale is None else scale
            triangles.append(Triangles(m, each, place, lower, upper, by_rows, inverse, weights, bound))
        # One for all signals, which none is orthogonal to but by accident. Where the start is a single node,
        # its residual in this place takes up to 1.7 times as many steps.
        shadow = np.random.default_rng(0).uniform(-1.0, 1.0, nodes)
        if scale is not None:
            # What the triangles leave of a residual is smaller by the scale then.
            shadow *= scale[order]
        return Swept(operator, mu, shadow, triangles, {}, {})

    def solve(self, state: Swept, rhs: Tensor, initial: Tensor, target: Tensor, limits: Limits) -> Iterate:
        """Iterate until the bound of each right-hand side is below its target."""
        operator, mu = state[:2]
        batch = checks.broadcast_batch([operator.shape[:-2], rhs.shape[:-2], mu.shape[:-2]], "P, s and µ")
        nodes, channels = rhs.shape[-2:]
        pinned = mu == 0
        start = torch.where(pinned, rhs, initial) if bool(pinned.any()) else initial
        y = empty((*batch, nodes, channels), rhs)
        done = Progressed(target, torch.ones_like(target).expand(*batch, 1, channels), limits)

        def sweep(line: Line, memory: dict[Any, Any], b: Any, guess: Any, found: Any) -> None:
            _Block(state, line, memory).solve(b, guess, found, done)

        sizes = [swept_dtype(found.lower).itemsize for found in state.triangles]
        steps, unfinished = sweep_all(sweep, mu, sizes, (rhs, start, y), state.memory, done)
        y = moved(y, start, steps, unfinished)
        if bool(pinned.any()):
            # Where µ_i = 0 the answer is b_i, to the last bit.
            y = torch.where(pinned, rhs, y)
        reached = Iterate(y, steps, 2 * steps + done.residuals)
        return carry_on(Walk(), Problem(operator, mu), rhs, reached, unfinished, target, limits)


class _Block:
    """The memory for a line of signals, and what is swept in it."""

    def __init__(self, state: Swept, line: Line, memory: dict[Any, Any]) -> None:
        operator, mu, self.shadow, triangles, alone, _ = state
        number, self.width, self.place = line.number, line.width, (line.place, line.part)
        found = triangles[number]
        if self.width > 1:
            # No rows stand beside each other where signals do.
            none = np.empty(0, np.uint32)
            found = found._replace(lower=(*found.lower, none), upper=(*found.upper, none))
        elif number in alone:
            found = alone[number]
        else:
            lower, upper = map(_sweeps().copied_in_groups, (found.lower, found.upper))
            found = alone[number] = found._replace(lower=lower, upper=upper)
        self.triangles = found
        nodes, dtype = len(found.place), swept_dtype(found.lower)
        self.most = max(1, BURST // (2 * self.width * (len(found.lower[1]) + len(found.upper[1]) + nodes)))
        self.summed = norm_of(operator) == "one"
        self.rate = mu.amax(-2).reshape(-1)[number].double()
        self.often = OFTEN if dtype == np.float32 else None
        kind = self.width, dtype
        if kind not in memory:
            parts = _sweeps().block((nodes * self.width, np.float64), *[(nodes * self.width, dtype)] * 7)
            memory[kind] = [part.reshape(nodes, self.width) for part in parts]
        self.vectors = memory[kind]

    def solve(self, given: Any, start: Any, found: Any, done: Progressed) -> None:
        """Put what solves for `given` in the place of `found`; all are [N, ≤ width]."""
        sweeps, triangles, place = _sweeps(), self.triangles, self.place
        lanes, width, wanted = (0,) * self.width, given.shape[1], found
        if width < self.width:
            given, start = (np.pad(v, ((0, 0), (0, self.width - width))) for v in (given, start))
            found = np.empty(given.shape, given.dtype)
        y, x, best, r, p, v, t, w = self.vectors
        for vector in (x, p, v):
            # What is left of other signals may be no number.
            vector.fill(0)
        turn, across, along, mask = (np.zeros((1, self.width), x.dtype) for _ in range(4))
        better = np.ones_like(turn)
        size, sums = np.ones(self.width), np.zeros((2, self.width))
        itself, share = np.ones((2, 1, self.width))
        started = sweeps.sized(given, start, triangles.mu, size, itself, share, lanes)
        unit = (1 / size).reshape(1, -1)
        if started and itself.any():
            scaled, fitted = len(triangles.scale) > 1, share.copy()
            rows = *triangles.rows[:3], triangles.rows[3] / triangles.scale
            guess = rows, triangles.scale, triangles.mu, given, start, unit, scaled
            sweeps.fitted(*guess, itself, fitted, lanes)
            # All of it or nothing, for energy is no measure of a walk that is not symmetric.
            share = np.where(itself != 0, np.ceil(fitted), share)
            started = share.any()
        done.started[place] = share[0, :width] != 0
        sweeps.begun(start, unit * share, triangles.scale, y, lanes)
        system = (
            triangles.rows,
            triangles.place,
            triangles.inverse,
            triangles.lower,
            given,
            unit,
            triangles.scale,
            y,
        )
        summing = self.shadow, triangles.weights, self.summed
        sweeps.residual(*system, started, r, *summing, sums, lanes)
        factor = size * triangles.bound
        product, bound = sums[0].copy(), sums[1] * factor
        target = np.full(self.width, np.inf)
        target[:width] = done.target[place]
        walks = steps_to(torch.from_numpy(target), torch.from_numpy(bound), self.rate)
        limit = (10 + (walks + 1) // 2).numpy()
        if done.limit is not None:
            limit[:width] = np.minimum(limit[:width], done.limit[place])
        steps = np.zeros(self.width, np.int64)
        active, least, peak = (bound > target) & (limit > 0), bound.copy(), bound.copy()
        numbers = (active, steps, product, bound, least, peak, target, limit)
        vectors = (x, best, r, p, v, t, w, turn, across, along, better, sums)

        def advance(most: int) -> None:
            sweeps.iterated(
                *(triangles.lower, triangles.upper, *summing),
                *(factor, vectors, numbers, most, lanes),
            )

        def renew(anew: Any) -> tuple[Any, Any]:
            mask[0] = anew
            sweeps.gathered(triangles.place, mask, x, best, y, lanes)
            sweeps.residual(*system, True, w, *summing, sums, lanes)
            sweeps.taken(mask, w, r, lanes)
            found = sums[1] * factor
            # Of the best, if that is another x, no more is known than before.
            here = anew & ((bound <= least) | (found < least))
            least[here], better[0, here] = found[here], 1
            return sums[0], found

        watched = Watched(active, steps, product, bound, peak, target, limit, turn)
        advanced(watched, done, place, self.most, self.often, advance, renew)
        # Bounds do not fall steadily.
        earlier = ~(bound <= least)
        if earlier.any():
            x[:, earlier], r[:, earlier] = best[:, earlier], 0
        done.bound[place] = least[:width]
        # One sweep of Gauss and Seidel further, as of `SSOR`.
        sweeps.left(triangles.place, triangles.scale, y, x, r, size.reshape(1, -1), found, lanes)
        if found is not wanted:
            wanted[:] = found[:, :width]


def _rows(operator: Transition, summed: bool) -> tuple[tuple[Any, Any, Any], bool, Any]:
    """Row starts, nodes and values, or None; whether those of a row are one number; and a scale, or None.

    Of Pᵀ all values of a column are one number where all steps of the walk P from a node are equally likely.
    With D the inverses of these numbers Pᵀ = AD⁻¹ with ones in A, and (D − MA) z = b for x = Dz.
    """
    sweeps = _sweeps()
    if summed and operator.T.equal_steps():
        P = operator.T.to_scipy()
        images = sweeps.mirrored(P.indptr, P.indices, P.data)
        if images is not None:
            starts, nodes, scale = images
            return (starts, nodes, None), True, scale
    P = operator.to_scipy()
    equal = sweeps.equal(P.indptr, P.data) if summed else operator.equal_steps()
    return (P.indptr, P.indices, P.data), equal, None


@functools.cache
def _sweeps() -> Any:
    """The compiled sweeps, or None where numba is not installed."""
    try:
        from graphdiff.solvers import directed_sweeps
    except ImportError:
        return None
    return directed_sweeps
