"""P y from the matrix of P, made once for a solve: a pass over N² numbers, whatever P is made of."""

import functools
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn.functional import pad

from graphdiff import checks
from graphdiff.operators.base import Transition, TransposedTransition

# Signals are multiplied in groups of so many.
COLUMNS = 8
# What all graphs of a batch together may take while a solve lasts.
LARGEST = 512 * 10**6


@dataclass(frozen=True, eq=False, repr=False)
class HeldTransition(Transition):
    """Another transition, whose products come from its matrix; in facts and in rounding it is that one.

    Args:
        original: The transition, of which nothing is differentiated through this one.
        matrix: Its entries, filled up with 0 to whole lines (`whole_lines`) both ways.
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
        return self._staying(_multiplied(self.matrix, checks.real(y, self.mask), across=False), y)

    def rmatmul(self, v: Tensor) -> Tensor:
        """Pᵀ v."""
        return self._staying(_multiplied(self.matrix, checks.real(v, self.mask), across=True), v)

    def __repr__(self) -> str:
        return repr(self.original)


def holds(held: object, operator: Transition) -> TypeGuard[Transition]:
    """Whether the first is the second with its matrix beside it, or both are the transposes of such."""
    if isinstance(held, TransposedTransition) and isinstance(operator, TransposedTransition):
        return holds(held.original, operator.original)
    return isinstance(held, HeldTransition) and held.original is operator


def whole_lines(nodes: int, dtype: torch.dtype) -> int:
    """The number of entries, at least `nodes`, that fill up lines of 64 bytes, but no pages of 4096.

    The same column of many rows that lie pages apart would want the same few places in a cache.
    """
    line = 64 // dtype.itemsize
    lines = -(-nodes // line)
    return (lines + (lines % 64 == 0)) * line


def product(P: Tensor, y: Tensor) -> Tensor:
    """P y [..., N, K] for y [..., N, K] and P, or its transpose, filled up to whole lines."""
    nodes, channels = y.shape[-2:]
    # Narrow products that are not whole vectors wide are slower than wider ones; of one column they are not.
    surplus = 0 if channels == 1 else -channels % COLUMNS
    y = pad(y, (0, surplus, 0, P.shape[-1] - nodes))
    batch = checks.broadcast_batch([P.shape[:-2], y.shape[:-2]], "P and y")
    flat = [x.expand(*batch, *x.shape[-2:]).reshape(batch.numel(), *x.shape[-2:]) for x in (P, y)]
    # Graph by graph: kernels for batches round differently. Of none there is nothing to round.
    products = (
        flat[0] @ flat[1]
        if 0 in batch
        else torch.stack([graph @ signals for graph, signals in zip(*flat, strict=True)])
    )
    return products.reshape(*batch, *y.shape[-2:])[..., :nodes, :channels]


def _multiplied(matrix: Tensor, y: Tensor, *, across: bool) -> Tensor:
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
