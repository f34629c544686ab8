"""COCO's instances as VOC's classes."""

import json
import os
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image

from segmentation.data import coco
from segmentation.data.coco import CATEGORIES, CocoDataset
from segmentation.data.folder import read_ids
from segmentation.data.voc import VOC_CLASSES
from segmentation.errors import UsageError

mask = pytest.importorskip("pycocotools.mask")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

SIZE = 60


def box(top, left, bottom, right):
    return [[left, top, right, top, right, bottom, left, bottom]]


def uncompressed(pixels):
    """COCO's code of a crowd: lengths of the runs of 0 and 1, column by column."""
    flat = pixels.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(pixels.shape), "counts": [0, *runs] if flat[0] else runs}


def instance(image, category, segmentation, area, crowd=0):
    return {"image_id": image, "category_id": category, "segmentation": segmentation, "area": area,
            "iscrowd": crowd, "bbox": []}  # fmt: skip


def write_split(root, split, images, annotations):
    (root / f"{split}2017").mkdir(parents=True)
    (root / "annotations").mkdir(exist_ok=True)
    for image in images:
        pixels = np.random.default_rng(image).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / f"{split}2017" / f"{image:012d}.jpg")
    content = {
        "images": [{"id": i, "file_name": f"{i:012d}.jpg", "height": SIZE, "width": SIZE} for i in images],
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in CATEGORIES.items()]
        + [{"id": 88, "name": "teddy"}],
    }
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


@pytest.fixture
def root(tmp_path):
    """1: a person and a dog that overlap, a crowd, a teddy bear. 2, 4: too little. 3: a cat. val: 5, 6."""
    crowd = np.zeros((SIZE, SIZE), np.uint8)
    crowd[50:, :20] = 1
    write_split(tmp_path, "train", [3, 2, 1, 4], [
        instance(1, 1, box(0, 0, 30, 30), 900), instance(1, 18, box(20, 20, 40, 40), 400),
        instance(1, 1, uncompressed(crowd), 200, crowd=1), instance(1, 1, box(55, 10, 60, 30), 100),
        instance(1, 88, box(0, 50, 60, 60), 600),
        instance(2, 17, box(0, 0, 25, 40), 1000), instance(3, 17, box(0, 0, 26, 40), 1001),
        instance(4, 88, box(0, 0, 60, 60), 3600),
    ])  # fmt: skip
    write_split(tmp_path, "val", [5, 6], [instance(5, 72, box(0, 0, 10, 10), 100)])
    return tmp_path


def said(work, root):
    lines = []
    return work(root, lines.append), lines


def test_instances_become_vocs_classes_overlaps_and_crowds_void(root):
    assert said(coco.prepare, root)[1] == [
        "train: 2 of 4 images; 2 labels written, 0 were there",
        "val: 2 of 2 images; 2 labels written, 0 were there",
    ]
    train = CocoDataset(root, "train")
    assert (train.ids, train.classes) == (["000000000001", "000000000003"], VOC_CLASSES)
    wanted = np.zeros((SIZE, SIZE), np.int64)
    wanted[:30, :30] = VOC_CLASSES.index("person")
    wanted[20:40, 20:40] = VOC_CLASSES.index("dog")
    wanted[20:30, 20:30] = 255
    wanted[55:60, 10:30] = VOC_CLASSES.index("person")
    wanted[50:, :20] = 255
    np.testing.assert_array_equal(train[0][1].numpy(), wanted)
    assert train.label_source == "SegmentationClass (2), made from COCO 2017's instances"
    val = CocoDataset(root, "val")
    assert val[0][1].unique().tolist() == [0, VOC_CLASSES.index("tvmonitor")]
    faults, lines = said(coco.check, root)
    assert (faults, lines) == ([], ["COCO: 2 images in train, 2 in val (a subset: in full, val has 5000)"])


def test_categories_are_in_vocs_order():
    theirs = {"airplane": "aeroplane", "dining table": "diningtable", "motorcycle": "motorbike",
              "potted plant": "pottedplant", "couch": "sofa", "tv": "tvmonitor"}  # fmt: skip
    assert tuple(theirs.get(name, name) for name in CATEGORIES.values()) == VOC_CLASSES[1:]
    table = [5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72]
    assert list(CATEGORIES) == table


def test_other_categories_and_damaged_files_are_refused(root):
    file = root / "annotations" / "instances_train2017.json"
    whole = file.read_text()
    file.write_text(whole.replace('"airplane"', '"dog"'))
    with pytest.raises(
        UsageError, match=r"calls category 5 'dog', in COCO it is 'airplane': fetch annotations_tr"
    ):
        coco.prepare(root, print)
    file.write_text(whole[:-20])
    with pytest.raises(UsageError, match=r"instances_train2017\.json is not whole"):
        coco.prepare(root, print)
    file.unlink()
    with pytest.raises(
        UsageError, match=r"instances_train2017\.json is missing: fetch annotations_trainval2017"
    ):
        coco.prepare(root, print)


def test_interrupted_work_goes_on(root, monkeypatch):
    replace = os.replace

    def dies(partial, target):
        if target.name == "000000000001.png":
            raise KeyboardInterrupt
        replace(partial, target)

    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        coco.prepare(root, print)
    monkeypatch.undo()
    assert "holds no lists" in said(coco.check, root)[0][0]
    assert "1 labels written, 1 were there" in said(coco.prepare, root)[1][0]
    assert said(coco.check, root)[0] == []


def test_check_lists_what_is_wrong(root):
    assert (
        "has no SegmentationClass folder: run `python -m segmentation.prepare coco"
        in said(coco.check, root)[0][0]
    )
    coco.prepare(root, print)
    labels = root / "SegmentationClass"
    Image.fromarray(np.full((SIZE, SIZE), 40, np.uint8), mode="L").save(labels / "000000000003.png")
    (labels / "000000000005.png").write_bytes((labels / "000000000005.png").read_bytes()[:100])
    lists = root / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("\n".join([*read_ids(lists / "train.txt"), "000000000006"]))
    faults = "\n".join(said(coco.check, root)[0])
    assert len(faults.splitlines()) == 3
    for part in (
        "holds the label values 40",
        "000000000005.png cannot be read as an image",
        "share 1 images",
    ):
        assert part in faults


def test_archives_are_unpacked(root):
    for name in ("train2017", "val2017", "annotations"):
        archive = root / (f"{name}.zip" if name != "annotations" else "annotations_trainval2017.zip")
        with zipfile.ZipFile(archive, "w") as zipped:
            for file in (root / name).iterdir():
                zipped.write(file, f"{name}/{file.name}")
        (root / name).rename(root.parent / f"{root.name}-{name}")
    assert len(said(coco.check, root)[0]) == 3
    coco.prepare(root, print)
    assert said(coco.check, root)[0] == []


def test_without_pycocotools_the_message_names_the_extra(root, monkeypatch):
    monkeypatch.setitem(sys.modules, "pycocotools", None)
    with pytest.raises(UsageError, match=r"is not installed: pip install pycocotools$"):
        coco.prepare(root, print)
