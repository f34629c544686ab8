"""The residual of an answer, and what its bounds are made of, in one pass over the vectors, compiled.

Sums and maxima go node after node, for each signal by itself, so that its bits depend on no other.

This file is read where numba is installed, and compiled when it is first used.
"""

from typing import Any

import numpy as np
import torch
from numba import uint64
from torch import Tensor

from graphdiff.operators.compiled import compiled
from graphdiff.operators.edges import columns
from graphdiff.operators.lanes import larger, load, magnitude, store, zeros


# A call would count references to the array for every node.
@compiled(inline="always")
def _times(a: Any, factor: Any, i: int, lanes: Any) -> Any:
    """a times node i's factor, of [1 or N, 1 or W]: one for all nodes, or for all signals."""
    row = i if len(factor) > 1 else uint64(0)
    return a * load(factor, row, lanes) if factor.shape[1] > 1 else a * factor[row, 0]


@compiled
def _measured(
    b: Any,
    walked: Any,
    x: Any,
    residual: Any,
    mu: Any,
    inverse: Any,
    started: bool,
    summed: bool,
    found: Any,
    first: int,
    lanes: Any,
) -> None:
    """Columns of the residual b − x + µPx from the `first` on; if not `started`, x = 0 and it is b.

    With q = r times `inverse`, `found` [4, K] are max q, max −q and max |x|, of b if not started; if `summed`
    Σ r, Σ |r| and Σ |x|. And 0 if all of them are numbers.
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


def measured(
    b: Tensor, inverse: Tensor, summed: bool, started: tuple[Tensor, Tensor, Tensor, Tensor] | None = None
) -> Tensor | None:
    """What `_measured` finds for b [..., N, K], [3, ..., 1, K]; None where a number is not finite.

    `inverse` is [..., 1 or N, 1 or K]. For x ≠ 0, `started` are such a µ, and like b Px, x and where the
    residual goes, whose numbers lie beside each other.
    """
    batch, channels = b.shape[:-2], b.shape[-1]
    mu, *others = (inverse, b, b, b) if started is None else started
    found = b.new_empty(batch.numel(), 4, channels)
    factors = [x.expand(*batch, *x.shape[-2:]) for x in (mu, inverse)]
    arrays = [x.reshape(-1, *x.shape[-2:]).contiguous().numpy() for x in (b, *others, *factors)]
    for place, into in enumerate(found.numpy()):
        for first, lanes in columns(channels):
            _measured(*(x[place] for x in arrays), started is not None, summed, into, first, lanes)
    *sizes, odd = found.reshape(*batch, 4, 1, channels).unbind(-3)
    return None if bool(odd.any()) else torch.stack(sizes)
