"""The permutohedral lattice: sums with Gaussian weights between points, at a price linear in their number.

    G = S B_d … B_1 B_0 Sᵀ

(Adams, Baek and Davis, "Fast High-Dimensional Filtering Using the Permutohedral Lattice", Eurographics 2010).
The d coordinates of a point are laid into the hyperplane Σ = 0 of d + 1 dimensions, which the lattice A*_d
cuts into simplices. Sᵀ gives a point's value to the d + 1 corners of its simplex by its barycentric weights,
B_j blurs by [½ 1 ½] along axis j between corners that exist, S collects. Corners that no point touches are
left out, so the B_j do not commute, and G is not symmetric: Gᵀ has them in the other order.

As in sparse.py there are two ways to a product: kernels for sparse rows without autograd, gather, multiply,
add with it.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from graphdiff import checks
from graphdiff.operators.base import Transition
from graphdiff.operators.sparse import at_least_float32, composed, csr_product, row_starts

Order = Literal["up", "down", "both"]

# Where the ranges of all coordinates multiply to less than this many bits, corners are numbered exactly.
KEY_BITS = 62
# Beyond, float64 tells no two places in one cell apart.
FARTHEST = 1e9


@dataclass(frozen=True, eq=False, repr=False, init=False)
class PermutohedralLattice:
    r"""The lattice around some points, which sums over them with Gaussian weights.

    .. math:: (G y)_i \approx c \sum_j \exp\left(-\tfrac12 \lVert p_i - p_j \rVert^2\right) y_j

    with a factor c that depends on the number of dimensions alone, and G_ii > 0 among the weights.
    `gaussian_transition` tells how close this is.

    Args:
        positions: p, shape [N, D], in units of the Gaussian's standard deviation: coordinates are to be
            divided by theirs.

    Raises:
        TypeError: `positions` is not a floating-point tensor.
        ValueError: `positions` is not [N, D], empty, not finite, or beyond 1e9 somewhere.

    Example:
        >>> import torch, graphdiff as gd
        >>> lattice = gd.PermutohedralLattice(torch.tensor([[0.0], [0.1], [9.0]]))
        >>> together, apart = lattice.filter(torch.eye(3))[0, 1:]
        >>> bool(together > 0), bool(apart == 0)
        (True, True)
    """

    # Numbers of the corners of each point's simplex, [N, D + 1], and its weights there.
    corners: Tensor
    weights: Tensor
    # The corners before and after each corner along each axis, [D + 1, 2, M]; M where there is none.
    neighbours: Tensor

    def __init__(self, positions: Tensor) -> None:
        positions = checks.floating(positions, "positions")
        if positions.ndim != 2 or positions.numel() == 0:
            raise ValueError(
                f"positions: expected points [N, D], not empty, got {checks.shape_text(positions)}"
            )
        checks.finite(positions, "positions")
        farthest = float(positions.detach().abs().max())
        if farthest > FARTHEST:
            raise ValueError(
                f"positions: expected coordinates within ±{FARTHEST:g} standard deviations, got "
                f"{farthest:.3g}; divide by larger ones, or shift the points to their middle"
            )
        base, rank, weights = _simplices(positions.to(checks.widest(positions.device)))
        corners, neighbours = _numbered(base, rank)
        numbers = torch.int32 if max(corners.numel(), 3 * neighbours.shape[-1]) < 2**31 else torch.int64
        object.__setattr__(self, "corners", corners.to(numbers))
        object.__setattr__(self, "weights", weights.to(positions.dtype))
        object.__setattr__(self, "neighbours", neighbours.to(numbers))

    @property
    def points(self) -> int:
        """M, the corners that are touched by a point."""
        return self.neighbours.shape[-1]

    def filter(self, y: Tensor, order: Order = "up") -> Tensor:
        """G y for y [..., N, K] in the dtype of the positions; differentiable in y and in the positions.

        Args:
            y: Signals; [N] is taken as one of them.
            order: "up" is G, blurred along the axes from the first to the last, as Adams et al. and the CRF
                programs after them do; "down" is Gᵀ; "both" is their mean, which is symmetric.

        Raises:
            TypeError: `y` is of another dtype.
            ValueError: `y` has another number of points, or `order` is another word.
        """
        checks.same_dtype(checks.floating(y, "y"), "y", self.weights.dtype, "the positions")
        checks.same_device(y, "y", self.weights.device, "the positions")
        if order not in ("up", "down", "both"):
            raise ValueError(f'order: expected "up", "down" or "both", got {order!r}')
        columns = checks.signal(y, len(self.corners), "y")
        summed = self._filtered(at_least_float32(columns), order).to(y.dtype)
        return summed.squeeze(-1) if y.ndim == 1 else summed

    def _filtered(self, y: Tensor, order: Order) -> Tensor:
        """The same for float32 or float64, [..., N, K]; leading dimensions of y are columns more."""
        columns = y.movedim(-2, 0)
        flat = columns.reshape(len(columns), -1)
        filtered = self._composed if composed(self.weights, y) else self._multiplied
        return filtered(flat, order).reshape(columns.shape).movedim(0, -2).contiguous()

    def _composed(self, y: Tensor, order: Order) -> Tensor:
        corners, weights = self.corners.flatten(), self.weights.to(y.dtype).unsqueeze(-1)
        given = (weights * y.unsqueeze(1)).flatten(0, 1)
        splat = y.new_zeros(self.points, y.shape[-1]).index_add(0, corners, given)

        def blurred(z: Tensor, axis: int) -> Tensor:
            # What lies outside is the last row, 0.
            before, after = (F.pad(z, (0, 0, 0, 1)).index_select(0, x) for x in self.neighbours[axis])
            return z + (before + after) / 2

        z = _in_order(blurred, splat, len(self.neighbours), order)
        return (weights * z.index_select(0, corners).reshape(*self.corners.shape, -1)).sum(1)

    def _multiplied(self, y: Tensor, order: Order) -> Tensor:
        pattern = self._pattern
        by_point, by_corner = self._values(y.dtype)
        starts, points, _ = pattern.touching
        splat = _product(starts, points, by_corner, y)

        def blurred(z: Tensor, axis: int) -> Tensor:
            starts, near, weight = pattern.blurs[axis]
            return _product(starts, near, weight.to(z.dtype), z)

        z = _in_order(blurred, splat, len(self.neighbours), order)
        return _product(pattern.starts, self.corners.flatten(), by_point, z)

    def _values(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The weights, point after point and corner after corner."""
        if dtype not in self._cast:
            weights = self.weights.detach().to(dtype).flatten()
            self._cast[dtype] = weights, weights[self._pattern.touching[2]]
        return self._cast[dtype]

    @cached_property
    def _cast(self) -> dict[torch.dtype, tuple[Tensor, Tensor]]:
        return {}

    @cached_property
    def _pattern(self) -> "_Pattern":
        return _Pattern(self.corners, self.neighbours)

    def with_weights(self, weights: Tensor) -> "PermutohedralLattice":
        """The same lattice with the same weights in another tensor: of another dtype, or elsewhere."""
        other = object.__new__(PermutohedralLattice)
        object.__setattr__(other, "weights", weights)
        for name in ("corners", "neighbours"):
            object.__setattr__(other, name, getattr(self, name).to(weights.device))
        if weights.device == self.weights.device:
            other.__dict__["_pattern"] = self._pattern
        return other

    def __repr__(self) -> str:
        nodes, corners = self.corners.shape
        return f"PermutohedralLattice({nodes} points in {corners - 1} dimensions, {self.points} corners)"


@dataclass(frozen=True, eq=False, repr=False)
class GaussianTransition(Transition):
    """P = D⁻¹W, W = (G + Gᵀ)/2 of a lattice; made by `gaussian_transition`.

    Args:
        lattice: The lattice around the points.
    """

    lattice: PermutohedralLattice

    reversible = True
    entrywise = True

    @property
    def shape(self) -> torch.Size:
        """[N, N]."""
        nodes = len(self.lattice.corners)
        return torch.Size([nodes, nodes])

    def matmul(self, y: Tensor) -> Tensor:
        """P y."""
        wide = at_least_float32(y)
        return (self.lattice._filtered(wide, "both") / self._degree(wide)).to(y.dtype)

    def rmatmul(self, v: Tensor) -> Tensor:
        """Pᵀ v."""
        wide = at_least_float32(v)
        return self.lattice._filtered(wide / self._degree(wide), "both").to(v.dtype)

    @property
    def log_degree(self) -> Tensor:
        """log d, [N]."""
        weights = self.lattice.weights
        return self._degree(at_least_float32(weights)).squeeze(-1).log().to(weights.dtype)

    def _degree(self, like: Tensor) -> Tensor:
        """Row sums of W in a dtype, [N, 1]."""
        weights = self.lattice.weights
        if weights.requires_grad and torch.is_grad_enabled():
            return self.lattice._filtered(like.new_ones(len(weights), 1), "both")
        found = self._degrees.get(like.dtype)
        if found is None:
            with torch.no_grad():
                found = self.lattice._filtered(like.new_ones(len(weights), 1), "both")
            self._degrees[like.dtype] = found
        return found

    @cached_property
    def _degrees(self) -> dict[torch.dtype, Tensor]:
        return {}

    def rounding(self, dtype: torch.dtype) -> float:
        """Of the longest chain of sums and products, once for W y and once for the degrees.

        No term is negative, so each is off by at most its own chain, relative to itself.
        """
        axes = len(self.lattice.neighbours)
        chain = self.lattice._pattern.longest + 3 * axes + 4
        off = chain * torch.finfo(dtype).eps
        return off / (1 - off) if off < 0.5 else math.inf

    def degree_rounding(self, dtype: torch.dtype) -> float:
        """As of a product, and of a logarithm of at most that many nodes and blurs."""
        nodes, axes = self.lattice.corners.shape
        largest = math.log(nodes) + (axes + 1) * math.log(2)
        return self.rounding(dtype) + 2 * torch.finfo(dtype).eps * largest

    def _each_tensor(self) -> Iterator[Tensor]:
        """The weights at the corners, which gradients pass on their way to the positions."""
        yield self.lattice.weights

    def _replaced(self, tensors: Iterator[Tensor], device: torch.device | None) -> "GaussianTransition":
        return GaussianTransition(self.lattice.with_weights(next(tensors)))


def gaussian_transition(positions: Tensor) -> GaussianTransition:
    r"""The reversible walk between all points, near ones above all, without an N×N matrix.

    .. math:: P_{ij} \propto w_{ij} \approx \exp\left(-\tfrac12 \lVert p_i - p_j \rVert^2\right)

    by the permutohedral lattice. For the pixels of an image, positions (row/σ, column/σ) give a spatial walk,
    and with the colours beside them, (row/σ, column/σ, r/τ, g/τ, b/τ), the walk of the bilateral filter. A
    product costs O(N·D + M·D) a channel, M the corners of the lattice, at most N(D + 1).

    W is *the lattice's*, symmetric and ≥ 0, with w_ii among its entries: `solve` is exact about that P, whose
    distance from the Gaussian's is what the lattice costs. docs/gaussian.md tells it: of the probabilities in
    a row about 5 % stand elsewhere in two dimensions, 10 % in five where points are dense; more where points
    are sparse, and far more from eight dimensions on.

    Args:
        positions: p, shape [N, D], in units of the Gaussian's standard deviation: coordinates are to be
            divided by theirs.

    Returns:
        A `GaussianTransition` on N nodes in the dtype of `positions`, differentiable in these with the
        simplices as they are. Where a point leaves its simplex P jumps, which no gradient tells.

    Raises:
        TypeError: `positions` is not a floating-point tensor.
        ValueError: `positions` is not [N, D], empty, not finite, or beyond 1e9 somewhere.

    Example:
        >>> import torch, graphdiff as gd
        >>> P = gd.gaussian_transition(torch.tensor([[0.0], [1.0], [8.0]]))
        >>> P.dense()  # between points one deviation apart the Gaussian's is 0.3775
        tensor([[0.5858, 0.4142, 0.0000],
                [0.3934, 0.6066, 0.0000],
                [0.0000, 0.0000, 1.0000]])
    """
    return GaussianTransition(PermutohedralLattice(positions))


def _simplices(positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where points lie: for each coordinate in the hyperplane, [N, D + 1] all.

    Returns:
        The simplex's corner of remainder 0, int64; the ranks of the distances from it, 0 for the largest; and
        the barycentric weights of the corners of remainder 0 to D.
    """
    dimensions = positions.shape[1]
    sides = dimensions + 1
    index = torch.arange(1, sides, dtype=positions.dtype, device=positions.device)
    # The blur along all axes, and the two interpolations, have this deviation on the lattice.
    deviation = math.sqrt(2 / 3) * sides
    scaled = positions * (deviation / (index * (index + 1)).sqrt())
    # An orthogonal basis of the hyperplane: (1, …, 1, −i, 0, …, 0), by sums that treat each point alone.
    after = scaled.flip(-1).cumsum(-1).flip(-1)
    raised = F.pad(after, (0, 1)) - F.pad(scaled * index, (1, 0))

    fixed = raised.detach()
    base = (fixed / sides).round()
    order = (fixed - base * sides).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, _counting(order))
    # Rounding may have left the hyperplane by some steps: those coordinates go back that rounded farthest.
    rank += base.sum(-1, keepdim=True).long()
    turn = rank.div(sides, rounding_mode="floor")
    rank -= sides * turn
    base = (base - turn).long() * sides

    order = order.scatter_(-1, rank, _counting(rank))
    above = (raised - base).gather(-1, order) / sides
    steps = above[:, :-1] - above[:, 1:]
    first = 1 - (above[:, :1] - above[:, -1:])
    return base, rank, torch.cat([first, steps.flip(-1)], -1).clamp(min=0)


def _numbered(base: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers of the simplices' corners, [N, D + 1], and the corners' neighbours, [D + 1, 2, M].

    Corners get keys that are linear in their coordinates, so that neighbours' keys differ by constants. The
    last coordinate follows from the others.
    """
    sides = base.shape[1]
    dimensions, device = sides - 1, base.device
    low, high = (end[:dimensions].tolist() for end in base.aminmax(dim=0))
    spans = [b - a + 3 * dimensions + 2 for a, b in zip(low, high, strict=True)]
    base = base - torch.tensor([*low, 0], device=device) + 2 * dimensions

    attempt = 0
    while True:
        factors, exact = _factors(spans, attempt)
        factor = torch.tensor([*factors, 0], device=device)
        whole = factor.sum()
        order = torch.empty_like(rank).scatter_(-1, rank, _counting(rank))
        lowered = F.pad(factor[order].flip(-1).cumsum(-1)[:, :-1], (1, 0))
        remainder = torch.arange(sides, device=device)
        keys = (base * factor).sum(-1, keepdim=True) + remainder * whole - sides * lowered
        points, corners = torch.unique(keys, return_inverse=True)
        neighbours = _neighbours(points, (whole - sides * factor).unsqueeze(-1))
        if exact or _apart(base, rank, corners, neighbours):
            return corners, neighbours
        attempt += 1


def _factors(spans: list[int], attempt: int) -> tuple[list[int], bool]:
    """Of the coordinates in a corner's key, and whether they tell all corners apart for certain.

    Where int64 has no room for all combinations, sums of random multiples mod 2⁶⁴ hardly ever coincide;
    whether they do is then checked.
    """
    factors = [math.prod(spans[i + 1 :]) for i in range(len(spans))]
    if math.prod(spans) < 2**KEY_BITS:
        return factors, True
    drawn = torch.randint(-(2**62), 2**62, [len(spans)], generator=torch.Generator().manual_seed(attempt))
    return (2 * drawn + 1).tolist(), False


def _neighbours(points: Tensor, steps: Tensor) -> Tensor:
    """The keys' numbers a step [D + 1, 1] before and after each, [D + 1, 2, M]; M where there is none."""
    count, number = len(points), torch.arange(len(points), device=points.device)
    wanted = points + steps
    place = torch.searchsorted(points, wanted).clamp_(max=count - 1)
    found = points[place] == wanted
    neighbours = torch.full((len(steps), 2, count), count, device=points.device)
    for axis, there in enumerate(found):
        neighbours[axis, 1, there] = place[axis, there]
        neighbours[axis, 0, place[axis, there]] = number[there]
    return neighbours


def _apart(base: Tensor, rank: Tensor, corners: Tensor, neighbours: Tensor) -> bool:
    """Whether equal keys meant equal corners, coordinate by coordinate."""
    sides = base.shape[1]
    remainder = torch.arange(sides, device=base.device)
    for i in range(sides - 1):
        lowered = rank[:, i : i + 1] > sides - 1 - remainder
        coordinate = base[:, i : i + 1] + remainder - sides * lowered
        held = torch.zeros(neighbours.shape[-1], dtype=base.dtype, device=base.device)
        held[corners] = coordinate
        if not torch.equal(held[corners], coordinate):
            return False
        for axis, after in enumerate(neighbours[:, 1]):
            there = after < len(held)
            step = 1 - sides * (axis == i)
            if not torch.equal(held[after[there]], held[there] + step):
                return False
    return True


class _Pattern:
    """What the corners without their weights tell; shared by lattices of all dtypes."""

    def __init__(self, corners: Tensor, neighbours: Tensor) -> None:
        self.corners, self.neighbours = corners, neighbours

    @cached_property
    def starts(self) -> Tensor:
        """Where a point's corners begin."""
        nodes, sides = self.corners.shape
        return torch.arange(nodes + 1, dtype=self.corners.dtype, device=self.corners.device) * sides

    @cached_property
    def touching(self) -> tuple[Tensor, Tensor, Tensor]:
        """For each corner the points that touch it: starts, points, and their places among all weights."""
        flat = self.corners.flatten()
        place = flat.argsort(stable=True)
        points = place.div(self.corners.shape[1], rounding_mode="floor").to(flat.dtype)
        return row_starts(flat, self.neighbours.shape[-1]), points, place

    @cached_property
    def blurs(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """B_j as rows: starts, corners, weights in float32, which holds them exactly."""
        return [self._blur(before, after) for before, after in self.neighbours]

    def _blur(self, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        number = torch.arange(len(before), dtype=before.dtype, device=before.device)
        near = torch.stack([number, before, after], -1)
        there = near < len(number)
        starts = F.pad(there.sum(-1).cumsum(0), (1, 0)).to(before.dtype)
        weight = torch.tensor([1.0, 0.5, 0.5], device=before.device).expand(near.shape)
        return starts, near[there], weight[there]

    @cached_property
    def longest(self) -> int:
        """Most points that touch a corner."""
        return int(torch.bincount(self.corners.flatten()).max())


def _in_order(blurred: Callable[[Tensor, int], Tensor], z: Tensor, axes: int, order: Order) -> Tensor:
    if order == "both":
        return (_in_order(blurred, z, axes, "up") + _in_order(blurred, z, axes, "down")) / 2
    for axis in range(axes) if order == "up" else reversed(range(axes)):
        z = blurred(z, axis)
    return z


def _product(starts: Tensor, indices: Tensor, values: Tensor, y: Tensor) -> Tensor:
    """Rows of a sparse matrix times y [M, K], outside autograd.

    For float32 on the CPU torch's weighted sums of embeddings have the fastest kernel; each entry of a row is
    added after the one before there too.
    """
    if y.dtype != torch.float32 or y.device.type != "cpu":
        return csr_product(starts, indices, values, y)
    with torch.no_grad():
        return F.embedding_bag(
            indices, y.detach(), starts, mode="sum", per_sample_weights=values, include_last_offset=True
        )


def _counting(like: Tensor) -> Tensor:
    """0, 1, 2, … in every row."""
    return torch.arange(like.shape[-1], device=like.device).expand(like.shape)
