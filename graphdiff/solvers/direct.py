"""(I − MP) x = b by LU factorisation: of the sparse matrix where there is one, else of the N×N matrix."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphdiff.operators.base import Transition
from graphdiff.solvers.base import Iterate, Limits, Solver


class Factors(NamedTuple):
    """LU factors of A = I − MP.

    Dense: `lu` [..., 1 or K, N, N] and `pivots` of Aᵀ; a µ per channel needs a matrix per channel.
    Sparse: `lu` is a list of scipy's factorisations of A, one for each µ in the order of its leading
    dimensions and channels.
    """

    lu: Any
    pivots: Tensor | None
    operator: Transition
    mu: Tensor
    flipped: bool = False
    """Whether they are used for I − MPᵀ."""


@dataclass(frozen=True)
class Direct(Solver):
    """LU, once for all signals with the same µ, and for the backward.

    Dense: O(N³) once, O(N²) per signal, N² memory. Sparse operators on the CPU are factorised by scipy
    (SuperLU) in float64: fast on meshes and grids, hopeless on large social graphs, whose factors fill up.
    I − MP is never singular for 0 ≤ µ < 1, and row by row its diagonal outweighs the rest, so the
    factorisation is stable even without pivoting.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.DenseTransition(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
        >>> gd.diffuse(P, torch.tensor([0.0, 1.0]), mu=0.5, solver=gd.solvers.Direct())
        tensor([0.2500, 0.7500])
    """

    def prepare(self, operator: Transition, mu: Tensor) -> Factors:
        """The factors of I − MP."""
        if operator.sparse and operator.device.type == "cpu":
            return Factors(_sparse_factors(operator, mu), None, operator, mu)
        P = operator.dense().unsqueeze(-3)
        # [..., 1 or N, 1 or K] → [..., 1 or K, 1 or N, 1]: the rows of each channel's matrix.
        A = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device) - mu.mT.unsqueeze(-1) * P
        # Of Aᵀ: in its columns the diagonal outweighs the rest, so no row is exchanged, and entries of x that
        # are small beside others keep their digits.
        return Factors(*_dense_factors(A.mT), operator, mu)

    def transposed(self, state: Factors) -> Factors:
        """The same factors, used from the other side."""
        return state._replace(flipped=not state.flipped)

    def solve(self, state: Factors, rhs: Tensor, initial: Tensor, target: Tensor, limits: Limits) -> Iterate:
        """Forward and back substitution."""
        steps = torch.ones(*rhs.shape[:-2], rhs.shape[-1], dtype=torch.int64, device=rhs.device)
        if not state.flipped:
            return Iterate(_substitute(state, rhs), steps, torch.zeros_like(steps))
        # (I − MPᵀ)⁻¹ b = b + M (I − PᵀM)⁻¹ Pᵀ b, and I − PᵀM is the transpose of A.
        x = rhs + state.mu * _substitute(state, state.operator.rmatmul(rhs))
        return Iterate(x, steps, steps)


def _dense_factors(A: Tensor) -> tuple[Tensor, Tensor]:
    """LU and pivots of each matrix [..., N, N].

    On the CPU one after the other: of several at once torch's are wrong after any `torch.set_num_threads` to
    more than one (its issue 142815), as are its solutions and inverses.
    """
    if A.device.type != "cpu" or A.shape[:-2].numel() == 1:
        lu, pivots = torch.linalg.lu_factor(A)
        return lu, pivots
    # Column by column, as LAPACK has them.
    lu, pivots = A.new_empty(A.shape).mT, torch.empty(A.shape[:-1], dtype=torch.int32)
    for each, factors, order in zip(A.flatten(0, -3), lu.flatten(0, -3), pivots.flatten(0, -2), strict=True):
        factors[:], order[:] = torch.linalg.lu_factor(each)
    return lu, pivots


def _substitute(state: Factors, rhs: Tensor) -> Tensor:
    """A⁻¹ b, or A⁻ᵀ b where flipped."""
    lu, pivots, _, mu, flipped = state
    if pivots is None:
        return _sparse_substitute(lu, mu, rhs, flipped)
    x: Tensor
    if lu.shape[-3] == 1:
        x = torch.linalg.lu_solve(lu.squeeze(-3), pivots.squeeze(-2), rhs, adjoint=not flipped)
        return x
    x = torch.linalg.lu_solve(lu, pivots, rhs.mT.unsqueeze(-1), adjoint=not flipped)
    return x.squeeze(-1).mT


def _sparse_factors(operator: Transition, mu: Tensor) -> list[Any]:
    import scipy.sparse as sp
    from scipy.sparse.linalg import splu

    P = operator.to_scipy().astype("float64")
    eye = sp.eye_array(P.shape[0], format="csr")
    per_problem = mu.double().mT.reshape(-1, mu.shape[-2]).numpy()
    # Without pivoting the ordering may look at the pattern of A + Aᵀ alone, which keeps the factors small.
    return [
        splu(
            (eye - sp.diags_array(m, shape=P.shape) @ P if len(m) > 1 else eye - m[0] * P).tocsc(),
            permc_spec="MMD_AT_PLUS_A",
            diag_pivot_thresh=0.0,
            options={"SymmetricMode": True},
        )
        for m in per_problem
    ]


def _sparse_substitute(factors: list[Any], mu: Tensor, rhs: Tensor, flipped: bool) -> Tensor:
    which = torch.arange(len(factors)).reshape(*mu.shape[:-2], mu.shape[-1])
    which = which.expand(*rhs.shape[:-2], rhs.shape[-1])
    columns = rhs.mT.double()
    x = torch.empty_like(columns)
    # One column at a time: in blocks SuperLU rounds differently with their width.
    for place in torch.cartesian_prod(*(torch.arange(n) for n in which.shape)).reshape(-1, which.ndim):
        at = tuple(place.tolist())
        b = columns[at].contiguous().numpy()
        x[at] = torch.from_numpy(factors[int(which[at])].solve(b, trans="T" if flipped else "N"))
    return x.mT.to(rhs.dtype)
