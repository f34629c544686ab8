"""Any folder in VOC's layout: JPEGImages/ID.jpg, SegmentationClass/ID.png, ImageSets/Segmentation/SPLIT.txt.

Classes are VOC's 21, or those of a classes.txt (one name a line, in index order) or of a dataset.yaml:

    classes: {7: road, 11: building}             # name of each label value; [road, building] names 0 and 1
    void: [0, 254]                               # label values that stand for no class, beside 255
    palette: [[128, 64, 128], [70, 70, 70]]      # for labels in colour: red, green and blue of each class
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from segmentation.data import VOID
from segmentation.data.folder import FolderDataset, Layout, find_folder
from segmentation.errors import UsageError

VOC_CLASSES = (
    "background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow",
    "diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train",
    "tvmonitor",
)  # fmt: skip

Colour = tuple[int, int, int]


class VOCDataset(FolderDataset):
    """One split of a folder in VOC's layout.

    Args:
        data_path: the folder that holds JPEGImages, its parent or its grandparent (VOCdevkit).
        split: name of a list in ImageSets/Segmentation (or, where that folder is missing, in ImageSets).

    Raises:
        UsageError: one line naming the file at fault and the fix.
    """

    def __init__(self, data_path: str | Path, split: str) -> None:
        super().__init__(voc_layout(Path(data_path)), split)


def voc_layout(data_path: Path) -> Layout:
    """Where files lie, and the classes of dataset.yaml or classes.txt, or VOC's."""
    root = find_folder(data_path, "JPEGImages", "--data-path")
    nested = (root / "ImageSets" / "Segmentation").is_dir()
    names, description = root / "classes.txt", root / "dataset.yaml"
    if names.is_file() and description.is_file():
        raise UsageError(f"{root} holds classes.txt and dataset.yaml: keep the one that is right")
    meaning: dict[str, Any] = {"classes": VOC_CLASSES}
    if names.is_file():
        meaning = {"classes": _named(names.read_text().splitlines(), names)}
    elif description.is_file():
        meaning = _described(description)
    return Layout(
        root=root,
        mend=f"name all classes in {names} (one per line, in index order) or mend the labels"
        if not description.is_file()
        else f"name all classes and void values in {description} or mend the labels",
        lists="ImageSets/Segmentation" if nested else "ImageSets",
        **meaning,
    )


def _named(lines: list[str], file: Path) -> tuple[str, ...]:
    classes = tuple(line.strip() for line in lines if line.strip())
    if not 2 <= len(classes) <= VOID:
        raise UsageError(
            f"{file} names {len(classes)} classes: name 2 to {VOID}, one per line, in index order"
        )
    return classes


def _described(file: Path) -> dict[str, Any]:
    """Fields of `Layout` from dataset.yaml."""
    try:
        given = yaml.safe_load(file.read_text())
    except yaml.YAMLError as fault:
        raise UsageError(f"{file} is not YAML: {' '.join(str(fault).split())}") from None
    if not isinstance(given, dict) or "classes" not in given or set(given) - {"classes", "void", "palette"}:
        held = ", ".join(str(key) for key in given) if isinstance(given, dict) else type(given).__name__
        raise UsageError(f"{file} holds {held}: give classes, and where needed void and palette")
    classes = given["classes"]
    if isinstance(classes, list):
        classes = dict(enumerate(classes))
    if not isinstance(classes, dict) or not 2 <= len(classes) <= VOID or not all(map(_is_byte, classes)):
        raise UsageError(
            f"{file}: classes is {given['classes']!r}: give 2 to {VOID} names as a list in index order, or "
            "as a mapping from label value (0 to 254) to name"
        )
    values = tuple(sorted(classes))
    void, void_colours = _void(given.get("void", []), values, file)
    fields: dict[str, Any] = {
        "classes": tuple(str(classes[value]) for value in values),
        "values": values,
        "void": void,
    }
    if "palette" in given:
        fields["colours"] = _colours(given["palette"], void_colours, len(values), file)
    elif void_colours:
        raise UsageError(
            f"{file}: void names colours, but there is no palette: add one, or give label values"
        )
    return fields


def _void(given: Any, values: tuple[int, ...], file: Path) -> tuple[tuple[int, ...], list[Colour]]:
    """Label values and colours that stand for no class."""
    entries = given if isinstance(given, list) else [given]
    numbers = tuple(entry for entry in entries if _is_byte(entry) or entry == VOID)
    colours = [tuple(entry) for entry in entries if _is_colour(entry)]
    if len(numbers) + len(colours) < len(entries):
        raise UsageError(
            f"{file}: void is {given!r}: give a label value such as 0, a list of them such as [0, 254], or "
            "colours such as [[0, 0, 0]]"
        )
    both = sorted(set(numbers) & set(values))
    if both:
        raise UsageError(
            f"{file}: label value {both[0]} is both void and a class: leave it out of void, or give classes "
            "as a mapping without it"
        )
    return numbers, colours


def _colours(given: Any, void: list[Colour], classes: int, file: Path) -> Mapping[Colour, int]:
    """Class index of each colour."""
    if not isinstance(given, list) or len(given) != classes or not all(map(_is_colour, given)):
        raise UsageError(
            f"{file}: palette must be {classes} colours such as [128, 64, 0], one a class in index order"
        )
    colours = {tuple(colour): index for index, colour in enumerate(given)}
    if len(colours) < classes or any(colour in colours for colour in void):
        raise UsageError(f"{file}: palette and void name a colour twice: each class needs one of its own")
    return colours | dict.fromkeys(void, VOID)


def _is_byte(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < VOID


def _is_colour(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) == 3 and all(_is_byte(part) or part == VOID for part in value)
    )
