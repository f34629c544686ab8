"""VOC 2012 with the labels of SBD: the 10,582 images of `trainaug`.

trainaug = VOC train ∪ SBD train ∪ SBD val − VOC val. SBD has no void border. An image that VOC labels itself
keeps VOC's label, so that scores are always taken on SegmentationClass.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
from tqdm import tqdm

from segmentation.data.archives import Archive, still_packed, unpack
from segmentation.data.folder import (
    FolderDataset,
    Layout,
    check_split,
    find_folder,
    folders_below,
    overlap,
    read_ids,
)
from segmentation.data.labels import read_mat, save_label, write_list
from segmentation.data.voc import VOC_CLASSES
from segmentation.errors import UsageError, first_of
from segmentation.files import whole

VOC_TRAIN, VOC_VAL, TRAINAUG = 1464, 1449, 10582
"""Images of the full lists."""

ARCHIVES = (
    Archive(
        "VOCtrainval_11-May-2012.tar",
        "VOCdevkit/VOC2012",
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "6cd6e144f989b92b3379bac3b3de84fd",
    ),
    Archive(
        "benchmark.tgz",
        "benchmark_RELEASE",
        "https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",
        "82b4d87ceb2ed10f6038a1cba92111cb",
    ),
)

OWN, AUGMENTED = "SegmentationClass", "SegmentationClassAug"


class VOCAugDataset(FolderDataset):
    """One split of VOC 2012 with SBD; labels from SegmentationClass where it has them.

    Args:
        data_path: the folder that holds JPEGImages, its parent or its grandparent.
        split: name of a list in ImageSets/Segmentation: trainaug, val.

    Raises:
        UsageError: one line naming the file at fault and the fix; among others if trainaug shares images
            with val.
    """

    def __init__(self, data_path: str | Path, split: str) -> None:
        where = layout(Path(data_path), "--data-path")
        if split == "trainaug" and (faults := overlap(where, split, "val")):
            raise UsageError(faults[0])
        super().__init__(where, split)


def layout(path: Path, option: str) -> Layout:
    """Where files lie."""
    root = find_folder(path, "JPEGImages", option, prefer="VOC2012")
    command = f"python -m segmentation.prepare voc-aug --root {path}"
    return Layout(
        root=root,
        classes=VOC_CLASSES,
        labels=(OWN, AUGMENTED),
        command=command,
        mend=f"replace it, or if it lies in {AUGMENTED} delete it and run `{command}`",
    )


def prepare(root: Path, say: Callable[[str], None]) -> None:
    """Write the labels and the list of trainaug; what is there already is kept.

    Args:
        root: holds VOC 2012 (JPEGImages up to two levels below) and SBD (cls, train.txt, val.txt up to three
            levels below), as folders or archives; or VOC 2012 with a ready-made SegmentationClassAug.
        say: told what is done.

    Raises:
        UsageError: something is missing, damaged, or not the full set's although VOC's lists are full.
    """
    unpack(root, ARCHIVES, say)
    where = layout(root, "--root")
    own = {split: where.ids(split) for split in ("train", "val")}
    sbd = _find_sbd(root)
    if sbd is not None:
        trainaug = _trainaug(own, sbd)
    elif (where.root / AUGMENTED).is_dir():
        trainaug = _ready_made(where.root)
    else:
        raise UsageError(_lacking(where.root))
    fault = _wrong_count(own, trainaug)
    if fault is not None:
        raise UsageError(fault)
    shared = sorted(set(trainaug) & set(own["val"]))
    if shared:
        raise UsageError(
            f"trainaug shares {len(shared)} images with VOC's val ({first_of(shared, 1)}): take them off its "
            "list, or scores on val mean nothing"
        )
    if sbd is not None:
        made = _write_labels(trainaug, where.root, sbd)
        say(f"{where.root / AUGMENTED}: {made} labels written, {len(trainaug) - made} were there")
    write_list(where.root / where.lists / "trainaug.txt", trainaug)
    for line in _counts(own, trainaug):
        say(line)


def check(root: Path, say: Callable[[str], None]) -> list[str]:
    """Read everything that training and scoring would; what is wrong, a line a fault."""
    waiting = still_packed(root, ARCHIVES)
    if waiting:
        return waiting
    where = layout(root, "--root")
    own = {split: where.ids(split) for split in ("train", "val")}
    faults = []
    train = "trainaug"
    if not (where.root / AUGMENTED).is_dir():
        faults.append(
            _lacking(where.root)
            if _find_sbd(root) is None
            else f"there is no {AUGMENTED} in {where.root}: run `{where.command}`"
        )
        where, train = dataclasses.replace(where, labels=(OWN,)), "train"
    elif not (where.root / where.lists / "trainaug.txt").is_file():
        faults.append(f"{where.root / where.lists} has no trainaug.txt: run `{where.command}`")
        train = "train"
    ids = where.ids(train)
    for line in _counts(own, ids if train == "trainaug" else None):
        say(line)
    if train == "trainaug":
        sbd, fault = _find_sbd(root), _wrong_count(own, ids)
        if fault is not None:
            faults.append(fault)
        if sbd is not None and ids != _trainaug(own, sbd):
            faults.append(
                f"{where.list_file(train)} is not VOC train ∪ SBD train ∪ SBD val − VOC val, sorted: "
                f"run `{where.command}`"
            )
    for split in dict.fromkeys(("train", train)):
        faults += overlap(where, split, "val")
    return [*faults, *check_split(where, train), *check_split(where, "val")]


def _find_sbd(root: Path) -> Path | None:
    """The folder of SBD: cls/*.mat beside train.txt and val.txt."""
    for labels in folders_below(root, "cls", levels=3):
        if (labels.parent / "train.txt").is_file() and (labels.parent / "val.txt").is_file():
            return labels.parent
    return None


def _trainaug(own: dict[str, list[str]], sbd: Path) -> list[str]:
    everything = {*own["train"], *read_ids(sbd / "train.txt"), *read_ids(sbd / "val.txt")}
    return sorted(everything - set(own["val"]))


def _ready_made(root: Path) -> list[str]:
    """The IDs of trainaug.txt, or of the two-column list that goes round with SegmentationClassAug."""
    plain = root / "ImageSets" / "Segmentation" / "trainaug.txt"
    if plain.is_file():
        return sorted(read_ids(plain))
    columns = root / "ImageSets" / "SegmentationAug" / "train_aug.txt"
    if not columns.is_file():
        raise UsageError(
            f"{root} has {AUGMENTED} but neither {plain} nor {columns}: add one of them, or SBD itself"
        )
    identifiers = []
    for line in read_ids(columns):
        image, _, label = line.partition(" ")
        if Path(image).stem != Path(label).stem or Path(label).parent.name != AUGMENTED:
            raise UsageError(f"{columns}: {line!r} should read /JPEGImages/ID.jpg /{AUGMENTED}/ID.png")
        identifiers.append(Path(image).stem)
    return sorted(identifiers)


def _wrong_count(own: dict[str, list[str]], trainaug: list[str]) -> str | None:
    """What is wrong if VOC's lists are the full ones and trainaug is not."""
    if (len(own["train"]), len(own["val"])) != (VOC_TRAIN, VOC_VAL) or len(trainaug) == TRAINAUG:
        return None
    return (
        f"trainaug has {len(trainaug)} images, but with VOC's full lists ({VOC_TRAIN} and {VOC_VAL}) it must "
        f"have {TRAINAUG}: SBD's train.txt should name 8498 images and its val.txt 2857; fetch {ARCHIVES[1]}"
    )


def _counts(own: dict[str, list[str]], trainaug: list[str] | None) -> list[str]:
    lines = [f"VOC 2012: {len(own['train'])} images in train, {len(own['val'])} in val"]
    if trainaug is not None:
        lines.append(f"trainaug: {len(trainaug)} images")
    if (len(own["train"]), len(own["val"])) != (VOC_TRAIN, VOC_VAL):
        lines.append(
            f"a subset: in full, train has {VOC_TRAIN}, val {VOC_VAL} and trainaug {TRAINAUG} images"
        )
    return lines


def _write_labels(trainaug: list[str], root: Path, sbd: Path) -> int:
    """Fill SegmentationClassAug; how many labels were not there before."""
    (root / AUGMENTED).mkdir(exist_ok=True)
    made = 0
    # tqdm draws a bar on a terminal and nothing elsewhere.
    for identifier in tqdm(trainaug, desc=AUGMENTED, unit="label", disable=None):
        target, own = root / AUGMENTED / f"{identifier}.png", root / OWN / f"{identifier}.png"
        if target.is_file():
            continue
        if own.is_file():
            with whole(target) as stream:
                stream.write(own.read_bytes())
        else:
            file = sbd / "cls" / f"{identifier}.mat"
            label = read_mat(file, "GTcls", "Segmentation")
            if label.ndim != 2 or label.max(initial=0) >= len(VOC_CLASSES):
                raise UsageError(
                    f"{file} holds {label.ndim}-dimensional labels up to {label.max(initial=0)}, not an "
                    f"image of 0 to {len(VOC_CLASSES) - 1}: replace the file"
                )
            save_label(target, label.astype(np.uint8))
        made += 1
    return made


def _lacking(root: Path) -> str:
    return (
        f"there is no SBD below --root, nor {root / AUGMENTED}: put {ARCHIVES[1]} into --root, or add a "
        f"ready-made {AUGMENTED} with its list"
    )
