"""Functions of a walk times a signal: exp(−t(I − P)) s and Σ_k c_k B_k(P) s, by products alone.

The heat kernel is a sum over powers of P with Poisson weights, or over Chebyshev polynomials of P with
Bessel weights. Both are certified in one way. Cut off after K terms, either sum y(τ) solves

    y' + (I − P) y = defect(τ),      y(0) = s,

and ‖exp(−τ(I − P))‖ = 1 in the norm of the operator, so ‖y(t) − y*‖ ≤ ∫₀ᵗ ‖defect‖ dτ. The defect is what was
cut off and what rounding did to each product: vectors that are at hand, times integrals of the weights, which
are sums of positive numbers. Neither reversibility nor a spectrum is taken on trust.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.diffusion import default_tol
from graphdiff.implicit import OnFailure, Outcome, Spent, concluded, ending
from graphdiff.operators.base import Transition, check_transition
from graphdiff.solution import Enclosure, Solution
from graphdiff.solvers.base import norm_of, size

Basis = Literal["monomial", "chebyshev", "bernstein"]

# Weights further from the mode than this many nats are nothing, even relative to rounding.
NATS = 80.0
# Chebyshev sums are tried on walks that are called reversible; vectors that grow beyond this are not.
WILD = 1e8
# The part of the Chebyshev sum's products that is first spent on seeing whether the walk mixes anyway.
WATCHED = 8


def heat_kernel(
    P: Transition,
    s: Tensor,
    t: float | Tensor,
    *,
    tol: float | None = None,
    max_steps: int | None = None,
    on_failure: OnFailure = "warn",
) -> Solution:
    r"""Lets a signal spread for a time t, and says how exactly.

    .. math:: y = e^{-t(I - P)} s = \sum_k e^{-t} \frac{t^k}{k!} P^k s

    The walk steps at random times, one a unit of time on average. The error of every right-hand side is
    promised to be at most tol·‖s‖ in the maximum norm for a transition P, in the 1-norm for P.T. By powers
    of P about t + 7√t products certify 1e-10; for reversible walks Chebyshev polynomials take about 7√t, and
    whichever takes fewer is used. Without gradients a walk that has mixed ends the sum early.

    Args:
        P: Any transition, [..., N, N].
        s: Signal [..., N, K] or [N], same dtype and device as P. Leading dimensions broadcast with P's.
        t: Time ≥ 0: a number, a 0-d tensor or [..., 1, K] per channel.
        tol: Relative tolerance; 1e-10 in float64, else 1e-5, if None.
        max_steps: Most terms of the sum; None for as many as the tolerance takes.
        on_failure: What to do where the promise cannot be kept: "warn", "raise" or "ignore".

    Returns:
        A `Solution`; `steps` is the degree of the sum. Its `value` is differentiable in s, t and P's tensors,
        as often as P's products are, by autograd through the sum: memory grows with the number of products.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape, device or value does not fit; the message names it.
        ConvergenceError: The promise is not kept under ``on_failure="raise"``.

    Warns:
        ConvergenceWarning: The promise is not kept, under ``on_failure="warn"``.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.DenseTransition.from_affinity(torch.ones(2, 2, dtype=torch.float64))
        >>> sol = gd.heat_kernel(P, torch.tensor([0.0, 2.0], dtype=torch.float64), t=0.5)
        >>> sol.value  # 1 ∓ exp(−t), as the other eigenvalue of P is 0
        tensor([0.3935, 1.6065], dtype=torch.float64)
        >>> bool(sol.converged), float(sol.error_bound) < 1e-10
        (True, True)
    """
    problem = _problem(P, s, tol, on_failure)
    if max_steps is not None:
        checks.positive_integer(max_steps, "max_steps")
    t = checks.time(t, problem.seed.shape, P.device).to(problem.wide)
    batch = checks.broadcast_batch([P.shape[:-2], problem.seed.shape[:-2], t.shape[:-2]], "P, s and t")
    checks.some_graph(batch, "P, s and t")
    problem = problem.expanded(batch)
    best = _Best(problem, problem.size)
    times, differentiable = t.detach(), _differentiable(problem, t)
    moving = t if differentiable and t.requires_grad else None
    poisson = _Poisson(times, moving)
    powers = poisson.terms(problem.tol / 2)
    polynomials, bessel = torch.full_like(powers, math.inf), None
    if problem.operator.reversible and bool((times > 2).any()):
        bessel = _Bessel(times, moving, problem.operator.positive_semidefinite)
        polynomials = torch.where(times > 2, bessel.terms(problem.tol / 2), math.inf)
    fewer = (polynomials < powers).expand_as(best.bound)
    most = math.inf if max_steps is None else max_steps
    pending = problem.size > 0
    for dtype in dict.fromkeys((problem.operator.dtype, problem.wide)):
        operator, able = problem.operator.to(dtype), pending
        if dtype != problem.wide:
            # The rounding of each product, integrated over t, must leave room for the rest.
            each = 2 * torch.as_tensor(operator.rounding(dtype)) + 12 * torch.finfo(dtype).eps
            able = able & (times * each < problem.tol / 2)
        if bessel is not None:
            if not differentiable:
                watched = (polynomials / WATCHED).floor().clamp(max=most).expand_as(best.bound)
                mixing = able & fewer & (watched >= 8)
                best.take(_powers(problem, operator, poisson, mixing, watched, True), mixing)
                able = able & ~best.converged
            mask = able & fewer
            best.take(_polynomials(problem, operator, bessel, mask, most, differentiable), mask)
            able = able & ~best.converged
            # Powers take over where their rounding promises more, and where nothing has been found.
            sound = times * operator.rounding(dtype) + poisson.rounding <= problem.tol / 2
            able = able & ~(fewer & best.bound.isfinite() & ~(sound & (max_steps is None)))
        budget = torch.full_like(best.bound, most)
        best.take(_powers(problem, operator, poisson, able, budget, not differentiable), able)
        pending = pending & ~best.converged

    limit = None
    if not bool(best.converged.all()) and max_steps is not None and int(best.steps.max()) >= max_steps:
        limit = Spent("max_steps", max_steps)
    why = f"at most about {int(torch.where(fewer, polynomials, powers).max())} products"
    if bool(fewer.any()):
        why = f"reversible: {why}, by powers {int(torch.where(fewer, powers, 0).max())}"
    solver = "Chebyshev sum" if bool(fewer.any()) else "Poisson sum"
    return _solution(problem, best, s, solver, why, "heat_kernel", on_failure, limit)


def polynomial(
    P: Transition,
    s: Tensor,
    coefficients: Sequence[float] | Tensor,
    basis: Basis = "monomial",
    *,
    tol: float | None = None,
    on_failure: OnFailure = "warn",
) -> Solution:
    r"""Any polynomial of a walk times a signal.

    .. math:: y = \sum_{k=0}^{n} c_k B_k(P) s

    | basis | B_k(P) | products | known from |
    | --- | --- | --- | --- |
    | "monomial" | P^k | n | GDC, GPR-GNN |
    | "chebyshev" | T_k(P) | n | ChebNet, whose argument L − I is −P: its k-th coefficient times (−1)^k |
    | "bernstein" | C(n, k) ((I − P)/2)^k ((I + P)/2)^(n−k) | 2n | BernNet; k/n·2 is the eigenvalue of I − P |

    The sum is exact but for rounding, and that is what the evidence is about. The promise of `solve` is
    relative to the size of the filter too: ‖y − y*‖ ≤ tol·Σ_k |c_k|·‖s‖, in the maximum norm for a transition
    P and the 1-norm for P.T.

    Args:
        P: Any transition, [..., N, N].
        s: Signal [..., N, K] or [N], same dtype and device as P. Leading dimensions broadcast with P's.
        coefficients: c_0 … c_n: a list of numbers, [n + 1], or [n + 1, K] per channel.
        basis: "monomial", "chebyshev" or "bernstein".
        tol: Relative tolerance; 1e-10 in float64, else 1e-5, if None. float32 that cannot keep it is computed
            in float64.
        on_failure: What to do where the promise cannot be kept: "warn", "raise" or "ignore".

    Returns:
        A `Solution`; its `value` is differentiable in s, the coefficients and P's tensors by autograd through
        the sum: memory grows with the number of products. "bernstein" keeps n + 1 vectors in any case.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape, device or value does not fit; the message names it.
        ConvergenceError: The promise is not kept under ``on_failure="raise"``.

    Warns:
        ConvergenceWarning: The promise is not kept, under ``on_failure="warn"``.

    Example:
        >>> import torch, graphdiff as gd
        >>> around = gd.FunctionTransition(lambda y: y.roll(1, -2), 4, dtype=torch.float64)
        >>> s = torch.tensor([1.0, 0.0, 0.0, 0.0], dtype=torch.float64)
        >>> gd.polynomial(around, s, [0.5, 0.25, 0.25]).value
        tensor([0.5000, 0.2500, 0.2500, 0.0000], dtype=torch.float64)
    """
    problem = _problem(P, s, tol, on_failure)
    if basis not in _SUMS:
        raise ValueError(f'basis: expected "monomial", "chebyshev" or "bernstein", got {basis!r}')
    c = checks.coefficients(coefficients, problem.seed.shape[-1], P.device).to(problem.wide).unsqueeze(1)
    batch = checks.broadcast_batch([P.shape[:-2], problem.seed.shape[:-2]], "P and s")
    checks.some_graph(batch, "P and s")
    problem = problem.expanded(batch)
    best = _Best(problem, c.detach().abs().sum(0) * problem.size)
    pending = best.bound > 0
    for dtype in dict.fromkeys((problem.operator.dtype, problem.wide)):
        operator = problem.operator.to(dtype)
        rounding = torch.as_tensor(operator.rounding(dtype) + 8 * torch.finfo(dtype).eps, device=P.device)
        able = pending if dtype == problem.wide else pending & (len(c) * rounding <= problem.tol / 4)
        if bool(able.any()):
            best.take(_SUMS[basis](problem, operator, c), able)
        pending = pending & ~best.converged
    why = f"degree {len(c) - 1}"
    return _solution(problem, best, s, f"{basis} sum", why, "polynomial", on_failure, None)


# --- What both have in common.


class _Sum(NamedTuple):
    """A sum [..., N, K] in the best precision, a bound of its error [..., 1, K], and what it took."""

    y: Tensor
    bound: Tensor
    steps: Tensor
    products: Tensor


@dataclass(frozen=True)
class _Problem:
    """The operator in the dtype to multiply in, the signal in the best at hand, and the tolerance."""

    operator: Transition
    seed: Tensor
    tol: float
    wide: torch.dtype

    @property
    def norm(self) -> Literal["inf", "one"]:
        return norm_of(self.operator)

    @property
    def size(self) -> Tensor:
        """‖s‖, [..., 1, K]."""
        return size(self.seed.detach(), self.norm)

    @property
    def largest_row(self) -> Tensor:
        """‖P‖ ≤ this, [..., 1, 1]."""
        sums = torch.as_tensor(self.operator.row_sums, dtype=self.wide, device=self.seed.device)
        return sums.amax(-2, keepdim=True) if sums.ndim > 1 else sums

    def expanded(self, batch: torch.Size) -> "_Problem":
        """With a signal for every graph."""
        shape = (*batch, *self.seed.shape[-2:])
        return _Problem(self.operator, self.seed.expand(shape), self.tol, self.wide)


def _problem(P: Transition, s: Tensor, tol: float | None, on_failure: OnFailure) -> _Problem:
    check_transition(P)
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f'on_failure: expected "warn", "raise" or "ignore", got {on_failure!r}')
    if P.restarts:
        raise ValueError(f"P: {P} restarts at a signal; bind one with P.restarting_at(distribution)")
    signal = checks.signal(s, P.shape[-1])
    checks.same_dtype(signal, "s", P.dtype, "P")
    checks.same_device(signal, "s", P.device, "P")
    signal = checks.real(signal, P.mask)
    checks.finite(signal, "s")
    for tensor in P.tensors():
        checks.finite(tensor, f"the tensors of {type(P).__name__}")
    tol = default_tol(s.dtype) if tol is None else checks.positive_number(tol, "tol")
    operator = P.to(torch.float32) if P.dtype in (torch.float16, torch.bfloat16) else P
    wide = checks.widest(P.device)
    return _Problem(operator, signal.to(wide), tol, wide)


def _differentiable(problem: _Problem, *others: Tensor) -> bool:
    tensors = (problem.seed, *others, *problem.operator.tensors())
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


class _Best:
    """The best sum so far, and whether it is good enough; at first 0, which is known to be good for s = 0."""

    def __init__(self, problem: _Problem, scale: Tensor) -> None:
        self.problem, self.atol = problem, problem.tol * scale
        self.y = torch.zeros_like(problem.seed)
        self.bound = torch.where(scale > 0, math.inf, 0.0)
        self.steps = torch.zeros_like(scale, dtype=torch.int64)
        self.products = torch.zeros_like(self.steps)

    @property
    def converged(self) -> Tensor:
        """Where the bound, the last cast included, is within the tolerance."""
        return self.full_bound <= self.atol

    @property
    def full_bound(self) -> Tensor:
        """The bound with the rounding of the last cast."""
        y = self.y.detach()
        cast = y.to(self.problem.operator.dtype).to(y.dtype)
        return self.bound + size(y - cast, self.problem.norm)

    def take(self, found: _Sum | None, asked: Tensor) -> None:
        """Another sum, where it was asked for and is better."""
        if found is None:
            return
        self.products = self.products + torch.where(asked, found.products, 0)
        better = asked & (found.bound < self.bound)
        self.y = torch.where(better, found.y, self.y)
        self.bound = torch.where(better, found.bound, self.bound)
        self.steps = torch.where(better, found.steps, self.steps)


def _solution(
    problem: _Problem,
    best: _Best,
    s: Tensor,
    solver: str,
    why: str,
    call: str,
    on_failure: OnFailure,
    limit: Spent | None,
) -> Solution:
    """The answer as it was asked for; warns or raises where it is not good enough."""
    y, bound = best.y.detach(), best.full_bound
    # A sum of all its terms misses nothing else.
    how = ending(bound, best.atol, bound, problem.operator.dtype, limit)
    steps, products = best.steps.squeeze(-2), best.products.squeeze(-2)
    value = best.y.to(problem.operator.dtype)
    enclosure = Enclosure.of(y - best.bound, y + best.bound)
    found = Outcome(value, enclosure, bound, best.atol, steps, products)
    return concluded(found, s, problem.norm, on_failure, call=call, solver=solver, why=why, how=how)


# --- The heat kernel by powers of P.


class _Poisson:
    """π_k = e⁻ᵗ tᵏ/k!, what lies beyond, and how far: [..., 1, 1 or K] for each k.

    From the mode outwards by ratios, then divided by their sum: no logarithms, nothing overflows, nothing
    cancels, for t = 1e6 as for t = 1.
    """

    def __init__(self, t: Tensor, differentiable: Tensor | None) -> None:
        self.t, self.differentiable = t, differentiable
        times = t.flatten().tolist()
        windows = [_poisson_window(x) for x in times]
        self.first = min(first for first, _ in windows)
        last = max(first + len(weights) for first, weights in windows)
        table = t.new_zeros(last - self.first + 1, len(times))
        for column, (first, weights) in enumerate(windows):
            table[first - self.first : first - self.first + len(weights), column] = weights.to(t)
        self.weights = table.reshape(-1, *t.shape)
        beyond = self.weights.flip(0).cumsum(0).flip(0)
        self.tails = beyond - self.weights
        self.tails[:-1] = beyond[1:]
        self.excesses = self.tails.flip(0).cumsum(0).flip(0)
        lengths = t.new_tensor([len(weights) for _, weights in windows]).reshape(t.shape)
        ends = t.new_tensor([first + len(weights) for first, weights in windows]).reshape(t.shape)
        self.last, self.ends = last, ends
        # Every weight is some hundreds or thousands of rounded products away from the mode.
        self.rounding = 4 * lengths * torch.finfo(t.dtype).eps

    def weight(self, k: int) -> Tensor:
        """π_k, differentiable in t if that is wanted."""
        inside = self.first <= k <= self.last
        weight = self.weights[k - self.first] if inside else torch.zeros_like(self.t)
        t = self.differentiable
        if t is None or not inside:
            return weight
        # Its value times (t/t)ᵏ e⁰: the number is that above, the derivatives are those of tᵏ e⁻ᵗ/k!.
        positive = self.t > 0
        moving = torch.where(positive, t, 1.0) / torch.where(positive, self.t, 1.0)
        away = weight * moving**k * (torch.where(positive, self.t - t, 0.0)).exp()
        still = torch.where(positive, 0.0, t)
        return torch.where(positive, away, still**k * (-still).exp() / math.gamma(min(k, 170) + 1))

    def tail(self, k: int) -> Tensor:
        """Σ of the weights beyond k, which is ∫ π_k over the time until t."""
        if k < self.first:
            return torch.ones_like(self.t)
        return self.tails[k - self.first] if k <= self.last else torch.zeros_like(self.t)

    def excess(self, k: int) -> Tensor:
        """Σ_j (j − k) π_j over the j beyond k."""
        if k < self.first:
            return self.t - k
        return self.excesses[k - self.first] if k <= self.last else torch.zeros_like(self.t)

    def terms(self, tol: float) -> Tensor:
        """The first k beyond which no more than tol lies."""
        return (self.first + (self.tails > tol).sum(0)).to(self.t.dtype)


def _poisson_window(t: float) -> tuple[int, Tensor]:
    """The first k that counts, and the weights from there on."""
    reach = math.sqrt(2 * t * NATS) + NATS
    mode, first, last = int(t), max(0, int(t - reach)), int(t + reach) + 1
    up = t / torch.arange(mode + 1, last + 1, dtype=torch.float64)
    down = torch.arange(mode, first, -1, dtype=torch.float64) / max(t, 1e-300)
    one = torch.ones(1, dtype=torch.float64)
    weights = torch.cat([down.cumprod(0).flip(0), one, up.cumprod(0)])
    return first, weights / weights.sum()


def _powers(
    problem: _Problem,
    operator: Transition,
    poisson: _Poisson,
    mask: Tensor,
    most: Tensor,
    mixing: bool,
) -> _Sum | None:
    """Σ π_k P^k s for the right-hand sides of the mask, of degree `most` at the highest.

    Where `mixing` may end it, P^k s stands for all that is beyond: off by at most Σ_j (j − k) π_j times what
    one more product changes.
    """
    if not bool(mask.any()):
        return None
    wide, norm, row, goal = problem.wide, problem.norm, problem.largest_row, problem.tol / 2 * problem.size
    grown = row.clamp(min=1) ** poisson.ends
    rounding = operator.rounding(operator.dtype)
    enough = poisson.terms(problem.tol / 2) + (0 if poisson.differentiable is None else 2)
    # Too few for the tail to be small: then it must be seen to mix, and early.
    watched = mixing & (most < enough)
    w = problem.seed.to(operator.dtype)
    y = torch.zeros_like(problem.seed)
    lost, magnitude = size((w - problem.seed).detach(), norm), torch.zeros_like(problem.size)
    bound, change = torch.full_like(lost, math.inf), torch.full_like(lost, math.inf)
    active, steps, k = mask, torch.zeros_like(mask, dtype=torch.int64), 0
    earlier = change
    while True:
        length = size(w.detach(), norm).to(wide)
        weight, tail = poisson.weight(k), poisson.tail(k)
        y = torch.where(active, y + weight * w.to(wide), y)
        magnitude = magnitude + weight.detach() * length
        unseen, done = tail * row * length, k >= enough
        if mixing:
            done = done | (unseen <= goal)
            rest = poisson.excess(k) * (row * change + 2 * rounding * length)
            mixed = active & ~done & (rest <= goal)
            y = torch.where(mixed, y + tail * w.to(wide), y)
            magnitude = magnitude + torch.where(mixed, tail * length, 0.0)
            unseen, done = torch.where(mixed, rest, unseen), done | mixed
            if k % 4 == 0:
                done = done | (watched & (k >= 8) & ~(change < earlier / 2))
                earlier = change
        done = active & (done | (k >= most))
        arithmetic = (torch.finfo(wide).eps * (k + 3) + poisson.rounding) * magnitude
        bound = torch.where(done, grown * (unseen + lost) + arithmetic, bound)
        active = active & ~done
        if not bool(active.any()):
            # Rounding of sums of positive numbers, of which there are some in every bound.
            return _Sum(y, bound * (1 + 1e-9), steps, steps)
        lost = torch.where(active, lost + tail * rounding * length, lost)
        following = operator.matmul(w)
        if mixing:
            change = size((following - w).detach(), norm).to(wide)
        w, k, steps = following, k + 1, steps + active


# --- The heat kernel by Chebyshev polynomials of P, or of 2P − I where P has no negative eigenvalue.


class _Bessel:
    """a_k = e^−τ I_k(τ) and ∫₀^τ a_k, τ = t or, for the lazy argument 2P − I, t/2: [..., 1, 1 or K] each.

    exp(−τ(1 − x)) = a_0 + 2 Σ a_k T_k(x). By Miller's recurrence, downwards, a sum of positive numbers; then
    a_0 + 2 Σ a_k = 1. The integral is 2 Σ_{j>k} (j − k) a_j, because a_k' = (a_{k−1} − 2a_k + a_{k+1})/2.
    """

    def __init__(self, t: Tensor, differentiable: Tensor | None, lazy: bool) -> None:
        self.lazy = lazy
        self.tau = t / 2 if lazy else t
        columns = [_bessel_column(x) for x in self.tau.flatten().tolist()]
        self.last = max(len(column) for column in columns)
        table = t.new_zeros(self.last + 1, len(columns))
        for place, column in enumerate(columns):
            table[: len(column), place] = torch.tensor(column, dtype=torch.float64).to(t)
        self.values = table.reshape(-1, *t.shape)
        beyond = self.values.flip(0).cumsum(0).flip(0)
        tails = torch.cat([2 * beyond[1:], torch.zeros_like(beyond[:1])])
        self.integrals = tails.flip(0).cumsum(0).flip(0)
        lengths = t.new_tensor([len(column) for column in columns]).reshape(t.shape)
        self.rounding = 8 * lengths * torch.finfo(t.dtype).eps
        self.weights = torch.cat([self.values[:1], 2 * self.values[1:]])
        if differentiable is not None:
            # The same numbers once more, as the cosine sums of exp(−τ(1 − cos θ)), which autograd knows.
            moving = differentiable / 2 if lazy else differentiable
            angle = torch.arange(4 * len(table), dtype=t.dtype, device=t.device) / (2 * len(table)) * math.pi
            samples = (moving * (angle.cos() - 1).reshape(-1, *[1] * t.ndim)).exp()
            found = torch.fft.rfft(samples, dim=0).real[: len(table)] / len(angle)
            found = torch.cat([found[:1], 2 * found[1:]])
            self.weights = self.weights + (found - found.detach())

    def terms(self, tol: float) -> Tensor:
        """The first k at which of vectors of size 1 no more than tol is cut off."""
        return (4 * self.integrals > tol).sum(0).to(self.tau.dtype)


def _bessel_column(tau: float) -> list[float]:
    """From k = 0 to where there is nothing left even beside rounding; for τ ≥ 1, else a mere 1."""
    if tau < 1:
        return [1.0]
    last = int(1.5 * (math.sqrt(2 * tau * NATS) + NATS)) + 10
    column = [0.0] * (last + 1)
    column[last], above = 1e-250, 0.0
    for k in range(last, 0, -1):
        column[k - 1], above = above + 2 * k / tau * column[k], column[k]
    total = column[0] + 2 * math.fsum(column[1:])
    return [x / total for x in column]


def _polynomials(
    problem: _Problem,
    operator: Transition,
    bessel: _Bessel,
    mask: Tensor,
    most: float,
    differentiable: bool,
) -> _Sum | None:
    """a_0 s + 2 Σ a_k T_k(Z) s for the right-hand sides of the mask, of degree `most` at the highest.

    With rounding η_k in T_{k+1} = 2Z T_k − T_{k−1} + η_k, the defect after K terms is
    a_{K+1} T_K − a_K T_{K+1} + Σ a_k η_k.
    """
    if not bool(mask.any()):
        return None
    wide, norm, row = problem.wide, problem.norm, problem.largest_row
    grown = ((2 if bessel.lazy else 1) * bessel.tau * (row - 1).clamp(min=0)).exp()
    rounding, eps = operator.rounding(operator.dtype), torch.finfo(operator.dtype).eps
    # ‖Z‖ ≤ this, and Z v is computed with an error of at most `slip` times ‖v‖.
    reach = 2 * row + 1 if bessel.lazy else row
    slip = 2 * rounding + 3 * eps if bessel.lazy else rounding

    def applied(v: Tensor) -> Tensor:
        return 2 * operator.matmul(v) - v if bessel.lazy else operator.matmul(v)

    scale, goal = problem.size, problem.tol / 2 * problem.size
    current = problem.seed.to(operator.dtype)
    before = torch.zeros_like(current)
    y = torch.zeros_like(problem.seed)
    lost, magnitude = size((current - problem.seed).detach(), norm), torch.zeros_like(scale)
    bound = torch.full_like(lost, math.inf)
    active, steps, k = mask, torch.zeros_like(mask, dtype=torch.int64), 0
    length_before = torch.zeros_like(scale)
    while True:
        length = size(current.detach(), norm).to(wide)
        y = torch.where(active, y + bessel.weights[k] * current.to(wide), y)
        magnitude = magnitude + bessel.weights[k].detach() * length
        # One product more would tell the size of the next one; this much it is at most.
        following = (reach if k == 0 else 2 * reach) * length + length_before
        here, further = bessel.integrals[k], bessel.integrals[k + 1]
        unseen = here * following + further * length
        # For gradients every signal must have been cut off where the worst would be.
        small = here * torch.maximum(following, scale) + further * torch.maximum(length, scale) <= goal
        done = (small if differentiable else unseen <= goal) | (k >= most) | (k + 2 >= len(bessel.values))
        wild = active & ~(length <= WILD * scale)
        done = active & done & ~wild
        arithmetic = (torch.finfo(wide).eps * (k + 3) + bessel.rounding) * magnitude
        bound = torch.where(done, grown * (unseen + lost) + arithmetic, bound)
        active = active & ~done & ~wild
        if not bool(active.any()):
            return _Sum(torch.where(bound.isfinite(), y, 0.0), bound * (1 + 1e-9), steps, steps)
        if k == 0:
            after, error = applied(current), slip * length
        else:
            after = 2 * applied(current) - before
            error = 2 * slip * length + 2 * eps * following
        lost = torch.where(active, lost + here * error, lost)
        before, current, length_before = current, after, length
        k, steps = k + 1, steps + active


# --- Polynomials given by their coefficients; beside each vector a bound of what rounding did to it.


def _monomials(problem: _Problem, operator: Transition, c: Tensor) -> _Sum:
    """Σ c_k P^k s."""
    wide, norm, row = problem.wide, problem.norm, problem.largest_row
    rounding = operator.rounding(operator.dtype)
    w = problem.seed.to(operator.dtype)
    error = size((w - problem.seed).detach(), norm)
    y = c[0] * w.to(wide)
    lost, magnitude = c[0].detach().abs() * error, c[0].detach().abs() * size(w.detach(), norm).to(wide)
    for k in range(1, len(c)):
        error = row * error + rounding * size(w.detach(), norm)
        w = operator.matmul(w)
        y = y + c[k] * w.to(wide)
        lost = lost + c[k].detach().abs() * error
        magnitude = magnitude + c[k].detach().abs() * size(w.detach(), norm)
    return _summed(problem, y, lost, magnitude, len(c) - 1, len(c) - 1)


def _chebyshev(problem: _Problem, operator: Transition, c: Tensor) -> _Sum:
    """Σ c_k T_k(P) s by T_{k+1} = 2P T_k − T_{k−1}.

    What rounding does to T_j comes back in T_k as U_{k−j−1}(P) of it: up to 2.4^(k−j) times as large in
    general. Of a reversible walk it is no larger than k − j in the norm weighted by degrees; that is believed
    as long as no T_j s itself has grown beyond what it allows.
    """
    wide, norm, row = problem.wide, problem.norm, problem.largest_row
    rounding, eps = operator.rounding(operator.dtype), torch.finfo(operator.dtype).eps
    spread = _spread(problem)
    before, current = problem.seed, problem.seed.to(operator.dtype)
    first = size((current - problem.seed).detach(), norm)
    error_before, error, sum_of_errors, tame = torch.zeros_like(first), first, first, first
    length_before, length = torch.zeros_like(first), size(current.detach(), norm).to(wide)
    y, most = c[0] * current.to(wide), length
    lost, magnitude = c[0].detach().abs() * error, c[0].detach().abs() * length
    for k in range(1, len(c)):
        product = operator.matmul(current)
        following = product if k == 1 else 2 * product - before.to(operator.dtype)
        factor = 1 if k == 1 else 2
        new = factor * rounding * length + 2 * eps * (factor * row * length + length_before)
        error_before, error = error, factor * row * error + (error_before if k > 1 else 0.0) + new
        sum_of_errors = sum_of_errors + new
        tame = tame + sum_of_errors
        before, current = current, following
        length_before, length = length, size(current.detach(), norm).to(wide)
        most = torch.maximum(most, length)
        believed = most <= 2 * spread * problem.size
        bound = torch.where(believed, torch.minimum(error, 2 * spread * tame), error)
        y = y + c[k] * current.to(wide)
        lost = lost + c[k].detach().abs() * bound
        magnitude = magnitude + c[k].detach().abs() * length
    return _summed(problem, y, lost, magnitude, len(c) - 1, len(c) - 1)


def _spread(problem: _Problem) -> Tensor:
    """‖x‖ in the norm of P is at most this times ‖x‖ in the one weighted by degrees, and back; or ∞."""
    operator = problem.operator
    log_degree = operator.log_degree if operator.reversible else None
    if log_degree is None:
        return torch.full_like(problem.size, math.inf)
    log_degree = log_degree.detach().to(problem.wide) * (1 if problem.norm == "inf" else -1)
    wide = log_degree.logsumexp(-1) - log_degree.amin(-1)
    return (wide / 2).exp()[..., None, None]


def _bernstein(problem: _Problem, operator: Transition, c: Tensor) -> _Sum:
    """Σ c_k C(n, k) ((I − P)/2)^k ((I + P)/2)^(n−k) s: powers of the one, then Horner's rule in the other."""
    wide, norm, degree = problem.wide, problem.norm, len(c) - 1
    rounding, eps = operator.rounding(operator.dtype) / 2, torch.finfo(operator.dtype).eps
    reach = (1 + problem.largest_row) / 2
    vectors = [problem.seed.to(operator.dtype)]
    errors = [size((vectors[0] - problem.seed).detach(), norm)]
    for _ in range(degree):
        u = vectors[-1]
        errors.append(reach * errors[-1] + (rounding + 2 * eps) * size(u.detach(), norm))
        vectors.append((u + operator.matmul(u)) / 2)
    b = [c[k] * math.comb(degree, k) for k in range(degree + 1)]
    v, error = torch.zeros_like(vectors[0]), torch.zeros_like(errors[0])
    for k in range(degree, -1, -1):
        u, slip, number = vectors[degree - k], errors[degree - k], b[k].detach().abs()
        length = size(v.detach(), norm)
        v = b[k].to(v.dtype) * u + ((v - operator.matmul(v)) / 2 if k < degree else 0.0)
        error = (
            reach * error + (rounding + 3 * eps) * length + number * (slip + 2 * eps * size(u.detach(), norm))
        )
    return _summed(problem, v.to(wide), error, torch.zeros_like(error), degree, 2 * degree)


def _summed(
    problem: _Problem, y: Tensor, lost: Tensor, magnitude: Tensor, degree: int, products: int
) -> _Sum:
    """With the rounding of the sum itself, and of the bounds."""
    bound = (lost + torch.finfo(problem.wide).eps * (degree + 3) * magnitude) * (1 + 1e-9)
    counts = torch.full_like(bound, degree, dtype=torch.int64)
    return _Sum(y, bound, counts, torch.full_like(counts, products))


_SUMS = {"monomial": _monomials, "chebyshev": _chebyshev, "bernstein": _bernstein}
