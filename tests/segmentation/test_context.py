"""Pascal Context from the merged JSON and from the 459 labels, and the order of its classes."""

import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from segmentation.data import context
from segmentation.data.context import CLASSES, RAW, ContextDataset
from segmentation.data.folder import read_ids
from segmentation.errors import UsageError
from tests.segmentation.conftest import write_voc

mask = pytest.importorskip("pycocotools.mask")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

IDS = [f"2008_00000{index}" for index in range(4)]
SPLITS = {"train": IDS[1::-1], "val": IDS[2:]}
VOC = "VOCdevkit/VOC2010"
MASKS = f"{VOC}/SegmentationClassContext"


def raw_label(index):
    """Of the 459 labels: sky above (360), bag (9), a label not among the 59 (1), nothing (0)."""
    label = np.zeros((41, 41), np.uint16)
    label[:20], label[20:30], label[30:35, : 10 + index] = 360, 9, 1
    return label


def wanted(index):
    label = raw_label(index)
    return np.where(label == 360, CLASSES.index("sky"), np.where(label == 9, CLASSES.index("bag"), 0))


@pytest.fixture
def voc(tmp_path):
    """VOC 2010's images and the lists in Main."""
    root = write_voc(tmp_path / VOC, 4)
    for old, new in zip(sorted((root / "JPEGImages").iterdir()), IDS, strict=True):
        old.rename(root / "JPEGImages" / f"{new}.jpg")
    (root / "ImageSets" / "Main").mkdir()
    for split, members in SPLITS.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(members))
    return tmp_path


def run_length(pixels):
    code = mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    return {"size": code["size"], "counts": code["counts"].decode()}


def write_json(root):
    images, annotations = [], []
    for index, identifier in enumerate(IDS):
        number, label = int(identifier.replace("_", "")), raw_label(index)
        phase = next(split for split, members in SPLITS.items() if identifier in members)
        images.append({"file_name": f"{identifier}.jpg", "image_id": number, "height": 41, "width": 41,
                       "phase": phase, "date_captured": ""})  # fmt: skip
        for category in (360, 9):
            annotations.append(
                {"id": len(annotations), "image_id": number, "category_id": category, "parts": [],
                 "iscrowd": 0, "segmentation": run_length(label == category)}
            )  # fmt: skip
    file = root / "trainval_merged.json"
    file.write_text(json.dumps({"info": {}, "images": images, "annos_segmentation": annotations,
                                "categories": [], "parts": []}))  # fmt: skip
    return file


def write_mats(root):
    folder = root / "trainval"
    folder.mkdir(parents=True)
    for index, identifier in enumerate(IDS):
        savemat(folder / f"{identifier}.mat", {"LabelMap": raw_label(index)})
    return folder


def said(work, root):
    lines = []
    return work(root, lines.append), lines


@pytest.mark.parametrize(
    ("write", "source"), [(write_json, "trainval_merged.json"), (write_mats, "459 labels (.mat)")]
)
def test_both_sources_give_index_pngs_in_our_order(voc, write, source):
    write(voc)
    _, lines = said(context.prepare, voc)
    counts = f"Pascal Context: 2 images in train, 2 in val, from {source} (a subset: in full 4996 and 5104"
    assert lines[0] == f"{voc / MASKS}: 4 labels written, 0 were there, from {source}"
    assert lines[1].startswith(counts)
    assert read_ids(voc / VOC / "ImageSets/SegmentationContext/train.txt") == IDS[:2]
    for index, identifier in enumerate(IDS):
        with Image.open(voc / MASKS / f"{identifier}.png") as file:
            np.testing.assert_array_equal(np.array(file), wanted(index))
    assert json.loads((voc / MASKS / "classes.json").read_text()) == {
        "classes": list(CLASSES),
        "source": source,
    }
    dataset = ContextDataset(voc, "val")
    assert (len(dataset.classes), dataset.classes[0], len(dataset)) == (60, "background", 2)
    assert dataset.label_source == f"SegmentationClassContext (2), made from {source}"
    assert 255 not in dataset[0][1]
    faults, lines = said(context.check, voc)
    assert faults == []
    assert lines[0].startswith(counts)


def test_the_order_is_59_labels_order_of_the_raw_numbers(real_data):
    folder = real_data / "pascal_context"
    assert list(CLASSES[1:]) == read_ids(folder / "classes59.txt")
    mapped = [int(line) for line in read_ids(folder / "map459to59.txt")]
    assert {raw: index for index, raw in enumerate(RAW, start=1)} == {
        raw: index for raw, index in enumerate(mapped, start=1) if index
    }
    raw_names = read_ids(folder / "classes459.txt")
    assert len(raw_names) == context.RAW_LABELS
    names = [context.ALIASES.get(raw_names[raw - 1], raw_names[raw - 1]) for raw in RAW]
    assert names == list(CLASSES[1:])


def test_full_counts_of_either_source_are_accepted():
    for train, val in ((4998, 5105), (4996, 5104)):
        lists = {"train": [""] * train, "val": [""] * val}
        assert context._counts("x", lists) == f"Pascal Context: {train} images in train, {val} in val, from x"
    assert "a subset: in full 4996 and 5104" in context._counts(
        "x", {"train": [""] * 4998, "val": [""] * 5104}
    )


def test_masks_of_another_order_or_of_none_are_refused(voc):
    write_mats(voc)
    context.prepare(voc, print)
    file = voc / MASKS / "classes.json"
    alphabetical = {"classes": ["background", *sorted(CLASSES[1:])], "source": "mmseg"}
    file.write_text(json.dumps(alphabetical))
    match = r"classes\.json has another order: class 2 is 'bag', here 'bicycle'; move .* elsewhere and run"
    for refused in (lambda: ContextDataset(voc, "val"), lambda: context.prepare(voc, print)):
        with pytest.raises(UsageError, match=match):
            refused()
    assert "class 2 is 'bag', here 'bicycle'" in said(context.check, voc)[0][0]
    file.write_text(json.dumps({"classes": CLASSES[:-1], "source": "mmseg"}))
    with pytest.raises(UsageError, match=r"names 59 classes, not 60"):
        ContextDataset(voc, "val")
    file.unlink()
    with pytest.raises(
        UsageError, match=r"has no classes\.json: its masks may be in 59_labels\.txt's order or"
    ):
        ContextDataset(voc, "val")


def test_sources_are_not_mixed(voc):
    mats, merged = write_mats(voc), write_json(voc)
    with pytest.raises(UsageError, match=r"whose masks differ: move the one you do not want elsewhere"):
        context.prepare(voc, print)
    mats.rename(voc.parent / f"{voc.name}-mats")
    context.prepare(voc, print)
    merged.unlink()
    with pytest.raises(
        UsageError, match=r"neither trainval_merged\.json nor a folder trainval .*: fetch .*3c2d"
    ):
        context.prepare(voc, print)
    (voc.parent / f"{voc.name}-mats").rename(mats)
    with pytest.raises(
        UsageError, match=r"was made from trainval_merged\.json, not 459 labels \(\.mat\): delete"
    ):
        context.prepare(voc, print)


def test_the_authors_lists_of_names_are_compared(voc):
    mats = write_mats(voc)
    names = {raw: name for raw, name in zip(RAW, CLASSES[1:], strict=True)} | {
        397: "table",
        80: "cloth",
        1: "a",
    }
    (voc / "labels.txt").write_text("".join(f"{number}: {name}\n" for number, name in names.items()))
    (mats / "59_labels.txt").write_text("".join(f"{i}: {name}\n" for i, name in enumerate(CLASSES[1:], 1)))
    context.prepare(voc, print)
    (voc / "labels.txt").write_text("2: accordion\n")
    with pytest.raises(UsageError, match=r"labels\.txt: 2 is 'accordion', expected 'aeroplane': fetch it"):
        context.prepare(voc, print)
    (voc / "labels.txt").unlink()
    (mats / "59_labels.txt").write_text("".join(f"{i}: {n}\n" for i, n in enumerate(sorted(CLASSES[1:]), 1)))
    with pytest.raises(UsageError, match=r"59_labels\.txt: 2 is 'bag', expected 'bicycle'"):
        context.prepare(voc, print)


def test_interrupted_work_goes_on(voc, monkeypatch):
    write_json(voc)
    replace = os.replace

    def dies(partial, target):
        if target.name == f"{IDS[2]}.png":
            raise KeyboardInterrupt
        replace(partial, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        context.prepare(voc, print)
    monkeypatch.undo()
    assert "holds no lists" in said(context.check, voc)[0][0]
    assert "2 labels written, 2 were there" in said(context.prepare, voc)[1][0]
    assert said(context.check, voc)[0] == []


def test_damaged_sources_are_named(voc):
    merged = write_json(voc)
    whole = merged.read_text()
    merged.write_text(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"trainval_merged\.json is not whole \(.*\): fetch"):
        context.prepare(voc, print)
    merged.write_text("{}")
    with pytest.raises(UsageError, match=r"trainval_merged\.json lacks images, annos_segmentation: fetch"):
        context.prepare(voc, print)
    merged.write_text(whole.replace('"category_id": 9,', '"category_id": 460,'))
    with pytest.raises(
        UsageError, match=r"holds 2-dimensional labels from 0 to 460, not an image of 0 to 459"
    ):
        context.prepare(voc, print)
    merged.write_text(whole.replace('"height": 41', '"height": 40'))
    with pytest.raises(UsageError, match=r"a mask is of size \[41, 41\], its image of \[40, 41\]"):
        context.prepare(voc, print)
    merged.unlink()
    mats = write_mats(voc)
    (mats / f"{IDS[3]}.mat").unlink()
    with pytest.raises(UsageError, match=rf"{IDS[3]}\.mat is missing: take it from the archive"):
        context.prepare(voc, print)


def test_check_lists_what_is_wrong(voc):
    write_mats(voc)
    assert "has no SegmentationClassContext folder: run `python" in said(context.check, voc)[0][0]
    context.prepare(voc, print)
    Image.fromarray(np.full((41, 41), 60, np.uint8), mode="L").save(voc / MASKS / f"{IDS[0]}.png")
    Image.fromarray(np.zeros((41, 42), np.uint8), mode="L").save(voc / MASKS / f"{IDS[2]}.png")
    lists = voc / VOC / "ImageSets/SegmentationContext"
    (lists / "train.txt").write_text(f"{IDS[0]}\n{IDS[2]}\n")
    faults = "\n".join(said(context.check, voc)[0])
    assert len(faults.splitlines()) == 4
    for part in (
        "holds the label values 60, but there are 60 classes: values must lie in 0..59",
        "is 42x41 pixels, its image",
        f"share 1 images ({IDS[2]})",
    ):
        assert part in faults


def test_archives_are_unpacked(voc):
    write_mats(voc)
    for archive, name in (("VOCtrainval_03-May-2010.tar", "VOCdevkit"), ("trainval.tar.gz", "trainval")):
        with tarfile.open(voc / archive, "w:gz" if archive.endswith("gz") else "w") as tar:
            tar.add(voc / name, name)
        (voc / name).rename(voc.parent / f"{voc.name}-{name}")
    assert len(said(context.check, voc)[0]) == 2
    context.prepare(voc, print)
    assert said(context.check, voc)[0] == []
