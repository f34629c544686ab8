"""P = D⁻¹W held as a matrix."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad

from graphdiff import checks
from graphdiff.operators.base import Transition
from graphdiff.operators.held import HeldTransition, product, whole_lines


@dataclass(frozen=True, eq=False, repr=False)
class DenseTransition(Transition):
    """A walk given by its matrix.

    Args:
        P: Row-stochastic matrices, shape [..., N, N], checked to be ≥ 0 with rows that sum to 1.
        log_degree: log d, shape [..., N], where the walk is known to be reversible; `from_affinity` finds
            it from a symmetric W.
        mask: Which nodes are real, bool, shape [..., N], where graphs are padded to one size; all if None.
            What stands in rows and columns of the others does not count.

    Raises:
        TypeError: `P` is not a floating-point tensor.
        ValueError: `P` is not square, not finite, negative somewhere, or a row does not sum to 1.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.DenseTransition.from_affinity(torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
        >>> P @ torch.tensor([2.0, 4.0])
        tensor([4., 3.])
        >>> P.reversible
        True
    """

    P: Tensor
    log_degree: Tensor | None = field(default=None, kw_only=True)
    mask: Tensor | None = field(default=None, kw_only=True)

    entrywise = True

    def __post_init__(self) -> None:
        P = checks.floating(self.P, "P")
        checks.square(P, "P")
        if self.mask is not None:
            P = _without_padding(P, self.mask)
            object.__setattr__(self, "P", P)
        checks.finite(P, "P")
        checks.nonnegative(P, "P")
        # Each of N entries is rounded by eps/2 of itself, and so is the sum.
        tolerance = 8 * P.shape[-1] ** 0.5 * torch.finfo(P.dtype).eps
        off = (self.row_sums - 1).abs()
        if bool((off > tolerance).any()):
            raise ValueError(
                f"P: expected rows that sum to 1 within {tolerance:.1e}, got one that sums to "
                f"{float(self.row_sums.flatten()[off.argmax()]):.6g}; normalise an affinity with "
                "DenseTransition.from_affinity(W)"
            )
        if self.log_degree is not None:
            degree = checks.floating(self.log_degree, "log_degree")
            checks.same_dtype(degree, "log_degree", P.dtype, "P")
            checks.same_device(degree, "log_degree", P.device, "P")
            if degree.shape != P.shape[:-1]:
                raise ValueError(
                    f"log_degree: expected shape {list(P.shape[:-1])}, got {checks.shape_text(degree)}"
                )

    @classmethod
    def from_affinity(cls, W: Tensor, mask: Tensor | None = None) -> "DenseTransition":
        """P = D⁻¹W for an affinity W ≥ 0, shape [..., N, N]; differentiable in W.

        The walk is taken as reversible where W is exactly symmetric. With a mask, bool [..., N], only weights
        between real nodes count.

        Raises:
            TypeError: `W` is not a floating-point tensor.
            ValueError: `W` is not square, not finite, negative somewhere, or a row is all zero.
        """
        W = checks.floating(W, "W")
        checks.square(W, "W")
        if mask is not None:
            W = _without_padding(W, mask)
        checks.finite(W, "W")
        checks.nonnegative(W, "W")
        # Scaling a row by its largest entry first keeps sums of very large and very small weights finite.
        largest = W.detach().amax(-1, keepdim=True)
        if bool((largest == 0).any()):
            node = int((largest == 0).flatten(0, -2).any(-1).nonzero()[0, 0]) % W.shape[-1]
            raise ValueError(
                f"W: row {node} is all zero, so no walk can leave node {node}; give it a weight, for example "
                "a self-loop (W[i, i] = 1)"
            )
        scaled = W / largest
        degree = scaled.sum(-1, keepdim=True)
        symmetric = torch.equal(W, W.mT)
        log_degree = (degree.log() + largest.log()).squeeze(-1) if symmetric else None
        if log_degree is not None and mask is not None:
            # A padded node may have any degree; the largest of the others hides none of them.
            largest = log_degree.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
            log_degree = torch.where(mask, log_degree, largest.nan_to_num(neginf=0.0))
        return cls(scaled / degree, log_degree=log_degree, mask=mask)

    @property
    def shape(self) -> torch.Size:
        """[..., N, N]."""
        return self.P.shape

    @property
    def reversible(self) -> bool:  # type: ignore[override]  # follows from the degrees
        """Whether degrees are known."""
        return self.log_degree is not None

    @cached_property
    def row_sums(self) -> Tensor:
        """Row sums in the best precision at hand: the certificate counts how far from 1 they are."""
        wide = torch.float32 if self.P.device.type == "mps" else torch.float64
        return self.P.detach().sum(-1, keepdim=True, dtype=wide)

    def rounding(self, dtype: torch.dtype) -> float:
        """Of the sums: the entries are what they are."""
        return self.sum_rounding(dtype)

    def matmul(self, y: Tensor) -> Tensor:
        """P y."""
        return self._staying(product(self._in_lines(), checks.real(y, self.mask)), y)

    def rmatmul(self, v: Tensor) -> Tensor:
        """Pᵀ v."""
        return self._staying(product(self._in_lines().mT, checks.real(v, self.mask)), v)

    def held(self) -> Transition:
        """For products that autograd does not see, which may then be compiled ones."""
        # A subclass may multiply in a way of its own.
        known = type(self) is DenseTransition
        return HeldTransition(self, self._filled_up_once, self.log_degree) if known else self

    def _in_lines(self) -> Tensor:
        """P filled up to whole 64-byte lines, so that a graph has the same bits alone and in a batch.

        Matrix products round differently where memory is aligned differently.
        """
        if self.P.requires_grad and torch.is_grad_enabled():
            return _filled_up(self.P)
        return self._filled_up_once

    @cached_property
    def _filled_up_once(self) -> Tensor:
        return _filled_up(self.P.detach())

    def rows(self, index: Tensor | Sequence[int]) -> Tensor:
        """The rows P[index]."""
        return self.P[..., self._row_index(index), :]

    def dense(self) -> Tensor:
        """P itself."""
        return self.P


def _without_padding(W: Tensor, mask: Tensor) -> Tensor:
    """The matrix between real nodes, and 1 from each padded node to itself."""
    checks.node_mask(mask, W.shape[:-1], W.device)
    eye = torch.eye(W.shape[-1], dtype=W.dtype, device=W.device)
    return torch.where(mask.unsqueeze(-1) & mask.unsqueeze(-2), W, eye * ~mask.unsqueeze(-1))


def _filled_up(P: Tensor) -> Tensor:
    surplus = whole_lines(P.shape[-1], P.dtype) - P.shape[-1]
    return pad(P, (0, surplus, 0, surplus))
