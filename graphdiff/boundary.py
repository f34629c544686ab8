"""Clamped nodes: u = values where the mask is set, u = P u elsewhere.

With W the steps of P to other nodes and s their sums row by row, the free nodes U solve

    F(u)_i = Σ_j W_ij (u_j − u_i) / s_i = 0,   that is   A u_U = b,   A = I − (W/s)_UU.

No µ keeps A from being nearly singular, so the certificate takes a weight (theory 13): with v > 0 and
w = A v > 0 on U, |A⁻¹ r| ≤ v · max_i |r_i|/w_i. Here v ≈ A⁻¹1 is the expected time until a clamped node is
reached, scaled to at most 1. `implicit.py` solves (I − MQ) x = r with its certificate max_i |r_i|/(1 − µ_i):
with Q = (W/s)_UU/µ the matrix is A whatever µ is, and with µ = 1 − w the certificate is theory 13's.

What is solved for is a correction: u = u₀ + A⁻¹F(u₀) from a first answer u₀ that needs no certificate. In F
only differences of neighbours are multiplied and summed, so where u hardly changes from node to node F is
hardly rounded; computed as b − A u it would be rounded as u itself, and A⁻¹ makes of that up to max v/min w.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.diffusion import default_tol
from graphdiff.implicit import Call, OnFailure, Outcome, concluded, ending, implicit_solve, spent
from graphdiff.operators.base import Transition, check_transition
from graphdiff.operators.dense import DenseTransition
from graphdiff.operators.grid import grid_walk
from graphdiff.operators.sparse import SparseTransition
from graphdiff.solution import Enclosure, Progress, Solution
from graphdiff.solvers.auto import Auto, chosen
from graphdiff.solvers.base import MAX_REFINEMENTS, Budget, Iterate, Solver
from graphdiff.solvers.direct import Direct
from graphdiff.solvers.multigrid import Multigrid

# How near to 1 the weights of the first, coarse solve are tried: it ends as soon as A v > 0 is certain.
RESTS = (1e-4, 1e-8, 1e-12)
# How far the residual of that solve may be from A v = 1.
COARSE = 0.25
# The smallest part of the largest rounding error that its own weight is made for.
FLOOR = 1e-3
# What is added to every weight between pixels, so that no pixel is cut off.
FAINTEST = 1e-10
# How many nodes an error names.
NAMED = 5


def harmonic(
    P: Transition,
    values: Tensor,
    mask: Tensor,
    *,
    solver: Solver | Auto | None = None,
    tol: float | None = None,
    initial: Tensor | None = None,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    progress: Callable[[Progress], object] | None = None,
    on_failure: OnFailure = "warn",
) -> Solution:
    r"""The harmonic function with given values at clamped nodes.

    .. math:: u_i = \text{values}_i \;\text{(clamped)}, \qquad u_i = \sum_j P_{ij} u_j \;\text{(free)}

    u_i is the expected value where a walk from i first meets a clamped node: with one column of zeros and
    ones for each label, the probabilities that this label is met first. The error of every right-hand side
    is promised to be at most tol times the largest absolute clamped value.

    The walk is taken as the ratios of each row's entries: rows sum to 1 exactly, whatever their rounding. The
    chance to stay at a node changes nothing and is taken out where the entries are at hand (sparse and dense
    walks). All is computed in float64, whatever the dtype of P, where the device has it.

    Args:
        P: A walk, [..., N, N], whose rows sum to 1.
        values: [..., N, K] or [N], same dtype and device as P. Only those of clamped nodes count.
        mask: True at clamped nodes, bool, [..., N]. Leading dimensions broadcast with those of P and values.
        solver: How; `solvers.Auto()` if None.
        tol: Relative tolerance; 1e-10 in float64, else 1e-5, if None.
        initial: First guess of u, shaped like values.
        max_steps: Most steps of the solver, in each of its solves; None for as many as theory says can help.
        max_seconds: As in `solve`, for all solves together, and so is `progress`.
        progress: Called after every step with a `Progress`.
        on_failure: What to do where the promise cannot be kept: "warn", "raise" or "ignore".

    Returns:
        A `Solution` in the maximum norm; its `value` is differentiable in the clamped values and in P's
        tensors. Steps and products count those of the weight too. Where few nodes of a large graph carry
        labels, one column for each class, compare ``value / value.sum(0)``: the columns are nearly constant.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: P is a transpose or restarts, a shape, device or value does not fit, or from some free
            nodes no clamped node can be reached; the message names them.
        ConvergenceError: The promise is not kept under ``on_failure="raise"``.

    Warns:
        ConvergenceWarning: The promise is not kept, here or in the backward, under ``on_failure="warn"``.

    Example:
        >>> import torch, graphdiff as gd
        >>> path = torch.tensor([[0, 1, 2], [1, 2, 3]])
        >>> P = gd.SparseTransition.from_edge_index(path, undirected=True, dtype=torch.float64)
        >>> values = torch.tensor([0.0, 0.0, 0.0, 3.0], dtype=torch.float64)
        >>> sol = gd.harmonic(P, values, mask=torch.tensor([True, False, False, True]))
        >>> sol.value
        tensor([0., 1., 2., 3.], dtype=torch.float64)
        >>> bool(sol.converged)
        True
    """
    check_transition(P)
    if P.stochastic != "rows":
        raise ValueError(
            f"P: expected a walk, whose rows sum to 1, got {type(P).__name__}, whose columns do; give the "
            "walk itself (P.T of this one)"
        )
    if P.restarts:
        raise ValueError(
            f"P: expected a walk that knows where it goes, got {P}, some of whose nodes restart at a signal; "
            "clamp these, or bind the signal with P.restarting_at(distribution)"
        )
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f'on_failure: expected "warn", "raise" or "ignore", got {on_failure!r}')
    if solver is not None and not isinstance(solver, Solver | Auto):
        raise TypeError(f"solver: expected a solver such as solvers.Walk(), got {solver!r}")
    nodes = P.shape[-1]
    signal = checks.signal(values, nodes, "values")
    checks.same_dtype(signal, "values", P.dtype, "P")
    checks.same_device(signal, "values", P.device, "P")
    for tensor in P.tensors():
        checks.finite(tensor, f"the tensors of {type(P).__name__}")
    clamped = checks.clamped_nodes(mask, nodes, "mask")
    checks.same_device(clamped, "mask", P.device, "P")
    tol = checks.positive_number(tol, "tol") if tol is not None else default_tol(values.dtype)
    budget = Budget.checked(max_steps, max_seconds, progress)
    batch = checks.broadcast_batch(
        [P.shape[:-2], signal.shape[:-2], clamped.shape[:-1]], "P, values and mask"
    )
    checks.some_graph(batch, "P, values and mask")
    shape = (*batch, *signal.shape[-2:])
    # Nobody reads padded nodes, nor do they read others: they stay at 0.
    signal = checks.real(signal, P.mask)
    clamped = (clamped if P.mask is None else clamped | ~P.mask).unsqueeze(-1)
    checks.finite(torch.where(clamped, signal.detach(), 0.0), "values at clamped nodes")
    if initial is not None:
        initial = checks.signal(initial, nodes, "initial")
        checks.same_dtype(initial, "initial", P.dtype, "P")
        checks.same_device(initial, "initial", P.device, "P")
        checks.finite(initial, "initial")
        if checks.broadcast_batch([initial.shape, torch.Size(shape)], "initial and values") != shape:
            raise ValueError(
                f"initial: expected shape {list(shape)} like values, got {checks.shape_text(initial)}"
            )
    _check_reachable(P, clamped)

    wide = checks.widest(P.device)
    given = signal.to(wide).expand(shape)
    problem = _Problem(P.to(wide), clamped)
    low, high = problem.range(given.detach())
    atol = tol * torch.maximum(low.abs(), high.abs())
    guess = (low + high) / 2 if initial is None else initial.to(wide).detach()
    method, why = chosen(solver, *problem.system(1 - RESTS[0]), shape[-1], tol)
    call = Call(P, method, tol, budget, on_failure)
    found = _solve(call, problem, given, guess, atol)

    # Half precision is promised before its last cast, as by `solve`.
    held = torch.promote_types(P.dtype, torch.float32)
    value = found.u.to(held)
    error = found.error + (value.detach().to(wide) - found.u.detach()).abs()
    # However bad the answer is, the exact one lies between the clamped values.
    error = torch.minimum(error, torch.maximum((value.detach() - low).abs(), (value.detach() - high).abs()))
    error = torch.where(clamped & (value.detach() == given.detach()), 0.0, error)
    error_bound = error.amax(-2, keepdim=True)
    cast = (value.detach().to(wide) - found.u.detach()).abs()
    rounding = (found.rounding + cast).amax(-2, keepdim=True)
    how = ending(error_bound, atol, rounding, wide, spent(budget, found.steps))
    lower, upper = torch.maximum(value.detach() - error, low), torch.minimum(value.detach() + error, high)
    enclosure = Enclosure.of(lower, upper)
    whole = Outcome(value, enclosure, error_bound, atol, found.steps, found.matvecs)
    why = f"{why}; {found.hardness}"
    return concluded(whole, values, "inf", on_failure, call="harmonic", solver=str(method), why=why, how=how)


@dataclass(frozen=True, eq=False, repr=False)
class _Inside(Transition):
    """Q = (W/s)_UU/µ, with zeros in the rows and columns of clamped nodes: MQ is I − A whatever µ is.

    Its rows sum to as much as 1/µ, so what certifies answers for it is not their sums but 1 − µ ≤ w.
    """

    walk: Transition
    sums: Tensor
    free: Tensor
    mu: Tensor
    log_degree: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[..., N, N]."""
        lead = checks.broadcast_batch([self.walk.shape[:-2], self.free.shape[:-2]], "P and mask")
        return torch.Size([*lead, *self.walk.shape[-2:]])

    @property
    def reversible(self) -> bool:  # type: ignore[override]  # the walk's
        """As the walk."""
        return self.log_degree is not None

    @property
    def sparse(self) -> bool:  # type: ignore[override]  # the walk's
        """As the walk, if the nodes clamped are the same throughout."""
        return self.walk.sparse and len(self.shape) == 2

    def matmul(self, y: Tensor) -> Tensor:
        """Q y."""
        return self.free * self.walk.matmul(self.free * y) / (self.sums * self.mu)

    def rmatmul(self, v: Tensor) -> Tensor:
        """Qᵀ v."""
        return self.free * self.walk.rmatmul(self.free * v / (self.sums * self.mu))

    def rounding(self, dtype: torch.dtype) -> Tensor | float:
        """The walk's, for its product and for s, over µ ≥ 1/2; for entries at hand it is relative to s."""
        return 4 * self.walk.rounding(dtype) + 12 * torch.finfo(dtype).eps

    def transposed_rounding(self, dtype: torch.dtype) -> Tensor | float:
        """The same of the transposed product."""
        return 4 * self.walk.transposed_rounding(dtype) + 12 * torch.finfo(dtype).eps

    def neighbours(self, index: Tensor | Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Every step of Q out of some nodes."""
        if not self.sparse:
            return super().neighbours(index)
        index = self._row_index(index)
        position, node, weight = self.walk.neighbours(index)
        start, free = index[position], self.free.squeeze(-1)
        weight = weight * free[start] * free[node] / (self.sums * self.mu).squeeze(-1)[start]
        return position, node, weight

    def to_scipy(self) -> Any:
        """Q as a `scipy.sparse.csr_array`."""
        from scipy import sparse

        free, sums, mu = (x.detach().flatten().cpu().numpy() for x in (self.free, self.sums, self.mu))
        return (
            sparse.diags_array(free / (sums * mu)) @ self.walk.to_scipy() @ sparse.diags_array(free)
        ).tocsr()


class _Problem:
    """The steps W between different nodes, their sums s, and which nodes are free."""

    def __init__(self, P: Transition, clamped: Tensor) -> None:
        self.clamped, self.free = clamped, (~clamped).to(P.dtype)
        self.degree = P.log_degree if P.reversible else None
        self.edges: tuple[Tensor, Tensor, Tensor] | None = None
        self.walk: Transition = P
        sums = torch.as_tensor(P.row_sums, dtype=P.dtype, device=P.device)
        if isinstance(P, SparseTransition) and P.sparse:
            position, node, weight = P.neighbours(torch.arange(P.shape[-1], device=P.device))
            weight = weight.masked_fill(position == node, 0.0)
            self.walk = P.with_tensors([weight, *P.tensors()[1:]])
            self.edges = position, node, weight
            sums = weight.new_zeros(P.shape[-1]).index_add(0, position, weight).unsqueeze(-1)
        elif isinstance(P, DenseTransition):
            others = 1 - torch.eye(P.shape[-1], dtype=P.dtype, device=P.device)
            self.walk = P.with_tensors([P.P * others, *P.tensors()[1:]])
            sums = (P.P * others).sum(-1, keepdim=True)
        self.sums = torch.where(clamped, 1.0, sums)

    def range(self, given: Tensor) -> tuple[Tensor, Tensor]:
        """The smallest and the largest clamped value of each channel, [..., 1, K]."""
        return (
            torch.where(self.clamped, given, torch.inf).amin(-2, keepdim=True),
            torch.where(self.clamped, given, -torch.inf).amax(-2, keepdim=True),
        )

    def system(self, mu: float | Tensor) -> tuple[_Inside, Tensor]:
        """Q and µ, 0 at clamped nodes."""
        mu = self.free * mu
        divisor = torch.where(self.clamped, 1.0, mu)
        degree: Tensor | None = None
        if self.degree is not None:
            degree = self.degree.detach() + (self.sums.detach() * divisor).log().squeeze(-1)
            # CG gives clamped nodes no weight; the degree of any other keeps them out of its way.
            degree = torch.where(self.clamped.squeeze(-1), -torch.inf, degree)
            degree = degree.maximum(
                degree.masked_fill(degree == -torch.inf, torch.inf).amin(-1, keepdim=True)
            )
        return _Inside(self.walk, self.sums, self.free, divisor, degree), mu

    def defect(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """F(u), 0 at clamped nodes, and what rounding can have changed it by."""
        eps = torch.finfo(u.dtype).eps
        if self.edges is None:
            F = self.free * (self.walk.matmul(u) / self.sums - u)
            largest = u.detach().abs().amax(-2, keepdim=True)
            return F, self.free * (2 * self.walk.rounding(u.dtype) + 4 * eps) * largest
        position, node, weight = self.edges
        steps = weight.unsqueeze(-1) * (u.index_select(-2, node) - u.index_select(-2, position))
        scale = self.free / self.sums
        F = scale * torch.zeros_like(u).index_add(-2, position, steps)
        with torch.no_grad():
            moved = scale * torch.zeros_like(u).index_add(-2, position, steps.abs())
            return F, (self._longest + 3) * eps * (moved / 2 + F.abs())

    @cached_property
    def _longest(self) -> int:
        """Most steps out of a node."""
        assert self.edges is not None
        return int(torch.bincount(self.edges[0]).max())


class _Found(NamedTuple):
    """u [..., N, K], differentiable, its error node by node, counts [..., K], and how hard it was.

    `rounding` is what of the error is owed to that, [..., N, K].
    """

    u: Tensor
    error: Tensor
    rounding: Tensor
    steps: Tensor
    matvecs: Tensor
    hardness: str


class _Weight(NamedTuple):
    """v in (0, 1] and w ≤ A v on the free nodes, both [..., N, 1]; w > 0 where `certain` [..., 1, 1].

    t is v before it was scaled. Where w is not certain and `hidden` [..., 1, 1], rounding is to blame.
    """

    v: Tensor
    w: Tensor
    certain: Tensor
    t: Tensor
    hidden: Tensor

    @classmethod
    def of(cls, t: Tensor, w: Tensor, clamped: Tensor, certain: Tensor, hidden: Tensor) -> "_Weight":
        """Scaled to a largest v of 1, and rounded so that w remains a lower bound."""
        eps = torch.finfo(t.dtype).eps
        largest = torch.where(certain, t, 1.0).amax(-2, keepdim=True).clamp(min=torch.finfo(t.dtype).tiny)
        w = w / largest * (1 - 4 * eps)
        # Smaller ones are lost in 1 − w.
        held = certain & ((w >= 4 * eps) | clamped).all(-2, keepdim=True)
        certain, hidden = held, ~held & (hidden | certain)
        certain_w = torch.where(certain, w, 0.0).masked_fill(clamped, 1.0)
        return cls(torch.where(certain, t / largest, 1.0), certain_w, certain, t, hidden)

    def mu(self) -> Tensor:
        """µ in [1/2, 1) with 1 − µ ≤ w."""
        up = torch.nextafter(1 - self.w, torch.full_like(self.w, 2.0))
        return up.clamp(0.5, 1 - 2 * torch.finfo(up.dtype).eps)

    def told(self) -> str:
        """How long walks are, in words."""
        if not bool(self.certain.all()):
            return "no bound of the steps to a clamped node was found"
        return f"walks take up to about {1 / float(self.w.min()):.1e} steps to a clamped node"

    def bound(self, r: Tensor) -> Tensor:
        """|A⁻¹ r| is at most this."""
        worst = torch.where(self.w > 0, r.abs() / self.w, torch.where(r == 0, 0.0, torch.inf))
        return self.v * worst.amax(-2, keepdim=True) * (1 + 8 * torch.finfo(r.dtype).eps)


def _solve(call: Call, problem: _Problem, given: Tensor, guess: Tensor, atol: Tensor) -> _Found:
    """A weight, a first answer, and a certified correction of it, the only part with a gradient."""
    clamped, free, solver = problem.clamped, problem.free, call.solver
    low, high = problem.range(given.detach())
    with torch.no_grad():
        weight, spent, state = _weigh(call, problem, free, 1.0, torch.zeros_like(free), None)
        operator, mu = problem.system(weight.mu())
        state = _prepared(solver, operator, mu, state)
        start = torch.where(clamped, given, guess)
        steps = matvecs = torch.zeros_like(atol.squeeze(-2), dtype=torch.int64)
        known = torch.full_like(atol, torch.inf)
        for attempt in range(1 + MAX_REFINEMENTS):
            missing, _ = problem.defect(start)
            bound = weight.bound(missing).amax(-2, keepdim=True)
            # As in `solve_certified`: where the bound is no longer halved, rounding has taken over.
            pending = (bound > 0.6 * atol) & ((bound < 0.5 * known) | (attempt == 0))
            limits = call.budget.left(steps)
            pending = pending if limits.steps is None else pending & (limits.steps > 0)
            if call.budget.timed_out or not bool(pending.any()):
                break
            known = bound
            found = solver.solve(state, missing, torch.zeros_like(missing), 0.5 * atol, limits)
            better = start + free * found.x
            better = torch.where(better.isfinite(), better, start).clamp(low, high)
            start = torch.where(pending, better, start)
            steps = steps + torch.where(pending.squeeze(-2), found.steps, 0)
            matvecs = matvecs + torch.where(pending.squeeze(-2), found.matvecs, 0)
    u = torch.where(clamped, given, start)
    missing, slack = problem.defect(u)
    rounded = weight.bound(slack)
    allowed = 0.9 * atol - rounded.amax(-2, keepdim=True)
    if bool(((allowed < 0.25 * atol) & weight.certain).any()):
        # The rounding errors lie where u changes most, which are not the nodes where walks are longest: a
        # weight made for them.
        aim = (slack / atol).nan_to_num(nan=0.0, posinf=0.0).amax(-1, keepdim=True)
        aim = free * (aim / aim.amax(-2, keepdim=True).clamp(min=torch.finfo(aim.dtype).tiny)).clamp(
            min=FLOOR
        )
        with torch.no_grad():
            other, more, _ = _weigh(call, problem, aim, FLOOR, FLOOR * weight.t, state)
        spent = Iterate(other.v, spent.steps + more.steps, spent.matvecs + more.matvecs)
        rounded = torch.minimum(rounded, other.bound(slack))
        allowed = 0.9 * atol - rounded.amax(-2, keepdim=True)
    call = replace(call, operator=operator, state=state)
    answer = implicit_solve(
        call, missing, mu, initial=torch.zeros_like(missing), atol=torch.maximum(allowed, 0.25 * atol)
    )
    eps = torch.finfo(u.dtype).eps
    corrected = u + free * answer.x
    certified = torch.where(weight.certain, answer.error_bound, torch.inf)
    cast = eps * corrected.detach().abs()
    error = (1 + 8 * eps) * (weight.v * certified + rounded) + cast
    hidden = torch.where(weight.hidden, torch.inf, 0.0)
    hidden = torch.where(weight.certain, weight.v * answer.rounding + rounded + cast, hidden)
    return _Found(
        corrected,
        torch.where(clamped, 0.0, error),
        torch.where(clamped, 0.0, hidden),
        spent.steps + steps + answer.steps,
        spent.matvecs + matvecs + answer.matvecs,
        weight.told(),
    )


def _weigh(
    call: Call, problem: _Problem, aim: Tensor, floor: float, t: Tensor, state: Any
) -> tuple[_Weight, Iterate, Any]:
    """A weight by solving A t = aim coarsely, `floor` ≤ aim ≤ 1 on the free nodes; counts, and a state."""
    clamped = problem.clamped
    target = torch.full_like(aim[..., :1, :], COARSE * floor)
    certain = torch.zeros_like(target, dtype=torch.bool)
    steps = matvecs = torch.zeros_like(target.squeeze(-2), dtype=torch.int64)
    w = torch.zeros_like(aim)
    for rest in RESTS:
        operator, mu = problem.system(1 - rest)
        state = _prepared(call.solver, operator, mu, state)
        limits = call.budget.left(steps)
        found = call.solver.solve(state, aim, t.expand_as(aim), target / rest, limits)
        t = torch.where(certain, t, problem.free * found.x)
        steps = steps + torch.where(certain.squeeze(-2), 0, found.steps)
        matvecs = matvecs + torch.where(certain.squeeze(-2), 0, found.matvecs)
        defect, slack = problem.defect(t)
        w = -defect - slack
        certain = ((w > 0) & t.isfinite() | clamped).all(-2, keepdim=True)
        # A solver that kept to its target would have been enough where no more than this is hidden.
        hidden = (slack >= (1 - COARSE) * aim).masked_fill(clamped, False).any(-2, keepdim=True)
        if bool(certain.all()) or spent(call.budget, steps) is not None:
            break
    return _Weight.of(t, w, clamped, certain, hidden), Iterate(t, steps, matvecs), state


def _prepared(solver: Solver, operator: Transition, mu: Tensor, earlier: Any) -> Any:
    """What the solver needs for I − MQ, a matrix that µ does not change: factors are made once."""
    if earlier is not None and isinstance(solver, Direct | Multigrid):
        return earlier._replace(operator=operator, mu=mu)
    return solver.prepare(operator, mu)


def _check_reachable(P: Transition, clamped: Tensor) -> None:
    """From every free node some walk leads to a clamped one."""
    lost = _out_of_reach(P, clamped)
    if bool(lost.any()):
        raise ValueError(
            f"mask: expected a clamped node to be within reach of every free one, got {_named(lost)} from "
            "which none is; clamp a node of each such component, or leave these nodes out"
        )


def _out_of_reach(P: Transition, clamped: Tensor) -> Tensor:
    """From which nodes no walk leads to one of the clamped [..., N, 1], bool [..., N]."""
    with torch.no_grad():
        reached = _reached_by_edges(P, clamped) if P.sparse else _reached_by_products(P, clamped)
    return ~reached.squeeze(-1)


def _named(which: Tensor, what: str = "nodes") -> str:
    """How many are marked, and the first of them."""
    places = [place[0] if len(place) == 1 else tuple(place) for place in which.nonzero().tolist()]
    first = ", ".join(map(str, places[:NAMED]))
    return f"{len(places)} of {which.numel()} {what} ({first}{', …' if len(places) > NAMED else ''})"


def _reached_by_edges(P: Transition, clamped: Tensor) -> Tensor:
    """By a search along the edges, against their direction, from a node beside the graph to all clamped."""
    from scipy import sparse
    from scipy.sparse.csgraph import breadth_first_order

    nodes = P.shape[-1]
    steps = P.to_scipy().tocoo()
    there = steps.data > 0
    into, out_of = (x[there] for x in steps.coords)
    masks = clamped.reshape(-1, nodes).cpu()
    reached = torch.zeros_like(masks)
    for mask, found in zip(masks, reached, strict=True):
        ends = mask.nonzero().squeeze(-1).numpy()
        rows = np.concatenate([out_of, np.full(len(ends), nodes)])
        columns = np.concatenate([into, ends])
        graph = sparse.csr_array((np.ones(len(rows)), (rows, columns)), shape=(nodes + 1, nodes + 1))
        order = breadth_first_order(graph, nodes, return_predecessors=False)
        found[torch.from_numpy(order[1:]).long()] = True
    return reached.reshape(clamped.shape).to(clamped.device)


def _reached_by_products(P: Transition, clamped: Tensor) -> Tensor:
    """By as many products as the longest way has steps, N at most."""
    lead = checks.broadcast_batch([P.shape[:-2], clamped.shape[:-2]], "P and mask")
    reached = clamped.expand(*lead, *clamped.shape[-2:])
    while True:
        further = reached | (P.matmul(reached.to(P.dtype)) > 0)
        if torch.equal(further, reached):
            return reached
        reached = further


@dataclass(frozen=True, eq=False, repr=False)
class RandomWalk:
    """What `random_walker` finds.

    Attributes:
        labels: The most probable label of each pixel, int64, shape of the image; pixels left out keep their
            negative numbers.
        probability: That each label is met first, [K, H, W] or [K, D, H, W] in the order of `names`, float64
            (float32 where the device has no other), differentiable; 0 at pixels left out.
        names: The K labels in rising order, int64 [K].
        solution: The evidence, nodes in the order of the pixels: `solution.lower` and `solution.upper` are
            [N, K].
    """

    labels: Tensor
    probability: Tensor
    names: Tensor
    solution: Solution

    def __repr__(self) -> str:
        return f"RandomWalk({list(self.labels.shape)}, labels {self.names.tolist()}, {self.solution})"


def random_walker(
    image: Any,
    seeds: Any,
    beta: float = 130.0,
    *,
    channel_axis: int | None = None,
    spacing: Sequence[float] | None = None,
    solver: Solver | Auto | None = None,
    tol: float = 1e-6,
    max_steps: int | None = None,
    max_seconds: float | None = None,
    progress: Callable[[Progress], object] | None = None,
    on_failure: OnFailure = "warn",
) -> RandomWalk:
    r"""Segmentation by random walks from every pixel to the first seed (Grady 2006).

    .. math::
        w_{ij} = \exp\Bigl(-\frac{\beta \lVert I_i - I_j \rVert^2}{10 \sigma \sqrt{C} h^2}\Bigr) + 10^{-10}

    between neighbouring pixels, with σ the standard deviation of all entries of I, C the number of channels
    and h the spacing along the step: the scaling of `skimage.segmentation.random_walker`. A pixel gets the
    label that the walk most probably meets first. An image without contrast has w = 1.

    Args:
        image: I: floating-point tensor or array, [H, W] or [D, H, W], with channels [..., C, ...] where
            `channel_axis` says. Numbers of uint8, and in arrays of uint16, are divided by the largest of
            their type; an array of bool is 0 and 1.
        seeds: Integers, shape of the image without its channels: labels > 0, 0 where unknown, < 0 for pixels
            to leave out, which no walk enters.
        beta: β ≥ 0: the larger, the rarer a walk goes where colours differ.
        channel_axis: Axis of the channels in `image`, None if it has none.
        spacing: Distance of neighbours along each axis; 1 if None.
        solver: How; for an image on the CPU `solvers.Direct()`, else `solvers.Auto()`, if None.
        tol: Largest error of a probability.
        max_steps: Most steps of the solver; None for as many as theory says can help.
        max_seconds: As in `harmonic`, and so is `progress`.
        progress: Called after every step with a `Progress`.
        on_failure: What to do where the promise cannot be kept: "warn", "raise" or "ignore".

    Returns:
        A `RandomWalk`: `labels`, `probability`, differentiable in an image that is a floating-point tensor,
        and the `Solution` that certifies it.

    Raises:
        TypeError: An argument is of the wrong type or dtype.
        ValueError: A shape or value does not fit, fewer than two labels are given, or pixels left out cut
            others off from every seed; the message names them.
        ConvergenceError: The promise is not kept under ``on_failure="raise"``.

    Warns:
        ConvergenceWarning: The promise is not kept, here or in the backward, under ``on_failure="warn"``.

    Example:
        >>> import torch, graphdiff as gd
        >>> image = torch.tensor([[0.0, 0.3, 0.7, 1.0]], dtype=torch.float64)
        >>> found = gd.random_walker(image, torch.tensor([[1, 0, 0, 2]]), beta=20)
        >>> found.labels
        tensor([[1, 1, 2, 2]])
        >>> found.probability[0]
        tensor([[1.0000, 0.7097, 0.2903, 0.0000]], dtype=torch.float64)
    """
    pixels = _pixels(image, channel_axis)
    sides = pixels.shape[1:]
    marks = _marks(seeds, sides, pixels.device)
    beta = checks.nonnegative_number(beta, "beta")
    distances = _spacing(spacing, len(sides))
    names = torch.unique(marks[marks > 0])
    if len(names) < 2:
        raise ValueError(
            f"seeds: expected pixels of at least two labels > 0, got {names.tolist()}; a walk then meets one "
            "label or none, and there is nothing to tell apart"
        )
    kept = marks.flatten() >= 0
    centred = pixels - pixels.mean()
    variance = centred.square().mean()
    # The square root of a variance of 0 has no gradient; without contrast no distance is scaled.
    deviation = torch.where(variance > 0, variance, 1.0).sqrt()
    rate = beta / (10 * deviation * len(pixels) ** 0.5)

    def log_weight(distance: Tensor, steps: Tensor) -> Tensor:
        lengths = (steps.abs() * torch.tensor(distances, device=steps.device)).sum(-1)
        exponent = -rate * distance / lengths.to(distance.dtype) ** 2
        return torch.logaddexp(exponent, exponent.new_tensor(FAINTEST).log())

    P = grid_walk(pixels, log_weight, kept=kept)
    values = (marks.flatten().unsqueeze(-1) == names).to(P.dtype)
    if solver is None and len(sides) == 2 and P.device.type == "cpu":
        solver = Direct()
    try:
        solution = harmonic(
            P,
            values,
            marks.flatten() != 0,
            solver=solver,
            tol=tol,
            max_steps=max_steps,
            max_seconds=max_seconds,
            progress=progress,
            on_failure=on_failure,
        )
    except ValueError:
        lost = _out_of_reach(P, marks.reshape(-1, 1) != 0)
        if not bool(lost.any()):
            raise
        raise ValueError(
            "seeds: expected a way to a seed from every pixel, got "
            f"{_named(lost.reshape(sides), 'pixels')} that those left out cut off; leave them out too, "
            "with a negative number, or seed them"
        ) from None
    best = names[solution.value.detach().argmax(-1)].reshape(sides)
    return RandomWalk(
        torch.where(marks < 0, marks, best),
        solution.value.mT.reshape(len(names), *sides),
        names,
        solution,
    )


def _pixels(image: Any, channel_axis: int | None) -> Tensor:
    """The image as [C, H, W] or [C, D, H, W] in the best precision at hand."""
    largest = 1.0
    if not isinstance(image, Tensor):
        image = np.asarray(image)
        if image.dtype == np.bool_ or image.dtype in (np.uint8, np.uint16):
            largest = 1.0 if image.dtype == np.bool_ else float(np.iinfo(image.dtype).max)
        elif image.dtype.kind != "f":
            raise TypeError(
                f"image: expected floating-point numbers, uint8, uint16 or bool, got {image.dtype}; convert "
                "and scale it"
            )
        image = torch.from_numpy(image.astype(np.float64))
    elif image.dtype == torch.uint8:
        image, largest = image.to(torch.float32), 255.0
    pixels = checks.floating(image, "image").to(checks.widest(image.device)) / largest
    given = checks.shape_text(pixels)
    if channel_axis is not None:
        if not (isinstance(channel_axis, int) and -pixels.ndim <= channel_axis < pixels.ndim):
            raise ValueError(
                f"channel_axis: expected an axis of an image of shape {given}, got {channel_axis!r}"
            )
        pixels = pixels.movedim(channel_axis, 0)
    else:
        pixels = pixels.unsqueeze(0)
    if pixels.ndim not in (3, 4) or pixels.numel() == 0:
        raise ValueError(
            f"image: expected shape [H, W] or [D, H, W], not empty, with one axis more where channel_axis= "
            f"names it, got {given}"
        )
    checks.finite(pixels, "image")
    return pixels


def _marks(seeds: Any, sides: Sequence[int], device: torch.device) -> Tensor:
    """The seeds as int64 of the image's shape."""
    if isinstance(seeds, Tensor):
        marks = seeds
        checks.same_device(marks, "seeds", device, "the image")
    else:
        array = np.asarray(seeds)
        marks = torch.from_numpy(array.astype(np.int64) if array.dtype.kind in "iu" else array).to(device)
    if marks.is_floating_point() or marks.is_complex() or marks.dtype == torch.bool:
        raise TypeError(
            f"seeds: expected integers, got {marks.dtype}; convert them, for example with .long()"
        )
    checks.shaped(marks, "seeds", sides, "that of the image without channels")
    return marks.long()


def _spacing(spacing: Sequence[float] | None, dimensions: int) -> list[float]:
    if spacing is None:
        return [1.0] * dimensions
    distances = [checks.positive_number(h, "spacing") for h in spacing]
    if len(distances) != dimensions:
        raise ValueError(
            f"spacing: expected {dimensions} numbers, one for each axis of the image, got {len(distances)}"
        )
    return distances
