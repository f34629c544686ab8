r"""The nodes nearest to one: the first ranks of personalised PageRank, by push, certified rank by rank.

With y the exact distribution, x ≥ 0 what has been pushed and r the residual, y = x + r + µPᵀe, where
(I − µPᵀ) e = r. The inverse of I − µPᵀ is ≥ 0, so three norms bound e, σ being the largest row sum of P:

    Σ e⁺ ≤ Σ r⁺ / (1 − µσ),   and alike for the negative parts,
    e ≤ h·w / (1 − µρ)  where  r ≤ h·w,  for a measure w > 0 with Pᵀw ≤ ρw,  and alike from below,
    ‖e‖ ≤ ‖r‖ / (1 − µ√(ρσ))  in  ‖e‖² = Σ e_v²/w_v,  because Pᵀ is at most √(ρσ) there.

The degrees of a reversible walk are such a measure with ρ = 1. That is not taken on trust: ρ is
computed, once for each walk. So y_v − x_v − r_v lies within the least of a constant, a multiple of √w_v and
one of w_v.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.implicit import OnFailure
from graphdiff.operators.base import Transition, check_transition
from graphdiff.operators.sparse import SparseTransition
from graphdiff.solution import ConvergenceError, ConvergenceWarning
from graphdiff.solvers.push import FALL, Array, Region

EPS = float(np.finfo(np.float64).eps)


@dataclass(frozen=True, eq=False)
class TopK:
    """The k nodes of largest y, largest first, and what is certain about them.

    y = (1 − µ)(I − µPᵀ)⁻¹ e_source belongs to the exact P and µ of the given input values; `lower`, `upper`,
    `gap` and `certified` count the rounding of the arithmetic. `tol` is a promise of ranks, not of values: a
    rank may be certain long before its y is known well, and `error_bound` says how well that is. Nothing here
    carries gradients.

    Attributes:
        indices: Node numbers, [k] or [sources, k]; −1 where fewer than k nodes can be reached.
        values: y of these nodes as far as it is known, the middle of its bounds, float64, shaped like
            `indices`.
        lower: Lower bounds of y.
        upper: Upper bounds of y.
        certified: Whether no other node can have this rank.
        gap: By how much y of a node ranked later, or not at all, may exceed this node's at most.
        converged: Whether every gap is at most `tol`, [] or [sources].
        work: Edges gone along, [] or [sources].
        reason: Why it stopped.
    """

    indices: Tensor
    values: Tensor
    lower: Tensor
    upper: Tensor
    certified: Tensor
    gap: Tensor
    converged: Tensor
    work: Tensor
    reason: str

    @property
    def error_bound(self) -> Tensor:
        """How far `values` may be from y, shaped like them."""
        width = torch.maximum(self.upper - self.values, self.values - self.lower)
        return torch.where(width > 0, torch.nextafter(width, torch.full_like(width, torch.inf)), 0.0)

    def __repr__(self) -> str:
        told = "converged" if bool(self.converged.all()) else "NOT converged"
        return (
            f"TopK({list(self.indices.shape)}, {told}, {int(self.certified.sum())} of "
            f"{self.certified.numel()} ranks certified, gap ≤ {float(self.gap.max()):.1e}, "
            f"{int(self.work.sum())} edges)"
        )


class Measure(NamedTuple):
    """What bounds the errors of a walk.

    The most edges into a node, σ, and w [N], its largest entry and ρ, if there is such a measure.
    """

    terms: int
    row_sum: float
    weight: Array | None = None
    largest: float = 1.0
    ratio: float = 1.0


class Reach(NamedTuple):
    """How far y − x − r may lie from 0: a constant, and multiples of √w and w; to below and to above."""

    below: tuple[float, float, float]
    above: tuple[float, float, float]

    def most(self, weight: float) -> float:
        """The largest y of a node that holds neither answer nor residual, of a weight up to this."""
        constant, rooted, linear = self.above
        return min(constant, rooted * math.sqrt(weight), linear * weight)


_MEASURES: WeakKeyDictionary[Transition, Measure] = WeakKeyDictionary()


def _measure(P: Transition) -> Measure:
    """That of a walk; looks at every edge, once."""
    if P not in _MEASURES:
        _MEASURES[P] = _new_measure(P)
    return _MEASURES[P]


def _new_measure(P: Transition) -> Measure:
    matrix = P.to_scipy()
    terms = int(np.bincount(matrix.indices, minlength=1).max())
    sums = P.row_sums
    row_sum = float(sums.max()) if isinstance(sums, Tensor) else sums
    row_sum *= 1 + (len(matrix.indices) + 4) * EPS
    log_degree = P.log_degree if P.reversible else None
    if log_degree is None:
        return Measure(terms, row_sum)
    degree = log_degree.detach().cpu().double().numpy()
    # Smaller than this is no measure: residuals divided by it would be larger than numbers are.
    weight = np.exp(np.maximum(degree - degree.max(), -600))
    ratio = float(((weight @ matrix) / weight).max()) * (1 + (terms + 4) * EPS)
    return Measure(terms, row_sum, weight, 1.0, ratio)


def top_k(
    P: Transition,
    source: int | Sequence[int] | Tensor,
    k: int,
    mu: float | Tensor = 0.85,
    *,
    tol: float = 1e-6,
    max_work: int | None = None,
    on_failure: OnFailure = "warn",
) -> TopK:
    r"""The k nodes at which a walk that restarts at `source` is found most, and how certain each rank is.

    .. math:: y = (1 - \mu)(I - \mu P^T)^{-1} e_{source}, \quad \sum_i y_i = 1

    (personalised PageRank, `pagerank` with one node to restart at). It pushes outwards from the source and
    stops as soon as no rank can change by more than `tol`, so on a graph where that is a matter of the
    neighbourhood the work does not depend on N. Where it is not, it goes on as a solve on the whole graph.

    The first call for a walk looks at every edge once, to find out by what errors are bounded; later calls
    with the same P do not.

    Args:
        P: The walk, one graph, sparse, not its transpose: ``P[i, j]`` is the probability of the step i → j.
        source: Node number; a list or a 1-d tensor of them makes one query each.
        k: How many ranks.
        mu: Probability to go on, in [0, 1): a number or a 0-d tensor.
        tol: Two nodes whose y differ by less may change places: ties are never decided. It says nothing of
            `values`.
        max_work: Most edges to go along for a query, about; None for as many as it takes.
        on_failure: What to do where `tol` cannot be reached: "warn", "raise" or "ignore".

    Returns:
        A `TopK`, float64 on the CPU, for P as given. It carries no gradients: those are `pagerank`'s, or
        `solve`'s with ``solvers.Push()``.

    Raises:
        TypeError: An argument is of the wrong type, or P is not sparse.
        ValueError: P is a transpose, or a value does not fit; the message names it.
        ConvergenceError: A gap above `tol` is left under ``on_failure="raise"``.

    Warns:
        ConvergenceWarning: A gap above `tol` is left under ``on_failure="warn"``.

    Example:
        >>> import torch, graphdiff as gd
        >>> path = torch.tensor([[0, 1, 2, 3], [1, 2, 3, 4]])
        >>> P = gd.SparseTransition.from_edge_index(path, undirected=True, dtype=torch.float64)
        >>> nearest = gd.top_k(P, source=1, k=3, mu=0.5)
        >>> nearest.indices, nearest.certified
        (tensor([1, 2, 0]), tensor([True, True, True]))
        >>> bool((nearest.values - nearest.lower <= nearest.error_bound).all())
        True
    """
    _check_walk(P)
    sources = _sources(source, P.shape[-1])
    checks.positive_integer(k, "k")
    mu = _number(mu)
    tol = checks.positive_number(tol, "tol")
    limit = math.inf if max_work is None else checks.positive_integer(max_work, "max_work")
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f'on_failure: expected "warn", "raise" or "ignore", got {on_failure!r}')
    measure = _measure(P)
    found = [_Query(P, int(node), k, mu, tol, measure, limit).run() for node in np.atleast_1d(sources)]

    def stacked(name: str) -> Tensor:
        column = torch.from_numpy(np.stack([np.asarray(getattr(answer, name)) for answer in found]))
        return column[0] if sources.ndim == 0 else column

    result = TopK(
        indices=stacked("indices"),
        values=stacked("values"),
        lower=stacked("lower"),
        upper=stacked("upper"),
        certified=stacked("certified"),
        gap=stacked("gap"),
        converged=stacked("converged"),
        work=stacked("work"),
        reason="; ".join(dict.fromkeys(answer.reason for answer in found)),
    )
    _report(result, tol, on_failure)
    return result


class _Ranks(NamedTuple):
    """One query's answer, arrays [k]; see `TopK`."""

    indices: Array
    values: Array
    lower: Array
    upper: Array
    certified: Array
    gap: Array
    converged: bool = False
    work: int = 0
    reason: str = ""


class _Query:
    """One source: the region around it, and the ranks within."""

    def __init__(
        self, P: Transition, source: int, k: int, mu: float, tol: float, measure: Measure, max_work: float
    ) -> None:
        self.P, self.source, self.k, self.mu, self.tol, self.measure = P, source, k, mu, tol, measure
        weight = 1.0 if measure.weight is None else measure.weight
        self.region = Region(P.T, mu, weight, nonnegative=True, max_work=max_work)
        self.region.start(np.array([source]), np.array([1 - mu]), np.zeros(1))
        # Nodes that decide, once the region is the whole graph.
        self._few: Array | None = None
        self._looks, self._hidden = 0, 0.0

    def run(self) -> _Ranks:
        """Push until the ranks are known or cannot be."""
        region, going, converged = self.region, True, False
        threshold = float(np.max(region.residual / region.weight))
        while going and not converged:
            threshold *= FALL
            going = region.settle(0.0, self._enough) if region.whole else region.grow(threshold)
            ranks = self._ranks()
            # What is left to push is less than what rounding may hide.
            going = going and float(np.abs(region.residual).sum()) > self._hidden
            converged = bool((ranks.gap <= self.tol).all())
        if converged:
            reason = "every rank is certain" if ranks.certified.all() else "what is left are ties within tol"
        elif region.exhausted:
            reason = f"stopped at max_work = {region.max_work}"
        else:
            reason = "rounding allows no more"
        return ranks._replace(converged=converged, work=region.work, reason=reason)

    def _ranks(self) -> _Ranks:
        """The ranks as they stand, and what is certain of them."""
        region = self.region
        while len(region.nodes) < self.k and not region.closed:
            # Nodes with next to nothing rank too.
            region.open_border()
            region.walk()
        x, r, nodes = region.x, region.residual, region.nodes
        # Rounding of the product, of its difference from b and x, and of µ and 1 − µ.
        slack = (self.measure.terms + 8) * EPS * (2 * x + np.abs(r) + 2 * region.b)
        self._hidden = float(slack.sum())
        reach = self._reach(r, region.weight, slack)
        lower, upper = self._interval(x, r, region.weight, reach, slack + 4 * EPS * x)
        if region.whole and np.count_nonzero(x) < self.k:
            # Some may not be reached at all.
            nodes = _reached(self.P, self.source)
            lower, upper = lower[nodes], upper[nodes]
        beyond = 0.0 if region.closed else reach.most(self.measure.largest)
        return _ranked(lower, upper, nodes, self.k, beyond)

    def _enough(self, x: Array, r: Array) -> bool:
        """Whether the ranks are known, from the x and r of a solver at work on the whole graph."""
        region, self._looks = self.region, self._looks + 1
        # Looking costs half of a step.
        if self._looks % 2:
            return False
        reach = self._reach(r, region.weight, None)
        if self._few is not None:
            # Cheap, and what a few do not fulfil all do not.
            few = self._few
            bounds = self._interval(x[few], r[few], region.weight[few], reach, 0.0)
            if float(_ranked(*bounds, few, self.k, 0.0).gap.max()) > 0.9 * self.tol:
                return False
        lower, upper = self._interval(x, r, region.weight, reach, 0.0)
        first = max(len(x) - 2 * self.k, 0)
        self._few = np.argpartition(lower + upper, first)[first:]
        return float(_ranked(lower, upper, region.nodes, self.k, 0.0).gap.max()) <= 0.9 * self.tol

    def _reach(self, r: Array, weight: Array, slack: Array | None) -> Reach:
        """Bounds of µPᵀe from a residual in which rounding may hide `slack`."""
        mu, (_, row_sum, measured, _, ratio) = self.mu, self.measure
        up = float(np.maximum(r, 0).sum())
        down = up - float(r.sum())
        mass = largest = energy = 0.0
        if slack is not None:
            # These sums have rounding of their own.
            mass = float(slack.sum()) + 3 * len(r) * EPS * (up + down)
        scale = _amplified(mu * row_sum)
        constant = scale * (down + mass), scale * (up + mass)
        if measured is None:
            return Reach(*((c, math.inf, math.inf) for c in constant))
        quotient = r / weight
        low, high = max(-float(quotient.min()), 0.0), max(float(quotient.max()), 0.0)
        square = float(quotient @ r)
        if slack is not None:
            largest = float((slack / weight).max()) + 4 * EPS * max(low, high)
            energy = math.sqrt(mass * largest) + len(r) * EPS * math.sqrt(square)
        root = _amplified(mu * math.sqrt(row_sum * ratio)) * (math.sqrt(square) + energy)
        scale = _amplified(mu * ratio)
        linear = scale * (low + largest), scale * (high + largest)
        return Reach((constant[0], root, linear[0]), (constant[1], root, linear[1]))

    def _interval(
        self, x: Array, r: Array, weight: Array, reach: Reach, slack: Array | float
    ) -> tuple[Array, Array]:
        """Bounds of y, which is ≥ 0, on some nodes."""
        middle, root = x + r, np.sqrt(weight)
        below, above = (
            np.minimum(np.minimum(constant, rooted * root), linear * weight)
            for constant, rooted, linear in reach
        )
        return np.maximum(middle - below - slack, 0), np.maximum(middle + above + slack, 0)


def _amplified(rate: float) -> float:
    """rate + rate² + …, and a little more than its rounding."""
    return rate / (1 - rate) * (1 + 1e-14) if rate < 1 else math.inf


def _ranked(lower: Array, upper: Array, nodes: Array, k: int, beyond: float) -> _Ranks:
    """The k of largest values between their bounds, where no node but these has more than `beyond`."""
    values = (lower + upper) / 2
    taken = min(k, len(nodes))
    top = np.argpartition(values, len(nodes) - taken)[len(nodes) - taken :]
    top = top[np.lexsort((nodes[top], -values[top]))]
    others = upper.copy()
    others[top] = beyond
    rest = max(beyond, float(others.max()))
    low, high = lower[top], upper[top]
    # The most that any later node can have.
    later = np.maximum.accumulate(np.append(high[1:], rest)[::-1])[::-1]
    # Everyone up to here is larger than everyone after.
    cut = np.minimum.accumulate(low) > later
    none = np.zeros(k - taken)
    return _Ranks(
        indices=np.append(nodes[top], none.astype(np.int64) - 1),
        values=np.append(values[top], none),
        lower=np.append(low, none),
        upper=np.append(high, none),
        certified=np.append(cut & np.append(True, cut[:-1]), none == rest),
        gap=np.append(np.maximum(later - low, 0), none),
    )


def _reached(P: Transition, source: int) -> Array:
    """The nodes that a walk from the source can come to."""
    from scipy.sparse.csgraph import breadth_first_order

    found: Array = breadth_first_order(P.to_scipy(), source, return_predecessors=False)
    return np.sort(found.astype(np.int64))


def _check_walk(P: Transition) -> None:
    check_transition(P)
    if P.stochastic != "rows":
        raise ValueError(
            f"P: expected a walk, whose rows sum to 1, got {type(P).__name__}, whose columns do; give the "
            "walk itself (P.T of this one), top_k transposes it"
        )
    if not P.sparse:
        jumps = isinstance(P, SparseTransition)
        what = 'a jump reaches every node, so build it with dangling="self", or ' if jumps else ""
        raise TypeError(
            f"P: expected a sparse walk, whose rows are short lists, got {P}; {what}rank the answer of "
            "pagerank"
        )


def _sources(source: object, nodes: int) -> Array:
    if isinstance(source, bool) or not isinstance(source, int | np.integer | Sequence | np.ndarray | Tensor):
        raise TypeError(
            f"source: expected a node number or a list or 1-d tensor of them, got {type(source).__name__}"
        )
    numbers = torch.as_tensor(source, device="cpu")
    if numbers.ndim > 1 or numbers.numel() == 0 or numbers.dtype not in checks.INTEGERS:
        raise ValueError(
            "source: expected a node number or a list or 1-d tensor of them, got "
            f"{numbers.dtype} of shape {checks.shape_text(numbers)}"
        )
    checks.node_numbers(numbers.reshape(-1), "source", nodes)
    return numbers.numpy()


def _number(mu: float | Tensor) -> float:
    if isinstance(mu, Tensor) and mu.numel() != 1:
        raise ValueError(
            f"mu: expected a number or a 0-d tensor, got {checks.shape_text(mu)}; queries with another µ are "
            "calls of their own"
        )
    return float(
        checks.mu(mu, torch.Size([1, 1]), mu.device if isinstance(mu, Tensor) else torch.device("cpu"))
    )


def _report(result: TopK, tol: float, on_failure: OnFailure) -> None:
    if on_failure == "ignore" or bool(result.converged.all()):
        return
    message = (
        f"graphdiff.top_k: ranks are known up to a gap of {float(result.gap.max()):.2e} where {tol:.2e} was "
        f"asked for ({int((~result.converged).sum())} of {result.converged.numel()} queries), "
        f"{result.reason}; loosen tol or raise max_work"
    )
    if on_failure == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
