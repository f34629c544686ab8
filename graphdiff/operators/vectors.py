"""Code on vectors of numbers, in the language of LLVM, the compiler behind numba, which knows no vectors.

A row is some vectors beside each other; what is summed stays in the processor's registers until it is stored.
This file is read where numba is installed.
"""

import functools
import math
from typing import Any

import numpy as np
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core.cgutils import alloca_once, for_range, get_or_insert_function

# Exponents below which an entry counts as 0, well above those that underflow.
FLOOR = {32: -70.0, 64: -680.0}
# Terms of the exponential's series: on |r| ≤ (log 2)/2 the next is below half a unit in the last place.
TERMS = {32: 7, 64: 13}
# log 2 in two parts, the first with few enough digits that its multiples up to 1024 are exact.
LOG_2 = {32: (0.693145751953125, 1.4286068203094172e-06), 64: (0.6931471803691238, 1.9082149292705877e-10)}


@functools.cache
def registers() -> tuple[int, int, int]:
    """Bytes of the processor's vectors, and two numbers of rows of two vectors that its registers hold.

    The first leaves little room for others, the second more.
    """
    features = get_host_cpu_features()
    if features.get("avx512f"):
        return 64, 12, 8
    if features.get("avx2"):
        return 32, 6, 4
    return (16, 12, 8) if features.get("neon") else (16, 6, 4)


class Writer:
    """Writes code on vectors of so many lanes, so many of which are a row, into a function of numba's."""

    def __init__(self, context: Any, builder: Any, dtype: Any, lanes: int, vectors: int) -> None:
        self.context, self.builder, self.bits = context, builder, dtype.bitwidth
        self.lanes, self.count, self.row = lanes, vectors, vectors * lanes
        self.kind = ir.VectorType(context.get_value_type(dtype), lanes)

    def data(self, kind: Any, array: Any) -> Any:
        """Where the numbers of an array stand."""
        return self.context.make_array(kind)(self.context, self.builder, array).data

    def at(self, pointer: Any, *offsets: Any) -> Any:
        """The pointer, so many numbers further."""
        for offset in offsets:
            number = ir.Constant(ir.IntType(64), offset) if isinstance(offset, int) else offset
            pointer = self.builder.gep(pointer, [number])
        return pointer

    def times(self, number: Any, count: int) -> Any:
        """number · count."""
        return self.builder.mul(number, ir.Constant(ir.IntType(64), count))

    def load(self, pointer: Any, *offsets: Any) -> Any:
        """A vector."""
        found = self.builder.load(self._vector_at(pointer, offsets))
        found.align = self.bits // 8
        return found

    def store(self, value: Any, pointer: Any, *offsets: Any) -> None:
        """Write a vector."""
        self.builder.store(value, self._vector_at(pointer, offsets), align=self.bits // 8)

    def _vector_at(self, pointer: Any, offsets: Any) -> Any:
        return self.builder.bitcast(self.at(pointer, *offsets), self.kind.as_pointer())

    def vectors(self, pointer: Any, *offsets: Any) -> list[Any]:
        """A row."""
        return [self.load(pointer, *offsets, v * self.lanes) for v in range(self.count)]

    def store_row(self, row: Any, pointer: Any, *offsets: Any) -> None:
        """Write a row."""
        for v, value in enumerate(row):
            self.store(value, pointer, *offsets, v * self.lanes)

    def spread(self, pointer: Any, *offsets: Any) -> Any:
        """One number in all lanes."""
        number, undefined = (
            self.builder.load(self.at(pointer, *offsets)),
            ir.Constant(self.kind, ir.Undefined),
        )
        one = self.builder.insert_element(undefined, number, ir.Constant(ir.IntType(32), 0))
        places = ir.Constant(ir.VectorType(ir.IntType(32), self.lanes), [0] * self.lanes)
        return self.builder.shuffle_vector(one, undefined, places)

    def constant(self, number: float) -> Any:
        """The number in all lanes, as near as the dtype has it."""
        exact = float(np.float32(number)) if self.bits == 32 else number
        return ir.Constant(self.kind, [exact] * self.lanes)

    def multiplied_added(self, a: Any, b: Any, c: Any) -> Any:
        """a·b + c, rounded once where the processor can."""
        kind = ir.FunctionType(self.kind, [self.kind] * 3)
        name = f"llvm.fmuladd.v{self.lanes}f{self.bits}"
        return self.builder.call(get_or_insert_function(self.builder.module, kind, name), [a, b, c])

    def larger(self, a: Any, b: Any) -> Any:
        """The larger one; b where a is no number."""
        return self.builder.select(self.builder.fcmp_ordered(">", a, b), a, b)

    def exponential(self, x: Any) -> Any:
        """exp(x) to two units in the last place, for x ≤ 0 but for its rounding; 0 below FLOOR.

        With x = n·log 2 + r it is the series of exp(r) times 2ⁿ. To a number so large that it has only whole
        ones beside it, x/log 2 adds n; its last bits are then n and the exponents' offset, which are 2ⁿ.
        """
        builder, mantissa = self.builder, {32: 23, 64: 52}[self.bits]
        offset = 2 ** (self.bits - mantissa - 2) - 1
        magic = self.constant(1.5 * 2.0**mantissa + offset)
        marked = self.multiplied_added(x, self.constant(1 / math.log(2)), magic)
        n = builder.fsub(marked, magic)
        high, low = LOG_2[self.bits]
        r = self.multiplied_added(n, self.constant(-high), x)
        r = self.multiplied_added(n, self.constant(-low), r)
        terms = [self.constant(1 / math.factorial(k)) for k in range(TERMS[self.bits])]
        series = terms.pop()
        while terms:
            series = self.multiplied_added(series, r, terms.pop())
        whole = ir.VectorType(ir.IntType(self.bits), self.lanes)
        shift = ir.Constant(whole, [mantissa] * self.lanes)
        power = builder.bitcast(builder.shl(builder.bitcast(marked, whole), shift), self.kind)
        # A product, and not a sum of exponents, for what is no number stays none.
        found = builder.fmul(series, power)
        below = builder.fcmp_ordered("<", x, self.constant(FLOOR[self.bits]))
        return builder.select(below, self.constant(0.0), found)

    def sums(self, count: int) -> list[list[Any]]:
        """Rows of sums from 0, in registers."""
        rows = [[alloca_once(self.builder, self.kind) for _ in range(self.count)] for _ in range(count)]
        for place in (place for row in rows for place in row):
            self.builder.store(self.constant(0.0), place)
        return rows

    def add(self, rows: list[list[Any]], numbers: Any, apart: Any, vectors: list[Any]) -> None:
        """To every row of sums its number, which stand so far apart, times the vectors."""
        for k, row in enumerate(rows):
            number = self.spread(numbers, k * apart if isinstance(apart, int) else self.times(apart, k))
            for place, vector in zip(row, vectors, strict=True):
                total = self.multiplied_added(number, vector, self.builder.load(place))
                self.builder.store(total, place)

    def loop(self, count: Any) -> Any:
        """`with loop(count) as turn:` for turn.index in range(count)."""
        count = ir.Constant(ir.IntType(64), count) if isinstance(count, int) else count
        return for_range(self.builder, count, intp=ir.IntType(64))

    def nothing(self) -> Any:
        """What a function returns that returns nothing."""
        return self.context.get_dummy_value()
