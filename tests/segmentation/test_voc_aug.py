"""VOC 2012 with SBD: trainaug computed, labels made, checked, trained on."""

import errno
import os
import tarfile

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat

from segmentation.data import sbd
from segmentation.data.folder import read_ids
from segmentation.data.labels import voc_palette
from segmentation.data.sbd import VOCAugDataset
from segmentation.errors import UsageError
from tests.segmentation.conftest import write_voc


def write_sbd(root, splits, size=41):
    """SBD's folder for scenes whose images lie in VOC: GTcls.Segmentation in cls/ID.mat."""
    (root / "cls").mkdir(parents=True)
    for split, members in splits.items():
        (root / f"{split}.txt").write_text("".join(f"scene_{index}\n" for index in members))
        for index in members:
            save_mat(root, index, np.full((size, size), index))
    return root


def save_mat(root, index, label):
    fields = {"Segmentation": label.astype(np.uint8), "Boundaries": np.zeros((20, 1), object),
              "CategoriesPresent": np.unique(label)}  # fmt: skip
    savemat(root / "cls" / f"scene_{index}.mat", {"GTcls": fields})


@pytest.fixture
def folder(tmp_path):
    """VOC train 0 1, val 2 3; SBD train 1 2 4, val 3 5: it labels VOC's val too, and 4 and 5 alone."""
    voc = write_voc(tmp_path / "VOCdevkit" / "VOC2012", 6, splits={"train": [1, 0], "val": [2, 3]})
    (voc / "classes.txt").unlink()
    for index in (4, 5):
        (voc / "SegmentationClass" / f"scene_{index}.png").unlink()
    write_sbd(tmp_path / "benchmark_RELEASE" / "dataset", {"train": [4, 2, 1], "val": [5, 3]})
    return tmp_path


VOC = "VOCdevkit/VOC2012"
SBD = "benchmark_RELEASE/dataset"
TRAINAUG = ["scene_0", "scene_1", "scene_4", "scene_5"]


def said(work, *arguments):
    lines = []
    return work(*arguments, lines.append), lines


def test_trainaug_is_the_union_without_val_sorted(folder):
    _, lines = said(sbd.prepare, folder)
    assert read_ids(folder / VOC / "ImageSets/Segmentation/trainaug.txt") == TRAINAUG
    assert lines == [
        f"{folder / VOC / 'SegmentationClassAug'}: 4 labels written, 0 were there",
        "VOC 2012: 2 images in train, 2 in val",
        "trainaug: 4 images",
        "a subset: in full, train has 1464, val 1449 and trainaug 10582 images",
    ]
    assert said(sbd.check, folder) == ([], lines[1:])


def test_labels_are_sbds_with_vocs_palette_and_vocs_own_where_they_exist(folder):
    sbd.prepare(folder, print)
    made, own = folder / VOC / "SegmentationClassAug", folder / VOC / "SegmentationClass"
    assert sorted(file.stem for file in made.iterdir()) == TRAINAUG
    assert (made / "scene_1.png").read_bytes() == (own / "scene_1.png").read_bytes()
    with Image.open(made / "scene_4.png") as file:
        assert file.mode == "P"
        assert file.getpalette() == voc_palette().ravel().tolist()
        np.testing.assert_array_equal(np.array(file), np.full((41, 41), 4))


def test_val_is_scored_on_vocs_own_labels(folder):
    sbd.prepare(folder, print)
    made = folder / VOC / "SegmentationClassAug"
    (made / "scene_2.png").write_bytes((made / "scene_4.png").read_bytes())
    val, train = VOCAugDataset(folder / "VOCdevkit", "val"), VOCAugDataset(folder, "trainaug")
    assert 255 in val[0][1]
    assert val.label_source == "SegmentationClass (2)"
    assert train.label_source == "SegmentationClass (2) and SegmentationClassAug (2)"
    assert (train[2][1] == 4).all()


def full_lists(folder, voc_in_sbd):
    """Lists as long as the real ones; so many of VOC's images are in SBD."""
    lists = folder / VOC / "ImageSets" / "Segmentation"
    voc = [f"v{index}" for index in range(1464 + 1449)]
    augmented = voc[:voc_in_sbd] + [f"s{index}" for index in range(8498 + 2857 - voc_in_sbd)]
    for file, names in (
        (lists / "val.txt", voc[:1449]), (lists / "train.txt", voc[1449:]),
        (folder / SBD / "train.txt", augmented[:8498]), (folder / SBD / "val.txt", augmented[8498:]),
    ):  # fmt: skip
        file.write_text("\n".join(names))


def test_the_full_lists_must_give_10582(folder):
    full_lists(folder, voc_in_sbd=2237)
    with pytest.raises(UsageError, match=r"v\d+\.mat is missing|s\d+\.mat is missing"):
        sbd.prepare(folder, print)
    full_lists(folder, voc_in_sbd=2236)
    with pytest.raises(UsageError, match=r"trainaug has 10583 images, .* must have 10582: SBD's train\.txt"):
        sbd.prepare(folder, print)


def test_interrupted_work_goes_on_and_half_a_file_is_no_label(folder, monkeypatch):
    made = folder / VOC / "SegmentationClassAug"

    def dies(partial, target):
        if target.name == "scene_4.png":
            raise KeyboardInterrupt
        replace(partial, target)

    replace = os.replace
    monkeypatch.setattr(os, "replace", dies)
    with pytest.raises(KeyboardInterrupt):
        sbd.prepare(folder, print)
    monkeypatch.undo()
    assert sorted(file.name for file in made.glob("*.png")) == ["scene_0.png", "scene_1.png"]
    (made / "scene_4.png.partial").write_bytes(b"half")
    before = (made / "scene_0.png").stat().st_mtime_ns
    faults, _ = said(sbd.check, folder)
    assert len(faults) == 1
    assert "has no trainaug.txt: run `python -m segmentation.prepare voc-aug --root" in faults[0]
    _, lines = said(sbd.prepare, folder)
    assert lines[0].endswith("2 labels written, 2 were there")
    assert (made / "scene_0.png").stat().st_mtime_ns == before
    assert said(sbd.check, folder)[0] == []


def test_a_full_disk_ends_in_one_line_and_leaves_no_half_label(folder, monkeypatch):
    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        UsageError, match=r"scene_0\.png could not be written \(No space left on device\): free"
    ):
        sbd.prepare(folder, print)
    assert not list((folder / VOC / "SegmentationClassAug").iterdir())


def test_a_broken_mat_file_is_named_and_the_rest_resumes(folder):
    file = folder / SBD / "cls" / "scene_5.mat"
    whole = file.read_bytes()
    for damage in (whole[: len(whole) // 2], b"no mat", b""):
        file.write_bytes(damage)
        with pytest.raises(UsageError, match=r"scene_5\.mat cannot be read as a \.mat file with GTcls\.Segm"):
            sbd.prepare(folder, print)
    savemat(file, {"LabelMap": np.zeros((41, 41), np.uint16)})
    with pytest.raises(UsageError, match=r"KeyError: 'GTcls'"):
        sbd.prepare(folder, print)
    save_mat(folder / SBD, 5, np.full((41, 41), 21))
    with pytest.raises(UsageError, match=r"labels up to 21, not an image of 0 to 20"):
        sbd.prepare(folder, print)
    file.unlink()
    with pytest.raises(UsageError, match=r"scene_5\.mat is missing"):
        sbd.prepare(folder, print)
    file.write_bytes(whole)
    assert said(sbd.prepare, folder)[1][0].endswith("1 labels written, 3 were there")


def test_archives_are_unpacked(folder):
    for archive, name in (
        ("VOCtrainval_11-May-2012.tar", "VOCdevkit"),
        ("benchmark.tgz", "benchmark_RELEASE"),
    ):
        with tarfile.open(folder / archive, "w:gz" if archive.endswith("tgz") else "w") as tar:
            tar.add(folder / name, name)
        (folder / name).rename(folder / f"was {name}")
    (folder / "elsewhere").mkdir()
    for archive in ("VOCtrainval_11-May-2012.tar", "benchmark.tgz"):
        (folder / archive).rename(folder / "elsewhere" / archive)
    root = folder / "elsewhere"
    faults, _ = said(sbd.check, root)
    assert [fault.endswith("is not unpacked: run the same command without --check") for fault in faults] == [
        True, True
    ]  # fmt: skip
    sbd.prepare(root, print)
    assert said(sbd.check, root)[0] == []
    assert not list(root.glob("*.partial"))
    assert "unpacking" not in "".join(said(sbd.prepare, root)[1])


def test_a_damaged_archive_leaves_nothing_that_looks_whole(folder):
    (folder / "benchmark_RELEASE").rename(folder / "dataset")
    archive = folder / "benchmark.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / "dataset", "benchmark_RELEASE")
    whole = archive.read_bytes()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"benchmark\.tgz cannot be unpacked .*: fetch it again, .*82b4d87c"):
        sbd.prepare(folder, print)
    assert not (folder / "benchmark_RELEASE").exists()
    archive.write_bytes(whole)
    (folder / "benchmark.tgz.partial" / "benchmark_RELEASE" / "stray").touch()
    sbd.prepare(folder, print)
    assert (folder / "benchmark_RELEASE" / "dataset" / "cls").is_dir()
    assert not (folder / "benchmark_RELEASE" / "stray").exists()
    (folder / "benchmark_RELEASE").rename(folder / "was")
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(folder / "dataset", "another")
    with pytest.raises(UsageError, match=r"benchmark\.tgz holds no folder benchmark_RELEASE: fetch it again"):
        sbd.prepare(folder, print)


def ready_made(folder):
    """A folder as it goes round: no SBD, SegmentationClassAug made."""
    sbd.prepare(folder, print)
    (folder / VOC / "ImageSets/Segmentation/trainaug.txt").unlink()
    (folder / "benchmark_RELEASE").rename(folder.parent / f"{folder.name}-sbd")
    return folder / VOC


def test_ready_made_folders_are_accepted(folder):
    voc = ready_made(folder)
    with pytest.raises(
        UsageError, match=r"has SegmentationClassAug but neither .*trainaug\.txt nor .*train_aug"
    ):
        sbd.prepare(folder, print)
    columns = voc / "ImageSets" / "SegmentationAug" / "train_aug.txt"
    columns.parent.mkdir()
    columns.write_text(
        "".join(f"/JPEGImages/{i}.jpg /SegmentationClassAug/{i}.png\n" for i in TRAINAUG[::-1])
    )
    sbd.prepare(folder, print)
    assert read_ids(voc / "ImageSets/Segmentation/trainaug.txt") == TRAINAUG
    assert said(sbd.check, folder)[0] == []
    columns.unlink()
    sbd.prepare(folder, print)
    assert said(sbd.check, folder)[0] == []


def test_a_ready_made_list_may_not_hold_vals_images_nor_mix_names(folder):
    voc = ready_made(folder)
    (voc / "ImageSets/Segmentation/trainaug.txt").write_text("scene_0\nscene_2\n")
    with pytest.raises(UsageError, match=r"trainaug shares 1 images with VOC's val \(scene_2\)"):
        sbd.prepare(folder, print)
    faults, _ = said(sbd.check, folder)
    assert "share 1 images (scene_2): take them off trainaug.txt" in faults[0]
    with pytest.raises(UsageError, match=r"share 1 images \(scene_2\): take them off trainaug\.txt"):
        VOCAugDataset(folder, "trainaug")
    (voc / "ImageSets/Segmentation/trainaug.txt").unlink()
    columns = voc / "ImageSets" / "SegmentationAug" / "train_aug.txt"
    columns.parent.mkdir()
    columns.write_text("/JPEGImages/a.jpg /SegmentationClassAug/b.png\n")
    with pytest.raises(UsageError, match=r"should read /JPEGImages/ID\.jpg /SegmentationClassAug/ID\.png"):
        sbd.prepare(folder, print)


def test_check_lists_every_fault(folder):
    sbd.prepare(folder, print)
    voc = folder / VOC
    made = voc / "SegmentationClassAug"
    Image.fromarray(np.full((41, 41), 21, np.uint8), mode="L").save(made / "scene_4.png")
    Image.fromarray(np.zeros((41, 40), np.uint8), mode="L").save(made / "scene_5.png")
    image = voc / "JPEGImages" / "scene_1.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    (voc / "SegmentationClass" / "scene_3.png").unlink()
    trainaug = voc / "ImageSets/Segmentation/trainaug.txt"
    trainaug.write_text(trainaug.read_text() + "scene_0\n")
    faults = "\n".join(said(sbd.check, folder)[0])
    assert len(faults.splitlines()) == 6
    for part in (
        r"trainaug.txt is not VOC train ∪ SBD train ∪ SBD val − VOC val, sorted: run `python",
        r"trainaug.txt lists 'scene_0' 2 times: keep one of them",
        r"scene_1.jpg cannot be read as an image",
        r"scene_4.png holds the label values 21, but there are 21 classes: values must lie in 0..20",
        r"scene_5.png is 40x41 pixels, its image scene_5.jpg 41x41",
        r"image 'scene_3' has no label",
    ):
        assert part in faults


def test_without_sbd_prepare_says_what_to_fetch_and_check_still_reads_voc(folder):
    (folder / "benchmark_RELEASE").rename(folder.parent / f"{folder.name}-sbd")
    with pytest.raises(
        UsageError, match=r"there is no SBD below --root, .*: put benchmark\.tgz from https.*md5"
    ):
        sbd.prepare(folder, print)
    (folder / VOC / "SegmentationClass" / "scene_1.png").unlink()
    faults, _ = said(sbd.check, folder)
    assert ["there is no SBD" in faults[0], "'scene_1' has no label" in faults[1]] == [True, True]
    assert len(faults) == 2


def test_real_voc_with_an_sbd_made_of_its_other_labels(real_data, tmp_path):
    """train_extra plays SBD: its labels, without void, go through .mat files."""
    real = real_data / "VOCdevkit" / "VOC2012"
    voc = tmp_path / "VOC2012"
    (voc / "SegmentationClass").mkdir(parents=True)
    (voc / "JPEGImages").symlink_to(real / "JPEGImages")
    (voc / "ImageSets").symlink_to(real / "ImageSets")
    lists = real / "ImageSets" / "Segmentation"
    for identifier in read_ids(lists / "trainval.txt"):
        (voc / "SegmentationClass" / f"{identifier}.png").symlink_to(
            real / "SegmentationClass" / f"{identifier}.png"
        )
    faults, lines = said(sbd.check, tmp_path)
    assert len(faults) == 1
    assert "there is no SBD below --root" in faults[0]
    assert lines[0] == "VOC 2012: 311 images in train, 257 in val"
    (voc / "ImageSets").unlink()
    (voc / "ImageSets" / "Segmentation").mkdir(parents=True)
    for split in ("train", "val"):
        (voc / "ImageSets" / "Segmentation" / f"{split}.txt").write_text((lists / f"{split}.txt").read_text())
    (tmp_path / "sbd" / "cls").mkdir(parents=True)
    extra = read_ids(lists / "train_extra.txt")
    for identifier in extra:
        with Image.open(real / "SegmentationClass" / f"{identifier}.png") as file:
            label = np.array(file)
        label[label == 255] = 0
        savemat(tmp_path / "sbd" / "cls" / f"{identifier}.mat", {"GTcls": {"Segmentation": label}})
    (tmp_path / "sbd" / "train.txt").write_text("\n".join(extra))
    (tmp_path / "sbd" / "val.txt").write_text("\n".join(read_ids(lists / "val.txt")))
    sbd.prepare(tmp_path, print)
    assert said(sbd.check, tmp_path)[0] == []
    assert read_ids(voc / "ImageSets/Segmentation/trainaug.txt") == sorted(read_ids(lists / "train_all.txt"))
