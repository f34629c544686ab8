"""A compiled function on several threads at once: torch's own, where they can be had.

After its work torch's team of threads stays awake for some milliseconds, to be ready for more. Threads of
ours would share processors with it, and take half as long again for what takes a few milliseconds. So the
function runs on that team, by the call that compilers make of `#pragma omp parallel` in GNU's OpenMP, which
torch brings along on Linux; elsewhere on threads of Python's. Every thread calls it with the same arguments,
and by `taken` they share out the work.

This file is read where numba is installed.
"""

import ctypes
import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core.cgutils import (
    alloca_once,
    alloca_once_value,
    gep_inbounds,
    if_unlikely,
    int32_t,
    intp_t,
    voidptr_t,
)
from numba.extending import intrinsic

# Pairs of nodes below which threads cost more than they save.
FEW = 2**16


def worthwhile(pairs: int) -> int:
    """How many threads are worth it for so many pairs of nodes: torch's number, or one."""
    return torch.get_num_threads() if pairs >= FEW else 1


@functools.cache
def team() -> int:
    """The address of `GOMP_parallel(function, data, threads, flags)` in torch's library; else 0."""
    path = Path(torch.__file__).parent / "lib" / "libgomp.so.1"
    if not path.exists():
        return 0
    return ctypes.cast(ctypes.CDLL(str(path)).GOMP_parallel, ctypes.c_void_p).value or 0


@functools.cache
def pythons(threads: int) -> ThreadPoolExecutor:
    """Python's threads, where torch's cannot be had."""
    return ThreadPoolExecutor(threads, thread_name_prefix="graphdiff")


def shared(kernel: Any, by_team: Any, threads: int, *arguments: Any) -> None:
    """kernel(*arguments, counter), by so many threads, each for what it takes from the counter.

    `by_team` is the compiled function that hands the kernel and a tuple of arguments to `in_team`.
    """
    counter = np.zeros(1, np.int64)
    if threads == 1:
        kernel(*arguments, counter)
    elif team():
        if not by_team(team(), threads, (*arguments, counter)):
            raise MemoryError(f"no memory for a thread's part of {kernel.__name__}")
    else:
        part = functools.partial(kernel, *arguments, counter)
        for done in [pythons(threads).submit(part) for _ in range(threads)]:
            done.result()


@intrinsic
def taken(typing: Any, counter: Any) -> Any:
    """What the counter stood at, which is one more now: a number for each that asks."""

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = context.make_array(counter)(context, builder, args[0]).data
        return builder.atomic_rmw("add", place, ir.Constant(intp_t, 1), "monotonic")

    return types.int64(counter), code


@intrinsic
def in_team(typing: Any, address: Any, threads: Any, kernel: Any, arguments: Any) -> Any:
    """kernel(*arguments) on every thread of a team; whether all returned."""
    called = kernel.get_call_type(typing, arguments.types, {})

    def code(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        compiled = kernel.dispatcher.overloads[called.args]
        context.active_code_library.add_linking_library(compiled.library)
        failed = alloca_once_value(builder, ir.Constant(int32_t, 0))
        data = alloca_once(builder, ir.LiteralStructType([failed.type, args[3].type]))
        for n, value in enumerate((failed, args[3])):
            builder.store(value, gep_inbounds(builder, data, 0, n))
        # What each thread does, with a pointer to all that it needs.
        name = f"{compiled.fndesc.mangled_name}.on_a_thread"
        each = ir.Function(builder.module, ir.FunctionType(ir.VoidType(), [voidptr_t]), name)
        each.linkage = "internal"
        inside = ir.IRBuilder(each.append_basic_block())
        found = inside.load(inside.bitcast(each.args[0], data.type))
        values = [inside.extract_value(found, [1, n]) for n in range(len(called.args))]
        status, _ = context.call_internal_no_propagate(inside, compiled.fndesc, called, values)
        with if_unlikely(inside, status.is_error):
            inside.store(ir.Constant(int32_t, 1), inside.extract_value(found, 0))
        inside.ret_void()
        kind = ir.FunctionType(ir.VoidType(), [each.type, voidptr_t, int32_t, int32_t])
        fork = builder.inttoptr(args[0], kind.as_pointer())
        count = builder.trunc(args[1], int32_t)
        builder.call(fork, [each, builder.bitcast(data, voidptr_t), count, ir.Constant(int32_t, 0)])
        return builder.icmp_signed("==", builder.load(failed), ir.Constant(int32_t, 0))

    return types.boolean(types.int64, types.int64, kernel, arguments), code
