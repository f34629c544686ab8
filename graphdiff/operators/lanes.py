"""Several numbers side by side, on which a processor works at once: a type for numba, and what it can do.

`lanes`, an argument of many functions, is any tuple of as many numbers: numba compiles for each length. Calls
of these functions count no references, as calls of compiled ones do for every array that they are given.

This file is read where numba is installed.
"""

import operator
from collections.abc import Callable, Iterator
from typing import Any

from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic, models, overload, register_model

# Bytes of a line of the cache.
LINE = 64
# Signals beside each other: for each of these numbers code is compiled once.
WIDTHS = 32, 28, 24, 20, 16, 12, 8, 4, 3, 2, 1


class Lanes(types.Type):
    """So many numbers of a dtype."""

    def __init__(self, dtype: Any, count: int) -> None:
        self.dtype, self.count = dtype, count
        super().__init__(name=f"Lanes({dtype}, {count})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Lanes) -> None:
        super().__init__(
            manager, lanes, ir.VectorType(manager.lookup(lanes.dtype).get_value_type(), lanes.count)
        )


def _row(context: Any, builder: Any, kind: Any, array: Any, row: Any, lanes: Lanes) -> Any:
    """Where a row of an array [N, W] lies, which is unsigned, for it is not counted from the end.

    W neighbouring columns of a wider array will do.
    """
    made = context.make_array(kind)(context, builder, array)
    place = context.get_value_type(lanes).as_pointer()
    if kind.layout == "C":
        first = builder.gep(made.data, [builder.mul(row, ir.Constant(row.type, lanes.count))])
    else:
        bytes_of = builder.bitcast(made.data, ir.IntType(8).as_pointer())
        first = builder.gep(bytes_of, [builder.mul(row, builder.extract_value(made.strides, 0))])
    return builder.bitcast(first, place)


def _alike(builder: Any, number: Any, count: int) -> Any:
    """A number in so many lanes."""
    undefined, place = ir.Constant(ir.VectorType(number.type, count), ir.Undefined), ir.IntType(32)
    one = builder.insert_element(undefined, number, ir.Constant(place, 0))
    return builder.shuffle_vector(one, undefined, ir.Constant(ir.VectorType(place, count), [0] * count))


@intrinsic
def load(typing: Any, x: Any, row: Any, lanes: Any) -> Any:
    """Row of x [N, W], where `lanes` is any tuple of W numbers."""
    found = Lanes(x.dtype, lanes.count)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_row(context, builder, x, args[0], args[1], found))
        value.align = x.dtype.bitwidth // 8
        return value

    return found(x, row, lanes), code


@intrinsic
def store(typing: Any, x: Any, row: Any, value: Any) -> Any:
    """Write a row of x [N, W]."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _row(context, builder, x, args[0], args[1], value)
        builder.store(args[2], place, align=x.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(x, row, value), code


def _beside(context: Any, builder: Any, kind: Any, array: Any, place: Any, count: int) -> Any:
    """Where so many numbers of an array stand beside each other, from a place counted through its rows."""
    first = builder.gep(context.make_array(kind)(context, builder, array).data, [place])
    return builder.bitcast(first, ir.VectorType(first.type.pointee, count).as_pointer())


@intrinsic
def single(typing: Any, x: Any, place: Any) -> Any:
    """A number of x, by a load that no compiler joins with others.

    What they make of a loop over numbers that lie anywhere takes longer, most of all for a short one.
    """

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(x)(context, builder, args[0]).data
        return builder.load_atomic(builder.gep(data, [args[1]]), "monotonic", x.dtype.bitwidth // 8)

    return x.dtype(x, place), code


@intrinsic
def beside(typing: Any, x: Any, place: Any, lanes: Any) -> Any:
    """W numbers of x, from a place on that is counted through all its rows."""
    found = Lanes(x.dtype, lanes.count)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = builder.load(_beside(context, builder, x, args[0], args[1], found.count))
        value.align = x.dtype.bitwidth // 8
        return value

    return found(x, place, lanes), code


@intrinsic
def put(typing: Any, x: Any, place: Any, value: Any) -> Any:
    """Write numbers where `beside` reads them."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = _beside(context, builder, x, args[0], args[1], value.count)
        builder.store(args[2], place, align=x.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(x, place, value), code


@intrinsic
def fill(typing: Any, x: Any, place: Any, number: Any, lanes: Any) -> Any:
    """Write one number W times where `beside` reads them; a loop would write one after the other."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        value = _alike(builder, context.cast(builder, args[2], number, x.dtype), lanes.count)
        place = _beside(context, builder, x, args[0], args[1], lanes.count)
        builder.store(value, place, align=x.dtype.bitwidth // 8)
        return context.get_dummy_value()

    return types.none(x, place, number, lanes), code


@intrinsic
def picked(typing: Any, x: Any, numbers: Any, place: Any, lanes: Any) -> Any:
    """The W numbers of x of which `numbers` says the places, from a place of its own on.

    One load after the other: a processor's instruction for this takes as long at best.
    """
    found = Lanes(x.dtype, lanes.count)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data, places = (
            context.make_array(kind)(context, builder, array).data
            for kind, array in zip((x, numbers), args, strict=False)
        )
        vector = ir.Constant(context.get_value_type(found), ir.Undefined)
        for lane in range(found.count):
            here = builder.add(args[2], ir.Constant(args[2].type, lane))
            one = builder.zext(builder.load(builder.gep(places, [here])), ir.IntType(64))
            one = builder.load(builder.gep(data, [one]))
            vector = builder.insert_element(vector, one, ir.Constant(ir.IntType(32), lane))
        return vector

    return found(x, numbers, place, lanes), code


@intrinsic
def any_in(typing: Any, a: Any, start: Any, count: Any) -> Any:
    """Whether any of W whole numbers of 32 bits is one of so many from a start on."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = args[0].type
        start, count = (_alike(builder, builder.trunc(x, kind.element), a.count) for x in args[1:])
        found = builder.icmp_unsigned("<", builder.sub(args[0], start), count)
        bits = builder.bitcast(found, ir.IntType(a.count))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(a, start, count), code


@intrinsic
def increased(typing: Any, a: Any, b: Any, lanes: Any) -> Any:
    """a + b in so many lanes, the first, and a in the others."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        some = _alike(builder, args[2], a.count)
        chosen = builder.icmp_unsigned("<", ir.Constant(some.type, list(range(a.count))), some)
        return builder.select(chosen, builder.fadd(*args[:2]), args[0])

    return a(a, a, lanes), code


@intrinsic
def total(typing: Any, a: Any, lanes: Any) -> Any:
    """The sum of four lanes, in the first of W; the same to the bit wherever a turn of the four begins."""
    kind = Lanes(a.dtype, lanes.count)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        first = ir.Constant(ir.IntType(32), 0)
        p, q, r, s = (builder.extract_element(args[0], ir.Constant(first.type, k)) for k in range(4))
        found = builder.fadd(builder.fadd(p, r), builder.fadd(q, s))
        return builder.insert_element(ir.Constant(context.get_value_type(kind), ir.Undefined), found, first)

    return kind(a, lanes), code


@intrinsic
def zeros(typing: Any, lanes: Any) -> Any:
    """W zeros in float64, where `lanes` is any tuple of W numbers."""
    kind = Lanes(types.float64, lanes.count)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return ir.Constant(context.get_value_type(kind), [0.0] * lanes.count)

    return kind(lanes), code


@intrinsic
def wide(typing: Any, a: Any) -> Any:
    """The same numbers in float64."""
    kind = Lanes(types.float64, a.count)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if a.dtype == types.float64 else builder.fpext(args[0], context.get_value_type(kind))

    return kind(a), code


@intrinsic
def narrow(typing: Any, a: Any, x: Any) -> Any:
    """The same numbers of float64 as near as the dtype of x has them."""
    kind = Lanes(x.dtype, a.count)

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return args[0] if x.dtype == a.dtype else builder.fptrunc(args[0], context.get_value_type(kind))

    return kind(a, x), code


@intrinsic
def magnitude(typing: Any, a: Any) -> Any:
    """|a|."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(args[0].type, [args[0].type])
        name = f"llvm.fabs.v{a.count}f{a.dtype.bitwidth}"
        return builder.call(get_or_insert_function(builder.module, kind, name), args)

    return a(a), code


@intrinsic
def larger(typing: Any, a: Any, b: Any) -> Any:
    """The larger of two, lane by lane; a where either is nan."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        # In this form, and no other, it is one instruction.
        return builder.select(builder.fcmp_ordered("<", *args), args[1], args[0])

    return a(a, a), code


@intrinsic
def any_of(typing: Any, a: Any) -> Any:
    """Whether any lane is not 0."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        nothing = ir.Constant(args[0].type, [0.0] * a.count)
        bits = builder.bitcast(builder.fcmp_unordered("!=", args[0], nothing), ir.IntType(a.count))
        return builder.icmp_unsigned("!=", bits, ir.Constant(bits.type, 0))

    return types.boolean(a), code


@intrinsic
def where(typing: Any, mask: Any, a: Any, b: Any) -> Any:
    """a in lanes where the mask is not 0, b in the others."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        nothing = ir.Constant(args[0].type, [0.0] * a.count)
        return builder.select(builder.fcmp_unordered("!=", args[0], nothing), args[1], args[2])

    return a(a, a, a), code


def _lane_by_lane(instruction: str) -> Any:
    @intrinsic
    def combine(typing: Any, a: Any, b: Any) -> Any:
        def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            left, right = args
            if not isinstance(signature.args[1], Lanes):
                right = _alike(builder, right, a.count)
            return getattr(builder, instruction)(left, right)

        return a(a, b if isinstance(b, Lanes) else a.dtype), code

    return combine


def _defined(symbol: Callable[[Any, Any], Any], instruction: str) -> None:
    combine = _lane_by_lane(instruction)

    @overload(symbol)
    def chosen(a, b):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202 - numba compares both signatures
        return (lambda a, b: combine(a, b)) if isinstance(a, Lanes) else None


_defined(operator.add, "fadd")
_defined(operator.sub, "fsub")
_defined(operator.mul, "fmul")
_defined(operator.truediv, "fdiv")


@intrinsic
def times(typing: Any, a: Any, weights: Any, place: Any) -> Any:
    """a times one of the weights, or a where these are None."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if weights == types.none:
            return args[0]
        one = builder.load(
            builder.gep(context.make_array(weights)(context, builder, args[1]).data, [args[2]])
        )
        one = context.cast(builder, one, weights.dtype, a.dtype)
        return builder.fmul(args[0], _alike(builder, one, a.count))

    return a(a, weights, place), code


@intrinsic
def times_beside(typing: Any, a: Any, weights: Any, place: Any) -> Any:
    """a times as many of the weights, lane by lane, from a place on, or a where these are None."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if weights == types.none:
            return args[0]
        some = builder.load(_beside(context, builder, weights, args[1], args[2], a.count))
        some.align = weights.dtype.bitwidth // 8
        if weights.dtype != a.dtype:
            narrower = weights.dtype.bitwidth > a.dtype.bitwidth
            some = (builder.fptrunc if narrower else builder.fpext)(some, context.get_value_type(a))
        return builder.fmul(args[0], some)

    return a(a, weights, place), code


def _prefetched(builder: Any, place: Any) -> None:
    """Ask for the line of the cache with a byte."""
    number = ir.IntType(32)
    kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
    to_read, into_all_caches, of_data = number(0), number(3), number(1)
    called = get_or_insert_function(builder.module, kind, "llvm.prefetch")
    builder.call(called, [place, to_read, into_all_caches, of_data])


@intrinsic
def ahead(typing: Any, x: Any, place: Any) -> Any:
    """Ask for the line of x where a number stands that is read soon."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        data = context.make_array(x)(context, builder, args[0]).data
        _prefetched(builder, builder.bitcast(builder.gep(data, [args[1]]), ir.IntType(8).as_pointer()))
        return context.get_dummy_value()

    return types.none(x, place), code


@intrinsic
def soon(typing: Any, x: Any, nodes: Any, edge: Any, lanes: Any) -> Any:
    """Ask for the row of x [N, W] to which an edge leads, where it is more than a line of the cache.

    For shorter rows this gains nothing.
    """
    size = x.dtype.bitwidth // 8 * lanes.count

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        if size <= LINE:
            return context.get_dummy_value()
        data, numbers = (
            context.make_array(kind)(context, builder, array).data
            for kind, array in zip((x, nodes), args, strict=False)
        )
        row = builder.zext(builder.load(builder.gep(numbers, [args[2]])), ir.IntType(64))
        apart = builder.extract_value(context.make_array(x)(context, builder, args[0]).strides, 0)
        first = builder.gep(builder.bitcast(data, ir.IntType(8).as_pointer()), [builder.mul(row, apart)])
        for line in range(0, size, LINE):
            _prefetched(builder, builder.gep(first, [ir.Constant(row.type, line)]))
        return context.get_dummy_value()

    return types.none(x, nodes, edge, lanes), code


def columns(channels: int) -> Iterator[tuple[int, Any]]:
    """Where so many columns are parted, and as many zeros as there are from there on to the next."""
    first = 0
    while first < channels:
        width = next(width for width in WIDTHS if width <= channels - first)
        yield first, (0,) * width
        first += width
