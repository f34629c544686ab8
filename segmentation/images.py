"""Images in, label maps out: what is read is whole or refused, what is written is whole or not there."""

import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as transforms

from segmentation.data.labels import opened, save_label, voc_palette
from segmentation.data.voc import VOC_CLASSES
from segmentation.errors import UsageError
from segmentation.files import whole

SUBMISSION = "results/VOC2012/Segmentation/comp6_test_cls"
"""Folder in the archive that VOC's evaluation server takes (comp6: models trained on any data)."""


def to_tensor(image: Image.Image) -> tv_tensors.Image:
    """An image of 8 bits a channel, grey, palette or colour, as uint8 [3, H, W] in RGB."""
    if image.mode.startswith(("I", "F")):
        # Pillow's conversion would cut all values off at 255 without a word.
        raise UsageError(
            f"{getattr(image, 'filename', 'the image')} is of mode {image.mode}, more than 8 bits a channel: "
            "scale it to 0..255 and save it as RGB"
        )
    return tv_tensors.Image(transforms.pil_to_tensor(image.convert("RGB")))


def read_image(file: Path, max_size: int) -> tv_tensors.Image:
    """An image of at most `max_size` pixels a side, uint8 [3, H, W] in RGB, as it is stored.

    Raises:
        UsageError: it is too large, which its header tells, or cannot be read.
    """
    try:
        with _without_limit(), opened(file) as image:
            if max(image.size) > max_size:
                raise UsageError(
                    f"{file} is {image.size[0]}x{image.size[1]} pixels, above --max-size {max_size}: shrink "
                    f"it, or pass --max-size {max(image.size)}"
                )
            return to_tensor(image)
    except UsageError:
        raise
    except Exception as fault:
        # Decoders of damaged files raise what they please.
        raise UsageError(f"{file} cannot be read as an image ({fault!r}): replace the file") from None


def write_result(
    out: Path, name: str, image: tv_tensors.Image, logits: Tensor, overlay: bool, probabilities: bool
) -> tuple[int, int]:
    """Write what was found in an image.

    Args:
        out: folder, with its folders overlays and probabilities where those are asked for.
        name: of the image.
        image: uint8 [3, H, W].
        logits: [K, H, W].
        overlay: write overlays/NAME.png, half image and half colours of its classes.
        probabilities: write probabilities/NAME.npy, float16 [K, H, W].

    Returns:
        W and H.
    """
    label = logits.argmax(0).cpu().numpy().astype(np.uint8)
    if overlay:
        mixed: NDArray[np.uint8] = image.permute(1, 2, 0).numpy() // 2 + voc_palette()[label] // 2
        with whole(out / "overlays" / f"{name}.png") as file:
            Image.fromarray(mixed).save(file, format="PNG")
    if probabilities:
        shares = logits.softmax(0).half().cpu().numpy()
        with whole(out / "probabilities" / f"{name}.npy") as file:
            np.save(file, shares)
    # Last: where the label is, all of the image's results are.
    save_label(out / f"{name}.png", label)
    return label.shape[1], label.shape[0]


def write_submission(archive: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Collect label PNGs that lie beside it into the archive of VOC's evaluation server, and check it.

    Args:
        archive: .tar.gz to write.
        sizes: width and height in pixels of the images, by ID.

    Raises:
        UsageError: a file in it is not what the server takes.
    """
    with whole(archive) as file:
        with tarfile.open(fileobj=file, mode="w:gz") as tar:
            for identifier in sizes:
                tar.add(archive.parent / f"{identifier}.png", f"{SUBMISSION}/{identifier}.png")
        check_submission(Path(str(file.name)), sizes)


def check_submission(archive: Path, sizes: dict[str, tuple[int, int]]) -> None:
    """Read the archive back: names, sizes, modes and values.

    Raises:
        UsageError: names the file that is not what the server takes.
    """
    with tarfile.open(archive) as tar:
        held, wanted = sorted(tar.getnames()), sorted(f"{SUBMISSION}/{name}.png" for name in sizes)
        if held != wanted:
            odd = next(iter(sorted(set(held) ^ set(wanted))), held[0])
            raise UsageError(f"{archive}: {odd} is missing, double or not asked for: write it anew")
        for identifier, size in sizes.items():
            member = tar.extractfile(f"{SUBMISSION}/{identifier}.png")
            assert member is not None  # it is among the names
            with Image.open(member) as label:
                highest = int(np.array(label).max())
                if label.mode != "P" or label.size != size or highest >= len(VOC_CLASSES):
                    raise UsageError(
                        f"{identifier}.png is of mode {label.mode}, {label.size[0]}x{label.size[1]} pixels, "
                        f"values up to {highest}; the server wants mode P, {size[0]}x{size[1]} pixels and "
                        f"values up to {len(VOC_CLASSES) - 1}: predict it anew"
                    )


@contextmanager
def _without_limit() -> Iterator[None]:
    """Pillow's limit on the number of pixels lifted: here --max-size is the limit."""
    before, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before
