"""(I − MP) x = b by conjugate gradients preconditioned by symmetric successive over-relaxation, compiled.

With S = D^(1/2) P D^(−1/2) of a reversible walk and I − µS = I − L − Lᵀ the preconditioner is
(I − L)(I − Lᵀ), one sweep of Gauss and Seidel each way. Its condition number is at most 1 + µ²/(1 − µ), that
of I − µS (1 + µ)/(1 − µ): for (I − L)(I − Lᵀ) = I − µS + LLᵀ, and ‖L‖ ≤ µ because S is nonnegative.

What is iterated with is not the residual r but (I − L)⁻¹r. So the answer is not x but one sweep of Gauss and
Seidel further, x + (I − L)⁻¹r, which is at hand and of which the residual is Lᵀ(I − L)⁻¹r.
"""

import functools
import math
from collections.abc import Callable, Iterator
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
    check_reversible,
)
from graphdiff.solvers.cg import LOSS, Weighted, started
from graphdiff.solvers.chebyshev import Chebyshev

# log d − max log d that still counts.
LEAST = -600.0
# Sweeps are in float32 where 1 − µ is at least NEAR, below which they take up to half as many steps again,
# and no degree is less than EVEN of the largest.
NEAR, EVEN = 4e-3, 1e-14
# What float32 adds to a bound was at most 3e-6 of that at the start, on graphs of all kinds and whatever µ.
# So the residual is computed anew in float64 every few steps, if its bound has fallen to LESS of what it was
# the last time, and if that was FAR above the target. Few are at most MOST, and such that theory has the
# bound fall to FALLEN in 4/3 as many.
LESS, FAR, MOST, FALLEN = 0.1, 3e4, 12, 6e-4
# Bytes of a cache line: as many signals are swept at a time as fit into one.
LINE = 64
# The fewest that are swept at a time, but for one alone.
FEW = 4
# Nodes beyond which a few signals are swept one after the other, for the memory of a whole line.
MANY = 2**20
# Edges times signals that are swept between two looks for an interruption.
BURST = 10**8


class Triangles(NamedTuple):
    """What is made of a walk for one µ, [N] or [1]: the largest of it, and what `split` returns."""

    mu: Any
    largest: float
    place: Any
    lower: Any
    upper: Any
    rows: Any
    inverse: Any
    weights: Any
    bound: float


class Swept(NamedTuple):
    """The operator, µ, the least of log d − max log d, d / max d, triangles, and memory to sweep in.

    Triangles are those of the walk that is stochastic by rows, one for each µ in the order of its leading
    dimensions and channels. New memory for every few signals would cost as much as sweeping them several
    times.
    """

    operator: Transition
    mu: Tensor
    least: float
    degree: Any
    triangles: list[Triangles]
    memory: dict[int, dict[Any, Any]]


@dataclass(frozen=True)
class SSOR(Solver):
    """Conjugate gradients preconditioned by SSOR with ω = 1, in the form of Eisenstat, compiled by numba.

    For sparse reversible walks and their transposes on the CPU. A step costs two triangular solves, together
    the multiplications of one product, and about half as many steps are needed as by `CG`: at most those of a
    condition number of 1 + µ²/(1 − µ). Several signals are swept at a time, more of them by other threads,
    each stopping on its own, with the bits that it has alone. Where rounding stops it, `Chebyshev` goes on.

    Whatever the dtype, the answer is added up and its residual computed in float64, now and then, and what
    lies between is swept in float32; in float64 too where 1 − µ < 4e-3 or degrees are very uneven.

    The first solve after an installation compiles for some seconds and keeps the code beside the package, or
    in the user's cache where that cannot be written.

    Raises:
        ImportError: numba is not installed.
        ValueError: The walk is not sparse, not known to be reversible, or not on the CPU.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.grid_transition(torch.zeros(1, 30, 30, dtype=torch.float64))
        >>> s = torch.eye(900, dtype=torch.float64)[0]
        >>> both = gd.solvers.SSOR(), gd.solvers.CG()
        >>> [int(gd.pagerank(P, s, 0.9, tol=1e-6, solver=x).steps) for x in both]  # doctest: +SKIP
        [18, 36]
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
        return operator.reversible and fits(operator) and _sweeps() is not None

    def prepare(self, operator: Transition, mu: Tensor) -> Swept:
        """An order of the nodes, and the two triangles of the matrix in it, for each µ."""
        if operator.stochastic == "columns":
            return self.transposed(self.prepare(operator.T, mu))
        check_reversible(operator, "SSOR")
        if not fits(operator):
            raise ValueError(
                f"solver: SSOR needs a sparse walk on the CPU with less than 2³² edges, got {operator}; use "
                "CG(), Chebyshev() or Direct()"
            )
        sweeps = _sweeps()
        if sweeps is None:
            raise ImportError("solver: SSOR needs numba; pip install numba, or use CG()")
        degree, least = operator.relative_degrees(LEAST)
        least, P = max(least, LEAST), operator.to_scipy()
        order, equal = operator.sweep_order(), operator.equal_steps()
        even, rows, triangles = math.exp(least) >= EVEN, (P.indptr, P.indices, P.data), []
        for m, remaining in each_mu(operator, mu):
            largest = float(m[0] if mu.shape[-2] == 1 else m.max())
            dtype = np.float32 if even and 1 - largest >= NEAR else np.float64
            found = Triangles(m, largest, *sweeps.split(*rows, order, equal, m, remaining, dtype, degree))
            lower, upper = sweeps.in_groups(found.lower), sweeps.in_groups(found.upper)
            triangles.append(found._replace(lower=lower, upper=upper))
        return Swept(operator, mu, least, degree, triangles, {})

    def transposed(self, state: Swept) -> Swept:
        """The same triangles: I − MPᵀ = M S D⁻¹ where I − MP = M D⁻¹ S."""
        return state._replace(operator=state.operator.T, memory={})

    def solve(self, state: Swept, rhs: Tensor, initial: Tensor, target: Tensor, limits: Limits) -> Iterate:
        """Iterate until the bound of each right-hand side is below its target."""
        operator, mu = state[:2]
        batch = checks.broadcast_batch([operator.shape[:-2], rhs.shape[:-2], mu.shape[:-2]], "P, s and µ")
        nodes, channels = rhs.shape[-2:]
        given, start, unit = rhs, initial, torch.ones_like(target)
        pinned = any(0 in found.mu for found in state.triangles)
        y = empty((*batch, nodes, channels), rhs)
        if pinned:
            # Where µ_i = 0 the answer is b_i; started there, nothing is left to do for it.
            each = mu.expand(*mu.shape[:-2], nodes, mu.shape[-1])
            log_weight = torch.from_numpy(state.degree).log().unsqueeze(-1)
            _, base, given, unit = started(Weighted(operator, each, log_weight), rhs, initial)
            y.copy_(base)
            start = torch.zeros_like(initial)
        done = Progressed(target, unit.expand(*batch, 1, channels), limits)

        def sweep(line: Line, memory: dict[Any, Any], b: Any, guess: Any, found: Any) -> None:
            _Block(state, line, memory).solve(b, guess, found, done, pinned)

        sizes = [swept_dtype(found.lower).itemsize for found in state.triangles]
        steps, unfinished = sweep_all(sweep, mu, sizes, (given, start, y), state.memory, done)
        y = y if pinned else moved(y, initial, steps, unfinished)
        reached = Iterate(y, steps, steps + done.residuals)
        return carry_on(Chebyshev(), Problem(operator, mu), rhs, reached, unfinished, target, limits)


def each_mu(operator: Transition, mu: Tensor) -> Iterator[tuple[Any, Any]]:
    """µ, and no more than 1 − µ·rowsum, for each of µ's leading dimensions and channels, in their order.

    Both are arrays [N], or [1] where one number is for all nodes.
    """
    summed, largest = operator.stochastic == "columns", float(operator.largest_row_sum)
    # Views by numpy take a fraction of the time of torch's.
    rows = mu.detach().double().numpy().swapaxes(-2, -1).reshape(-1, mu.shape[-2])
    for m in np.ascontiguousarray(rows):
        most = m.max(keepdims=True) if summed else m
        yield m, 1 - most * largest


def moved(y: Tensor, initial: Tensor, steps: Tensor, unfinished: Tensor) -> Tensor:
    """y, but the first guess where no step led anywhere from a start of 0: others then go on from there."""
    if not bool(unfinished.any()):
        return y
    stands = unfinished & (steps == 0).unsqueeze(-2)
    return torch.where(stands, initial, y) if bool(stands.any()) else y


def swept_dtype(triangle: Any) -> Any:
    """Of a triangle's numbers and of the vectors that it sweeps: that of the gains, which all have."""
    return triangle[3].dtype


class Progressed:
    """How far each right-hand side is, [batch, K], in units of its own; what a caller's limits say to it."""

    def __init__(self, target: Tensor, unit: Tensor, limits: Limits) -> None:
        self.limits, self.shape = limits, unit.shape
        self.unit = self._flat(unit.double())
        self.target = self._flat(target.double()) / self.unit
        self.limit = None if limits.steps is None else self._flat(limits.steps)
        self.steps, self.renewals = (np.zeros(self.unit.shape, np.int64) for _ in range(2))
        self.bound = np.zeros(self.unit.shape) + np.inf
        self.active, self.started = self.bound > 0, self.bound > 0
        # Who is asked after every step cannot take many at once.
        self.asked = limits.budget.progress is not None or limits.budget.max_seconds is not None

    def _flat(self, x: Tensor) -> Any:
        return x.expand(self.shape).numpy().reshape(-1, self.shape[-1])

    @property
    def residuals(self) -> Tensor:
        """The products that residuals took: with a triangle each, but without one where the start is 0."""
        products = 3 * self.renewals // 2 + self.started + 1
        return torch.from_numpy(products.reshape(self.shape[:-2] + self.shape[-1:]))

    def going_on(self) -> bool:
        """Whether there is time left."""
        active, steps, bound = (
            torch.from_numpy(x).reshape(self.shape) for x in (self.active, self.steps, self.bound * self.unit)
        )
        return bool(self.limits.going_on(active, steps, bound).any())


class Line(NamedTuple):
    """Signals that are swept at a time: which batch mate's, which, side by side with how many; their µ."""

    place: int
    part: slice
    width: int
    number: int


def lines_of(which: Any, mus: int, nodes: int, sizes: list[int]) -> list[Line]:
    """The lines of all signals, given which µ each has, [batch, K].

    How many µ there are for channels, and the bytes of a number for each µ, say how wide they are.
    """
    channels, lines = which.shape[-1], []
    # Those of a line have one µ.
    apart = channels if mus == 1 else 1
    for place, numbers in enumerate(which.tolist()):
        for start in range(0, channels, apart):
            stop, lanes = start + apart, LINE // sizes[numbers[start]]
            while start < stop:
                left = stop - start
                width = next(w for w in (FEW, 2 * FEW, lanes) if w >= min(left, lanes))
                if left == 1 or (left < width and nodes > MANY):
                    width = 1
                part = slice(start, min(start + width, stop))
                lines.append(Line(place, part, width, numbers[start]))
                start = part.stop
    return lines


def sweep_all(
    sweep: Callable[[Line, dict[Any, Any], Any, Any, Any], None],
    mu: Tensor,
    sizes: list[int],
    tensors: tuple[Tensor, Tensor, Tensor],
    memory: dict[int, dict[Any, Any]],
    done: Progressed,
) -> tuple[Tensor, Tensor]:
    """All lines, each by one of torch's number of threads, with memory of the thread's own.

    `sizes` are the bytes of a number for each µ. `sweep` is given the line, its thread's memory, and the
    line's part of the tensors as arrays [N, width]: right-hand sides, first guesses, and the place for what
    it finds, which is as large as there are answers.

    Returns:
        The steps [..., K], and which right-hand sides [..., 1, K] are not done.
    """
    *batch, nodes, channels = tensors[-1].shape
    mus = np.arange(mu.numel() // mu.shape[-2]).reshape(*mu.shape[:-2], mu.shape[-1])
    which = (mus + np.zeros((*batch, channels), int)).reshape(math.prod(batch), channels)
    lines = lines_of(which, mu.shape[-1], nodes, sizes)
    # Of an expanded tensor all columns are one, where the sweeps look for several beside each other.
    numbers = [t.expand_as(tensors[-1]).numpy().reshape(-1, nodes, channels) for t in tensors]
    arrays = [*map(np.ascontiguousarray, numbers[:-1]), numbers[-1]]
    # Who is asked after every step hears of one line after the other.
    threads = 1 if done.asked else min(torch.get_num_threads(), len(lines))
    waiting = iter(lines)

    def work(thread: int) -> None:
        own = memory.setdefault(thread, {})
        for line in waiting:
            sweep(line, own, *(x[line.place][:, line.part] for x in arrays))

    if threads == 1:
        work(0)
    elif threads > 1:
        # Which is read where numba is installed, as those who call this are.
        from graphdiff.operators.threads import pythons

        # Whether autograd records is each thread's own matter.
        list(pythons(threads).map(torch.no_grad()(work), range(threads)))
    unfinished = ~(done.bound <= done.target).reshape(*batch, 1, channels)
    return torch.from_numpy(done.steps.reshape(*batch, channels)), torch.from_numpy(unfinished)


class Watched(NamedTuple):
    """How far the signals of a line are, each [W], and how much of their last directions they keep, [1, W].

    A product is what a signal's next direction is weighted by. What float32 has added to a bound is in
    proportion to the known one: that of the last residual in float64, or the largest since.
    """

    active: Any
    steps: Any
    product: Any
    bound: Any
    known: Any
    target: Any
    limit: Any
    turn: Any


def advanced(
    watched: Watched,
    done: Progressed,
    place: tuple[int, slice],
    most: int,
    often: int | None,
    advance: Callable[[int], None],
    renew: Callable[[Any], tuple[Any, Any]],
) -> None:
    """Advance a line of signals, at most so many steps at a time, until each is at its target or stops.

    Their place is that in what is `done`. Where steps are in float32, residuals are due every so many steps:
    `renew` computes those of a mask of signals anew, and says what the products and bounds are then. Who
    is in it depends on each signal alone and on the count of steps.
    """
    active, steps, _, bound, known, target, _, _ = watched
    sweeps, width, renewals = _sweeps(), place[1].stop - place[1].start, np.zeros_like(steps)
    going, anew = np.empty_like(active), np.empty_like(active)
    most = 1 if done.asked else most
    # Steps since the start, but for those that nobody took before the residual's turn.
    passed, on = 0, True
    while on:
        far = FAR if often else np.inf
        on, moving, due = sweeps.looked(active, bound, known, target, far, LESS, going, anew)
        on = on and not done.limits.budget.timed_out
        if done.asked or not on:
            done.active[place], done.steps[place] = going[:width], steps[:width]
            done.bound[place], done.renewals[place] = bound[:width], renewals[:width]
        if done.asked and steps.any():
            on = done.going_on() and on
        if often and not moving:
            passed = -(-passed // often) * often
        if on and often and passed % often == 0 and due:
            moving = sweeps.told(anew, *renew(anew), tuple(watched), renewals)
        if on and moving:
            some = min(most, often - passed % often) if often else most
            advance(some)
            passed += some


class _Block:
    """The memory for a line of signals, and what is swept in it."""

    def __init__(self, state: Swept, line: Line, memory: dict[Any, Any]) -> None:
        operator, _, least, degree, triangles, _ = state
        number, self.width, self.place = line.number, line.width, (line.place, line.part)
        self.triangles = found = triangles[number]
        self.nodes = degree, found.mu, found.place, found.inverse
        nodes, edges = len(degree), len(found.lower[1]) + len(found.upper[1])
        dtype = swept_dtype(found.lower)
        self.most = max(1, BURST // (self.width * (edges + nodes)))
        self.summed = operator.stochastic == "columns"
        self.factor = found.bound
        # In Python's numbers: each call of torch would take as long as hundreds of edges.
        if self.summed:
            self.factor = 1 / (1 - found.largest * float(operator.largest_row_sum))
        root = math.sqrt(1 + found.largest * found.largest / (1 - found.largest))
        self.rate = (root - 1) / (root + 1)
        self.often = min(max(3 * _steps_to(FALLEN, 1.0, self.rate) // 4, 1), MOST)
        self.spread = math.exp(least / 2)
        kind = self.width, dtype
        if kind not in memory:
            parts = _sweeps().block((nodes * self.width, np.float64), *[(nodes * self.width, dtype)] * 4)
            memory[kind] = [part.reshape(nodes, self.width) for part in parts]
        self.vectors = memory[kind]
        self.loss = LOSS / np.finfo(dtype).eps

    def solve(self, given: Any, start: Any, found: Any, done: Progressed, added: bool) -> None:
        """Put what solves for `given` in the place of `found`, or add it to that; all are [N, ≤ width]."""
        sweeps, triangles, place = _sweeps(), self.triangles, self.place
        lanes, width, wanted = (0,) * self.width, given.shape[1], found
        if width < self.width:
            given, start, found = (
                np.pad(v, ((0, 0), (0, self.width - width))) for v in (given, start, found)
            )
        y, x, r, p, t = self.vectors
        # Numpy makes small arrays faster so than in any other way.
        turn, step, mask = (np.zeros((1, self.width), x.dtype) for _ in range(3))
        unit, share, sums = (np.zeros((rows, self.width)) for rows in (1, 1, 2))
        size, target = np.zeros(self.width), np.zeros(self.width)
        summed, weights = self.summed, (triangles.weights, self.summed)
        system = triangles.rows, self.nodes, triangles.lower, *weights, given
        sweeps.opened(*system, start, size, unit, y, share, r, sums, lanes)
        done.started[place] = share[0, :width] != 0
        factor, square = size * self.factor, sums[0].copy()
        target.fill(np.inf)
        target[:width] = done.target[place]
        bound = sums[1] * factor
        # Theory's count, from the energy's norm to the promise's and back; rounding delays it, hence twice.
        ways = zip(target.tolist(), bound.tolist(), strict=True)
        limit = np.array([10 + 2 * _steps_to(self.spread * goal / 2, now, self.rate) for goal, now in ways])
        if done.limit is not None:
            limit[:width] = np.minimum(limit[:width], done.limit[place])
        # Halving the error takes no more than this, if the energy's norm sees it.
        steps, halved_at, patience = (np.zeros(self.width, np.int64) for _ in range(3))
        patience.fill(10 + _steps_to(1.0, 8.0, self.rate))
        active, halved, largest = (bound > target) & (limit > 0), bound.copy(), self.loss * bound
        numbers = (active, steps, square, bound, halved, halved_at, target, factor, largest, limit, patience)
        vectors = x, r, p, t, turn, step, sums

        def advance(most: int) -> None:
            sweeps.iterated(triangles.lower, triangles.upper, *weights, vectors, numbers, most, lanes)

        def renew(anew: Any) -> tuple[Any, Any]:
            mask[0] = anew
            sweeps.renewed(*system, unit, y, share, mask, x, t, r, sums, lanes)
            found = sums[1] * factor
            halved[anew], halved_at[anew] = found[anew], steps[anew]
            return sums[0], found

        often = self.often if x.dtype != y.dtype else None
        watched = Watched(active, steps, square, bound, bound.copy(), target, limit, turn)
        advanced(watched, done, place, self.most, often, advance, renew)
        if not steps.any():
            x.fill(0)
        # Residuals that only grew say that the weights are blind to what matters.
        reached = zip(bound.tolist(), largest.tolist(), steps.tolist(), strict=True)
        lost = [taken > 0 and not now < most for now, most, taken in reached]
        before = (found if added else start)[:, lost].copy() if any(lost) else None
        size[:width] *= done.unit[place]
        sweeps.left(self.nodes, y, share, x, r, size.reshape(1, -1), found, summed, added, lanes)
        if before is not None:
            found[:, lost] = before
        if found is not wanted:
            wanted[:] = found[:, :width]


def _steps_to(target: float, bound: float, rate: float) -> int:
    """`steps_to` for single numbers."""
    if not (0 < target < bound < math.inf and rate > 0 and target / bound > 0):
        return 0
    return math.ceil(math.log(target / bound) / math.log(rate))


def fits(operator: Transition) -> bool:
    """Whether the walk's edges are there to be swept, in numbers of 32 bits."""
    rows = operator.T if operator.stochastic == "columns" else operator
    return rows.sparse and rows.device.type == "cpu" and rows.to_scipy().nnz < 2**32


@functools.cache
def _sweeps() -> Any:
    """The compiled sweeps, or None where numba is not installed."""
    try:
        from graphdiff.solvers import sweeps
    except ImportError:
        return None
    return sweeps
