"""(I − MP) x = b by LU factorisation of the N×N matrix, one for all right-hand sides with the same µ."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from graphdiff.operators.base import Transition
from graphdiff.solvers.base import Iterate, Solver


class Factors(NamedTuple):
    """LU factors [..., 1 or K, N, N]: a µ per channel needs a matrix per channel."""

    lu: Tensor
    pivots: Tensor


@dataclass(frozen=True)
class Direct(Solver):
    """Dense LU with partial pivoting: O(N³) once, O(N²) per signal, N² memory.

    I − MP is never singular for 0 ≤ µ < 1, and row by row its diagonal outweighs the rest, so the
    factorisation is stable.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.DenseTransition(torch.tensor([[0.5, 0.5], [0.5, 0.5]]))
        >>> gd.diffuse(P, torch.tensor([0.0, 1.0]), mu=0.5, solver=gd.solvers.Direct())
        tensor([0.2500, 0.7500])
    """

    def prepare(self, operator: Transition, mu: Tensor) -> Factors:
        """The factors of I − MP."""
        P = operator.dense().unsqueeze(-3)
        # [..., 1 or N, 1 or K] → [..., 1 or K, 1 or N, 1]: the rows of each channel's matrix.
        A = torch.eye(P.shape[-1], dtype=P.dtype, device=P.device) - mu.mT.unsqueeze(-1) * P
        return Factors(*torch.linalg.lu_factor(A))

    def solve(
        self, state: Factors, rhs: Tensor, initial: Tensor, target: Tensor, max_steps: Tensor | None
    ) -> Iterate:
        """Forward and back substitution."""
        if state.lu.shape[-3] == 1:
            x = torch.linalg.lu_solve(state.lu.squeeze(-3), state.pivots.squeeze(-2), rhs)
        else:
            channels = torch.linalg.lu_solve(state.lu, state.pivots, rhs.mT.unsqueeze(-1))
            x = channels.squeeze(-1).mT
        steps = torch.ones(*rhs.shape[:-2], rhs.shape[-1], dtype=torch.int64, device=rhs.device)
        return Iterate(x, steps, torch.zeros_like(steps))
