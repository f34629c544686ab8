"""P y from the matrix of P, made once for a solve: a pass over N² numbers, whatever P is made of."""

from dataclasses import dataclass

import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.operators.base import Transition
from graphdiff.operators.dense import product

# What all graphs of a batch together may take while a solve lasts.
LARGEST = 512 * 10**6


@dataclass(frozen=True, eq=False, repr=False)
class HeldTransition(Transition):
    """Another transition, whose products come from its matrix; in facts and in rounding it is that one.

    Args:
        original: The transition, of which nothing is differentiated through this one.
        matrix: Its entries, filled up with 0 to whole lines (`dense.whole_lines`) both ways.
        found_log_degree: That of `original`, [..., N].
    """

    original: Transition
    matrix: Tensor
    found_log_degree: Tensor

    quadratic = True

    @staticmethod
    def fits(shape: torch.Size, dtype: torch.dtype) -> bool:
        """Whether matrices of such a shape [..., N, N] may be held."""
        return shape.numel() * dtype.itemsize <= LARGEST

    @property
    def shape(self) -> torch.Size:
        """[..., N, N]."""
        return self.original.shape

    @property
    def reversible(self) -> bool:  # type: ignore[override]  # the original's
        """As the original."""
        return self.original.reversible

    @property
    def positive_semidefinite(self) -> bool:  # type: ignore[override]  # the original's
        """As the original."""
        return self.original.positive_semidefinite

    @property
    def log_degree(self) -> Tensor:
        """As the original, found with the matrix."""
        return self.found_log_degree

    @property
    def mask(self) -> Tensor | None:  # type: ignore[override]  # the original's
        """As the original."""
        return self.original.mask

    def rounding(self, dtype: torch.dtype) -> Tensor | float:
        """As the original."""
        return self.original.rounding(dtype)

    def transposed_rounding(self, dtype: torch.dtype) -> Tensor | float:
        """As the original."""
        return self.original.transposed_rounding(dtype)

    def degree_rounding(self, dtype: torch.dtype) -> Tensor | float:
        """As the original."""
        return self.original.degree_rounding(dtype)

    def matmul(self, y: Tensor) -> Tensor:
        """P y."""
        return self._staying(product(self.matrix, checks.real(y, self.mask)), y)

    def rmatmul(self, v: Tensor) -> Tensor:
        """Pᵀ v."""
        return self._staying(product(self.matrix.mT, checks.real(v, self.mask)), v)

    def __repr__(self) -> str:
        return repr(self.original)
