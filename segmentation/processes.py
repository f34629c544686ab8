"""The processes of a run: those that torchrun started, or this one alone."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, distributed


def asked_for() -> tuple[int, int]:
    """How many processes torchrun started on each machine, and on how many machines; (1, 1) without it."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return here, int(os.environ.get("WORLD_SIZE", "1")) // here


def count() -> int:
    """Processes of the run."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def rank() -> int:
    """This one's number; 0 writes files and tells."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def total(value: Tensor) -> Tensor:
    """The sum of the processes' values."""
    if count() > 1:
        value = value.clone()
        distributed.all_reduce(value)
    return value


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether it holds in any process: what all must decide alike."""
    return bool(total(torch.tensor(int(flag), device=device))) if count() > 1 else flag


def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Give every process the first one's values, in place."""
    if count() > 1:
        for tensor in tensors:
            distributed.broadcast(tensor, 0)


class Lost(RuntimeError):
    """Another process of the run is gone."""


@contextmanager
def loss_told() -> Iterator[None]:
    """Within it, the loss of another process is `Lost`, and other faults are as ever."""
    try:
        yield
    except RuntimeError as fault:
        # gloo raises bare RuntimeErrors that only their text tells from others.
        if isinstance(fault, distributed.DistError) or (count() > 1 and "gloo" in str(fault)):
            raise Lost(
                "another process of the run has ended or cannot be reached (its own message says why)"
            ) from fault
        raise
