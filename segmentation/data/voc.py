"""Any folder in VOC's layout: JPEGImages/ID.jpg, SegmentationClass/ID.png, ImageSets/Segmentation/SPLIT.txt.

Label files hold class indices, as palette (P) or grey (L) PNGs, 255 = void; they are read as they are, since
a conversion through RGB turns indices into other indices without a word.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from segmentation.data import VOID
from segmentation.errors import UsageError

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip

LABELS_READ_UP_FRONT = 500
"""So many labels, spread evenly over the split, are read in full before work starts."""


class VOCDataset:
    """One split of a VOC-layout folder.

    Building it checks what can be checked without decoding every image: the folders, the list, that every
    listed image has a label of its own size, and the values of up to `LABELS_READ_UP_FRONT` labels. The
    values of every label are checked again when it is loaded.

    Args:
        data_path: the folder that holds JPEGImages, its parent or its grandparent (VOCdevkit).
        split: name of a list in ImageSets/Segmentation (or, where that folder is missing, in ImageSets).

    Raises:
        UsageError: one line naming the file at fault and the fix.
    """

    eval_size = 505

    def __init__(self, data_path: str | Path, split: str) -> None:
        self.root = find_root(Path(data_path))
        self.classes = read_classes(self.root)
        images = _by_stem(self.root / "JPEGImages", {".jpg", ".jpeg", ".png"})
        labels = _by_stem(self.root / "SegmentationClass", {".png"})
        list_file = find_list(self.root, split)
        self.ids = [line.strip() for line in list_file.read_text().splitlines() if line.strip()]
        if not self.ids:
            raise UsageError(f"{list_file} is empty: list one image ID per line")
        for identifier in self.ids:
            if identifier not in images:
                raise UsageError(
                    f"{list_file} lists {identifier!r}, but {self.root / 'JPEGImages'} holds no such image: "
                    "add it, or take the ID off the list (an ID has no folder and no suffix)"
                )
            if identifier not in labels:
                raise UsageError(
                    f"image {identifier!r} has no label: "
                    f"add {self.root / 'SegmentationClass' / identifier}.png, or take the ID off {list_file}"
                )
        self._images = [images[identifier] for identifier in self.ids]
        self._labels = [labels[identifier] for identifier in self.ids]
        for image, label in zip(self._images, self._labels, strict=True):
            _check_sizes(image, label)
        for index in np.linspace(0, len(self) - 1, min(len(self), LABELS_READ_UP_FRONT)).astype(int):
            self._label(int(index))

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, index: int) -> str:
        """The image's ID."""
        return self.ids[index]

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Image uint8 [3, H, W] in RGB and label int64 [H, W]."""
        with _opened(self._images[index]) as file:
            image = F.pil_to_tensor(file.convert("RGB"))
        return tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(self._label(index)))

    def _label(self, index: int) -> np.ndarray[tuple[int, int], np.dtype[np.int64]]:
        path = self._labels[index]
        with _opened(path) as file:
            label = np.array(file)
        present = np.flatnonzero(np.bincount(label.ravel(), minlength=VOID + 1))
        foreign = [int(value) for value in present if len(self.classes) <= value != VOID]
        if foreign:
            raise UsageError(
                f"{path} holds the label values {_shortened(foreign)}, but there are {len(self.classes)} "
                f"classes: values must lie in 0..{len(self.classes) - 1}, or be 255 for void; "
                f"name all classes in {self.root / 'classes.txt'} (one per line, in index order) or mend "
                "the labels"
            )
        return label.astype(np.int64)


def find_root(data_path: Path) -> Path:
    """The folder holding JPEGImages: `data_path` itself, or the only one up to two levels below it."""
    if not data_path.is_dir():
        raise UsageError(f"--data-path {data_path}: no such folder; name the one that holds JPEGImages")
    for candidates in ([data_path], data_path.glob("*"), data_path.glob("*/*")):
        found = sorted(folder for folder in candidates if (folder / "JPEGImages").is_dir())
        if len(found) > 1:
            raise UsageError(
                f"--data-path {data_path} holds several data sets ({', '.join(str(f) for f in found)}): "
                "name one"
            )
        if found:
            if not (found[0] / "SegmentationClass").is_dir():
                raise UsageError(
                    f"{found[0]} has JPEGImages but no SegmentationClass folder: "
                    "put the label PNGs (class indices, 255 = void) there"
                )
            return found[0]
    raise UsageError(
        f"--data-path {data_path} holds no JPEGImages folder, nor does a folder one or two levels below: "
        "name the folder that does, its parent or its grandparent"
    )


def find_list(root: Path, split: str) -> Path:
    """The list file of a split; where there is none, the error names the lists that exist."""
    folder = root / "ImageSets" / "Segmentation"
    if not folder.is_dir():
        folder = root / "ImageSets"
    lists = sorted(file.stem for file in folder.glob("*.txt"))
    if not lists:
        raise UsageError(f"{folder} holds no lists: write one image ID per line into {folder / split}.txt")
    if split not in lists:
        raise UsageError(f"there is no list {split!r} in {folder}: pass one of {', '.join(lists)}")
    return folder / f"{split}.txt"


def read_classes(root: Path) -> tuple[str, ...]:
    """Class names from classes.txt, or VOC's 21."""
    file = root / "classes.txt"
    if not file.is_file():
        return VOC_CLASSES
    classes = tuple(line.strip() for line in file.read_text().splitlines() if line.strip())
    if not 2 <= len(classes) <= VOID:
        raise UsageError(
            f"{file} names {len(classes)} classes: name 2 to {VOID}, one per line, in index order"
        )
    return classes


def _by_stem(folder: Path, suffixes: set[str]) -> dict[str, Path]:
    return {file.stem: file for file in folder.iterdir() if file.suffix.lower() in suffixes}


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """An image file; damage found when it is opened or, within the context, decoded is a `UsageError`."""
    try:
        with Image.open(path) as file:
            yield file
    except (OSError, SyntaxError) as fault:
        raise UsageError(f"{path} cannot be read as an image ({fault}): replace the file") from None


def _check_sizes(image_path: Path, label_path: Path) -> None:
    """Compare headers; a label in colour is refused here, before anything is decoded."""
    with _opened(image_path) as image, _opened(label_path) as label:
        if label.mode not in ("P", "L"):
            raise UsageError(
                f"{label_path} is a {label.mode} image, not class indices: colours cannot be mapped back to "
                "classes safely; save labels as palette (P) or grey (L) PNGs that hold the class indices"
            )
        if image.size != label.size:
            raise UsageError(
                f"{label_path} is {label.size[0]}x{label.size[1]} pixels, its image {image_path.name} "
                f"{image.size[0]}x{image.size[1]}: a label must have the size of its image"
            )


def _shortened(values: list[int]) -> str:
    shown = ", ".join(str(value) for value in values[:5])
    return shown if len(values) <= 5 else f"{shown}, ... ({len(values)} in all)"
