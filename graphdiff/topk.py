r"""The nodes nearest to one: the first ranks of personalised PageRank, by push, certified rank by rank.

With y the exact distribution, x ≥ 0 what has been pushed and r the residual, y = x + r + µPᵀe, where
(I − µPᵀ) e = r. The inverse of I − µPᵀ is ≥ 0, so three norms bound e, σ being the largest row sum of P:

    Σ e⁺ ≤ Σ r⁺ / (1 − µσ),   and alike for the negative parts,
    e ≤ h·w / (1 − µρ)  where  r ≤ h·w,  for a measure w > 0 with Pᵀw ≤ ρw,  and alike from below,
    ‖e‖ ≤ ‖r‖ / (1 − µ√(ρσ))  in  ‖e‖² = Σ e_v²/w_v,  because Pᵀ is at most √(ρσ) there.

The degrees of a reversible walk are such a measure with ρ = 1. That is not taken on trust: ρ is
computed, once for each walk. What is bounded is y_v − x_v − r_v = µ Σ_u P_uv e_u: by the first, as P_uv ≤ σ,
by a constant; by the second, as Pᵀw ≤ ρw, by a multiple of w_v; by the third, after Cauchy and Schwarz,

    |Σ_u P_uv e_u| ≤ c_v ‖e‖,   c_v² = Σ_u w_u P_uv²,

by a multiple of c_v. That is at most √(ρσ w_v), and far less where walks into v come from many nodes. The
least of the three holds.
"""

import functools
import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from graphdiff import checks
from graphdiff.implicit import OnFailure
from graphdiff.operators.base import Transition, check_transition
from graphdiff.operators.sparse import SparseTransition
from graphdiff.solution import ConvergenceError, ConvergenceWarning
from graphdiff.solvers.push import FALL, Array, Columns, Region

EPS = float(np.finfo(np.float64).eps)
# Where much is left to be done thresholds fall by this from stage to stage; ranks are looked at after each.
FAR = 0.03
# In compiled code stages and looks cost less: over-relaxed ones fall by this, and all by as little as that.
FAST, SLIGHT = 0.0005, 0.5


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


class Scales(NamedTuple):
    """What errors at some nodes are measured by: w, 1/w and c, and the largest c and w of any node."""

    weight: Array
    inverse: Array
    column: Array
    most: tuple[float, float]

    def at(self, nodes: Array) -> "Scales":
        """Those of some of the nodes."""
        return Scales(self.weight[nodes], self.inverse[nodes], self.column[nodes], self.most)


@dataclass(frozen=True, eq=False)
class Measure:
    """What is kept of a walk: its columns, and what bounds the errors.

    Attributes:
        columns: Those of Pᵀ.
        terms: The most edges into a node.
        row_sum: σ.
        scales: Of all nodes, if there is such a measure.
        ratio: ρ.
        wholes: By µ and whether the walk is taken as reversible, see `whole`.
    """

    columns: Columns
    terms: int
    row_sum: float
    scales: Scales | None = None
    ratio: float = 1.0
    wholes: dict[tuple[float, bool], Any] = field(default_factory=dict)

    @property
    def nodes(self) -> int:
        """N."""
        return len(self.columns.indptr) - 1

    @cached_property
    def ordered(self) -> Scales | None:
        """The scales of all nodes, in the order of `Columns.whole`."""
        return None if self.scales is None else self.scales.at(self.columns.whole.order)

    @cached_property
    def weight(self) -> Array:
        """w, or 1, of all nodes."""
        return np.ones(self.nodes) if self.scales is None else self.scales.weight

    def whole(self, P: Transition, mu: float, reversible: bool) -> Any:
        """What `Local` goes by on the whole graph; that of the last µ is kept."""
        found = self.wholes.get((mu, reversible))
        if found is None:
            found = _compiled().prepared(P, mu, reversible)
            self.wholes.clear()
            self.wholes[mu, reversible] = found
        return found


class Reach(NamedTuple):
    """How far y − x − r may lie from 0: a constant, and multiples of c and w; to below and to above."""

    below: tuple[float, float, float]
    above: tuple[float, float, float]


# With the tensors that they are made from, and their versions.
_MEASURES: WeakKeyDictionary[Transition, tuple[tuple[Tensor, ...], list[int], Measure]] = WeakKeyDictionary()


def _kept(P: Transition) -> Measure | None:
    """That of a walk, if it was looked at as it is now."""
    tensors, versions, measure = _MEASURES.get(P, ((), [], None))
    return measure if versions == _versions(tensors) else None


def _measure(P: Transition) -> Measure:
    """That of a walk; looks at every edge, once."""
    measure = _kept(P)
    if measure is None:
        tensors, measure = P.tensors(), _new_measure(P)
        _MEASURES[P] = tensors, _versions(tensors), measure
    return measure


def _versions(tensors: tuple[Tensor, ...]) -> list[int]:
    return [0 if t.is_inference() else t._version for t in tensors]


def _new_measure(P: Transition) -> Measure:
    matrix = P.to_scipy()
    columns, terms = Columns(matrix), int(np.bincount(matrix.indices, minlength=1).max())
    sums = P.row_sums
    row_sum = float(sums.max()) if isinstance(sums, Tensor) else sums
    row_sum *= 1 + (len(matrix.indices) + 4) * EPS
    log_degree = P.log_degree if P.reversible else None
    if log_degree is None:
        return Measure(columns, terms, row_sum)
    degree = log_degree.detach().cpu().double().numpy()
    # Smaller than this is no measure: residuals divided by it would be larger than numbers are.
    weight = np.exp(np.maximum(degree - degree.max(), -600))
    rounding = 1 + (terms + 4) * EPS
    ratio = float(((weight @ matrix) / weight).max()) * rounding
    squares = matrix.astype(np.float64)
    squares.data *= squares.data
    # Squares too small to be numbers are not lost.
    column = np.sqrt(weight @ squares) * rounding + 1e-150
    most = float(column.max()), float(weight.max())
    return Measure(columns, terms, row_sum, Scales(weight, 1 / weight, column, most), ratio)


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

    The first call for a walk looks at every edge, to find out by what errors are bounded; later calls with
    the same P do not. Kept beside P are three numbers a node and, once a query has become a solve on the
    whole graph, its edges in an order that is fast to multiply by: 12 bytes an edge (16 from 2³¹ edges on)
    and some 44 a node. Where numba is installed (extra `compiled`) a query is compiled, some times as fast;
    then what is kept is made for one µ, that of the last such query: 8 bytes an edge (4 where all steps
    from a node are equally likely) and some 64 a node. The first query after an
    installation compiles for some seconds.

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
    check_transition(P)
    # Such a walk was checked.
    known = _kept(P)
    if known is None:
        _check_walk(P)
    sources, single = _sources(source, P.shape[-1] if known is None else known.nodes)
    checks.positive_integer(k, "k")
    mu = _number(mu)
    tol = checks.positive_number(tol, "tol")
    limit = math.inf if max_work is None else checks.positive_integer(max_work, "max_work")
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f'on_failure: expected "warn", "raise" or "ignore", got {on_failure!r}')
    measure = _measure(P) if known is None else known
    found = [_Query(P, node, k, mu, tol, measure, limit).run() for node in sources]

    def stacked(parts: Sequence[Any]) -> Tensor:
        return torch.from_numpy(np.asarray(parts[0] if single else parts))

    columns = zip(*((*ranks[:6], ranks.converged, work) for ranks, work, _ in found), strict=True)
    indices, values, lower, upper, gap, certified, converged, work = map(stacked, columns)
    reason = "; ".join(dict.fromkeys(reason for _, _, reason in found))
    result = TopK(indices, values, lower, upper, certified, gap, converged, work, reason)
    if on_failure != "ignore" and not all(ranks.converged for ranks, _, _ in found):
        _report(result, tol, on_failure)
    return result


class _Ranks(NamedTuple):
    """One query's answer, arrays [k], see `TopK`; by how much intervals must narrow; what all ranks are."""

    indices: Array
    values: Array
    lower: Array
    upper: Array
    gap: Array
    certified: Array
    too_wide: float
    converged: bool
    certain: bool

    @classmethod
    def of(cls, indices: Array, told: Array, certified: Array, *what: Any) -> "_Ranks":
        """Those of compiled code."""
        values, lower, upper, gap = told
        return cls(indices, values, lower, upper, gap, certified, *what)


class _Query:
    """One source: the region around it, and the ranks within."""

    def __init__(
        self, P: Transition, source: int, k: int, mu: float, tol: float, measure: Measure, max_work: float
    ) -> None:
        self.P, self.source, self.k, self.mu, self.tol, self.measure = P, source, k, mu, tol, measure
        # Degrees that are not the walk's bound nothing, and are no measure of what is left to push.
        root = mu * math.sqrt(measure.row_sum * measure.ratio)
        self._scales = measure.scales if root < 1 else None
        # What bounds µPᵀe by the sum of a residual, its root and its largest quotient.
        self._rates = _amplified(mu * measure.row_sum), math.inf, math.inf
        if self._scales is not None:
            self._rates = self._rates[0], mu * _summed(root), _amplified(mu * measure.ratio)
        # Of the product, of its difference from b and x, and of µ and 1 − µ.
        self._rounding = (measure.terms + 8) * EPS
        self._max_work = max_work
        self.region: Any = self._local() if _fits(measure) else self._region()
        most = (0.0, 0.0) if self._scales is None else self._scales.most
        # As compiled code wants it.
        self._bounds = *self._rates, *most, self._rounding
        self._hidden = self._left = self._next_look = 0.0

    def _local(self) -> Any:
        """A region by compiled code."""
        measure, reversible = self.measure, self._scales is not None
        whole = functools.partial(measure.whole, self.P, self.mu, reversible)
        return _compiled().Local(
            measure.columns, self.mu, self.source, measure.weight, whole, reversible, self._max_work
        )

    def _region(self, known: Any = None) -> Region:
        """A region that starts at the source, or from what is known already."""
        weight = 1.0 if self._scales is None else self._scales.weight
        columns, max_work = self.measure.columns, self._max_work
        region = Region(self.P.T, self.mu, weight, nonnegative=True, max_work=max_work, columns=columns)
        nodes, x = np.array([self.source]), np.zeros(1)
        if known is not None:
            region.steps, region.work = known.steps, known.work
            # Over-relaxed by weights that are not the walk's it may be farther off than nothing.
            if float(np.abs(known.residual).sum()) <= 1 - self.mu:
                nodes, x = known.nodes, known.x
        region.start(nodes, np.where(nodes == self.source, 1 - self.mu, 0.0), x)
        return region

    def run(self) -> tuple[_Ranks, int, str]:
        """Push until the ranks are known or cannot be; also how much work that was, and why it ended."""
        region, ranks = self.region, None
        if isinstance(region, Region):
            threshold = float(region.residual[0] / region.weight[0])
        else:
            falls = FAR if self._scales is None else FAST, SLIGHT
            found, threshold = region.search(self.k, self.tol, self._bounds, self._columns, falls)
            ranks = None if region.whole or region.lost else _Ranks.of(*found)
        going = ranks is None
        while going:
            threshold *= max(FAR, min(FALL, 1 / ranks.too_wide)) if ranks is not None else FAR
            going, ranks = self._advance(threshold), self._ranks()
            # What is left to push is less than what rounding may hide.
            going = going and not ranks.converged and self._left > self._hidden
        assert ranks is not None
        region = self.region
        if ranks.converged:
            reason = "every rank is certain" if ranks.certain else "what is left are ties within tol"
        elif region.exhausted:
            reason = f"stopped at max_work = {region.max_work}"
        else:
            reason = "rounding allows no more"
        return ranks, region.work, reason

    @property
    def _columns(self) -> Array:
        """c of all nodes, or what stands for it where nothing is bounded by it."""
        return self.measure.weight if self._scales is None else self._scales.column

    def _advance(self, threshold: float) -> bool:
        """Push on, to a threshold or, on the whole graph, until the ranks are known."""
        region = self._at_hand()
        going = region.whole or region.grow(threshold)
        while len(region.nodes) < self.k and not region.closed:
            # Nodes with next to nothing rank too.
            region.open_border()
        if region.whole:
            plain = isinstance(region, Region)
            going = region.settle(0.0, self._enough) if plain else region.settle(self._look)
        return bool(going)

    def _at_hand(self) -> Any:
        """The region, by other means where compiled code goes no further."""
        if not isinstance(self.region, Region) and self.region.lost:
            self.region = self._region(self.region)
        return self.region

    def _ranks(self) -> _Ranks:
        """The ranks as they stand, and what is certain of them."""
        region = self.region
        if region.whole and np.count_nonzero(region.x) < self.k:
            # Some may not be reached at all.
            places = region.places(_reached(self.P, self.source))
            return self._first(region.x, region.residual, self.tol, places)
        return self._first(region.x, region.residual, self.tol)

    def _known(self) -> Scales | None:
        """The scales of the known nodes."""
        if self._scales is None:
            return None
        if self.region.whole:
            plain = isinstance(self.region, Region)
            return self.measure.ordered if plain else self.measure.scales
        return self._scales.at(self.region.nodes)

    def _enough(self, x: Array, r: Array) -> bool:
        """Whether the ranks are known, from the x and r of a solver at work on the whole graph."""
        if self.region.steps < self._next_look:
            return False
        wait = self._look(x, r)
        self._next_look = self.region.steps + wait
        return wait == 0

    def _look(self, x: Array, r: Array) -> int:
        """How many steps it takes at least until the ranks are known, from x and r on the whole graph."""
        tol = 0.9 * self.tol
        # Cheap in numpy, and what the largest alone do not fulfil all do not.
        few = _largest_places(x + r, 2 * self.k) if _compiled() is None else None
        ranks = self._first(x, r, tol, few)
        if few is not None and ranks.converged:
            ranks = self._first(x, r, tol)
        if ranks.converged:
            return 0
        # Conjugate gradients narrow intervals by 1/q = √((1 + ρ)/(1 − ρ)) a step, ρ² = 1 − µ², if anything is
        # hard about the graph, and seldom by more than q^-1.75 for long.
        root = math.sqrt(1 - self.mu * self.mu)
        speed = 0.875 * math.log((1 + root) / (1 - root)) if root < 1 else math.inf
        return max(1, math.ceil(math.log(ranks.too_wide) / speed))

    def _first(self, x: Array, r: Array, tol: float, places: Array | None = None) -> _Ranks:
        """The first ranks among the known nodes, or among some of them where no others are reached."""
        region = self.region
        if places is None and _compiled() is not None:
            found, self._hidden, self._left = _compiled().ranked(
                *(x, r, region.b, region.weight, region.nodes, self._columns),
                *(self._bounds, bool(region.closed), self.k, tol),
            )
            return _Ranks.of(*found)
        scales = self._known()
        slack = self._rounding * (2 * x + np.abs(r) + 2 * region.b)
        reach = self._reach(r, scales, slack)
        slack += 4 * EPS * x
        beyond = 0.0
        if not region.closed:
            most = (1.0, *scales.most) if scales is not None else (1.0, 0.0, 0.0)
            beyond = min(a * b for a, b in zip(reach.above, most, strict=True) if a < math.inf or b > 0)
        if places is None:
            places = self._likely(x, r, scales, reach, slack)
        bounds = self._interval(x, r, scales, reach, slack, places)
        return _ranked(*bounds, region.nodes[places], self.k, beyond, tol)

    def _reach(self, r: Array, scales: Scales | None, slack: Array) -> Reach:
        """Bounds of µPᵀe from a residual in which rounding may hide `slack`."""
        size, total, hidden = float(np.abs(r).sum()), float(r.sum()), float(slack.sum())
        self._hidden, self._left = hidden, size
        by_sum, by_root, by_most = self._rates
        # These sums have rounding of their own.
        mass = hidden + 4 * len(r) * EPS * size
        constant = by_sum * ((size - total) / 2 + mass), by_sum * ((size + total) / 2 + mass)
        if scales is None:
            return Reach(*((c, math.inf, math.inf) for c in constant))
        quotient = r * scales.inverse
        low, high = max(-float(quotient.min()), 0.0), max(float(quotient.max()), 0.0)
        square = float(quotient @ r)
        largest = float((slack * scales.inverse).max()) + 4 * EPS * max(low, high)
        root = by_root * (math.sqrt(square) * (1 + len(r) * EPS) + math.sqrt(mass * largest))
        linear = by_most * (low + largest), by_most * (high + largest)
        return Reach((constant[0], root, linear[0]), (constant[1], root, linear[1]))

    def _likely(self, x: Array, r: Array, scales: Scales | None, reach: Reach, slack: Array) -> Array:
        """The places of the nodes that may be one of the first k."""
        upper = _within(reach.above, scales)
        upper += x
        upper += r
        upper += slack
        few = _largest_places(x + r, self.k)
        lower, _ = self._interval(x, r, scales, reach, slack, few)
        # No node without more than this is one of k: the least of k nodes has it for certain. Nor does any
        # such node count beside these: each of the k is either ranked, with more, or itself left over.
        least = (1 - 1e-9) * float(lower.min()) if len(few) == self.k else 0.0
        return np.flatnonzero(upper >= least)

    def _interval(
        self,
        x: Array,
        r: Array,
        scales: Scales | None,
        reach: Reach,
        slack: Array,
        places: Array,
    ) -> tuple[Array, Array]:
        """Bounds of y, which is ≥ 0, at some of the known nodes."""
        middle, there = x[places] + r[places], None
        if scales is not None:
            there = scales.at(places)
        below, above = (_within(side, there) + slack[places] for side in reach)
        return np.maximum(middle - below, 0), np.maximum(middle + above, 0)


def _within(side: tuple[float, float, float], scales: Scales | None) -> Any:
    """One side of a reach, at some nodes."""
    constant, rooted, linear = side
    if scales is None:
        return constant
    bound = rooted * scales.column
    np.minimum(bound, linear * scales.weight, out=bound)
    return np.minimum(bound, constant, out=bound)


def _largest_places(values: Array, count: int) -> Array:
    """The places of the `count` largest values, or of all, in any order."""
    places = np.arange(len(values))
    if len(values) > 8 * count and len(values) > 4096:
        # Enough of them are above what is large among one in sixteen.
        part = values[::16]
        bar = np.partition(part, len(part) - count // 8 - 32)[len(part) - count // 8 - 32]
        above = np.flatnonzero(values > bar)
        if len(above) < count:
            # Of equals any will do, and there may be many.
            equal = np.flatnonzero(values == bar)
            above = np.append(above, equal[: count - len(above)])
        places = above if len(above) >= count else places
    if len(places) <= count:
        return places
    return places[np.argpartition(values[places], len(places) - count)[len(places) - count :]]


def _summed(rate: float) -> float:
    """1 + rate + rate² + …, and a little more than its rounding."""
    return (1 + 1e-14) / (1 - rate) if rate < 1 else math.inf


def _amplified(rate: float) -> float:
    """rate + rate² + …, and a little more than its rounding."""
    return rate * _summed(rate)


def _ranked(lower: Array, upper: Array, nodes: Array, k: int, beyond: float, tol: float) -> _Ranks:
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
    none, gap = np.zeros(k - taken), np.maximum(later - low, 0)
    certified = np.append(cut & np.append(True, cut[:-1]), none == rest)
    return _Ranks(
        indices=np.append(nodes[top], none.astype(np.int64) - 1),
        values=np.append(values[top], none),
        lower=np.append(low, none),
        upper=np.append(high, none),
        gap=np.append(gap, none),
        certified=certified,
        too_wide=_too_wide(low, high, tol),
        converged=bool((gap <= tol).all()),
        certain=bool(certified.all()),
    )


def _too_wide(lower: Array, upper: Array, tol: float) -> float:
    """By how much intervals must narrow, at least, for all these ranks to be known, ≥ 1."""
    apart = lower[:-1] + upper[:-1] - lower[1:] - upper[1:] + 2 * tol
    width = upper[:-1] - lower[:-1] + upper[1:] - lower[1:]
    return float(np.max(width / apart, initial=1.0))


def _reached(P: Transition, source: int) -> Array:
    """The nodes that a walk from the source can come to."""
    from scipy.sparse.csgraph import breadth_first_order

    found: Array = breadth_first_order(P.to_scipy(), source, return_predecessors=False)
    return np.sort(found.astype(np.int64))


@functools.cache
def _compiled() -> Any:
    """The compiled push, or None where numba is not installed."""
    try:
        from graphdiff.solvers import localsor
    except ImportError:
        return None
    return localsor


def _fits(measure: Measure) -> bool:
    """Whether compiled code is there, and counts as far as there are edges."""
    size = max(len(measure.columns.indptr), len(measure.columns.indices))
    return size < 2**32 and _compiled() is not None


def _check_walk(P: Transition) -> None:
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


def _sources(source: object, nodes: int) -> tuple[list[int], bool]:
    """Their numbers, and whether it is a single one."""
    if type(source) is int and 0 <= source < nodes:
        return [source], True
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
    return numbers.reshape(-1).tolist(), numbers.ndim == 0


def _number(mu: float | Tensor) -> float:
    if type(mu) is float and 0 <= mu < 1:
        return mu
    if isinstance(mu, Tensor) and mu.numel() != 1:
        raise ValueError(
            f"mu: expected a number or a 0-d tensor, got {checks.shape_text(mu)}; queries with another µ are "
            "calls of their own"
        )
    return float(
        checks.mu(mu, torch.Size([1, 1]), mu.device if isinstance(mu, Tensor) else torch.device("cpu"))
    )


def _report(result: TopK, tol: float, on_failure: OnFailure) -> None:
    message = (
        f"graphdiff.top_k: ranks are known up to a gap of {float(result.gap.max()):.2e} where {tol:.2e} was "
        f"asked for ({int((~result.converged).sum())} of {result.converged.numel()} queries), "
        f"{result.reason}; loosen tol or raise max_work"
    )
    if on_failure == "raise":
        raise ConvergenceError(message)
    warnings.warn(message, ConvergenceWarning, stacklevel=3)
