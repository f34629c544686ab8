"""(I − µP) y = (1 − µ)s for many µ at once, from the products that the largest takes alone.

From y⁰ = s the residual is µ(P − I)s whatever µ is. With w = (P − I)s and y = s + e, division by µ leaves

    (1/µ · I − P) e = w:

one matrix and one right-hand side, shifted. So all Krylov spaces are the same, and where the residual of the
largest µ is ρ, that of another is a number times ρ, known without a product (Frommer and Glässner 1998 for
conjugate gradients, Frommer 2003 for BiCGSTAB; for walks the number is a power of µ).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from graphdiff.operators.base import Transition
from graphdiff.solvers.auto import SLOW, WATCHED_STEPS, WatchedWalk
from graphdiff.solvers.base import (
    Iterate,
    Limits,
    Problem,
    Solver,
    carry_on,
    inner,
    norm_of,
    rate_of,
    remaining_of,
    size,
    steps_to,
)
from graphdiff.solvers.cg import CG, LOSS, Weighted
from graphdiff.solvers.chebyshev import Chebyshev
from graphdiff.solvers.walk import Walk


@dataclass(frozen=True)
class Shifted(Solver):
    """One Krylov space for a whole path of µ: what `solve_path` uses.

    µ [M, 1, …, 1], one more dimension than P and s have, asks for a path. Reversible walks are solved by
    conjugate gradients. On others walks are watched, as by `Auto`, and where they are slow BiCGSTAB goes on;
    both share their products among all µ too. Each µ and each signal stops on its own. What rounding leaves
    to be refined, a first guess that is not s, and the backward, have a right-hand side for each µ, and are
    solved by CG, or walks and BiCGSTAB, one by one in a batch.

    Of a path the products that all µ share are counted once, at the largest µ; so the sum of `matvecs` over
    the path is what each signal took in all.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.AttentionTransition(torch.tensor([[2.0], [1.0], [0.0]], dtype=torch.float64))
        >>> s = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
        >>> mu = torch.tensor([0.5, 0.99], dtype=torch.float64).reshape(2, 1, 1)
        >>> gd.solve(P, s, mu, solver=gd.solvers.Shifted()).matvecs
        tensor([1, 4])
    """

    def prepare(self, operator: Transition, mu: Tensor) -> Weighted | Problem:
        """The weights of the inner product, where the walk is reversible."""
        return CG().prepare(operator, mu) if operator.reversible else Problem(operator.held(), mu)

    def solve(
        self, state: Weighted | Problem, rhs: Tensor, initial: Tensor, target: Tensor, limits: Limits
    ) -> Iterate:
        """Iterate for the largest µ and let the others follow, until every bound is below its target."""
        mu = state.mu
        if mu.numel() == 1 and (mu.ndim < rhs.ndim or len(state.operator.shape) == rhs.ndim):
            # A path of one, without a dimension of its own.
            lifted = state._replace(mu=mu.reshape(1, *[1] * rhs.ndim))
            steps = None if limits.steps is None else limits.steps.unsqueeze(0)
            b, guess, goal = (x.unsqueeze(0) for x in (rhs, initial, target))
            found = self.solve(lifted, b, guess, goal, limits._replace(steps=steps))
            return Iterate(*(x.squeeze(0) for x in found))
        if not _is_path(state, rhs, initial):
            if isinstance(state, Weighted):
                return CG().solve(state, rhs, initial, target, limits)
            return WatchedWalk().solve(state, rhs, initial, target, limits)

        path = _Path(state.operator, mu, initial[0], target, limits)
        plain = Problem(state.operator, mu)
        if isinstance(state, Weighted):
            unfinished = _conjugate_gradients(path, state.log_weight)
            # As after CG alone: Chebyshev needs no weights to see small nodes by.
            return carry_on(Chebyshev(), plain, rhs, path.reached(), unfinished, target, limits)
        _walk(path)
        unfinished = _bicgstab(path)
        return carry_on(Walk(), plain, rhs, path.reached(), unfinished, target, limits)


def _is_path(state: Weighted | Problem, rhs: Tensor, initial: Tensor) -> bool:
    """Whether µ alone tells the problems along the first dimension apart, and all start from their signal."""
    operator, mu = state.operator, state.mu
    if mu.ndim != rhs.ndim or mu.numel() != len(mu) or len(operator.shape) >= rhs.ndim:
        return False
    start = initial[:1]
    # b = (1 − µ)s up to the rounding of b, of µ and of s, which their certificate counts anyway.
    close = 4 * torch.finfo(rhs.dtype).eps * start.abs()
    return bool((initial == start).all()) and bool(((rhs - (1 - mu) * start).abs() <= close).all())


class _Path:
    """Where every µ stands, the largest first: its y, and that its residual is µ · share · residual.

    Vectors are [M, ..., N, K], or [..., N, K] where all share them, in the dtype of the signal; numbers are
    [M, ..., 1, K] and in float64.
    """

    def __init__(
        self, operator: Transition, mu: Tensor, start: Tensor, target: Tensor, limits: Limits
    ) -> None:
        self.operator, self.norm, self.limits = operator, norm_of(operator), limits
        self.order = mu.flatten().argsort(descending=True, stable=True)
        self.mu = mu[self.order].to(torch.float32 if mu.device.type == "mps" else torch.float64)
        self.remaining = remaining_of(operator, self.mu).amin(-2, keepdim=True)
        self.target = target[self.order]
        self.steps = torch.zeros_like(self.target, dtype=torch.int64)
        self.y = start.expand(len(mu), *start.shape).clone()
        self.residual = operator.matmul(start) - start
        self.share = torch.ones_like(self.target, dtype=self.mu.dtype)
        self.products = torch.ones_like(self.steps[0])
        self.bound = self.measured()
        self.active = (self.bound > self.target) & (self.steps < self.within(self.steps + 1))

    def within(self, steps: Tensor) -> Tensor:
        """So many steps, or as many as are left of each µ, in the order of this path."""
        left = self.limits.steps
        return steps if left is None else torch.minimum(steps, left[self.order])

    def measured(self) -> Tensor:
        """‖y* − y‖ ≤ this, were there no rounding."""
        return self.mu * self.share.abs() * size(self.residual, self.norm) / self.remaining

    def rows(self) -> int:
        """How many µ, from the largest on, may still have something to do."""
        return int(self.active.flatten(1).any(1).nonzero().max()) + 1

    def add(self, rows: int, number: Tensor, vector: Tensor) -> None:
        """y += number · vector for the first so many µ."""
        self.y[:rows] += number[:rows].to(self.y.dtype) * vector

    def judge(self, going: Tensor) -> None:
        """After a step of the active: new bounds; those stop that are done or not `going` on."""
        self.bound = torch.where(self.active, self.measured(), self.bound)
        going = self.active & (self.bound > self.target) & going
        self.leave(self.active & ~self.limits.going_on(going, self.steps, self.bound))

    def leave(self, leaving: Tensor) -> None:
        """These µ stop, one step of walking further: its product is the one that the certificate computes."""
        number = torch.where(leaving, self.mu * self.share, 0.0)
        for row in leaving.flatten(1).any(1).nonzero().flatten().tolist():
            self.y[row] += number[row].to(self.y.dtype) * self.residual
        self.active = self.active & ~leaving

    def reached(self) -> Iterate:
        """The answers in the order of the µ that were given."""
        back = self.order.argsort()
        # What all share is counted once, with the largest.
        matvecs = torch.zeros_like(self.steps)
        matvecs[0] = self.products
        return Iterate(self.y[back], self.steps[back].squeeze(-2), matvecs[back].squeeze(-2))

    def shifts(self) -> tuple[Tensor, Tensor]:
        """1/µ of the largest µ, and how far the others' lie above it; nothing to do where µ = 0."""
        positive = self.mu > 0
        inverse = 1 / torch.where(positive, self.mu, 1.0)
        return inverse[0], torch.where(positive, inverse - inverse[0], 0.0)


def _following(shift: Tensor, alpha: Tensor, before: Tensor, beta: Tensor, ratio: Tensor) -> Tensor:
    """What the residuals of shifted systems shrink by beyond the first one's, from its coefficients.

    `alpha` is the step just taken, `before` the one before it and `beta` the conjugation between the two;
    `ratio` is the answer of the step before.
    """
    return 1 / (1 + shift * alpha + alpha * beta / before * (1 - ratio))


def _conjugate_gradients(path: _Path, log_weight: Tensor) -> Tensor:
    """Until done or at a loss; what is unfinished, in the order of the given µ."""
    dtype, operator = path.y.dtype, path.operator
    weight = log_weight.to(path.mu.dtype).exp()
    inverse, shift = path.shifts()
    # Limits as for CG alone: theory's count, from the D-norm to the promise's and back.
    rate, bound = rate_of(operator, path.mu), path.bound
    spread = (log_weight.amin(-2, keepdim=True) / 2).to(path.mu.dtype).exp()
    limit = path.within(10 + 2 * steps_to(spread * path.target / 2, bound, rate))
    patience = 10 + steps_to(torch.ones_like(bound), torch.full_like(bound, 8.0), rate)
    halved_at, halved = path.steps, bound
    first, first_residual, largest = path.y[0].clone(), path.residual, LOSS / torch.finfo(dtype).eps * bound

    direction = path.residual
    directions = direction.expand_as(path.y).clone()
    square = inner(weight, path.residual, path.residual)
    ratio = torch.ones_like(path.share)
    before, beta = torch.ones_like(square), torch.zeros_like(square)
    while bool(path.active.any()):
        image = inverse.to(dtype) * direction - operator.matmul(direction)
        curvature = inner(weight, direction, image)
        running = path.active.any(0) & (curvature > 0)
        # No curvature, no step: that is rounding, or an operator that is not what it says.
        path.leave(path.active & ~running)
        if not bool(running.any()):
            break
        rows = path.rows()
        alpha = torch.where(running, square / curvature, 0.0)
        ratio = torch.where(path.active, _following(shift, alpha, before, beta, ratio), ratio)
        path.add(rows, torch.where(path.active, alpha * ratio, 0.0), directions[:rows])
        path.residual = path.residual - alpha.to(dtype) * image
        path.share = torch.where(path.active, path.share * ratio, path.share)
        path.steps, path.products = path.steps + path.active, path.products + running
        following = inner(weight, path.residual, path.residual)
        before, beta = torch.where(running, alpha, 1.0), torch.where(running, following / square, 0.0)
        square = following
        direction = path.residual + beta.to(dtype) * direction
        directions[:rows] *= (beta * ratio.square())[:rows].to(dtype)
        directions[:rows] += path.share[:rows].to(dtype) * path.residual
        measured = path.measured()
        halves = path.active & (measured < 0.5 * halved)
        halved_at = torch.where(halves, path.steps, halved_at)
        halved = torch.where(halves, measured, halved)
        path.judge((measured < largest) & (path.steps < limit) & (path.steps - halved_at < patience))
    lost = (path.bound > path.target) & (path.bound >= largest)
    if bool(lost.any()):
        path.y = torch.where(lost, first + path.mu.to(dtype) * first_residual, path.y)
    return (path.bound > path.target)[path.order.argsort()]


def _walk(path: _Path) -> None:
    """Powers of P serve all µ; where they are slow for the largest, a channel's µ all stop walking."""
    limit = path.within(1 + steps_to((1 - path.mu) / 2 * path.target, path.mu * path.bound, path.mu))
    walking = path.active.any(0)
    before = torch.full_like(path.bound[0], torch.inf)
    walked = 0
    while True:
        # The step of `leave` comes with this residual, and leaves at most µ of its error.
        path.bound = torch.where(path.active & walking, path.mu * path.measured(), path.bound)
        path.steps = path.steps + (path.active & walking)
        going = path.active & walking & (path.bound > path.target) & (path.steps < limit)
        path.leave(path.active & walking & ~path.limits.going_on(going, path.steps, path.bound))
        walking = walking & path.active.any(0)
        if walked % WATCHED_STEPS == 0:
            now = size(path.residual, path.norm)
            slow = torch.where(path.active, path.mu, 0.0).amax(0) ** WATCHED_STEPS * now
            walking = walking & ~(slow > SLOW**WATCHED_STEPS * before)
            before = now
        if not bool(walking.any()):
            return
        number = torch.where(path.active & walking, path.mu * path.share, 0.0)
        path.add(path.rows(), number, path.residual)
        path.share = torch.where(path.active & walking, path.share * path.mu, path.share)
        path.residual = torch.where(walking, path.operator.matmul(path.residual), path.residual)
        path.products = path.products + walking
        walked += 1


def _bicgstab(path: _Path) -> Tensor:
    """From where the walks have left off; what is unfinished, in the order of the given µ."""
    dtype, operator = path.y.dtype, path.operator
    one = torch.ones((), dtype=path.mu.dtype, device=path.mu.device)
    inverse, shift = path.shifts()
    path.bound = torch.where(path.active, path.measured(), path.bound)
    limit = path.within(path.steps + 10 + (steps_to(path.target, path.bound, path.mu) + 1) // 2)
    first, first_share, first_residual = path.y.clone(), path.share, path.residual
    first_bound, entered = path.bound, path.active

    shadow = direction = path.residual
    directions = path.share.to(dtype) * direction
    ratio = torch.ones_like(path.share)
    before, beta = torch.ones_like(path.bound[0]), torch.zeros_like(path.bound[0])
    product = inner(one, shadow, path.residual)
    while bool(path.active.any()):
        image = inverse.to(dtype) * direction - operator.matmul(direction)
        alpha = product / inner(one, shadow, image)
        half = path.residual - alpha.to(dtype) * image
        second = inverse.to(dtype) * half - operator.matmul(half)
        omega = inner(one, second, half) / inner(one, second, second)
        running = path.active.any(0)
        path.products = path.products + 2 * running
        follows = _following(shift, alpha, before, beta, ratio)
        # A vanishing product or step is a breakdown, for all µ or, where its own overflows, for one.
        sound = torch.isfinite(alpha * omega * follows) & (alpha * omega * follows != 0)
        sound = sound & (1 + omega * shift != 0)
        path.active = path.active & sound
        if not bool(path.active.any()):
            break
        rows, active = path.rows(), path.active
        alpha, omega = (torch.where(active.any(0), x, 0.0) for x in (alpha, omega))
        ratio = torch.where(active, follows, ratio)
        own_alpha, own_omega = alpha * ratio, omega / (1 + omega * shift)
        halfway = path.share * ratio
        path.add(rows, torch.where(active, own_alpha, 0.0), directions[:rows])
        path.add(rows, torch.where(active, own_omega * halfway, 0.0), half)
        # What the second product takes off the directions follows from the residuals before and after.
        undone = torch.where(active, own_omega / own_alpha, 0.0)
        directions[:rows] -= (undone * path.share)[:rows].to(dtype) * path.residual
        directions[:rows] += (undone * halfway)[:rows].to(dtype) * half
        path.residual = torch.where(active.any(0), half - omega.to(dtype) * second, path.residual)
        path.share = torch.where(active, halfway / (1 + omega * shift), path.share)
        path.steps = path.steps + active
        following = inner(one, shadow, path.residual)
        before = torch.where(active.any(0), alpha, 1.0)
        beta = torch.where(active.any(0), following / product * (alpha / omega), 0.0)
        product = following
        direction = path.residual + beta.to(dtype) * (direction - omega.to(dtype) * image)
        directions[:rows] *= (beta * ratio.square())[:rows].to(dtype)
        directions[:rows] += path.share[:rows].to(dtype) * path.residual
        path.judge(path.steps < limit)
    # What broke down goes on from where it entered.
    back = entered & ~(path.bound < first_bound)
    if bool(back.any()):
        again = first + (path.mu * first_share).to(dtype) * first_residual
        path.y = torch.where(back, again, path.y)
    return (entered & (path.bound > path.target))[path.order.argsort()]
