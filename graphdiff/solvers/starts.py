"""What sweeps start from, compiled: how large a signal is, and what of its first guess is worth a product.

Who gives no guess starts from the signal itself, x₀ = s of b = (1 − µ)s. Then x₀ lies in the direction of b,
where the first step looks in any case, and is worth its product only if the walk leaves it nearly as it is.

This file is read where numba is installed, and compiled when it is first used.
"""

from typing import Any

import numpy as np
from numba import njit, uint64

from graphdiff.operators.compiled import compiled
from graphdiff.operators.lanes import any_of, larger, load, magnitude, store, times, wide, zeros

# Nodes of which it is asked what a start is worth, and what share of it is as good as all.
SAMPLED, NEARLY = 4096, 0.9
# The least share for which a signal is started from itself.
WORTH = 0.5


@compiled
def sized(given: Any, start: Any, mu: Any, unit: Any, itself: Any, share: Any, lanes: Any) -> bool:
    """The largest number of each signal's `given` and `start` [N, W] into `unit` [W]; if any start is not 0.

    1 where all are 0, and never so small that its inverse is infinite. Of [1, W], `share` becomes 1, or 0 for
    a start of 0, and `itself` 1 where given is (1 − µ) start but for rounding, else 0. It is 0 too where some
    µ, [N] or [1], is 0: there the start is the answer.
    """
    most, guess = magnitude(load(given, uint64(0), lanes)), magnitude(load(start, uint64(0), lanes))
    apart, each, hidden = zeros(lanes), uint64(len(mu) > 1), 4 * np.finfo(given.dtype).eps
    for i in range(uint64(len(given))):
        right, first = load(given, i, lanes), load(start, i, lanes)
        off = magnitude(wide(right) - wide(first) * (1 - mu[i * each]))
        right, first = magnitude(right), magnitude(first)
        apart = larger(apart, off - wide(right) * hidden)
        most, guess = larger(most, right), larger(guess, first)
    found = np.empty((2, len(unit)), given.dtype)
    store(found, uint64(0), most)
    store(found, uint64(1), guess)
    store(itself, uint64(0), apart)
    anywhere = mu.min() > 0
    for k in range(uint64(len(unit))):
        unit[k] = max(found[0, k], found[1, k])
        unit[k] = max(unit[k], np.finfo(given.dtype).tiny) if unit[k] > 0 else 1.0
        share[0, k] = 1.0 if found[1, k] > 0 else 0.0
        itself[0, k] = 1.0 if anywhere and itself[0, k] == 0 else 0.0
    return bool(share.any())


@njit(inline="always")
def _guessed(start: Any, degree: Any, scale: Any, summed: bool, i: int, lanes: Any) -> Any:
    """A node's start in units of its own, for the walk that is stochastic by rows."""
    return wide(load(start, i, lanes)) * scale * (1 / degree[i] if summed else 1.0)


@compiled(error_model="numpy")
def fitted(
    rows: Any,
    degree: Any,
    mu: Any,
    given: Any,
    start: Any,
    unit: Any,
    summed: bool,
    itself: Any,
    share: Any,
    lanes: Any,
) -> bool:
    """What of x, the start [N, W], to begin with, its `share` [1, W]: ⟨x, b⟩ / ⟨x, Ax⟩, for Ax = b symmetric.

    No other multiple of x is nearer to the answer in the energy's norm. Of a signal that is its own start it
    is 1 where the walk leaves it as it is, and 1 − µ where the walk carries it elsewhere; then 0 is taken if
    it is less than `WORTH`. `SAMPLED` nodes are asked, or all where a start is 0 at these; and it stays as
    `sized` has it unless it comes out well below. Returns whether any share is not 0.

    The walk is symmetric by its `degree`, [N] or [1]; if `summed`, `given` and start are of its transpose.
    """
    (starts, into, values, factor), scale = rows, load(unit, uint64(0), lanes)
    count, every = uint64(len(given)), max(uint64(len(given)) // uint64(SAMPLED), uint64(1))
    each, many, found = uint64(len(mu) > 1), uint64(len(degree) > 1), np.zeros((4, len(lanes)))
    begins = False
    for part in range(uint64(2)):
        above = below = zeros(lanes)
        for i in range(uint64(0), count, every):
            here = _guessed(start, degree, scale, summed, i, lanes)
            if mu[i * each] == 0 or not any_of(here):
                continue
            walked = zeros(lanes)
            for e in range(uint64(starts[i]), uint64(starts[i + uint64(1)])):
                there = _guessed(start, degree, scale, summed, uint64(into[e]), lanes)
                walked = walked + times(there, values, e)
            weight, left = degree[i * many], here - walked * factor[i]
            here = here * ((1.0 if summed else weight) / mu[i * each])
            above = above + here * (wide(load(given, i, lanes)) * scale)
            below = below + here * (left * (weight if summed else 1.0))
        store(found, uint64(2) * part, above)
        store(found, uint64(2) * part + uint64(1), below)
        # A signal that is 0 at so many nodes is carried elsewhere.
        if every == uint64(1) or (found[1] + itself[0]).all():
            break
        every = uint64(1)
    for k in range(len(lanes)):
        row = uint64(0) if found[1, k] != 0 else uint64(2)
        ratio = found[row, k] / found[row + uint64(1), k]
        if share[0, k] != 0 and 0 <= ratio < NEARLY:
            share[0, k] = ratio
        if itself[0, k] != 0 and not ratio >= WORTH:
            share[0, k] = 0.0
        begins = begins or share[0, k] != 0
    return begins
