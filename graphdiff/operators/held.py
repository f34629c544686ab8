"""P y from the matrix of P, made once for a solve: a pass over N² numbers, whatever P is made of."""

import functools
from dataclasses import dataclass
from typing import Any

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
        found_log_degree: That of `original`, [..., N]; None where it has none.
    """

    original: Transition
    matrix: Tensor
    found_log_degree: Tensor | None

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
    def log_degree(self) -> Tensor | None:
        """As the original, found with the matrix."""
        return self.found_log_degree

    @property
    def row_sums(self) -> Tensor | float:
        """As the original."""
        return self.original.row_sums

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
        return self._staying(_product(self.matrix, checks.real(y, self.mask), across=False), y)

    def rmatmul(self, v: Tensor) -> Tensor:
        """Pᵀ v."""
        return self._staying(_product(self.matrix, checks.real(v, self.mask), across=True), v)

    def __repr__(self) -> str:
        return repr(self.original)


def _product(matrix: Tensor, y: Tensor, *, across: bool) -> Tensor:
    """P y, or Pᵀ y `across`, of no interest to autograd; compiled, graph by graph, where that is faster."""
    products = _products()
    if products is None or not products.suits(matrix, y.shape[-1]):
        return product(matrix.mT if across else matrix, y)
    batch = checks.broadcast_batch([matrix.shape[:-2], y.shape[:-2]], "P and y")
    graphs, signals = (
        x.expand(*batch, *x.shape[-2:]).reshape(batch.numel(), *x.shape[-2:]) for x in (matrix, y)
    )
    kernel, found = products.transposed if across else products.product, torch.empty_like(signals)
    for place, graph, columns in zip(found, graphs, signals, strict=True):
        place.copy_(kernel(graph, columns))
    return found.reshape(*batch, *y.shape[-2:])


@functools.cache
def _products() -> Any:
    """The compiled products, or None where numba is not installed."""
    try:
        from graphdiff.operators import products
    except ImportError:
        return None
    return products
