"""P y and Pᵀ v of a stored matrix for a few signals at once, compiled: what it takes to read P, little more.

Libraries' products are made for two wide matrices, and are several times slower than that where one has two
to twenty columns. Here sums of some rows, or of some columns, of P stand in registers while P passes by once;
they begin anew after every `TERMS` terms. Which of them a thread takes changes no bit.

This file is read where numba is installed, and compiled when it is first used.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types, uint64
from numba.extending import intrinsic
from torch import Tensor

from graphdiff.operators.compiled import compiled
from graphdiff.operators.threads import in_team, shared, taken, worthwhile
from graphdiff.operators.vectors import Writer, registers

# Terms between two additions to what was summed before: as many as a processor's cache has pages for at once.
TERMS = 64
# Bytes of signals side by side, where a processor's vectors are as long, and how many vectors are summed.
BYTES, MOST = 32, 3
# Columns, for the transpose, that a thread takes at a time, in bytes.
TAKEN = 1024


def suits(P: Tensor, channels: int) -> bool:
    """Whether these products are the faster ones: more signals than one, and no more than read P once."""
    known = P.device.type == "cpu" and P.dtype in (torch.float32, torch.float64)
    return known and 1 < channels <= MOST * _lanes(P.dtype.itemsize)


def _lanes(itemsize: int) -> int:
    return min(BYTES, registers()[0]) // itemsize


@intrinsic
def _rows(
    typing: Any,
    P: Any,
    i: Any,
    first: Any,
    count: Any,
    y: Any,
    product: Any,
    lanes: Any,
    vectors: Any,
    rows: Any,
) -> Any:
    """product_i += Σ_j P_ij y_j for some rows from the i-th on, and `count` nodes j from the `first` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        write = Writer(context, builder, P.dtype, lanes.count, vectors.count)
        entries, signals, into = (write.data(k, args[n]) for n, k in ((0, P), (4, y), (5, product)))
        width = builder.extract_value(context.make_array(P)(context, builder, args[0]).shape, 1)
        entries = write.at(entries, builder.mul(args[1], width), args[2])
        signals = write.at(signals, write.times(args[2], write.row))
        sums = write.sums(rows.count)
        with write.loop(args[3]) as j:
            numbers = write.at(entries, j.index)
            write.add(sums, numbers, width, write.vectors(signals, write.times(j.index, write.row)))
        _onto(write, sums, write.at(into, write.times(args[1], write.row)), write.row)
        return write.nothing()

    number = types.uint64
    return types.none(P, number, number, number, y, product, lanes, vectors, rows), code


@intrinsic
def _columns(
    typing: Any, P: Any, j: Any, first: Any, count: Any, v: Any, product: Any, lanes: Any, rows: Any
) -> Any:
    """product_cj += Σ_i P_ij v_ic for a vector of columns from the j-th on, `count` rows from `first` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        write = Writer(context, builder, P.dtype, lanes.count, 1)
        entries, signals, into = (write.data(k, args[n]) for n, k in ((0, P), (4, v), (5, product)))
        width, channels = (
            builder.extract_value(context.make_array(k)(context, builder, args[n]).shape, 1)
            for n, k in ((0, P), (4, v))
        )
        entries = write.at(entries, builder.mul(args[2], width), args[1])
        signals = write.at(signals, builder.mul(args[2], channels))
        with write.loop(builder.udiv(channels, ir.Constant(ir.IntType(64), rows.count))) as group:
            sums = write.sums(rows.count)
            some = write.times(group.index, rows.count)
            with write.loop(args[3]) as i:
                numbers = write.at(signals, builder.mul(i.index, channels), some)
                write.add(sums, numbers, 1, write.vectors(entries, builder.mul(i.index, width)))
            _onto(write, sums, write.at(into, builder.mul(some, width), args[1]), width)
        return write.nothing()

    number = types.uint64
    return types.none(P, number, number, number, v, product, lanes, rows), code


def _onto(write: Writer, sums: Any, place: Any, apart: Any) -> None:
    """Add rows of sums to what stands there, so far apart."""
    for k, row in enumerate(sums):
        offset = k * apart if isinstance(apart, int) else write.times(apart, k)
        old = write.vectors(place, offset)
        new = [write.builder.fadd(x, write.builder.load(y)) for x, y in zip(old, row, strict=True)]
        write.store_row(new, place, offset)


@compiled
def _product(P: Any, y: Any, product: Any, shape: Any, counter: Any) -> None:
    """P y, for y and the product [N, vectors of signals]."""
    lanes, vectors, rows = shape
    nodes, some = uint64(len(y)), uint64(len(rows))
    i = some * uint64(taken(counter))
    while i < nodes:
        for first in range(uint64(0), nodes, uint64(TERMS)):
            _rows(P, i, first, min(uint64(TERMS), nodes - first), y, product, lanes, vectors, rows)
        i = some * uint64(taken(counter))


@compiled
def _transposed(P: Any, v: Any, product: Any, shape: Any, counter: Any) -> None:
    """(Pᵀ v)ᵀ, for v [N, signals] and the product [signals, N], both filled up."""
    lanes, rows = shape
    nodes, width, some = uint64(len(v)), uint64(P.shape[1]), uint64(TAKEN // P.itemsize)
    begin = some * uint64(taken(counter))
    while begin < width:
        for first in range(uint64(0), nodes, uint64(TERMS)):
            for j in range(begin, min(begin + some, width), uint64(len(lanes))):
                _columns(P, j, first, min(uint64(TERMS), nodes - first), v, product, lanes, rows)
        begin = some * uint64(taken(counter))


@compiled
def _product_by_team(address: int, threads: int, arguments: Any) -> Any:
    return in_team(address, threads, _product, arguments)


@compiled
def _transposed_by_team(address: int, threads: int, arguments: Any) -> Any:
    return in_team(address, threads, _transposed, arguments)


def product(P: Tensor, y: Tensor) -> Tensor:
    """P y [N, K], for P filled up with 0 to whole lines of 64 bytes both ways, and y [N, K]."""
    entries, signals = P.detach().numpy(), y.detach().numpy()
    nodes, channels = signals.shape
    lanes = (0,) * _lanes(entries.itemsize)
    vectors = (0,) * -(-channels // len(lanes))
    columns = np.zeros((nodes, len(lanes) * len(vectors)), entries.dtype)
    columns[:, :channels] = signals
    found = y.new_zeros(len(P), columns.shape[1])
    shape = lanes, vectors, (0,) * registers()[2]
    shared(_product, _product_by_team, worthwhile(nodes**2), entries, columns, found.numpy(), shape)
    return found[:nodes, :channels]


def transposed(P: Tensor, v: Tensor) -> Tensor:
    """Pᵀ v [N, K], for P and v as `product` has them."""
    entries, signals = P.detach().numpy(), v.detach().numpy()
    nodes, channels = signals.shape
    bytes_of, _, rows = registers()
    columns = np.zeros((nodes, -(-channels // rows) * rows), entries.dtype)
    columns[:, :channels] = signals
    found = v.new_zeros(columns.shape[1], P.shape[1])
    shape = (0,) * (bytes_of // entries.itemsize), (0,) * rows
    shared(_transposed, _transposed_by_team, worthwhile(nodes**2), entries, columns, found.numpy(), shape)
    return found[:channels, :nodes].mT
