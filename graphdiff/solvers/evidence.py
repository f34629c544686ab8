"""The evidence of an answer, and the bounds of x* node by node, in one pass over the vectors each, compiled.

Sums and maxima go node after node, for each signal by itself, so that its bits depend on no other.

This file is read where numba is installed, and compiled when it is first used.
"""

import functools
from typing import Any

import numpy as np
import torch
from numba import uint64
from torch import Tensor

from graphdiff.operators.compiled import compiled
from graphdiff.operators.lanes import LINE, columns, larger, load, magnitude, store, zeros
from graphdiff.operators.threads import pythons

# What is found of each signal: `base.Evidence`, in its order.
FOUND = 6
# Numbers of a vector from which several threads are worth it.
MANY = 2**20


# A call would count references to the array for every node.
@compiled(inline="always")
def _times(a: Any, factor: Any, i: int, lanes: Any) -> Any:
    """a times node i's factor, of [1 or N, 1 or W]: one for all nodes, or for all signals."""
    row = i if len(factor) > 1 else uint64(0)
    return a * load(factor, row, lanes) if factor.shape[1] > 1 else a * factor[row, 0]


@compiled
def _judged(
    b: Any,
    walked: Any,
    x: Any,
    residual: Any,
    mu: Any,
    inverse: Any,
    known: Any,
    started: bool,
    summed: bool,
    units: Any,
    found: Any,
    first: int,
    lanes: Any,
) -> Any:
    """Columns of the residual b − x + µPx from the `first` on; if not `started`, x = 0 and it is b.

    With q = r times `inverse`, the evidence `found` [6, K] is made of max q, max −q and max |x|, of b if not
    started; if `summed`, of Σ r, Σ |r| and Σ |x|. Returns whether all of it are finite numbers.
    """
    last = first + len(lanes)
    right, product, answer = b[:, first:last], walked[:, first:last], x[:, first:last]
    left, told, rate, scale = residual[:, first:last], found[:, first:last], mu, inverse
    if mu.shape[1] > 1:
        rate = mu[:, first:last]
    if inverse.shape[1] > 1:
        scale = inverse[:, first:last]
    nothing = zeros(lanes)
    up = down = most = nothing if summed else nothing - np.inf
    odd = nothing
    for i in range(uint64(len(right))):
        r = y = load(right, i, lanes)
        if started:
            y = load(answer, i, lanes)
            r = r + _times(load(product, i, lanes), rate, i, lanes) - y
            store(left, i, r)
        if summed:
            up, down, most = up + r, down + magnitude(r), most + magnitude(y)
        else:
            q = _times(r, scale, i, lanes)
            up, down, most = larger(q, up), larger(nothing - q, down), larger(magnitude(y), most)
        odd = odd + (r - r)
    store(told, uint64(0), up)
    store(told, uint64(1), down)
    store(told, uint64(2), most)
    store(told, uint64(3), odd)
    return _concluded(told, scale, known[:, first:last], summed, units)


@compiled
def _concluded(told: Any, inverse: Any, known: Any, summed: bool, units: Any) -> Any:
    """What `_Best` of `base` makes of the sums or maxima in its place, operation by operation."""
    (terms, product, vectors), fine = units, True
    for k in range(told.shape[1]):
        up, down, size, odd = told[0, k], told[1, k], told[2, k], told[3, k]
        least, b_size = known[0, k], known[1, k]
        if summed:
            half = 0.5 * inverse[0, k if inverse.shape[1] > 1 else 0]
            low, high = (up - down) * half, (up + down) * half
        else:
            low, high = -down, up
        apart = high - low if summed else max(abs(low), abs(high))
        slack = (product * size + vectors * (2 * size + b_size)) / least
        extra = slack + terms / least * apart
        lowest, highest = low - extra, high + extra
        told[0, k], told[1, k], told[2, k], told[3, k] = low, high, extra, size
        told[4, k] = highest - lowest if summed else max(abs(lowest), abs(highest))
        told[5, k] = extra + extra if summed else extra
        fine = fine and odd == 0 and np.isfinite(told[4, k])
    return fine


@compiled
def _sized(x: Any, summed: bool, found: Any, first: int, lanes: Any) -> Any:
    """Columns of max |x| from the `first` on, [2, K], if `summed` of Σ |x|; whether all are finite numbers.

    What stands below them is of no use.
    """
    signals, told = x[:, first : first + len(lanes)], found[:, first : first + len(lanes)]
    most = odd = zeros(lanes)
    for i in range(uint64(len(signals))):
        y = load(signals, i, lanes)
        most = most + magnitude(y) if summed else larger(magnitude(y), most)
        odd = odd + (y - y)
    store(told, uint64(0), most)
    store(told, uint64(1), odd)
    fine = True
    for k in range(len(lanes)):
        fine = fine and told[1, k] == 0
    return fine


@compiled
def _narrowed(
    x: Any,
    residual: Any,
    reach: Any,
    ends: Any,
    lower: Any,
    upper: Any,
    below: Any,
    above: Any,
    first: int,
    lanes: Any,
) -> None:
    """Columns of x + r + reach·low − extra, or `lower` where that is more, into `below`; so `above`.

    `ends` are low, high and extra, [3, K].
    """
    last, share = first + len(lanes), reach
    if reach.shape[1] > 1:
        share = reach[:, first:last]
    answer, left, told = x[:, first:last], residual[:, first:last], ends[:, first:last]
    floor, ceiling = lower[:, first:last], upper[:, first:last]
    bottom, top = below[:, first:last], above[:, first:last]
    low, high, extra = (
        load(told, uint64(0), lanes),
        load(told, uint64(1), lanes),
        load(told, uint64(2), lanes),
    )
    nothing = zeros(lanes)
    for i in range(uint64(len(answer))):
        best = i if len(floor) > 1 else uint64(0)
        walked = load(answer, i, lanes) + load(left, i, lanes)
        found = walked + (_times(low, share, i, lanes) - extra)
        store(bottom, i, larger(found, load(floor, best, lanes)))
        found = walked + (_times(high, share, i, lanes) + extra)
        store(top, i, nothing - larger(nothing - found, nothing - load(ceiling, best, lanes)))


@functools.lru_cache(64)
def _parts(channels: int, threads: int) -> list[Any]:
    """Parts of the columns, enough for so many threads, but no narrower than a line of the cache if need be.

    To find them anew takes as long as a pass over a short vector.
    """
    widest = max(LINE // 8, -(-channels // threads))
    starts = range(0, channels, widest)
    parts = ((first, columns(min(widest, channels - first))) for first in starts)
    return [(first + begin, lanes) for first, some in parts for begin, lanes in some]


def _passed(pass_over: Any, places: list[Any], channels: int, nodes: int) -> list[Any]:
    """What passes over all parts of the columns return, for the arguments of each place, by many threads."""
    threads = torch.get_num_threads() if len(places) * channels * nodes >= MANY else 1
    parts = [(*place, *part) for place in places for part in _parts(channels, threads)]
    if threads == 1 or len(parts) == 1:
        return [pass_over(*part) for part in parts]
    return list(pythons(threads).map(pass_over, *zip(*parts, strict=True)))


def _arrays(x: Tensor) -> Any:
    """[..., N, K] as [batch, N, K], whose numbers lie beside each other."""
    numbers = x.numpy()
    return np.ascontiguousarray(numbers.reshape(-1, *numbers.shape[-2:]))


def sized(x: Tensor, summed: bool) -> Tensor | None:
    """The maximum norm of each signal, or the 1-norm, [..., 1, K]; None where a number is not finite."""
    vectors, (nodes, channels) = _arrays(x), x.shape[-2:]
    found = np.empty((len(vectors), 2, channels))
    places = [(vector, summed, into) for vector, into in zip(vectors, found, strict=True)]
    fine = all(_passed(_sized, places, channels, nodes))
    return torch.from_numpy(found[:, 0].reshape(*x.shape[:-2], 1, channels)) if fine else None


def judged(
    b: Tensor,
    inverse: Tensor,
    known: tuple[Tensor, Tensor | None],
    summed: bool,
    units: tuple[float, float, float],
    started: tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, ...] | None:
    """The evidence that `_judged` finds for b [..., N, K], [..., 1, K] each; None where it is not finite.

    `inverse` is [..., 1 or N, 1 or K]. `known` are the least 1 − µ·rowsum, [..., 1, 1 or K], and the size of
    b; `units` how much of the bounds, of the size of x, and of both sizes rounding may be. For x ≠ 0,
    `started` are µ like `inverse`, and like b Px, x and where the residual goes, whose numbers lie beside
    each other.
    """
    batch, (nodes, channels) = b.shape[:-2], b.shape[-2:]
    mu, *others = (inverse,) if started is None else started
    factors = [x.expand(*batch, *x.shape[-2:]) if batch else x for x in (mu, inverse)]
    arrays = [_arrays(x) for x in (b, *others, *factors)]
    arrays[1:1] = [] if others else [arrays[0]] * 3
    # 1 − µ·rowsum and the size of b for each signal.
    told = np.zeros((*batch, 2, channels))
    for k, number in enumerate(known):
        if number is not None:
            told[..., k, :] = number.squeeze(-2).numpy()
    arrays.append(told.reshape(-1, 2, channels))
    found = np.empty((len(arrays[0]), FOUND, channels))
    each = zip(*arrays, found, strict=True)
    places = [(*mine, started is not None, summed, units, into) for *mine, into in each]
    fine = all(_passed(_judged, places, channels, nodes))
    return torch.from_numpy(found.reshape(*batch, FOUND, 1, channels)).unbind(-3) if fine else None


def narrowed(
    x: Tensor,
    residual: Tensor,
    reach: Tensor,
    ends: tuple[Tensor, Tensor, Tensor],
    best: tuple[Tensor, Tensor],
    into: tuple[Tensor, Tensor],
) -> None:
    """Puts the bounds of x* that `_narrowed` makes of the best so far, [..., 1 or N, K], into those like x.

    `reach` is [..., 1 or N, 1 or K], the `ends` are low, high and extra of the evidence, [..., 1, K].
    """
    batch, (nodes, channels) = x.shape[:-2], x.shape[-2:]
    if batch:
        reach = reach.expand(*batch, *reach.shape[-2:])
    told = np.stack([_arrays(end)[:, 0] for end in ends], 1)
    arrays = [*(_arrays(v) for v in (x, residual, reach)), told, *(_arrays(v) for v in (*best, *into))]
    _passed(_narrowed, list(zip(*arrays, strict=True)), channels, nodes)
