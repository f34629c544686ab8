"""Files that are whole or not there: written under another name, forced to the disk, moved into place."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

from segmentation.errors import UsageError


class WriteFault(UsageError):
    """A file could not be written; what stood in its place before is as it was."""


@contextmanager
def whole(path: Path) -> Iterator[FileIO]:
    """A file to write to, which takes its name only when the context ends well.

    Raises:
        WriteFault: the disk is full, or refuses for another reason.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        with _Remembering(partial, "wb") as file:
            try:
                yield file
                os.fsync(file.fileno())
            except RuntimeError as fault:
                # torch.save makes an error of its own of what the file raised.
                raise file.fault or fault from None
        os.replace(partial, path)
    except BaseException as fault:
        partial.unlink(missing_ok=True)
        if isinstance(fault, OSError):
            raise WriteFault(_told(path, fault)) from None
        raise


@contextmanager
def told(path: Path) -> Iterator[None]:
    """Within it, a fault of the system in writing a file is a `WriteFault`."""
    try:
        yield
    except OSError as fault:
        raise WriteFault(_told(path, fault)) from None


def write_text(path: Path, text: str) -> None:
    """Write a text, whole."""
    with whole(path) as file:
        file.write(text.encode())


def _told(path: Path, fault: OSError) -> str:
    return f"{path} could not be written ({fault.strerror}): free space there, or name another folder"


class _Remembering(FileIO):
    """A file that keeps the fault it raised, and writes all it is given."""

    fault: OSError | None = None

    def write(self, data: Any) -> int:
        """Write all of the data."""
        view = memoryview(data).cast("B")
        try:
            done = 0
            while done < len(view):
                done += super().write(view[done:]) or 0
        except OSError as fault:
            self.fault = fault
            raise
        return len(view)
