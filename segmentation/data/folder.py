"""Data sets that lie in folders: images, label PNGs, and a list of IDs for each split."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from segmentation.data import VOID
from segmentation.data.labels import Label, opened
from segmentation.errors import UsageError, first_of

LABELS_READ_UP_FRONT = 500
"""So many labels, spread evenly over the split, are read in full before work starts."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Where the files of a data set lie, and what its label values mean.

    Args:
        root: the folder that holds all others.
        classes: names in index order.
        command: makes the labels and lists; None for data that come with them.
        mend: what to do where a label holds what is no class, for messages.
        images: folders of the images, below root.
        labels: folders of the labels, below root; of a label found in two, the first one's counts.
        lists: folder of the lists, below root.
        origin: what the labels were made from, where that is known.
        values: the index of each label value, for data whose values are not the indices themselves.
        void: label values that stand for no class, beside 255.
        colours: class index of each RGB colour, for labels in colour; without it those are refused.
    """

    root: Path
    classes: tuple[str, ...]
    mend: str
    command: str | None = None
    images: tuple[str, ...] = ("JPEGImages",)
    labels: tuple[str, ...] = ("SegmentationClass",)
    lists: str = "ImageSets/Segmentation"
    origin: str | None = None
    values: tuple[int, ...] | None = None
    void: tuple[int, ...] = ()
    colours: Mapping[tuple[int, int, int], int] | None = None

    def ids(self, split: str) -> list[str]:
        """The IDs a list names.

        Raises:
            UsageError: there is no such list, or it is empty.
        """
        file = self.list_file(split)
        identifiers = read_ids(file)
        if not identifiers:
            raise UsageError(f"{file} is empty: list one image ID per line")
        return identifiers

    def list_file(self, split: str) -> Path:
        """The list of a split; where there is none, the error names the lists that exist."""
        folder = self.root / self.lists
        lists = sorted(file.stem for file in folder.glob("*.txt"))
        if not lists:
            raise UsageError(
                f"{folder} holds no lists: write one image ID per line into {folder / split}.txt"
            )
        if split not in lists:
            make_it = f"write one image ID per line into {folder / split}.txt"
            if self.command is not None:
                make_it = f"run `{self.command}`"
            raise UsageError(
                f"there is no list {split!r} in {folder}: {make_it}, or pass another ({', '.join(lists)}) by "
                "--train-split or --val-split to train, by --split to score"
            )
        return folder / f"{split}.txt"

    def files(self) -> "Files":
        """Look up what lies in the folders.

        Raises:
            UsageError: a folder of labels is missing.
        """
        for folder in self.labels:
            if not (self.root / folder).is_dir():
                remedy = "put the label PNGs (class indices, 255 = void) there"
                if self.command is not None:
                    remedy = f"run `{self.command}`"
                raise UsageError(f"{self.root} has {self.images[0]} but no {folder} folder: {remedy}")
        return Files(
            images=_by_stem(self.root, self.images, {".jpg", ".jpeg", ".png"}),
            labels=_by_stem(self.root, self.labels, {".png"}),
        )

    def read_label(self, path: Path) -> Label:
        """Class indices and `VOID`, uint8 [H, W].

        Raises:
            UsageError: the file is damaged, or holds values that are no class.
        """
        with opened(path) as file:
            if file.mode == "RGB" and self.colours is not None:
                return _indices_of_colours(np.array(file), self.colours, path)
            label = np.array(file)
        present = np.flatnonzero(np.bincount(label.ravel(), minlength=VOID + 1))
        foreign = [int(value) for value in present if self._table[value] < 0]
        if foreign:
            raise UsageError(
                f"{path} holds the label values {_shortened(foreign)}, but there are {len(self.classes)} "
                f"classes: values must lie in {_range(self._named)}, or be {_either(self.void)} for void; "
                f"{self.mend}"
            )
        indices: Label = self._table[label].astype(np.uint8)
        return indices

    @property
    def _named(self) -> Sequence[int]:
        """The label value of each class."""
        return range(len(self.classes)) if self.values is None else self.values

    @property
    def _table(self) -> NDArray[np.int16]:
        """Index of each label value, -1 for values that may not occur."""
        table = np.full(VOID + 1, -1, dtype=np.int16)
        table[list(self._named)] = np.arange(len(self.classes))
        table[[*self.void, VOID]] = VOID
        return table

    def check_sizes(self, image_path: Path, label_path: Path) -> None:
        """Compare headers; a label in colour is refused here, before anything is decoded."""
        with opened(image_path) as image, opened(label_path) as label:
            if label.mode not in ("P", "L") and not (label.mode == "RGB" and self.colours is not None):
                raise UsageError(
                    f"{label_path} is a {label.mode} image, not class indices: colours cannot be mapped back "
                    "to classes safely; save labels as palette (P) or grey (L) PNGs that hold the class "
                    "indices, or name each class's colour as the palette of dataset.yaml"
                )
            if image.size != label.size:
                raise UsageError(
                    f"{label_path} is {label.size[0]}x{label.size[1]} pixels, its image {image_path.name} "
                    f"{image.size[0]}x{image.size[1]}: a label must have the size of its image"
                )


@dataclass(frozen=True)
class Files:
    """Images and labels by ID."""

    images: dict[str, Path]
    labels: dict[str, Path]

    def pair(self, identifier: str, layout: Layout, list_file: Path) -> tuple[Path, Path]:
        """Image and label of an ID.

        Raises:
            UsageError: one of them is missing.
        """
        if identifier not in self.images:
            held = " and ".join(str(layout.root / folder) for folder in layout.images)
            raise UsageError(
                f"{list_file} lists {identifier!r}, but {held} holds no such image: "
                "add it, or take the ID off the list (an ID has no folder and no suffix)"
            )
        if identifier not in self.labels:
            raise UsageError(
                f"image {identifier!r} has no label: "
                f"add {layout.root / layout.labels[-1] / identifier}.png, or take the ID off {list_file}"
            )
        return self.images[identifier], self.labels[identifier]


class FolderDataset:
    """One split of a data set in folders.

    Building it checks what can be checked without decoding every image: the folders, the list, that every
    listed image has a label of its own size, and the values of up to `LABELS_READ_UP_FRONT` labels. The
    values of every label are checked again when it is loaded.

    Args:
        layout: of the data set.
        split: name of a list.

    Raises:
        UsageError: one line naming the file at fault and the fix.
    """

    eval_size = 505

    def __init__(self, layout: Layout, split: str) -> None:
        self.layout = layout
        self.root = layout.root
        self.classes = layout.classes
        files = layout.files()
        self.ids = layout.ids(split)
        list_file = layout.list_file(split)
        self._pairs = [files.pair(identifier, layout, list_file) for identifier in self.ids]
        for image, label in self._pairs:
            layout.check_sizes(image, label)
        for index in np.linspace(0, len(self) - 1, min(len(self), LABELS_READ_UP_FRONT)).astype(int):
            layout.read_label(self._pairs[index][1])
        counts = Counter(label.parent.name for _, label in self._pairs)
        folders = " and ".join(f"{folder} ({counts[folder]})" for folder in sorted(counts))
        self.label_source = folders if layout.origin is None else f"{folders}, made from {layout.origin}"

    def __len__(self) -> int:
        return len(self.ids)

    def name(self, index: int) -> str:
        """The image's ID."""
        return self.ids[index]

    def __getitem__(self, index: int) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Image uint8 [3, H, W] in RGB and label int64 [H, W]."""
        image_path, label_path = self._pairs[index]
        with opened(image_path) as file:
            image = F.pil_to_tensor(file.convert("RGB"))
        label = self.layout.read_label(label_path).astype(np.int64)
        return tv_tensors.Image(image), tv_tensors.Mask(torch.from_numpy(label))


def check_split(layout: Layout, split: str) -> list[str]:
    """Read every image and label of a split in full; what is wrong, a line a fault."""
    try:
        files, identifiers, list_file = layout.files(), layout.ids(split), layout.list_file(split)
    except UsageError as fault:
        return [str(fault)]
    faults = [
        f"{list_file} lists {identifier!r} {count} times: keep one of them"
        for identifier, count in Counter(identifiers).items()
        if count > 1
    ]
    # tqdm draws a bar on a terminal and nothing elsewhere.
    for identifier in tqdm(identifiers, desc=f"checking {split}", unit="image", disable=None):
        try:
            image_path, label_path = files.pair(identifier, layout, list_file)
            layout.check_sizes(image_path, label_path)
            with opened(image_path) as image:
                image.load()
            layout.read_label(label_path)
        except UsageError as fault:
            faults.append(str(fault))
    return faults


def overlap(layout: Layout, train: str, val: str) -> list[str]:
    """What is wrong if a split to train on shares images with one to score, else nothing."""
    try:
        shared = sorted(set(layout.ids(train)) & set(layout.ids(val)))
    except UsageError:
        return []  # told by check_split
    if not shared:
        return []
    return [
        f"{layout.list_file(train)} and {layout.list_file(val)} share {len(shared)} images "
        f"({first_of(shared, 1)}): "
        f"take them off {train}.txt, or scores on {val} mean nothing"
    ]


def find_folder(path: Path, holding: str, option: str, prefer: str = "") -> Path:
    """The folder that holds `holding`: `path` itself, or the only one up to two levels below it.

    Args:
        path: where to look.
        holding: name of a folder.
        option: that named the path, for messages.
        prefer: name of the folder to take if there are several.
    """
    if not path.is_dir():
        raise UsageError(f"{option} {path}: no such folder; name the one that holds {holding}")
    found = [folder.parent for folder in folders_below(path, holding, levels=2)]
    preferred = [folder for folder in found if folder.name == prefer]
    if len(found) > 1 and not preferred:
        raise UsageError(
            f"{option} {path} holds several data sets ({', '.join(str(f) for f in found)}): name one"
        )
    if found:
        return (preferred or found)[0]
    raise UsageError(
        f"{option} {path} holds no {holding} folder, nor does a folder one or two levels below: "
        "name the folder that does, its parent or its grandparent"
    )


def folders_below(root: Path, name: str, levels: int) -> list[Path]:
    """The folders called `name` in root, or else one level below, and so on down to `levels` below.

    What an archive was unpacked to in part does not count.
    """
    for level in range(levels + 1):
        found = [
            folder
            for folder in sorted(root.glob("*/" * level + name))
            if folder.is_dir() and not any(part.endswith(".partial") for part in folder.parts)
        ]
        if found:
            return found
    return []


def read_ids(file: Path) -> list[str]:
    """The lines of a list that are not blank."""
    return [line.strip() for line in file.read_text().splitlines() if line.strip()]


def _by_stem(root: Path, folders: tuple[str, ...], suffixes: set[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for folder in reversed(folders):
        if (root / folder).is_dir():
            found |= {
                file.stem: file for file in (root / folder).iterdir() if file.suffix.lower() in suffixes
            }
    return found


def _indices_of_colours(
    label: NDArray[np.uint8], colours: Mapping[tuple[int, int, int], int], path: Path
) -> Label:
    """Indices [H, W] of a label in colour [H, W, 3]."""
    present, inverse = np.unique(label.reshape(-1, 3), axis=0, return_inverse=True)
    triples = [(int(red), int(green), int(blue)) for red, green, blue in present]
    foreign = [triple for triple in triples if triple not in colours]
    if foreign:
        raise UsageError(
            f"{path} holds the colour {list(foreign[0])}, one of {len(foreign)} without a meaning: "
            "add it to palette or void in dataset.yaml, or mend the label"
        )
    indices = np.array([colours[triple] for triple in triples], dtype=np.uint8)
    return indices[inverse.reshape(label.shape[:2])]


def _range(values: Sequence[int]) -> str:
    in_order = list(values) == list(range(len(values)))
    return f"0..{len(values) - 1}" if in_order else _shortened(list(values))


def _either(void: tuple[int, ...]) -> str:
    return " or ".join(str(value) for value in sorted({*void, VOID}))


def _shortened(values: list[int]) -> str:
    shown = ", ".join(str(value) for value in values[:5])
    return shown if len(values) <= 5 else f"{shown}, ... ({len(values)} in all)"
