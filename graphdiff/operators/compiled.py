"""numba's `njit`, with code on disk that is made anew when any file changes from which code is compiled.

Numba itself looks at the file of a function alone, and would go on with what it once compiled into it from
the functions of other files. This file is read where numba is installed.
"""

import functools
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numba import njit

# Where such files are.
FOLDERS = "operators", "solvers"


def compiled(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """A decorator: compiled when first called, kept on disk, and no other thread waits while it runs."""
    if function is None:
        return functools.partial(compiled, **options)
    dispatcher = njit(cache=True, nogil=True, **options)(function)
    dispatcher._cache._cache_file._source_stamp = sources()
    return dispatcher


@functools.cache
def sources() -> str:
    """A hash of all files that import from numba."""
    package, found = Path(__file__).parents[1], hashlib.sha256()
    for path in sorted(path for folder in FOLDERS for path in (package / folder).glob("*.py")):
        text = path.read_bytes()
        if b"\nfrom numba" in text:
            found.update(path.name.encode() + b"\0" + text)
    return found.hexdigest()
