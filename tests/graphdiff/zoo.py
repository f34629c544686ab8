"""The lists whose product the tests run over, and the oracle they are held against.

A new operator or solver is one line here.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

import graphdiff as gd

# From a generator and (batch, nodes) to the leaf tensors; from these to the operator.
Leaves = Callable[[torch.Generator, tuple[int, ...], int], Tensor]


@dataclass(frozen=True)
class Kind:
    leaf: Leaves
    build: Callable[[Tensor], gd.Transition]
    dense: Callable[[Tensor], Tensor]
    reversible: bool = True  # where there is more than one node
    batched: bool = True  # whether a leaf may have leading dimensions
    relabelled: tuple[int, ...] = (-2, -1)  # the dimensions of a leaf to permute with the nodes, if any do


def _features(size: float) -> Leaves:
    return lambda g, batch, n: size * torch.randn(*batch, n, 3, generator=g, dtype=torch.float64)


def _hub_features(g: torch.Generator, batch: tuple[int, ...], n: int) -> Tensor:
    """One node far longer than the others: every row points at it."""
    psi = torch.randn(*batch, n, 3, generator=g, dtype=torch.float64)
    psi[..., 0, :] = 6.0
    return psi


def _directed(g: torch.Generator, batch: tuple[int, ...], n: int) -> Tensor:
    return torch.rand(*batch, n, n, generator=g, dtype=torch.float64) + 1e-3


def _symmetric(g: torch.Generator, batch: tuple[int, ...], n: int) -> Tensor:
    W = _directed(g, batch, n)
    return W + W.mT


def _pattern(edges: Callable[[int], Tensor]) -> Leaves:
    """A fixed graph with random symmetric weights."""

    def leaf(g: torch.Generator, batch: tuple[int, ...], n: int) -> Tensor:
        return _symmetric(g, batch, n) * edges(n)

    return leaf


def _path(n: int) -> Tensor:
    A = torch.diag(torch.ones(n - 1, dtype=torch.float64), 1)
    return A + A.T if n > 1 else torch.ones(1, 1, dtype=torch.float64)


def _star(n: int) -> Tensor:
    A = torch.zeros(n, n, dtype=torch.float64)
    A[0, 1:] = A[1:, 0] = 1
    return A if n > 1 else A + 1


def _isolated(n: int) -> Tensor:
    """A path, and a last node without an edge."""
    A = torch.zeros(n, n, dtype=torch.float64)
    if n > 2:
        A[:-1, :-1] = _path(n - 1)
    return A


def _stuck(n: int) -> Tensor:
    """Edges in one direction and the other at random, none out of the last node."""
    A = torch.rand(n, n, generator=torch.Generator().manual_seed(n), dtype=torch.float64) < 0.6
    A[:-1, -1] = True
    A[-1] = False
    return A.double()


def _disconnected(n: int) -> Tensor:
    """Two cliques, and with one node left over an isolated node with its self-loop."""
    half = (n + 1) // 2
    A = torch.zeros(n, n, dtype=torch.float64)
    A[:half, :half] = 1
    A[half:, half:] = 1
    return A


def _normalised(W: Tensor) -> Tensor:
    return W / W.sum(-1, keepdim=True)


def _dense(leaf: Leaves, reversible: bool = True) -> Kind:
    return Kind(leaf, gd.DenseTransition.from_affinity, _normalised, reversible)


def _sparse(edges: Callable[[int], Tensor], dangling: str = "self", reversible: bool = True) -> Kind:
    """Random weights on a fixed graph; a weight of 0 is no edge, so nothing flows to it."""

    def build(W: Tensor) -> gd.Transition:
        edge_index = W.detach().nonzero().T
        weight = W[tuple(edge_index)]
        return gd.SparseTransition.from_edge_index(edge_index, weight, len(W), dangling=dangling)

    def dense(W: Tensor) -> Tensor:
        n, W = len(W), torch.where(W == 0, 0.0, W)
        landed = torch.eye(n).double() if dangling == "self" else torch.full((n, n), 1 / n).double()
        return _normalised(torch.where(W.sum(-1, keepdim=True) == 0, landed, W))

    return Kind(_pattern(edges), build, dense, reversible, batched=False)


def _sides(n: int) -> tuple[int, int]:
    """Height and width of a grid of n pixels, as near to a square as n allows."""
    height = max(h for h in range(1, n + 1) if n % h == 0 and h * h <= n)
    return height, n // height


def _grid(connectivity: int) -> Kind:
    def build(pixels: Tensor) -> gd.Transition:
        image = pixels.T.reshape(3, *_sides(len(pixels)))
        return gd.grid_transition(image, beta=0.7, connectivity=connectivity)

    def dense(pixels: Tensor) -> Tensor:
        n, width = len(pixels), _sides(len(pixels))[1]
        place = torch.arange(n)
        place = torch.stack([place // width, place % width], -1)
        apart = (place.unsqueeze(1) - place).abs()
        steps = apart.sum(-1) if connectivity == 4 else apart.amax(-1)
        unlike = (pixels.unsqueeze(1) - pixels).square().sum(-1)
        return torch.softmax((-0.7 * unlike).masked_fill(steps != min(1, n - 1), -torch.inf), -1)

    return Kind(_features(1.0), build, dense, batched=False, relabelled=())


def _points(k: int) -> Kind:
    """Neighbours of points in space, one-sided ones included."""

    def dense(x: Tensor) -> Tensor:
        n = len(x)
        squares = (x.unsqueeze(1) - x).square().sum(-1)
        eye = torch.eye(n, dtype=torch.bool)
        found = squares.masked_fill(eye, torch.inf).argsort(-1)[:, : min(k, n - 1)]
        near = torch.zeros(n, n, dtype=torch.bool).scatter(1, found, True)
        near = near | near.T if n > 1 else eye
        return torch.softmax((-squares / (2 * 0.8**2)).masked_fill(~near, -torch.inf), -1)

    return Kind(
        _features(1.0),
        lambda x: gd.SparseTransition.from_points(x, k, bandwidth=0.8),
        dense,
        batched=False,
        relabelled=(-2,),
    )


def lattice_filter(p: Tensor) -> Tensor:
    """G of Adams et al. as a dense matrix: each point's simplex by search, its weights by a linear system."""
    n, d = p.shape
    basis = torch.zeros(d + 1, d, dtype=torch.float64)
    for i in range(1, d + 1):
        basis[:i, i - 1], basis[i, i - 1] = (i * (i + 1)) ** -0.5, -i * (i * (i + 1)) ** -0.5
    raised = (2 / 3) ** 0.5 * (d + 1) * p @ basis.T

    fixed = raised.detach()
    roundings = torch.cartesian_prod(*[torch.tensor([0, 1])] * (d + 1)).double()
    candidates = (d + 1) * ((fixed / (d + 1)).floor().unsqueeze(1) + roundings)
    squares = (candidates - fixed.unsqueeze(1)).square().sum(-1)
    nearest = squares.masked_fill(candidates.sum(-1) != 0, torch.inf).argmin(-1)
    base = candidates[torch.arange(n), nearest].unsqueeze(1)
    rank = (fixed - base.squeeze(1)).argsort(dim=-1, descending=True, stable=True).argsort(-1).unsqueeze(1)
    k = torch.arange(d + 1).unsqueeze(-1)
    vertices = base + k - (d + 1) * (rank > d - k)  # [n, d + 1 vertices, d + 1 coordinates]

    one = torch.ones(n, 1, dtype=torch.float64)
    system = torch.cat([vertices.mT, one.unsqueeze(-1).expand(n, 1, d + 1)], 1)
    weights = torch.linalg.lstsq(system, torch.cat([raised, one], -1).unsqueeze(-1)).solution.squeeze(-1)
    points, corner = torch.unique(vertices.reshape(-1, d + 1), dim=0, return_inverse=True)
    S = torch.zeros(n, len(points), dtype=torch.float64).scatter_add(1, corner.reshape(n, d + 1), weights)
    apart = points.unsqueeze(0) - points.unsqueeze(1)
    G = S.T
    for j in range(d + 1):
        step = 1.0 - (d + 1) * (torch.arange(d + 1) == j)
        after = (apart == step).all(-1).double()
        G = G + (after + after.T) / 2 @ G
    return S @ G


def _gaussian(dimensions: int) -> Kind:
    def leaf(g: torch.Generator, batch: tuple[int, ...], n: int) -> Tensor:
        # Near enough to each other that no point is out of reach.
        return 0.25 * torch.randn(n, dimensions, generator=g, dtype=torch.float64)

    def dense(p: Tensor) -> Tensor:
        G = lattice_filter(p)
        return _normalised(G + G.T)

    return Kind(leaf, gd.gaussian_transition, dense, batched=False, relabelled=(-2,))


def _lazy_ring() -> Kind:
    """Stays with a probability of its own at each node, else steps to either side; written as a product."""

    def leaf(g: torch.Generator, batch: tuple[int, ...], n: int) -> Tensor:
        return 0.1 + 0.8 * torch.rand(*batch, n, 1, generator=g, dtype=torch.float64)

    def product(y: Tensor, stay: Tensor) -> Tensor:
        return stay * y + (1 - stay) * (y.roll(1, -2) + y.roll(-1, -2)) / 2

    def build(stay: Tensor) -> gd.Transition:
        log_degree = -torch.log1p(-stay).squeeze(-1)
        shape = (*stay.shape[:-1], stay.shape[-2])
        return gd.FunctionTransition(product, shape, tensors=(stay,), log_degree=log_degree)

    def dense(stay: Tensor) -> Tensor:
        eye = torch.eye(stay.shape[-2], dtype=torch.float64)
        return stay * eye + (1 - stay) * (eye.roll(1, -2) + eye.roll(-1, -2)) / 2

    return Kind(leaf, build, dense, relabelled=())


def _attention(leaf: Leaves, scale: float = 1.0) -> Kind:
    return Kind(
        leaf,
        lambda psi: gd.AttentionTransition(psi, scale=scale),
        lambda psi: torch.softmax(scale * psi @ psi.mT, -1),
        relabelled=(-2,),
    )


OPERATORS: dict[str, Kind] = {
    "directed": _dense(_directed, reversible=False),
    "symmetric": _dense(_symmetric),
    "path": _dense(_pattern(_path)),
    "star": _dense(_pattern(_star)),
    "disconnected": _dense(_pattern(_disconnected)),
    "sparse directed": _sparse(_stuck, reversible=False),
    "sparse path": _sparse(_path),
    "sparse star": _sparse(_star),
    "isolated node": _sparse(_isolated),
    "sparse disconnected": _sparse(_disconnected),
    "uniform jump": _sparse(_stuck, "uniform", reversible=False),
    "grid": _grid(4),
    "grid of 8": _grid(8),
    "points": _points(3),
    "gaussian": _gaussian(3),
    "function": _lazy_ring(),
    "flat attention": _attention(_features(0.3)),
    "scaled attention": _attention(_features(2.0), scale=0.37),
    "sharp attention": _attention(_features(5.0)),
    "hub attention": _attention(_hub_features),
}

SOLVERS: dict[str, gd.solvers.Solver | gd.solvers.Auto] = {
    "Direct": gd.solvers.Direct(),
    "Walk": gd.solvers.Walk(),
    "Chebyshev": gd.solvers.Chebyshev(),
    "CG": gd.solvers.CG(),
    "BlockCG": gd.solvers.BlockCG(),
    "MixedPrecision": gd.solvers.MixedPrecision(),
    "BiCGSTAB": gd.solvers.BiCGSTAB(),
    "Shifted": gd.solvers.Shifted(),
    "Push": gd.solvers.Push(),
    "Auto": gd.solvers.Auto(),
}
if importlib.util.find_spec("pyamg"):  # else test_boundary.py skips a test that says so
    SOLVERS["Multigrid"] = gd.solvers.Multigrid()
if importlib.util.find_spec("numba"):  # else test_ssor.py skips and says so
    SOLVERS["SSOR"] = gd.solvers.SSOR()
    SOLVERS["DirectedSSOR"] = gd.solvers.DirectedSSOR()


def applies(solver: gd.solvers.Solver | gd.solvers.Auto, P: gd.Transition, mus: int = 1) -> bool:
    """Whether the solver is for such walks, and so many µ for the channels.

    Some need reversible walks, some sparse ones, some one µ, and say so.
    """
    if isinstance(solver, gd.solvers.MixedPrecision):
        return applies(solver.inner, P, mus)
    if isinstance(solver, gd.solvers.BlockCG) and mus > 1:
        return False
    sparse = gd.solvers.Multigrid | gd.solvers.SSOR | gd.solvers.DirectedSSOR | gd.solvers.Push
    if isinstance(solver, sparse) and not P.sparse:
        return False
    reversible = (
        gd.solvers.CG | gd.solvers.BlockCG | gd.solvers.Chebyshev | gd.solvers.Multigrid | gd.solvers.SSOR
    )
    return P.reversible or not isinstance(solver, reversible)


def oracle(P: Tensor, s: Tensor, mu: float | Tensor) -> Tensor:
    """(I − diag(µ)P)⁻¹(1 − µ)s in dense float64; µ a number or [..., N or 1, 1 or K]."""
    P, s = P.double(), s.double()
    mu = torch.as_tensor(mu, dtype=torch.float64)
    mu = mu.expand(*torch.broadcast_shapes(mu.shape, s.shape)) if mu.ndim else mu.expand(s.shape)
    eye = torch.eye(P.shape[-1], dtype=torch.float64)
    columns = [
        torch.linalg.solve(eye - mu[..., k, None] * P, ((1 - mu) * s)[..., k, None])
        for k in range(s.shape[-1])
    ]
    return torch.cat(columns, -1)


def to_the_last_digit(P: np.ndarray, s: Tensor, mu: float) -> np.ndarray:
    """The same for one graph in extended precision, P given in it."""
    wide = np.longdouble
    A = np.eye(len(P), dtype=wide) - wide(mu) * P
    b = (1 - wide(mu)) * s.numpy().astype(wide)
    y = np.zeros_like(b)
    for _ in range(6):  # refinement: each round adds some twelve digits
        y = y + np.linalg.solve(A.astype(float), (b - A @ y).astype(float)).astype(wide)
    return y


@dataclass(frozen=True)
class Problem:
    name: str
    leaf: Tensor
    s: Tensor
    mu: float

    @property
    def P(self) -> gd.Transition:
        return OPERATORS[self.name].build(self.leaf)

    @property
    def dense(self) -> Tensor:
        return OPERATORS[self.name].dense(self.leaf)


@st.composite
def problems(
    draw: st.DrawFn,
    names: tuple[str, ...] = tuple(OPERATORS),
    mus: tuple[float, ...] = (0.0, 0.3, 0.85, 0.99),
    batches: tuple[tuple[int, ...], ...] = ((), (2,)),
    max_nodes: int = 12,
) -> Problem:
    """A random operator of the zoo with a signal; the seed alone decides the numbers."""
    name = draw(st.sampled_from(names))
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    batch, n = draw(st.sampled_from(batches)), draw(st.integers(1, max_nodes))
    leaf = OPERATORS[name].leaf(g, batch if OPERATORS[name].batched else (), n)
    s = torch.randn(*batch, n, draw(st.integers(1, 3)), generator=g, dtype=torch.float64)
    return Problem(name, leaf, s * 10.0 ** draw(st.integers(-3, 3)), draw(st.sampled_from(mus)))


def check_that_no_number_stays_none(device: torch.device) -> None:
    """What is not finite in a signal or in features shows in an attention walk's products."""
    g = torch.Generator().manual_seed(3)
    psi, y = (torch.randn(60, width, generator=g).to(device) for width in (3, 2))
    y[50, 1] = torch.nan
    value = gd.AttentionTransition(psi) @ y
    assert value[:, 0].isfinite().all()
    assert value[:, 1].isnan().all()
    for spoilt in (torch.nan, torch.inf, 1e30):
        worse = psi.clone()
        worse[3, 1] = spoilt
        P = gd.AttentionTransition(worse)
        assert not (P @ y)[3].isfinite().any()
        assert not P.log_degree[3].isfinite()
