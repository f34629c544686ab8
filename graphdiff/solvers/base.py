"""Solving (I − MP) x = b, M = diag(µ): what a solver is, when it stops, and the certificate of its answer.

Everything rests on one fact (theory: the inverse of I − MP is ≥ 0). For row-stochastic P,
(I − MP) 1 = 1 − µ·rowsum, so with the residual r = b − (I − MP) x and q = r / (1 − µ·rowsum)

    min q ≤ x*_i − x_i ≤ max q                           for every node i, in each channel;

for its transpose ‖x* − x‖₁ ≤ ‖r‖₁ / (1 − max µ·rowsum), and x* − x lies between minus the sum of r's
negative part and the sum of its positive part, each divided by the same number. (Moving x to the middle of
the interval would halve the bound, and make the error itself larger wherever the bound is loose.)
"""

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.memory import empty
from graphdiff.operators.base import Transition
from graphdiff.operators.held import holds
from graphdiff.solution import Enclosure, Norm, Progress

# Each refinement gains several digits unless rounding has taken over; more than this never helped.
MAX_REFINEMENTS = 6
# A bound this close above its target is brought down by walking on, rather than by another solve.
NEAR = 4.0
# How many nodes beside each other make a long row.
FOLDED = 32
# From so many nodes on, whatever the signals, compiled passes over vectors are looked for.
LONG = 2**14
# Channels solved at a time: as many as fit with their numbers into this, and no fewer than these.
CACHED, FEWEST = 2**18, {torch.float32: 32, torch.float64: 8}
# Numbers of a vector of all signals that several threads solve at a time, at most.
SHARED = 2**24
# Terms of a sum that are added up in float32 before float64 goes on, and the weights that this suits.
SUMMED, LIGHTEST = 64, 1e-9


class Iterate(NamedTuple):
    """What a solver hands back; shapes [..., N, K], [..., K], [..., K]."""

    x: Tensor
    steps: Tensor
    matvecs: Tensor


class Problem(NamedTuple):
    """All that a method without preparations needs: the operator and µ [..., 1 or N, 1 or K]."""

    operator: Transition
    mu: Tensor


@dataclass
class Budget:
    """What one solve may take, and who is told how far it is; its clock runs from when it is made."""

    max_steps: int | None = None
    max_seconds: float | None = None
    progress: Callable[[Progress], object] | None = None
    began: float = field(default_factory=lambda: time.monotonic())
    timed_out: bool = False
    """Whether it ended a solve that would have gone on."""
    waiting: int = 0
    """Right-hand sides whose turn has not come yet."""
    taken: Tensor | int = 0
    """Steps before those that the solver at work counts, [..., 1, K]."""
    unit: Tensor | float = 1.0
    """What its bounds are counted in, [..., 1, K]."""

    @classmethod
    def checked(
        cls,
        max_steps: int | None,
        max_seconds: float | None,
        progress: Callable[[Progress], object] | None,
    ) -> "Budget":
        """What a caller gave."""
        if max_steps is not None:
            checks.positive_integer(max_steps, "max_steps")
        if max_seconds is not None:
            checks.positive_number(max_seconds, "max_seconds")
        if progress is not None and not callable(progress):
            raise TypeError(f"progress: expected a function of one Progress, got {type(progress).__name__}")
        return cls(max_steps, max_seconds, progress)

    def left(self, steps: Tensor) -> "Limits":
        """What a solver may still take after so many steps, [..., K]."""
        return Limits(None if self.max_steps is None else self.max_steps - steps.unsqueeze(-2), self)

    def again(self) -> "Budget":
        """The same for another solve."""
        return Budget(self.max_steps, self.max_seconds, self.progress)

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began


class Limits(NamedTuple):
    """What a solver's loop must keep to: most steps of each right-hand side, [..., 1, K], and the budget."""

    steps: Tensor | None
    budget: Budget

    def within(self, steps: Tensor) -> Tensor:
        """So many steps, or as many as are left."""
        return steps if self.steps is None else torch.minimum(steps, self.steps)

    def less(self, steps: Tensor) -> "Limits":
        """What is left after so many steps, [..., K]."""
        return self if self.steps is None else Limits(self.steps - steps.unsqueeze(-2), self.budget)

    def going_on(self, active: Tensor, steps: Tensor, bound: Tensor) -> Tensor:
        """Asked after every step: those of the `active` [..., 1, K] for which there is time.

        `steps` and `bound`, of the error, are told to whoever follows the progress.
        """
        budget = self.budget
        if budget.progress is not None:
            left = int(active.sum()) + budget.waiting
            worst = float(torch.where(active, budget.unit * bound, 0.0).max())
            done = int((budget.taken + steps).max())
            budget.progress(Progress(done, left, worst, budget.seconds))
        if budget.max_seconds is None or budget.seconds < budget.max_seconds:
            return active
        budget.timed_out = budget.timed_out or bool(active.any())
        return torch.zeros_like(active)


@dataclass(frozen=True)
class Solver(ABC):
    """A method for (I − MP) x = b. Frozen, without tolerances: those belong to the call."""

    @property
    def together(self) -> bool:
        """Whether right-hand sides gain from each other, so that all of them are to be solved at a time."""
        return False

    @property
    def at_once(self) -> int:
        """How many threads it takes, each with right-hand sides of its own."""
        return 1

    def working_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """In which dtype it iterates for an operator of some dtype: that, unless written."""
        return dtype

    def prepare(self, operator: Transition, mu: Tensor) -> Any:
        """What can be done once for many right-hand sides: unless written, to hold the walk for products.

        `mu` is [..., 1 or N, 1 or K].

        Raises:
            ValueError: The method does not apply to such a walk; the message names one that does.
        """
        return Problem(operator.held(), mu)

    @abstractmethod
    def solve(self, state: Any, rhs: Tensor, initial: Tensor, target: Tensor, limits: Limits) -> Iterate:
        """An x whose error bound is at most `target` [..., 1, K] where the arithmetic allows.

        It is new, or one of the tensors given: nobody may write to it afterwards.
        Each right-hand side stops on its own, or when the limits say so. Runs without autograd, in the dtype
        of `rhs`.
        """

    def transposed(self, state: Any) -> Any:
        """A state for the transposed operator made of this one, where that is worth keeping; else None."""
        return None

    def __str__(self) -> str:
        given = ", ".join(f"{field.name}={getattr(self, field.name)!r}" for field in fields(self))
        return f"{type(self).__name__}({given})"


class Certified(NamedTuple):
    """An answer and its evidence before the last cast.

    x and its enclosure are [..., N, K], the bound and what of it is owed to rounding [..., 1, K], counts
    [..., K]; the product is P x as the certificate found it, if that was to be kept and a solver was asked.
    """

    x: Tensor
    enclosure: Enclosure
    error_bound: Tensor
    rounding: Tensor
    steps: Tensor
    matvecs: Tensor
    product: Tensor | None = None


def carry_on(
    solver: Solver,
    state: Any,
    rhs: Tensor,
    reached: Iterate,
    unfinished: Tensor,
    target: Tensor,
    limits: Limits,
) -> Iterate:
    """Another solver goes on where one left some right-hand sides [..., 1, K] unfinished."""
    left = limits.less(reached.steps)
    if left.steps is not None:
        unfinished = unfinished & (left.steps > 0)
    if limits.budget.timed_out or not bool(unfinished.any()):
        return reached
    # The others have nothing left to do for any target.
    found = solver.solve(state, rhs, reached.x, torch.where(unfinished, target, torch.inf), left)
    taken = unfinished.squeeze(-2)
    return Iterate(
        torch.where(unfinished, found.x, reached.x),
        reached.steps + torch.where(taken, found.steps, 0),
        reached.matvecs + torch.where(taken, found.matvecs, 0),
    )


def norm_of(operator: Transition) -> Norm:
    """The norm in which the operator's errors are bounded."""
    return "inf" if operator.stochastic == "rows" else "one"


def scaled(x: Tensor, factor: Tensor, norm: Norm) -> tuple[Tensor, Tensor]:
    """factor·x, for a factor [..., 1 or N, 1 or K], and ‖x‖ as `size` has it; without autograd."""
    into = empty(x.shape, x)
    found: Tensor | None = _compiled().sized(x, norm == "one", factor, into) if _long(x) else None
    if found is None:
        found = size(x, norm, into)
        torch.mul(factor, x, out=into)
    return into, found


def size(x: Tensor, norm: Norm, scratch: Tensor | None = None) -> Tensor:
    """‖x‖ over the nodes of each right-hand side, [..., 1, K]; `scratch`, like x, is written over."""
    if _long(x):
        found: Tensor | None = _compiled().sized(x, norm == "one")
        if found is not None:
            return found
    magnitude = torch.abs(x, out=scratch)
    return magnitude.sum(-2, keepdim=True) if norm == "one" else extreme(torch.amax, magnitude)


def _long(x: Tensor) -> bool:
    """Whether the compiled passes are there for it: long vectors, in float64 on the CPU."""
    long = x.shape[-2] >= LONG and x.dtype == torch.float64 and x.device.type == "cpu"
    return long and _compiled() is not None


@functools.cache
def _compiled() -> Any:
    """The compiled passes over vectors, or None where numba is not installed."""
    try:
        from graphdiff.solvers import evidence
    except ImportError:
        return None
    return evidence


def extreme(found: Callable[..., Tensor], x: Tensor) -> Tensor:
    """torch's `amax` or `amin` over the nodes of each right-hand side, [..., 1, K]."""
    *batch, nodes, channels = x.shape
    if channels == 1 or nodes < FOLDED:
        return found(x, -2, keepdim=True)
    # torch finds the maxima of a few long rows much faster than those of many short ones.
    left = nodes % FOLDED
    rows = found(x[..., left:, :].reshape(*batch, nodes // FOLDED, FOLDED * channels), -2)
    rows = rows.reshape(*batch, FOLDED, channels)
    return found(torch.cat([rows, x[..., :left, :]], -2), -2, keepdim=True)


def total(x: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum over nodes in a dtype, [..., 1, K]; `x` may be written over.

    On the CPU `SUMMED` terms at a time, the first of them in the dtype of x; else, and where few are left, by
    halving. Whole rows of numbers are added at once, in an order that depends on N alone, so that no batch
    mate and no layout changes a bit.
    """
    if x.device.type != "cpu":
        found: Tensor = _halved(x.to(dtype))
        return found
    # For the same sums numpy needs a tenth of torch's time where they are short.
    numbers, wide = x.numpy(), torch.empty(0, dtype=dtype).numpy().dtype
    while numbers.shape[-2] >= 2 * SUMMED:
        *batch, nodes, channels = numbers.shape
        rows = nodes // SUMMED
        many = numbers[..., : rows * SUMMED, :].reshape(*batch, SUMMED, rows * channels)
        sums = np.add.reduce(many, axis=-2).reshape(*batch, rows, channels)
        numbers = np.concatenate([sums, numbers[..., rows * SUMMED :, :]], -2, dtype=wide)
    return torch.from_numpy(_halved(numbers.astype(wide)))


def _halved(x: Any) -> Any:
    """The sum over nodes of a tensor or an array, which is used up."""
    nodes = x.shape[-2]
    while nodes > 1:
        half = nodes // 2
        x[..., :half, :] += x[..., nodes - half : nodes, :]
        nodes -= half
    return x[..., :1, :] + 0


class InnerProduct:
    """⟨u, v⟩ = Σ_i w_i u_i v_i of each channel, in the dtype of the weights and in memory of its own.

    A solver asks for it at every step; new memory each time would cost several times what the sums do.
    Vectors in float32, of a size near 1, are multiplied on the CPU in float32, and the first `SUMMED` terms
    added so, where no weight is so small or so large that this would lose it.
    """

    def __init__(self, weights: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
        """For weights [..., N, 1], or one number for all, and vectors of a shape [..., N, K] and a dtype."""
        self.weights = weights
        narrow = (
            dtype == torch.float32
            and weights.device.type == "cpu"
            and not bool(((weights > 0) & (weights < LIGHTEST) | (weights > 1 / LIGHTEST)).any())
        )
        # How much of |u||v| its rounding may be.
        self.accuracy = 1e-5 if narrow else 1e-6
        self.factor = weights.to(dtype) if narrow else weights
        self.product, self.other = (self.factor.new_empty(shape) for _ in range(2))

    def __call__(self, u: Tensor, v: Tensor) -> Tensor:
        """[..., 1, K]."""
        # Multiplying numbers of two dtypes would widen into new memory first.
        wide, other = (
            x if x.dtype == into.dtype else into.copy_(x) for x, into in ((u, self.product), (v, self.other))
        )
        product = torch.mul(wide, other, out=self.product)
        if self.weights.ndim == 0:
            return total(product, self.weights.dtype) * self.weights
        return total(product.mul_(self.factor), self.weights.dtype)


def inner(weights: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Σ_i w_i u_i v_i of each channel, [..., 1, K], once."""
    shape = checks.broadcast_batch([weights.shape, u.shape, v.shape], "weights, u and v")
    return InnerProduct(weights, shape, weights.dtype)(u, v)


def bounding(operator: Transition, mu: Tensor) -> Callable[[Tensor], Tensor]:
    """From a residual to what bounds ‖x* − x‖, were there no rounding; [..., 1, K]."""
    norm, inverse = norm_of(operator), remaining_of(operator, mu).reciprocal_()
    scratch: list[Tensor] = []

    def bound(residual: Tensor) -> Tensor:
        if not scratch or scratch[0].shape != residual.shape:
            scratch[:] = [torch.empty_like(residual)]
        if inverse.shape[-2] == 1:
            return size(residual, norm, scratch[0]) * inverse
        return size(torch.mul(residual, inverse, out=scratch[0]), norm, scratch[0])

    return bound


def _interval_norm(low: Tensor, high: Tensor, norm: Norm) -> Tensor:
    return torch.maximum(low.abs(), high.abs()) if norm == "inf" else high - low


def reach_of(operator: Transition, mu: Tensor) -> Tensor:
    """µ·rowsum: node by node for rows; its largest, [..., 1, K], for columns."""
    if norm_of(operator) == "inf":
        return mu * operator.row_sums
    mu = mu.amax(-2, keepdim=True) if mu.shape[-2] > 1 else mu
    return mu * operator.largest_row_sum


def remaining_of(operator: Transition, mu: Tensor) -> Tensor:
    """1 − µ·rowsum in the dtype of µ: node by node for rows; its smallest, [..., 1, K], for columns."""
    return (1 - reach_of(operator, mu)).to(mu.dtype)


def steps_to(target: Tensor, bound: Tensor, rate: Tensor) -> Tensor:
    """The smallest t with rateᵗ·bound ≤ target, as integers; 0 where there is nothing to do."""
    ratio = (target / bound).double() if target.device.type != "mps" else target / bound
    t = torch.ceil(torch.log(ratio) / torch.log(rate).to(ratio.dtype))
    return torch.nan_to_num(t, nan=0.0, posinf=0.0, neginf=0.0).clamp(min=0).long()


def spectrum(operator: Transition, mu: Tensor) -> tuple[Tensor, Tensor]:
    """The ends of I − MP's spectrum for a reversible walk (theory 5, 9), [..., 1, 1 or K] each."""
    largest = mu.amax(-2, keepdim=True)
    return 1 - largest, torch.ones_like(largest) if operator.positive_semidefinite else 1 + largest


def rate_of(operator: Transition, mu: Tensor) -> Tensor:
    """(√κ − 1)/(√κ + 1), κ from `spectrum`: what a step of Chebyshev or CG leaves of the error at most."""
    low, high = spectrum(operator, mu)
    root = (high / low).sqrt()
    return (root - 1) / (root + 1)


def check_reversible(operator: Transition, solver: str) -> Tensor:
    """The operator's log-degrees [..., N], where it is reversible."""
    log_degree = operator.log_degree if operator.reversible else None
    if log_degree is None:
        raise ValueError(
            f"solver: {solver} needs a walk known to be reversible, got {operator}; use BiCGSTAB(), Walk() "
            "or Direct(), or build it from a symmetric affinity"
        )
    return log_degree


def solve_certified(
    solver: Solver,
    state: Any,
    operator: Transition,
    rhs: Tensor,
    mu: Tensor,
    *,
    initial: Tensor,
    atol: Tensor,
    budget: Budget,
    keep: bool = False,
) -> Certified:
    """Solve in the operator's dtype, certify there where its rounding allows, else in that of `rhs`.

    Args:
        solver: The solver that does the work.
        state: What it prepared for `operator` and µ.
        operator: P, in the dtype to iterate in.
        rhs: b [..., N, K], in float64 where the device has it.
        mu: µ [..., 1 or N, 1 or K], dtype of `rhs`.
        initial: First guess, shaped and typed like `rhs`.
        atol: Largest error allowed, [..., 1, K], in the norm of the operator.
        budget: Most steps a right-hand side may take, and seconds the whole.
        keep: Whether P x is of use afterwards.
    """
    channels = rhs.shape[-1]
    width = channels if solver.together else _width(solver, operator, mu, rhs)
    solved = functools.partial(_solve_some, solver, state, operator, mu, budget, keep)
    if width >= channels:
        return solved(rhs.contiguous(), initial.contiguous(), atol.contiguous())
    x, parts = empty(rhs.shape, rhs), []
    for first in range(0, channels, width):
        some = slice(first, first + width)
        b, start, allowed = (v[..., some] for v in (rhs, initial, atol))
        budget.waiting = rhs[..., :1, some.stop :].numel()
        given = [empty(v.shape, v).copy_(v) for v in (b, start)]
        part = solved(given[0], given[1], allowed.contiguous())
        x[..., some] = part.x
        parts.append(part[1:])
    enclosures, *evidence, products = zip(*parts, strict=True)
    whole = Certified(x, _beside(enclosures), *(torch.cat(v, -1) for v in evidence))
    kept = all(v is not None for v in products)
    return whole._replace(product=torch.cat(products, -1)) if kept else whole


def _beside(enclosures: Sequence[Enclosure]) -> Enclosure:
    """That of all channels, from those of some each."""

    def find() -> tuple[Tensor, Tensor]:
        lower, upper = zip(*(some.ends() for some in enclosures), strict=True)
        return torch.cat(lower, -1), torch.cat(upper, -1)

    return Enclosure(find)


def _width(solver: Solver, operator: Transition, mu: Tensor, rhs: Tensor) -> int:
    """Channels to solve at a time: a sparse product is fast where what it gathers is in the cache."""
    channels = rhs.shape[-1]
    if channels == 1 or not operator.sparse or rhs.device.type != "cpu" or mu.shape[-1] > 1:
        return channels
    numbers, fewest = rhs.numel() // channels, FEWEST[solver.working_dtype(operator.dtype)]
    threads = min(solver.at_once, max(1, SHARED // (numbers * fewest)))
    return min(channels, max(threads * fewest, CACHED // numbers))


def _solve_some(
    solver: Solver,
    state: Any,
    operator: Transition,
    mu: Tensor,
    budget: Budget,
    keep: bool,
    rhs: Tensor,
    initial: Tensor,
    atol: Tensor,
) -> Certified:
    """`solve_certified` for a few channels, all of whose numbers lie beside each other."""
    dtype = operator.dtype
    # The last cast to the operator's dtype must still fit.
    allowed = atol
    if dtype != initial.dtype:
        allowed = torch.clamp(atol - cast_error(initial, dtype, norm_of(operator)), min=0.25 * atol)
    target = 0.95 * allowed
    best = _Best(operator, mu, rhs, initial, allowed, keep)
    walk = getattr(state, "operator", None)
    if holds(walk, operator):
        best.precise[dtype] = walk
    # To compare with a number takes torch three times as long.
    correction, pending = rhs, best.bound > torch.zeros_like(best.bound)
    steps = torch.zeros(*rhs.shape[:-2], rhs.shape[-1], dtype=torch.int64, device=rhs.device)
    for attempt in range(1 + MAX_REFINEMENTS if bool(pending.any()) else 0):
        b, guess, goal = correction, initial, target
        if dtype != rhs.dtype:
            b, guess, goal = (t.to(dtype) for t in (b, guess, goal))
        if budget.timed_out:
            # The first guess is the answer.
            found = Iterate(guess, *[torch.zeros_like(steps)] * 2)
        else:
            budget.taken = steps.unsqueeze(-2)
            found = solver.solve(state, b, guess, goal, budget.left(steps))
        taken = pending.squeeze(-2)
        steps, best.matvecs = steps + taken * found.steps, best.matvecs + taken * found.matvecs
        candidate, before, left = best.moved(found.x), best.bound, True
        if attempt == 0 and dtype != rhs.dtype:
            slack = best.slack(operator, best.initial_size())
            enough = pending & (2 * slack <= allowed)
            if bool(enough.any()):
                best.judge(candidate, enough, dtype)
            pending = pending & ~(best.bound <= allowed)
            left = bool(pending.any())
        asked, again = pending, left
        while again:
            previous = best.bound
            best.judge(candidate, asked, rhs.dtype)
            pending = pending & ~(best.bound <= allowed)
            left = bool(pending.any())
            if not left:
                break
            # x + r has µP times the error of x: where little is missing, one more product is enough.
            asked = asked & pending & (best.bound <= NEAR * allowed) & (best.bound < 0.9 * previous)
            asked = asked & (not budget.timed_out)
            again = bool(asked.any())
            if again:
                # In memory of its own, for the bounds are made of the middle.
                candidate = best.middle.clone()
        if not left:
            break
        # Where a refinement no longer halves the bound, rounding has taken over and none will.
        pending = pending & (best.bound < 0.5 * before)
        if budget.max_steps is not None:
            pending = pending & (steps.unsqueeze(-2) < budget.max_steps)
        pending = pending & (not budget.timed_out)
        if not bool(pending.any()):
            break
        correction = torch.where(pending, best.residual, 0.0)
        initial = torch.zeros_like(rhs)
        # What is left above the target is the certificate's own rounding: make room for it.
        target = 0.1 * target
    x = best.x.contiguous()  # which may be one 0 for all nodes
    evidence = best.bound, best.rounding, steps, best.matvecs
    return Certified(x, best.enclosure, *evidence, best.product)


class Evidence(NamedTuple):
    """What is known of an answer, [..., 1, K] each.

    All entries of x* − x lie between low and high, extra apart for rounding; in the 1-norm, so do the sums of
    its negative and of its positive ones. The size is that of x, or of b where x = 0; the rounding is what
    the bound owes to extra.
    """

    low: Tensor
    high: Tensor
    extra: Tensor
    size: Tensor
    bound: Tensor
    rounding: Tensor


class _Best:
    """The best answer so far and what is known of it; at first x = 0.

    Of its residual r stands x + r = b + µPx, from which bounds of x* are found, the middle between them.
    """

    def __init__(
        self,
        operator: Transition,
        mu: Tensor,
        rhs: Tensor,
        initial: Tensor,
        allowed: Tensor,
        keep: bool,
    ) -> None:
        self.operator, self.mu, self.rhs, self.norm = operator, mu, rhs, norm_of(operator)
        self.nothing = torch.zeros((), dtype=rhs.dtype, device=rhs.device).expand(rhs.shape)
        self.x, self.middle = self.nothing, rhs
        self.spare: Tensor | None = None
        self.reach: Tensor
        self.inverse: Tensor
        self.least: Tensor
        sums = operator.row_sums
        alone = self.norm == "inf" and mu.ndim == 2 and mu.shape[-1] == 1
        if alone and isinstance(sums, Tensor) and sums.ndim == 2 and _long(sums):
            self.reach, self.inverse, self.least = _compiled().reached(mu, sums)
        else:
            self.reach = reach_of(operator, mu)
            remaining = (torch.ones_like(self.reach) - self.reach).to(mu.dtype)
            self.least = remaining.amin(-2, keepdim=True)
            self.inverse = remaining.reciprocal_()
        self.initial = initial
        known = self._compiled_evidence(0.0, 0.0, None) if _long(rhs) else None
        if known is None:
            b_size = size(rhs, self.norm, self.scratch)
            known = self._concluded(*self._interval(rhs, self.scratch, b_size), b_size, 0.0)
        self.rhs_size, self.bound, self.rounding = known.size, known.bound, known.rounding
        # One number for all nodes, until a solver was asked.
        lower, upper = known.low - known.extra, known.high + known.extra
        self.enclosure = Enclosure.of(lower.expand_as(rhs), upper.expand_as(rhs))
        self.untouched = self.bound > allowed
        self.matvecs = torch.zeros(*rhs.shape[:-2], rhs.shape[-1], dtype=torch.int64, device=rhs.device)
        self.precise = {operator.dtype: operator}
        # P x, or None while x = 0; and that of the last candidate.
        self.keep = keep
        self.product: Tensor | None = None
        self.walked: Tensor | None = None

    @property
    def residual(self) -> Tensor:
        """That of the best answer."""
        return self.middle - self.x

    @property
    def scratch(self) -> Tensor:
        """Memory like that of b, for passes that are not compiled: new memory takes longer than a sum."""
        if self.spare is None:
            self.spare = empty(self.rhs.shape, self.rhs)
        return self.spare

    def initial_size(self) -> Tensor:
        """That of the first guess, [..., 1, K]."""
        return size(self.initial, self.norm)

    def moved(self, step: Tensor) -> Tensor:
        """x and a step more; from x = 0 the step itself, unless others have its memory too."""
        others = {x.untyped_storage().data_ptr() for x in (self.rhs, self.initial)}
        its_own = step.is_contiguous() and step.untyped_storage().data_ptr() not in others
        if self.x is self.nothing and its_own and step.dtype == self.rhs.dtype:
            return step
        return torch.add(self.x, step, out=empty(step.shape, self.x))

    def judge(self, candidate: Tensor, asked: Tensor, precision: torch.dtype) -> None:
        """Take the candidate where some are asked and better; one product computed in `precision`."""
        self.matvecs = self.matvecs + asked.squeeze(-2)
        if precision not in self.precise:
            self.precise[precision] = self.operator.to(precision)
        operator = self.precise[precision]
        middle, known, compiled = self._evidence(operator, candidate)
        bound, rounding = known.bound, known.rounding
        self._narrow(operator, middle, known, None if bool(asked.all()) else asked, compiled)
        # 0 may have the smaller bound, but unless it is the first guess it is nobody's answer: where it is
        # not good enough the solver's first takes its place, if that is not so large that 0 must be nearer.
        # What is known of x* holds for both.
        better, untouched = asked & (bound < self.bound), self.untouched
        self.untouched = untouched & ~asked
        if not bool(better.all()):
            worse = asked & untouched & ~better & (self.initial_size() > 0)
            if bool(worse.any()):
                near = size(candidate, self.norm) <= 2 * self.bound
                worse = worse & near & bound.isfinite()
                if self.norm == "inf" and bool(worse.any()):
                    lower, upper = self.enclosure.ends()
                    apart = torch.maximum(upper - candidate, candidate - lower)
                    apart = extreme(torch.amax, apart)
                    apart = apart * (1 + 4 * torch.finfo(apart.dtype).eps)
                    bound = torch.where(worse, torch.minimum(bound, apart), bound)
                better = better | worse
            candidate = torch.where(better, candidate, self.x)
            middle = torch.where(better, middle, self.middle)
            bound = torch.where(better, bound, self.bound)
            rounding = torch.where(better, rounding, self.rounding)
            if self.walked is not None:
                before = torch.zeros_like(self.walked) if self.product is None else self.product
                self.walked = torch.where(better, self.walked, before)
        self.x, self.middle, self.bound, self.rounding = candidate, middle, bound, rounding
        self.product = self.walked

    def _narrow(
        self, operator: Transition, middle: Tensor, known: Evidence, asked: Tensor | None, compiled: bool
    ) -> None:
        """Narrow the bounds of x* by the evidence of an x; where only some are `asked`, theirs alone."""
        # Every answer's interval holds, whether or not it is the best; node by node it is narrower than the
        # bound, because the error is e = r + MPe, and what lies between low and high is not e alone but Pe.
        # reach·(low − extra) − (1 − reach)·extra is reach·low − extra.
        reach, before = self._reach(operator), self.enclosure.ends()
        ends = known.low, known.high, known.extra
        narrowed = _compiled().narrowed if compiled and asked is None else None

        def find() -> tuple[Tensor, Tensor]:
            if narrowed is None:
                return _narrowed(middle, reach, ends, before, asked)
            found: tuple[Tensor, Tensor] = narrowed(middle, reach, ends, before)
            return found

        self.enclosure = Enclosure(find)

    def _evidence(self, operator: Transition, x: Tensor) -> tuple[Tensor, Evidence, bool]:
        """The middle of x and what follows from its residual, in the dtype of `rhs`; if that was compiled.

        The product and the residual are computed in the operator's dtype.
        """
        dtype, rhs, y = operator.dtype, self.rhs, x.to(operator.dtype)
        walked, rounding = operator.matmul(y), operator.rounding(dtype)
        if self.keep:
            self.walked = walked
        if dtype == rhs.dtype and not isinstance(rounding, Tensor) and _long(rhs):
            # The products of edges are in memory of their own.
            its_own = operator.sparse and not self.keep and walked.is_contiguous()
            middle = walked if its_own else empty(rhs.shape, rhs)
            units = float(rounding), 2 * torch.finfo(dtype).eps
            found = self._compiled_evidence(*units, (self.mu, walked, x, middle))
            if found is not None:
                return middle, found, True
            walked = operator.matmul(y)
        x_size, middle = size(x, self.norm, self.scratch), empty(rhs.shape, rhs)
        if dtype == rhs.dtype:
            torch.addcmul(rhs, self.mu, walked, out=middle)
            residual = torch.sub(middle, x, out=self.scratch)
        else:
            narrow = torch.addcmul(rhs.to(dtype), self.mu.to(dtype), walked).sub_(y)
            residual = self.scratch.copy_(narrow)
            torch.add(x, residual, out=middle)
        ends = self._interval(residual, residual)
        return middle, self._concluded(*ends, x_size, self.slack(operator, x_size)), False

    def _compiled_evidence(
        self, product: float, vectors: float, started: tuple[Tensor, Tensor, Tensor, Tensor] | None
    ) -> Evidence | None:
        """That of x = 0, or as in `evidence.judged`, where that finds numbers.

        What of the size of x rounding may be in a product, and of both sizes in the sums.
        """
        known = self.least, None if started is None else self.rhs_size
        units = self._terms(), product, vectors
        found = _compiled().judged(self.rhs, self.inverse, known, self.norm == "one", units, started)
        return None if found is None else Evidence(*found)

    def _concluded(self, low: Tensor, high: Tensor, x_size: Tensor, slack: Tensor | float) -> Evidence:
        extra = slack + self._terms() / self.least * _interval_norm(low, high, self.norm)
        bound = _interval_norm(low - extra, high + extra, self.norm)
        return Evidence(low, high, extra, x_size, bound, extra + extra if self.norm == "one" else extra)

    def _interval(
        self, residual: Tensor, into: Tensor, magnitude: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Bounds of the entries of x* − x, both [..., 1, K]; in the 1-norm, masses below and above 0.

        The magnitude is the size of the residual, if that is known. What is in `into`, which may be the
        residual, is lost.
        """
        if self.norm == "inf":
            q = torch.mul(residual, self.inverse, out=into)
            return extreme(torch.amin, q), extreme(torch.amax, q)
        # From their sum and their difference, in fewer passes than one by one. No rounding makes the sum
        # larger than that of magnitudes, which is added up in the same order.
        mass, half = residual.sum(-2, keepdim=True), 0.5 * self.inverse
        if magnitude is None:
            magnitude = size(residual, "one", into)
        return (mass - magnitude) * half, (mass + magnitude) * half

    def slack(self, operator: Transition, x_size: Tensor) -> Tensor:
        """What rounding in the operator's dtype adds to the bound of an answer of that size, [..., 1, K]."""
        eps = torch.finfo(operator.dtype).eps
        slack = operator.rounding(operator.dtype) * x_size + 2 * eps * (2 * x_size + self.rhs_size)
        return slack / self.least

    def _terms(self) -> float:
        """What of the bounds rounding can hide: quotients by 1 − µ, in the 1-norm sums of N terms."""
        terms = 8 + (self.rhs.shape[-2] if self.norm == "one" else 0)
        return terms * torch.finfo(self.rhs.dtype).eps

    def _reach(self, operator: Transition) -> Tensor:
        """µ·rowsum, [..., 1 or N, 1 or K]: what of the bounds of e a walk passes on to each node."""
        if operator is self.operator and (self.norm == "inf" or self.mu.shape[-2] == 1):
            return self.reach.to(self.rhs.dtype)
        sums = operator.row_sums if self.norm == "inf" else operator.largest_row_sum
        return (self.mu * sums).to(self.rhs.dtype)


def _narrowed(
    middle: Tensor,
    reach: Tensor,
    known: tuple[Tensor, Tensor, Tensor],
    best: tuple[Tensor, Tensor],
    asked: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The bounds of x* that follow from low, high and extra, where they are narrower than the best so far."""
    (low, high, extra), ends = known, []
    for end, before, share, narrower in (
        (low, best[0], -extra, torch.maximum),
        (high, best[1], extra, torch.minimum),
    ):
        # Compiled passes round in this order.
        if reach.shape[-2] == 1:
            found = torch.add(middle, reach * end + share)
        else:
            found = torch.mul(reach, end).add_(share).add_(middle)
        if asked is not None:
            found = torch.where(asked, found, before)
        ends.append(narrower(found, before))
    return ends[0], ends[1]


def cast_error(x: Tensor, dtype: torch.dtype, norm: Norm) -> Tensor:
    """What rounding x to `dtype` can cost, [..., 1, K]: half a unit in the last place of each entry."""
    return x.new_zeros(()) if dtype == x.dtype else size(x, norm) * (torch.finfo(dtype).eps / 2)
