"""COCO 2017 as VOC's 21 classes, to pretrain on: instances drawn once into index PNGs.

Pixels that several instances cover and those of crowds are void. For training, images whose annotations of
the 20 classes cover up to 1000 pixels are left out.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from segmentation.data import VOID
from segmentation.data.archives import Archive, still_packed, unpack
from segmentation.data.folder import FolderDataset, Layout, check_split, find_folder, overlap
from segmentation.data.labels import Label, save_label, write_list
from segmentation.data.voc import VOC_CLASSES
from segmentation.errors import UsageError

CATEGORIES = {
    5: "airplane", 2: "bicycle", 16: "bird", 9: "boat", 44: "bottle", 6: "bus", 3: "car", 17: "cat",
    62: "chair", 21: "cow", 67: "dining table", 18: "dog", 19: "horse", 4: "motorcycle", 1: "person",
    64: "potted plant", 20: "sheep", 63: "couch", 7: "train", 72: "tv",
}  # fmt: skip
"""COCO's number and name of VOC's classes 1 to 20, in VOC's order."""

INDEX = {category: index for index, category in enumerate(CATEGORIES, start=1)}

TRAINED_FROM = 1000
"""Training keeps images with more annotated pixels than this."""

VAL_IMAGES = 5000
"""Images of val2017 in full; all are kept."""

ARCHIVES = (
    Archive("train2017.zip", "train2017", "http://images.cocodataset.org/zips/train2017.zip"),
    Archive("val2017.zip", "val2017", "http://images.cocodataset.org/zips/val2017.zip"),
    Archive(
        "annotations_trainval2017.zip",
        "annotations",
        "http://images.cocodataset.org/annotations/annotations_trainval2017.zip",
    ),
)


class CocoDataset(FolderDataset):
    """One split of COCO 2017 with VOC's classes, as `prepare` made it.

    Args:
        data_path: the folder that holds train2017, its parent or its grandparent.
        split: "train" or "val".

    Raises:
        UsageError: one line naming the file at fault and the fix.
    """

    def __init__(self, data_path: str | Path, split: str) -> None:
        super().__init__(layout(Path(data_path), "--data-path"), split)


def layout(path: Path, option: str) -> Layout:
    """Where files lie."""
    command = f"python -m segmentation.prepare coco --root {path}"
    return Layout(
        root=find_folder(path, "train2017", option),
        classes=VOC_CLASSES,
        images=("train2017", "val2017"),
        command=command,
        mend=f"delete it and run `{command}`",
        origin="COCO 2017's instances",
    )


def prepare(root: Path, say: Callable[[str], None]) -> None:
    """Draw the labels and write the lists; what is there already is kept.

    Args:
        root: holds train2017, val2017 and annotations/instances_*2017.json, as folders or archives.
        say: told what is done.

    Raises:
        UsageError: something is missing or damaged, or pycocotools is.
    """
    unpack(root, ARCHIVES, say)
    where = layout(root, "--root")
    labels = where.root / where.labels[0]
    labels.mkdir(exist_ok=True)
    for split in ("train", "val"):
        file = where.root / "annotations" / f"instances_{split}2017.json"
        images, annotations = _read(file)
        kept, made = [], 0
        # tqdm draws a bar on a terminal and nothing elsewhere.
        for image in tqdm(images, desc=f"{labels.name}, {split}", unit="label", disable=None):
            found = annotations[image["id"]]
            if split == "train" and sum(annotation["area"] for annotation in found) <= TRAINED_FROM:
                continue
            target = labels / f"{Path(image['file_name']).stem}.png"
            kept.append(target.stem)
            if not target.is_file():
                save_label(target, draw(found, image["height"], image["width"]))
                made += 1
        write_list(where.root / where.lists / f"{split}.txt", sorted(kept))
        say(
            f"{split}: {len(kept)} of {len(images)} images; {made} labels written, "
            f"{len(kept) - made} were there"
        )


def check(root: Path, say: Callable[[str], None]) -> list[str]:
    """Read everything that training and scoring would; what is wrong, a line a fault."""
    waiting = still_packed(root, ARCHIVES)
    if waiting:
        return waiting
    where = layout(root, "--root")
    if not (where.root / where.labels[0]).is_dir():
        return [f"{where.root} has no {where.labels[0]} folder: run `{where.command}`"]
    faults = [*check_split(where, "train"), *check_split(where, "val"), *overlap(where, "train", "val")]
    if not faults:
        train, val = where.ids("train"), where.ids("val")
        subset = "" if len(val) == VAL_IMAGES else f" (a subset: in full, val has {VAL_IMAGES})"
        say(f"COCO: {len(train)} images in train, {len(val)} in val{subset}")
    return faults


def draw(annotations: list[dict[str, Any]], height: int, width: int) -> Label:
    """The label of an image from its instances of the 20 classes."""
    label = np.zeros((height, width), dtype=np.uint8)
    covered = np.zeros((height, width), dtype=np.uint16)
    for annotation in annotations:
        inside = decoded(annotation["segmentation"], height, width)
        label[inside] = VOID if annotation["iscrowd"] else INDEX[annotation["category_id"]]
        covered += inside
    label[covered > 1] = VOID
    return label


def decoded(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """The pixels of polygons or of a run-length code, [height, width].

    Raises:
        UsageError: pycocotools is missing, or the code is of another size.
    """
    try:
        from pycocotools import mask
    except ImportError:
        raise UsageError(
            "pycocotools, which reads COCO's masks, is not installed: pip install pycocotools"
        ) from None
    if isinstance(segmentation, dict) and list(segmentation["size"]) != [height, width]:
        raise UsageError(
            f"a mask is of size {segmentation['size']}, its image of [{height}, {width}]: fetch the "
            "annotations again"
        )
    if isinstance(segmentation, list):
        code = mask.merge(mask.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        code = mask.frPyObjects(segmentation, height, width)
    else:
        code = segmentation
    pixels: NDArray[np.bool_] = mask.decode(code).astype(bool)
    return pixels


def read_json(file: Path, fields: tuple[str, ...], remedy: str) -> dict[str, Any]:
    """A JSON file that has these fields."""
    if not file.is_file():
        raise UsageError(f"{file} is missing: {remedy}")
    try:
        content = json.loads(file.read_bytes())
    except ValueError as fault:
        raise UsageError(f"{file} is not whole ({fault}): {remedy}") from None
    lacking = [field for field in fields if not isinstance(content, dict) or field not in content]
    if lacking:
        raise UsageError(f"{file} lacks {', '.join(lacking)}: {remedy}")
    return dict(content)


def _read(file: Path) -> tuple[list[dict[str, Any]], dict[int, list[dict[str, Any]]]]:
    """The images, and the annotations of the 20 classes by image."""
    remedy = f"fetch {ARCHIVES[2]}"
    content = read_json(file, ("images", "annotations", "categories"), remedy)
    names = {category["id"]: category["name"] for category in content["categories"]}
    for category, name in CATEGORIES.items():
        if names.get(category) != name:
            raise UsageError(
                f"{file} calls category {category} {names.get(category)!r}, in COCO it is {name!r}: {remedy}"
            )
    annotations = defaultdict(list)
    for annotation in content["annotations"]:
        if annotation["category_id"] in CATEGORIES:
            annotations[annotation["image_id"]].append(annotation)
    return content["images"], annotations
