"""Pascal Context: VOC 2010's images, 59 classes and background, 60 outputs; background counts.

Two sources go round whose masks differ: the merged JSON of «PASCAL in Detail» and the authors' .mat files of
459 labels. So do two orders of the 59 classes: 59_labels.txt's, which is used here (aeroplane, bicycle, bird,
...), and the alphabetical one (aeroplane, bag, bed, ...). Scores cannot tell a wrong order, so order and
source are kept in classes.json beside the masks, and the order is compared before anything is read.
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from segmentation.data.archives import Archive, still_packed, unpack
from segmentation.data.coco import decoded, read_json
from segmentation.data.folder import (
    FolderDataset,
    Layout,
    check_split,
    find_folder,
    folders_below,
    overlap,
    read_ids,
)
from segmentation.data.labels import Label, read_mat, save_label, write_list
from segmentation.errors import UsageError
from segmentation.files import write_text

CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor", "bag", "bed", "bench", "book", "building", "cabinet", "ceiling", "clothes", "computer",
    "cup", "door", "fence", "floor", "flower", "food", "grass", "ground", "keyboard", "light", "mountain",
    "mouse", "curtain", "platform", "sign", "plate", "road", "rock", "shelves", "sidewalk", "sky", "snow",
    "bedcloth", "track", "tree", "truck", "wall", "water", "window", "wood",
)  # fmt: skip

RAW = (
    2, 23, 25, 31, 34, 45, 59, 65, 72, 98, 397, 113, 207, 258, 284, 308, 347, 368, 416, 427, 9, 18, 22, 33,
    44, 46, 68, 80, 85, 104, 115, 144, 158, 159, 162, 187, 189, 220, 232, 259, 260, 105, 296, 355, 295, 324,
    326, 349, 354, 360, 366, 19, 415, 420, 424, 440, 445, 454, 458,
)  # fmt: skip
"""Of the classes 1 to 59, the number among the 459 labels, which both sources use."""

RAW_LABELS = 459

ALIASES = {"table": "diningtable", "cloth": "clothes", "bedclothes": "bedcloth"}
"""What the 459 labels call three of the 59."""

FULL = {"trainval_merged.json": (4996, 5104), "459 labels (.mat)": (4998, 5105)}
"""Images to train on and to score, by source."""

JSON_SOURCE, MAT_SOURCE = FULL

ARCHIVES = (
    Archive(
        "VOCtrainval_03-May-2010.tar",
        "VOCdevkit/VOC2010",
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2010/VOCtrainval_03-May-2010.tar",
        "da459979d0c395079b5c75ee67908abb",
    ),
    Archive("trainval.tar.gz", "trainval", "https://cs.stanford.edu/~roozbeh/pascal-context/trainval.tar.gz"),
)

_FETCH_JSON = (
    "fetch trainval_merged.json from https://codalabuser.blob.core.windows.net/public/trainval_merged.json "
    "(md5 3c2d0c0656b7be9eb61928ffe885d8ce)"
)


class ContextDataset(FolderDataset):
    """One split of Pascal Context, as `prepare` made it.

    Args:
        data_path: VOC 2010's folder, which holds JPEGImages, its parent or its grandparent.
        split: "train" or "val".

    Raises:
        UsageError: one line naming the file at fault and the fix; among others for masks in another order.
    """

    def __init__(self, data_path: str | Path, split: str) -> None:
        super().__init__(layout(Path(data_path), "--data-path"), split)


def layout(path: Path, option: str) -> Layout:
    """Where files lie; the order of the masks is checked if they are there."""
    command = f"python -m segmentation.prepare context --root {path}"
    root = find_folder(path, "JPEGImages", option, prefer="VOC2010")
    labels = "SegmentationClassContext"
    return Layout(
        root=root,
        classes=CLASSES,
        labels=(labels,),
        lists="ImageSets/SegmentationContext",
        command=command,
        mend=f"delete it and run `{command}`",
        origin=_source(root / labels, command) if any((root / labels).glob("*.png")) else None,
    )


def prepare(root: Path, say: Callable[[str], None]) -> None:
    """Make the masks, classes.json and the lists; what is there already is kept.

    Args:
        root: holds VOC 2010 (JPEGImages up to two levels below) and, up to three levels below, either
            trainval_merged.json or the folder trainval of .mat files, as folders or archives.
        say: told what is done.

    Raises:
        UsageError: something is missing, damaged, or made from another source before.
    """
    unpack(root, ARCHIVES, say)
    where = layout(root, "--root")
    merged, mats = _find_json(root), _find_mats(root)
    if merged is not None and mats is not None:
        raise UsageError(
            f"{root} holds {merged} and {mats}, whose masks differ: move the one you do not want elsewhere"
        )
    if merged is not None:
        source = JSON_SOURCE
        lists, labels = _from_json(merged)
    elif mats is not None:
        source = MAT_SOURCE
        lists, labels = _from_mats(mats, where.root)
    else:
        raise UsageError(
            f"there is neither trainval_merged.json nor a folder trainval of .mat files below --root {root}: "
            f"{_FETCH_JSON}, or {ARCHIVES[1]}"
        )
    masks = where.root / where.labels[0]
    if where.origin not in (None, source):
        raise UsageError(f"{masks} was made from {where.origin}, not {source}: delete it, or put that back")
    masks.mkdir(exist_ok=True)
    write_text(masks / "classes.json", json.dumps({"classes": CLASSES, "source": source}, indent=2) + "\n")
    made = 0
    everything = [identifier for split in lists.values() for identifier in split]
    # tqdm draws a bar on a terminal and nothing elsewhere.
    for identifier in tqdm(everything, desc=masks.name, unit="label", disable=None):
        target = masks / f"{identifier}.png"
        if not target.is_file():
            save_label(target, labels(identifier))
            made += 1
    for split, identifiers in lists.items():
        write_list(where.root / where.lists / f"{split}.txt", identifiers)
    say(f"{masks}: {made} labels written, {len(everything) - made} were there, from {source}")
    say(_counts(source, lists))


def check(root: Path, say: Callable[[str], None]) -> list[str]:
    """Read everything that training and scoring would; what is wrong, a line a fault."""
    waiting = still_packed(root, ARCHIVES)
    if waiting:
        return waiting
    try:
        where = layout(root, "--root")
    except UsageError as fault:
        return [str(fault)]
    if where.origin is None:
        return [f"{where.root} has no {where.labels[0]} folder: run `{where.command}`"]
    faults = [*check_split(where, "train"), *check_split(where, "val"), *overlap(where, "train", "val")]
    if not faults:
        say(_counts(where.origin, {split: where.ids(split) for split in ("train", "val")}))
    return faults


def _source(masks: Path, command: str) -> str:
    """What the masks were made from, once their order is seen to be ours."""
    file = masks / "classes.json"
    if not file.is_file():
        raise UsageError(
            f"{masks} has no classes.json: its masks may be in 59_labels.txt's order or the alphabetical "
            f"one; move it elsewhere and run `{command}`"
        )
    remedy = f"move {masks} elsewhere and run `{command}`"
    content = read_json(file, ("classes", "source"), remedy)
    if content["classes"] != list(CLASSES):
        pairs = zip(content["classes"], CLASSES, strict=False)
        differing = next((pair for pair in enumerate(pairs) if pair[1][0] != pair[1][1]), None)
        told = f"names {len(content['classes'])} classes, not {len(CLASSES)}"
        if differing is not None:
            index, (theirs, ours) = differing
            told = f"has another order: class {index} is {theirs!r}, here {ours!r}"
        raise UsageError(f"{file} {told}; {remedy}")
    return str(content["source"])


def _from_json(file: Path) -> tuple[dict[str, list[str]], Callable[[str], Label]]:
    """The lists, and what draws an image's label."""
    content = read_json(file, ("images", "annos_segmentation"), _FETCH_JSON)
    images = {Path(image["file_name"]).stem: image for image in content["images"]}
    annotations = defaultdict(list)
    for annotation in content["annos_segmentation"]:
        annotations[annotation["image_id"]].append(annotation)

    def label(identifier: str) -> Label:
        image = images[identifier]
        raw = np.zeros((image["height"], image["width"]), dtype=np.int64)
        for annotation in annotations[image["image_id"]]:
            raw[decoded(annotation["segmentation"], *raw.shape)] = annotation["category_id"]
        return _among_59(raw, f"{file}, image {identifier},")

    lists = {
        split: sorted(name for name, image in images.items() if image["phase"] == split)
        for split in ("train", "val")
    }
    return lists, label


def _from_mats(mats: Path, voc: Path) -> tuple[dict[str, list[str]], Callable[[str], Label]]:
    """The lists, which are VOC 2010's, and what reads an image's label."""
    _check_names(mats)
    lists = {}
    for split in ("train", "val"):
        file = voc / "ImageSets" / "Main" / f"{split}.txt"
        if not file.is_file():
            raise UsageError(f"{file} is missing: fetch {ARCHIVES[0]}")
        lists[split] = sorted(read_ids(file))

    def label(identifier: str) -> Label:
        file = mats / f"{identifier}.mat"
        return _among_59(read_mat(file, "LabelMap"), str(file))

    return lists, label


def _among_59(raw: NDArray[np.integer[Any]], origin: str) -> Label:
    """Map the 459 labels to the 59 classes, the rest to background."""
    if raw.ndim != 2 or raw.min(initial=0) < 0 or raw.max(initial=0) > RAW_LABELS:
        raise UsageError(
            f"{origin} holds {raw.ndim}-dimensional labels from {raw.min(initial=0)} to "
            f"{raw.max(initial=0)}, not an image of 0 to {RAW_LABELS}: fetch it again"
        )
    table = np.zeros(RAW_LABELS + 1, dtype=np.uint8)
    table[list(RAW)] = np.arange(1, len(CLASSES))
    indices: Label = table[raw]
    return indices


def _check_names(mats: Path) -> None:
    """Compare the authors' lists of names, where they lie in the folder or beside it, with ours."""
    for name, numbers in (("labels.txt", RAW), ("59_labels.txt", range(1, len(CLASSES)))):
        for file in (mats / name, mats.parent / name):
            if not file.is_file():
                continue
            named = dict(_numbered(file))
            for number, ours in zip(numbers, CLASSES[1:], strict=True):
                theirs = named.get(number, "missing")
                if ALIASES.get(theirs, theirs) != ours:
                    raise UsageError(
                        f"{file}: {number} is {theirs!r}, expected {ours!r}: fetch it and the .mat files "
                        "from https://cs.stanford.edu/~roozbeh/pascal-context"
                    )


def _numbered(file: Path) -> Iterator[tuple[int, str]]:
    """The lines `12: name` of a list; blanks in names do not count."""
    for line in file.read_text().splitlines():
        found = re.fullmatch(r"\s*(\d+)\s*:\s*(.+?)\s*", line)
        if found:
            yield int(found[1]), found[2].replace(" ", "")


def _find_json(root: Path) -> Path | None:
    for level in range(4):
        for file in sorted(root.glob("*/" * level + "trainval_merged.json")):
            return file
    return None


def _find_mats(root: Path) -> Path | None:
    for folder in folders_below(root, "trainval", levels=3):
        if any(folder.glob("*.mat")):
            return folder
    return None


def _counts(source: str, lists: dict[str, list[str]]) -> str:
    counts = (len(lists["train"]), len(lists["val"]))
    line = f"Pascal Context: {counts[0]} images in train, {counts[1]} in val, from {source}"
    if counts not in FULL.values():
        full = " or ".join(f"{train} and {val} from {known}" for known, (train, val) in FULL.items())
        line += f" (a subset: in full {full})"
    return line
