"""x = (I − MP)⁻¹ b with M = diag(µ): the value by any solver, the gradient by the transposed solve.

For a cotangent g of x, with λ = (I − MP)⁻ᵀ g:

    v = (I − MPᵀ)⁻¹ M g,   λ = g + Pᵀ v,   v = M λ,
    ∂b = λ,   ∂µ = λ ⊙ (P x),   ∂(tensors of P) = the vector-Jacobian product of P x with cotangent v.

So the backward is the same operation on Pᵀ, differentiable again, and holds no graph of the steps.
"""

import sys
import warnings
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from graphdiff.operators.base import Transition
from graphdiff.solution import ConvergenceError, ConvergenceWarning, Enclosure, Norm, Solution
from graphdiff.solvers.base import Budget, Certified, Solver, norm_of, size, solve_certified

OnFailure = Literal["warn", "raise", "ignore"]
# How many times a bound may be its own rounding before more than rounding must be to blame.
HIDDEN = 10.0


@dataclass(frozen=True)
class Call:
    """What forward and backward of one solve share, none of it differentiable."""

    operator: Transition
    solver: Solver
    tol: float
    budget: Budget
    on_failure: OnFailure
    state: Any = None
    """What the solver has prepared for the operator already; for `gradients`, for its transpose."""
    keep: bool = False
    """Whether P x is wanted besides, if no gradient needs it."""


def implicit_solve(call: Call, rhs: Tensor, mu: Tensor, *, initial: Tensor, atol: Tensor) -> Certified:
    """Solve (I − MP) x = b; only `x` of the result carries gradients.

    Args:
        call: Operator, solver and limits.
        rhs: b [..., N, K], float64 where the device has it.
        mu: µ [..., 1 or N, 1 or K], dtype of `rhs`.
        initial: First guess, like `rhs`.
        atol: Largest error allowed in the norm of the operator, [..., 1, K].
    """
    apply: Any = _ImplicitSolve.apply  # without types until after torch 2.11
    return Certified(*apply(call, rhs, mu, initial, atol, *call.operator.tensors()))


class _ImplicitSolve(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: Call, rhs: Tensor, mu: Tensor, initial: Tensor, atol: Tensor, *tensors: Tensor
    ) -> tuple[Any, ...]:
        operator = call.operator
        if any(t.requires_grad for t in tensors):
            operator = operator.with_tensors([t.detach() for t in tensors])
        state = call.state or call.solver.prepare(operator, mu.to(operator.dtype))
        given, keep = (call.solver, state, operator, rhs, mu), call.keep or any(ctx.needs_input_grad)
        answer = solve_certified(*given, initial=initial, atol=atol, budget=call.budget, keep=keep)
        if not any(ctx.needs_input_grad):
            return tuple(answer)
        # The forward's own state, which may hold a matrix, ends here; what the operator has found stays.
        ctx.call, ctx.state = replace(call, operator=operator), call.solver.transposed(state)
        ctx.save_for_backward(mu, answer.x, answer.product, *tensors)
        ctx.mark_non_differentiable(*(x for x in answer[1:] if isinstance(x, Tensor)))
        return tuple(answer)

    @staticmethod
    def backward(ctx: Any, g: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        mu, x, product, *tensors = ctx.saved_tensors
        call = replace(ctx.call, operator=ctx.call.operator.with_tensors(tensors), state=ctx.state)
        wanted = ctx.needs_input_grad[2], any(ctx.needs_input_grad[5:])
        g_rhs, g_mu, g_tensors = gradients(call, mu, x, g, wanted, product)
        return None, g_rhs, g_mu, None, None, *(g_tensors or [None] * len(tensors))


def gradients(
    call: Call, mu: Tensor, x: Tensor, g: Tensor, wanted: tuple[bool, bool], product: Tensor | None = None
) -> tuple[Tensor, Tensor | None, tuple[Tensor | None, ...]]:
    """∂b, ∂µ and those of the operator's tensors for a cotangent g of x; the latter two where wanted.

    Shapes and dtype of g and x are those of b; `product` is P x, if that is known.
    """
    budget, recorded = call.budget.again(), torch.is_grad_enabled()
    adjoint = replace(call, operator=call.operator.T, budget=budget, keep=not recorded)
    # (1 − µ)λ is the gradient of the signal; its error is promised to be at most tol·‖g‖.
    remaining = 1 - mu.amax(-2, keepdim=True)
    atol = call.tol * size(g.detach(), norm_of(adjoint.operator)) / remaining
    b = mu * g
    v = implicit_solve(adjoint, b, mu, initial=(b / (1 - mu)).detach(), atol=atol.detach())
    how = ending(v.error_bound, atol, v.rounding, call.operator.dtype, spent(budget, v.steps))
    report(v.error_bound, atol, call.on_failure, "graphdiff, gradient of a solve", how.advice)
    if recorded or v.product is None:
        g_rhs = g + _product(adjoint.operator, v.x, call.tol)
    else:
        g_rhs = g + v.product.to(g.dtype)

    g_mu: Tensor | None = None
    g_tensors: tuple[Tensor | None, ...] = ()
    if any(wanted):
        y, cotangent = (t.to(call.operator.dtype) for t in (x, v.x))
        # Known products are of no use to who differentiates further.
        known = None if recorded or product is None else product.to(y.dtype)
        if wanted[1]:
            product, g_tensors = call.operator.vjp(y, cotangent, known)
        else:
            product = call.operator.matmul(y) if known is None else known
        if wanted[0]:
            g_mu = (g_rhs * product.to(g.dtype)).sum_to_size(mu.shape)
    return g_rhs, g_mu, g_tensors


def _product(operator: Transition, v: Tensor, tol: float) -> Tensor:
    """P v in the dtype of v; computed in the operator's where its rounding is well below tol."""
    if operator.dtype == v.dtype:
        return operator.matmul(v)
    enough = torch.as_tensor(4 * operator.rounding(operator.dtype) <= tol, device=v.device)
    if not bool(enough.any()):
        return operator.to(v.dtype).matmul(v)
    narrow = operator.matmul(v.to(operator.dtype)).to(v.dtype)
    # Graph by graph, so that batch mates do not change a bit.
    return narrow if bool(enough.all()) else torch.where(enough, narrow, operator.to(v.dtype).matmul(v))


class Spent(NamedTuple):
    """A limit that ended a solve, and what it was."""

    limit: str
    most: float | None


def spent(budget: Budget, steps: Tensor) -> Spent | None:
    """The limit that ended a solve after so many steps, if one did."""
    if budget.timed_out:
        return Spent("max_seconds", budget.max_seconds)
    if budget.max_steps is not None and int(steps.max()) >= budget.max_steps:
        return Spent("max_steps", budget.max_steps)
    return None


class Ending(NamedTuple):
    """Why a solve ended, and what to do where that is too early."""

    told: str
    advice: str


def ending(
    error_bound: Tensor, atol: Tensor, rounding: Tensor, dtype: torch.dtype, limit: Spent | None
) -> Ending:
    """What ended a solve in `dtype`; `rounding` is how much of the bounds is owed to that."""
    kept = error_bound <= atol
    if bool(kept.all()):
        return Ending("reached the tolerance", "")
    if limit is not None:
        return Ending(f"stopped at {limit.limit} = {limit.most}", f"raise {limit.limit} or loosen tol")
    name = str(dtype).removeprefix("torch.")
    if not bool((kept | (error_bound <= HIDDEN * rounding)).all()):
        told = f"the solver stopped short of the tolerance, above what rounding in {name} hides"
        return Ending(told, "try another solver or loosen tol")
    wider = "" if dtype == error_bound.dtype else " or use float64"
    return Ending(f"rounding in {name} allows no more", f"loosen tol{wider}")


class Outcome(NamedTuple):
    """A value and its evidence in the best precision at hand, whatever found it.

    value and enclosure are [..., N, K], the bound and what was allowed [..., 1, K], counts [..., K].
    """

    value: Tensor
    enclosure: Enclosure
    error_bound: Tensor
    atol: Tensor
    steps: Tensor
    matvecs: Tensor


def concluded(
    found: Outcome,
    s: Tensor,
    norm: Norm,
    on_failure: OnFailure,
    *,
    call: str,
    solver: str,
    why: str,
    how: Ending,
) -> Solution:
    """The `Solution` of a public call for a signal s as it was given; warns or raises where one is due.

    The bound counts the cast to the dtype of s, or to float32 where that is half precision. `why` is why this
    solver, `how` how it ended.
    """
    alone, held = s.ndim == 1, torch.promote_types(s.dtype, torch.float32)

    def as_given(x: Tensor) -> Tensor:
        return x.squeeze(-1) if alone else x

    def outward(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
        return as_given(_outward(lower, held, -torch.inf)), as_given(_outward(upper, held, torch.inf))

    converged = found.error_bound <= found.atol
    solution = Solution(
        value=as_given(found.value.to(s.dtype)),
        enclosure=found.enclosure.then(outward),
        error_bound=as_given(found.error_bound.squeeze(-2)),
        converged=as_given(converged.squeeze(-2)),
        steps=as_given(found.steps),
        matvecs=as_given(found.matvecs),
        norm=norm,
        solver=solver,
        reason=f"{why}; {how.told}",
    )
    if not bool(converged.all()):
        what = f"graphdiff.{call}, {solver}, {how.told}"
        report(found.error_bound, found.atol, on_failure, what, how.advice, solution)
    return solution


def _outward(bound: Tensor, dtype: torch.dtype, direction: float) -> Tensor:
    """A bound in another dtype, rounded so that it remains one."""
    if bound.dtype == dtype:
        return bound
    cast = bound.to(dtype)
    inside = cast.to(bound.dtype) > bound if direction < 0 else cast.to(bound.dtype) < bound
    return torch.where(inside, torch.nextafter(cast, torch.full_like(cast, direction)), cast)


def report(
    error_bound: Tensor,
    atol: Tensor,
    on_failure: OnFailure,
    what: str,
    advice: str,
    solution: Solution | None = None,
) -> None:
    """Warn or raise where a bound missed its target."""
    missed = ~(error_bound <= atol)
    if on_failure == "ignore" or not bool(missed.any()):
        return
    worst = int(torch.where(missed, error_bound / atol, 0.0).nan_to_num(torch.inf).argmax())
    message = (
        f"{what}: the error is known to be at most {float(error_bound.flatten()[worst]):.2e} where "
        f"{float(atol.flatten()[worst]):.2e} was asked for ({int(missed.sum())} of {missed.numel()} "
        f"right-hand sides); {advice}"
    )
    if on_failure == "raise":
        raise ConvergenceError(message, solution)
    warnings.warn(message, ConvergenceWarning, stacklevel=_level_of_caller())


def _level_of_caller() -> int:
    """How many frames above the caller of this function the code lies that called the library."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("graphdiff"):
        frame, level = frame.f_back, level + 1
    return level
