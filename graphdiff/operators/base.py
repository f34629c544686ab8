"""Transition: a random walk P as something that can be multiplied.

P[i, j] is the probability of stepping from i to j; every row sums to 1. An operator is a frozen
dataclass of tensors with one method to write, `matmul`; transpose, rows and dense form follow from it.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Literal, Self

import torch
from torch import Tensor

from graphdiff import checks


class Transition(ABC):
    """A random walk on N nodes, row-stochastic unless it is the transpose of one.

    Subclasses are frozen dataclasses (``eq=False``) whose floating-point fields are the differentiable
    inputs. They write `matmul` and `shape`, and state the facts that hold for them.
    """

    reversible: bool = False
    """Whether d_i P[i, j] = d_j P[j, i] for some degrees d > 0, given by `log_degree`."""
    positive_semidefinite: bool = False
    """Whether, besides, the affinity D·P has no negative eigenvalue."""
    sparse: bool = False
    """Whether rows are short lists, given by `neighbours` and `to_scipy`."""
    entrywise: bool = False
    """Whether `rounding` holds entry by entry, |fl(P y) − P y| ≤ ε P|y|, `underflow` apart."""
    restarts: bool = False
    """Whether some nodes jump to the signal's own distribution, which `restarting_at` binds."""
    stochastic: Literal["rows", "columns"] = "rows"
    """Which sums are 1."""
    mask: Tensor | None = None
    """Which nodes are real, [..., N] bool, where graphs are padded to one size; None if all are.

    A padded node stays where it is, and no other node steps to it.
    """

    @property
    @abstractmethod
    def shape(self) -> torch.Size:
        """[..., N, N]."""

    @abstractmethod
    def matmul(self, y: Tensor) -> Tensor:
        """P y for y [..., N, K], differentiable in y and in the operator's tensors."""

    def rmatmul(self, v: Tensor) -> Tensor:
        """Pᵀ v for v [..., N, K]: the vector-Jacobian product of y ↦ P y, unless written directly."""
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            y = torch.zeros_like(v).requires_grad_()
            (transposed,) = torch.autograd.grad(self.matmul(y), y, v, create_graph=recorded)
        return transposed

    def vjp(
        self, y: Tensor, v: Tensor, product: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """P y, and the gradients of Σ v ⊙ (P y) in `tensors()` where these require one; differentiable.

        Where nobody differentiates further, `product` may be P y as it is known already.
        """
        recorded = torch.is_grad_enabled()
        with torch.enable_grad():
            # Views: differentiating with respect to the tensors themselves would, in a second derivative,
            # run on through the graph that y hangs from.
            views = [t.view_as(t) if t.requires_grad else t for t in self.tensors()]
            product = self.with_tensors(views).matmul(y)
            wanted = [view for view in views if view.requires_grad]
            found = iter(torch.autograd.grad(product, wanted, v, create_graph=recorded, allow_unused=True))
        gradients = tuple(next(found) if view.requires_grad else None for view in views)
        return product if recorded else product.detach(), gradients

    @property
    def log_degree(self) -> Tensor | None:
        """log d up to a constant, [..., N], for reversible walks; else None."""
        return None

    @property
    def row_sums(self) -> Tensor | float:
        """Row sums of P as given, [..., N, 1] (those of the original for a transpose), or exactly 1."""
        return 1.0

    @property
    def largest_row_sum(self) -> Tensor | float:
        """The largest of them, [..., 1, 1], or exactly 1."""
        sums = self.row_sums
        return sums.amax(-2, keepdim=True) if isinstance(sums, Tensor) else sums

    def rounding(self, dtype: torch.dtype) -> Tensor | float:
        """ε, a number or [..., 1, 1], with ‖fl(P y) − P y‖ ≤ ε‖y‖ for products computed in `dtype`.

        Unless written, that of the sums and of nested operators in float64, and no bound below: computed
        entries can be off by far more than a sum is, so what does not say better is certified in float64.
        """
        if dtype != torch.float64:
            return math.inf
        fields = (getattr(self, field.name) for field in dataclasses.fields(self))  # type: ignore[arg-type]
        nested = [value.rounding(dtype) for value in fields if isinstance(value, Transition)]
        return sum(nested, start=self.sum_rounding(dtype))

    def sum_rounding(self, dtype: torch.dtype) -> float:
        """What sums of N products cost in any order: N units in the last place at most.

        No bound where torch may multiply in less than it is given (`torch.set_float32_matmul_precision`).
        """
        if dtype != torch.float64 and not multiplied_in_full(self.device):
            return math.inf
        return (self.shape[-1] + 4) * torch.finfo(dtype).eps

    def underflow(self, dtype: torch.dtype) -> float:
        """Entries of P up to this may be lost; unless written, those that the dtype cannot hold."""
        return torch.finfo(dtype).tiny

    def transposed_rounding(self, dtype: torch.dtype) -> Tensor | float:
        """The same of Pᵀ v, in the 1-norm."""
        return self.rounding(dtype)

    def relative_degrees(self, least: float) -> tuple[Any, float]:
        """d / max d of a reversible walk on the CPU, float64 [N], and the least of its logarithms.

        Degrees below exp(`least`) are raised to that.
        """
        log_degree = self.log_degree
        if log_degree is None:
            raise TypeError(f"relative_degrees: {self} is not known to be reversible")
        low, high = log_degree.aminmax()
        return (log_degree - high).double().clamp_(min=least).exp_().numpy(), float(low - high)

    def degree_rounding(self, dtype: torch.dtype) -> Tensor | float:
        """How far `log_degree` computed in `dtype` may be off, a number or [..., 1, 1].

        Stored degrees are what they are; what is computed is, unless written, off as a sum is.
        """
        stored = any(field.name == "log_degree" for field in dataclasses.fields(self))  # type: ignore[arg-type]
        return 0.0 if stored else self.sum_rounding(dtype)

    def held(self) -> "Transition":
        """The same walk in the form that multiplies fastest, for who multiplies often; itself unless written.

        It may take as much memory as the matrix where that is not much, so it is not to be kept.
        """
        return self

    @property
    def T(self) -> "Transition":
        """The transpose, which conserves mass: columns sum to 1."""
        return TransposedTransition(self)

    @property
    def dtype(self) -> torch.dtype:
        """Of the operator's numbers."""
        return next(self._each_tensor()).dtype

    @property
    def device(self) -> torch.device:
        """Where the operator's tensors lie."""
        return next(self._each_tensor()).device

    def __matmul__(self, y: Tensor) -> Tensor:
        checks.same_dtype(checks.floating(y, "y"), "y", self.dtype, "the operator")
        checks.same_device(y, "y", self.device, "the operator")
        columns = checks.signal(y, self.shape[-1], "y")
        checks.broadcast_batch([self.shape[:-2], columns.shape[:-2]], "P and y")
        product = self.matmul(columns)
        # One signal on one graph comes back as it was given; a batch of graphs makes a batch of signals.
        return product.squeeze(-1) if y.ndim == 1 else product

    def rows(self, index: Tensor | Sequence[int]) -> Tensor:
        """The rows P[index], [..., len(index), N], differentiable; no N×N matrix is built."""
        return self.T.matmul(self._unit_columns(self._row_index(index))).mT

    def neighbours(self, index: Tensor | Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Every step out of some nodes, where the operator is sparse.

        Returns:
            (position, node, probability), each [number of steps]: from index[position] to node, in the order
            of positions.
        """
        raise TypeError(f"neighbours: {self} is not sparse; use rows(index)")

    def _steps_into(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The same of Pᵀ: every step into some nodes."""
        into = self.to_scipy().T.tocsr()[index.cpu().numpy()].tocoo()
        position, node = (torch.as_tensor(x, device=self.device).long() for x in into.coords)
        return position, node, torch.as_tensor(into.data, device=self.device)

    def to_scipy(self) -> Any:
        """P as a `scipy.sparse.csr_array`, where the operator is sparse."""
        raise TypeError(f"to_scipy: {self} is not sparse; use dense()")

    def sweep_order(self) -> Any:
        """A sparse operator's nodes in an order to sweep them in, uint32 [N].

        Raises:
            ImportError: numba is not installed.
        """
        from graphdiff.operators import rows

        P = self.to_scipy()
        return rows.ordered(P.indptr, P.indices)

    def equal_steps(self) -> bool:
        """Whether all steps of a sparse operator from a node are equally likely, for all nodes.

        Raises:
            ImportError: numba is not installed.
        """
        from graphdiff.operators import rows

        P = self.to_scipy()
        return bool(rows.equal(P.indptr, P.data))

    def restarting_at(self, distribution: Tensor) -> "Transition":
        """The walk whose open ends jump to the distribution, [..., N], where `restarts`."""
        raise TypeError(f"restarting_at: {self} has no open ends")

    def dense(self) -> Tensor:
        """P as a tensor [..., N, N]."""
        return self.matmul(self._unit_columns(torch.arange(self.shape[-1], device=self.device)))

    def to(self, *target: torch.device | torch.dtype | str | int) -> Self:
        """The operator on another device, in another dtype, or both: ``P.to("cuda", torch.float64)``."""
        device: torch.device | None = None
        dtype: torch.dtype | None = None
        for item in target:
            if isinstance(item, torch.dtype):
                dtype = item
            else:
                device = torch.device(item)
        if dtype is not None and dtype not in checks.FLOATS:
            raise TypeError(f"to: expected a floating-point dtype, got {dtype}")
        if dtype in (None, self.dtype) and device in (None, self.device):
            return self
        return self._replaced(iter([t.to(device=device, dtype=dtype) for t in self.tensors()]), device)

    def tensors(self) -> tuple[Tensor, ...]:
        """The floating-point tensors P is made of, nested operators' included: what gradients flow to."""
        return tuple(self._each_tensor())

    def _each_tensor(self) -> Iterator[Tensor]:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                if value.is_floating_point():
                    yield value
            elif value is not None and isinstance(value, Transition):
                yield from value._each_tensor()

    def check_finite(self) -> None:
        """Those hold neither nan nor infinity."""
        for tensor in self._each_tensor():
            checks.finite(tensor, f"the tensors of {type(self).__name__}")

    def with_tensors(self, tensors: Sequence[Tensor]) -> Self:
        """The same operator made of other tensors with the same values, so nothing is checked again."""
        return self._replaced(iter(tensors), None)

    def _replaced(self, tensors: Iterator[Tensor], device: torch.device | None) -> Self:
        # A bare object with the fields alone: what the original has derived from its tensors stays behind.
        other = object.__new__(type(self))
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, field.name)
            if isinstance(value, Transition):
                object.__setattr__(other, field.name, value._replaced(tensors, device))
            elif isinstance(value, Tensor):
                new = next(tensors) if value.is_floating_point() else value.to(device=device)
                object.__setattr__(other, field.name, new)
            else:
                object.__setattr__(other, field.name, value)
        return other

    def _staying(self, product: Tensor, y: Tensor) -> Tensor:
        """The product at real nodes, y itself at padded ones."""
        return product if self.mask is None else torch.where(self.mask.unsqueeze(-1), product, y)

    def _row_index(self, index: Tensor | Sequence[int]) -> Tensor:
        index = torch.as_tensor(index, device=self.device)
        nodes = self.shape[-1]
        if index.ndim != 1 or index.is_floating_point() or index.dtype == torch.bool:
            raise ValueError(
                f"index: expected a list or 1-d tensor of node numbers, got {index.dtype} of shape "
                f"{checks.shape_text(index)}"
            )
        if index.numel() and not (int(index.min()) >= 0 and int(index.max()) < nodes):
            raise IndexError(f"index: expected nodes 0 to {nodes - 1}, got {index.tolist()}")
        return index

    def _unit_columns(self, index: Tensor) -> Tensor:
        units = torch.zeros(self.shape[-1], len(index), dtype=self.dtype, device=self.device)
        units[index, torch.arange(len(index), device=self.device)] = 1
        return units.expand(*self.shape[:-2], *units.shape)

    def __repr__(self) -> str:
        facts = ["reversible"] * self.reversible + ["positive semidefinite"] * self.positive_semidefinite
        return (
            f"{type(self).__name__}({list(self.shape)}, {str(self.dtype).removeprefix('torch.')}, "
            f"{self.device}{''.join(', ' + fact for fact in facts)})"
        )


def multiplied_in_full(device: torch.device) -> bool:
    """Whether torch's products of float32 matrices are in float32 there: its settings allow less."""
    library = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
    return library.matmul.fp32_precision in ("none", "ieee")


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class TransposedTransition(Transition):
    """Pᵀ: it carries mass along the walk, so sums over nodes are conserved."""

    original: Transition

    stochastic = "columns"

    @property
    def reversible(self) -> bool:  # type: ignore[override]  # the original's
        """Whether Pᵀ is self-adjoint too, with 1/d in place of d."""
        return self.original.reversible

    @property
    def positive_semidefinite(self) -> bool:  # type: ignore[override]  # the original's
        """As the original: the eigenvalues are the same."""
        return self.original.positive_semidefinite

    @property
    def log_degree(self) -> Tensor | None:
        """−log d of the original."""
        log_degree = self.original.log_degree
        return None if log_degree is None else -log_degree

    def degree_rounding(self, dtype: torch.dtype) -> Tensor | float:
        """As the original."""
        return self.original.degree_rounding(dtype)

    def check_finite(self) -> None:
        """Those of the original."""
        self.original.check_finite()

    @property
    def mask(self) -> Tensor | None:  # type: ignore[override]  # the original's
        """As the original."""
        return self.original.mask

    @property
    def sparse(self) -> bool:  # type: ignore[override]  # the original's
        """As the original."""
        return self.original.sparse

    def neighbours(self, index: Tensor | Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Every step into some nodes."""
        return self.original._steps_into(self._row_index(index))

    def to_scipy(self) -> Any:
        """Pᵀ as a `scipy.sparse.csr_array`."""
        return self.original.to_scipy().T.tocsr()

    @property
    def restarts(self) -> bool:  # type: ignore[override]  # the original's
        """As the original."""
        return self.original.restarts

    def restarting_at(self, distribution: Tensor) -> Transition:
        """The transpose of the original so bound."""
        return self.original.restarting_at(distribution).T

    @property
    def shape(self) -> torch.Size:
        """[..., N, N]."""
        return self.original.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the original's numbers."""
        return self.original.dtype

    @property
    def device(self) -> torch.device:
        """Where the original's tensors lie."""
        return self.original.device

    @property
    def T(self) -> Transition:
        """The operator this is the transpose of, itself."""
        return self.original

    def held(self) -> Transition:
        """The transpose of the original so held."""
        held = self.original.held()
        return self if held is self.original else held.T

    @property
    def row_sums(self) -> Tensor | float:
        """Those of the original, which are this operator's column sums."""
        return self.original.row_sums

    @property
    def largest_row_sum(self) -> Tensor | float:
        """That of the original."""
        return self.original.largest_row_sum

    def rounding(self, dtype: torch.dtype) -> Tensor | float:
        """Of the original's transposed product."""
        return self.original.transposed_rounding(dtype)

    def transposed_rounding(self, dtype: torch.dtype) -> Tensor | float:
        """Of the original's product."""
        return self.original.rounding(dtype)

    def matmul(self, y: Tensor) -> Tensor:
        """Pᵀ y."""
        return self.original.rmatmul(y)

    def rmatmul(self, v: Tensor) -> Tensor:
        """P v."""
        return self.original.matmul(v)

    def vjp(
        self, y: Tensor, v: Tensor, product: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """With the roles of y and v exchanged, the gradients of the original."""
        product = self.original.rmatmul(y) if product is None else product
        return product, self.original.vjp(v, y)[1]


def check_transition(P: object) -> None:
    """`P` is a transition; what else it may be, says how to make one of it."""
    if isinstance(P, Transition):
        return
    what = (
        "wrap a matrix with DenseTransition(P), weights with DenseTransition.from_affinity(W), edges with "
        "SparseTransition.from_edge_index(edges), features with AttentionTransition(psi)"
    )
    # By name, as neither library is imported before it is needed.
    libraries = {kind.__module__.partition(".")[0] for kind in type(P).__mro__}
    if isinstance(P, Tensor) and P.layout != torch.strided:
        what = "wrap a sparse tensor with SparseTransition.from_torch(W)"
    elif "scipy" in libraries:
        what = "wrap a scipy matrix with SparseTransition.from_scipy(W)"
    elif "networkx" in libraries:
        what = "wrap a networkx graph with SparseTransition.from_networkx(G)"
    elif "numpy" in libraries:
        what = f"make it a tensor with torch.as_tensor, then {what}"
    raise TypeError(f"P: expected a Transition, got {type(P).__name__}; {what}")
