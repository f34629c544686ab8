"""(I − MP) x = b by conjugate gradients in the inner product in which a reversible walk is self-adjoint."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.operators.base import Transition
from graphdiff.solvers.base import (
    InnerProduct,
    Iterate,
    Limits,
    Problem,
    Solver,
    bounding,
    carry_on,
    check_reversible,
    inner,
    rate_of,
    size,
    steps_to,
)
from graphdiff.solvers.chebyshev import Chebyshev

# Residuals that grow until rounding costs this part of the first one: the D-norm is blind to nodes of small
# degree.
LOSS = 1e-4


class Weighted(NamedTuple):
    """The operator, µ [..., 1 or N, 1 or K], and log d − max log d, [..., N, 1]."""

    operator: Transition
    mu: Tensor
    log_weight: Tensor


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients with ⟨x, y⟩ = Σ d_i x_i y_i / µ_i (theory 5, 9): no square roots, no copy of P.

    For reversible walks and their transposes. One product a step; at most the steps of `Chebyshev`, and
    far fewer where few eigenvalues lie near 1. Only ratios of degrees matter, and where these are large,
    inner products are summed in float64, so degrees may differ by many orders of magnitude. Where they differ
    so much that the smallest do not count, or rounding stops it, `Chebyshev` goes on.

    Raises:
        ValueError: The walk is not known to be reversible.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.AttentionTransition(torch.tensor([[2.0], [1.0], [0.0]], dtype=torch.float64))
        >>> s = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        >>> int(gd.solve(P, s, mu=0.99, solver=gd.solvers.CG()).steps)
        2
    """

    def prepare(self, operator: Transition, mu: Tensor) -> Weighted:
        """The weights of the inner product."""
        return weighted(operator, mu, "CG")

    def solve(self, state: Weighted, rhs: Tensor, initial: Tensor, target: Tensor, limits: Limits) -> Iterate:
        """Iterate until the bound of each right-hand side is below its target."""
        operator, mu, _ = state
        product, y, residual, unit = started(state, rhs, initial)
        bounded = bounding(operator, mu)
        square, bound = product(residual, residual), unit * bounded(residual)
        steps = torch.zeros(*rhs.shape[:-2], 1, rhs.shape[-1], dtype=torch.int64, device=rhs.device)
        most, patience = allowance(state, target, bound)
        limit = limits.within(most)
        active = (bound > target) & (steps < limit)
        halved_at, halved = steps, bound
        first, first_residual, largest = y, residual, LOSS / torch.finfo(rhs.dtype).eps * bound
        # What changes at every step is changed where it stands: new memory would cost as much as the sums.
        y, residual, direction = (x.expand_as(residual).clone() for x in (y, residual, residual))
        image, minus = torch.empty_like(residual), -mu
        while bool(active.any()):
            torch.addcmul(direction, operator.matmul(direction), minus, out=image)
            curvature = product(direction, image)
            # No curvature, no step: that is rounding, or an operator that is not what it says.
            active = active & (curvature > 0)
            step = torch.where(active, square / curvature, 0.0).to(rhs.dtype)
            y.addcmul_(direction, step * unit)
            residual.addcmul_(image, -step)
            steps = steps + active
            following = product(residual, residual)
            turn = torch.where(active, following / square, 0.0).to(rhs.dtype)
            torch.addcmul(residual, direction, turn, out=direction)
            square = following
            bound = torch.where(active, unit * bounded(residual), bound)
            halves = bound < 0.5 * halved
            halved_at, halved = torch.where(halves, steps, halved_at), torch.where(halves, bound, halved)
            active = active & (bound > target) & (bound < largest) & (steps < limit)
            active = limits.going_on(active & (steps - halved_at < patience), steps, bound)
        lost = (bound > target) & (bound >= largest)
        if bool(lost.any()):
            y, residual = torch.where(lost, first, y), torch.where(lost, first_residual, residual)
        # One step of walking more: its product is the one that the certificate computes.
        reached = Iterate(torch.addcmul(y, residual, unit), steps.squeeze(-2), steps.squeeze(-2) + 1)
        # Where degrees differ too much for the D-norm to see the smallest, Chebyshev, which has no use for
        # them, goes on.
        problem = Problem(operator, mu)
        return carry_on(Chebyshev(), problem, rhs, reached, bound > target, target, limits)


def weighted(operator: Transition, mu: Tensor, solver: str) -> Weighted:
    """The walk held for products and its weights, for who needs it to be reversible."""
    held = operator.held()
    log_degree = check_reversible(held, solver).unsqueeze(-1)
    return Weighted(held, mu, log_degree - log_degree.amax(-2, keepdim=True))


class Start(NamedTuple):
    """The inner product, the first iterate y, and its residual, which is that many units [..., 1, K]."""

    product: InnerProduct
    y: Tensor
    residual: Tensor
    unit: Tensor


def started(state: Weighted, rhs: Tensor, initial: Tensor) -> Start:
    """Where conjugate gradients begin."""
    operator, mu, log_weight = state
    wide = torch.float32 if rhs.device.type == "mps" else torch.float64
    weight, y = log_weight.to(wide).exp(), initial
    if mu.shape[-2] > 1:
        # Where µ_i = 0 the answer is b_i; started there, no direction ever has an entry at i.
        y = torch.where(mu == 0, rhs, y)
        weight = torch.where(mu == 0, 0.0, weight / mu.to(wide))
    batch = checks.broadcast_batch([operator.shape[:-2], rhs.shape[:-2]], "P and s")
    residual, guessed = rhs.expand(*batch, *rhs.shape[-2:]), y.any(-2, keepdim=True)
    if bool(guessed.any()):
        residual = torch.addcmul(y, operator.matmul(y), -mu)
        torch.sub(rhs, residual, out=residual)
    # Then no square of a small residual is 0.
    largest = size(residual, "inf")
    unit = torch.where(largest > 0, largest, 1.0)
    residual = residual / unit
    product = InnerProduct(weight, residual.shape, residual.dtype)
    if bool(guessed.any()) and mu.shape[-2] == 1:
        # The slowest mode is known: 1, or d for the transpose. The error of a signal has none of it, but
        # that of another first guess may; taking it out costs no product.
        mode = (log_weight.amin(-2, keepdim=True) - log_weight).to(wide).exp()
        if operator.stochastic == "rows":
            mode = torch.ones_like(mode)
        length, mode = inner(weight, mode, mode), mode.to(rhs.dtype)
        share = product(residual, mode)
        # No more than rounding is none: nodes that a signal does not reach stay at exactly 0.
        large = share.abs() > product.accuracy * (length * product(residual, residual)).sqrt()
        # A signal's own first guess decides, not those beside it.
        large = large & guessed
        if bool(large.any()):
            part = torch.where(large, share / length, 0.0).to(rhs.dtype)
            residual.addcmul_(mode, -part)
            y = torch.addcmul(y, mode, part * unit / (1 - mu))
    return Start(product, y, residual, unit)


def allowance(state: Weighted, target: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """The most steps that can help, [..., 1, K], and how many of them may leave the bound unhalved."""
    operator, mu, log_weight = state
    wide = torch.float32 if bound.device.type == "mps" else torch.float64
    rate = rate_of(operator, mu)
    # Theory's count, from the D-norm to the promise's and back; rounding delays CG, hence twice.
    spread = (log_weight.amin(-2, keepdim=True) / 2).to(wide).exp()
    most = 10 + 2 * steps_to(spread * target / 2, bound, rate)
    # Halving the error takes no more than this, if the D-norm sees it.
    return most, 10 + steps_to(torch.ones_like(bound), torch.full_like(bound, 8.0), rate)
