"""(I − MP) X = B by block conjugate gradients: all right-hand sides of a graph search one space.

R = Qσ is the residual in a basis that is orthonormal in ⟨x, y⟩ = Σ d_i x_i y_i / µ_i, first S = Q; a step is

    ξ = (SᵀGAS)⁻¹,  X ← X + Sξσ,  Q′ζ = Q − ASξ,  S ← Q′ + Sζᵀ,  σ ← ζσ,      G = diag(d / µ)

(Dubrulle, "Retooling the method of block conjugate gradients", 2001). However alike the columns of R become,
the systems are those of orthonormal blocks; what is alike in the columns of B is left out of Q once.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from graphdiff import checks
from graphdiff.operators.base import Transition
from graphdiff.solvers.base import Iterate, Limits, Problem, Solver, bounding, carry_on
from graphdiff.solvers.cg import LOSS, Weighted, allowance, started, weighted
from graphdiff.solvers.chebyshev import Chebyshev

# Eigenvalues of the cosines of columns are seen above eps to this power: their rounding is eps.
SEEN = 2 / 3


@dataclass(frozen=True)
class BlockCG(Solver):
    """Block conjugate gradients: every step searches the directions of all K signals of a graph at once.

    For reversible walks and their transposes, with one µ for all signals (it may differ from node to node).
    After t steps the error of each signal, in the energy norm, is the least that tK directions allow instead
    of t: no more than that of `CG`, and after few steps far less where up to K eigenvalues lie near 1. One
    product with K signals a step, as `CG`, and 7NK² multiplications in float64 besides: worth it where N is
    many times K and a product is dear, with `AttentionTransition` and `DenseTransition`; on sparse walks `CG`
    is faster. The inner product is that of `CG`. Copies, zeros and combinations of signals, and more signals
    than nodes, do no harm. Where degrees differ so much that the smallest do not count, or rounding stops it,
    `Chebyshev` goes on.

    Each signal stops on its own, but how many steps it takes, and its digits beyond the tolerance, depend on
    the signals it is solved with, which is why `Auto` never takes it. On other graphs of a batch nothing
    depends.

    Raises:
        ValueError: The walk is not known to be reversible, or signals have a µ each.

    Example:
        >>> import torch, graphdiff as gd
        >>> g = torch.Generator().manual_seed(0)
        >>> P = gd.AttentionTransition(torch.randn(300, 4, generator=g, dtype=torch.float64))
        >>> s = torch.randn(300, 16, generator=g, dtype=torch.float64)
        >>> block, one_by_one = (gd.solve(P, s, mu=0.99, solver=solver)
        ...                      for solver in (gd.solvers.BlockCG(), gd.solvers.CG()))
        >>> bool((2 * block.steps < one_by_one.steps).all())
        True
    """

    together: ClassVar[bool] = True

    def prepare(self, operator: Transition, mu: Tensor) -> Weighted:
        """The weights of the inner product."""
        if mu.shape[-1] > 1:
            raise ValueError(
                f"solver: BlockCG needs one µ for all signals, got mu of shape {checks.shape_text(mu)}; use "
                "CG(), which solves for each on its own"
            )
        return weighted(operator, mu, "BlockCG")

    def solve(self, state: Weighted, rhs: Tensor, initial: Tensor, target: Tensor, limits: Limits) -> Iterate:
        """Iterate until the bound of each right-hand side is below its target."""
        operator, mu, _ = state
        product, y, residual, unit = started(state, rhs, initial)
        weight, residual = product.weights, unit * residual
        wide, shape = weight.dtype, residual.shape

        def graphs(x: Tensor) -> list[Tensor]:
            """The [N, ·] of each graph, in memory of its own: matrix products round as memory is aligned."""
            flat = x.expand(*shape[:-2], *x.shape[-2:]).reshape(-1, *x.shape[-2:])
            return [graph.clone() for graph in flat]

        def batch(graphs: list[Tensor]) -> Tensor:
            return torch.stack(graphs).reshape(shape)

        bounded = bounding(operator, mu.to(wide))
        y, residual = y.to(wide), residual.to(wide)
        bound = bounded(residual)
        steps = torch.zeros_like(bound, dtype=torch.int64)
        most, patience = allowance(state, target, bound)
        limit = limits.within(most)
        active = (bound > target) & (steps < limit)
        halved_at, halved = steps, bound
        # One step of walking more: its product is the one that the certificate computes.
        first, largest = y + residual, LOSS / torch.finfo(rhs.dtype).eps * bound
        answer = first
        blocks = [_Block(*graph) for graph in zip(*map(graphs, (weight, y, residual)), strict=True)]
        while bool(active.any()):
            directions = batch([block.directions() for block in blocks]).to(rhs.dtype)
            walked = operator.matmul(directions).to(wide)
            directions = directions.to(wide)
            images = torch.sub(directions, walked.mul_(mu))
            going = active.flatten(0, -2).any(-1).tolist()
            for n, (S, AS) in enumerate(zip(graphs(directions), graphs(images), strict=True)):
                going[n] = going[n] and blocks[n].advance(S, AS)
            was = active
            active = active & torch.tensor(going, device=rhs.device).reshape(*shape[:-2], 1, 1)
            steps = steps + active
            residual = batch([block.residual for block in blocks])
            bound = torch.where(active, bounded(residual), bound)
            halves = bound < 0.5 * halved
            halved_at, halved = torch.where(halves, steps, halved_at), torch.where(halves, bound, halved)
            active = active & (bound > target) & (bound < largest) & (steps < limit)
            active = limits.going_on(active & (steps - halved_at < patience), steps, bound)
            # Who is done stays in the block, whose directions the others still need, but its answer stands.
            if bool((was & ~active).any()):
                answer = torch.where(was & ~active, batch([block.x for block in blocks]) + residual, answer)
        answer = torch.where((bound > target) & (bound >= largest), first, answer)
        reached = Iterate(answer.to(rhs.dtype), steps.squeeze(-2), steps.squeeze(-2) + 1)
        problem = Problem(operator, mu)
        return carry_on(Chebyshev(), problem, rhs, reached, bound > target, target, limits)


class _Block:
    """One graph: x and its residual R [N, K]; Q [N, r] and σ [r, K] with R = Qσ, and S [N, r]."""

    def __init__(self, weight: Tensor, x: Tensor, residual: Tensor) -> None:
        self.weight, self.x, self.residual = weight, x, residual
        self.basis, self.factor = factorised(residual, weight)
        self.searched = self.basis

    def directions(self) -> Tensor:
        """S, filled up with 0 to K columns."""
        return pad(self.searched, (0, self.x.shape[-1] - self.searched.shape[-1]))

    def advance(self, S: Tensor, AS: Tensor) -> bool:
        """A step along S, as it was rounded for the product, whose image is AS; False if there is none."""
        rank = self.basis.shape[-1]
        S, AS = S[:, :rank], AS[:, :rank]
        energy = S.T @ (self.weight * AS)
        # Of so small a matrix the CPU has the factors first.
        root, failed = torch.linalg.cholesky_ex(((energy + energy.T) / 2).cpu())
        # No curvature, no step: that is rounding, or an operator that is not what it says.
        if rank == 0 or bool(failed) or not bool(root.isfinite().all()):
            return False
        inverse = torch.cholesky_inverse(root).to(S.device)
        step = inverse @ self.factor
        self.x.addmm_(S, step)
        # Not Qσ: what Q leaves out as too small is seen in the bound.
        self.residual.addmm_(AS, step, alpha=-1)
        self.basis, change = factorised(torch.addmm(self.basis, AS, inverse, alpha=-1), self.weight)
        self.searched = torch.addmm(self.basis, S, change.T)
        self.factor = change @ self.factor
        return True


def factorised(Z: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Z = Qσ up to rounding, Z [N, K], with Q [N, r] orthonormal in the weights [N, 1], and σ [r, K]."""
    Q, sigma, unseen, combined = _seen(Z, weight, 0.0)
    if combined.shape[0] == 0:
        return Q, sigma
    # What distinguishes columns that are nearly alike, 1e-5 of them or less, has a scale of its own.
    part = Q.T @ (weight * unseen)
    noise = 4 * Z.shape[-1] * torch.finfo(Z.dtype).eps
    others, small, _, _ = _seen(torch.addmm(unseen, Q, part, alpha=-1), weight, noise)
    return torch.cat([Q, others], -1), torch.cat([sigma + part @ combined, small @ combined])


def _seen(Z: Tensor, weight: Tensor, noise: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Z = Qσ + Uc; in U is what the Gram matrix of Z's columns, if longer than noise, does not resolve."""
    # What overflows is not searched.
    gram = torch.nan_to_num(Z.T @ (weight * Z), nan=0.0, posinf=0.0, neginf=0.0)
    length = gram.diagonal().clamp(min=0).sqrt()
    length = torch.where(length > noise, length, 0.0).unsqueeze(-1)
    scale = torch.where(length > 0, 1 / length, 0.0)
    cosines, vectors = (x.to(Z.device) for x in torch.linalg.eigh((gram * scale * scale.T).cpu()))
    seen = cosines > torch.finfo(Z.dtype).eps ** SEEN
    root, V, U = cosines[seen].sqrt(), vectors[:, seen], vectors[:, ~seen]
    return Z @ (scale * V / root), (length * V * root).T, Z @ (scale * U), (length * U).T
