"""Memory used again: never by two at a time, and not without end."""

import gc
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from graphdiff import memory
from graphdiff.memory import HUGE, KEPT, LENT, MOST, PAGE, empty, lent

LARGE = torch.Size([3, HUGE // 4])  # 12 MB in float64
SMALL = torch.Size([LENT // 8, 2])  # 256 kB


@pytest.fixture(autouse=True)
def nothing_kept():
    gc.collect()
    memory._kept.clear()
    yield
    memory._kept.clear()


def like(dtype=torch.float64, device="cpu"):
    return torch.empty(0, dtype=dtype, device=device)


@pytest.mark.parametrize(("shape", "page"), [(LARGE, HUGE), (SMALL, PAGE)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_was_let_go_is_used_again(dtype, shape, page):
    first = empty(shape, like(dtype))
    assert first.shape == shape
    assert first.dtype == dtype
    assert first.is_contiguous()
    place = first.data_ptr()
    assert place % page == 0
    del first
    second, third = empty(shape, like(dtype)), empty(shape, like(dtype))
    assert second.data_ptr() == place
    assert third.data_ptr() != place


def test_as_long_as_a_view_is_there_the_memory_is_its_own():
    whole = empty(LARGE, like())
    view = whole[1:, ::2].mT.numpy()
    view[:] = 7
    place = whole.data_ptr()
    del whole
    others = [empty(LARGE, like()) for _ in range(3)]
    assert place not in [other.data_ptr() for other in others]
    for other in others:
        other.fill_(0)
    assert (view == 7).all()


def test_short_vectors_and_other_devices_are_torchs():
    assert empty([3, 4], like()).shape == (3, 4)
    assert len(lent(LENT - 1)) == LENT - 1
    assert empty(LARGE, like(device="meta")).device.type == "meta"
    assert not memory._kept


def test_a_much_larger_piece_is_left_for_who_needs_it():
    large = lent(20 * HUGE)
    place = large.ctypes.data
    del large
    small = lent(4 * HUGE)
    assert small.ctypes.data != place
    assert lent(20 * HUGE).ctypes.data == place


def test_what_was_let_go_last_is_lent_first():
    pieces = [lent(LENT) for _ in range(3)]
    places = [piece.ctypes.data for piece in pieces]
    while pieces:
        pieces.pop()
    again = [lent(LENT) for _ in range(3)]
    assert [piece.ctypes.data for piece in again] == places


def test_no_more_is_kept_than_promised_and_the_oldest_goes_first():
    pieces = [lent(KEPT // 4) for _ in range(6)]
    places = [piece.ctypes.data for piece in pieces]
    while pieces:
        pieces.pop(0)
    assert list(memory._kept) == places[-len(memory._kept) :]
    assert KEPT // 2 < sum(piece.nbytes for piece in memory._kept.values()) <= KEPT


def test_no_more_pieces_are_kept_than_a_search_takes_no_time_for():
    pieces = [lent(LENT) for _ in range(MOST + 2)]
    places = [piece.ctypes.data for piece in pieces]
    while pieces:
        pieces.pop(0)
    assert list(memory._kept) == places[2:]


def test_what_is_larger_than_all_that_is_kept_drives_nothing_out():
    small, large = lent(2 * HUGE), lent(KEPT + 1)
    place = small.ctypes.data
    del small, large
    assert list(memory._kept) == [place]


def test_threads_share_nothing():
    failures = []

    def work(number):
        for _ in range(200):
            mine = lent(2 * HUGE)
            mine[:: HUGE // 8] = number
            if not (mine[:: HUGE // 8] == number).all():
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert all(isinstance(piece, np.ndarray) for piece in memory._kept.values())


def test_an_ending_python_says_nothing():
    script = "import sys, torch; from graphdiff.memory import empty, lent; kept = [lent(2**23)]"
    script += "; kept += [kept, empty([2**20, 2], torch.zeros(1))]; sys.last_to_go = lent(2**23)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
