"""Faults of the user, told in one line that names the fix."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UsageError(ValueError):
    """What was asked for cannot be done: an argument, a file or a folder is at fault, not the program.

    The programs print it as one line and end with exit code 2; every other exception is a bug and keeps its
    traceback.
    """


@contextmanager
def told_in_one_line() -> Iterator[None]:
    """End the program with exit code 2 and one line `error: ...` on stderr if a `UsageError` comes.

    Of several processes each tells its own, for any may be the only one at fault.
    """
    try:
        yield
    except UsageError as fault:
        # A loader's worker process hands its fault on below a traceback of its own.
        who = f"process {os.environ['RANK']}: " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
        print(f"error: {who}{str(fault).rsplit('UsageError: ', 1)[-1].strip()}", file=sys.stderr)
        raise SystemExit(2) from None


def first_of(names: Sequence[str], most: int = 4) -> str:
    """The first of some names as messages tell them: ``cat, dog, ...``, with dots where others follow."""
    return ", ".join((*names[:most], "...") if len(names) > most else names)
