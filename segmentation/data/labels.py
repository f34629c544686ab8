"""Files of images and labels, read strictly.

Label files hold class indices, as palette (P) or grey (L) PNGs; they are read as they are, since a conversion
through RGB turns indices into other indices without a word.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from segmentation.errors import UsageError
from segmentation.files import whole, write_text

Label = NDArray[np.uint8]


def voc_palette() -> NDArray[np.uint8]:
    """Pascal VOC's colours of the label values 0 to 255, [256, 3].

    The bits of a value, three at a time, are the highest, next highest, ... bits of red, green and blue.
    """
    numbers = np.arange(256)[:, None]
    colours = np.zeros((256, 3), dtype=np.uint8)
    for position in range(8):
        bits = (numbers >> (3 * position + np.arange(3))) & 1
        colours |= (bits << (7 - position)).astype(np.uint8)
    return colours


def save_label(path: Path, label: Label) -> None:
    """Write class indices [H, W] as a PNG with VOC's palette, whole or not at all."""
    file = Image.fromarray(label, mode="P")
    file.putpalette(voc_palette().tobytes())
    with whole(path) as stream:
        file.save(stream, format="PNG")


def write_list(path: Path, identifiers: list[str]) -> None:
    """Write a split's list, one ID a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, "".join(f"{identifier}\n" for identifier in identifiers))


def read_mat(path: Path, *fields: str) -> NDArray[np.integer[Any]]:
    """The array below a chain of fields in a MATLAB file.

    Raises:
        UsageError: the file is missing or damaged, or has no such field.
    """
    import zlib

    from scipy.io import loadmat
    from scipy.io.matlab import MatReadError

    if not path.is_file():
        raise UsageError(f"{path} is missing: take it from the archive it belongs to")
    try:
        value: Any = loadmat(path)
        for field in fields:
            value = value[field]
            if value.dtype == object:
                value = value.item()
    except (
        OSError,
        ValueError,
        TypeError,
        LookupError,
        NotImplementedError,
        zlib.error,
        MatReadError,
    ) as fault:
        raise UsageError(
            f"{path} cannot be read as a .mat file with {'.'.join(fields)} "
            f"({type(fault).__name__}: {' '.join(str(fault).split())}): replace the file"
        ) from None
    array: NDArray[np.integer[Any]] = value
    return array


@contextmanager
def opened(path: Path) -> Iterator[Image.Image]:
    """An image file; damage found when it is opened or, within the context, decoded is a `UsageError`."""
    try:
        with Image.open(path) as file:
            yield file
    except (OSError, SyntaxError) as fault:
        raise UsageError(f"{path} cannot be read as an image ({fault}): replace the file") from None
