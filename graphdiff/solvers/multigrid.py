"""(I − MP) x = b by conjugate gradients on D M⁻¹(I − MP), preconditioned by algebraic multigrid."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphdiff.operators.base import Transition
from graphdiff.solvers.base import Iterate, Limits, Solver, bounding, carry_on, check_reversible, inner
from graphdiff.solvers.cg import CG

# A cycle gains a digit in a few steps; an error not halved by this many is in the hands of rounding.
PATIENCE = 60
# log d − max log d that still counts.
LEAST = -600.0
# Unknowns of a matrix that is factorised rather than made coarser.
COARSEST = 200


class Hierarchy(NamedTuple):
    """The operator, µ, log d − max log d [N, 1] of the walk that is no transpose, and cycles.

    There is one for each µ, in the order of its leading dimensions and channels.
    """

    operator: Transition
    mu: Tensor
    log_weight: Tensor
    cycles: list[Any]


@dataclass(frozen=True)
class Multigrid(Solver):
    """Conjugate gradients preconditioned by a V-cycle of Ruge and Stüben's algebraic multigrid, by pyamg.

    For sparse reversible walks on the CPU with µ near 1, grids and meshes above all: the number of steps
    hardly grows with their size. The symmetric matrix D M⁻¹(I − MP) has the signs that the method wants. In
    float64; needs pyamg (extra ``multigrid``). Where rounding stops it, `CG` goes on.

    Raises:
        ImportError: pyamg is not installed.
        ValueError: The walk is not sparse, not known to be reversible, or not on the CPU.

    Example:
        >>> import torch, graphdiff as gd
        >>> path = torch.stack([torch.arange(999), torch.arange(1, 1000)])
        >>> P = gd.SparseTransition.from_edge_index(path, undirected=True, dtype=torch.float64)
        >>> s = torch.eye(1000, dtype=torch.float64)[0]
        >>> gd.solve(P, s, mu=0.999, solver=gd.solvers.Multigrid()).solver  # doctest: +SKIP
        'Multigrid()'
    """

    def prepare(self, operator: Transition, mu: Tensor) -> Hierarchy:
        """Coarser and coarser copies of the matrix, for each µ."""
        if operator.stochastic == "columns":
            return self.transposed(self.prepare(operator.T, mu))
        log_degree = check_reversible(operator, "Multigrid").unsqueeze(-1)
        if not operator.sparse or operator.device.type != "cpu":
            raise ValueError(
                f"solver: Multigrid needs a sparse walk on the CPU, got {operator}; use CG(), Chebyshev() or "
                "Direct()"
            )
        log_weight = log_degree - log_degree.amax(-2, keepdim=True)
        cycles = [_cycle(operator, log_weight, m) for m in mu.mT.reshape(-1, mu.shape[-2])]
        return Hierarchy(operator, mu, log_weight, cycles)

    def transposed(self, state: Hierarchy) -> Hierarchy:
        """The same cycles: I − MPᵀ = M S D⁻¹ where I − MP = M D⁻¹ S."""
        return state._replace(operator=state.operator.T)

    def solve(
        self, state: Hierarchy, rhs: Tensor, initial: Tensor, target: Tensor, limits: Limits
    ) -> Iterate:
        """Iterate until the bound of each right-hand side is below its target."""
        given, goal = rhs.dtype, target.double()
        operator, mu, b = state.operator.to(torch.float64), state.mu.double(), rhs.double()
        # Where µ_i = 0 the answer is b_i.
        x = torch.where(mu == 0, b, initial.double())
        degree = state.log_weight.double().exp()
        rows = operator.stochastic == "rows"
        into = torch.where(mu == 0, 0.0, (degree if rows else 1.0) / mu)
        out_of = torch.ones_like(degree) if rows else degree
        one = torch.ones((), dtype=torch.float64)

        residual = b - (x - mu * operator.matmul(x))
        bounded = bounding(operator, mu)
        bound = bounded(residual)
        steps = torch.zeros(*b.shape[:-2], 1, b.shape[-1], dtype=torch.int64)
        active = (bound > goal) & (steps < limits.within(steps + 1))
        halved_at, halved = steps, torch.full_like(bound, torch.inf)
        direction, square = torch.zeros_like(b), torch.zeros_like(bound)
        while bool(active.any()):
            cycled = _cycled(state, into * residual, active)
            following = inner(one, into * residual, cycled)
            direction = cycled + torch.where(square > 0, following / square, 0.0) * direction
            square = following
            # The error in the norm of S falls more steadily than the bound.
            halves = square < 0.25 * halved
            halved_at, halved = torch.where(halves, steps, halved_at), torch.where(halves, square, halved)
            moved = out_of * direction
            image = moved - mu * operator.matmul(moved)
            curvature = inner(one, direction, into * image)
            # No curvature, no step: that is rounding, or an operator that is not what it says.
            active = active & (curvature > 0) & (square > 0)
            step = torch.where(active, square / curvature, 0.0)
            x = x + step * moved
            residual = residual - step * image
            steps = steps + active
            bound = torch.where(active, bounded(residual), bound)
            active = active & (bound > goal) & (steps - halved_at < PATIENCE)
            active = limits.going_on(active & (steps < limits.within(steps + 1)), steps, bound)
        counts = steps.squeeze(-2)
        reached = Iterate(x.to(given), counts, counts + 1)
        weighted = CG().prepare(operator.to(given), mu.to(given))
        return carry_on(CG(), weighted, rhs, reached, bound > goal, target, limits)


def _cycle(operator: Transition, log_weight: Tensor, mu: Tensor) -> Any:
    """A V-cycle for S = D M⁻¹(I − MP), symmetric with entries ≤ 0 beside its diagonal."""
    try:
        import pyamg
    except ImportError as error:
        raise ImportError(
            "solver: Multigrid needs pyamg; pip install pyamg, or use CG() or Direct()"
        ) from error
    from scipy import sparse

    mu = mu.double().expand(len(log_weight))
    # Beyond this a node's row would vanish beside the others.
    degree = log_weight.double().squeeze(-1).clamp(min=LEAST).exp()
    free = mu > 0
    inside = sparse.diags_array(free.double().numpy())
    P = operator.to_scipy().astype("float64")
    W = inside @ sparse.diags_array(degree.numpy()) @ P @ inside
    diagonal = torch.where(free, degree / mu, 1.0).numpy()
    S = (sparse.diags_array(diagonal) - (W + W.T) / 2).tocsr()
    hierarchy = pyamg.ruge_stuben_solver(sparse.csr_matrix(S), max_coarse=COARSEST, coarse_solver="splu")
    return hierarchy.aspreconditioner(cycle="V")


def _cycled(state: Hierarchy, b: Tensor, active: Tensor) -> Tensor:
    """One cycle for every active column, each on its own."""
    mu, x = state.mu, torch.zeros_like(b)
    which = torch.arange(len(state.cycles)).reshape(*mu.shape[:-2], mu.shape[-1])
    which = which.expand(*b.shape[:-2], b.shape[-1])
    for *lead, channel in active.squeeze(-2).nonzero().tolist():
        cycle = state.cycles[int(which[(*lead, channel)])]
        column = (*lead, slice(None), channel)
        x[column] = torch.from_numpy(cycle @ b[column].contiguous().numpy())
    return x
