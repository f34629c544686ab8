"""y = (1 − µ)(I − µP)⁻¹ s: `solve` with its evidence, `diffuse` for the value, `solve_path` for many µ."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.implicit import Call, Ending, OnFailure, Outcome, concluded, ending, implicit_solve, spent
from graphdiff.operators.base import Transition, check_transition
from graphdiff.solution import Enclosure, Norm, Progress, Solution
from graphdiff.solvers.auto import Auto, chosen
from graphdiff.solvers.base import Budget, Solver, norm_of, scaled, size
from graphdiff.solvers.shifted import Shifted


def solve(
    P: Transition,
    s: Tensor,
    mu: float | Tensor,
    *,
    solver: Solver | Auto | None = None,
    tol: float | None = None,
    initial: Tensor | None = None,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    progress: Callable[[Progress], object] | None = None,
    on_failure: OnFailure = "warn",
) -> Solution:
    r"""Diffuses a signal exactly, and says how exactly.

    .. math:: y = (1 - \mu)(I - \mu P)^{-1} s

    (the paper's Eq. 2 and the limit of its Eq. 3). The error of every right-hand side is promised to be at
    most tol·‖s‖ in the maximum norm for a transition P, in the 1-norm for P.T (personalised PageRank).

    Args:
        P: Any transition, [..., N, N].
        s: Signal [..., N, K] or [N], same dtype and device as P. Leading dimensions broadcast with P's. At
            padded nodes, where P has a mask, it is taken as 0, and so is y.
        mu: µ in [0, 1): a number, a 0-d tensor, [..., 1, K] per channel or [..., N, 1] per node.
        solver: How; `solvers.Auto()` if None.
        tol: Relative tolerance; 1e-10 in float64, else 1e-5, if None.
        initial: First guess of y, shaped like s; s itself if None.
        max_steps: Most steps of the solver, whose iterate is then the value; None for as many as theory says
            can help.
        max_seconds: Time after which no further step begins; the backward has as much again. `Direct` is one
            step, and what prepares a solver is not interrupted.
        progress: Called after every step, of the backward too, with a `Progress`.
        on_failure: What to do where the promise cannot be kept: "warn", "raise" or "ignore".

    Returns:
        A `Solution`; its `value` is differentiable in s, µ and P's tensors, without a graph of the steps.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape, device or value does not fit; the message names it.
        ConvergenceError: The promise is not kept under ``on_failure="raise"``.

    Warns:
        ConvergenceWarning: The promise is not kept, here or in the backward, under ``on_failure="warn"``.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.DenseTransition.from_affinity(torch.ones(2, 2, dtype=torch.float64))
        >>> sol = gd.solve(P, torch.tensor([0.0, 2.0], dtype=torch.float64), mu=0.5)
        >>> sol.value
        tensor([0.5000, 1.5000], dtype=torch.float64)
        >>> bool(sol.converged), float(sol.error_bound) < 1e-10
        (True, True)
    """
    return solve_scaled(
        P,
        s,
        mu,
        None,
        solver=solver,
        tol=tol,
        initial=initial,
        max_steps=max_steps,
        max_seconds=max_seconds,
        progress=progress,
        on_failure=on_failure,
    )


class Scaling(NamedTuple):
    """y = c ⊙ z, where z is the diffusion of s / c.

    Attributes:
        factor: c > 0, [..., N, 1] with the leading dimensions of P, in the best precision at hand.
        rounding: Nowhere does the rounding of c, or of the µ given with it, change z by more than this times
            max |s / c|; a number or [..., 1, 1].
        closer: Bounds of |y − y*|, node by node, of its own, and the products they took, from s, µ, y and
            `max_steps`: for where the bound of z does not keep the promise.
    """

    factor: Tensor
    rounding: Tensor | float
    closer: Callable[[Tensor, Tensor, Tensor, int | None], tuple[Tensor, Tensor]] | None


def solve_scaled(
    P: Transition,
    s: Tensor,
    mu: float | Tensor,
    scaling: Scaling | None,
    *,
    solver: Solver | Auto | None,
    tol: float | None,
    initial: Tensor | None,
    max_steps: int | None,
    max_seconds: float | None,
    progress: Callable[[Progress], object] | None,
    on_failure: OnFailure,
) -> Solution:
    """`solve`, whose promise and evidence are for y = c ⊙ z where there is a scaling; P then is a walk."""
    check_transition(P)
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f'on_failure: expected "warn", "raise" or "ignore", got {on_failure!r}')
    if solver is not None and not isinstance(solver, Solver | Auto):
        raise TypeError(f"solver: expected a solver such as solvers.Walk(), got {solver!r}")
    signal = checks.signal(s, P.shape[-1])
    checks.same_dtype(signal, "s", P.dtype, "P")
    checks.same_device(signal, "s", P.device, "P")
    signal = checks.real(signal, P.mask)
    P.check_finite()
    mu = checks.mu(mu, signal.shape, P.device)
    tol = checks.positive_number(tol, "tol") if tol is not None else default_tol(s.dtype)
    budget = Budget.checked(max_steps, max_seconds, progress)
    batch = checks.broadcast_batch([P.shape[:-2], signal.shape[:-2], mu.shape[:-2]], "P, s and mu")
    shape = (*batch, *signal.shape[-2:])
    if initial is not None:
        initial = checks.signal(initial, P.shape[-1], "initial")
        checks.same_dtype(initial, "initial", P.dtype, "P")
        checks.same_device(initial, "initial", P.device, "P")
        initial = checks.real(initial, P.mask)
        checks.finite(initial, "initial")
        if checks.broadcast_batch([initial.shape, torch.Size(shape)], "initial and s") != torch.Size(shape):
            raise ValueError(
                f"initial: expected shape {list(shape)} like s, got {checks.shape_text(initial)}"
            )

    norm = norm_of(P)
    if 0 in batch or P.restarts:
        checks.finite(signal, "s")
    if 0 in batch:
        return _solve_none(P, s, signal.expand(shape), mu, norm)
    if P.restarts:
        return _solve_restarting(
            P,
            s,
            mu,
            initial,
            solver=solver,
            tol=tol,
            max_steps=max_steps,
            max_seconds=max_seconds,
            progress=progress,
            on_failure=on_failure,
        )

    # Half precision is solved in float32. Outside the iteration everything is in the best precision at hand.
    operator = P.to(torch.float32) if P.dtype in (torch.float16, torch.bfloat16) else P
    wide = torch.float32 if P.device.type == "mps" else torch.float64
    seed, mu = signal.to(wide).expand(shape), mu.to(wide)
    # One tensor less another takes torch half of the time of a number less a tensor.
    remaining, rhs = torch.ones_like(mu) - mu, None
    recorded = torch.is_grad_enabled() and (mu.requires_grad or seed.requires_grad)
    if scaling is None and not recorded:
        rhs, sizes = scaled(seed.detach(), remaining.detach(), norm)
    else:
        sizes = size(seed.detach(), norm)
    if not all(map(math.isfinite, sizes.reshape(-1).tolist())):
        checks.finite(signal, "s")
    atol = tol * sizes
    start = (seed if initial is None else initial.to(wide).expand(shape)).detach()
    target = atol
    if scaling is not None:
        # Of size 1, so that no narrower dtype overflows.
        unit = size((seed / scaling.factor).detach(), norm)
        factor = torch.where(unit > 0, unit, 1.0) * scaling.factor
        seed, start = seed / factor, start / factor.detach()
        extra, largest = scaling.rounding * size(seed.detach(), norm), factor.detach().amax(-2, keepdim=True)
        target = torch.clamp(atol / largest - extra, min=0.25 * atol / largest)
    method, why = chosen(solver, operator, mu, shape[-1], tol)
    call = Call(operator, method, tol, budget, on_failure)
    rhs = remaining * seed if rhs is None else rhs
    answer = implicit_solve(call, rhs, mu, initial=start, atol=target)

    y, enclosure = checks.real(answer.x, P.mask), answer.enclosure
    if P.mask is not None:
        mask = P.mask.clone()
        enclosure = enclosure.then(lambda lower, upper: (checks.real(lower, mask), checks.real(upper, mask)))
    bound, rounding, matvecs = answer.error_bound, answer.rounding, answer.matvecs
    if scaling is not None:
        y, scale = factor * y, factor.detach()
        enclosure = enclosure.then(lambda lower, upper: (scale * (lower - extra), scale * (upper + extra)))
        bound, rounding = largest * (bound + extra), largest * (rounding + extra)
    value = y.to(operator.dtype)
    cast = 0.0 if value.dtype == wide else size(value.detach().to(wide) - y.detach(), norm)
    if scaling is not None and scaling.closer is not None and not budget.timed_out:
        missed = bound + cast > atol
        if bool(missed.any()):
            given = signal.detach().to(wide).expand(shape)
            error, products = scaling.closer(given, mu.detach(), y.detach(), max_steps)
            matvecs = matvecs + torch.where(missed.squeeze(-2), products, 0)
            bound = torch.where(missed, torch.minimum(bound, size(error, norm)), bound)
            low = torch.where(missed, y.detach() - error, -torch.inf)
            high = torch.where(missed, y.detach() + error, torch.inf)
            enclosure = enclosure.then(
                lambda lower, upper: (torch.maximum(lower, low), torch.minimum(upper, high))
            )
    if value.dtype != wide:
        bound, rounding = bound + cast, rounding + cast
    how = ending(bound, atol, rounding, operator.dtype, spent(budget, answer.steps))
    found = Outcome(value, enclosure, bound, atol, answer.steps, matvecs)
    return concluded(found, s, norm, on_failure, call="solve", solver=str(method), why=why, how=how)


def _solve_none(P: Transition, s: Tensor, signal: Tensor, mu: Tensor, norm: Norm) -> Solution:
    """The answer to no right-hand side: of the right shape, and a function of the same tensors."""
    y = (1 - mu).to(s.dtype) * signal
    if not P.restarts:
        y = y + mu.to(s.dtype) * P.matmul(signal)
    nothing, counts = signal.detach()[..., :1, :], signal.new_empty(y[..., 0, :].shape, dtype=torch.int64)
    found = Outcome(y, Enclosure.of(y.detach(), y.detach()), nothing, nothing, counts, counts)
    how = Ending("the batch is empty", "")
    return concluded(found, s, norm, "ignore", call="solve", solver="none", why="nothing to solve", how=how)


def _solve_restarting(
    P: Transition, s: Tensor, mu: Tensor, initial: Tensor | None, **options: Any
) -> Solution:
    """The walk of each channel jumps from its open ends to the channel itself, so channels become a batch."""
    checks.nonnegative(s, "s")
    signal = s.unsqueeze(-1) if s.ndim == 1 else s
    mass = signal.sum(-2, keepdim=True)
    if bool((mass == 0).any()):
        raise ValueError(
            's: expected a positive sum in every channel, got 0; with dangling="restart" walks jump to s'
        )

    def apart(x: Tensor) -> Tensor:
        return x.mT.unsqueeze(-1)

    bound = P.restarting_at((signal / mass).mT)
    guess = None if initial is None else apart(initial)
    solution = solve(bound, apart(signal), apart(mu), initial=guess, **options)

    alone = s.ndim == 1

    def as_given(x: Tensor) -> Tensor:
        return x.squeeze(-1) if alone else x

    def beside(x: Tensor) -> Tensor:
        return as_given(x.squeeze(-1).mT)

    return replace(
        solution,
        value=beside(solution.value),
        enclosure=solution.enclosure.then(lambda lower, upper: (beside(lower), beside(upper))),
        error_bound=as_given(solution.error_bound.squeeze(-1)),
        converged=as_given(solution.converged.squeeze(-1)),
        steps=as_given(solution.steps.squeeze(-1)),
        matvecs=as_given(solution.matvecs.squeeze(-1)),
    )


def diffuse(
    P: Transition,
    s: Tensor,
    mu: float | Tensor,
    *,
    solver: Solver | Auto | None = None,
    tol: float | None = None,
    initial: Tensor | None = None,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    progress: Callable[[Progress], object] | None = None,
    on_failure: OnFailure = "warn",
) -> Tensor:
    """The value of `solve`: y = (1 − µ)(I − µP)⁻¹ s, [..., N, K] or [N] as s is.

    ``diffuse(P, s)`` smooths a signal over the graph, ``diffuse(P.T, s)`` carries mass along the walk
    (personalised PageRank with restart distribution s). Arguments, promise and errors are those of `solve`.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.AttentionTransition(torch.zeros(4, 2))
        >>> gd.diffuse(P.T, torch.tensor([1.0, 0.0, 0.0, 0.0]), mu=0.8)
        tensor([0.4000, 0.2000, 0.2000, 0.2000])
    """
    return solve(
        P,
        s,
        mu,
        solver=solver,
        tol=tol,
        initial=initial,
        max_steps=max_steps,
        max_seconds=max_seconds,
        progress=progress,
        on_failure=on_failure,
    ).value


def solve_path(
    P: Transition,
    s: Tensor,
    mus: Sequence[float] | Tensor,
    *,
    solver: Solver | Auto | None = None,
    tol: float | None = None,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    progress: Callable[[Progress], object] | None = None,
    on_failure: OnFailure = "warn",
) -> Solution:
    r"""`solve` for every µ of a grid, from the products that the largest takes alone.

    .. math:: y_m = (1 - \mu_m)(I - \mu_m P)^{-1} s, \quad m = 1 \ldots M

    All start from s, so all search one Krylov space (`solvers.Shifted`). In all it takes the products of the
    largest µ, and one certifying product for each. Promise, gradients and warnings are those of `solve`, for
    each µ on its own.

    Args:
        P: Any transition, [..., N, N].
        s: Signal [..., N, K] or [N], same dtype and device as P. Leading dimensions broadcast with P's.
        mus: µ in [0, 1), a list of numbers or a tensor [M]; in any order, with repetitions if need be.
        solver: How; `solvers.Shifted()` if None. Any other solves for each µ by itself.
        tol: Relative tolerance; 1e-10 in float64, else 1e-5, if None.
        max_steps: Most steps for a µ; None for as many as theory says can help.
        max_seconds: Time after which no further step begins; the backward has as much again.
        progress: Called after every step, of the backward too, with a `Progress`.
        on_failure: What to do where the promise cannot be kept: "warn", "raise" or "ignore".

    Returns:
        One `Solution` whose fields have M in front: `value` [M, ..., N, K], or [M, N]; evidence [M, ..., K].
        `steps` are those after which a µ was done. Products that all share are counted at the largest µ, so
        ``matvecs.sum(0)`` is what each signal took. `value` is differentiable in s, `mus` and P's tensors.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape, device or value does not fit; the message names it.
        ConvergenceError: The promise is not kept under ``on_failure="raise"``.

    Warns:
        ConvergenceWarning: The promise is not kept, here or in the backward, under ``on_failure="warn"``.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.DenseTransition.from_affinity(torch.ones(2, 2, dtype=torch.float64))
        >>> gd.solve_path(P, torch.tensor([0.0, 2.0], dtype=torch.float64), [0.0, 0.5, 0.9]).value
        tensor([[0.0000, 2.0000],
                [0.5000, 1.5000],
                [0.9000, 1.1000]], dtype=torch.float64)
    """
    check_transition(P)
    path = checks.mus(mus, P.device)
    leading = max(checks.floating(s, "s").ndim, 2, len(P.shape))
    return solve(
        P,
        s,
        path.reshape(-1, *[1] * leading),
        solver=Shifted() if solver is None else solver,
        tol=tol,
        max_steps=max_steps,
        max_seconds=max_seconds,
        progress=progress,
        on_failure=on_failure,
    )


def default_tol(dtype: torch.dtype) -> float:
    """The tolerance of a call that names none."""
    return 1e-10 if dtype == torch.float64 else 1e-5
