"""The products behind the attention walk, compiled: tiles of exp(ψψᵀ) that never leave the nearest cache.

With A = ψψᵀ and weights w ≥ 0 of the nodes, P_ij = w_j exp(A_ij − lse_i),  lse_i = log Σ_j w_j exp(A_ij):

    value = P y                                y [N, K]
    Pᵀv,  (Pᵀv)_i = w_i Σ_j exp(A_ij − lse_j) v_j
    ∂ψ_i = Σ_j (G_ij + G_ji) ψ_j               for the cotangents g of value and g_lse of lse,
    ∂y = Pᵀg                                   G_ij = P_ij (g_i·y_j + h_i),  h_i = g_lse_i − g_i·value_i.

Each is, for every node i, a sum over all j. Nodes i stand side by side in the lanes of a processor's vectors,
all j pass by in panels, and logits, exponentials and sums are taken lane by lane in registers: a node's bits
depend on its graph alone, whatever threads there are. G_ji is made again where ∂ψ_i needs it, from the same
A_ij, for that costs less than adding to rows elsewhere. The largest logit of a row is found as panels pass,
and what was summed before is scaled to it (Milakov and Gimelshein, "Online normalizer calculation for
softmax", 2018). Sums begin anew with every few panels, so that many small terms count beside a large one.

This file is read where numba is installed, and compiled when it is first used.
"""

from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types, uint64
from numba.core.cgutils import alloca_once
from numba.extending import intrinsic
from torch import Tensor

from graphdiff.operators.compiled import compiled
from graphdiff.operators.rows import block
from graphdiff.operators.threads import in_team, shared, taken, worthwhile
from graphdiff.operators.vectors import Writer, registers

# Vectors of nodes i side by side, and panels of nodes j between two sums.
VECTORS, PANELS = 2, 4


def shape_of(dtype: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Lanes of a vector, nodes of a panel, channels of a sum: tuples, for whose lengths numba compiles."""
    bytes_of, nodes, channels = registers()
    return (0,) * (bytes_of // np.dtype(dtype).itemsize), (0,) * nodes, (0,) * channels


class _Writer(Writer):
    """Knows the sizes of panels and sums besides; its rows are of nodes i."""

    def __init__(self, context: Any, builder: Any, dtype: Any, shape: Any) -> None:
        lanes, self.nodes, self.channels = (part.count for part in shape)
        super().__init__(context, builder, dtype, lanes, VECTORS)


# Panels are [panels, channels, nodes of a panel]: of every channel the numbers of some nodes j in a row. A
# tile is [j, i].


@intrinsic
def _logits(
    typing: Any, rows: Any, panels: Any, first: Any, count: Any, depth: Any, tile: Any, shape: Any
) -> Any:
    """tile_ji = Σ_k panels_jk rows_ki for k < depth and `count` panels from the `first` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        write = _Writer(context, builder, rows.dtype, shape)
        own, others, into = (write.data(k, args[n]) for n, k in ((0, rows), (1, panels), (5, tile)))
        channels = builder.extract_value(context.make_array(panels)(context, builder, args[1]).shape, 1)
        size = write.times(channels, write.nodes)
        others = write.at(others, builder.mul(args[2], size))
        with write.loop(args[3]) as panel:
            sums = write.sums(write.nodes)
            here = write.at(others, builder.mul(panel.index, size))
            with write.loop(args[4]) as k:
                vectors = write.vectors(own, write.times(k.index, write.row))
                write.add(sums, write.at(here, write.times(k.index, write.nodes)), 1, vectors)
            place = write.at(into, write.times(panel.index, write.nodes * write.row))
            for j, row in enumerate(sums):
                write.store_row([builder.load(x) for x in row], place, j * write.row)
        return write.nothing()

    return types.none(rows, panels, types.uint64, types.uint64, types.uint64, tile, shape), code


@intrinsic
def _gathered(
    typing: Any, tile: Any, panels: Any, first: Any, count: Any, change: Any, sums: Any, shape: Any
) -> Any:
    """sums_ci ← change_i sums_ci + Σ_j panels_jc tile_ji, for all channels c of the panels."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        write = _Writer(context, builder, tile.dtype, shape)
        weights, others, scale, into = (
            write.data(k, args[n]) for n, k in ((0, tile), (1, panels), (4, change), (5, sums))
        )
        channels = builder.extract_value(context.make_array(panels)(context, builder, args[1]).shape, 1)
        size = write.times(channels, write.nodes)
        others = write.at(others, builder.mul(args[2], size))
        factors = write.vectors(scale)
        groups = builder.udiv(channels, ir.Constant(ir.IntType(64), write.channels))
        with write.loop(groups) as group:
            found = write.sums(write.channels)
            of_group = write.at(others, write.times(group.index, write.channels * write.nodes))
            with write.loop(args[3]) as panel:
                here = write.at(of_group, builder.mul(panel.index, size))
                there = write.at(weights, write.times(panel.index, write.nodes * write.row))
                with write.loop(write.nodes) as j:
                    vectors = write.vectors(there, write.times(j.index, write.row))
                    write.add(found, write.at(here, j.index), write.nodes, vectors)
            place = write.at(into, write.times(group.index, write.channels * write.row))
            for c, row in enumerate(found):
                before = write.vectors(place, c * write.row)
                after = [
                    write.multiplied_added(old, factor, builder.load(new))
                    for old, factor, new in zip(before, factors, row, strict=True)
                ]
                write.store_row(after, place, c * write.row)
        return write.nothing()

    return types.none(tile, panels, types.uint64, types.uint64, change, sums, shape), code


@intrinsic
def _below_largest(typing: Any, tile: Any, rows: Any, largest: Any, change: Any, shape: Any) -> Any:
    """largest_i ← max_j with tile_ji, change_i = exp of old − new, tile_ji ← exp(tile_ji − largest_i)."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        write = _Writer(context, builder, tile.dtype, shape)
        logits, most, changed = (write.data(k, args[n]) for n, k in ((0, tile), (2, largest), (3, change)))
        places = [alloca_once(builder, write.kind) for _ in range(VECTORS)]
        before = write.vectors(most)
        for place, value in zip(places, before, strict=True):
            builder.store(value, place)
        with write.loop(args[1]) as j:
            for place, x in zip(places, write.vectors(logits, write.times(j.index, write.row)), strict=True):
                builder.store(write.larger(x, builder.load(place)), place)
        after = [builder.load(place) for place in places]
        write.store_row(after, most)
        pairs = zip(before, after, strict=True)
        write.store_row([write.exponential(builder.fsub(x, y)) for x, y in pairs], changed)
        with write.loop(args[1]) as j:
            place = write.at(logits, write.times(j.index, write.row))
            pairs = zip(write.vectors(place), after, strict=True)
            write.store_row([write.exponential(builder.fsub(x, y)) for x, y in pairs], place)
        return write.nothing()

    return types.none(tile, types.uint64, largest, change, shape), code


@intrinsic
def _below(typing: Any, tile: Any, rows: Any, levels: Any, first: Any, shape: Any) -> Any:
    """tile_ji ← exp(tile_ji − levels_j), for nodes j from the `first` on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        write = _Writer(context, builder, tile.dtype, shape)
        logits, level = write.data(tile, args[0]), write.at(write.data(levels, args[2]), args[3])
        with write.loop(args[1]) as j:
            place = write.at(logits, write.times(j.index, write.row))
            shift = write.spread(level, j.index)
            row = [write.exponential(builder.fsub(x, shift)) for x in write.vectors(place)]
            write.store_row(row, place)
        return write.nothing()

    return types.none(tile, types.uint64, levels, types.uint64, shape), code


@intrinsic
def _stored(
    typing: Any,
    tile: Any,
    rows: Any,
    factors: Any,
    weights: Any,
    P: Any,
    i: Any,
    j: Any,
    whole: Any,
    shape: Any,
) -> Any:
    """Rows of a tile times factors and weights into rows i on of P, `whole` vectors of each, columns j on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        write = _Writer(context, builder, tile.dtype, shape)
        entries, factor, weight, into = (
            write.data(k, args[n]) for n, k in ((0, tile), (2, factors), (3, weights), (4, P))
        )
        width = builder.extract_value(context.make_array(P)(context, builder, args[4]).shape, 1)
        factor, into = write.at(factor, args[5]), write.at(into, builder.mul(args[5], width), args[6])
        weight = write.at(weight, args[6])
        with write.loop(args[7]) as vector:
            offset = write.times(vector.index, write.lanes)
            counted = write.load(weight, offset)
            with write.loop(args[1]) as row:
                x = write.load(entries, write.times(row.index, write.row), offset)
                x = builder.fmul(builder.fmul(x, write.spread(factor, row.index)), counted)
                write.store(x, into, builder.mul(row.index, width), offset)
        return write.nothing()

    number = types.uint64
    return types.none(tile, number, factors, weights, P, number, number, number, shape), code


@intrinsic
def _both_ways(
    typing: Any, tile: Any, a: Any, b: Any, rows: Any, own: Any, levels: Any, first: Any, shape: Any
) -> Any:
    """e_ji = exp(tile_ji − levels_j): a_ji ← exp(tile_ji − own_i) a_ji + e_ji b_ji, tile_ji ← e_ji."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        write = _Writer(context, builder, tile.dtype, shape)
        logits, left, right, ours, theirs = (
            write.data(k, args[n]) for n, k in ((0, tile), (1, a), (2, b), (4, own), (5, levels))
        )
        shifts, theirs = write.vectors(ours), write.at(theirs, args[6])
        with write.loop(args[3]) as j:
            offset = write.times(j.index, write.row)
            level = write.spread(theirs, j.index)
            x = write.vectors(logits, offset)
            here = [write.exponential(builder.fsub(v, shift)) for v, shift in zip(x, shifts, strict=True)]
            there = [write.exponential(builder.fsub(v, level)) for v in x]
            write.store_row(there, logits, offset)
            sums = [
                write.multiplied_added(p, u, builder.fmul(q, v))
                for p, u, q, v in zip(
                    here, write.vectors(left, offset), there, write.vectors(right, offset), strict=True
                )
            ]
            write.store_row(sums, left, offset)
        return write.nothing()

    return types.none(tile, a, b, types.uint64, own, levels, types.uint64, shape), code


# --- nodes [begin, end) of a graph, all of whose nodes stand in panels, filled up with 0


@compiled
def _placed(x: Any, panels: Any, at: int) -> None:
    """x [N, C] as channels of panels, from the one `at` on."""
    first, node, panel = uint64(at), uint64(0), uint64(0)
    for i in range(uint64(x.shape[0])):
        for k in range(uint64(x.shape[1])):
            panels[panel, first + k, node] = x[i, k]
        node += uint64(1)
        if node == uint64(panels.shape[2]):
            node, panel = uint64(0), panel + uint64(1)


@compiled
def _turned(panels: Any, begin: Any, channels: Any, rows: Any) -> None:
    """The channels of nodes from `begin` on, side by side; 0 beyond the last panel."""
    apart = uint64(panels.shape[2])
    panel, node = begin // apart, begin % apart
    for q in range(uint64(rows.shape[1])):
        there = panel < uint64(len(panels))
        for k in range(channels):
            rows[k, q] = panels[panel, k, node] if there else 0
        node += uint64(1)
        if node == apart:
            node, panel = uint64(0), panel + uint64(1)


@compiled(error_model="numpy")
def _forward(
    features: Any, columns: Any, value: Any, most: Any, degrees: Any, depth: int, shape: Any, counter: Any
) -> None:
    """Value, the largest logits, and the sums of w exp(logit − largest), for panels of ψ and [w y, w]."""
    lanes, nodes, _ = shape
    row, total, channels = uint64(VECTORS * len(lanes)), uint64(len(value)), uint64(value.shape[1])
    own, count = np.empty((uint64(depth), row), features.dtype), uint64(len(features))
    tile = np.empty((PANELS * len(nodes), row), features.dtype)
    sums = np.empty((columns.shape[1], row), features.dtype)
    largest, change = np.empty(row, features.dtype), np.empty(row, features.dtype)
    i = row * uint64(taken(counter))
    while i < total:
        _turned(features, i, uint64(depth), own)
        sums[:], largest[:] = 0, -np.inf
        for first in range(uint64(0), count, uint64(PANELS)):
            some = min(uint64(PANELS), count - first)
            _logits(own, features, first, some, uint64(depth), tile, shape)
            _below_largest(tile, some * uint64(len(nodes)), largest, change, shape)
            _gathered(tile, columns, first, some, change, sums, shape)
        for q in range(min(row, total - i)):
            degree = sums[channels, q]
            for k in range(channels):
                value[i + q, k] = sums[k, q] / degree
            most[i + q], degrees[i + q] = largest[q], degree
        i = row * uint64(taken(counter))


@compiled
def _side_by_side(features: Any, depth: int, blocks: Any) -> None:
    """All nodes as rows of lanes, [blocks, depth, row]; 0 beyond the last."""
    row = uint64(blocks.shape[2])
    for k in range(uint64(len(blocks))):
        _turned(features, k * row, uint64(depth), blocks[k])


@compiled
def _matrix(
    features: Any,
    blocks: Any,
    most: Any,
    inverses: Any,
    weights: Any,
    P: Any,
    depth: int,
    shape: Any,
    counter: Any,
) -> None:
    """P_ij = w_j exp(A_ij − `most`_i) `inverses`_i in the first rows of P, for panels and blocks of ψ.

    Here nodes j are side by side, so that the entries of a row are; `weights` are 0 where there is no node.
    """
    lanes, nodes, _ = shape
    row, width, step = uint64(blocks.shape[2]), uint64(P.shape[1]), uint64(PANELS * len(nodes))
    tile, count, total = np.empty((step, row), features.dtype), uint64(len(features)), uint64(len(inverses))
    first = uint64(PANELS) * uint64(taken(counter))
    while first < count:
        some, i = min(uint64(PANELS), count - first), first * uint64(len(nodes))
        rows = min(step, total - i)
        for k in range(uint64(len(blocks))):
            _logits(blocks[k], features, first, some, uint64(depth), tile, shape)
            _below(tile, rows, most, i, shape)
            whole = min(uint64(VECTORS), (width - k * row) // uint64(len(lanes)))
            _stored(tile, rows, inverses, weights, P, i, k * row, whole, shape)
        first = uint64(PANELS) * uint64(taken(counter))


@compiled
def _transposed(
    features: Any,
    columns: Any,
    levels: Any,
    weight: Any,
    product: Any,
    depth: int,
    shape: Any,
    counter: Any,
) -> None:
    """Pᵀv, for panels of ψ and v and `levels` lse."""
    lanes, nodes, _ = shape
    row, total, channels = uint64(VECTORS * len(lanes)), uint64(len(product)), uint64(product.shape[1])
    own, count = np.empty((uint64(depth), row), features.dtype), uint64(len(features))
    tile = np.empty((PANELS * len(nodes), row), features.dtype)
    sums, same = np.empty((columns.shape[1], row), features.dtype), np.ones(row, features.dtype)
    i = row * uint64(taken(counter))
    while i < total:
        _turned(features, i, uint64(depth), own)
        sums[:] = 0
        for first in range(uint64(0), count, uint64(PANELS)):
            some = min(uint64(PANELS), count - first)
            _logits(own, features, first, some, uint64(depth), tile, shape)
            _below(tile, some * uint64(len(nodes)), levels, first * uint64(len(nodes)), shape)
            _gathered(tile, columns, first, some, same, sums, shape)
        for q in range(min(row, total - i)):
            for k in range(channels):
                product[i + q, k] = weight[i + q, 0] * sums[k, q]
        i = row * uint64(taken(counter))


@compiled
def _backward(
    features: Any,
    columns: Any,
    cotangents: Any,
    levels: Any,
    weight: Any,
    g_psi: Any,
    g_y: Any,
    depth: int,
    shape: Any,
    counter: Any,
) -> None:
    """∂ψ and ∂y, for panels of ψ, [w y, w] and [g, h] and `levels` lse."""
    lanes, nodes, _ = shape
    row, total, channels = uint64(VECTORS * len(lanes)), uint64(len(g_y)), uint64(g_y.shape[1] + 1)
    own, count = np.empty((uint64(depth), row), features.dtype), uint64(len(features))
    held, given = np.empty((2, channels, row), features.dtype)
    tile, left, right = np.empty((3, PANELS * len(nodes), row), features.dtype)
    of_psi = np.empty((features.shape[1], row), features.dtype)
    of_y = np.empty((columns.shape[1], row), features.dtype)
    level, same = np.empty(row, features.dtype), np.ones(row, features.dtype)
    i = row * uint64(taken(counter))
    while i < total:
        _turned(features, i, uint64(depth), own)
        _turned(columns, i, channels, held)
        _turned(cotangents, i, channels, given)
        for q in range(row):
            level[q] = levels[min(i + q, uint64(len(levels) - 1))]
        of_psi[:], of_y[:] = 0, 0
        for first in range(uint64(0), count, uint64(PANELS)):
            some = min(uint64(PANELS), count - first)
            _logits(own, features, first, some, uint64(depth), tile, shape)
            _logits(given, columns, first, some, channels, left, shape)
            _logits(held, cotangents, first, some, channels, right, shape)
            rows = some * uint64(len(nodes))
            _both_ways(tile, left, right, rows, level, levels, first * uint64(len(nodes)), shape)
            _gathered(left, features, first, some, same, of_psi, shape)
            _gathered(tile, cotangents, first, some, same, of_y, shape)
        for q in range(min(row, total - i)):
            for k in range(uint64(depth)):
                g_psi[i + q, k] = of_psi[k, q]
            for k in range(channels - uint64(1)):
                g_y[i + q, k] = weight[i + q, 0] * of_y[k, q]
        i = row * uint64(taken(counter))


@compiled
def _forward_by_team(address: int, threads: int, arguments: Any) -> Any:
    return in_team(address, threads, _forward, arguments)


@compiled
def _matrix_by_team(address: int, threads: int, arguments: Any) -> Any:
    return in_team(address, threads, _matrix, arguments)


@compiled
def _transposed_by_team(address: int, threads: int, arguments: Any) -> Any:
    return in_team(address, threads, _transposed, arguments)


@compiled
def _backward_by_team(address: int, threads: int, arguments: Any) -> Any:
    return in_team(address, threads, _backward, arguments)


# --- from tensors. Numpy does what is small: torch's threads would still be busy waiting when ours begin.


def forward(psi: Tensor, weight: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """P y [N, K] and lse [N], for psi [N, d], weight [N, 1], y [N, K]."""
    features, w, signals = _arrays(psi, weight, y)
    shape = shape_of(features.dtype)
    value, (most, degree) = torch.empty_like(y), y.new_empty(2, len(y))
    given = _panels(shape, features), _panels(shape, w * signals, w)
    found = _arrays(value, most, degree)
    shared(_forward, _forward_by_team, worthwhile(len(psi) ** 2), *given, *found, psi.shape[-1], shape)
    return value, most + degree.log()


def matrix(psi: Tensor, weight: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """P, filled up with 0 to [width, width], and lse [N]."""
    features, w = _arrays(psi, weight)
    shape, nodes, (most, degree) = shape_of(features.dtype), len(psi), psi.new_empty(2, len(psi))
    panels, threads = _panels(shape, features), worthwhile(nodes**2)
    found = _arrays(psi[:, :0], most, degree)
    shared(_forward, _forward_by_team, threads, panels, _panels(shape, w), *found, psi.shape[-1], shape)
    # Pages that are touched for the first time would take longer than all else, were they small ones.
    (P,) = block((width * width, features.dtype))
    P = P.reshape(width, width)
    P[nodes:] = 0
    row = VECTORS * len(shape[0])
    blocks = np.empty((-(-width // row), psi.shape[-1], row), features.dtype)
    _side_by_side(panels, psi.shape[-1], blocks)
    weights = np.pad(w.reshape(-1), (0, width - nodes))
    given = panels, blocks, found[1], 1 / found[2], weights, P
    shared(_matrix, _matrix_by_team, threads, *given, psi.shape[-1], shape)
    return torch.from_numpy(P), most + degree.log()


def transposed(psi: Tensor, weight: Tensor, lse: Tensor, v: Tensor) -> tuple[Tensor]:
    """Pᵀv [N, K], for lse [N, 1]."""
    features, w, levels, signals = _arrays(psi, weight, lse, v)
    shape = shape_of(features.dtype)
    product = torch.empty_like(v)
    given = _panels(shape, features), _panels(shape, signals), _filled(shape, levels), w
    shared(
        _transposed,
        _transposed_by_team,
        worthwhile(len(psi) ** 2),
        *given,
        *_arrays(product),
        psi.shape[-1],
        shape,
    )
    return (product,)


def backward(
    psi: Tensor, weight: Tensor, y: Tensor, value: Tensor, lse: Tensor, g_value: Tensor, g_lse: Tensor
) -> tuple[Tensor, Tensor]:
    """∂ψ [N, d] and ∂y [N, K]."""
    features, w, signals, found, levels, g, g_levels = _arrays(psi, weight, y, value, lse, g_value, g_lse)
    shape = shape_of(features.dtype)
    g_psi, g_y = torch.empty_like(psi), torch.empty_like(y)
    h = g_levels - (g * found).sum(-1)
    panels = _panels(shape, features), _panels(shape, w * signals, w), _panels(shape, g, h[:, None])
    given = *panels, _filled(shape, levels), w
    shared(
        _backward,
        _backward_by_team,
        worthwhile(len(psi) ** 2),
        *given,
        *_arrays(g_psi, g_y),
        psi.shape[-1],
        shape,
    )
    return g_psi, g_y


def _arrays(*tensors: Tensor) -> list[Any]:
    return [x.numpy() for x in tensors]


def _panels(shape: Any, *parts: Any) -> Any:
    """Arrays [N, C], beside each other, as [panels, C, nodes of a panel], filled up with 0."""
    _, nodes, group = (len(part) for part in shape)
    channels = sum(x.shape[1] for x in parts)
    panels = np.zeros((-(-len(parts[0]) // nodes), -(-channels // group) * group, nodes), parts[0].dtype)
    first = 0
    for x in parts:
        _placed(x, panels, first)
        first += x.shape[1]
    return panels


def _filled(shape: Any, lse: Any) -> Any:
    """The lse of all nodes in panels; 0 is that of those that fill them up, whose logits are 0."""
    return np.pad(lse.reshape(-1), (0, -len(lse) % len(shape[1])))
