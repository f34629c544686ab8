"""Memory for vectors that are not short, from pieces that nobody uses any more.

The system hands out memory page by page when it is first touched, and takes back what is freed. For the
vectors of a solve that takes as long as several passes over them, on virtual machines longer than the solve.
So pieces that were let go are kept for the next that asks, `MOST` of them and up to `KEPT` bytes in all.
"""

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Bytes of a page, and of a huge one. Numpy asks the system for such, which are cheaper to touch, where a
# piece has some.
PAGE, HUGE = 2**12, 2**21
# Bytes from which allocators get memory from the system, and may give it back as soon as it is freed.
LENT = 2**17
# How many pieces are kept at most, and bytes, and how many times as large as asked for a piece may be.
MOST, KEPT, LARGER = 64, 2**28, 1.5

# By their addresses, those kept longest first. Threads share it: each call on it is one step for Python.
_kept: dict[int, Any] = {}


class _Lent:
    """A piece of bytes at an address, which is kept when the last array on it is gone.

    It is an array of a shape and a kind of numbers, as numpy names them.
    """

    def __init__(self, address: int, piece: Any, shape: tuple[int, ...], kind: str) -> None:
        self.address, self.piece = address, piece
        # To ask numpy for that of the piece takes longer than the search for it.
        self.__array_interface__ = {
            "version": 3,
            "data": (address, False),
            "shape": shape,
            "typestr": kind,
        }

    def __del__(self, finalizing: Any = sys.is_finalizing) -> None:
        # When Python ends, what this needs may be gone.
        if not finalizing():
            _keep(self.address, self.piece)


def _keep(address: int, piece: Any) -> None:
    if len(piece) > KEPT:
        return
    _kept[address] = piece
    if len(_kept) <= MOST and sum(map(len, list(_kept.values()))) <= KEPT:
        return
    pieces = list(_kept.items())
    count, total = len(pieces), sum([len(each) for _, each in pieces])
    for place, each in pieces:
        if count <= MOST and total <= KEPT:
            return
        _kept.pop(place, None)
        count, total = count - 1, total - len(each)


def lent(length: int) -> Any:
    """So many bytes, of any value, an array [length]; from `LENT` on it begins where a page does."""
    return np.empty(length, np.uint8) if length < LENT else _lent(length, (length,), "|u1")


def _lent(length: int, shape: tuple[int, ...], kind: str) -> Any:
    """So many bytes, at least `LENT`, as an array of a shape and a kind."""
    # A huge one where there are some.
    page = HUGE if length >= 2 * HUGE else PAGE
    whole = -(-length // page) * page
    most = LARGER * whole
    # The smallest that is large enough, and of those the one let go last: more of it is in the cache.
    address, smallest = 0, most + 1
    for place, kept in reversed(list(_kept.items())):
        if whole <= len(kept) < smallest:
            address, smallest = place, len(kept)
            if smallest == whole:
                break
    # Another thread may have taken it.
    piece = _kept.pop(address, None)
    if piece is None:
        more = np.empty(whole + page, np.uint8)
        begin = more.ctypes.data
        address = -(-begin // page) * page
        piece = more[address - begin :][:whole]
    return np.asarray(_Lent(address, piece, shape, kind))


@functools.cache
def _kind(dtype: torch.dtype) -> str:
    """numpy's name of a dtype."""
    return np.dtype(str(dtype).removeprefix("torch.")).str


def empty(shape: Sequence[int], like: Tensor) -> Tensor:
    """Numbers like those of a tensor, of any value."""
    length = math.prod(shape) * like.itemsize
    if length < LENT or like.device.type != "cpu":
        return like.new_empty(shape)
    return torch.from_numpy(_lent(length, tuple(shape), _kind(like.dtype)))
