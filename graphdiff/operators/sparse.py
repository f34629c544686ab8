"""P = D⁻¹W held as its edges, in compressed rows (CSR).

Two ways to a product. Without autograd it is a CSR product, by the fastest of those measured: torch's sums of
embeddings in float32, whose time hardly grows with the channels up to 32; in float64 compiled ones for
several signals (`edges`), else scipy, where torch has one thread, or torch's own. The first two take Pᵀ from
the same arrays on one thread. Either way each row is summed edge after edge, so that the bits of a signal
depend on no other. Under autograd it is gather, multiply, add, which torch can differentiate as often as
asked, in O(edges · K) memory; differentiating the CSR product would fill an N×N matrix.

Where nodes have no edge out, P = Q + a wᵀ: Q holds the edges, a marks those nodes, w is where they jump.
"""

import functools
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from numbers import Real
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.operators.base import Transition
from graphdiff.operators.neighbours import nearest_pairs

Dangling = Literal["self", "uniform", "restart", "error"] | Tensor

# With fewer edges a walk is built sooner than numba is imported, and so it is unless that is done already.
FEW_EDGES = 2**16
# Edges times signals from which compiled products are looked for.
MANY = 2**17
# No sum or square of weights between these overflows or vanishes.
ORDINARY = 1e-15, 1e15


@dataclass(frozen=True, eq=False, repr=False)
class SparseTransition(Transition):
    """A walk on one graph given by its edges, a row-stochastic matrix in CSR form.

    Row i holds the steps out of node i: node ``indices[e]`` with probability ``values[e]`` for e from
    ``indptr[i]`` to ``indptr[i + 1]``. The tensors are taken as they are, not copied. Weights that are not
    yet probabilities go through `from_edge_index`, `from_scipy`, `from_networkx` or `from_torch`; for points
    in space there is `from_points`.

    Args:
        indptr: Where rows begin, int32 or int64, shape [N + 1].
        indices: Nodes stepped to, dtype of `indptr`, shape [edges].
        values: Probabilities ≥ 0, floating, shape [edges]; those of each row sum to 1. Half precision is
            multiplied in float32.
        log_degree: log d, shape [N], where the walk is known to be reversible.
        dangling: Numbers of the nodes without an edge out, if any, like `indices`, shape [count].
        jump: Where these go, shape [..., N], sums to 1; leading dimensions are those of the operator. Without
            it the walk `restarts`: `solve`, `diffuse` and `pagerank` let them jump to the signal itself.

    Raises:
        TypeError: A tensor is of the wrong dtype.
        ValueError: A shape, device or value does not fit; the message names it.

    Example:
        >>> import torch, graphdiff as gd
        >>> indptr, indices = torch.tensor([0, 2, 3]), torch.tensor([0, 1, 0])
        >>> P = gd.SparseTransition(indptr, indices, torch.tensor([0.5, 0.5, 1.0]))
        >>> P @ torch.tensor([2.0, 4.0])
        tensor([3., 2.])
        >>> P.T @ torch.tensor([2.0, 4.0])
        tensor([5., 1.])
    """

    indptr: Tensor
    indices: Tensor
    values: Tensor
    log_degree: Tensor | None = field(default=None, kw_only=True)
    dangling: Tensor | None = field(default=None, kw_only=True)
    jump: Tensor | None = field(default=None, kw_only=True)

    entrywise = True
    _degrees_by_length: Any = None
    """Where edges all have one weight: log d by a row's number of edges, and the least of these numbers."""
    _ordinary = False
    """Whether it was made of ordinary weights, so that its numbers are finite."""

    def __post_init__(self) -> None:
        indptr, indices = checks.integers(self.indptr, "indptr"), checks.integers(self.indices, "indices")
        values = checks.floating(self.values, "values")
        checks.same_dtype(indices, "indices", indptr.dtype, "indptr")
        checks.same_device(indices, "indices", indptr.device, "indptr")
        checks.same_device(values, "values", indptr.device, "indptr")
        if indptr.ndim != 1 or len(indptr) < 2:
            raise ValueError(f"indptr: expected shape [N + 1] with N ≥ 1, got {checks.shape_text(indptr)}")
        nodes = len(indptr) - 1
        checks.shaped(values, "values", [values.numel()], "one probability per edge")
        checks.shaped(indices, "indices", [values.numel()], "one node per edge like values")
        if int(indptr[0]) != 0 or int(indptr[-1]) != len(values) or bool((indptr.diff() < 0).any()):
            raise ValueError(
                f"indptr: expected numbers that rise from 0 to {len(values)}, the number of edges, got "
                f"{int(indptr[0])} to {int(indptr[-1])} with a smallest step of {int(indptr.diff().min())}"
            )
        checks.node_numbers(indices, "indices", nodes)
        checks.finite(values, "values")
        checks.nonnegative(values, "values")
        if self.dangling is not None:
            dangling = checks.integers(self.dangling, "dangling")
            checks.same_device(dangling, "dangling", indptr.device, "indptr")
            checks.shaped(dangling, "dangling", [dangling.numel()], "the nodes without an edge out")
            checks.node_numbers(dangling, "dangling", nodes)
        if self.jump is not None:
            if self.dangling is None:
                raise ValueError("jump: expected dangling=, the nodes that jump, beside it, got none")
            checks.distribution(self.jump, "jump", nodes, values.dtype, values.device)
        if self.log_degree is not None:
            degree = checks.floating(self.log_degree, "log_degree")
            checks.same_dtype(degree, "log_degree", values.dtype, "values")
            checks.same_device(degree, "log_degree", values.device, "values")
            checks.shaped(degree, "log_degree", [nodes], "one degree per node")
        self._check_rows()

    def _check_rows(self) -> None:
        sums = self._edge_sums.squeeze(-1)
        expected = 1 - self._pattern.open_ends.to(sums.dtype)
        longest = int(self.indptr.diff().max())
        # Each value is rounded by itself, but adding equal ones up errs in one direction all along.
        summed = longest * torch.finfo(sums.dtype).eps
        tolerance = checks.sum_tolerance(longest, self.values.dtype) + summed
        off = (sums - expected).abs()
        if bool((off > tolerance).any()):
            worst = int(off.argmax())
            raise ValueError(
                f"values: expected rows that sum to {int(expected[worst])} within {tolerance:.1e}, got row "
                f"{worst} that sums to {float(sums[worst]):.6g}; rows of dangling nodes stay empty, weights "
                "are normalised by SparseTransition.from_scipy or .from_edge_index"
            )

    @classmethod
    def from_edge_index(
        cls,
        edge_index: Tensor,
        weight: Tensor | None = None,
        num_nodes: int | None = None,
        *,
        undirected: bool = False,
        dangling: Dangling = "self",
        reversible: bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> "SparseTransition":
        """P[i, j] ∝ the weight of edge i → j; differentiable in `weight`.

        Edges are taken as given: one given once is one-way, and the weights of one given twice are added.

        Args:
            edge_index: Sources i and targets j, int32 or int64, shape [2, edges].
            weight: Weights ≥ 0, shape [edges]; all 1 if None.
            num_nodes: N; the largest node number + 1 if None.
            undirected: Add the mirror image of every edge that is not a self-loop.
            dangling: What a walk does at a node without weight out. "self" stays there, "uniform" jumps to
                every node alike, "restart" jumps to the signal (each channel divided by its sum, bound by
                `solve`), a distribution [N] says where to, "error" refuses such nodes. With any but "self" a
                walk with such nodes is not reversible.
            reversible: Whether the walk is; found from exact symmetry of the summed weights if None.
            dtype: Of the operator; that of `weight`, or torch's default, if None.

        Raises:
            TypeError: A tensor is of the wrong dtype.
            ValueError: A shape, device, node number or weight does not fit; the message names it.

        Example:
            >>> import torch, graphdiff as gd
            >>> path = torch.tensor([[0, 1], [1, 2]])
            >>> gd.SparseTransition.from_edge_index(path, undirected=True).dense()
            tensor([[0.0000, 1.0000, 0.0000],
                    [0.5000, 0.0000, 0.5000],
                    [0.0000, 1.0000, 0.0000]])
        """
        edge_index = checks.integers(edge_index, "edge_index")
        if edge_index.ndim != 2 or edge_index.shape[0] != 2:
            raise ValueError(
                f"edge_index: expected shape [2, edges], sources above targets, got "
                f"{checks.shape_text(edge_index)}"
            )
        edges = edge_index.shape[1]
        if weight is None:
            ones = checks.floating_dtype(dtype, torch.get_default_dtype())
            weight = torch.ones(edges, dtype=ones, device=edge_index.device)
        checks.shaped(checks.floating(weight, "weight"), "weight", [edges], "one weight per edge")
        checks.same_device(weight, "weight", edge_index.device, "edge_index")
        if num_nodes is None:
            if edges == 0:
                raise ValueError("num_nodes: expected a number beside an edge_index without edges, got None")
            num_nodes = max(int(edge_index.max()), 0) + 1
        checks.positive_integer(num_nodes, "num_nodes")
        checks.node_numbers(edge_index, "edge_index", num_nodes)
        source, target = edge_index.long()
        if undirected:
            apart = (source != target).nonzero().squeeze(-1)
            weight = torch.cat([weight, weight.index_select(0, apart)])
            source, target = torch.cat([source, target[apart]]), torch.cat([target, source[apart]])
            reversible = True if reversible is None else reversible
        return _walk(
            source,
            target,
            weight,
            num_nodes,
            name="weight",
            dangling=dangling,
            reversible=reversible,
            dtype=checks.floating_dtype(dtype, weight.dtype),
        )

    @classmethod
    def from_scipy(
        cls,
        A: Any,
        *,
        dangling: Dangling = "self",
        reversible: bool | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "SparseTransition":
        """P[i, j] ∝ A[i, j] for a scipy sparse array or matrix A ≥ 0 of any format, [N, N].

        `dangling` and `reversible` as in `from_edge_index`. Unless given, the dtype is A's, or torch's
        default where A holds integers or booleans.

        Raises:
            TypeError: `A` is not sparse, or not real.
            ValueError: `A` is not square, negative or not finite somewhere.

        Example:
            >>> import scipy.sparse, graphdiff as gd
            >>> gd.SparseTransition.from_scipy(scipy.sparse.csr_array([[0.0, 2.0], [1.0, 3.0]])).dense()
            tensor([[0.0000, 1.0000],
                    [0.2500, 0.7500]], dtype=torch.float64)
        """
        from scipy import sparse

        if not sparse.issparse(A):
            raise TypeError(
                f"A: expected a scipy sparse array or matrix, got {type(A).__name__}; wrap it with "
                "scipy.sparse.csr_array(A)"
            )
        _check_matrix(A.shape, "A")
        if A.dtype.kind not in "fiub":
            raise TypeError(f"A: expected real numbers, got {A.dtype}; take A.real or abs(A)")
        # Numbers that torch does not have (long double, unsigned, other byte orders) are widened on the way.
        weights = "f4" if A.dtype == "f4" else "f8"
        own = torch.float32 if weights == "f4" else torch.float64
        if A.dtype.kind != "f":
            own = torch.get_default_dtype()
        dtype = checks.floating_dtype(dtype, own)
        walk = _compiled_walk(A, reversible, dtype, device)
        if walk is not None:
            if not isinstance(dangling, str) or dangling != "self":
                _jump(dangling, walk.indices[:0], A.shape[0], dtype, walk.device)
            return walk
        rows = _ordinary_rows(A, device)
        if rows is not None:
            pattern, weight = rows
            nobody = pattern.indices[:0]
            _jump(dangling, nobody, A.shape[0], dtype, weight.device)
            one = weight.new_ones(())
            return _normalised(pattern, weight, weight, one, jump=None, reversible=reversible, dtype=dtype)
        coo = A.tocoo()
        numbers = coo.data.astype(weights), coo.row.astype("i8"), coo.col.astype("i8")
        weight, source, target = (torch.from_numpy(x).to(device) for x in numbers)
        return _walk(
            source,
            target,
            weight,
            A.shape[0],
            name="A",
            dangling=dangling,
            reversible=reversible,
            dtype=dtype,
        )

    @classmethod
    def from_networkx(
        cls,
        G: Any,
        *,
        weight: str | None = "weight",
        dangling: Dangling = "self",
        reversible: bool | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> "SparseTransition":
        """The walk on a networkx graph; node i is the i-th of G, edges of an undirected G go both ways.

        Args:
            G: Any networkx graph; the weights of parallel edges are added.
            weight: Name of the edge attribute that holds the weight, ≥ 0; an edge without it weighs 1, and so
                does every edge if None.
            dangling: As in `from_edge_index`.
            reversible: As in `from_edge_index`.
            dtype: Of the operator; torch's default if None.
            device: Of the operator; the CPU if None.

        Raises:
            TypeError: `G` is no networkx graph, or a weight is no number.
            ValueError: `G` has no node, or a weight is negative or not finite.

        Example:
            >>> import networkx, graphdiff as gd
            >>> gd.SparseTransition.from_networkx(networkx.star_graph(2)).rows([0])
            tensor([[0.0000, 0.5000, 0.5000]])
        """
        import networkx

        if not isinstance(G, networkx.Graph):
            raise TypeError(
                f"G: expected a networkx graph, got {type(G).__name__}; for matrices there are from_scipy, "
                "from_torch and DenseTransition.from_affinity"
            )
        number = {node: i for i, node in enumerate(G)}
        _check_matrix((len(number), len(number)), "the adjacency matrix of G")
        sources, targets, weights = [], [], []
        for u, v, held in G.edges(data=True):
            w = held.get(weight, 1) if weight is not None else 1
            if not isinstance(w, Real):
                raise TypeError(
                    f"weight: expected a number in {weight!r} of every edge that has it, got {w!r} for the "
                    f"edge from {u!r} to {v!r}; name another attribute, or weight=None for equal weights"
                )
            sources.append(number[u])
            targets.append(number[v])
            weights.append(float(w))
        return cls.from_edge_index(
            torch.tensor([sources, targets], dtype=torch.int64, device=device),
            torch.tensor(weights, dtype=checks.widest(torch.device(device or "cpu")), device=device),
            len(number),
            undirected=not G.is_directed(),
            dangling=dangling,
            reversible=reversible,
            dtype=checks.floating_dtype(dtype, torch.get_default_dtype()),
        )

    @classmethod
    def from_torch(
        cls,
        A: Tensor,
        *,
        dangling: Dangling = "self",
        reversible: bool | None = None,
        dtype: torch.dtype | None = None,
    ) -> "SparseTransition":
        """P[i, j] ∝ A[i, j] for a sparse tensor A ≥ 0 in COO or CSR layout, [N, N].

        Differentiable in A: the gradient that reaches it is sparse, with its pattern. torch does not
        differentiate values of a sparse tensor twice; `from_edge_index` with the weights themselves does.
        `dangling`, `reversible` and `dtype` as in `from_edge_index`.

        Raises:
            TypeError: `A` is not a floating-point tensor, or of another layout.
            ValueError: `A` is not square, negative or not finite somewhere.

        Example:
            >>> import torch, graphdiff as gd
            >>> A = torch.tensor([[0.0, 2.0], [1.0, 3.0]]).to_sparse()
            >>> gd.SparseTransition.from_torch(A).dense()
            tensor([[0.0000, 1.0000],
                    [0.2500, 0.7500]])
        """
        A = checks.floating(A, "A")
        _check_matrix(A.shape, "A")
        if A.layout == torch.sparse_coo:
            A = A.coalesce()
            (source, target), weight = A.indices(), A.values()
        elif A.layout == torch.sparse_csr:
            nodes = torch.arange(A.shape[0], device=A.device)
            source = torch.repeat_interleave(nodes, A.crow_indices().diff())
            target, weight = A.col_indices().long(), A.values()
        else:
            raise TypeError(
                f"A: expected layout torch.sparse_coo or torch.sparse_csr, got {A.layout}; convert it with "
                "A.to_sparse_coo()"
            )
        return _walk(
            source,
            target,
            weight,
            A.shape[0],
            name="A",
            dangling=dangling,
            reversible=reversible,
            dtype=checks.floating_dtype(dtype, weight.dtype),
        )

    @classmethod
    def from_points(cls, x: Tensor, k: int, bandwidth: float | Tensor) -> "SparseTransition":
        r"""The reversible walk between near neighbours among points in space.

        .. math:: P_{ij} \propto w_{ij} = \exp\left(-\frac{\lVert x_i - x_j \rVert^2}{2 h^2}\right)

        for i ≠ j of which one, at least, is among the k nearest of the other. Neighbours are exact, found
        without an N×N matrix. Rows are normalised in the log domain, so a walk leaves even a point that is
        far from all others; a single point stays where it is.

        Args:
            x: Points, shape [N, D], such as coordinates, colours or features.
            k: How many nearest neighbours, ≥ 1; all other points where there are no more. Copies of a point
                are neighbours like any, and which of several at exactly the same distance are taken is
                arbitrary, but the same every time.
            bandwidth: h > 0, in units of x: a number, or a 0-d tensor.

        Returns:
            A `SparseTransition` in the dtype of `x`, differentiable in `x` and `bandwidth` with the
            neighbours as they are.

        Raises:
            TypeError: `x` is not a floating-point tensor.
            ValueError: `x` is not [N, D], empty or not finite, or `k` or `bandwidth` is not positive.

        Example:
            >>> import torch, graphdiff as gd
            >>> x = torch.tensor([[0.0], [1.0], [3.0], [100.0]])
            >>> gd.SparseTransition.from_points(x, k=1, bandwidth=1.0).dense()
            tensor([[0.0000, 1.0000, 0.0000, 0.0000],
                    [0.8176, 0.0000, 0.1824, 0.0000],
                    [0.0000, 1.0000, 0.0000, 0.0000],
                    [0.0000, 0.0000, 1.0000, 0.0000]])
        """
        x = checks.floating(x, "x")
        if x.ndim != 2 or x.numel() == 0:
            raise ValueError(f"x: expected points [N, D], not empty, got {checks.shape_text(x)}")
        checks.finite(x, "x")
        checks.positive_integer(k, "k")
        if isinstance(bandwidth, Tensor):
            checks.same_device(checks.floating(bandwidth, "bandwidth"), "bandwidth", x.device, "x")
            checks.shaped(bandwidth, "bandwidth", [], "one number")
            checks.positive_number(float(bandwidth.detach()), "bandwidth")
        else:
            checks.positive_number(bandwidth, "bandwidth")

        nodes, points = len(x), x.to(checks.widest(x.device))
        i, j = nearest_pairs(points.detach(), k)
        if nodes == 1:
            i = j = torch.zeros(1, dtype=torch.int64, device=x.device)
        unlike = ((points.index_select(0, i) - points.index_select(0, j)) / bandwidth).square().sum(-1) / 2
        # Infinitely far from every neighbour is equally far from all.
        logits = (-unlike).clamp(min=torch.finfo(unlike.dtype).min)
        source, target = i, j
        if nodes > 1:
            source, target, logits = torch.cat([i, j]), torch.cat([j, i]), torch.cat([logits, logits])
        order = (source * nodes + target).argsort()
        source, target, logits = source[order], target[order], logits.index_select(0, order)
        largest = logits.new_full((nodes,), -torch.inf).scatter_reduce(0, source, logits.detach(), "amax")
        weight = (logits - largest[source]).exp()
        degree = weight.new_zeros(nodes).index_add(0, source, weight)
        numbers = torch.int32 if max(nodes, len(source)) < 2**31 else torch.int64
        return cls(
            row_starts(source, nodes).to(numbers),
            target.to(numbers),
            (weight / degree[source]).to(x.dtype),
            log_degree=(degree.log() + largest).clamp(min=torch.finfo(x.dtype).min).to(x.dtype),
        )

    @property
    def shape(self) -> torch.Size:
        """[..., N, N]; leading dimensions are those of `jump`."""
        nodes = self.indptr.shape[0] - 1  # len() of a tensor takes three times as long
        lead = self.jump.shape[:-1] if self.jump is not None else ()
        return torch.Size([*lead, nodes, nodes])

    @property
    def dtype(self) -> torch.dtype:
        """Of the probabilities."""
        return self.values.dtype

    @property
    def device(self) -> torch.device:
        """Where the probabilities lie, and all else with them."""
        return self.values.device

    @property
    def reversible(self) -> bool:  # type: ignore[override]  # follows from the degrees
        """Whether degrees are known."""
        return self.log_degree is not None

    @property
    def sparse(self) -> bool:  # type: ignore[override]  # a jump fills its row
        """Whether every row is as short as its node has edges."""
        return self.dangling is None

    @property
    def restarts(self) -> bool:  # type: ignore[override]  # until a jump is bound
        """Whether nodes without an edge out wait for the signal that says where they jump."""
        return self.dangling is not None and self.jump is None

    def restarting_at(self, distribution: Tensor) -> "SparseTransition":
        """The walk whose nodes without an edge out jump to a distribution, [..., N], ≥ 0 with sum 1.

        Its leading dimensions become those of the operator; differentiable.

        Raises:
            TypeError: The walk has no such nodes, or another dtype.
            ValueError: Not a distribution on N nodes.
        """
        if self.dangling is None:
            super().restarting_at(distribution)
        checks.distribution(distribution, "distribution", self.shape[-1], self.dtype, self.device)
        return self._sharing(replace(self, jump=distribution))

    @cached_property
    def _pattern(self) -> "_Pattern":
        return _Pattern(self.indptr, self.indices, self.dangling)

    def _each_tensor(self) -> Iterator[Tensor]:
        # A subclass may have others.
        if type(self) is not SparseTransition:
            return super()._each_tensor()
        # By name: a solve asks several times, and to look through all fields takes as long as a short pass.
        return iter([x for x in (self.values, self.log_degree, self.jump) if x is not None])

    def _sharing(self, other: Self) -> Self:
        # Sorting the edges by column is the dear part of a transpose: once for all operators on one pattern.
        other.__dict__["_pattern"] = self._pattern
        return other

    def _replaced(self, tensors: Iterator[Tensor], device: torch.device | None) -> Self:
        other = super()._replaced(tensors, device)
        return self._sharing(other) if other.device == self.device else other

    @cached_property
    def _edge_sums(self) -> Tensor:
        """Row sums of the edges alone, [N, 1]."""
        wide = checks.widest(self.device)
        values = self.values.detach().to(wide)
        ones = values.new_ones(self.shape[-1], 1)
        return csr_product(self.indptr, self.indices, values, ones)

    @cached_property
    def row_sums(self) -> Tensor:
        """Row sums in the best precision at hand, [..., N, 1]."""
        sums = self._edge_sums
        if self.jump is None:
            return sums
        total = self.jump.detach().to(sums.dtype).sum(-1)[..., None, None]
        return torch.where(self._pattern.open_ends.unsqueeze(-1), total, sums)

    @cached_property
    def largest_row_sum(self) -> Tensor:
        """The largest row sum, [..., 1, 1]."""
        return self.row_sums.amax(-2, keepdim=True)

    def rounding(self, dtype: torch.dtype) -> float:
        """Of the longest sum: the edges of a row or a column, or a jump, which reaches every node."""
        longest = self._pattern.longest
        if self.dangling is not None:
            longest = max(longest + len(self.dangling), self.shape[-1])
        return (longest + 4) * torch.finfo(dtype).eps

    def matmul(self, y: Tensor) -> Tensor:
        """P y."""
        jump, wide = self._bound_jump(), at_least_float32(y)
        product = self._product(wide, transposed=False)
        if jump is not None:
            landed = _weighted_sum(jump.to(wide.dtype), wide)
            product = torch.where(self._pattern.open_ends.unsqueeze(-1), landed, product)
        return product.to(y.dtype)

    def rmatmul(self, v: Tensor) -> Tensor:
        """Pᵀ v."""
        jump, wide = self._bound_jump(), at_least_float32(v)
        product = self._product(wide, transposed=True)
        if jump is not None and self.dangling is not None:
            leaving = wide.index_select(-2, self.dangling)
            mass = _weighted_sum(wide.new_ones(len(self.dangling)), leaving)
            product = product + jump.to(wide.dtype).unsqueeze(-1) * mass
        return product.to(v.dtype)

    def _bound_jump(self) -> Tensor | None:
        if self.restarts:
            raise ValueError(
                f"{self}: its nodes without an edge out restart at the signal, which a product alone does "
                "not know; solve, diffuse and pagerank bind it, or do so with restarting_at(distribution)"
            )
        return self.jump

    def _product(self, y: Tensor, *, transposed: bool) -> Tensor:
        """The edges' part of P y or Pᵀ y; leading dimensions of y are columns more."""
        if y.ndim > 2:
            columns = y.movedim(-2, 0)
            product = self._product(columns.reshape(len(columns), -1), transposed=transposed)
            return product.reshape(columns.shape).movedim(0, -2).contiguous()
        if composed(self.values, y):
            ends = (self._pattern.sources, self.indices)
            into, out_of = ends[::-1] if transposed else ends
            steps = self.values.to(y.dtype).unsqueeze(-1) * y.index_select(0, out_of)
            product = torch.zeros_like(y).index_add(0, into, steps)
        elif transposed and torch.get_num_threads() == 1 and _compiled_product(self.values, y):
            rows = self.indptr, self.indices, self.values
            product = _edges().transposed(*rows, y.detach())
        elif _scipy_is_fastest(self.values, y) and y.shape[1] == 1 and _worth_compiling(self.values.numel()):
            product = _edges().alone(self._matrix, y.detach(), transposed)
        elif _scipy_is_fastest(self.values, y) and not _compiled_product(self.values, y):
            matrix = self._transposed_matrix if transposed else self._matrix
            product = torch.from_numpy(matrix @ y.detach().numpy())
        elif transposed:
            indptr, indices, _ = self._pattern.transpose
            product = csr_product(indptr, indices, self._values_by_column.to(y.dtype), y)
        else:
            product = csr_product(self.indptr, self.indices, self.values.detach().to(y.dtype), y)
        return product.contiguous()

    @cached_property
    def _matrix(self) -> Any:
        """The edges as a `scipy.sparse.csr_array`."""
        from scipy import sparse

        values = self.values.detach().to("cpu", torch.promote_types(self.dtype, torch.float32))
        return sparse.csr_array(
            (values.numpy(), self.indices.cpu().numpy(), self.indptr.cpu().numpy()),
            shape=tuple(self.shape[-2:]),
        )

    @cached_property
    def _transposed_matrix(self) -> Any:
        """Its transpose, on the same arrays."""
        from scipy import sparse

        return _another(self._matrix, sparse.csc_array)

    @cached_property
    def _values_by_column(self) -> Tensor:
        return self.values.detach().index_select(0, self._pattern.transpose[2])

    def rows(self, index: Tensor | Sequence[int]) -> Tensor:
        """The rows P[index], [..., len(index), N], differentiable."""
        jump, index = self._bound_jump(), self._row_index(index)
        position, node, probability = self._steps(index)
        rows = self.values.new_zeros(len(index), self.shape[-1])
        rows = rows.index_put((position, node), probability, accumulate=True)
        if jump is None:
            return rows
        return torch.where(self._pattern.open_ends[index].unsqueeze(-1), jump.unsqueeze(-2), rows)

    def dense(self) -> Tensor:
        """The N×N matrix."""
        return self.rows(torch.arange(self.shape[-1], device=self.device))

    def neighbours(self, index: Tensor | Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Every step out of some nodes.

        Returns:
            (position, node, probability), each [number of steps]: from index[position] to node; the
            probability is differentiable.

        Raises:
            TypeError: Nodes without an edge out jump: their rows are not sparse.
        """
        if not self.sparse:
            return super().neighbours(index)
        return self._steps(self._row_index(index))

    def _steps(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        position, node, edge = _entries(self.indptr, self.indices, index)
        return position, node, self.values.index_select(0, edge)

    def _steps_into(self, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        indptr, sources, order = self._pattern.transpose
        position, node, edge = _entries(indptr, sources, index)
        return position, node, self.values.index_select(0, order[edge])

    def to_scipy(self) -> Any:
        """P as a `scipy.sparse.csr_array`, float64 or float32, which shares memory with P where it can.

        Raises:
            TypeError: Nodes without an edge out jump: their rows are not sparse.
        """
        if not self.sparse:
            return super().to_scipy()
        return _another(self._matrix)

    def sweep_order(self) -> Any:
        """As of any sparse operator; found once for all on the same edges."""
        if self._pattern.sweep_order is None:
            self._pattern.sweep_order = super().sweep_order()
        return self._pattern.sweep_order

    def relative_degrees(self, least: float) -> tuple[Any, float]:
        """As of any reversible operator, to the bit."""
        if self._degrees_by_length is None or not self._as_made:
            return super().relative_degrees(least)
        log_degree, fewest = self._degrees_by_length
        # Numpy rounds the difference as torch does, and needs a tenth of the time for so few numbers.
        log_weight = log_degree - log_degree[-1]
        table = torch.from_numpy(np.maximum(log_weight.astype(np.float64), least)).exp_().numpy()
        return _compiled().by_length(self.indptr.numpy(), table), float(log_weight[fewest])

    def check_finite(self) -> None:
        """As of any operator."""
        if not (self._ordinary and self._as_made):
            super().check_finite()

    @property
    def _as_made(self) -> bool:
        """Whether it is known that nobody has written to its tensors."""
        return not any(t.is_inference() or t._version for t in self._each_tensor())

    @cached_property
    def _equal_steps(self) -> bool:
        return super().equal_steps()

    def equal_steps(self) -> bool:
        """As of any sparse operator; known of graphs that came without weights."""
        return self._equal_steps

    def __repr__(self) -> str:
        facts = [f"{len(self.indices)} edges"]
        if self.dangling is not None:
            facts.append(f"{len(self.dangling)} {'restarting' if self.restarts else 'jumping'}")
        return f"{super().__repr__().removesuffix(')')}, {', '.join(facts)})"


class _Pattern:
    """What the edges without their values tell; shared by all operators on them."""

    symmetric = False
    """Whether it is known that every edge has a mirror image."""
    sweep_order: Any = None
    """That of the operators, once one was asked; four bytes a node."""

    def __init__(self, indptr: Tensor, indices: Tensor, dangling: Tensor | None) -> None:
        self.indptr, self.indices, self.dangling = indptr, indices, dangling

    @cached_property
    def sources(self) -> Tensor:
        """The node each edge leaves."""
        nodes = torch.arange(len(self.indptr) - 1, dtype=self.indptr.dtype, device=self.indptr.device)
        return _repeated(nodes, self.indptr.diff())

    @cached_property
    def transpose(self) -> tuple[Tensor, Tensor, Tensor]:
        """indptr and indices of Pᵀ, and the edge that stands at each of its places."""
        order = _stable_order(self.indices, len(self.indptr) - 1)
        return row_starts(self.indices, len(self.indptr) - 1), self.sources.index_select(0, order), order

    @cached_property
    def open_ends(self) -> Tensor:
        """Which nodes have no edge out, [N]."""
        marked = torch.zeros(len(self.indptr) - 1, dtype=torch.bool, device=self.indptr.device)
        if self.dangling is not None:
            marked[self.dangling.long()] = True
        return marked

    @cached_property
    def arrivals(self) -> Tensor:
        """How many edges enter each node, [N]."""
        return torch.bincount(self.indices, minlength=len(self.indptr) - 1)

    @cached_property
    def longest(self) -> int:
        """Most edges in a row or a column."""
        longest = int(self.indptr.diff().max())
        return longest if self.symmetric else max(longest, int(self.arrivals.max()))


def _another(matrix: Any, kind: type | None = None) -> Any:
    """Another sparse matrix of scipy on the same arrays; its transpose where `kind` has columns for rows.

    For square ones. One that is made anew takes longer, because scipy checks its arrays.
    """
    other: Any = object.__new__(kind or type(matrix))
    other.__dict__.update(matrix.__dict__)
    return other


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision as float32, all else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _stable_order(numbers: Tensor, count: int) -> Tensor:
    """What sorts numbers from 0 to count − 1, equal ones in the order they stand in."""
    if numbers.device.type != "cpu":
        return numbers.argsort(stable=True)
    from scipy import sparse

    # scipy makes columns of rows by counting, which takes less than half of the time of sorting.
    size = len(numbers)
    rows = torch.arange(size + 1, dtype=torch.int32 if max(size, count) < 2**31 else torch.int64)
    entries = torch.zeros(size, dtype=torch.int8).numpy(), numbers.to(rows.dtype).numpy(), rows.numpy()
    return torch.from_numpy(sparse.csr_array(entries, shape=(size, count)).tocsc().indices)


def _repeated(x: Tensor, counts: Tensor) -> Tensor:
    """Each entry of x as many times as it counts."""
    if x.device.type != "cpu":
        return torch.repeat_interleave(x, counts)
    return torch.from_numpy(np.repeat(x.detach().numpy(), counts.numpy()))  # in half of torch's time


def row_starts(rows: Tensor, nodes: int) -> Tensor:
    """Where each row begins once the entries are sorted by row, [nodes + 1]."""
    starts = torch.zeros(nodes + 1, dtype=rows.dtype, device=rows.device)
    starts[1:] = torch.bincount(rows, minlength=nodes).cumsum(0)
    return starts


@functools.cache
def _told_of_beta() -> None:
    """Torch warns once a process that CSR tensors are in beta, which is nothing to our users."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = torch.zeros(2, dtype=torch.int64)
        torch.sparse_csr_tensor(start, start[:0], torch.zeros(0), (1, 1), check_invariants=False)


def _entries(indptr: Tensor, indices: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Position, column and place of the entries of some rows, at a price that depends on these rows alone."""
    index = index.long()
    first = indptr[index].long()
    count = indptr[index + 1].long() - first
    position = torch.repeat_interleave(count)
    edge = torch.arange(len(position), device=index.device) + (first - count.cumsum(0) + count)[position]
    return position, indices[edge].long(), edge


def csr_product(indptr: Tensor, indices: Tensor, values: Tensor, y: Tensor) -> Tensor:
    """The CSR matrix times y [M, K], outside autograd; each row is summed edge after edge."""
    _told_of_beta()
    # Autocast would multiply in half precision, which CSR products do not have.
    with torch.no_grad(), torch.autocast(y.device.type, enabled=False):
        y, values, shape = y.detach().contiguous(), values.detach(), (len(indptr) - 1, len(y))
        if y.device.type == "cpu" and y.dtype == torch.float32:
            return torch.nn.functional.embedding_bag(
                indices, y, indptr, mode="sum", per_sample_weights=values, include_last_offset=True
            )
        if _compiled_product(values, y):
            found: Tensor = _edges().product(indptr, indices, values, y)
            return found
        if _scipy_is_fastest(values, y):
            from scipy import sparse

            rows = sparse.csr_array((values.numpy(), indices.numpy(), indptr.numpy()), shape=shape)
            return torch.from_numpy(rows @ y.numpy())
        matrix = torch.sparse_csr_tensor(indptr, indices, values, shape, check_invariants=False)
        return matrix @ y


@functools.cache
def _edges() -> Any:
    """The compiled products, or None where numba is not installed."""
    try:
        from graphdiff.operators import edges
    except ImportError:
        return None
    return edges


def _compiled_product(values: Tensor, y: Tensor) -> bool:
    """Whether it is worth it, and there: for y [N, K] in float64 with K > 1."""
    known = y.device.type == "cpu" and values.dtype == y.dtype == torch.float64
    enough = y.shape[1] > 1 and len(values) * y.shape[1] >= MANY
    return known and enough and _edges() is not None


def _scipy_is_fastest(values: Tensor, y: Tensor) -> bool:
    one_thread = y.device.type == "cpu" and torch.get_num_threads() == 1
    return one_thread and values.dtype == y.dtype == torch.float64


def composed(weights: Tensor, y: Tensor) -> bool:
    """Whether a product is put together from ordinary operations: for autograd, or for want of CSR."""
    recorded = torch.is_grad_enabled() and (weights.requires_grad or y.requires_grad)
    return recorded or y.device.type not in ("cpu", "cuda")


def _weighted_sum(weights: Tensor, y: Tensor) -> Tensor:
    """Σ_i w_i y_i over the nodes, [..., 1, K], for w [..., M] and y [..., M, K].

    Outside autograd as rows of a CSR matrix: a dot product of torch rounds one column alone differently.
    """
    if composed(weights, y):
        return (weights.unsqueeze(-1) * y).sum(-2, keepdim=True)
    batch = checks.broadcast_batch([weights.shape[:-1], y.shape[:-2]], "P and y")
    nodes, channels = y.shape[-2:]
    weights = weights.expand(*batch, nodes).reshape(-1)
    y = y.expand(*batch, nodes, channels).reshape(-1, channels)
    starts = torch.arange(batch.numel() + 1, device=y.device) * nodes
    summed = csr_product(starts, torch.arange(len(y), device=y.device), weights, y)
    return summed.reshape(*batch, 1, channels)


def _check_matrix(shape: Sequence[int], name: str) -> None:
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 0:
        raise ValueError(f"{name}: expected shape [N, N] with N ≥ 1, got {list(shape)}")


def _walk(
    source: Tensor,
    target: Tensor,
    weight: Tensor,
    nodes: int,
    *,
    name: str,
    dangling: Dangling,
    reversible: bool | None,
    dtype: torch.dtype,
) -> SparseTransition:
    """The walk along weighted edges, in any order and any multiplicity; `name` is that of the weights."""
    checks.finite(weight, name)
    checks.nonnegative(weight, name)
    device, wide = weight.device, checks.widest(weight.device)
    # In float64, because a node may have millions of edges to sum, and divided by the largest weight of the
    # row, because their sum may be infinite and their squares nothing.
    weight = weight.to(wide)
    largest = weight.new_zeros(nodes).scatter_reduce(0, source, weight.detach(), "amax")
    stuck = (largest == 0).nonzero().squeeze(-1)
    jump = _jump(dangling, stuck, nodes, dtype, device)
    # Edges of weight 0 out of such a node stay 0, whatever its policy.
    scaled = weight / largest.masked_fill(largest == 0, torch.inf).index_select(0, source)
    given = weight.detach()
    stays = isinstance(dangling, str) and dangling == "self"
    if stays and len(stuck):
        source, target = torch.cat([source, stuck]), torch.cat([target, stuck])
        loops = weight.new_ones(len(stuck))
        scaled, given = torch.cat([scaled, loops]), torch.cat([given, loops])

    key = source * nodes + target
    if not bool((key[1:] > key[:-1]).all()):
        order = _stable_order(target, nodes)
        order = order.index_select(0, _stable_order(source.index_select(0, order), nodes))
        # Indexing by brackets takes five times as long.
        source, target, key, scaled, given = (
            x.index_select(0, order) for x in (source, target, key, scaled, given)
        )
        first = torch.ones_like(key, dtype=torch.bool)
        first[1:] = key[1:] != key[:-1]
        if not bool(first.all()):
            source, target, place = source[first], target[first], first.cumsum(0) - 1
            scaled, given = (x.new_zeros(len(source)).index_add(0, place, x) for x in (scaled, given))
    jumps = len(stuck) > 0 and not stays
    numbers = torch.int32 if max(nodes, len(source)) < 2**31 else torch.int64
    dangling_nodes = stuck.to(numbers) if jumps else None
    pattern = _Pattern(row_starts(source, nodes).to(numbers), target.to(numbers), dangling_nodes)
    return _normalised(
        pattern, scaled, given, largest, jump=jump if jumps else None, reversible=reversible, dtype=dtype
    )


@functools.cache
def _compiled() -> Any:
    """The compiled passes over rows, or None where numba is not installed."""
    try:
        from graphdiff.operators import rows
    except ImportError:
        return None
    return rows


def _worth_compiling(edges: int) -> bool:
    """Whether compiled code, which has the same bits, is to pass over so many edges, and is there."""
    loaded = "graphdiff.operators.rows" in sys.modules
    return (loaded or edges >= FEW_EDGES) and _compiled() is not None


def _in_rows(A: Any) -> bool:
    """Whether the edges of a scipy matrix stand in sorted rows without repetitions."""
    return (
        A.format == "csr"
        and bool(A.has_canonical_format)
        and len(A.indptr) == A.shape[0] + 1
        and 0 < A.indptr[-1] == len(A.indices) == len(A.data)
    )


def _compiled_walk(
    A: Any, reversible: bool | None, dtype: torch.dtype, device: torch.device | str | None
) -> SparseTransition | None:
    """What `_normalised` makes of `_ordinary_rows`, to the bit, where numba is installed.

    What a walk is checked for follows from how its numbers come about.
    """
    from scipy import sparse

    on_cpu = device is None or torch.device(device).type == "cpu"
    if not on_cpu or dtype not in (torch.float32, torch.float64) or not _in_rows(A):
        return None
    nodes, count = A.shape[0], len(A.indices)
    if not _worth_compiling(count):
        return None
    number = "i4" if max(nodes, count) < 2**31 else "i8"
    weight, value = np.ascontiguousarray(A.data, "f8"), "f4" if dtype == torch.float32 else "f8"
    found = _compiled().block((nodes + 1, number), (count, number), (count, value), (nodes, "f8"))
    lengths, alike, degree, largest = _compiled().normalised(A.indptr, A.indices, weight, ORDINARY, *found)
    fewest, longest = lengths
    if fewest == 0:
        return None
    indptr, indices, _, sums = found
    compared = None if alike else weight
    symmetric = reversible is None and _compiled().symmetric(indptr, indices, compared)
    walk = object.__new__(SparseTransition)
    log_degree = None
    if symmetric or reversible:
        log_degree = torch.from_numpy(degree).log().to(dtype)
        if alike:
            table = log_degree.numpy()
            walk.__dict__["_degrees_by_length"] = table, fewest
            log_degree = torch.from_numpy(_compiled().by_length(indptr, table))
    edges = dict(zip(("indptr", "indices", "values"), map(torch.from_numpy, found[:3]), strict=True))
    walk.__dict__.update(edges, log_degree=log_degree, dangling=None, jump=None, _ordinary=True)
    walk.__dict__["_edge_sums"] = torch.from_numpy(sums.reshape(-1, 1))
    walk.__dict__["largest_row_sum"] = torch.from_numpy(np.array([[largest]]))
    walk.__dict__["_pattern"] = pattern = _Pattern(edges["indptr"], edges["indices"], None)
    pattern.symmetric = symmetric
    if alike:
        walk.__dict__["_equal_steps"] = True
    if symmetric:
        pattern.__dict__["longest"] = longest
    if type(A) is sparse.csr_array:
        matrix = _another(A)
        # Scipy copies now and then what it takes for a small part of a larger array: not torch's.
        matrix.indptr, matrix.indices, matrix.data = (x.numpy() for x in edges.values())
        walk.__dict__["_matrix"] = matrix
    return walk


def _ordinary_rows(A: Any, device: torch.device | str | None) -> tuple["_Pattern", Tensor] | None:
    """The edges of a scipy matrix with their weights, where they are sorted, summed and easy to normalise.

    So they are in most matrices, and then nothing is left of the work but divisions.
    """
    if not _in_rows(A):
        return None
    nodes = A.shape[0]
    weight = torch.from_numpy(A.data.astype("f8", copy=False)).to(
        device, checks.widest(torch.device(device or "cpu"))
    )
    smallest, largest = weight.aminmax()
    # Nor is a node stuck then (nan compares as false).
    if not bool((smallest > ORDINARY[0]) & (largest < ORDINARY[1])) or not bool(
        (np.diff(A.indptr) > 0).all()
    ):
        return None
    numbers = torch.int32 if max(nodes, A.nnz) < 2**31 else torch.int64
    # Copies: what becomes of A later is no concern of the walk.
    indptr, indices = (torch.from_numpy(x).to(device, numbers, copy=True) for x in (A.indptr, A.indices))
    checks.node_numbers(indices, "A", nodes)
    return _Pattern(indptr, indices, None), weight


def _normalised(
    pattern: "_Pattern",
    scaled: Tensor,
    given: Tensor,
    largest: Tensor,
    *,
    jump: Tensor | None,
    reversible: bool | None,
    dtype: torch.dtype,
) -> SparseTransition:
    """The walk along the edges of a pattern: weights, as given, divided by the `largest` of their row."""
    nodes = len(pattern.indptr) - 1
    if composed(scaled, scaled):
        degree = scaled.new_zeros(nodes).index_add(0, pattern.sources, scaled)
        of_edges = degree.masked_fill(degree == 0, 1.0).index_select(0, pattern.sources)
    else:
        degree = csr_product(pattern.indptr, pattern.indices, scaled, scaled.new_ones(nodes, 1)).squeeze(-1)
        of_edges = _repeated(degree.masked_fill(degree == 0, 1.0), pattern.indptr.diff())
    values = (scaled / of_edges).to(dtype)

    log_degree: Tensor | None = None
    mirrored = pattern.dangling is None and (_symmetric(pattern, given) if reversible is None else reversible)
    if mirrored:
        log_degree = degree.log() + largest.log()
        # A node on its own may have any degree; the largest of the others hides none of them.
        others = log_degree.isfinite()
        alone = log_degree.detach()[others].max() if bool(others.any()) else log_degree.new_zeros(())
        log_degree = torch.where(others, log_degree, alone).to(dtype)
    walk = SparseTransition(
        pattern.indptr, pattern.indices, values, log_degree=log_degree, dangling=pattern.dangling, jump=jump
    )
    walk.__dict__["_pattern"] = pattern
    return walk


def _jump(
    dangling: Dangling, stuck: Tensor, nodes: int, dtype: torch.dtype, device: torch.device
) -> Tensor | None:
    """Where the nodes without an edge out jump, if the policy says so already."""
    if isinstance(dangling, Tensor):
        return checks.distribution(dangling, "dangling", nodes, dtype, device)
    if dangling not in ("self", "uniform", "restart", "error"):
        raise ValueError(
            'dangling: expected "self", "uniform", "restart", "error" or a distribution [N], got '
            f"{dangling!r}"
        )
    if dangling == "error" and len(stuck):
        raise ValueError(
            f"dangling: expected every node to have an edge out, got {len(stuck)} of {nodes} nodes without, "
            f'for example {stuck[:5].tolist()}; choose "self", "uniform", "restart" or a distribution [N]'
        )
    return torch.full((nodes,), 1 / nodes, dtype=dtype, device=device) if dangling == "uniform" else None


def _symmetric(pattern: "_Pattern", weight: Tensor) -> bool:
    """Whether every edge has a mirror image of the very same weight."""
    there = weight != 0
    if not bool(there.all()):
        kept = there.long().cumsum(0).to(pattern.indptr.dtype)
        starts = torch.cat([kept.new_zeros(1), kept])[pattern.indptr.long()]
        pattern, weight = _Pattern(starts, pattern.indices[there], None), weight[there]
    if weight.device.type == "cpu" and _worth_compiling(len(weight)):
        rows = pattern.indptr.numpy(), pattern.indices.numpy(), weight.numpy()
        return bool(_compiled().symmetric(*rows))
    if not torch.equal(pattern.indptr.diff(), pattern.arrivals.to(pattern.indptr.dtype)):
        return False
    if weight.device.type == "cpu":
        from scipy import sparse

        rows = weight.numpy(), pattern.indices.numpy(), pattern.indptr.numpy()
        columns = sparse.csr_array(rows, shape=(len(pattern.indptr) - 1,) * 2).tocsc()
        return np.array_equal(columns.indices, rows[1]) and np.array_equal(columns.data, rows[0])
    _, sources, order = pattern.transpose
    return torch.equal(sources, pattern.indices) and torch.equal(weight.index_select(0, order), weight)
